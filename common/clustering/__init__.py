"""Groups of similar speech."""
