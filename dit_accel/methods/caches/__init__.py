"""Step caches: a forecast in place of a forward, where two steps hardly differ; one file each."""
