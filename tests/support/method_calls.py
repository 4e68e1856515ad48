"""Records which kinds of attention calls the methods make on tiny models.

`python tests/support/method_calls.py` writes kernels/bench/calls.json: each kind of call, as `kernels/bench/calls.py`
names it, with the methods that make it. What the compile table and the GPU checks cover follows from that file.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import tiny_models
import torch
from dit_accel_kernels import api
from dit_accel_kernels.problem import Problem
from dit_accel_kernels.selection import Selection
from dit_accel_pipelines import ADAPTERS
from method_table import TABLE

from dit_accel import attach
from dit_accel.testing.method_cases import configs_of
from dit_accel.testing.tiny_models import Case, TinyModel

CALLS = Path(__file__).parents[2] / "kernels" / "bench" / "calls.json"
ROWS = (
    "radial", "radial, pooled rest", "radial, tiles", "lite", "lite, by mass", "lite, by budget", "lite, pooled rest",
    "sparsed", "sparsed, pooled rest", "delta", "sol", "ultravico",
)  # fmt: skip
SETTINGS = {row: configs_of(TABLE[row].active) for row in ROWS}
TOGETHER = (
    ("radial", "lite"), ("radial", "ultravico"), ("lite", "ultravico"), ("sol", "ultravico"), ("radial, tiles", "lite"),
    ("radial, tiles", "ultravico"),
)  # fmt: skip
TRAINED = ("radial", "radial, pooled rest", "radial, tiles", "sparsed", "sol", "ultravico")


def kind_of(call: Problem, *, backward: bool) -> str:
    """A call's features that launches depend on, joined by +; "plain" for none."""
    k, v, selection = call.k, call.v, call.selection or Selection()
    threshold = None if selection.routing is None else selection.routing.threshold
    criterion = None if selection.vote is None else selection.vote.criterion
    masked = call.key_length is not None or call.key_mask is not None
    words = {
        "fused": k.shape == v.shape and k.stride() != v.stride(),
        "pooled": call.pooled_indices is not None,
        "mask": masked,
        "decay": call.decay is not None,
        "scale": call.head_scale is not None,
        "order": call.token_order is not None,
        "keep": selection.keep is not None,
        "rest": selection.keep is not None and selection.rest == "pooled",
        "pinned": selection.pinned is not None,
        "route": threshold == "diag",
        "route-exact": threshold == "exact",
        "routed": selection.routed is not None,
        **{name: criterion == name for name in ("maxgap", "mass", "budget")},
        "backward": backward,
    }
    return "+".join(word for word, there in words.items() if there) or "plain"


@contextmanager
def recording(found: dict[str, set[str]], name: str) -> Iterator[None]:
    """Add the kinds of all calls within to `found`, as calls of `name`."""
    forward, backward = api._run, api._gradients

    def run_forward(problem):
        found[kind_of(problem, backward=False)].add(name)
        return forward(problem)

    def run_backward(problem, *gradients):
        found[kind_of(problem, backward=True)].add(name)
        return backward(problem, *gradients)

    with mock.patch.object(api, "_run", run_forward), mock.patch.object(api, "_gradients", run_backward):
        yield


def models() -> Iterator[tuple[Case, dict[str, tuple]]]:
    """Tiny models and what to attach: without text among its tokens, with padded text, with fused projections."""
    everything = {name: SETTINGS[name] for name in SETTINGS}
    everything |= {" + ".join(names): sum((SETTINGS[name] for name in names), ()) for names in TOGETHER}
    for model, runs in ((tiny_models.WAN[0], everything), (tiny_models.HUNYUAN[0], everything)):
        yield case_of(model), runs
    case = case_of(tiny_models.WAN[0])
    for module in case.transformer.modules():
        if hasattr(module, "fuse_projections"):
            module.fuse_projections()
    yield case, {"radial": SETTINGS["radial"]}


def case_of(model: TinyModel) -> Case:
    """A tiny model with the adapter that covers it."""
    return Case(next(one for one in ADAPTERS if model.transformer.__name__ in one.transformers), model)


def recorded() -> dict[str, list[str]]:
    """Kinds of calls -> the settings that make them, by running all of them on tiny models."""
    found: dict[str, set[str]] = defaultdict(set)
    for case, runs in models():
        inputs = case.inputs(1)
        for name, configs in runs.items():
            with attach(case.transformer, *configs, preset="none", backend="torch"), recording(found, name):
                for step in range(3):
                    case.run(inputs, step)
                if name in TRAINED:
                    train(case, inputs)
    return {kind: sorted(names) for kind, names in sorted(found.items())}


def train(case: Case, inputs: dict) -> None:
    """One forward and backward, as fine-tuning makes it."""
    with torch.enable_grad():
        out = case.transformer(**inputs, return_dict=False)[0]
        out.float().square().mean().backward()


if __name__ == "__main__":
    CALLS.write_text(json.dumps(recorded(), indent=1) + "\n")
