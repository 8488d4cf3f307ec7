"""Servers reached over HTTP: their address, requests and time stamps, and the tokens they send."""
