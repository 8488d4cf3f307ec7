"""Trends: the commits at which kept results changed."""
