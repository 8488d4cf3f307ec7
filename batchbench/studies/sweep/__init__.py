"""Sweeps: a grid of experiments, their table and pictures."""
