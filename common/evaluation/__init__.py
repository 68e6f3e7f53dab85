"""Word error rates, comparisons, and the evaluation of gates."""
