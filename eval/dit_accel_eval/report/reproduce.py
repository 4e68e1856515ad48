"""How to run the results of a report again: the suite as TOML, the commands, the versions."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel_assets import model_names, model_path
from dit_accel_pipelines.generation.solvers import SOLVERS

from dit_accel.adapters.model_files import read_model_files
from dit_accel.estimate.estimate import estimate

from ..runs.model import OWN
from ..runs.results import Line
from ..suites.arms import NATIVE
from ..suites.suite import SUITE_VERSION
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
    """Return how many tokens a line's forward has; None where neither it nor the model tells."""
    if "tokens" in line:
        return int(line["tokens"])
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
    names.pop("score", None)  # why a clip has none stands among what was skipped
    listed = {"metrics": list(names)} if names else {}
    return tomli_w.dumps({**head, **_clips(report.results.lines), **listed, "call": call, "arm": arms})


def _clips(lines: Sequence[Line]) -> dict[str, Any]:
    """Return the keys of a suite that give its clips: how many held-out ones, or prompts and seeds of one's own."""
    ordered = sorted(lines, key=lambda line: line["clip"])
    repeats = max((len(line["repeated"]["seconds"]) for line in ordered if "repeated" in line), default=1)
    runs = {"repeats": repeats} if repeats > 1 else {}
    if "seed" not in ordered[0]:
        first, last = ordered[0]["clip"], ordered[-1]["clip"]
        return {"clips": last + 1 - first, **({"first_clip": first} if first else {}), **runs}
    prompts, seeds = (list(dict.fromkeys(line[key] for line in ordered)) for key in ("prompt", "seed"))
    by_place = all(line["seed"] == line["clip"] for line in ordered) and len(seeds) == len(prompts)
    dtype = {"dtype": ordered[0]["dtype"]} if "dtype" in ordered[0] else {}
    return {"prompts": prompts, **({} if by_place else {"seeds": seeds}), **dtype, **runs}


def _arm(line: Line) -> dict[str, Any]:
    arm: dict[str, Any] = {"name": line["arm"], "num_inference_steps": line["num_inference_steps"]}
    if "scheduler" in line or line["solver"] not in (*SOLVERS, OWN):
        arm["scheduler"] = {line["solver"]: line.get("scheduler", {})}
    else:
        arm["solver"] = line["solver"]
    if "guider" in line:
        arm["guider"] = line["guider"]
    if "arm_call" in line:
        arm["call"] = line["arm_call"]
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
