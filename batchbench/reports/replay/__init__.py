"""Replays of a trial: its moments, on a terminal and as a GIF."""
