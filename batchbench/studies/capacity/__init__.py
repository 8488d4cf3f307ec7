"""Capacity: the highest request rate that each strategy sustains."""
