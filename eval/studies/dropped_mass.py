"""Measures what LiteAttention's budget holds to: `python eval/studies/dropped_mass.py`.

In every attention call of `wan-plain`'s runs, the softmax mass of what the call leaves out, on its own queries
and keys and against dense attention: mean and largest over the call's rows, beside the budget.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path
from dit_accel_assets.clips import clip_of
from dit_accel_eval.runs.loaded import weights_hash
from dit_accel_eval.runs.results import markdown_table
from dit_accel_kernels import unpack_bits
from study import study
from torch import Tensor

import dit_accel
from dit_accel.attachment.layers import PlannedCall

BUDGETS = (0.1,)
SETTING: dict[str, Any] = {"block_size": 16, "dense_steps": 2}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what ``--out`` does not hold yet, one JSON line per clip, and print the table; returns the exit code."""
    return study(
        __doc__, arguments, measure, table, out="dropped-mass.jsonl", resumes=True, threads=torch.get_num_threads(),
        budgets=BUDGETS, clips=16, num_frames=17, steps=20,
    )  # fmt: skip


def dropped_mass(planned: PlannedCall) -> Tensor:
    """Return the share of each row's softmax mass that a call's selection left out, [B, H, S]."""
    assert planned.exact is not None
    assert planned.plan.tiles is not None
    q, k, order, tiles = planned.call.q, planned.call.k, planned.plan.token_order, planned.plan.tiles
    if order is not None:
        q, k = q[:, :, order], k[:, :, order]
    kept = unpack_bits(planned.exact, tiles.key_tiles)
    kept = kept.repeat_interleave(tiles.block_q, 2)[:, :, : q.shape[2]]
    kept = kept.repeat_interleave(tiles.block_k, 3)[..., : k.shape[2]]
    scale = q.shape[-1] ** -0.5 if planned.call.scale is None else planned.call.scale
    return ((q @ k.mT * scale).softmax(-1) * ~kept).sum(-1)


def measure(options: argparse.Namespace, known: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Give one line for each budget and held-out clip that is not ``known``."""
    done = {(line["budget"], line["clip"]) for line in known}
    pipe = WanPipeline.from_pretrained(model_path("wan-plain"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for clip in range(options.clips):
        for budget in options.budgets:
            if (budget, clip) not in done:
                yield _measured(pipe, options, budget, clip)


def _measured(pipe: WanPipeline, options: argparse.Namespace, budget: float, clip: int) -> dict[str, Any]:
    method = dit_accel.LiteAttention(criterion="budget", threshold=budget, **SETTING)
    means, largest, rows, within = [], 0.0, 0, 0

    def measure_call(planned: PlannedCall) -> None:
        nonlocal largest, rows, within
        mass = dropped_mass(planned)
        means.append(float(mass.mean()))
        largest = max(largest, float(mass.max()))
        rows, within = rows + mass.numel(), within + int((mass <= budget).sum())

    with dit_accel.attach(pipe, method) as attachment, attachment.observe(measure_call):
        pipe(
            clip_of(clip, frames=options.num_frames, held_out=True)[0], num_frames=options.num_frames, height=64,
            width=64, num_inference_steps=options.steps, guidance_scale=4.0, max_sequence_length=32,
            generator=torch.Generator().manual_seed(clip), output_type="latent",
        )  # fmt: skip
        density = attachment.report().sparse_density
    return {
        "budget": budget,
        "clip": clip,
        "calls": len(means),
        "calls_within": sum(mean <= budget for mean in means),
        "mean": sum(means) / len(means),
        "largest_mean": max(means),
        "rows_within": within / rows,
        "largest_row": largest,
        "sparse_density": density,
        "num_frames": options.num_frames,
        "steps": options.steps,
        **SETTING,
        "torch": torch.__version__,
        "model": weights_hash("wan-plain"),
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return one row per budget under a line that says how they were made, as Markdown."""
    first = lines[0]
    clips = len({line["clip"] for line in lines})
    head = (
        f"wan-plain, {clips} held-out clips of {first['num_frames']} frames, {first['steps']} steps, tiles of "
        f"{first['block_size']}."
    )
    heads = "budget | calls | whose mean mass is within | mean | largest mean of a call | rows within | largest row"
    rendered = []
    for budget in sorted({line["budget"] for line in lines}):
        of = [line for line in lines if line["budget"] == budget]
        calls = sum(line["calls"] for line in of)
        mean, rows, density = (
            sum(line[key] * line["calls"] for line in of) / calls for key in ("mean", "rows_within", "sparse_density")
        )
        largest, row = (max(line[key] for line in of) for key in ("largest_mean", "largest_row"))
        share = sum(line["calls_within"] for line in of) / calls
        cells = (f"{budget:g}", calls, f"{share:.1%}", f"{mean:.4f}", f"{largest:.4f}", f"{rows:.2%}", f"{row:.3f}")
        rendered.append((*cells, f"{density:.3f}"))
    return f"{head}\n\n{markdown_table(f'{heads} | density of sparse calls', rendered)}"


if __name__ == "__main__":
    raise SystemExit(main())
