"""Models of two transformers, each for its noise levels: which one is trained, and at which."""

from typing import Any

from dit_accel.adapters.model_files import ModelFiles
from dit_accel.errors import ConfigError

from ..generation.lora import SECOND

ALL_LEVELS = (0.0, 1.0)
"""The noise levels of a model of one transformer."""

EXPERTS = {"high": "transformer", "low": SECOND}
"""Name of an expert, by its noise levels -> the pipeline's component."""


def check_expert(expert: str | None, files: ModelFiles) -> None:
    """Raise `ConfigError` for an expert where the model has one transformer, and for none where it has two."""
    boundary = files.index.get("boundary_ratio")
    if not files.has(SECOND):
        if expert is not None:
            raise ConfigError(f"{files.name} has one transformer, got expert {expert!r}; leave it out")
        return
    if expert is None:
        raise ConfigError(
            f"{files.name} has two transformers for different noise levels; say which one is to be trained: --expert "
            "high or low"
        )
    if not isinstance(boundary, (int, float)) or not 0 < boundary < 1:
        raise ConfigError(
            f"{files.name} has two transformers and boundary_ratio {boundary}, which tells none their noise levels; "
            "set it in model_index.json"
        )


def component_of(expert: str | None) -> str:
    """Return the component of a pipeline that is trained."""
    return EXPERTS[expert or "high"]


def span_of(pipe: Any, expert: str | None) -> tuple[float, float]:
    """Return the least and the highest noise level that an expert denoises."""
    if expert is None:
        return ALL_LEVELS
    boundary = float(pipe.config.boundary_ratio)
    return (boundary, 1.0) if expert == "high" else (0.0, boundary)
