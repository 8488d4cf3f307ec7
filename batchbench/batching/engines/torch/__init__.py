"""Engines that compute with torch on the slot cache: forward, cache, attention, times."""

import os

# Threads of OpenMP that wait for one another should soon give way: beside a busy process they would
# spin on the core that the other needs (docs/log.md). Set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
