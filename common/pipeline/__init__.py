"""The pipeline: contracts of stages, keys, plans, run records, and the execution of stages."""
