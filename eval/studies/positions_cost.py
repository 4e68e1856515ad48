"""Times attention with decay or head scales against the same calls without: `python eval/studies/positions_cost.py`.

The calls are those of one self-attention layer of Wan 2.1 1.3B's shape with random weights, on a clip longer than it
was trained on: 33 latent frames, 4,620 tokens. A dense call is the model's own, with head scales put on its queries;
with decay it is ours over all tiles. A sparse call follows Radial's lists. Processor time of one thread, in turn.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from dit_accel_eval.bench.loop import in_turn
from dit_accel_eval.runs.results import Line, markdown_table
from dit_accel_kernels import block_sparse_attention_eager
from product_time import make_transformer
from study import about, seconds_of, study
from torch import Tensor

import dit_accel
from dit_accel.attachment.layers import PlannedCall

LATENTS = (1, 16, 33, 20, 28)
"""[B, C, T, H, W]: 33 x 10 x 14 tokens."""

RADIAL = dit_accel.RadialAttention(dense_steps=0, dense_last_steps=0, dense_layers=0, block_size=64, decay_factor=0.2)
ULTRAVICO = dit_accel.UltraViCo(alpha=0.9, trained_frames=21, first_frame=False)


def page_text(lines: Sequence[Line]) -> str:
    """Return the lines of a run as a Markdown table under a sentence on how they were measured."""
    first = lines[0]
    head = (
        f"a layer of Wan 2.1 1.3B's shape, {first['tokens']} tokens, {first['rounds']} rounds, {first['threads']} "
        f"thread of processor time, torch {first['torch']}, {first['processor']}; medians of the ratio and its range."
    )
    rows = []
    for line in lines:
        low, high = line["range"]
        rows.append(
            (line["call"], f"{line['density']:.2f}", line["with"], f"{line['ratio']:.2f} [{low:.2f}, {high:.2f}]")
        )
    return f"{head}\n\n{markdown_table('call | density | with | times the call without', rows)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one JSON line for each kind of call and each addition, and print the table; returns the exit code."""
    return study(__doc__, arguments, measure, page_text, out="positions-cost.jsonl", rounds=5)


def measure(options: Any, lines: list[Line]) -> Iterator[Line]:
    """Give a line for each kind of call and each addition."""
    planned = recorded()
    shared = {"tokens": planned.call.tokens, "rounds": options.rounds, **about()}
    for call, density, runs in calls(planned):
        seconds = list(in_turn({name: partial(seconds_of, run) for name, run in runs.items()}, options.rounds))
        plain = np.array([one["nothing"] for one in seconds])
        for name in list(runs)[1:]:
            ratios = np.array([one[name] for one in seconds]) / plain
            yield {
                "call": call, "density": density, "with": name, "ratio": float(np.median(ratios)),
                "range": [float(ratios.min()), float(ratios.max())], "seconds_without": float(np.median(plain)),
                **shared,
            }  # fmt: skip


@torch.no_grad()
def recorded() -> PlannedCall:
    """Return the attention call of one layer, planned with Radial's lists and UltraViCo's decay."""
    transformer, found = make_transformer(1), []
    torch.manual_seed(1)
    with (
        dit_accel.attach(transformer, RADIAL, ULTRAVICO) as attachment,
        attachment.observe(found.append),
        transformer.cache_context("cond", step_index=0, num_inference_steps=8),
    ):
        transformer(torch.randn(LATENTS), torch.tensor([900.0]), torch.randn(1, 512, 4096), return_dict=False)
    return found[0]


def calls(planned: PlannedCall) -> list[tuple[str, float, dict[str, Callable[[], Any]]]]:
    """Return (kind of call, density, what is added -> the call) of dense and of sparse calls."""
    call, plan = planned.call, planned.plan
    scale = torch.linspace(1.0, 1.3, call.q.shape[1])
    sparse = replace(plan, frame_decay=None)
    whole = replace(sparse, tiles=None, token_order=None)

    def ours(plan: Any) -> Callable[[], Any]:
        tiles, arguments = plan.kernel_arguments(call)

        def run() -> Any:
            k = plan.centred(call.k) if plan.frame_decay is not None else call.k
            q, k, v = call.as_held(call.q, k, call.v)
            return block_sparse_attention_eager(q, k, v, tiles, **arguments)

        return torch.no_grad()(run)

    def own(factor: Tensor | None) -> Callable[[], Any]:
        def run() -> Tensor:
            q = call.q if factor is None else call.q * factor[None, :, None, None]
            return torch.nn.functional.scaled_dot_product_attention(q, call.k, call.v, scale=call.scale)

        return torch.no_grad()(run)

    assert plan.tiles is not None
    density = plan.tiles.density
    return [
        (
            "dense",
            1.0,
            {
                "nothing": own(None),
                "head scales": own(scale),
                "decay": ours(replace(whole, frame_decay=plan.frame_decay)),
            },
        ),
        (
            "Radial",
            density,
            {
                "nothing": ours(sparse),
                "head scales": ours(sparse.scale(scale)),
                "decay": ours(plan),
                "both": ours(plan.scale(scale)),
            },
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
