"""Engines that compute with torch on the slot cache: forward, cache, attention, times."""
