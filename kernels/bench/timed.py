"""The calls that gpu.py times: ours at several densities and features, dense attention, FlexAttention; and their check.

Some query tiles of every timed call, and some key tiles of a backward, are computed again by the specification: what
is fast and wrong must not pass. A timed call is added in CALLS.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from calls import Call, Setting, make
from dit_accel_kernels import EXACT, Selection, TileLists, count_bits, unpack_bits
from dit_accel_kernels.checks import problem_of
from grid import Case, Record, errors, left_by
from predictions import CANDIDATES, SHAPES, Shape, card_of, predict
from recorded import Recorded
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

RADIAL = 0.27  # RadialAttention's density at Wan 720p, 81 frames
Errors = tuple[float, float]  # measured and allowed


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
"""Dense attention of q, k and v [B, H, S, D]: rivals, as FlexAttention is, our backend "flex"."""

KINDS = {
    "": "plain", "backward": "backward", "decay": "decay", "pooled": "pooled", "routed": "pinned+route",
    "kept": "keep+pinned", "votes": "keep+pinned+maxgap", "partial": "partial", "int8": "int8", "fp8": "fp8",
}  # fmt: skip
"""What stands behind triton- or fa4-: LiteAttention's kept tiles and votes, SolAttention's routing, and so on."""

CALLS = (
    ("triton", RADIAL), *((name, 1.0) for name in DENSE), ("triton", 1.0), ("flex", RADIAL), ("fa4", RADIAL),
    ("triton", 0.1), ("triton-backward", RADIAL), ("triton-decay", RADIAL), ("triton-pooled", 0.1), ("fa4-pooled", 0.1),
    ("fa4-decay", RADIAL), ("triton-routed", 0.1), ("triton-int8", RADIAL), ("triton-fp8", RADIAL),
    ("triton-kept", RADIAL), ("triton-votes", RADIAL), ("triton", 0.25), ("triton", 0.5), ("triton-partial", RADIAL),
    ("fa4-partial", RADIAL),
)  # fmt: skip
"""Candidates and densities of a model's shape, the telling ones first."""

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
class Timing(Case):
    """A candidate on a shape; `backend` is triton, fa4, flex, or a dense rival's name."""

    shape: Shape
    candidate: str
    seconds = 4

    @property
    def ours(self) -> bool:
        """Whether it is one of our kernels: that a rival can't run here, or errs, is no fault of a run."""
        return self.backend in ("triton", "fa4")

    @property
    def name(self) -> str:
        """Such as "wan-720p triton 0.27"."""
        return f"{self.shape.name} {self.candidate} {self.at.density:g}"

    @property
    def group(self) -> str:
        """The timings that it shares a process with: those of its shape."""
        return f"time-{self.shape.name}"

    def missing(self, device: str) -> str | None:
        """What the candidate needs and does not find here, or None."""
        if not self.candidate.startswith("flash-attn"):
            return Case.missing(self, device)
        try:
            importlib.import_module(DENSE[self.candidate].args[0])
        except (ImportError, OSError) as error:
            return str(error)
        return None

    def launches(self, target: str) -> dict[str, Recorded]:
        """What it launches on a target, by identity; of rivals nothing."""
        return Case.launches(self, target) if self.ours else {}

    def run(self, device: str) -> list[Record]:
        """Its findings."""
        return [measure(self, device)]


def timings() -> list[Timing]:
    """Everything that is timed, shape by shape."""
    models = [(SHAPES[name], "bf16", CALLS) for name in ORDER]
    return [
        timing(shape, candidate, density, dtype)
        for shape, dtype, calls in (*models, *((*further, FEW) for further in FURTHER))
        for candidate, density in calls
    ]


def timing(shape: Shape, candidate: str, density: float, dtype: str) -> Timing:
    """A candidate at a density on a shape."""
    at = Setting(
        dtype=dtype, dim=shape.dim, tile=shape.block, batch=shape.batch, heads=shape.heads, key_heads=shape.heads,
        tokens=shape.tokens, layout="bhsd", density=density,
    )  # fmt: skip
    backend, _, feature = (candidate, "", "") if candidate in DENSE else candidate.partition("-")
    return Timing(kind=KINDS[feature], at=at, backend=backend, shape=shape, candidate=candidate)


def measure(case: Timing, device: str) -> Record:
    """Time a candidate and compare some of what it gave."""
    call, shape = make(case.kind, case.at, device), case.shape
    run, check = prepared(call, case.backend)
    results = run()
    visited, (error, allowed) = visited_by(call, results) or case.at.density, check(results)
    del results
    median, low, high = seconds_of(run, device)
    products = 4 * shape.batch * shape.heads * shape.tokens**2 * shape.dim * visited
    products *= 2.5 if case.kind == "backward" else 1.0
    record = {
        "kind": "time", "shape": shape.name, "candidate": case.candidate, "density": case.at.density,
        "dtype": case.at.dtype, "density_found": visited, "seconds": median, "seconds_p20": low, "seconds_p80": high,
        "tflops": products / median / 1e12, "rows_error": error, "rows_allowed": allowed,
        "ok" if case.ours else "agrees": error <= allowed,
    }  # fmt: skip
    return {**record, **prediction(case, visited, device)}


def prepared(call: Call, backend: str) -> tuple[Callable[[], Any], Callable[[Any], Errors]]:
    """What makes a call, of a backward the backward alone, and what compares some of its results."""
    if call.grad_out is None:
        run = (lambda: (DENSE[backend](*call.inputs),)) if backend in DENSE else (lambda: call.run(backend))
        return run, lambda results: sampled(call, results)
    from dit_accel_kernels.backends.triton.attend import attend
    from dit_accel_kernels.backends.triton.backward import attend_backward

    problem = problem_of(*call.inputs, call.tiles, layout="bhsd", return_lse=True)
    out, lse, *_ = attend(problem)
    return (
        lambda: attend_backward(problem, out, lse, call.grad_out, None),
        lambda results: worst([sampled(call, results[:1]), key_gradients(call, out, lse, results)]),
    )


def visited_by(call: Call, results: tuple[Tensor, ...]) -> float | None:
    """The share of tiles that a selection left exact, None without a selection."""
    if not call.arguments.get("return_tiles"):
        return None
    return float(count_bits(results[2]).sum()) / (results[2][..., 0].numel() * call.tiles.key_tiles)


def seconds_of(run: Callable[[], Any], device: str) -> tuple[float, float, float]:
    """Seconds of a call: median, 20th and 80th percentile, after a warm-up."""
    if device != "cpu":
        from triton.testing import do_bench

        quantiles = do_bench(run, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8])
        return tuple(x / 1e3 for x in quantiles)  # pyright: ignore
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start,) * 3


def prediction(case: Timing, density: float, device: str) -> Record:
    """The least seconds that the call can take and its slowest engine, if predictions.py knows this card and call."""
    card = None if device == "cpu" else card_of(torch.cuda.get_device_name())
    if card is None or case.candidate not in CANDIDATES or case.shape.name not in SHAPES:
        return {}
    predicted = predict(case.shape, case.candidate, density, card)
    return {"predicted_bound": predicted["bound"], "predicted_limit": predicted["limit"]}


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
            arguments = {
                name: x for name, x in call.arguments.items() if name in ("layout", "frame_decay", "precision")
            }
            if "frame_decay" in arguments:
                frames = arguments["frame_decay"]
                arguments["frame_decay"] = replace(frames, q_frames=frames.q_frames[rows])
            part = Call(
                inputs=(q[at][:, :, rows], k[at], v[at]),
                tiles=replace(_lists_of(call, exact, h, i), num_q=rows.stop - rows.start),
                arguments=arguments,
                grad_out=None if call.grad_out is None else call.grad_out[at][:, :, rows],
            )
            yardstick, truth = part.run("reference")[0], part.to(torch.float64).run("reference")[0]
            for x, into in zip((results[0][at][:, :, rows], yardstick, truth), result, strict=True):
                into.append(x.flatten())
    return worst(list(errors(*map(torch.cat, result), q.dtype).values()))


def _lists_of(call: Call, exact: Tensor | None, head: int, i: int) -> TileLists:
    """Lists of one query tile in the first batch, selection applied; the call's are shared by all heads."""
    tiles, parts = call.tiles, {}
    sizes = dict(block_q=tiles.block_q, block_k=tiles.block_k, num_q=tiles.block_q, num_k=tiles.num_k)
    if exact is not None:
        selection: Selection = call.arguments["selection"]
        keep = None if selection.keep is None else unpack_bits(selection.keep[0, head, i], tiles.key_tiles)
        stays = unpack_bits(exact[0, head, i], tiles.key_tiles)
        return TileLists.from_states(left_by(selection, tiles.states()[0, i], stays, keep)[None], **sizes)
    for name, more in (("exact", ("exact_indices", "mask_ids")), ("pooled", ("pooled_indices",))):
        offsets = getattr(tiles, f"{name}_offsets")
        if offsets is not None:
            first, end = offsets[0, i : i + 2].tolist()
            parts[f"{name}_offsets"] = offsets.new_tensor([[0, end - first]])
            parts |= {at: x[first:end] for at in more if (x := getattr(tiles, at)) is not None}
    return TileLists(**sizes, **parts, mask_bits=tiles.mask_bits)


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
