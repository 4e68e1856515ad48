"""Measures what a perturbed branch costs: `python eval/studies/guidance_cost.py`.

Runs of one embedded model take turns; processor time on one thread is compared, so that other work on the machine does
not count. A full third branch is held against one that begins at the first perturbed block, over that block, and the
free mode and NAG against the same run without them.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from dit_accel_eval.bench.loop import in_turn
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.results import Line
from study import about, study
from study import seconds_of as processor_seconds

from dit_accel import NAG, PAG, attach
from dit_accel.methods.config import MethodConfig

GUIDED = {"wan-plain": {"guidance_scale": 3.0}, "flux-tiny": {"true_cfg_scale": 3.0}}
ALONE = {"wan-plain": {"guidance_scale": 1.0}, "flux-tiny": {"true_cfg_scale": 1.0}}
LAYERS = {"wan-plain": (0, 1, 2, 3, 4, 5), "flux-tiny": (0, 2, 4, 6, 8, 10)}
NEGATIVE = NAG(negative_prompt="")

Arm = tuple[Mapping[str, Any], tuple[MethodConfig, ...]]


def arms_of(model: str) -> dict[str, Arm]:
    """Return name -> call and methods; those named ``plain`` are what the others are held against."""
    guided, alone = GUIDED[model], ALONE[model]
    arms: dict[str, Arm] = {
        "plain, guided": (guided, ()),
        "plain, alone": (alone, ()),
        "free mode": (guided, (PAG(layers="L1", mode="free"),)),
        "nag": (alone, (NEGATIVE,)),
    }
    for layer in LAYERS[model]:
        for shared in (True, False):
            kind = "shared" if shared else "full"
            arms[f"{kind} {layer}"] = (guided, (PAG(layers=f"L{layer}", share_prefix=shared),))
    return arms


def main(arguments: Sequence[str] | None = None) -> int:
    """Run so many more rounds of all arms, append one JSON line each, and print the table; returns the exit code."""
    models = {"nargs": "+", "default": sorted(GUIDED), "choices": sorted(GUIDED)}
    return study(
        __doc__, arguments, measure, table, out="guidance-cost.jsonl", resumes=True, models=models, rounds=7, steps=4
    )


def measure(options: Any, lines: list[Line]) -> Iterator[Line]:
    """Give the seconds of every arm, round by round; a round that was stopped is left out."""
    for model in options.models:
        loaded = EmbeddedModel(model, {})
        arms = {name: partial(seconds_of, loaded, options.steps, *arm) for name, arm in arms_of(model).items()}
        for seconds in in_turn(arms, options.rounds):
            yield {"model": model, "steps": options.steps, **about(), "seconds": seconds}


def seconds_of(loaded: EmbeddedModel, steps: int, call: Mapping[str, Any], methods: Sequence[MethodConfig]) -> float:
    """Return the processor seconds of a run up to its latents; attaching is no part of it."""
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": steps, "generator": generator, "output_type": "latent"}
    with attach(loaded.pipe, *methods, preset="none") if methods else contextlib.nullcontext():
        return processor_seconds(lambda: loaded.pipe(loaded.prompt(0), **{**loaded.call, **call}, **options))


def table(lines: Sequence[Line]) -> str:
    """Return the Markdown tables of all models."""
    return "\n".join(_rows(lines))


def _rows(lines: Sequence[Line]) -> Iterator[str]:
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        first, blocks = own[0], len(LAYERS[model])
        yield (
            f"{model}, {first['steps']} steps, {len(own)} rounds, {first['threads']} thread, {first['processor']}: "
            "median [quartiles] over the rounds of processor time added to the same run without, as a share of it "
            "(guided: two forwards a step, so that a third one is 50 %)."
        )
        yield ""
        yield "| first perturbed block | " + " | ".join(str(layer) for layer in LAYERS[model]) + " |"
        yield "|---" * (blocks + 1) + "|"
        for kind, text in (("full", "a whole third forward"), ("shared", "begun at that block")):
            cells = [_added(own, f"{kind} {layer}", "plain, guided") for layer in LAYERS[model]]
            yield f"| {text} | {' | '.join(cells)} |"
        yield ""
        yield (
            f"Free mode adds {_added(own, 'free mode', 'plain, guided')}; `NAG`, to a run without guidance, "
            f"{_added(own, 'nag', 'plain, alone')}."
        )
        yield ""


def _added(lines: Sequence[Line], arm: str, plain: str) -> str:
    shares = [100 * (line["seconds"][arm] / line["seconds"][plain] - 1) for line in lines]
    low, middle, high = np.quantile(shares, (0.25, 0.5, 0.75))
    return f"{middle:.1f} % [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    raise SystemExit(main())
