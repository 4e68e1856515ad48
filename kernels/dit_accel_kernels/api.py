"""The attention call: arguments checked, resolved and handed to one backend; also the custom op and its gradient."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dit_accel_kernels.backends import cpu, reference
from dit_accel_kernels.backends import flex as flex_backend
from dit_accel_kernels.backends.fa4 import attend as fa4_backend
from dit_accel_kernels.backends.torch import attend as torch_backend
from dit_accel_kernels.backends.torch import backward
from dit_accel_kernels.backends.triton import support as triton_support
from dit_accel_kernels.errors import BackendUnavailableError
from dit_accel_kernels.features import FrameDecay, wide_dtype
from dit_accel_kernels.packing import DEFAULTS, SCHEMA, Packed, pack_call, problem_of
from dit_accel_kernels.problem import Problem, lists_of
from dit_accel_kernels.selection import Selection
from dit_accel_kernels.states import resolved
from dit_accel_kernels.tiles import TileLists
from dit_accel_kernels.values import check_values

TRITON_GRADIENTS = ("triton", "fa4")  # backends whose backward is triton's, from the LSE of their forward


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: TileLists,
    *,
    layout: str = "bshd",
    scale: float | None = None,
    head_scale: Tensor | None = None,
    key_length: Tensor | None = None,
    key_mask: Tensor | None = None,
    frame_decay: FrameDecay | None = None,
    token_order: Tensor | None = None,
    identity_mix: Tensor | None = None,
    identity_rows: Tensor | None = None,
    selection: Selection | None = None,
    return_tiles: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Attention over the exact and pooled tiles of `tiles`, differentiable in q, k and v, opaque to torch.compile.

    Shapes, dtypes and devices are checked in every call; values of the lists and of `token_order` on a CPU, once until
    they change, elsewhere only if the environment variable DIT_ACCEL_VALIDATE is 1: it reads them from the device.

    Args:
        q: [B, S_q, H, D] ("bshd") or [B, H, S_q, D] ("bhsd"), any strides; float64 too on the torch and reference
            backends.
        k: like q with S_k tokens and any number of heads that divides H (query heads share key heads in order).
        v: like k. NaN and infinity in q, k or v reach every row that sees them, as in dense attention; on the triton
            and reference backends other rows of that head too. What a mask leaves out may hold anything.
        tiles: tile lists in the tiled token order; every token outside its exact and pooled tiles is absent.
        layout: "bshd" or "bhsd", of q, k, v and the output.
        scale: logit scale; 1 / sqrt(D) by default.
        head_scale: float [H] or [B, H], multiplies the logits of a head (UltraImage's and UltraViCo's lambda).
        key_length: integer [B], the first key_length[b] keys (caller's order) are valid.
        key_mask: bool [B, S_k], True where a key is valid; with key_length both must hold.
        frame_decay: logit decay by frame distance, see FrameDecay.
        token_order: int64 [S], position in the tiled order -> token index (S_q = S_k); output in the caller's order.
        identity_mix: float [H] or [B, H] in [0, 1], output = (1 - w) * attention + w * V for each head (S_q = S_k).
        identity_rows: bool [S], the tokens that identity_mix touches; all by default.
        selection: which tiles of the exact list stay exact in this call (keep bits, routing), and whether its tiles
            vote for the next; see Selection. It gets no gradient, and what a routing chose stands in the backward.
        return_tiles: also return which tiles were exact, as bits int32 [B, H, NQ, ceil(NK / 32)]; needs a selection.
        return_lse: also return the natural-log sum of exponentials of the transformed logits, float32 [B, H, S_q]
            (float64 for float64), pooled mass included; -inf for rows without a key, whose attention output is 0.
        backend: "auto", "triton", "fa4", "torch", "flex" or "reference"; a named one runs or raises. Gradients come
            from the triton backend's own kernels, for fa4 too, and else from the torch backend's recomputation, except
            with "reference", which autograd differentiates.

    Returns:
        The output, or a tuple of the output and what else was asked for, in this order: LSE, exact tiles, and with a
        vote the bits of the next call, int32 like `selection.keep`.

    Raises:
        ValueError, TypeError: arguments that don't fit, by name and value.
        BackendUnavailableError: the named backend cannot run here.
    """
    packed = pack_call(
        q, k, v, tiles, layout, scale, head_scale, key_length, key_mask, frame_decay, token_order, identity_mix,
        identity_rows, selection, return_tiles, return_lse, backend,
    )  # fmt: skip
    if packed.backend == "reference":  # plain eager code, whose gradient by autograd specifies everybody's
        found = _forward(*packed)
    else:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            packed = _for_gradients(packed)
        found = torch.ops.dit_accel_kernels.block_sparse_attention(*packed)
    return _asked_for(found, selection, return_tiles, return_lse)


def _asked_for(
    found: tuple[Tensor, ...], selection: Selection | None, return_tiles: bool, return_lse: bool
) -> Tensor | tuple[Tensor, ...]:
    votes = selection is not None and selection.vote is not None
    wanted = (True, return_lse, return_tiles, votes)
    asked = tuple(x for x, want in zip(found, wanted, strict=True) if want)
    return asked if len(asked) > 1 else found[0]


def block_sparse_attention_eager(
    q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, **arguments: Any
) -> Tensor | tuple[Tensor, ...]:
    """`block_sparse_attention` without custom op and gradient, for callers inside a custom op of their own."""
    values = {**DEFAULTS, **arguments}
    if len(values) > len(DEFAULTS):
        raise TypeError(f"unknown arguments: {', '.join(sorted(set(values) - set(DEFAULTS)))}")
    with torch.no_grad():
        found = _forward(*pack_call(q, k, v, tiles, *values.values()))
    return _asked_for(found, values["selection"], values["return_tiles"], values["return_lse"])


def block_sparse_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output, for callers inside a custom op of their own.

    Args:
        grad_out: shaped like the output, in the layout of q.
        q: as in `block_sparse_attention`; so are k, v, tiles and the keyword arguments. A selection that routes does
            so again, unless it says what was `routed`.
    """
    values = {**DEFAULTS, **arguments}
    if len(values) > len(DEFAULTS):
        raise TypeError(f"unknown arguments: {', '.join(sorted(set(values) - set(DEFAULTS)))}")
    grad_q, grad_k, grad_v = _backward(grad_out, None, None, None, *pack_call(q, k, v, tiles, *values.values()))
    return grad_q, grad_k, grad_v


def _for_gradients(call: Packed) -> Packed:
    """The same call with what its gradient will want: its backend, the LSE on triton, and what a routing chose."""
    name = _backend(call)
    return call._replace(
        return_tiles=call.return_tiles or call.beta is not None,
        return_lse=call.return_lse or name in TRITON_GRADIENTS,
        backend=name,
    )


def _backend(call: Packed, problem: Problem | None = None) -> str:
    """The backend that runs a call; on a CPU without its problem, one that runs any."""
    untimed = call.return_lse or call.criterion or call.decay_table is not None or call.q.device.type != "cpu"
    lists = None if problem is None or untimed else lists_of(problem)
    return resolve_backend(call.backend, call.q.device, call.q.dtype, call.q.shape[-1], lists)


def resolve_backend(
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    dim: int | None = None,
    lists: TileLists | None = None,
) -> str:
    """What "auto" means here: triton on CUDA, ROCm and XPU devices that can run it, torch or flex on a CPU.

    Triton needs its package, bfloat16, float16 or float32, a head dim that is a multiple of 8 up to 256 and, on NVIDIA,
    compute capability 8.0. `dtype` and `dim` None stand for any that a backend supports. fa4, which has run on no card
    yet, runs only where it is named. On a CPU flex needs to run there and to be ahead in backends/cpu_table.json, by
    what the processor has, dtype, tokens and density: `lists` are those of a call without votes, LSE, gradient and
    frame decay (which was not timed), None stands for any other. A named backend is returned as it is.
    """
    if backend != "auto":
        return backend
    if device.type == "cpu":
        return "torch" if lists is None else cpu.choice(dtype, lists)[0]
    fits = device.type in ("cuda", "xpu") and triton_support.missing_requirement(device, dtype, dim) is None
    return "triton" if fits else "torch"


def _triton(module: str = "attend") -> ModuleType:
    """A module with kernels, imported on first use: importing this package must not import triton."""
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailableError("backend 'triton' needs the triton package (found none): use 'torch' or 'auto'")
    return importlib.import_module(f"dit_accel_kernels.backends.triton.{module}")


def mix_weight(call: Packed, dtype: torch.dtype) -> Tensor | None:
    """Identity weight w broadcastable to the output in its layout, 0 outside the chosen rows."""
    if call.identity_mix is None:
        return None
    w = call.identity_mix.to(dtype).reshape(-1, call.identity_mix.shape[-1])
    w = w[:, :, None, None] if call.heads_first else w[:, None, :, None]
    if call.identity_rows is not None:
        w = w * (call.identity_rows[:, None] if call.heads_first else call.identity_rows[:, None, None])
    return w


def _forward(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one packed call: output in the caller's layout and order, LSE [B, H, S_q], exact tiles and kept bits.

    What was not asked for is empty. Autocast has no part in it: products are made in the dtype that was given.
    """
    call = Packed(*given)
    if call.q.shape[0] == 0 and call.backend != "reference":  # whose gradient is autograd's
        return _forward_fake(*given)
    with torch.autocast(call.q.device.type, enabled=False):
        return _attend(call)


def _attend(call: Packed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_forward` of a batch that is there."""
    problem = problem_of(call)
    axis, name = 1 if call.heads_first else 2, _backend(call, problem)
    check_values(problem)
    if name == "triton":
        out, lse, exact, kept = _triton().attend(problem, need_lse=call.return_lse)  # rows stay in the caller's order
    elif name == "fa4":
        out, lse, exact, kept = fa4_backend.attend(problem.tiled(), need_lse=call.return_lse)
    elif name == "reference":
        out, lse, exact, kept = reference.attend(problem.tiled())
    else:
        out, lse, exact, kept = _by_torch(problem.tiled(), call, compiled=name == "flex")
    lse = lse if call.return_lse else call.q.new_empty(0, dtype=lse.dtype)
    if call.token_order is not None and name != "triton":
        out = torch.empty_like(out).index_copy_(2, call.token_order, out)
        lse = torch.empty_like(lse).index_copy_(2, call.token_order, lse) if call.return_lse else lse
    if not call.heads_first:
        out = out.transpose(1, 2)
    w = mix_weight(call, out.dtype)
    if w is not None:
        v = call.v.repeat_interleave(call.q.shape[axis] // call.v.shape[axis], axis)
        out = torch.where(w == 0, out, torch.lerp(out, v, w.expand_as(out)))  # 0 times inf is not 0
    none = call.q.new_empty(0, dtype=torch.int32)
    exact = exact if call.return_tiles and exact is not None else none
    return out.contiguous(), lse.contiguous(), exact, none.clone() if kept is None else kept


def _by_torch(problem: Problem, call: Packed, *, compiled: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What FlexAttention gives, where it is asked for, and else the torch backend."""
    if compiled:
        try:
            return flex_backend.attend(problem, need_lse=call.return_lse)
        except BackendUnavailableError:  # torch.compile is switched off
            if call.backend != "auto":
                raise
    return torch_backend.attend(problem, need_lse=call.return_lse)


def _forward_fake(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Packed(*given)
    q, (heads, tokens) = call.q, (1, 2) if call.heads_first else (2, 1)
    dtype = wide_dtype(q.dtype)
    shape = (q.shape[0], q.shape[heads], q.shape[tokens])
    bits = (*shape[:2], -(-shape[2] // call.block_q), -(-call.k.shape[tokens] // (32 * call.block_k)))
    return (
        q.new_empty(q.shape),
        q.new_empty(shape if call.return_lse else (0,), dtype=dtype),
        q.new_empty(bits if call.return_tiles else (0,), dtype=torch.int32),
        q.new_empty(bits if call.criterion is not None else (0,), dtype=torch.int32),
    )


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None, *given: Any
) -> list[Tensor]:
    """Gradients of q, k and v of one packed call, in their layout; `out` and `lse` of its forward, where at hand."""
    call = Packed(*given)
    if call.q.shape[0] == 0:
        return _backward_fake(grad_out, grad_lse, out, lse, *given)
    with torch.autocast(call.q.device.type, enabled=False):
        return _gradients(grad_out, grad_lse, out, lse, call)


def _gradients(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None, call: Packed
) -> list[Tensor]:
    """`_backward` of a batch that is there."""
    problem = _without_vote(problem_of(call))
    check_values(problem)
    w = mix_weight(call, grad_out.dtype)
    grad_mixed = None
    if w is not None:
        grad_mixed = grad_out * w
        grad_out = grad_out - grad_mixed
        out = None  # what is at hand is mixed
    if not call.heads_first:
        grad_out, out = grad_out.transpose(1, 2), None if out is None else out.transpose(1, 2)
    if _backend(call) in TRITON_GRADIENTS:
        if out is None or lse is None or _routes(problem):
            out, lse, exact, _ = _triton().attend(problem, need_lse=True)
            problem = _after_routing(problem, exact)
        grads = _triton("backward").attend_backward(problem, out, lse, grad_out, grad_lse)
    else:
        grads = _torch_gradients(problem, grad_out, grad_lse)
    if not call.heads_first:
        grads = tuple(g.transpose(1, 2) for g in grads)
    grad_q, grad_k, grad_v = grads
    if grad_mixed is not None:
        axis = 1 if call.heads_first else 2
        grad_v = grad_v + grad_mixed.unflatten(axis, (call.v.shape[axis], -1)).sum(axis + 1)
    return [grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()]


def _torch_gradients(problem: Problem, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients by the torch backend, in the problem's token order."""
    order = problem.token_order
    if order is not None:
        grad_out = grad_out.index_select(2, order)
        grad_lse = None if grad_lse is None else grad_lse.index_select(2, order)
    grads = backward.attend_backward(_with_lists_of_selection(problem).tiled(), grad_out, grad_lse)
    return grads if order is None else tuple(torch.empty_like(g).index_copy_(2, order, g) for g in grads)


def _without_vote(problem: Problem) -> Problem:
    """The call without votes, which decide about another call."""
    selection = problem.selection
    return problem if selection is None else replace(problem, selection=replace(selection, vote=None))


def _routes(problem: Problem) -> bool:
    return problem.selection is not None and problem.selection.routing is not None


def _after_routing(problem: Problem, exact: Tensor | None) -> Problem:
    """The call with the tiles that its routing, if any, left exact."""
    if problem.selection is None or not _routes(problem):
        return problem
    return replace(problem, selection=replace(problem.selection, routing=None, routed=exact))


def _with_lists_of_selection(problem: Problem) -> Problem:
    """The call with its selection, if any, turned into lists."""
    if problem.selection is None:
        return problem
    lists, _ = resolved(problem.tiled())
    names = ("exact_offsets", "exact_indices", "pooled_offsets", "pooled_indices", "selection")
    return replace(problem, **{name: getattr(lists, name) for name in names})


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None, *given: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in given[:3]]


# Plans are made on the host at a list's first use, and masks and backends decide there what is launched: a graph that
# the compiler captures around the op would replay one call's decisions, on memory that is its own.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_op = torch.library.custom_op(
    "dit_accel_kernels::block_sparse_attention",
    _forward,
    mutates_args=(),
    schema=SCHEMA + " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_op.register_fake(_forward_fake)
_backward_op = torch.library.custom_op(
    "dit_accel_kernels::block_sparse_attention_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad_out, Tensor? grad_lse, Tensor? out, Tensor? lse, " + SCHEMA[1:] + " -> Tensor[]",
    tags=_TAGS,
)
_backward_op.register_fake(_backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    call = Packed(*inputs)
    ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.keeps = call.return_lse and _backend(call) in TRITON_GRADIENTS
    ctx.routed = call.return_tiles and call.beta is not None
    ctx.mark_non_differentiable(*output[2:])
    kept = (*(output[:2] if ctx.keeps else ()), *(output[2:3] if ctx.routed else ()))
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensors), *kept)


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    inputs, saved, count = list(ctx.others), ctx.saved_tensors, len(ctx.tensors)
    out, lse = saved[count : count + 2] if ctx.keeps else (None, None)
    for i, x in zip(ctx.tensors, saved[:count], strict=True):
        inputs[i] = x
    call = Packed(*inputs)
    if ctx.routed:
        call = call._replace(beta=None, routed=saved[-1])
    grads = torch.ops.dit_accel_kernels.block_sparse_attention_backward(
        grad_out, grad_lse if call.return_lse else None, out, lse, *call
    )
    return (*grads, *(None for _ in inputs[3:]))


_op.register_autograd(_autograd, setup_context=_setup_context)
