"""Replay of a trial: its frames, on a terminal and as a GIF."""
