"""What surrounds a stage: its contract, the plan of a run, records, metrics."""
