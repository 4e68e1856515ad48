"""The one attention call in which all methods meet, as a custom operator that compiled graphs leave alone.

The operator is given what the graph knows (tensors, layer id, grid); branch and step it reads from the session, which
is kept up to date outside compiled code. So one graph serves every layer and step.

Both operators are tagged ``cudagraph_unsafe``: a CUDA graph replays what the device did and runs no Python, so a
captured call would follow one step's plan for good. Under ``mode="reduce-overhead"`` Inductor splits its graph around a
tagged operator, or makes no CUDA graph where it can't split; what lies between is captured as ever.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import session as sessions

TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("dit_accel::planned_attention", mutates_args=(), tags=TAGS)
def planned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    layer: Tensor,
    session: int,
    grid: Sequence[int],
    layout: str,
    scale: float | None,
    differentiate: bool,
) -> tuple[Tensor, Tensor]:
    """Run the plan of this layer, step and branch.

    Args:
        q: queries after norm and RoPE, [B, S, H, D] or [B, H, S, D] as ``layout`` says.
        k: keys, the same layout.
        v: values, the same layout.
        mask: None, or key padding: bool, [B, S] or [B, 1, 1, S], True where a key is valid.
        layer: 0-d int64 CPU tensor, the attention module's layer id.
        session: id of the attachment's session.
        grid: (frames, height, width, text before, text after) of the sequence.
        layout: ``bshd`` or ``bhsd``.
        scale: factor on the logits; None: 1 / sqrt(D).
        differentiate: keep the plan for a backward.

    Returns:
        The output in q's layout and dtype, contiguous, and the plan's id (0-d int64 CPU tensor) for the backward.
    """
    plan, context, number = sessions.get(session).plan(int(layer), q, k, grid, layout, differentiate, mask, scale)
    out = sessions.get(session).execute(plan, context, q, k, v, mask, layout, scale)
    return out.contiguous(), torch.tensor(number)


@planned_attention.register_fake
def _(q, k, v, mask, layer, session, grid, layout, scale, differentiate):
    return q.new_empty((*q.shape[:-1], v.shape[-1])), torch.empty((), dtype=torch.int64)


@torch.library.custom_op("dit_accel::planned_attention_backward", mutates_args=(), tags=TAGS)
def planned_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    number: Tensor,
    session: int,
    layout: str,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v under the plan that the forward followed."""
    owner = sessions.get(session)
    grads = owner.gradients(owner.plan_by_number(int(number)), grad, q, k, v, mask, layout, scale)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@planned_attention_backward.register_fake
def _(grad, q, k, v, mask, number, session, layout, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, mask, _, ctx.session, _, ctx.layout, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, mask, output[1])


def _backward(ctx, grad, _):
    q, k, v, mask, number = ctx.saved_tensors
    grads = planned_attention_backward(grad, q, k, v, mask, number, ctx.session, ctx.layout, ctx.scale)
    return *grads, *[None] * 7


planned_attention.register_autograd(_backward, setup_context=_save)
