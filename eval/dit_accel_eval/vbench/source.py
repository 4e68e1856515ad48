"""Where the videos to be measured come from, and which dimensions can be measured of them; all known beforehand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dit_accel import ConfigError

from . import official
from . import prompts as of_prompts
from .dimensions import DIMENSIONS, dimension
from .long import BACKGROUND, SUBJECT
from .measures import missing_reason
from .prompts import FLICKERING, Wanted
from .run import Job, already_filtered, check_results, filtered, no_filter


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the videos to be measured come from, as the options of these names in `options` have it."""

    videos: Path
    custom: bool
    prompts_file: Path | None
    full_info: Path | None
    samples: int
    filtered: bool
    subset: int | None

    def wanted(self, job: Job, requested: Sequence[str]) -> dict[str, list[Wanted]]:
        """Return dimension -> its videos; names all that is missing before anything is measured.

        Raises:
            ConfigError: for unknown dimensions, asked ones that can't be measured, and missing videos, by name.
        """
        known_names(requested)
        of_prompts.check_folder(self.videos)
        return self._own(job, requested) if self.custom else self._official(job, requested)

    def _own(self, job: Job, requested: Sequence[str]) -> dict[str, list[Wanted]]:
        of_prompts.check_custom(known_names(requested))
        still = job.long is None or self.filtered
        names = _measurable(job, requested, lambda name: name not in of_prompts.ASKED, still=still)
        if FLICKERING in names and still:
            job.warn(f"{FLICKERING} can't tell flicker from motion; give videos that stand still")
        own = of_prompts.custom_videos(self.videos, self.prompts_file, names)
        check_results(job.output, job.lines, job.results, *job.others)
        return dict.fromkeys(names, own)

    def _official(self, job: Job, requested: Sequence[str]) -> dict[str, list[Wanted]]:
        every = of_prompts.read_prompts(official.prompts_path(self.full_info))
        there = {name for one in every for name in one.dimensions}
        names = _measurable(job, requested, lambda name: name in there, still=self.filtered)
        prompts = every if self.subset is None else of_prompts.first_of(every, names, self.subset)
        skipped = FLICKERING if job.long is None else None  # VBench-Long filters clips, not videos
        wanted = {
            name: of_prompts.videos_of(prompts, self.videos, name, self.samples) for name in names if name != skipped
        }
        check_results(job.output, job.lines, job.results, *job.others)
        if skipped in names:
            wanted[FLICKERING] = (already_filtered if self.filtered else filtered)(job, prompts, self.videos)
        strays = of_prompts.unused(every, self.videos, self.samples)
        if strays:
            job.warn(f"{len(strays)} videos belong to no prompt, or lie beyond the samples, such as {strays[0]!r}")
        return {name: wanted[name] for name in names}


def known_names(requested: Sequence[str]) -> list[str]:
    """Return dimensions by their official names; refuses unknown ones, and ones given twice."""
    names = [dimension(name).name for name in requested]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ConfigError(f"dimension {double} is given twice; leave one out")
    return names


def _measurable(job: Job, requested: Sequence[str], usual: Callable[[str], bool], *, still: bool) -> list[str]:
    """Return the dimensions to measure: those asked for, or all usual ones that can be, warning of the others.

    Refused are those asked for that can't be measured, and all if none can. ``still``: flickering needs no filter.
    """
    names = known_names(requested) or [name for name in DIMENSIONS if usual(name)]
    found = {name: _no_long(name, job) or missing_reason(name, job.means) for name in names}
    if FLICKERING in found and not still:
        found[FLICKERING] = no_filter(job)
    reasons = {name: reason for name, reason in found.items() if reason is not None}
    if reasons and (requested or len(reasons) == len(names)):
        raise ConfigError("; ".join(f"{name} can't be measured: {reason}" for name, reason in reasons.items()))
    for name, reason in reasons.items():
        job.warn(f"{name} is left out: {reason}")
    return [name for name in names if name not in reasons]


def _no_long(name: str, job: Job) -> str | None:
    """Return why VBench-Long's form of a dimension can't be measured, None if it can or is not asked for."""
    if job.long is None:
        return None
    if job.means.observations.has(name):
        return "VBench-Long looks at each clip, and the observations are of whole videos"
    if job.long.fast is None:
        return None
    if name == BACKGROUND:
        return "between clips it asks DreamSim, which does not run here; leave --long-config out for that within clips"
    return job.means.networks.missing(("dinov2",)) if name == SUBJECT else None
