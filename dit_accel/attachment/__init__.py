"""Attaching: how methods get onto a pipeline, what runs while they are there, and how they come off again."""
