"""Serving: scheduler, policies, engines, recording, experiment, verification."""
