"""Draws what `dit-accel tune` found: `python eval/studies/tuning_plots.py FILE PNG`.

FILE is a profile of `tune profile`, whose scores become a heat map; what `tune period --json` printed, whose curve is
drawn; or the lines beside what `tune pipeline` wrote, whose settings are drawn by work on the last round's prompts.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_eval.suites.figures import figures_of
from dit_accel_eval.suites.lines import last_lines, result_lines
from dit_accel_eval.tune.pipeline_search import HELD_OUT_PROMPTS
from matplotlib.figure import Figure
from suite_picture import picture

from dit_accel import ConfigError
from dit_accel.files import written_whole


def heat_map(profile: Mapping[str, Any]) -> Any:
    """Return a profile's picture: a row a transformer, a panel a criterion that it knows."""
    entries = profile["transformers"]
    criteria = [name for name, rows in next(iter(entries.values()))["by_step"].items() if any(rows)]
    tallest = max(entry["blocks"] for entry in entries.values())
    figure = Figure((4.2 * len(criteria), max(2.6, 0.9 + 0.12 * tallest) * len(entries)), layout="constrained")
    axes = figure.subplots(len(entries), len(criteria), squeeze=False)
    for row, (name, entry) in zip(axes, entries.items(), strict=True):
        for axis, criterion in zip(row, criteria, strict=True):
            values = np.array(entry["by_step"][criterion], float)
            figure.colorbar(axis.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis"), ax=axis)
            axis.set(title=f"{name}: {criterion}", xlabel="step", ylabel="block")
            for one in (axis.xaxis, axis.yaxis):
                one.get_major_locator().set_params(integer=True)
            if criterion == profile["criterion"]:
                axis.set_ylabel("block (>: cached)")
                for block in entry["cached"]:
                    axis.text(-0.7, block, ">", ha="right", va="center", color="red")
    figure.suptitle(f"{profile['model']}: blocks by {profile['criterion']}, {len(profile['runs'])} runs")
    return figure


def curve(found: Mapping[str, Any]) -> Any:
    """Return a curve's picture, with the multiples of the dominant period."""
    figure = Figure((7, 3.5), layout="constrained")
    axis = figure.subplots()
    axis.plot(found["curve"])
    axis.set(ylabel="mean logit at one place", xlabel="distance in latent frames")
    period = found["found"]["periods"][found["found"]["dominant"]]
    for multiple in range(1, int(found["frames"] / period) + 1):
        axis.axvline(multiple * period, linestyle=":", color="grey")
    figure.suptitle(f"{found['model']}: attention by distance")
    return figure


def settings(path: Path) -> Any:
    """Return the picture of a search's settings that have all prompts of an embedded model's last round."""
    prompts = HELD_OUT_PROMPTS.rounds[-1]
    lines = [line for line in last_lines(result_lines(path)).values() if line.clip in prompts]
    counts = Counter(line.arm for line in lines)
    whole = [line for line in lines if counts[line.arm] == len(prompts)]
    if not whole:
        raise ConfigError(f"{path} has no setting on all of prompts {prompts[0]} to {prompts[-1]}; name other lines")
    names = dict.fromkeys(line.arm for line in whole if not line.is_rival)
    return picture(figures_of(whole, list(names)), path.name.partition(".")[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw one file; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("png", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.file.suffix == ".jsonl":
            figure = settings(options.file)
        else:
            found = json.loads(options.file.read_text(encoding="utf-8"))
            if "profile" not in found and "curve" not in found:
                raise ConfigError(f"{options.file} holds neither a profile nor a curve; give what dit-accel tune wrote")
            figure = heat_map(found) if "profile" in found else curve(found)
    except (ConfigError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    with written_whole(options.png) as temporary:
        figure.savefig(temporary, dpi=100)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
