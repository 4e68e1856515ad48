"""The embedded tiny models: as pipelines, where their files are, which words they know (imports numpy alone)."""

from dit_accel_assets.catalog import (
    check_prompt,
    drawn_clip,
    held_out_prompts,
    longest_trained,
    model_closeness,
    model_defaults,
    model_names,
    model_path,
    model_path_error,
    model_score,
    vocabulary,
)
from dit_accel_assets.loading import load, opened

__all__ = [
    "check_prompt",
    "drawn_clip",
    "held_out_prompts",
    "load",
    "longest_trained",
    "model_closeness",
    "model_defaults",
    "model_names",
    "model_path",
    "model_path_error",
    "model_score",
    "opened",
    "vocabulary",
]
