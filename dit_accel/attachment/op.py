"""The one attention call in which all methods meet, as a custom operator that compiled graphs leave alone.

The operator is given what the graph knows (tensors, layer number, grid); branch and step it reads from the attachment's
state, which is kept up to date outside compiled code. So one graph serves every layer, step and latent grid.

Both operators are tagged ``cudagraph_unsafe``: a CUDA graph replays what the device did and runs no Python, so a
captured call would follow one step's plan for good. Under ``mode="reduce-overhead"`` Inductor splits its graph around a
tagged operator, or makes no CUDA graph where it can't split; what lies between is captured as ever.
"""

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AttachError
from ..plan.call import call_of

NO_TICKET = -1
"""The ticket of a forward that no backward follows."""

_ENGINES: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()

TAGS = (torch.Tag.cudagraph_unsafe,)


def register(engine: Any) -> int:
    """Return the number by which compiled graphs and processors refer to an engine."""
    number = next(_NUMBERS)
    _ENGINES[number] = engine
    return number


def get(number: int) -> Any:
    """Return the engine of a number; `AttachError` if it is detached."""
    if number not in _ENGINES:
        raise AttachError(f"attachment {number} is detached, but a processor of it still runs; attach again")
    return _ENGINES[number]


@torch.library.custom_op("dit_accel::planned_attention", mutates_args=(), tags=TAGS)
def planned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor,
    grid: Sequence[Tensor],
    attachment: int,
    tokens_first: bool,
    scale: float | None,
    differentiate: bool,
) -> tuple[Tensor, Tensor]:
    """Run the plan of this layer, step and branch.

    Args:
        q: queries as `Call` describes them, with `k`, `v`, ``mask``, ``tokens_first`` and ``scale``.
        layer: 0-d int64 CPU tensor, the attention layer's number in the attachment.
        grid: (frames, height, width, text before, text after) of the sequence, 0-d int64 CPU tensors: the length
            of one 1-d tensor could be taken for a size of the latents.
        attachment: number of the attachment.
        differentiate: keep the plan for a backward.

    Returns:
        The output in q's layout and dtype, contiguous, and the plan's ticket (0-d int64 CPU tensor) for the backward.
    """
    engine = get(attachment)
    call = call_of(q, k, v, mask, scale, engine.backend, tokens_first)
    sizes = tuple(int(size) for size in grid)
    out, ticket = engine.attend(engine.layers[int(layer)], call, sizes, differentiate)
    return out, torch.tensor(NO_TICKET) if ticket is None else ticket


@planned_attention.register_fake
def _(q, k, v, *_):
    return q.new_empty((*q.shape[:-1], v.shape[-1])), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("dit_accel::planned_attention_backward", mutates_args=(), tags=TAGS)
def planned_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ticket: Tensor, attachment: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v under the plan that the forward followed."""
    engine = get(attachment)
    return engine.backward.gradients(grad, q, k, v, mask, ticket, engine.backend)


@planned_attention_backward.register_fake
def _(grad, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, mask, _, grid, ctx.attachment, *_ = inputs
    ctx.sizes = len(grid)
    ctx.save_for_backward(q, k, v, mask, output[1])


def _backward(ctx, grad, _):
    grads = planned_attention_backward(grad, *ctx.saved_tensors, ctx.attachment)
    return *grads, None, None, [None] * ctx.sizes, None, None, None, None


planned_attention.register_autograd(_backward, setup_context=_save)
