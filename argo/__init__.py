"""The pipeline as an Argo workflow: built from the stages' contracts, submitted, looked at and drawn."""
