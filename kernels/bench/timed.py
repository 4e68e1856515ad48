"""The calls that gpu.py times: ours at several densities and features, dense attention, FlexAttention; and their check.

Some query tiles of every timed call, and some key tiles of a backward, are computed again by the specification: what
is fast and wrong must not pass. A timed call is added in CALLS, with what is special about it in `prepare`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from calls import DTYPES, PRECISIONS, Call
from dit_accel_kernels import (
    EXACT,
    POOLED,
    SKIPPED,
    Routing,
    Selection,
    TileLists,
    Vote,
    count_bits,
    fa4_requirement,
    pack_bits,
    triton_requirement,
    unpack_bits,
)
from dit_accel_kernels.checks import problem_of
from grid import errors, left_by
from inputs import decay, keep_bits, lists
from predictions import CANDIDATES, SHAPES, Shape, card_of, predict
from recorded import Recorded, recording, without_flash_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

RADIAL = 0.27  # RadialAttention's density at Wan 720p, 81 frames
BETA = 1.2816  # routes a tenth of the tiles of random inputs to exact ones: 1 - Phi(BETA) = 0.1
Errors = tuple[float, float]  # measured and allowed
Record = dict[str, Any]


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v)


def _flash(module: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = importlib.import_module(module).flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


DENSE = {
    "sdpa-flash": partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "flash-attn-3": partial(_flash, "flash_attn_interface"),
    "flash-attn-4": partial(_flash, "flash_attn.cute.interface"),
}
"""Rivals: dense attention of q, k and v [B, H, S, D]. FlexAttention, our backend "flex", is one too."""

CALLS = (
    ("triton", RADIAL), *((name, 1.0) for name in DENSE), ("triton", 1.0), ("flex", RADIAL), ("fa4", RADIAL),
    ("triton", 0.1), ("triton-backward", RADIAL), ("triton-decay", RADIAL), ("triton-pooled", 0.1), ("fa4-pooled", 0.1),
    ("fa4-decay", RADIAL), ("triton-routed", 0.1), ("triton-int8", RADIAL), ("triton-fp8", RADIAL),
    ("triton-kept", RADIAL), ("triton-votes", RADIAL), ("triton", 0.25), ("triton", 0.5),
)  # fmt: skip
"""Candidates and densities of a model's shape, the telling ones first; ours are those of triton and fa4."""

FEW = (
    ("triton", RADIAL), ("sdpa-flash", 1.0), ("sdpa-efficient", 1.0), ("triton", 1.0), ("triton-backward", RADIAL),
    ("triton-pooled", 0.1),
)  # fmt: skip
ORDER = ("wan-720p", "128k", "hunyuan-720p", "cogvideox1.5", "wan-480p", "mochi")
FURTHER = (
    (Shape(name="heads-192", heads=16, tokens=32768, dim=192), "bf16"),
    (Shape(name="heads-256", heads=16, tokens=32768, dim=256), "bf16"),
    (Shape(name="fp32", heads=8, tokens=16384, dim=128), "fp32"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """A candidate to be timed at a density on a shape."""

    shape: Shape
    candidate: str
    density: float
    dtype: str = "bf16"
    seconds = 5  # that it takes on a card at most, compiling included

    @property
    def name(self) -> str:
        """Such as "wan-720p triton 0.27"."""
        return f"{self.shape.name} {self.candidate} {self.density:g}"

    @property
    def group(self) -> str:
        """The timings that it shares a process with: those of its shape."""
        return f"time-{self.shape.name}"

    @property
    def backend(self) -> str:
        """What computes it: triton, fa4, flex, or a rival's name."""
        return self.candidate if self.candidate in DENSE else self.candidate.partition("-")[0]

    @property
    def ours(self) -> bool:
        """Whether it is one of our kernels: that a rival can't run here, or errs, is no fault of a run."""
        return self.backend in ("triton", "fa4")

    def missing(self, device: str) -> str | None:
        """What the candidate needs and does not find here, or None."""
        if self.candidate.startswith("flash-attn"):
            try:
                importlib.import_module(DENSE[self.candidate].args[0])
            except (ImportError, OSError) as error:
                return str(error)
        if (precision := self.candidate.partition("-")[2]) in PRECISIONS:
            return triton_requirement(torch.device(device), DTYPES[self.dtype], self.shape.dim, precision)
        if self.backend != "fa4":
            return None
        block = (self.shape.block, self.shape.block)
        return fa4_requirement(torch.device(device), DTYPES[self.dtype], self.shape.dim, block)

    def launches(self, target: str) -> dict[str, Recorded]:
        """What it launches on a target, by identity; of fa4 what Triton compiles, of rivals nothing."""
        into: dict[str, Recorded] = {}
        if self.ours:
            with recording(target, into, self.name.replace(" ", "-")), without_flash_attention():
                prepare(self, "cpu", torch.empty).run()
        return into

    def run(self, device: str) -> list[Record]:
        """Its findings."""
        return [measure(self, device)]


def timings() -> list[Timing]:
    """Everything that is timed, shape by shape."""
    models = [(SHAPES[name], "bf16", CALLS) for name in ORDER]
    return [
        Timing(shape=shape, candidate=candidate, density=density, dtype=dtype)
        for shape, dtype, calls in (*models, *((*further, FEW) for further in FURTHER))
        for candidate, density in calls
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """A call to be timed: `run` makes it, `check` compares some of what it gave, `density_of` tells what it visited."""

    run: Callable[[], Any]
    check: Callable[[Any], Errors]
    density_of: Callable[[Any], float]


def prepare(case: Timing, device: str, values: Callable[..., Tensor] = torch.randn) -> Timed:
    """A call ready to be timed, on tensors that `values` makes."""
    shape, density, (_, _, feature) = case.shape, case.density, case.candidate.partition("-")
    sizes = (shape.batch, shape.heads, shape.tokens, shape.dim)
    inputs = (q, k, v) = tuple(values(sizes, device=device, dtype=DTYPES[case.dtype]) for _ in range(3))
    arguments: dict[str, Any] = {"layout": "bhsd"}
    if feature in ("routed", "kept", "votes") and case.candidate not in DENSE:
        tiles = TileLists.full(shape.tokens, shape.tokens, block_q=shape.block, block_k=shape.block).to(device)
        arguments |= {"selection": _selection(feature, shape, tiles, density, device)}
        arguments |= {"return_tiles": True, "return_lse": True}
    else:
        tiles = lists(shape.tokens, shape.block, density, POOLED if feature == "pooled" else SKIPPED, device)
    if feature == "backward":
        return gradients(inputs, tiles, density)
    if feature == "decay":
        arguments["frame_decay"] = decay(shape.tokens, device)
    if feature in PRECISIONS:
        arguments["precision"] = feature
    call = Call(inputs=inputs, tiles=tiles, arguments=arguments)
    if case.candidate in DENSE:
        run = lambda: (DENSE[case.candidate](q, k, v),)  # noqa: E731
        return Timed(run=run, check=lambda results: sampled(call, results), density_of=lambda results: density)
    return timed_call(call, case.backend, density)


def _selection(feature: str, shape: Shape, tiles: TileLists, kept: float, device: str) -> Selection:
    """LiteAttention: kept tiles of every head, with votes or without. SolAttention: routing, diagonal pinned."""
    routes = feature == "routed"
    return Selection(
        keep=None if routes else keep_bits(shape.batch, shape.heads, tiles.key_tiles, kept, device),
        pinned=pack_bits(torch.eye(tiles.key_tiles, dtype=torch.bool, device=device)),
        routing=Routing(beta=BETA) if routes else None,
        vote=Vote() if feature == "votes" else None,
    )


def measure(case: Timing, device: str) -> Record:
    """Time a candidate and compare some of what it gave."""
    call = prepare(case, device)
    results = call.run()
    visited, (error, allowed) = call.density_of(results), call.check(results)
    del results
    median, low, high = seconds_of(call, device)
    shape, backward = case.shape, case.candidate.endswith("-backward")
    products = 4 * shape.batch * shape.heads * shape.tokens**2 * shape.dim * visited * (2.5 if backward else 1.0)
    record = {
        "kind": "time", "shape": shape.name, "candidate": case.candidate, "density": case.density, "dtype": case.dtype,
        "density_found": visited, "seconds": median, "seconds_p20": low, "seconds_p80": high,
        "tflops": products / median / 1e12, "rows_error": error, "rows_allowed": allowed,
        "ok" if case.ours else "agrees": error <= allowed,
    }  # fmt: skip
    return {**record, **prediction(case, visited, device)}


def seconds_of(call: Timed, device: str) -> tuple[float, float, float]:
    """Seconds of a call: median, 20th and 80th percentile, after a warm-up."""
    if device != "cpu":
        from triton.testing import do_bench

        quantiles = do_bench(call.run, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8])
        return tuple(x / 1e3 for x in quantiles)  # pyright: ignore
    start = time.perf_counter()
    call.run()
    return (time.perf_counter() - start,) * 3


def prediction(case: Timing, density: float, device: str) -> Record:
    """The least seconds that the call can take and its slowest engine, if predictions.py knows this card and call."""
    card = None if device == "cpu" else card_of(torch.cuda.get_device_name())
    if card is None or case.candidate not in CANDIDATES or case.dtype != "bf16" or case.shape.name not in SHAPES:
        return {}
    predicted = predict(case.shape, case.candidate, density, card)
    return {"predicted_bound": predicted["bound"], "predicted_limit": predicted["limit"]}


def timed_call(call: Call, backend: str, density: float) -> Timed:
    """One of our calls by a backend."""

    def density_of(results: tuple[Tensor, ...]) -> float:
        if not call.arguments.get("return_tiles"):
            return density
        exact = results[2]
        return float(count_bits(exact).sum()) / (exact[..., 0].numel() * call.tiles.key_tiles)

    return Timed(run=lambda: call.run(backend), check=lambda results: sampled(call, results), density_of=density_of)


def gradients(inputs: tuple[Tensor, Tensor, Tensor], tiles: TileLists, density: float) -> Timed:
    """The backward alone, of a plain call."""
    from dit_accel_kernels.backends.triton.attend import attend
    from dit_accel_kernels.backends.triton.backward import attend_backward

    problem = problem_of(*inputs, tiles, layout="bhsd")
    out, lse, *_ = attend(problem, need_lse=True)
    grad_out = torch.randn_like(out)
    call = Call(inputs=inputs, tiles=tiles, arguments={"layout": "bhsd"}, grad_out=grad_out)

    def check(results: tuple[Tensor, ...]) -> Errors:
        return worst([sampled(call, results[:1]), key_gradients(call, out, lse, results)])

    return Timed(
        run=lambda: attend_backward(problem, out, lse, grad_out, None), check=check, density_of=lambda results: density
    )


def worst(pairs: list[Errors]) -> Errors:
    """The error that exceeds what is allowed most, or comes nearest."""
    return max(pairs, key=lambda pair: pair[0] / max(pair[1], 1e-30))


def sampled(call: Call, results: tuple[Tensor, ...]) -> Errors:
    """The first result's error in some query tiles of the first and the last head, in layout "bhsd"."""
    q, k, v = call.inputs
    tiles, block, result = call.tiles, call.tiles.block_q, ([], [], [])
    exact = results[2] if call.arguments.get("return_tiles") else None
    for h in {0, q.shape[1] - 1}:
        for i in {0, tiles.query_tiles // 2, tiles.query_tiles - 1}:
            rows = slice(i * block, min((i + 1) * block, tiles.num_q))
            at = (slice(0, 1), slice(h, h + 1))
            states, frames = _states_of(call, exact, h, i), call.arguments.get("frame_decay")
            arguments = {name: call.arguments[name] for name in ("layout", "precision") if name in call.arguments}
            if frames is not None:
                arguments["frame_decay"] = replace(frames, q_frames=frames.q_frames[rows])
            part = Call(
                inputs=(q[at][:, :, rows], k[at], v[at]),
                tiles=TileLists.from_states(
                    states, block_q=block, block_k=tiles.block_k, num_q=rows.stop - rows.start, num_k=tiles.num_k
                ),
                arguments=arguments,
                grad_out=None if call.grad_out is None else call.grad_out[at][:, :, rows],
            )
            yardstick, truth = part.run("reference")[0], part.to(torch.float64).run("reference")[0]
            for x, into in zip((results[0][at][:, :, rows], yardstick, truth), result, strict=True):
                into.append(x.flatten())
    return worst(list(errors(*map(torch.cat, result), q.dtype).values()))


def _states_of(call: Call, exact: Tensor | None, head: int, q_tile: int) -> Tensor:
    """Tile states uint8 [1, NK] of one query tile in the first batch, selection applied; lists are shared."""
    states, count = call.tiles.states()[0, q_tile], call.tiles.key_tiles
    if exact is None:
        return states[None]
    selection: Selection = call.arguments["selection"]
    keep = None if selection.keep is None else unpack_bits(selection.keep[0, head, q_tile], count)
    return left_by(selection, states, unpack_bits(exact[0, head, q_tile], count), keep)[None]


def key_gradients(call: Call, out: Tensor, lse: Tensor, grads: tuple[Tensor, ...]) -> Errors:
    """Errors of grad_k and grad_v in the middle key tile of the last head, by the formula, from output and LSE."""
    assert call.grad_out is not None
    (q, k, v), tiles, h = call.inputs, call.tiles, call.inputs[0].shape[1] - 1
    j = tiles.key_tiles // 2
    keys = slice(j * tiles.block_k, min((j + 1) * tiles.block_k, tiles.num_k))
    seen = (tiles.states()[0, :, j] == EXACT).repeat_interleave(tiles.block_q)[: tiles.num_q]

    def of(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows, grad, value = (x[0, h, seen].to(dtype) for x in (q, call.grad_out, out))
        k_j, v_j, scale = k[0, h, keys].to(dtype), v[0, h, keys].to(dtype), q.shape[-1] ** -0.5
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        p = ((rows @ k_j.T).to(wide) * scale - lse[0, h, seen, None].to(wide)).exp()
        delta = (grad.to(wide) * value.to(wide)).sum(-1, keepdim=True)
        grad_x = p * ((grad @ v_j.T).to(wide) - delta) * scale
        return grad_x.to(dtype).T @ rows, p.to(dtype).T @ grad

    results = []
    for got, yardstick, truth in zip((x[0, h, keys] for x in grads[1:]), of(q.dtype), of(torch.float64), strict=True):
        results += errors(got, yardstick, truth, q.dtype).values()
    return worst(results)
