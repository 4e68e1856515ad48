"""The embedded tiny models: where their files are and which words they know (numpy is all it imports)."""

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

__all__ = [
    "check_prompt",
    "drawn_clip",
    "held_out_prompts",
    "longest_trained",
    "model_closeness",
    "model_defaults",
    "model_names",
    "model_path",
    "model_path_error",
    "model_score",
    "vocabulary",
]
