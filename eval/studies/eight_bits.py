"""Measures what queries and keys in eight bits cost a call: `python eval/studies/eight_bits.py`.

Calls of runs of the embedded models, their q, k and v rounded to bfloat16, over all tiles and over those that Sol left
exact with the others pooled: the relative error of the output against float64, as the kernels' specification computes
it in bfloat16, and with `precision`. Beside it torch's SDPA in bfloat16, over all tiles alone, whose logits stay in
float32 as our kernels' do and the specification's don't; and eight bits of keys from which no mean was subtracted, as
where logits decay. Figures are means and largest values over calls.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from dit_accel_eval.runs.loaded import EmbeddedModel, weights_hash
from dit_accel_eval.runs.results import Line, markdown_table
from dit_accel_kernels import EXACT, FrameDecay, TileLists, block_sparse_attention_eager
from study import study
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dit_accel
from dit_accel.testing.recording import RecordedCall, recorded

TILES = {"dense": 128, "sparse": 16}
"""Tokens of a tile, which share a scale: the methods' own number, and one that these short calls can be cut into."""

METHOD = dit_accel.SolAttention(beta=0.0, block_size=TILES["sparse"], dense_steps=0, dense_layers=0)
"""What plans every call, so that it is seen; its pooled tiles are the sparse lists."""

LOW = torch.bfloat16


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, one JSON line for each model, lists and arm, and print the table; returns the exit code."""
    return study(
        __doc__, arguments, measure, table, out="eight-bits.jsonl", models=("wan-tiny", "flux-tiny"), steps=8, every=5
    )


def measure(options: argparse.Namespace, _: list[Line]) -> Iterator[Line]:
    """Give the lines of each model: of every so many calls of one run, over layers, steps and branches."""
    for name in options.models:
        model = EmbeddedModel(name, {})
        with dit_accel.attach(model.pipe, METHOD, preset="none") as attachment, recorded(attachment) as calls:
            model.run(0, steps=options.steps, solver="unipc")
        found: dict[tuple[str, str], list[float]] = {}
        for call in calls[:: options.every]:
            for key, error in errors(call).items():
                found.setdefault(key, []).append(error)
        for (lists, arm), values in found.items():
            yield {
                "model": name, "weights": weights_hash(name), "lists": lists, "arm": arm, "calls": len(values),
                "tile": TILES[lists], "mean": sum(values) / len(values), "largest": max(values),
                "torch": torch.__version__,
            }  # fmt: skip


def errors(call: RecordedCall) -> dict[tuple[str, str], float]:
    """Return the relative error of each way to compute a call, by lists and arm."""
    q, k, v = inputs = tuple(x.to(LOW) for x in (call.q, call.k, call.v))
    sparse, found = call.states().expand(*q.shape[:2], -1, -1).flatten(0, 1).contiguous(), {}
    shared = {"layout": "bhsd", "scale": call.scale, "token_order": call.plan.token_order, "key_mask": call.valid()}
    frames = torch.zeros(q.shape[2], dtype=torch.int32)
    nothing = FrameDecay(table=torch.ones(1), q_frames=frames, k_frames=frames)  # with any decay keys stay as they are

    def run(tiles: TileLists, *tensors: Tensor, **arguments: Any) -> Tensor:
        out = block_sparse_attention_eager(*tensors, tiles, **shared, **arguments, backend="reference")  # type: ignore
        assert isinstance(out, Tensor)
        return out.double()

    count = -(-q.shape[2] // TILES["dense"])
    for name, states in (("dense", torch.full((1, count, count), EXACT, dtype=torch.uint8)), ("sparse", sparse)):
        size = TILES[name]
        tiles = TileLists.from_states(states, block_q=size, block_k=size, num_q=q.shape[2], num_k=k.shape[2])
        truth = run(tiles, *(x.double() for x in inputs))
        outs = {"bf16": run(tiles, *inputs)}
        for precision in ("int8", "fp8"):
            outs[precision] = run(tiles, *inputs, precision=precision)
            outs[f"{precision}, keys as they are"] = run(tiles, *inputs, precision=precision, frame_decay=nothing)
        if name == "dense" and shared["key_mask"] is None:
            outs["bf16, SDPA"] = scaled_dot_product_attention(q, k, v, scale=call.scale).double()
        found |= {(name, arm): float((out - truth).norm() / truth.norm()) for arm, out in outs.items()}
    return found


def table(lines: list[Line]) -> str:
    """Return a Markdown table, a row for each model, lists and arm."""
    rows = [
        (one["model"], one["lists"], one["arm"], one["calls"], f"{one['mean']:.2%}", f"{one['largest']:.2%}")
        for one in lines
    ]
    return markdown_table("model | lists | queries and keys | calls | mean error | largest", rows)


if __name__ == "__main__":
    raise SystemExit(main())
