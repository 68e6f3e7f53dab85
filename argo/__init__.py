"""The pipeline as an Argo workflow: built from the stages' contracts, submitted, and its progress read."""
