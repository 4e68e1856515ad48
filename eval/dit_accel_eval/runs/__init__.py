"""Runs of a model: its pipeline, the call of a clip, what a run made and cost, and the files that hold it."""
