"""The registry of metrics, by entry point; measures a sample by names, and whether it moves as its reference does."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import entry_points

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from .metric import FAMILY, Measured, Metric, NotMeasured, Sample

METRIC_GROUP = "dit_accel.metrics"
FLOOR = "encoding-alone"  # of clips encoded with loss: PSNR of the reference to itself, encoded as they are


@cache
def metrics() -> dict[str, Metric]:
    """Return every metric by its name; an entry point of ``dit_accel.metrics`` gives one, or several."""
    known: dict[str, Metric] = {}
    for entry in entry_points(group=METRIC_GROUP):
        try:
            loaded = entry.load()
        except (AttributeError, ImportError) as error:
            raise ConfigError(
                f"the entry point {entry.name} = {entry.value!r} of {METRIC_GROUP} can't be loaded: {error}"
            ) from error
        for item in (loaded,) if isinstance(loaded, Metric) else loaded:
            if not isinstance(item, Metric):
                raise ConfigError(f"the entry point {entry.name} of {METRIC_GROUP} must give metrics, got {item!r}")
            if item.name in known:
                raise ConfigError(f"a metric {item.name!r} is registered twice, last by {entry.value}; uninstall one")
            known[item.name] = item
    return known


def metric(name: str) -> Metric:
    """Return one metric by name; an unknown one is refused with the nearest, and so is the model that it names."""
    known, (family, model) = metrics(), _family(name)
    if family is not None and family.of is not None:
        return family.of(model)
    if name not in known:
        hint = did_you_mean(name, known).replace("dit-accel models", "dit-accel eval metrics")
        raise ConfigError(f"there is no metric {name!r}; {hint}")
    return known[name]


def metric_about(name: str) -> Metric | None:
    """Return a metric to read its words, sense and decimals of, whether or not it can be had here; None: unknown."""
    if name == FLOOR:
        return replace(metrics()["psnr"], name=FLOOR, words="PSNR of the encoding alone, dB", better="neither")
    family, model = _family(name)
    return replace(family, name=name, words=f"{family.words}, {model}") if family else metrics().get(name)


def decimals_of(name: str) -> int:
    """Return how many digits behind the point a metric is shown with; 3 for one that is not installed."""
    return about.decimals if (about := metric_about(name)) else 3


def _family(name: str) -> tuple[Metric | None, str]:
    """Return the family that a name belongs to, None if to none, and the model that it names."""
    first, _, model = name.partition(":")
    return metrics().get(first + FAMILY), model


def unavailable(names: Iterable[str]) -> dict[str, str]:
    """Return why metrics can't be measured here, by name, of those that can't."""
    reasons = ((name, metric(name).missing()) for name in names)
    return {name: reason for name, reason in reasons if reason is not None}


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return names of metrics as given; refuses unknown ones, and ones given twice."""
    for name in names:
        metric(name)
        if names.count(name) > 1:
            raise ConfigError(f"metric {name!r} is named twice; leave one out")
    return tuple(names)


@dataclass(frozen=True, slots=True)
class Scores:
    """Metric -> its value of a sample, why it says nothing about that, or why it can't be measured here."""

    measured: dict[str, Measured] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Return metric -> its value."""
        return {name: result.value for name, result in self.measured.items()}


def scores(names: Iterable[str], sample: Sample) -> Scores:
    """Measure a sample; a metric that can't be measured is left out, with its reason."""
    results = Scores()
    for name in names:
        reason = metric(name).missing()
        if reason is not None:
            results.unavailable[name] = reason
            continue
        try:
            results.measured[name] = metric(name)(sample)
        except NotMeasured as reason:
            results.skipped[name] = str(reason)
    return results


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """A metric of motion in the words of tables, and what a clip does that lies above or below its reference."""

    head: str
    above: str
    below: str


DYNAMICS = {
    "dynamic@dis": Dynamic(head="dynamic degree", above="moves more", below="moves less"),
    "flickering": Dynamic(head="flicker score", above="changes less", below="flickers more"),
}
"""Metric -> its words; points of each are hundredths, as VBench counts them."""


def dynamics(sample: Sample) -> dict[str, list[float]]:
    """Return metric of `DYNAMICS` -> its value of a video and of the video's reference.

    Of a picture, and of a video without a reference, there is none; a metric that can't be measured here is left out.
    """
    if sample.reference is None or len(sample.frames) < 2:
        return {}
    clip, reference = (
        scores(DYNAMICS, Sample(frames=frames, fps=sample.fps)).values() for frames in (sample.frames, sample.reference)
    )
    return {name: [clip[name], reference[name]] for name in clip if name in reference}
