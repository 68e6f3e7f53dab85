"""Inputs that were made to do harm."""
