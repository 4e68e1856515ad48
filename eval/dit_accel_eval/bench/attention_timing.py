"""Times the calls that `attention_budget` planned: arms in turn, a JSON line for each.

A line tells what was measured, the machine, and what plan and the kernels' own table predict. Of a few heads' time and
of the rate that the model's feed-forward reaches on this machine follows what a whole block would take.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from dit_accel_kernels import EXACT, TileLists, block_sparse_attention_eager, count_bits, predicted_speedup, unpack_bits
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from dit_accel.errors import DitAccelError
from dit_accel.estimate.estimate import estimate, other_flops
from dit_accel.methods.base import AttentionHandler
from dit_accel.methods.compose import make_handlers
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext
from dit_accel.plan.plan import AttentionPlan
from dit_accel.testing.reference import tile_states

from ..runs.results import Line
from .attention_budget import SLICE, Group, Machine, about, feed_forward_flops, seconds_of
from .attention_shapes import Arm, Shape
from .timing import in_turn, now, quartiles

WARM = 2048
"""Tokens of the dense call that does not count."""

CHECKED_TILES = 3
"""Query tiles of each sparse call that are computed again by the kernels' specification."""


def run_groups(
    groups: Sequence[Group], machine: Machine, deadline: float, say: Callable[[str], None]
) -> Iterator[list[Line]]:
    """Time the groups one after another and give each one's lines; what the clock leaves no time for says so.

    Args:
        groups: of `plan_groups`.
        machine: likewise.
        deadline: the time, as `time.perf_counter` counts it, at which nothing more may begin.
        say: takes a line of progress.
    """
    for number, group in enumerate(groups, 1):
        left = deadline - time.perf_counter()
        if group.arms and group.expected(1) > left:
            why = f"would take about {group.expected(1):,.0f} s, and {max(0.0, left):,.0f} s of the budget were left"
            group.left_out |= dict.fromkeys(group.arms, why)
            group.arms = []
        lines = []
        if group.arms:
            say(f"{number} of {len(groups)}: {group.label}, rounds: {group.rounds}, about {group.expected():,.0f} s")
            lines = _measure(group, machine, deadline)
        lines += [
            about(group.shape, arm, group.dtype, machine) | {"reason": reason}
            for arm, reason in group.left_out.items()
            if arm in group.wanted
        ]
        yield lines


@torch.no_grad()
def _measure(group: Group, machine: Machine, deadline: float) -> list[Line]:
    """Return the lines of one group's arms; an arm that fails is left out with its error."""
    shape, device = group.shape, machine.device
    torch.manual_seed(0)
    size = (1, machine.heads, shape.layout.tokens, shape.of[1].head_dim)
    q, k, v = (torch.randn(size).to(device, group.dtype) for _ in range(3))
    rest = other_flops(shape.of[1], shape.layout) / feed_forward_rate(shape, device, group.dtype)
    scaled_dot_product_attention(q[:, :, :WARM], k[:, :, :WARM], v[:, :, :WARM])
    dense, *sparse = group.arms
    runs: dict[Arm, Callable[[], Any]] = {dense: lambda: scaled_dot_product_attention(q, k, v)}
    found: dict[Arm, Line] = {dense: {"density": 1.0}}
    for arm in sparse:
        try:
            runs[arm] = partial(sparse_call, *_handler_of(arm, machine, shape), q, k, v)
            found[arm] = _checked(runs[arm](), q, k, v)
        except Exception as error:  # a backend that is not here, or does not fit: each has errors of its own
            group.left_out[arm] = _reason(error)
            runs.pop(arm, None)
    timed = {arm.name: partial(_timed, run, device) for arm, run in runs.items()}
    rounds: list[dict[str, float]] = []
    started = time.perf_counter()
    for taken in in_turn(timed, group.rounds, warm_up=0):
        rounds.append(taken)
        each = (time.perf_counter() - started) / len(rounds)
        if time.perf_counter() + each > deadline:
            break
    seconds = {arm: np.array([taken[arm.name] for taken in rounds]) for arm in runs}
    return [
        about(shape, arm, group.dtype, machine)
        | found[arm]
        | _figures(shape, arm, machine, rest, seconds[arm], seconds[dense])
        for arm in runs
        if arm in group.wanted
    ]


def _reason(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, DitAccelError) else f"{type(error).__name__}: {text}"


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    started = now(device)
    run()
    return now(device) - started


def _handler_of(arm: Arm, machine: Machine, shape: Shape) -> tuple[AttentionHandler, CallContext, str]:
    assert arm.config is not None
    assert arm.backend is not None
    (handler,) = make_handlers([arm.config], shape.model(machine.heads))
    assert isinstance(handler, AttentionHandler)
    steps = shape.of[1].num_inference_steps
    context = CallContext(
        transformer="transformer", branch="cond", step_index=steps // 2, num_inference_steps=steps, sigma=None,
        layout=shape.layout, batch=1, layer=0, depth=0, device=machine.device,
    )  # fmt: skip
    return handler, context, arm.backend


def sparse_call(
    handler: AttentionHandler, context: CallContext, backend: str, q: Tensor, k: Tensor, v: Tensor
) -> tuple[AttentionPlan, Tensor, Tensor | None]:
    """Plan and run one call of q, k and v [B, H, S, D] as an attachment does: plan, output, and exact tiles as bits."""
    call = Call(q=q, k=k, v=v, backend=backend)
    plan = handler.plan(AttentionPlan(), call, context)
    tiles, arguments = plan.kernel_arguments(call)
    selects = plan.selection is not None
    result = block_sparse_attention_eager(q, plan.centred(k), v, tiles, **arguments, return_tiles=selects)
    return (plan, result, None) if isinstance(result, Tensor) else (plan, result[0], result[1])


def _checked(result: tuple[AttentionPlan, Tensor, Tensor | None], q: Tensor, k: Tensor, v: Tensor) -> Line:
    """Return a call's density, what the kernels' table predicts of it, and its error in a few query tiles."""
    plan, out, exact = result
    tiles = plan.tiles
    assert tiles is not None
    density, lists = tiles.density, tiles
    if exact is not None:
        density = float(count_bits(exact).sum()) / (exact[..., 0].numel() * tiles.key_tiles)
        states = unpack_bits(exact, tiles.key_tiles).flatten(0, 1).to(torch.uint8) * EXACT
        lists = _lists(states, tiles, tiles.num_q)
    by_table = predicted_speedup(q.device, q.dtype, lists)
    return {"density": density, "predicted_by_table": by_table, "error": _error(plan, exact, q, k, v, out)}


def _lists(states: Tensor, like: TileLists, rows: int) -> TileLists:
    return TileLists.from_states(states, block_q=like.block_q, block_k=like.block_k, num_q=rows, num_k=like.num_k)


def _error(plan: AttentionPlan, exact: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> float:
    """Return the last head's error relative to its size, in some query tiles, against the specification in float32."""
    tiles, order, head = plan.tiles, plan.token_order, slice(q.shape[1] - 1, None)
    assert tiles is not None
    states = tile_states(plan, q.shape[1], q.shape[2], exact)[0, -1]
    q, k, v, out = ((x if order is None else x.index_select(2, order))[:, head].float() for x in (q, k, v, out))
    right, got = [], []
    for tile in np.linspace(0, tiles.query_tiles - 1, CHECKED_TILES).astype(int).tolist():
        rows = slice(tile * tiles.block_q, min((tile + 1) * tiles.block_q, tiles.num_q))
        part = _lists(states[tile : tile + 1], tiles, rows.stop - rows.start)
        truth = block_sparse_attention_eager(q[:, :, rows], k, v, part, layout="bhsd", backend="reference")
        assert isinstance(truth, Tensor)
        right.append(truth)
        got.append(out[:, :, rows])
    return float((torch.cat(got, 2) - torch.cat(right, 2)).norm() / torch.cat(right, 2).norm())


def feed_forward_rate(shape: Shape, device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the model's feed-forward over `SLICE` tokens, with random weights."""
    family = shape.of[1]
    width, hidden = family.heads * family.head_dim, family.ffn_dim
    with torch.device(device):
        layers = nn.Sequential(nn.Linear(width, hidden, dtype=dtype), nn.GELU("tanh"),
                               nn.Linear(hidden, width, dtype=dtype))  # fmt: skip
        x = torch.randn(SLICE, width, dtype=dtype)
    return feed_forward_flops(family) / seconds_of(lambda: layers(x), device)


def _figures(shape: Shape, arm: Arm, machine: Machine, rest: float, seconds: np.ndarray, dense: np.ndarray) -> Line:
    """Return an arm's times, what plan predicts, and what a whole block and a run would gain by it.

    ``rest_seconds`` is a block without its self-attention, ``dense_share`` that of the calls of a run of the model's
    usual steps which the preset leaves dense.
    """
    family, scale = shape.of[1], shape.of[1].heads / machine.heads
    whole, whole_dense = float(np.median(seconds)) * scale, float(np.median(dense)) * scale
    line: Line = {
        "rounds": len(seconds), "seconds": quartiles(seconds), "dense_seconds": float(np.median(dense)),
        "ratio": quartiles(dense / seconds), "rest_seconds": rest,
        "attention_share": whole_dense / (whole_dense + rest), "block_ratio": (rest + whole_dense) / (rest + whole),
    }  # fmt: skip
    if arm.choice is None:
        return line
    config = arm.config
    assert config is not None
    of_calls = estimate(*shape.of, **shape.sizes, methods=[config])
    least = getattr(arm.choice.config, "min_tokens", None)
    of_run = estimate(*shape.of, **shape.sizes, methods=[replace(arm.choice.config, min_tokens=None)])
    tiles, visual = of_calls.tiles, (shape.layout.visual_tokens / shape.layout.tokens) ** 2
    return line | {
        "expected_density": 1 - visual * (1 - (tiles.density if tiles else 1.0)), "pair_density": of_calls.pair_density,
        "predicted": 1 / (of_calls.pair_density * of_calls.cost_of_pairs), "min_tokens": least,
        "dense_share": of_run.dense_share, "steps": family.num_inference_steps,
    }  # fmt: skip
