"""report.html, its plots, and the model card."""
