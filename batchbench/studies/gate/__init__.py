"""The regression gate: compare, duet, check and baselines."""
