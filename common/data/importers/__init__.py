"""Importers: corpora from tables, folders and published releases."""
