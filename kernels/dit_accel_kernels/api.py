"""The attention call: arguments checked, resolved and handed to one backend; also the custom op and its gradient."""

import importlib
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .backends.torch import backward
from .bits import pack_bits, word_count
from .checks import check_values, problem_of
from .choice import race
from .choice.candidates import CANDIDATES, OURS
from .csr import EXACT
from .errors import BackendUnavailableError
from .features import FrameDecay, wide_dtype
from .packing import SCHEMA, flatten, restore
from .precision import Precision
from .problem import Problem, mix_weight
from .selection import Selection
from .states import resolved, selected_states
from .tiles import TileLists

Results = tuple[Tensor, Tensor, Tensor, Tensor]
"""Output [B, H, S_q, D], LSE [B, H, S_q], exact tiles and kept bits of a call; what it doesn't give is empty."""

TRITON_GRADIENTS = ("triton", "fa4")  # backends whose backward is triton's, from the LSE of their forward


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, *, layout: str = "bshd", scale: float | None = None,
    head_scale: Tensor | None = None, key_length: Tensor | None = None, key_mask: Tensor | None = None,
    frame_decay: FrameDecay | None = None, token_order: Tensor | None = None, identity_mix: Tensor | None = None,
    identity_rows: Tensor | None = None, selection: Selection | None = None, return_tiles: bool = False,
    return_lse: bool = False, precision: Precision | None = None, backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """Attention over exact and pooled tiles, differentiable in q, k, v and `head_scale`, opaque to torch.compile.

    Shapes, dtypes and devices are checked in every call; values of lists and of `token_order` as `validate` says.

    Args:
        q: [B, S_q, H, D] ("bshd") or [B, H, S_q, D] ("bhsd"), any strides; float64 on torch and reference alone.
        k: like q with S_k tokens and any number of heads that divides H (query heads share key heads in order).
        v: like k, of any head dim, which is the output's. NaN and infinity in q, k or v reach every row that sees them,
            as in dense attention; on the triton and reference backends other rows of that head too. What key masks
            leave out may hold anything; on the torch backend what a mask inside a tile hides, too.
        tiles: tile lists in the tiled token order; every token outside its exact and pooled tiles is absent.
        layout: "bshd" or "bhsd", of q, k, v and the output.
        scale: logit scale; 1 / sqrt(D) by default.
        head_scale: float [H] or [B, H], multiplies the logits of a head (UltraImage's and UltraViCo's lambda). Its
            gradient is that of queries multiplied by it, in their dtype: exact at 0 too.
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
        precision: "int8" or "fp8" (e4m3): queries and keys, pooled ones too, are multiplied in eight bits as
            precision.py says, on the triton backend ("reference" simulates it): int8 wherever that runs, fp8 from
            compute capability 8.9 and gfx942 on; no gradient. Routing sees what was given. None: the dtype of q.
        backend: "auto" (what it takes: choice/race.py) or the name of one, which runs or raises. Gradients: the triton
            backend's kernels, for fa4 too; "reference" by autograd; else the torch backend's recomputation.

    Returns:
        The output, or a tuple of it and what else was requested: LSE, exact tiles, a vote's bits (like `keep`).

    Raises:
        ValueError, TypeError: arguments that don't fit, by name and value.
        BackendUnavailableError: the named backend cannot run here.
    """
    problem = problem_of(
        q, k, v, tiles, layout=layout, scale=scale, head_scale=head_scale, key_length=key_length, key_mask=key_mask,
        frame_decay=frame_decay, token_order=token_order, identity_mix=identity_mix, identity_rows=identity_rows,
        selection=selection, return_tiles=return_tiles, return_lse=return_lse, precision=precision, backend=backend,
    )  # fmt: skip
    if backend == "reference":  # plain eager code, whose gradient by autograd specifies everybody's
        return _wanted(_run(problem), problem)
    call = problem
    if problem.head_scale is not None and problem.head_scale.requires_grad:  # scaled queries hand it its gradient
        scaled = problem.q * problem.head_scale[:, :, None, None]
        call = replace(problem, q=scaled.to(problem.q.dtype), head_scale=None)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (call.q, k, v)):
        call = _for_gradients(call)
    return _wanted(ops.block_sparse_attention(*flatten(call)), problem)


def _wanted(results: Results, problem: Problem) -> Tensor | tuple[Tensor, ...]:
    """What the caller of a problem gets of its results: the output in the caller's layout, and what else it named."""
    out, lse, exact, kept = results
    given = [problem.in_layout(out)] + [lse] * problem.return_lse + [exact] * problem.return_tiles
    given += [kept] * problem.votes
    return tuple(given) if len(given) > 1 else given[0]


def block_sparse_attention_eager(
    q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, **arguments: Any
) -> Tensor | tuple[Tensor, ...]:
    """`block_sparse_attention` without custom op and gradient, for callers inside a custom op of their own."""
    with torch.no_grad():
        problem = problem_of(q, k, v, tiles, **arguments)
        return _wanted(_run(problem), problem)


def selected_tiles(q: Tensor, k: Tensor, tiles: TileLists, **arguments: Any) -> Tensor:
    """The tiles that a call would compute exactly, bits int32 [B, H, NQ, W], without computing it.

    The arguments are those of `block_sparse_attention`, of which v and the backend have no part. Waits for no device.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        problem = problem_of(q, k, k, tiles, **arguments).tiled()
        states = selected_states(problem).expand(*problem.q.shape[:2], -1, -1)
        return pack_bits(states == EXACT)


def block_sparse_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of the output, for callers inside a custom op of their own.

    `grad_out` is shaped like the output, in the layout of q; all else is as in `block_sparse_attention`. A selection
    that routes does so again, unless it says what was `routed`.
    """
    problem = problem_of(q, k, v, tiles, **arguments)
    if problem.precision is not None:
        raise ValueError(f"precision {problem.precision!r} has no gradient: leave it out of forward and backward")
    grad_q, grad_k, grad_v = _gradients(problem, problem.in_layout(grad_out), None, None, None)
    return problem.in_layout(grad_q), problem.in_layout(grad_k), problem.in_layout(grad_v)


def _for_gradients(problem: Problem) -> Problem:
    """The same call with what its gradient will want: its backend, the LSE on triton, and what a routing chose."""
    name = _backend(problem)
    tiles, lse = problem.return_tiles or problem.routes, problem.return_lse or name in TRITON_GRADIENTS
    return replace(problem, return_tiles=tiles, return_lse=lse, backend=name)


def _backend(problem: Problem, *, timed: bool = False) -> str:
    """The backend that runs a call; where it is not `timed`, one of ours whose gradient there is."""
    if problem.backend != "auto":
        return problem.backend
    if problem.precision is not None:
        return "triton"
    if timed:
        return race.choose(problem).name
    return "triton" if CANDIDATES["triton"].takes(problem) else "torch"  # asked in traced code, which can build no loop


def backend_of_last_call() -> str:
    """The backend that ran this thread's last call, what "auto" was included."""
    return _ran.name


def speed_over_dense(q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, **arguments: Any) -> float | None:
    """How many times as fast as dense SDPA a call is, as measured by running both once; None: it is not measured.

    Calls of a kind, and about one size and density, are measured once on a machine (docs/choice.md): on few heads of
    these tensors on a CPU, all of them on a GPU. Calls too short to gain by it are not, nor those of a named backend.
    """
    if arguments.get("backend", "auto") != "auto" or race.too_short(q, k, v, arguments.get("layout", "bshd")):
        return None
    problem = problem_of(q, k, v, tiles, **arguments)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return race.choose(problem).speed


_ran = threading.local()


def _run(problem: Problem) -> Results:
    """Results of one call in the caller's order of tokens. Autocast has no part: products are in the given dtype."""
    if problem.q.shape[0] == 0 and problem.backend != "reference":  # whose gradient is autograd's
        return _empty_results(problem)
    with torch.autocast(problem.q.device.type, enabled=False):
        check_values(problem)
        return _attend(problem)


def _attend(problem: Problem) -> Results:
    """`_run` of a batch that is there."""
    q, name = problem.q, _backend(problem, timed=True)
    try:
        out, lse, exact, kept = CANDIDATES[name].run(problem)
    except BackendUnavailableError:  # torch.compile was switched off since the race, say
        if problem.backend != "auto" or name in OURS:
            raise
        name = race.first(problem)
        out, lse, exact, kept = CANDIDATES[name].run(problem)
    _ran.name = name
    order = None if CANDIDATES[name].in_order else problem.token_order
    out = _in_callers_order(out, order)
    lse = _in_callers_order(lse, order) if problem.return_lse else q.new_empty(0, dtype=lse.dtype)
    w = mix_weight(problem, out.dtype)
    if w is not None:
        v = problem.v.repeat_interleave(q.shape[1] // problem.v.shape[1], 1)
        out = torch.where(w == 0, out, torch.lerp(out, v, w.expand_as(out)))  # 0 times inf is not 0
    none = q.new_empty(0, dtype=torch.int32)
    exact = none if exact is None or not problem.return_tiles else exact
    kept = none.clone() if kept is None else kept  # an op's results share no memory
    return _laid_out(out, problem), lse.contiguous(), exact, kept


def _laid_out(x: Tensor, problem: Problem) -> Tensor:
    """[B, H, S, D] contiguous in the caller's layout."""
    return problem.in_layout(problem.in_layout(x).contiguous())


def _empty_results(problem: Problem) -> Results:
    q = problem.q
    bits = (*q.shape[:2], problem.query_tiles, word_count(problem.key_tiles))
    return (
        problem.empty_output(),
        q.new_empty(q.shape[:3] if problem.return_lse else (0,), dtype=wide_dtype(q.dtype)),
        q.new_empty(bits if problem.return_tiles else (0,), dtype=torch.int32),
        q.new_empty(bits if problem.votes else (0,), dtype=torch.int32),
    )


def _backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None, *arguments: Any
) -> list[Tensor]:
    """The custom op of the gradient: one flattened problem, and `out` and `lse` of its forward where at hand."""
    return _gradients(restore(arguments), grad_out, grad_lse, out, lse)


def _empty_gradients(problem: Problem) -> list[Tensor]:
    return [problem.empty_like(x) for x in (problem.q, problem.k, problem.v)]


def _gradients(
    problem: Problem, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor | None, lse: Tensor | None
) -> list[Tensor]:
    """Gradients of q, k and v, [B, H, S, D]."""
    if problem.q.shape[0] == 0:
        return _empty_gradients(problem)
    if problem.selection is not None:  # votes decide about another call
        problem = replace(problem, selection=replace(problem.selection, vote=None))
    with torch.autocast(problem.q.device.type, enabled=False):
        check_values(problem)
        w = mix_weight(problem, grad_out.dtype)
        mixed = None if w is None else grad_out * w
        if mixed is not None:
            grad_out, out = grad_out - mixed, None  # the output that is at hand is mixed
        if _backend(problem) in TRITON_GRADIENTS:
            if out is None:
                out, lse, exact, _ = CANDIDATES["triton"].attend(replace(problem, return_lse=True))
                problem = _after_routing(problem, exact) if problem.routes else problem
            triton = importlib.import_module(".backends.triton.backward", __package__)
            grads = triton.attend_backward(problem, out, lse, grad_out, grad_lse)
        else:
            grads = _torch_gradients(problem, grad_out, grad_lse)
        if mixed is not None:
            grads = (*grads[:2], grads[2] + mixed.unflatten(1, (problem.v.shape[1], -1)).sum(2))
        return [_laid_out(x, problem) for x in grads]


def _torch_gradients(problem: Problem, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients by the torch backend, in the problem's token order."""
    order = problem.token_order
    if order is not None:
        grad_out = grad_out.index_select(2, order)
        grad_lse = None if grad_lse is None else grad_lse.index_select(2, order)
    grads = backward.attend_backward(resolved(problem.tiled())[0], grad_out, grad_lse)
    return tuple(_in_callers_order(x, order) for x in grads)


def _in_callers_order(x: Tensor, order: Tensor | None) -> Tensor:
    """[B, H, S, ...] in tiled order as the caller has its tokens."""
    return x if order is None else torch.empty_like(x).index_copy_(2, order, x)


def _after_routing(problem: Problem, exact: Tensor | None) -> Problem:
    """The call with the tiles that its routing left exact."""
    assert problem.selection is not None
    return replace(problem, selection=replace(problem.selection, routing=None, routed=exact))


# Plans are made on the host at a list's first use, and masks and backends decide there what is launched: a graph that
# the compiler captures around the op would replay one call's decisions, on memory that is its own.
def _op_of(name: str, run: Callable[..., Any], schema: str) -> Any:
    tags = (torch.Tag.cudagraph_unsafe,)
    return torch.library.custom_op(add_op_namespace_prefix(name), run, mutates_args=(), schema=schema, tags=tags)


_results = "(Tensor, Tensor, Tensor, Tensor)"
_op = _op_of("block_sparse_attention", lambda *arguments: _run(restore(arguments)), f"({SCHEMA}) -> {_results}")
_op.register_fake(lambda *arguments: _empty_results(restore(arguments)))
_given = "Tensor grad_out, Tensor? grad_lse, Tensor? out, Tensor? lse"
_backward_op = _op_of("block_sparse_attention_backward", _backward, f"({_given}, {SCHEMA}) -> Tensor[]")
_backward_op.register_fake(lambda *arguments: _empty_gradients(restore(arguments[4:])))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    problem = restore(inputs)
    ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.keeps = problem.backend in TRITON_GRADIENTS
    ctx.routed = problem.routes
    kept = (*(output[:2] if ctx.keeps else ()), *(output[2:3] if ctx.routed else ()))
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensors), *kept)


def _autograd(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    inputs, saved, count = list(ctx.others), ctx.saved_tensors, len(ctx.tensors)
    out, lse = saved[count : count + 2] if ctx.keeps else (None, None)
    for i, x in zip(ctx.tensors, saved[:count], strict=True):
        inputs[i] = x
    problem = restore(tuple(inputs))
    if ctx.routed:
        problem = _after_routing(problem, saved[-1])
    grad_lse = grad_lse if problem.return_lse else None
    grads = ops.block_sparse_attention_backward(grad_out, grad_lse, out, lse, *flatten(problem))
    return (*grads, *(None for _ in inputs[3:]))


_op.register_autograd(_autograd, setup_context=_setup_context)
