"""Generated documentation: reference pages and tables of other pages (`make reference` writes, a test compares)."""
