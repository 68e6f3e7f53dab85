"""Generated documentation: reference pages and tables of other pages (`make generate` writes, a test compares)."""
