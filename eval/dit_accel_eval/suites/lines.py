"""The typed line of a suite's results: what one arm's run of one clip measured and cost."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dit_accel_pipelines.generation.solvers import BEST

from dit_accel import ConfigError

from ..runs.results import read_lines

TUNED = "dense"
"""Name of the best dense runs of a ladder of rivals, with their steps behind; see `ladder`."""

AGREE = 45.0
"""PSNR in dB of N and 2 N steps at which the run of 2 N steps counts as converged."""

ITSELF = 120.0
"""The agreement in dB of a reference for which nothing was searched: `psnr` of a clip with itself."""

WORKS = {"work": "own work", "work_real": "work at a = .72"}
"""Key of a line -> in words, by which arms and dense runs are made equal; timed lines add ``steps_in_time``."""

TIMED = {"steps_in_time": "time"}


@dataclass(frozen=True, kw_only=True)
class ResultLine:
    """One arm's run of one clip; a number that was not measured is None, or not a number for PSNR and work.

    Attributes:
        raw: every key as the file holds it, also those that are only shown.
        work: in steps of the dense model; ``work_real`` at a real model's share of attention.
        seconds: of the denoising loop where timed, beside ``dense_seconds`` of the dense run of as many steps.
        metrics: metric -> its value; ``skipped`` and ``unavailable`` say why others have none.
        reference_confirmed: ``steps`` and ``agreement`` of a run of more steps that confirmed the reference.
        kept: path of the frames, from the file's folder.
    """

    arm: str
    clip: int
    num_inference_steps: int
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)
    psnr: float = math.nan
    work: float = math.nan
    work_real: float | None = None
    steps_in_time: float | None = None
    ssim: float | None = None
    score: float | None = None
    seconds: float | None = None
    dense_seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)
    times: Mapping[str, Any] = field(default_factory=dict)
    step_work: Sequence[float] = ()
    peak_memory_bytes: Mapping[str, int] = field(default_factory=dict)
    repeated: Mapping[str, Any] = field(default_factory=dict)
    prompt: str = ""
    model: str = ""
    reference: str = ""
    reference_steps: int = 0
    reference_agreement: float = ITSELF
    reference_confirmed: Mapping[str, Any] = field(default_factory=dict)
    solver: str = ""
    flow_shift: float | None = None
    methods: Mapping[str, Any] = field(default_factory=dict)
    rival: Mapping[str, Any] = field(default_factory=dict)
    attended: float = 1.0
    forwards: float | None = None
    kept: str | None = None
    kept_reference: str | None = None

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "ResultLine":
        """Return the line of a JSON object; `ConfigError` for one that names no run."""
        missing = [name for name in ("arm", "clip", "num_inference_steps") if name not in raw]
        if missing:
            raise ConfigError(f"{str(raw)[:60]} is no suite's result, it lacks {', '.join(missing)}; name another file")
        return cls(raw=raw, **{name: raw[name] for name in _FIELDS if name in raw})

    @property
    def key(self) -> tuple[str, int]:
        """The arm and the clip, of which a file's last line counts."""
        return self.arm, self.clip

    @cached_property
    def is_rival(self) -> bool:
        """Whether this is a dense run that others are compared with; these alone are named by their steps."""
        return self.arm in (f"{kind} {self.num_inference_steps}" for kind in (BEST, TUNED))

    @cached_property
    def is_converged(self) -> bool:
        """Whether the reference agrees with the run of half its steps, or of twice as many."""
        return max(self.reference_agreement, self.reference_confirmed.get("agreement", -math.inf)) >= AGREE

    @cached_property
    def rival_steps(self) -> set[int]:
        """The steps of the dense runs between which the line lies: below and above its work and time."""
        amounts = [amount for key in (*WORKS, *TIMED) if (amount := self.amount(key)) is not None]
        return {max(1, round_(amount)) for amount in amounts for round_ in (math.floor, math.ceil)}

    def amount(self, key: str) -> float | None:
        """Return the number of a field, None where it was not measured."""
        value = getattr(self, key)
        return None if value is None or math.isnan(value) else value

    def value(self, metric: str) -> float | None:
        """Return the value of a metric, None where there is none."""
        return self.amount(metric) if metric in ("psnr", "ssim", "score") else self.metrics.get(metric)


_FIELDS = tuple(name for name in ResultLine.__dataclass_fields__ if name != "raw")


def result_lines(path: Path) -> list[ResultLine]:
    """Return the lines of a results file, see `read_lines`."""
    return [ResultLine.of(raw) for raw in read_lines(path)]


def last_lines(lines: Iterable[ResultLine]) -> dict[tuple[str, int], ResultLine]:
    """Return (arm, clip) -> its last line."""
    return {line.key: line for line in lines}
