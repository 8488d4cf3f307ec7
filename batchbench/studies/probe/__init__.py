"""The probe: find out from outside whether and how a server batches its requests."""
