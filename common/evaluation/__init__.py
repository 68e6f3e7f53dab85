"""Word error rates, comparisons, and whether a gate can be believed."""
