"""Tunes LiteAttention: thresholds by layer and step for a target error, found on a model's own generations.

Source: the calibration of LiteAttention (arXiv 2511.11062): at every attention call, on its own queries, keys and
values, a threshold's votes, used on the same inputs, may change the output by a target error. Where we depart from it:
the highest threshold found within the target is taken, and if there is none between the limits, nothing is dropped;
branches are tuned separately, and several prompts count.
"""

import contextlib
import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dit_accel_kernels import Selection, block_sparse_attention_eager, count_bits
from dit_accel_pipelines.generation.progress import Stages
from torch import Tensor

from dit_accel import ConfigError, LiteAttention
from dit_accel.methods.attention.lite.handler import LiteHandler
from dit_accel.methods.attention.lite.thresholds import LiteThresholds, write_thresholds
from dit_accel.methods.base import Model
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext, Key
from dit_accel.plan.exact_rows import dense_rows
from dit_accel.plan.plan import AttentionPlan, KernelResult

from ..metrics.pixels import psnr
from ..runs.loaded import TuningRequest
from .base import Tuned, TuningRun, replaced_method

LOWEST, HIGHEST = -20.0, -(2.0**-6)  # Log2 levels between which thresholds are searched
START = -10.0  # where a search begins without a hint: the published threshold
FIRST_STRIDE = 0.5
NEAR = 0.9  # share of the target error at which a search is over
CLOSE = 0.03125  # Log2 units at which a search is over: tiles are whole, so not every error can be met
FAINTEST = -40.0  # Log2 of a share of the mass that drops next to nothing
Found = dict[str, Any]
"""What was found for one attention call: ``transformer``, ``branch``, ``layer``, ``step``, all as its context has them;
``threshold``, for `LiteAttention`; ``kept``, the share of the tiles that the next call keeps; ``added``, the error that
the votes would add to this call; ``dense``, the error of this call to dense attention on the same inputs."""

NOTHING_VOTES = (
    "tune lite has nothing to tune, got num_inference_steps = {steps}: each step is dense by lite's dense_ options, or "
    "is the last, whose votes no later step follows; ask for more steps, or fewer dense ones: --set lite.dense_steps=0"
)


def tune_lite(
    request: TuningRequest, output: Path, *, target_error: float = 0.01, stages: Stages | None = None
) -> Tuned:
    """Tune on every prompt of a request, which may hold a `LiteAttention` without thresholds; write their TOML file.

    One vote may add a relative L1 error of ``target_error`` to the next call. Found are of each of the ``steps`` the
    median threshold and the means of `Found`'s figures, and each prompt's PSNR to its dense run.
    """
    config, rest = replaced_method(request, LiteAttention)
    for name in ("threshold", "target_density", "thresholds_file"):
        if (value := getattr(config, name)) is not None:
            raise ConfigError(f"tune lite finds the thresholds itself, got lite.{name} = {value!r}; leave it out")
    if config.criterion == "budget":
        raise ConfigError("tune lite tunes lite.criterion 'maxgap' or 'mass', got 'budget', bounded by itself; use one")
    if not 0 < target_error < 1:
        raise ConfigError(f"target_error must be between 0 and 1, got {target_error}; 0.01 is usual")
    request = dataclasses.replace(request, methods=(config, *rest))
    runs = TuningRun(request, output, ".toml", stages, target_error=target_error)
    steps = runs.request.num_inference_steps
    with runs.attached() as attachment:
        layers = dict(Counter(layer.state.name for layer in attachment.engine.layers))
        lite = _handler(attachment)
    if steps is not None and lite.settings.dense_above_sigma is None:  # noise levels are known only while it runs
        dense = lite.settings.is_dense  # the last step's votes aren't read
        every = range(max(layers.values()))
        if all(sum(not dense(step, steps, layer) for step in range(steps)) < 2 for layer in every):
            raise ConfigError(NOTHING_VOTES.format(steps=steps))

    def tuned_beside_dense(prompt: str) -> dict[str, Any]:
        dense = runs.run(prompt)
        with tuning(runs, target_error) as (attachment, tuner):
            tuned = runs.run(prompt, attachment)
        ran = len(tuned.timings.steps)
        if not tuner.found:
            raise ConfigError(NOTHING_VOTES.format(steps=ran))
        frames, reference = (np.divide(run.frames, 255, dtype=np.float32) for run in (tuned, dense))
        return {"prompt": prompt, "psnr": psnr(frames, reference), "calls": tuner.found, "steps": ran}

    parts = runs.over_prompts(tuned_beside_dense)
    steps = parts[-1]["steps"]
    calls = [call for part in parts for call in part["calls"]]
    table = combine(calls, layers, steps, lite.model.name, config.criterion, target_error)
    write_thresholds(output, table)
    runs.finish()
    by_step = _by_step(calls, table)
    about = {name: getattr(table, name) for name in ("model", "criterion", "num_inference_steps", "target_error")}
    return Tuned(
        found={**about, "steps": by_step, "prompts": [{key: run[key] for key in ("prompt", "psnr")} for run in parts]},
        columns=("step", "threshold", "tiles kept", "error added", "error to dense"),
        rows=[
            (str(row["step"]), f"{row['threshold']:.2f}", f"{row['kept']:.3f}", f"{row['added']:.4f}",
             f"{row['dense']:.4f}") for row in by_step
        ],
        remarks=[f"{part['psnr']:.1f} dB to the dense run: {part['prompt']}" for part in parts],
    )  # fmt: skip


def combine(
    calls: Sequence[Found], layers: Mapping[str, int], steps: int, model: str, criterion: Any, target_error: float
) -> LiteThresholds:
    """Return for each layer and step the lowest threshold that any prompt or branch needs, else one for nothing."""
    nothing = threshold_of(criterion, -math.inf)
    lowest: dict[tuple[str, int, int], float] = {}
    for call in calls:
        key = call["transformer"], call["layer"], call["step"]
        lowest[key] = min(call["threshold"], lowest.get(key, call["threshold"]))
    tables = {
        name: tuple(tuple(lowest.get((name, layer, step), nothing) for step in range(steps)) for layer in range(count))
        for name, count in layers.items()
    }
    return LiteThresholds(
        model=model, criterion=criterion, num_inference_steps=steps, thresholds=tables, target_error=target_error
    )


def _by_step(calls: Sequence[Found], table: LiteThresholds) -> list[dict[str, Any]]:
    """Return one row for each step that voted, over all layers, branches and prompts."""
    rows = []
    for step in sorted({call["step"] for call in calls}):
        now = [call for call in calls if call["step"] == step]
        written = {(c["transformer"], c["layer"]): table.at(c["transformer"], c["layer"], step) for c in now}
        means = {name: statistics.fmean(call[name] for call in now) for name in ("kept", "added", "dense")}
        rows.append({"step": step, "threshold": statistics.median(written.values()), **means})
    return rows


def _handler(attachment: Any) -> LiteHandler:
    (lite,) = (handler for handler in attachment.engine.handlers if isinstance(handler, LiteHandler))
    return lite


@contextlib.contextmanager
def tuning(runs: TuningRun, target_error: float) -> Iterator["tuple[Any, Tuner]"]:
    """Attach the request's methods with a `Tuner` in LiteAttention's place."""
    with runs.attached() as attachment:
        execution, lite = attachment.engine, _handler(attachment)
        tuner = Tuner(runs.request.methods[0], lite.model, target_error)  # type: ignore[arg-type]
        handlers = [tuner if handler is lite else handler for handler in execution.handlers]
        for handler in handlers:  # who works with LiteAttention works with the tuner
            handler.check_with([other for other in handlers if other is not handler])
        execution.use(handlers)
        yield attachment, tuner


def error_of(out: Tensor, reference: Tensor) -> float:
    """Return the relative L1 error of a call's output against another, over the whole tensor."""
    out, reference = out.float(), reference.float()
    return float((out - reference).abs().sum() / reference.abs().sum().clamp(min=1e-30))


class Rerun:
    """One attention call, run again with other votes and other bits."""

    def __init__(self, plan: AttentionPlan, call: Call, out: Tensor) -> None:
        assert plan.selection is not None
        assert plan.selection.vote is not None
        self.plan, self.call, self.out = plan, call, out
        self.selection = plan.selection
        self.vote = plan.selection.vote

    def votes(self, level: float) -> Tensor:
        """Return the bits that votes at a log2 level keep."""
        vote = dataclasses.replace(self.vote, threshold=threshold_of(self.vote.criterion, level))
        return self._attend(dataclasses.replace(self.selection, vote=vote))[2]

    def after(self, bits: Tensor | None) -> tuple[float, float]:
        """Return the error that bits add to this call, and the share of the tiles that they leave exact."""
        selection = dataclasses.replace(self.selection, keep=bits, vote=None, reverse=not self.selection.reverse)
        out, exact = self._attend(selection)
        tiles = self.plan.tiles
        assert tiles is not None
        share = float(count_bits(exact).sum()) / (exact[..., 0].numel() * tiles.key_tiles)
        return error_of(out, self.out), share

    def _attend(self, selection: Selection) -> tuple[Tensor, ...]:
        plan, call = self.plan, self.call
        assert plan.tiles is not None
        q, k, v = call.as_held(call.q, call.k, call.v)
        result = block_sparse_attention_eager(
            q, k, v, plan.tiles, **call.kernel_layout, scale=call.scale, head_scale=plan.head_scale,
            key_mask=call.key_mask(), frame_decay=plan.frame_decay, token_order=plan.token_order,
            identity_mix=plan.identity_mix, identity_rows=plan.identity_rows, selection=selection, return_tiles=True,
            backend=call.backend,
        )  # fmt: skip
        assert isinstance(result, tuple)
        return call.heads_first(result[0]), *result[1:]


def threshold_of(criterion: str, level: float) -> float:
    """Return the threshold of a log2 level; -inf gives one that drops nothing."""
    if criterion == "maxgap":
        return level
    return 2.0 ** max(level, FAINTEST)


class Tuner(LiteHandler):
    """LiteAttention that searches the threshold of every vote on the tensors at hand and follows it."""

    def __init__(self, config: LiteAttention, model: Model, target_error: float) -> None:
        super().__init__(config, model)
        self.target_error = target_error
        self.found: list[Found] = []
        self._levels: dict[Key, float] = {}

    def after(self, plan: AttentionPlan, call: Call, context: CallContext, result: KernelResult) -> KernelResult:
        """Search the threshold on this call's tensors and learn its votes; the plan's own were cast before."""
        if plan.selection is None or plan.selection.vote is None:
            return result
        again = Rerun(plan, call, result.out)
        level = search_level(
            lambda level: again.after(again.votes(level))[0], self.target_error, self._levels.get(context.key, START)
        )
        self._levels[context.key] = level
        bits = plan.selection.keep
        if level > -math.inf:
            bits = again.votes(level)
            super().after(plan, call, context, result._replace(kept=bits))
        added, share = again.after(bits)
        dense = dense_rows(plan, call, torch.arange(call.q.shape[2], device=result.out.device))
        self.found.append({
            "transformer": context.transformer, "branch": context.branch, "layer": context.layer,
            "step": context.step_index, "threshold": threshold_of(again.vote.criterion, level), "kept": share,
            "added": added, "dense": error_of(result.out, dense),
        })  # fmt: skip
        return result


def search_level(error_at: Callable[[float], float], target: float, start: float = START) -> float:
    """Return the highest log2 level found whose error is within the target; -inf where even `LOWEST` exceeds it."""
    low, high, stride = -math.inf, math.inf, FIRST_STRIDE
    level = min(max(start, LOWEST), HIGHEST)
    while high - low >= CLOSE:
        error = error_at(level)
        if error <= target:
            low = level
            if error >= NEAR * target or level == HIGHEST:
                break
        else:
            high = level
            if level == LOWEST:
                break
        if math.isinf(high - low):  # not between two levels yet: go on in longer and longer strides
            level = min(low + stride, HIGHEST) if low > -math.inf else max(high - stride, LOWEST)
            stride *= 2
        else:
            level = (low + high) / 2
    return low
