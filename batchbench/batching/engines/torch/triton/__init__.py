"""Passes of a GPU with Triton: kernels, what launches them, and where they are used."""
