"""Measures what linear layers in eight bits cost a clip: `python eval/studies/eight_bit_linears.py` (needs torchao).

The blocks' linear layers as torchao computes them in int8, weights and activations, each row with a scale of its own;
all linear layers so; and weights alone. For fp8, which torchao computes on GPUs alone, weights and activations are
rounded to e4m3 row by row. Each line is one clip's PSNR to the converged run, and to the run with plain layers.
"""

import argparse
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from dit_accel_eval.metrics.psnr import psnr
from dit_accel_eval.runs.loaded import EmbeddedModel, weights_hash
from dit_accel_eval.runs.results import Line, markdown_table
from dit_accel_eval.suites.reference import default_cache, reference_run
from scipy import stats
from study import study
from torch import Tensor, nn

from dit_accel import SeaCache

METHODS = {"dense": (), "seacache": (SeaCache(threshold=0.4, predictor="taylor"),)}
LINEARS = ("plain", "int8", "int8, all layers", "weight-only int8", "fp8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table; returns the exit code."""
    out = "eight-bit-linears.jsonl"
    return study(__doc__, arguments, measure, table, out=out, model="wan-tiny", first_clip=16, clips=4, steps=20)


def measure(options: argparse.Namespace, _: Sequence[Line]) -> Iterator[Line]:
    """Give a line for each kind of layers, clip and method."""
    plain, frames = EmbeddedModel(options.model, {}), {}
    for linears in LINEARS:
        quantise((model := EmbeddedModel(options.model, {})).pipe.transformer, linears)
        for clip in range(options.first_clip, options.first_clip + options.clips):
            converged = reference_run(plain, clip, default_cache()).frames
            for name, methods in METHODS.items():
                made = model.run(clip, steps=options.steps, solver="unipc", methods=methods).frames
                same = frames.setdefault((clip, name), made)  # plain layers come first
                yield {
                    "model": options.model, "weights": weights_hash(options.model), "steps": options.steps,
                    "linears": linears, "method": name, "clip": clip,
                    "psnr": round(float(psnr(made, converged)), 3), "to_plain": round(float(psnr(made, same)), 3),
                }  # fmt: skip


def quantise(transformer: nn.Module, linears: str) -> None:
    """Let a transformer's linear layers compute as one of `LINEARS` says, in place."""
    layers = {name: one for name, one in transformer.named_modules() if isinstance(one, nn.Linear)}
    chosen = {name for name in layers if name.startswith("blocks.") or linears == "int8, all layers"}
    if linears == "fp8":
        for name in chosen:
            layers[name].weight.data = rounded(layers[name].weight.data)
            layers[name].register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]), *inputs[1:]))
    elif linears != "plain":
        import torchao.quantization as ao  # pyright: ignore[reportMissingImports]

        dynamic = linears != "weight-only int8"
        config = (ao.Int8DynamicActivationInt8WeightConfig if dynamic else ao.Int8WeightOnlyConfig)()
        ao.quantize_(transformer, config, filter_fn=lambda _, name: name in chosen)


def rounded(rows: Tensor) -> Tensor:
    """Return rows, [..., K], rounded to e4m3, the largest number of each at that format's largest."""
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (rows / scale).to(torch.float8_e4m3fn).to(rows.dtype) * scale


def table(lines: Sequence[Line]) -> str:
    """Return the mean PSNR of each kind of layers and method, and what it loses to plain ones, with a t interval."""
    rows, by = [], {(line["linears"], line["method"], line["clip"]): line for line in lines}
    for linears, method in dict.fromkeys((line["linears"], line["method"]) for line in lines):
        runs = [line for (kind, name, _), line in by.items() if (kind, name) == (linears, method)]
        lost = np.array([line["psnr"] - by["plain", method, line["clip"]]["psnr"] for line in runs])
        half = stats.t.ppf(0.975, max(1, len(lost) - 1)) * lost.std(ddof=int(len(lost) > 1)) / len(lost) ** 0.5
        beside = ("", "") if linears == "plain" else (
            f"{np.mean([line['to_plain'] for line in runs]):.1f}",
            f"{lost.mean():+.2f} [{lost.mean() - half:+.2f}, {lost.mean() + half:+.2f}]",
        )  # fmt: skip
        rows.append((linears, method, len(runs), f"{np.mean([line['psnr'] for line in runs]):.2f}", *beside))
    return "wan-tiny's clips, 95 % intervals.\n\n" + markdown_table(
        "linear layers | method | clips | PSNR, dB | to plain layers, dB | against plain, dB", rows
    )


if __name__ == "__main__":
    raise SystemExit(main())
