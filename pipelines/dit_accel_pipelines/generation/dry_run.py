"""What a run would make, in which memory and time, by its models' configs alone."""

from collections.abc import Sequence
from typing import Any

from dit_accel.adapters.model_files import read_model_files
from dit_accel.cli.console import OUT, TALK, plain_table, print_json
from dit_accel.errors import DitAccelError
from dit_accel.estimate.hardware import card_called
from dit_accel.estimate.prediction import Prediction, estimate
from dit_accel.methods.base import Model
from dit_accel.methods.few_steps import adds_noise
from dit_accel.methods.presets import NONE, preset_methods

from .fit import needs_of, vae_ways
from .loading import device_of
from .request import EMBEDDED, Request


def dry_run(request: Request) -> dict[str, Any]:
    """Return what a resolved request would make, as plain values; of a model of no known sizes without an estimate."""
    names = ("prompt", "seed", "height", "width", "num_frames", "num_inference_steps", "preset")
    made: dict[str, Any] = {"output": str(request.output), "model": request.model or EMBEDDED}
    made |= {name: getattr(request, name) for name in names}
    made["methods"] = [method.name for method in request.methods]
    if (prediction := predicted(request)) is None:
        return {**made, "memory_bytes": None, "state_bytes": None, "speedup": None, "least_seconds": None}
    device, files = device_of(request), read_model_files(request.source, request.revision)
    needs = needs_of(request, files, prediction.family, on_cpu=device.type == "cpu")
    peak = needs.peak(request.offload, "tile" in vae_ways(request.vae))
    made["methods"] = list(prediction.methods)
    card = card_called(device) if device.type == "cuda" else None
    dense = prediction.least_seconds(card) if card else None
    return {
        **made, "memory_bytes": peak + prediction.state_bytes, "state_bytes": prediction.state_bytes,
        "speedup": prediction.speedup_of_methods, "least_seconds": dense and dense / prediction.speedup_of_methods,
        "card": card and card.name, "cost_measured": prediction.cost_measured,
    }  # fmt: skip


def predicted(request: Request) -> Prediction | None:
    """Return what `dit-accel plan` predicts of a resolved request; None for a model of no known sizes."""
    files = read_model_files(request.source, request.revision)
    try:
        adapter, family = files.identify()
    except DitAccelError:
        return None
    model = Model(adapter=adapter, family=family, heads=family.heads, layers=family.layers, config=files.transformer)
    noisy = files.has("scheduler") and adds_noise(files.index["scheduler"][1])
    preset = preset_methods(request.preset or NONE, model, request.methods, noisy=noisy)
    sizes = {name: getattr(request, name) for name in ("height", "width", "num_frames", "num_inference_steps")}
    how = {"linears": request.quantize, "config": files.transformer}
    return estimate(adapter, family, **sizes, **how, methods=request.methods, preset=preset)  # type: ignore[arg-type]


def print_dry_run(requests: Sequence[Request], *, json: bool) -> None:
    """Print what resolved requests would make; nothing is loaded or written."""
    rows = [dry_run(request) for request in requests]
    if json:
        print_json(rows)
        return
    table = plain_table("output", "prompt", "seed", "size", "steps", "methods", right=("seed", "steps"))
    for row in rows:
        sides = f"{row['width'] or '?'} x {row['height'] or '?'}"
        size = sides if row["num_frames"] in (None, 1) else f"{sides}, {row['num_frames']} frames"
        methods = " + ".join(row["methods"]) or "none"
        table.add_row(
            row["output"], row["prompt"], str(row["seed"]), size, str(row["num_inference_steps"] or "?"), methods
        )
    OUT.print(table)
    for text in dict.fromkeys(line for row in rows for line in _words(row).splitlines()):
        OUT.print(text, markup=False, soft_wrap=True)
    if rows[0]["least_seconds"] is not None:
        seconds = sum(row["least_seconds"] or 0 for row in rows)
        OUT.print(f"all {len(rows)}: {seconds:.3g} s or more", markup=False, soft_wrap=True)
    TALK.print("nothing was loaded or written; leave --dry-run out to make it", markup=False, soft_wrap=True)


def _words(row: dict[str, Any]) -> str:
    """Say in which memory and time an output is made, and where the figures are from."""
    if row["memory_bytes"] is None:
        return f"{row['model']} has no sizes that are known here, so neither memory nor time is estimated"
    memory = f"{row['memory_bytes'] / 2**30:.3g} GiB, by an estimate of the weights and the largest activations"
    cost = row["cost_measured"] or "as dit-accel plan estimates, since doctor measured nothing here"
    name = " + ".join(row["methods"])
    speed = f", with {name} {row['speedup']:.2f} times as fast as dense ({cost})" if name else ""
    if row["least_seconds"] is None:
        return f"memory: {memory}\ntime: not known of this device{speed}"
    seconds = f"{row['least_seconds']:.3g} s or more on a {row['card']}, by its data sheet"
    return f"memory: {memory}\ntime of each: {seconds}{speed}"
