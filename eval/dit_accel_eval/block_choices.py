"""Holds a profile against all choices of as many blocks: `python -m dit_accel_eval.block_choices RESULTS PROFILE`."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.methods.caches.block_numbers import spell_numbers
from dit_accel.rules.ranking import cached_blocks, rank_correlation

from .paired import bootstrap
from .profile_watch import CRITERIA
from .results import Line, read_lines


def choices(lines: Sequence[Line]) -> dict[tuple[int, ...], dict[int, float]]:
    """Return blocks -> clip -> PSNR in dB of the arms whose only method is a ProfilingCache."""
    found: dict[tuple[int, ...], dict[int, float]] = defaultdict(dict)
    for line in lines:
        if [*line["methods"]] == ["profilingcache"]:
            found[tuple(line["methods"]["profilingcache"]["blocks"])][line["clip"]] = line["psnr"]
    return found


def table(lines: Sequence[Line], entry: Mapping[str, Any]) -> Iterator[str]:
    """Give the Markdown table: the choice of each criterion, its place among all, and how far it is from their mean.

    Args:
        lines: of the suite that holds every choice.
        entry: the profile's, of the transformer.
    """
    known = choices(lines)
    means = {blocks: float(np.mean([*values.values()])) for blocks, values in known.items()}
    count = len(next(iter(known)))
    yield "| criterion | blocks | place by mean PSNR | places by clip | against the mean choice, dB | Spearman |"
    yield "|---|---|---|---|---|---|"
    for criterion in CRITERIA:
        scores = entry["scores"][criterion]
        chosen = tuple(cached_blocks(scores, count=count)[0])
        place = 1 + sum(mean > means[chosen] for mean in means.values())
        clips = sorted(known[chosen])
        by_clip = [1 + sum(values[clip] > known[chosen][clip] for values in known.values()) for clip in clips]
        ahead = bootstrap(
            [known[chosen][clip] - float(np.mean([values[clip] for values in known.values()])) for clip in clips]
        )
        told = rank_correlation([-sum(scores[block] for block in blocks) for blocks in means], [*means.values()])
        yield (
            f"| {criterion} | {spell_numbers(chosen)} | {place} of {len(means)} | {', '.join(map(str, by_clip))} | "
            f"{ahead:+} | {told:+.2f} |"
        )


def main(arguments: Sequence[str]) -> int:
    """Print the table of a results file and a profile of one transformer."""
    results, profile = map(Path, arguments)
    (entry,) = json.loads(profile.read_text(encoding="utf-8"))["transformers"].values()
    print("\n".join(table(read_lines(results), entry)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
