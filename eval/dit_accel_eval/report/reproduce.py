"""How to run the results of a report again: the suite as TOML, the commands, the versions."""

import shlex
from collections.abc import Sequence
from typing import Any

from dit_accel_assets import model_names, model_path
from dit_accel_pipelines.generation.solvers import SOLVERS

from dit_accel.adapters.model_files import read_model_files
from dit_accel.estimate.estimate import estimate

from ..runs.model import OWN
from ..runs.results import Line
from ..suites.arms import NATIVE, TUNED
from ..suites.suite import SUITE_VERSION
from .figures import Report


def versions_of(lines: Sequence[Line]) -> dict[str, str]:
    """Return package -> its versions among the lines; lines made before a version was kept tell none."""
    found = {key: sorted({str(line[key]) for line in lines if key in line})
             for key in ("dit_accel", "diffusers", "torch", "python")}  # fmt: skip
    return {key: ", ".join(versions) for key, versions in found.items() if versions}


def tokens_of(line: Line) -> int | None:
    """Return how many tokens a line's forward has; None where neither it nor the model tells."""
    if "tokens" in line or line["model"] not in model_names():
        return line.get("tokens")
    sizes = {key: line["call"][key] for key in ("height", "width", "num_frames") if key in line["call"]}
    return estimate(*read_model_files(str(model_path(line["model"]))).identify(), **sizes).layout.tokens


def suite_text(report: Report) -> str:
    """Return the TOML of a suite that runs every arm of a report on its clips, and declares its pairs."""
    import tomli_w

    lines = sorted(report.results.lines, key=lambda line: line["clip"])
    first, last = lines[0], lines[-1]
    suite: dict[str, Any] = {"version": SUITE_VERSION, "name": report.name, "model": first["model"]}
    if "seed" not in first:
        suite |= {"clips": last["clip"] + 1 - first["clip"], "first_clip": first["clip"]}
    else:
        prompts, seeds = (list(dict.fromkeys(line[key] for line in lines)) for key in ("prompt", "seed"))
        by_place = len(seeds) == len(prompts) and all(line["seed"] == line["clip"] for line in lines)
        suite |= {"prompts": prompts, **({} if by_place else {"seeds": seeds})}
    metrics = dict.fromkeys(
        name for line in report.results.lines for key in ("by_frame", "metrics", "skipped", "unavailable")
        for name in line.get(key, ()) if name != "score"  # why a clip has none stands among what was skipped
    )  # fmt: skip
    repeats = max(len(line.get("repeated", {}).get("seconds", (0,))) for line in lines)
    suite |= {"repeats": repeats, "metrics": list(metrics)}
    suite |= {"dtype": first["dtype"]} if "dtype" in first else {}
    suite |= {"reference_steps": report.full_steps} if report.own else {}
    suite["call"] = {key: value for key, value in first["call"].items() if value is not None}
    tuned = [arm.name for arm in report.arms if arm.name.startswith(f"{TUNED} ") and report.is_dense(arm)]
    suite |= {"rivals": "RIVALS.toml"} if tuned else {}  # the ladder's file, which lines do not name
    suite["arm"] = [_arm(report.settings[arm.name]) for arm in report.arms if arm.name not in tuned]
    suite["compare"] = [
        {"arm": one.pair.arm, "against": one.pair.against, "margin": one.pair.margin} for one in report.pairs
    ]
    usual = {"first_clip": 0, "repeats": 1, "metrics": [], "compare": []}
    return tomli_w.dumps({key: value for key, value in suite.items() if key not in usual or value != usual[key]})


def _arm(line: Line) -> dict[str, Any]:
    arm: dict[str, Any] = {"name": line["arm"], "num_inference_steps": line["num_inference_steps"]}
    if "scheduler" in line or line["solver"] not in (*SOLVERS, OWN):
        arm["scheduler"] = {line["solver"]: line.get("scheduler", {})}
    else:
        arm["solver"] = line["solver"]
    given = {"flow_shift": line["flow_shift"], "call": line.get("arm_call")}
    given |= {key: line.get(key) for key in ("guider", "rival")}
    arm |= {key: value for key, value in given.items() if value is not None}
    for name, options in line["methods"].items():
        options = {key: value for key, value in options.items() if value is not None}
        if name == "diffusers-cache":
            arm[NATIVE] = {options.pop("config"): options}
        else:
            arm[name] = options
    return arm


def commands_of(report: Report) -> list[str]:
    """Return the commands that make the results anew from `suite_text`, and the page from those."""
    path = report.results.path
    suite, out, page = (shlex.quote(name) for name in (f"{report.name}.toml", path.name, f"{path.stem}.html"))
    timed = " --time" if any("seconds" in line for line in report.results.lines) else ""
    kept = " --frames frames" if any("kept" in line for line in report.results.lines) else ""
    return [f"dit-accel eval run {suite} --out {out}{timed}{kept}", f"dit-accel eval report {out} -o {page}"]
