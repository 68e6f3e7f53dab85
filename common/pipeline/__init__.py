"""What runs a stage: its contract, keys, plan, run records, and everything that surrounds its function."""
