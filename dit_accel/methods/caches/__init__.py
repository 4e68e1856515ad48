"""Caches: what an earlier step computed in place of a forward or block, where two steps hardly differ."""
