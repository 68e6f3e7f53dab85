"""Measurements against common alternatives. The program does not import this package."""
