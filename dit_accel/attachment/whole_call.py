"""The seconds of a pipeline's whole call, beside which its forwards stand: begin and end are seen on the pipeline.

A call can't be wrapped on an object, only on its class. But every pipeline of diffusers checks its inputs first, or
encodes the prompt, and lets its models go last; these methods are the object's to shadow.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..report import clock
from .execution import Execution
from .running import current_run
from .seam import shadow

BEGINS = ("check_inputs", "encode_prompt")
"""What a pipeline calls first: the first of these that it has."""

ENDS = "maybe_free_model_hooks"
"""What it calls last, once the frames are decoded."""


def watch_call(execution: Execution, transformer: nn.Module) -> list[Callable[[], None]]:
    """Have the clock of each run know the seconds of the pipeline's call that it was; return what undoes that.

    A pipeline without such methods is left alone, and the clock knows the denoising loop alone.

    Args:
        transformer: one of the pipeline's, by which calls of its own are told from a user's of its methods.
    """
    pipe = execution.state.pipe
    first = next((name for name in BEGINS if callable(getattr(type(pipe), name, None))), None)
    if first is None or not callable(getattr(type(pipe), ENDS, None)):
        return []
    begin, end = getattr(pipe, first), getattr(pipe, ENDS)
    begun: tuple[float, int] | None = None  # when the call began, and how many runs there were before

    def begins(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        begun = None if current_run(transformer) is None else (clock.now(), execution.runs)
        return begin(*args, **kwargs)

    def ends(*args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        out = end(*args, **kwargs)
        if begun is not None and execution.runs > begun[1]:
            execution.recorder.clock.call = clock.now() - begun[0]
        begun = None
        return out

    return [shadow(pipe, first, begins), shadow(pipe, ENDS, ends)]
