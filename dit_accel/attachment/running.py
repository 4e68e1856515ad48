"""The pipeline in whose call a forward runs, read off the call stack, since several may share a transformer."""

import sys
from typing import Any

from torch import nn

_PIPELINES = (
    ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
    ("diffusers.modular_pipelines.modular_pipeline", "ModularPipeline"),
)
"""Where diffusers keeps the base classes of its pipelines; only looked up, never imported."""


def running_pipeline(transformer: nn.Module) -> Any:
    """Return the pipeline whose call is running and holds a transformer, or None: a loop written by hand runs it.

    diffusers does not tell a transformer who calls it, and any number of pipelines may share one
    (``Other(**pipe.components)``, ``from_pipe``), each with numbers of its own.

    Args:
        transformer: the module itself, not what ``torch.compile`` made of it.
    """
    kinds = tuple(
        kind for place, name in _PIPELINES if (kind := getattr(sys.modules.get(place), name, None)) is not None
    )
    frame = sys._getframe(1) if kinds else None
    while frame is not None:
        code = frame.f_code
        # reading a frame's variables keeps them alive as long as it runs: only of what may be a pipeline's call
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if isinstance(owner, kinds) and _holds(owner, transformer):
                return owner
        frame = frame.f_back
    return None


def _holds(pipe: Any, transformer: nn.Module) -> bool:
    return any(getattr(part, "_orig_mod", part) is transformer for part in vars(pipe).values())
