"""What it means: metrics, comparison, audit, result, figures; pure functions of Recordings."""
