"""Strategies that run on a server, over HTTP."""
