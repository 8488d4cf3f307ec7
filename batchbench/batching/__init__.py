"""How it is served: scheduler, policies, engines, recording, experiment, verification."""
