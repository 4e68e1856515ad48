"""Runs of stock pipelines for the matrix: rows of a batch, a run's latents, and what is done to a pipeline between."""

import contextlib
import copy
import functools
import inspect
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from matrix_methods import STEPS
from tiny_stock import Call, Stock, latents_of, stock_pipeline
from torch import Tensor


class Stopped(Exception):  # noqa: N818 - reads as what it is
    """What the tests raise in the middle of a run."""


def _another(name: str, value: Any) -> Any:
    """Another prompt's value of an argument of the call: embeddings by the argument's name, all else alike."""
    if not isinstance(value, Tensor) or "prompt" not in name or "mask" in name or not value.is_floating_point():
        return value
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(value.shape, generator=generator, dtype=value.dtype)


def call_of_rows(call: Call, prompts: Sequence[int], negatives: Sequence[int] | None = None) -> Call:
    """Return a call of several prompts out of that of one: 0 is its own prompt, 1 another.

    Args:
        call: the arguments; embeddings, masks and pictures are tensors whose first axis is the prompt, or lists.
        prompts: the prompt of each row.
        negatives: the negative prompt of each row; None: the call's own.
    """
    made = dict(call)
    for name, value in call.items():
        chosen = (negatives or [0] * len(prompts)) if name.startswith("negative") else prompts
        axis = 1 if "llama" in name else 0
        if isinstance(value, Tensor) and "cu_seqlens" in name:
            made[name] = torch.arange(len(prompts) + 1, dtype=value.dtype) * value[-1]
        elif isinstance(value, Tensor) and value.ndim and value.shape[axis] == 1 and not name.startswith("_"):
            made[name] = torch.cat([_another(name, value) if row else value for row in chosen], axis)
        elif isinstance(value, list) and len(value) == 1:
            made[name] = [_another(name, value[0]) if row else value[0] for row in chosen]
        elif isinstance(value, str) and name in ("prompt", "negative_prompt", "task_prompt", "content_prompt"):
            texts = [f"{value[:-1]} {value[-1:]}" if row else value for row in chosen]
            made[name] = texts[0] if len(texts) == 1 else texts
    return made


def rows_call(stock: Stock, call: Call, prompts: Sequence[int], negatives: Sequence[int] | None = None) -> Call:
    """Return the call of several prompts that a class takes."""
    made = call_of_rows(call, prompts, negatives)
    if len(prompts) > 1:
        made |= {name: [call[name]] * len(prompts) for name in stock.repeated}
    return made if stock.rows is None else stock.rows(made, prompts)


def run(pipe: Any, call: Call, seeds: Sequence[int] = (0,)) -> Tensor:
    """Return the latents of a run, a row for each seed."""
    torch.manual_seed(0)  # some encode pictures without the generator
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return latents_of(pipe(**call, generator=generators if len(seeds) > 1 else generators[0])).clone()


def prepared(name: str) -> tuple[Any, Call]:
    """Return a pipeline and a call of one prompt that gives latents after `STEPS` steps."""
    pipe, call = stock_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    if "num_inference_steps" in call:
        call["num_inference_steps"] = STEPS
    for part in getattr(pipe, "components", {}).values():
        if hasattr(part, "encode") and hasattr(part, "decode"):
            _encode_without_noise(part)
    return pipe, call


def widened(pipe: Any, call: Call) -> Call:
    """Turn a pipeline's modules to float64, in place, and return its call with numbers of that type."""
    pipe.to(torch.float64)

    def wide(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(wide(one) for one in value)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: wide(value) for name, value in call.items()}


def _encode_without_noise(vae: Any) -> None:
    """Pictures are encoded alike in a batch and alone: some pipelines draw them without a row's own generator."""
    encode = vae.encode

    @functools.wraps(encode)
    def steady(*args: Any, **kwargs: Any) -> Any:
        out = encode(*args, **kwargs)
        posterior = out[0] if isinstance(out, tuple) else getattr(out, "latent_dist", None)
        if posterior is not None and hasattr(posterior, "mode"):
            posterior.sample = lambda generator=None: posterior.mode()
        return out

    vae.encode = steady


def parameters(pipe: Any) -> Mapping[str, Any]:
    """The arguments that a pipeline's call takes, or a modular pipeline's blocks."""
    if hasattr(pipe, "blocks"):
        return {one.name: one for one in pipe.blocks.inputs if one.name is not None}
    calls = [vars(cls)["__call__"] for cls in type(pipe).__mro__ if "__call__" in vars(cls)]
    named = [inspect.signature(call).parameters for call in calls]
    return next((known for known in named if "num_inference_steps" in known), named[0])


class Step:
    """A scheduler's step with something around it; a copy of the scheduler gets one of its own."""

    def __init__(self, scheduler: Any, around: Callable[[int, Callable[[Any], Any], Any], Any]) -> None:
        self.scheduler = scheduler
        self.around = around
        self.count = 0
        self.__signature__ = inspect.signature(scheduler.step)  # pipelines look which arguments it takes

    def __call__(
        self, model_output: Any = None, timestep: Any = None, sample: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Step from the latents, or from what `around` makes of them."""

        def own(latents: Any) -> Any:
            return type(self.scheduler).step(self.scheduler, model_output, timestep, latents, *args, **kwargs)

        self.count += 1
        return self.around(self.count - 1, own, sample)


@contextlib.contextmanager
def changed_step(pipe: Any, around: Callable[[int, Callable[[Any], Any], Any], Any]) -> Iterator[None]:
    """Call ``around(index, step, latents)`` in place of the scheduler's steps, and those of its copies."""
    scheduler = pipe.scheduler
    scheduler.step = Step(scheduler, around)
    try:
        yield
    finally:
        del scheduler.step


def run_until(pipe: Any, call: Call, at: int, seed: int = 5) -> None:
    """Start a run and leave it by an exception behind a step, of a callback or, where the class has none, in a step."""
    steps = itertools.count()  # the index begins anew in each stage of a pyramid

    def stop(*_: Any) -> Any:
        if next(steps) >= at:
            raise Stopped
        return {}

    def around(index: int, step: Any, latents: Any) -> Any:
        stop()
        return step(latents)

    calls_back = "callback_on_step_end" in parameters(pipe)
    with contextlib.nullcontext() if calls_back else changed_step(pipe, around):
        try:
            run(pipe, {**call, "callback_on_step_end": stop} if calls_back else call, (seed,))
        except Stopped:
            return
    raise AssertionError("neither a callback nor the scheduler was called")


def run_interrupted(pipe: Any, call: Call, at: int, seed: int = 5) -> None:
    """Start a run and interrupt it as diffusers' documentation has it, at a step."""

    def around(index: int, step: Any, latents: Any) -> Any:
        if index >= at:
            pipe._interrupt = True
        return step(latents)

    with changed_step(pipe, around):
        run(pipe, call, (seed,))


def run_in_place(pipe: Any, call: Call) -> Tensor:
    """Run with a scheduler that writes into the latents that it was given."""

    def around(index: int, step: Any, latents: Any) -> Any:
        out = step(latents.clone())
        moved = out[0] if isinstance(out, tuple) else out.prev_sample
        if moved.shape != latents.shape or moved.dtype != latents.dtype:
            return out
        latents.copy_(moved)
        if isinstance(out, tuple):
            return (latents, *out[1:])
        out.prev_sample = latents
        return out

    with changed_step(pipe, around):
        return run(pipe, call)


def twin(pipe: Any) -> Any:
    """Another pipeline around the same transformer, with a scheduler of its own."""
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    return other


def scale_name(stock: Stock, pipe: Any, call: Call) -> str | None:
    """The argument that says how far a class guides by a negative prompt; None: it does not."""
    known = parameters(pipe)
    if stock.scale is not None:
        return stock.scale
    if "true_cfg_scale" in known:
        return "true_cfg_scale" if any(name.startswith("negative") for name in {**known}) else None
    guides = any(name.startswith("negative") for name in (*known, *call))
    return "guidance_scale" if guides and "guidance_scale" in known else None


def with_negative(pipe: Any, call: Call) -> Call:
    """Return the call with a negative prompt, for classes that are called without one."""
    if any(name.startswith("negative") and value is not None for name, value in call.items()):
        return call
    known = parameters(pipe)
    added = {
        f"negative_{name}": torch.randn(value.shape, generator=torch.Generator().manual_seed(3)).to(value.dtype)
        for name, value in call.items()
        if isinstance(value, Tensor) and value.is_floating_point() and f"negative_{name}" in known
    }
    scale = {"true_cfg_scale": 2.0} if "true_cfg_scale" in known and added else {}
    return {**call, **added, **scale}


@contextlib.contextmanager
def scaled(stock: Stock, pipe: Any, call: Call, scale: float | None) -> Iterator[Call]:
    """Yield a call guided by another scale; None: not guided at all."""
    guider = getattr(pipe, "guider", None)  # it guides in place of the pipeline's arguments
    if guider is None:
        name = scale_name(stock, pipe, call)
        yield call if name is None else {**call, name: stock.off if scale is None else scale}
        return
    before = copy.copy(guider.__dict__)
    if scale is None:
        guider.disable()
    else:
        guider.guidance_scale = scale
    try:
        yield call
    finally:
        guider.__dict__.clear()
        guider.__dict__.update(before)


def _without_negative(pipe: Any, rows: int, off: float) -> Callable[..., Any]:
    """diffusers' documented callback that ends guidance: it keeps the rows of the prompt alone."""

    def end(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if index != STEPS // 2 - 1:
            return tensors
        pipe._guidance_scale = off
        return {
            name: value[rows:] if isinstance(value, Tensor) and len(value) == 2 * rows and name != "latents" else value
            for name, value in tensors.items()
        }

    return end


@contextlib.contextmanager
def ending(stock: Stock, pipe: Any, call: Call, rows: int) -> Iterator[Call]:
    """Yield a call whose guidance ends in the middle of the run."""
    guider = getattr(pipe, "guider", None)  # it guides in place of the pipeline's arguments
    if guider is not None:
        before, guider._stop = guider._stop, 0.5
        try:
            yield call
        finally:
            guider._stop = before
    elif "callback_on_step_end" in parameters(pipe):
        hidden = ("negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_prompt_embeds_mask")
        names = [name for name in pipe._callback_tensor_inputs if name not in hidden]
        callback = _without_negative(pipe, rows, stock.off)
        yield {**call, "callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    else:

        def around(index: int, step: Any, latents: Any) -> Any:
            if index == STEPS // 2 - 1:
                pipe._guidance_scale = stock.off
            return step(latents)

        with changed_step(pipe, around):
            yield call
