"""`dit-accel plan`: what a run would cost and what methods would save, without weights."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.table import Table

from ..estimate.hardware import CARD, LINEAR_COST
from ..estimate.prediction import KERNEL_COST, Prediction, estimate
from ..estimate.sizes import advice, beyond_trained
from ..estimate.work import least_weights
from ..methods.base import Model
from ..methods.presets import preset_methods
from .console import OUT, note, plain_table, print_json, warn
from .method_options import MethodList, Preset
from .model_options import FamilyName, ModelName, named_model
from .run_options import Frames, InferenceSteps, Pixels

FACTORS = {
    "forwards": "computed forwards and blocks",
    "attention": "sparse attention",
    "linears": "8-bit linear layers",
}
"""What the parts of a speed-up are called, one beside those before it."""


KernelCost = Annotated[
    float | None,
    typer.Option(
        help="Time of a sparse kernel per kept FLOP over the dense kernel's; default: as doctor measured on this "
        f"machine, else {KERNEL_COST}.",
    ),
]
Linears = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        "--linears",
        help="Linear layers in fewer bits, as generate: fp8 and int8, of weights and activations; fp8-weights, "
        "int8-weights, int4 and nf4, of weights alone.",
        metavar="KIND",
    ),
]


def plan(
    family: FamilyName = None,
    model: ModelName = None,
    height: Pixels = None,
    width: Pixels = None,
    num_frames: Frames = None,
    num_inference_steps: InferenceSteps = None,
    kernel_cost: KernelCost = None,
    linears: Linears = None,
    hardware: Annotated[
        str | None, typer.Option(help=f"The card whose figures count for --quantize; default: {CARD}.", metavar="NAME")
    ] = None,
    linear_cost: Annotated[
        float, typer.Option(help="Time of an 8-bit product over what the card's data sheet gives.")
    ] = LINEAR_COST,
    preset: Preset = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, plain numbers.")] = False,
    *,
    methods: MethodList,
) -> None:
    """Estimate density, FLOPs, memory and speed-up of a run; loads no weights.

    FLOPs are the transformer's, over the whole run. In the JSON,
    attention_flops and total_flops are the dense run's; the planned_ ones
    are those with the methods. Tiles count visual tokens only.

    \b
    Examples:
      dit-accel plan --family wan2.1-14b --num-frames 69 --radial
      dit-accel plan --model FOLDER --set radial.decay_factor=0.5 --json
      dit-accel plan --family flux.1-dev --preset balanced
      dit-accel plan --family hunyuan-video --sol --quantize fp8 --hardware h200
    """
    adapter, sizes, config = named_model("plan", family, model)
    described = Model(adapter=adapter, family=sizes, heads=sizes.heads, layers=sizes.layers)
    chosen = preset_methods(preset, described, methods) if preset else None
    requested = dict(height=height, width=width, num_frames=num_frames, num_inference_steps=num_inference_steps)
    prediction = estimate(
        adapter, sizes, **requested, methods=methods, preset=chosen, kernel_cost=kernel_cost, config=config,
        linears=linears, hardware=hardware, linear_cost=linear_cost,
    )  # fmt: skip
    attached = [*methods]
    if chosen:
        note(chosen.words(prediction.num_inference_steps))
        attached += chosen.configs
    _talk(prediction, num_frames, advice(adapter, sizes, prediction.layout, attached))
    if json:
        print_json(prediction.to_dict())
    else:
        _print(prediction)


def _talk(prediction: Prediction, requested_frames: int | None, advised: Sequence[str]) -> None:
    """Say on stderr what a user should know besides the figures."""
    if requested_frames is not None and prediction.num_frames != requested_frames:
        note(f"{requested_frames} frames are rounded to {prediction.num_frames}, as the pipeline does")
    for text in prediction.notes:
        note(text)
    for text in [*prediction.warnings, *advised]:
        warn(text)


def _print(prediction: Prediction) -> None:
    size = f"{prediction.width} x {prediction.height} pixels, {prediction.num_frames} frames"
    OUT.print(f"[bold]{prediction.family.name}[/bold]  {size}")
    table = Table.grid(padding=(0, 2))
    for label, value in [*_rows(prediction), *_rows_of_linears(prediction)]:
        table.add_row(label, value)
    OUT.print(table)
    OUT.print()
    OUT.print(_flops_table(prediction))
    if prediction.tiles or prediction.forward_share != 1 or prediction.linear_time != 1:
        OUT.print()
        OUT.print(_verdict(prediction))
        OUT.print(_assumptions(prediction), style="dim")


def _rows(prediction: Prediction) -> list[tuple[str, str]]:
    """Return the table's rows on the run's size and on what the methods leave and hold."""
    layout, family, tiles = prediction.layout, prediction.family, prediction.tiles
    text = f" + {family.text_tokens:,} of text" if family.text_tokens else ""
    grid = f"{layout.frames} frames of {layout.height} x {layout.width}"
    rows: list[tuple[str, str]] = [
        ("tokens", f"{layout.visual_tokens:,}{text}  ({grid})"),
        ("forwards", f"{prediction.forwards}  ({prediction.num_inference_steps} steps x {family.forwards_per_step})"),
    ]
    for axis, (tokens, trained) in beyond_trained(family, layout).items():
        rows.append((f"{axis} beyond", f"{tokens / trained:.2f} times the trained {trained}"))
    if prediction.times_trained > 1:
        planned = prediction.times_trained / prediction.speedup
        methods = f", {planned:.2f} with the methods" if prediction.methods else ""
        rows.append(("time", f"{prediction.times_trained:.2f} times that of the trained size, dense{methods}"))
    if tiles:
        rows += [
            ("tiles kept", f"{tiles.kept:,} of {tiles.total:,}  (density {tiles.density:.4f})"),
            ("dense calls", f"{tiles.dense_share:.1%} of steps x layers"),
            ("method state", f"{_bytes(prediction.tile_list_bytes + prediction.pooled_bytes)}"),
        ]
    if any(saving.blocks for saving in prediction.savings.values()):
        rows.append(("blocks computed", f"{prediction.computed_blocks:.1%} of the dense run's"))
    elif prediction.forward_share != 1:
        rows.append(("forwards computed", f"{prediction.forward_share:.1%} of the dense run's"))
    for name, size in prediction.carried_bytes.items():
        rows.append((f"{name} state", f"{_bytes(size)}, held from step to step"))
    return rows


def _rows_of_linears(prediction: Prediction) -> list[tuple[str, str]]:
    """Return the table's rows on linear layers in 8 bits: their share of the time, and the weights' memory."""
    linears, share = prediction.linears, prediction.linear_share
    if linears is None:
        return []
    sparse = prediction.factors["attention"]
    time = f"; {linears.kind} on {linears.hardware.name} takes {prediction.linear_time:.2f} of that"
    beside = f", {share * sparse:.1%} beside sparse attention" if sparse != 1 else ""
    return [
        ("linear layers", f"{share:.1%} of the time in 16 bits{beside}{'' if linears.kind == 'weight-only' else time}"),
        (
            "weights",
            f"{_bytes(prediction.weight_bytes)} or more, {_bytes(least_weights(prediction.family))} in 16 bits",
        ),
    ]


def _flops_table(prediction: Prediction) -> Table:
    table = plain_table("FLOPs of the run", "attention", "total", right=("attention", "total"))
    table.add_row("dense", _flops(prediction.attention_flops), _flops(prediction.total_flops))
    if prediction.tiles or prediction.forward_share != 1:
        planned = prediction.planned_attention_flops, prediction.planned_total_flops
        table.add_row(" + ".join(prediction.methods), *map(_flops, planned))
    return table


def _verdict(prediction: Prediction) -> str:
    if prediction.speedup <= 1:
        return f"[bold]predicted speed-up {prediction.speedup:.2f}x[/bold]: no gain at this size"
    steps = f"{prediction.equal_steps:.0f} of {prediction.num_inference_steps}"
    whose = " in 16 bits" if prediction.linear_time != 1 else ""
    verdict = (
        f"[bold]predicted speed-up {prediction.speedup:.2f}x[/bold]; {steps} dense steps{whose} would save as much"
    )
    parts = [f"{factor:.2f} by {FACTORS[name]}" for name, factor in prediction.factors.items() if factor != 1]
    return f"{verdict}\n= {' x '.join(parts)}" if len(parts) > 1 else verdict


def _assumptions(prediction: Prediction) -> str:
    saved = ""
    if prediction.linear_time != 1:
        saved = (
            f" b = {prediction.linear_share:.3f} the linear layers' share of the dense FLOPs; lambda = "
            f"{prediction.linear_time:.3f} their time over that in 16 bits (--linear-cost, and quantising the inputs)."
        )
    whose = "measured by dit-accel doctor" if prediction.cost_measured else "--kernel-cost"
    if prediction.cost_of_pairs == 1:
        whose = "whole rows are left out of the dense call"
    return (
        f"1 / ((1 - a){' - b (1 - lambda)' if saved else ''} + a (w + (1 - w) rho kappa)) with "
        f"a = {prediction.attention_share:.3f} attention's share of the dense FLOPs, taken as its share of the time; "
        f"w = {prediction.dense_share:.3f} share of dense calls; "
        f"rho = {prediction.pair_density:.4f} share of the pairs in a sparse call; "
        f"kappa = {prediction.cost_of_pairs:g} time per kept FLOP over the dense kernel's "
        f"({whose}).{saved}"
    )


def _flops(value: float) -> str:
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P", "E"), "FLOP")


def _bytes(value: float) -> str:
    return _scaled(value, 1024, ("", "Ki", "Mi", "Gi"), "B")


def _scaled(value: Any, step: int, prefixes: tuple[str, ...], unit: str) -> str:
    place = 0
    while value >= step and place < len(prefixes) - 1:
        value, place = value / step, place + 1
    return f"{value:.3g} {prefixes[place]}{unit}"
