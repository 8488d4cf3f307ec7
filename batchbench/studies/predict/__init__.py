"""Predictions: other batch sizes, and where continuous batching breaks even."""
