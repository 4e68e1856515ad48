"""Shows what skipping and pooling cost a single attention call: `python -m dit_accel_eval.attention_error SUITE`.

The queries, keys and values are those of a dense run, so no error is carried from step to step. With the mass that the
list leaves out known, a pooled tile's error splits in two: its weight (the mean key stands for the mean of
exponentials, which is larger) and its value (the plain mean stands for the weighted one).
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import WanPipeline
from diffusers.models.transformers import transformer_wan
from dit_accel_assets import model_path
from dit_accel_assets.clips import clip_of
from dit_accel_kernels import POOLED, SKIPPED, TileLists, block_sparse_attention_eager
from torch import Tensor

import dit_accel
from dit_accel.methods.attention.radial import RadialAttention
from dit_accel.plan.layout import TokenLayout

from .compare import read_lines
from .suite import Suite, read_suite

Observer = Callable[[Tensor, Tensor, Tensor], None]
COLUMNS = ("mass", "pooled_mass", "skip", "pooled", "pooled_true_weight", "pooled_true_value")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a suite's pooled arms, write the rows as JSON lines and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", type=Path)
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON lines; default: results/attention-error.jsonl beside the suites")
    parser.add_argument("--table", action="store_true", help="print the table of an earlier run, generate nothing")
    options = parser.parse_args(arguments)
    out = options.out or options.suite.parent.parent / "results" / "attention-error.jsonl"
    if options.table:
        print(table(read_lines(out)))
        return 0
    torch.set_num_threads(options.threads)
    try:
        rows = measure(read_suite(options.suite), options.clips)
    except dit_accel.DitAccelError as error:
        print(error, file=sys.stderr)
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))
    return 0


def call_errors(q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, order: Tensor | None) -> dict[str, float]:
    """Return masses and relative errors of one call, over all heads and queries.

    Args:
        q: queries, [B, S, H, D].
        k: keys, the same shape.
        v: values, the same shape.
        tiles: lists with pooled tiles in the tiled order.
        order: position in the tiled order -> token, or None.

    Returns:
        ``mass``, the softmax mass of the pooled tiles, and ``pooled_mass``, what pooling takes it for; the error of
        ``skip`` and ``pooled`` against dense attention, relative to the dense output's norm; and that of pooling with
        the true weight or the true value in place of its own.
    """
    blocks: dict[str, Any] = {"block_q": tiles.block_q, "block_k": tiles.block_k}
    states = tiles.states()
    skipping = TileLists.from_states(
        states.masked_fill(states == POOLED, SKIPPED), num_q=tiles.num_q, num_k=tiles.num_k, **blocks
    )
    dense, dense_lse = _attend(q, k, v, TileLists.full(tiles.num_q, tiles.num_k, **blocks), order)
    skip, skip_lse = _attend(q, k, v, skipping, order)
    pooled, pooled_lse = _attend(q, k, v, tiles, order)
    mass, claimed = (1 - (skip_lse - lse).exp() for lse in (dense_lse, pooled_lse))
    rest_true, rest_pooled = ((x - (1 - w) * skip) / w.clamp(min=1e-6) for x, w in ((dense, mass), (pooled, claimed)))
    mixes = {
        "skip": skip,
        "pooled": pooled,
        "pooled_true_weight": (1 - mass) * skip + mass * rest_pooled,
        "pooled_true_value": (1 - claimed) * skip + claimed * rest_true,
    }
    errors = {name: float((x - dense).norm() / dense.norm()) for name, x in mixes.items()}
    return {"mass": float(mass.mean()), "pooled_mass": float(claimed.mean()), **errors}


def _attend(q: Tensor, k: Tensor, v: Tensor, tiles: TileLists, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return output and LSE of one call in float64, both with a last dimension to broadcast over."""
    out, lse = block_sparse_attention_eager(
        q.double(), k.double(), v.double(), tiles, token_order=order, return_lse=True, backend="torch"
    )
    return out, lse.transpose(1, 2)[..., None]


def measure(suite: Suite, clips: int) -> list[dict[str, str | float]]:
    """Return one row for each pooled arm, layer and half of the sparse steps: means over clips and calls."""
    pipe = WanPipeline.from_pretrained(model_path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    arms = {
        arm.name: method.resolve()
        for arm in suite.arms
        for method in arm.methods
        if isinstance(method, RadialAttention) and method.rest == "pooled"
    }
    by_setting: dict[tuple[str, int, str], list[dict[str, float]]] = {}
    layout = TokenLayout(frames=(suite.num_frames - 1) // 2 + 1, height=8, width=8)
    layers, steps = pipe.transformer.config.num_layers, suite.num_inference_steps
    for clip in range(clips):
        calls = iter(range(2 * layers * steps))  # two branches a step

        def observe(q: Tensor, k: Tensor, v: Tensor, calls: Iterator[int] = calls) -> None:
            call = next(calls)
            step, layer = call // (2 * layers), call % layers
            for name, method in arms.items():
                if method.is_dense(step, steps, layer):
                    continue
                half = "early" if step < steps // 2 else "late"
                errors = call_errors(q, k, v, method.tiles(layout), method.token_order(layout))
                by_setting.setdefault((name, layer, half), []).append(errors)

        with observed(observe):
            pipe(
                clip_of(clip, frames=suite.num_frames, held_out=True)[0],
                num_frames=suite.num_frames,
                height=64,
                width=64,
                num_inference_steps=steps,
                guidance_scale=suite.guidance_scale,
                generator=torch.Generator().manual_seed(clip),
                output_type="latent",
            )
    return [
        {"arm": name, "layer": layer, "steps": half}
        | {key: float(np.mean([one[key] for one in all_calls])) for key in COLUMNS}
        for (name, layer, half), all_calls in sorted(by_setting.items())
    ]


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Show the queries, keys and values of every self-attention call of a Wan transformer to ``observer``."""
    original = transformer_wan.dispatch_attention_fn

    def dispatch(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if query.shape[1] == key.shape[1]:
            observer(query, key, value)
        return original(query, key, value, *args, **options)

    with mock.patch.object(transformer_wan, "dispatch_attention_fn", dispatch):
        yield


def table(rows: Sequence[dict[str, str | float]]) -> str:
    """Return the rows and their mean by arm as a Markdown table, masses and errors in per cent."""
    lines = [
        "| arm | layer | steps | mass left out | as pooled | error: skip | pooled | pooled, true weight "
        "| pooled, true value |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    means = [
        {"arm": arm, "layer": "all", "steps": "all"}
        | {key: float(np.mean([float(row[key]) for row in rows if row["arm"] == arm])) for key in COLUMNS}
        for arm in dict.fromkeys(row["arm"] for row in rows)
    ]
    for row in (*rows, *means):
        shares = " | ".join(f"{100 * float(row[key]):.1f} %" for key in COLUMNS)
        lines.append(f"| {row['arm']} | {row['layer']} | {row['steps']} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
