"""Generated documentation: reference pages and tables of README.md (`make reference` writes, a test compares)."""
