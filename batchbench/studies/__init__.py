"""What runs experiments and reads their metrics: sweeps, capacity, the ladder."""
