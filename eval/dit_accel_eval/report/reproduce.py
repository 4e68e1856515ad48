"""How to run the results of a report again: the suite as TOML, the commands, the versions."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel_assets import model_names, model_path

from dit_accel.adapters.model_files import read_model_files
from dit_accel.estimate.estimate import estimate

from ..results import Line
from ..suite import NATIVE, SUITE_VERSION
from .figures import Report

VERSIONS = ("dit_accel", "diffusers", "torch", "python")


def versions_of(lines: Sequence[Line]) -> dict[str, str]:
    """Return package -> its versions among the lines; lines made before a version was kept tell none."""
    found = {key: sorted({str(line[key]) for line in lines if key in line}) for key in VERSIONS}
    return {key: ", ".join(versions) for key, versions in found.items() if versions}


def machines_of(lines: Sequence[Line]) -> str:
    """Return the machines on which lines were made; empty where they do not tell."""
    return "; ".join(sorted({line["device"] for line in lines if "device" in line}))


def tokens_of(line: Line) -> int | None:
    """Return how many tokens a line's forward has; None for a model that is not embedded."""
    if line["model"] not in model_names():
        return None
    sizes = {key: line["call"][key] for key in ("height", "width", "num_frames") if key in line["call"]}
    return estimate(*read_model_files(str(model_path(line["model"]))).identify(), **sizes).layout.tokens


def name_of(report: Report) -> str:
    """Return the suite's name, or the results' where lines tell none."""
    return next((line["suite"] for line in report.results.lines if "suite" in line), report.results.path.stem)


def suite_text(report: Report) -> str:
    """Return the TOML of a suite that runs every arm of a report on its clips."""
    import tomli_w

    arms = [_arm(report.settings[arm.name]) for arm in report.arms]
    call = {key: value for key, value in report.results.lines[0]["call"].items() if value is not None}
    head = {"version": SUITE_VERSION, "name": name_of(report), "model": report.results.lines[0]["model"]}
    keys = ("by_frame", "metrics", "skipped", "unavailable")
    names = dict.fromkeys(name for line in report.results.lines for key in keys for name in line.get(key, ()))
    listed = {"metrics": list(names)} if names else {}
    first = min(report.prompts)
    begin = {"first_clip": first} if first else {}
    clips = {"clips": max(report.prompts) + 1 - first, **begin}
    return tomli_w.dumps({**head, **clips, **listed, "call": call, "arm": arms})


def _arm(line: Line) -> dict[str, Any]:
    arm = {"name": line["arm"], "num_inference_steps": line["num_inference_steps"], "solver": line["solver"]}
    if line["flow_shift"] is not None:
        arm["flow_shift"] = line["flow_shift"]
    for name, options in line["methods"].items():
        options = {key: value for key, value in options.items() if value is not None}
        if name == "diffusers-cache":
            arm[NATIVE] = {options.pop("config"): options}
        else:
            arm[name] = options
    return arm


def commands_of(report: Report) -> list[str]:
    """Return the commands that make the results anew from `suite_text`, and the page from those."""
    name, path = name_of(report), report.results.path.name
    out = shlex.quote(path)
    timed = " --time" if any("seconds" in line for line in report.results.lines) else ""
    kept = " --frames frames" if any("kept" in line for line in report.results.lines) else ""
    page = shlex.quote(str(Path(path).with_suffix(".html")))
    return [
        f"dit-accel eval run {shlex.quote(f'{name}.toml')} --out {out}{timed}{kept}",
        f"dit-accel eval report {out} -o {page}",
    ]
