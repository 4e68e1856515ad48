"""Several processes: how they start, share a run and its work."""
