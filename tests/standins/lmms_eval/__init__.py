"""Stands in for lmms-eval where that is not installed: its command line and its files."""
