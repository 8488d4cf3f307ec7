"""The version of batchbench and of result.json, in a file that imports nothing."""

__version__ = "0.1.0"
"""Version of a checkout; a build has that of its git tag here (``hatch_build.py``)."""

SCHEMA_VERSION = 1
"""Version of the format of ``result.json`` and of the cells of a sweep."""
