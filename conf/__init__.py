"""Shipped configurations: modes (`full`, `quick`, `demo`) and GPU presets (`gpu/`)."""
