"""Guidance by perturbed predictions, folded into what the pipeline gets."""
