"""Importers: corpora from tables, folders and published releases.

tables.py       a table with audio paths: CSV, JSON Lines, JSON (a NeMo manifest is one)
audiofolder.py  a Hugging Face audiofolder
sap.py          the Speech Accessibility Project
torgo.py        TORGO
columns.py      which column of a table is which field
records.py      a table's file as records
values.py       a cell as text
folders.py      files of a folder, and what kind of folder it is
stretches.py    several utterances in one file
splits.py       train, dev and test
build.py        from rows to a corpus folder
"""
