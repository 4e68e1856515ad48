"""Metrics: one file each, found by entry point; what they take, and how a sample is measured by name."""

from .metric import Clip, Measured, Metric, NotMeasured, Sample
from .registered import metric, metrics, scores

__all__ = ["Clip", "Measured", "Metric", "NotMeasured", "Sample", "metric", "metrics", "scores"]
