"""Servers that are measured over HTTP."""
