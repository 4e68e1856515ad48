"""What a pipeline needs besides methods for pictures larger than its model was trained on, as `Family.beyond` says."""

from typing import Any

from dit_accel import UltraImage
from dit_accel.adapters import Family
from dit_accel.estimate.sizes import beyond_trained, token_layout

from .fit import sizes_of
from .request import Request


def prepare_larger(pipe: Any, request: Request, family: Family | None) -> list[str]:
    """Prepare a loaded pipeline for the size of a (resolved) request, and return notes on what was done.

    ``tiled_vae`` decodes in tiles, so that memory does not grow with the picture. ``pinned_shift`` keeps the noise
    shift at its largest: pipelines extend it along a line in the number of tokens, which collapses the schedule above
    the largest one meant (DyPE, arXiv 2510.20766, pins it so).
    """
    if family is None or not family.beyond:
        return []
    layout = token_layout(family, **{**sizes_of(request, family), "num_frames": 1})
    if not {"height", "width"} & set(beyond_trained(family, layout)):
        return []
    notes = []
    if "tiled_vae" in family.beyond and hasattr(pipe.vae, "enable_tiling"):
        pipe.vae.enable_tiling()
        notes.append("the autoencoder works in tiles, since the picture is larger than the model was trained on")
    most = pipe.scheduler.config.get("max_image_seq_len")
    if any(isinstance(method, UltraImage) and (method.guided or method.view) for method in request.methods):
        return notes  # which holds the shift in its second stage alone
    if "pinned_shift" in family.beyond and most is not None and layout.visual_tokens > most:
        pipe.scheduler.register_to_config(max_image_seq_len=layout.visual_tokens)
        notes.append(
            f"the noise shift is held at that of {most} tokens: along its line {layout.visual_tokens} would have too "
            "large a one"
        )
    return notes
