"""Holds profiles against other choices of as many blocks: `python eval/studies/block_choices.py RESULTS PROFILE...`.

Each criterion is taken from the first profile that tells it of every block.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from dit_accel_eval.runs.results import Line, read_lines
from dit_accel_eval.statistics import clip_mean, rank_correlation
from dit_accel_eval.tune.block_ranking import cached_blocks
from dit_accel_eval.tune.profile_watch import CRITERIA

from dit_accel import ConfigError, DitAccelError
from dit_accel.methods.caches.block_numbers import spell_numbers
from dit_accel.methods.caches.profile_file import read_profile


def choices(lines: Sequence[Line]) -> dict[tuple[int, ...], dict[int, float]]:
    """Return blocks -> clip -> PSNR in dB of the arms whose only method is a ProfilingCache."""
    found: dict[tuple[int, ...], dict[int, float]] = defaultdict(dict)
    for line in lines:
        if [*line["methods"]] == ["profilingcache"]:
            found[tuple(line["methods"]["profilingcache"]["blocks"])][line["clip"]] = line["psnr"]
    return found


def scores_of(profiles: Sequence[Path]) -> dict[str, list[float]]:
    """Return criterion -> score by block, of profiles of one transformer.

    Raises:
        ConfigError: for a profile of several transformers, or criteria that none tells.
    """
    found: dict[str, list[float]] = {}
    for path in profiles:
        entries = read_profile(str(path), "block_choices")["transformers"]
        if len(entries) != 1:
            raise ConfigError(f"{path} is of {len(entries)} transformers; give profiles of one")
        for criterion, scores in next(iter(entries.values()))["scores"].items():
            if None not in scores:
                found.setdefault(criterion, scores)
    if missing := [criterion for criterion in CRITERIA if criterion not in found]:
        raise ConfigError(f"none of the {len(profiles)} profiles tells {', '.join(missing)}; give one that does")
    return found


def table(lines: Sequence[Line], by_criterion: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """Give the Markdown table: the choice of each criterion, its place among all, and how far it is from their mean.

    Args:
        lines: of the suite that holds the choices; clips that lack some of them are left out.
        by_criterion: criterion -> score by block.

    Raises:
        ConfigError: where a criterion's choice is none of the suite's.
    """
    known = whole(choices(lines))
    means = {blocks: float(np.mean([*values.values()])) for blocks, values in known.items()}
    count = len(next(iter(known)))
    yield "| criterion | blocks | place by mean PSNR | places by clip | against the mean choice, dB | Spearman |"
    yield "|---|---|---|---|---|---|"
    for criterion in CRITERIA:
        scores = by_criterion[criterion]
        chosen = tuple(cached_blocks(list(scores), count=count)[0])
        if chosen not in known:
            raise ConfigError(
                f"the results lack blocks {spell_numbers(chosen)}, the choice of {criterion}; run them too"
            )
        place = 1 + sum(mean > means[chosen] for mean in means.values())
        clips = sorted(known[chosen])
        by_clip = [1 + sum(values[clip] > known[chosen][clip] for values in known.values()) for clip in clips]
        ahead = clip_mean(
            [known[chosen][clip] - float(np.mean([values[clip] for values in known.values()])) for clip in clips]
        )
        agreement = rank_correlation([-sum(scores[block] for block in blocks) for blocks in means], [*means.values()])
        yield (
            f"| {criterion} | {spell_numbers(chosen)} | {place} of {len(means)} | {', '.join(map(str, by_clip))} | "
            f"{ahead:+} | {agreement:+.2f} |"
        )


def whole(known: dict[tuple[int, ...], dict[int, float]]) -> dict[tuple[int, ...], dict[int, float]]:
    """Return the choices with the clips that every one has.

    Raises:
        ConfigError: if there are none.
    """
    shared = set.intersection(*({*values} for values in known.values())) if known else set()
    if not shared:
        raise ConfigError("the results hold no clip that every choice of blocks has; run the suite to the end of one")
    return {blocks: {clip: values[clip] for clip in sorted(shared)} for blocks, values in known.items()}


def main(arguments: Sequence[str]) -> int:
    """Print the table of a results file and profiles of one transformer; returns the exit code."""
    try:
        results, *profiles = map(Path, arguments)
        print("\n".join(table(read_lines(results), scores_of(profiles))))
    except (DitAccelError, ValueError) as error:
        print(error if isinstance(error, DitAccelError) else __doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
