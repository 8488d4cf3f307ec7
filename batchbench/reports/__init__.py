"""Reports: metrics, audit, result, figures and documents, computed from Recordings alone."""
