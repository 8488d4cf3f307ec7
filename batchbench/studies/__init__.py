"""Studies run experiments and read their metrics: sweeps, capacity, the ladder, gates, trends."""
