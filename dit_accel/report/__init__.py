"""The report: what really ran in the last generation."""
