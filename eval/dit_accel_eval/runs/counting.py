"""Counts the work of a run: the blocks and attention calls that really ran, in steps of the dense model.

The counters lie inside everything that may skip a call (step caches, diffusers' hooks), so that what is skipped is not
counted, whoever skips it.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dit_accel import Report
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.adapters.block_lists import block_lists, blocks_of
from dit_accel.estimate.prediction import Prediction, estimate
from dit_accel.methods.config import MethodConfig
from dit_accel.methods.find import attention_modules

REAL_SHARE = 0.72  # self-attention's share of the FLOPs of a real model: Wan 2.1 14B at 720 x 1280 and 81 frames


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Calls of blocks and of their self-attention that ran, one per batch row."""

    blocks: float
    attention: float

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(blocks=self.blocks + other.blocks, attention=self.attention + other.attention)

    def __truediv__(self, steps: int) -> "Counts":
        return Counts(blocks=self.blocks / steps, attention=self.attention / steps)


class Counter:
    """Counts the calls of transformers' blocks and self-attention from now on, in place of their ``forward``."""

    def __init__(
        self, transformers: Sequence[nn.Module], adapter: Adapter, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._ran, self._now = {"blocks": 0, "attention": 0}, now
        self.seconds: dict[str, list[float]] = {kind: [] for kind in self._ran}
        for transformer in transformers:
            for listed in block_lists(adapter, transformer):
                for _, block in blocks_of(listed, adapter, transformer):
                    self._watch(block, "blocks")
            for _, module, _ in attention_modules(transformer, adapter):
                self._watch(module, "attention")

    def take(self) -> Counts:
        """Return what ran since the last call of this, and begin anew."""
        counts = Counts(**self._ran)
        self._ran.update(blocks=0, attention=0)
        self.seconds = {kind: [] for kind in self._ran}
        return counts

    def _watch(self, module: nn.Module, kind: str) -> None:
        forward = module.forward

        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            values = (*args, *kwargs.values())
            self._ran[kind] += next(len(value) for value in values if isinstance(value, torch.Tensor))
            started = self._now()
            out = forward(*args, **kwargs)
            self.seconds[kind].append(self._now() - started)
            return out

        module.forward = counted


def run_estimate(
    adapter: Adapter, family: Family, call: Mapping[str, Any], methods: Sequence[MethodConfig] = ()
) -> Prediction:
    """Return what `dit-accel plan` says of a run at the size of a call."""
    sizes: dict[str, Any] = {name: call[name] for name in ("height", "width", "num_frames") if name in call}
    return estimate(adapter, family, methods=methods, **sizes)


def attended_share(
    report: Report | None, adapter: Adapter, family: Family, call: Mapping[str, Any], methods: Sequence[MethodConfig]
) -> tuple[float, dict[int, float]]:
    """Return the share of the query-key pairs that a run's attention calls computed, 1 for dense, and the same by step.

    A pooled tile is one key; probe rows come on top; voting and choosing tiles are not counted.
    """
    if report is None or report.sparse_density is None:
        return 1.0, {}
    sizes = [options["block_size"] for options in report.methods.values() if options.get("block_size")]
    tile = min(sizes, default=1)  # without tiles nothing is pooled
    probes = sum(saving.exact_rows for saving in run_estimate(adapter, family, call, methods).savings.values())
    by_step: dict[int, list[tuple[int, float]]] = {}
    for step in report.steps:
        if calls := step.dense_layers + step.sparse_layers:
            computed = step.dense_layers + step.sparse_layers * (step.density + step.pooled / tile + probes)
            by_step.setdefault(step.step_index, []).append((calls, computed))
    share = lambda pairs: sum(computed for _, computed in pairs) / sum(calls for calls, _ in pairs)  # noqa: E731
    every = [pairs for step in by_step.values() for pairs in step]
    return share(every), {step: share(pairs) for step, pairs in by_step.items()}


def density_map(report: Report | None, steps: int) -> tuple[tuple[float | None, ...], ...]:
    """Return by step and layer the exact share of a run's tiles, mean over branches; None where no call had a plan."""
    if report is None or not report.calls:
        return ()
    densities: dict[tuple[int, int], list[float]] = {}
    for call in report.calls:
        densities.setdefault((call.step_index, call.layer), []).append(call.density)
    layers = 1 + max(layer for _, layer in densities)
    means = {key: sum(shares) / len(shares) for key, shares in densities.items()}
    return tuple(tuple(means.get((step, layer)) for layer in range(layers)) for step in range(steps))


def work(counts: Counts, dense_step: Counts, attended: float, share: float) -> float:
    """Return a run's work in steps of the dense model, of which self-attention has a share."""
    attention = attended * counts.attention / dense_step.attention
    return share * attention + (1 - share) * counts.blocks / dense_step.blocks


def works(counts: Counts, dense_step: Counts, attended: float, own_share: float) -> dict[str, float]:
    """Return what a line says of a run's `work`: at its model's own share of self-attention, and at `REAL_SHARE`."""
    shares = {"work": own_share, "work_real": REAL_SHARE}
    return {key: round(work(counts, dense_step, attended, share), 6) for key, share in shares.items()}
