"""Formats of a result, one per file, for people or for programs."""
