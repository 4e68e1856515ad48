"""The pipeline in whose call a forward runs, read off the call stack, since several may share a transformer."""

import sys
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

_PIPELINES = (
    ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline"),
    ("diffusers.modular_pipelines.modular_pipeline", "ModularPipeline"),
)
"""Where diffusers keeps the base classes of its pipelines; only looked up, never imported."""


@dataclass(frozen=True, slots=True, eq=False)
class PipelineRun:
    """One call of a pipeline, as the forwards inside it see it.

    Attributes:
        thread: the thread in which it runs.
        frame: number of its stack frame, unique among those that exist at one time.
    """

    _pipe: Callable[[], Any]
    _code: types.CodeType
    thread: int
    frame: int

    @property
    def pipe(self) -> Any:
        """The pipeline; None where it is gone."""
        return self._pipe()

    def is_same(self, other: "PipelineRun | None") -> bool:
        """Tell whether another one is the same call, of those that are still running."""
        return (
            other is not None and (self.thread, self.frame) == (other.thread, other.frame) and self.pipe is other.pipe
        )

    def goes_on(self) -> bool:
        """Tell whether the call has not returned yet; its thread may be another one."""
        frame = sys._current_frames().get(self.thread)
        while frame is not None:
            if id(frame) == self.frame and frame.f_code is self._code:
                return True
            frame = frame.f_back
        return False


def current_run(transformer: nn.Module) -> PipelineRun | None:
    """Return the call of a pipeline that is running and holds a transformer, or None: a loop written by hand runs it.

    diffusers does not tell a transformer who calls it, and any number of pipelines may share one
    (``Other(**pipe.components)``, ``from_pipe``), each with numbers of its own.
    The transformer is the module itself, not what ``torch.compile`` made of it.
    """
    kinds = tuple(
        kind for module, name in _PIPELINES if (kind := getattr(sys.modules.get(module), name, None)) is not None
    )
    frame = sys._getframe(1) if kinds else None
    while frame is not None:
        code = frame.f_code
        # reading a frame's variables keeps them alive as long as it runs: only of what may be a pipeline's call
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if isinstance(owner, kinds) and _holds(owner, transformer):
                return PipelineRun(weakref.ref(owner), code, threading.get_ident(), id(frame))
        frame = frame.f_back
    return None


def _holds(pipe: Any, transformer: nn.Module) -> bool:
    return any(getattr(part, "_orig_mod", part) is transformer for part in vars(pipe).values())
