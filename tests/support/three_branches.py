"""The three-branch formula, written down for the tests beside a pipeline and apart from the methods that fold it."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Mixed(TorchFunctionMode):
    """Mixes V into the output of some heads of ``F.scaled_dot_product_attention``, while it is armed."""

    def __init__(self, heads: Sequence[int], u: float) -> None:
        super().__init__()
        self.heads, self.u, self.armed = list(heads), u, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention and self.armed:
            values = args[2] if len(args) > 2 else kwargs["value"]
            out = out.clone()
            out[:, self.heads] = (1 - self.u) * out[:, self.heads] + self.u * values[:, self.heads]
        return out


@contextlib.contextmanager
def perturbed_heads(attention: nn.Module, heads: Sequence[int], u: float) -> Iterator[None]:
    """Mix V into some heads of one attention module."""
    mode = Mixed(heads, u)
    before = attention.register_forward_pre_hook(lambda *_: setattr(mode, "armed", True))
    after = attention.register_forward_hook(lambda *_: setattr(mode, "armed", False))
    try:
        with mode:
            yield
    finally:
        before.remove()
        after.remove()


@contextlib.contextmanager
def three_branches(
    pipe: Any, perturbed: Callable[[nn.Module], Any], scale: float, *, batched: bool
) -> Iterator[list[float]]:
    """Let a pipeline's scheduler get its guided prediction plus w (cond - perturbed); note each step's size of that.

    Args:
        pipe: the pipeline, with nothing attached.
        perturbed: transformer -> a context in which its forward is perturbed.
        scale: w.
        batched: both prompts are in one forward, the negative one first; else the conditional forward comes first.
    """
    forwards: list[tuple[Any, Any, Any, Tensor]] = []
    noted: list[float] = []
    step = pipe.scheduler.step

    def observed(transformer: Any, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            forwards.append(((transformer, forward), args, kwargs, out[0] if isinstance(out, tuple) else out.sample))
            return out

        return call

    def guided(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        (transformer, forward), given, named, cond = forwards[0]
        with perturbed(transformer), torch.no_grad():
            out = forward(*given, **named)
        further = scale * (cond - (out[0] if isinstance(out, tuple) else out.sample))
        if batched:
            further = further.chunk(2)[1]
        noted.append(float(further.norm()))
        forwards.clear()
        return step(model_output + further[:, : model_output.shape[1]].to(model_output.dtype), *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name in ("transformer", "transformer_2"):
            if (part := getattr(pipe, name, None)) is not None:
                forward = observed(part, part.forward)
                stack.enter_context(mock.patch.object(part, "forward", forward))
        stack.enter_context(mock.patch.object(pipe.scheduler, "step", guided))
        yield noted
