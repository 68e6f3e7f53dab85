"""Side-by-side measurements against what a user would pick instead. Nothing here is imported by the product."""
