"""Executors: where the independent parts of a study run."""
