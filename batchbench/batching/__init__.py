"""Serving a workload: scheduler, policies, engines, recording, experiment, verification."""
