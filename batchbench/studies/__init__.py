"""What runs experiments and reads their metrics: the ladder."""
