"""Requests of the tuners' tests, on one embedded pipeline that is loaded once a process; and one that costs nothing."""

import functools
from collections.abc import Iterator
from typing import Any

import dit_accel_eval.tune.base as base
import pytest
from dit_accel_eval.runs.loaded import TuningRequest, embedded_prompts, tuning_request
from dit_accel_pipelines.generation.generate import run
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.request import Request, resolve
from typer.testing import CliRunner, Result

from dit_accel.cli.app import app

PROMPTS = ("a red circle moving right", "a blue square moving up")
SMALL = ["--model", "wan-plain", "--num-frames", "5", "--height", "16", "--width", "16", "--prompt", PROMPTS[0]]
"""Options of a command that takes little time."""


def request(*methods: Any, prompts: tuple[str, ...] = PROMPTS, **changes: Any) -> TuningRequest:
    """Return a request of few tokens and steps."""
    sizes = dict(model="wan-plain", num_inference_steps=5, num_frames=5, height=16, width=16)
    return tuning_request(prompts=prompts, methods=methods, **{**sizes, **changes})


@functools.cache
def loaded(model: str) -> Any:
    """Return the pipeline of an embedded model, to be left as it is."""
    return load_pipeline(resolve(tuning_request(model=model, prompts=embedded_prompts(model, 1)))[0])


def one_pipeline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Let tuners of embedded models share one pipeline, as a fixture does; gives wan-plain's."""
    pipe = loaded("wan-plain")
    shipped = pipe.scheduler
    real = load_pipeline
    embedded = ("wan-plain", "flux-tiny")
    monkeypatch.setattr(
        base, "load_pipeline", lambda asked: loaded(asked.model) if asked.model in embedded else real(asked)
    )
    yield pipe
    pipe.scheduler = shipped


def conditional_forwards(asked: Request) -> list[dict[str, Any]]:
    """Return of each conditional forward of an untouched run what goes in and comes out, also of its ``blocks``."""
    settled = resolve(asked)[0]
    pipe, seen, blocks = loaded(asked.model or "wan-plain"), [], []

    def ended(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        sigma = float(pipe.scheduler.sigmas[pipe.scheduler.step_index or 0])
        x, v = kwargs["hidden_states"].clone(), output[0].clone()
        seen.append({"x": x, "v": v, "sigma": sigma, "kwargs": kwargs, "blocks": blocks.copy()})
        blocks.clear()

    note = lambda block, args, output: blocks.append((args[0], output))  # noqa: E731
    hooks = [block.register_forward_hook(note) for block in pipe.transformer.blocks]
    hooks.append(pipe.transformer.register_forward_hook(ended, with_kwargs=True))
    run(pipe, settled)
    for hook in hooks:
        hook.remove()
    return seen[::2]


def tune(*arguments: Any) -> Result:
    """Return what `dit-accel tune` says to arguments."""
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])
