"""Tries ideas of sparse attention small: `python eval/studies/frontier_sparse.py --model wan-tiny --only "12 | *"`.

Each arm is one `Rule` (`tried_rules`), computed densely under masks: what it would save is counted, not timed. Arms run
with the ladder's solver and noise shift for their steps, on choosing clips, against converged runs. Each is held
against the ladder's dense runs of equal work, and against the dense run of as many steps, with the same step cache,
which tells ideas apart with far less noise. With `--calls` all rules are computed beside one dense run, which tells the
error of single calls, with `--side 128` at another height and width. Clips and arms that are there are not run again.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from dit_accel_eval.metrics.psnr import psnr
from dit_accel_eval.runs.counting import works
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.model import Run
from dit_accel_eval.runs.results import Line, markdown_table
from dit_accel_eval.suites.arms import Arm, is_rival
from dit_accel_eval.suites.comparison import WORKS, ArmFigures, figures_of, rival_steps
from dit_accel_eval.suites.ladder import Ladder, read_ladder
from dit_accel_eval.suites.reference import converged, default_cache
from study import RESULTS, study
from tried_rules import Rule
from tried_sparse import Beside, Tried

import dit_accel
from dit_accel.attachment.backends import UnplannedRun
from dit_accel.methods.base import AttentionHandler, Model, Phase
from dit_accel.methods.config import MethodConfig
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext
from dit_accel.plan.plan import AttentionPlan

FIRST_CLIP = 16


@dataclass(frozen=True, kw_only=True)
class Base:
    """What an idea is tried on: steps, a step cache's threshold (0: none), and the rule that it changes."""

    steps: int
    cache: float
    rule: Rule | None


BASES = {
    "12": Base(steps=12, cache=0.0, rule=Rule(warm=3, every=3, density=0.3)),
    "16": Base(steps=16, cache=0.0, rule=Rule(warm=3, every=3, density=0.3)),
    "20": Base(steps=20, cache=0.0, rule=Rule(warm=4, every=4, density=0.3)),
    "easy .1 20": Base(steps=20, cache=0.1, rule=Rule(warm=3, every=3, density=0.3)),
    "easy .05 20": Base(steps=20, cache=0.05, rule=Rule(warm=3, every=3, density=0.3)),
}

CHOICES: dict[str, dict[str, Any]] = {
    # what ranks tiles, and over what
    **{f"by {score}": {"score": score} for score in ("loss", "value", "moved", "moved, pooled")},
    **{f"budget {name}": {"budget": name} for name in ("head", "call", "model", "heads", "theta")},
    "budget model by loss": {"budget": "model", "score": "loss"},
    "budget call by loss": {"budget": "call", "score": "loss"},
    "budget model by moved": {"budget": "model", "score": "moved"},
    **{f"{share:g} of the {score}": {"budget": "mass", "score": score, "density": share}
       for share in (0.5, 0.6, 0.7, 0.8) for score in ("mass", "loss")},
    **{f"budget {budget} by {score}, density {share:g}": {"budget": budget, "score": score, "density": share}
       for budget in ("call", "model") for score in ("mass", "loss") for share in (0.1, 0.2, 0.4)},
    # where, and by what bound
    **{f"by {score}": {"score": score} for score in ("frames", "some frames", "sol", "quest", "quest, rows")},
    **{name: {"order": name} for name in ("patches", "cubes", "columns")},
    **{f"{name}, budget call by loss": {"order": name, "budget": "call", "score": "loss"}
       for name in ("patches", "cubes")},
    # single keys
    "half of it single keys": {"tokens": 0.5},
    "single keys alone": {"tokens": 0.99},
    # turns, the line, bits, how often, how long dense
    "turn by rows": {"turn": "rows"},
    "all at once": {"turn": "all"},
    **{f"line {share:g}": {"line": share} for share in (0.25, 0.5, 1.0)},
    **{f"line {share:g} over the noise": {"line": share, "along": "noise"} for share in (0.5, 1.0)},
    **{f"{bits} bits": {"bits": bits} for bits in (4, 8)},
    **{f"every {count}": {"every": count} for count in (2, 3, 4, 5, 6)},
    **{f"warm {count}": {"warm": count} for count in (1, 2, 3, 4, 5)},
    **{f"density {share:g}": {"density": share} for share in (0.0, 0.05, 0.1, 0.15, 0.2, 0.4, 0.5)},
    **{f"every {count}, density {share:g}": {"every": count, "density": share}
       for count, share in ((2, 0.1), (2, 0.15), (2, 0.2), (4, 0.5), (6, 0.5))},
}  # fmt: skip
"""Name -> what an idea changes in a rule, whatever becomes of the rest."""

RESTS = ("cached", "skip", "delta", "delta of pooled")

IDEAS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    **{rest: {"rest": rest} for rest in (*RESTS, "delta, fresh weight")},
    **{f"{rest}, {name}": {"rest": rest, **changes} for rest in RESTS for name, changes in CHOICES.items()},
    **{f"{rest}, never anew": {"rest": rest, "every": 0} for rest in RESTS},
    # what is left of the loss
    "fresh lists, skip": {"rest": "skip", "anew": True},
    "fresh lists, their stale rest": {"rest": "exact lists", "anew": True},
    "stale output, fresh weight": {"rest": "fresh weight"},
    "fresh output, stale weight": {"rest": "fresh output"},
    # lists chosen at each step by a bound
    **{
        f"{score} each step, {rest}": {"score": score, "rest": rest, "anew": True, "every": every}
        for score in ("sol", "quest", "quest, rows") for rest, every in (("skip", 0), ("delta", 3))
    },
    # heads at rest
    **{
        f"{share:.0%} of the heads {instead}": {"still": share, "instead": instead, "density": 1.0, "every": 0}
        for share in (0.1, 0.25) for instead in ("value", "last")
    },
    "25% of the heads last, anew": {"still": 0.25, "density": 1.0},
    "delta, 25% of the heads last": {"still": 0.25, "rest": "delta"},
}  # fmt: skip
"""Name -> what the idea changes in a base's rule; None: dense."""


class Placed(MethodConfig):
    """Asks for `Place`."""

    name = "placed"


class Place(AttentionHandler):
    """Has the attachment follow attention calls, which are then computed by a rule."""

    config_type = Placed
    phase = Phase.CORRECTIONS

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Leave a call as it is."""
        return plan


def run_tried(model: EmbeddedModel, clip: int, arm: Arm, cache: float, rule: Rule | None) -> tuple[Run, Tried | None]:
    """Return a clip whose attention was computed by a rule, and what computed it; None: as it is, dense.

    Args:
        arm: whose steps, solver and noise shift count.
        cache: threshold of EasyCache with Taylor's predictor; 0: no step cache.
    """
    methods = [dit_accel.EasyCache(threshold=cache, predictor="taylor")] if cache else []
    if rule is None:
        return model.run(clip, **{**arm.run_options(), "methods": methods}), None
    tried = Tried(rule)
    return run_by(tried, model, clip, arm, methods), tried


def run_by(
    tried: Tried | Beside, model: EmbeddedModel, clip: int, arm: Arm, methods: Sequence[MethodConfig] = ()
) -> Run:
    """Return a clip whose attention is computed by another's ``run``."""
    with dit_accel.attach(model.pipe, *methods, preset="none") as attachment:
        execution: Any = attachment.engine
        place = Place(Placed(), Model(adapter=model.adapter, family=model.family, heads=0, layers=0))
        execution.use((*execution.handlers, place))
        execution._run = tried.run
        with warnings.catch_warnings(action="ignore", category=UnplannedRun):
            return model.run(clip, **arm.run_options())


def arms_of(only: str) -> dict[str, tuple[Base, Rule | None]]:
    """Return name -> base and rule of the arms whose names fit one of the patterns that `;` parts; none: all."""
    arms = {
        f"{name} | {idea}": (base, replace(base.rule, **changes) if changes is not None and base.rule else None)
        for name, base in BASES.items() for idea, changes in IDEAS.items()
    }  # fmt: skip
    wanted = [text for text in only.split(";") if text] or ["*"]
    return {name: arm for name, arm in arms.items() if any(fnmatch(name, text) for text in wanted)}


def measure(options: argparse.Namespace, lines: Sequence[Line]) -> Iterator[Line]:
    """Give the lines of arms and of the dense runs that they are held against, which are not there yet."""
    model = EmbeddedModel(options.model, {})
    ladder = read_ladder(RESULTS / f"rivals-{options.model}.toml")
    cache = Path(options.frames)
    for clip in range(options.first, options.first + options.clips):
        known = {line["arm"]: line for line in lines if line["clip"] == clip and line["model"] == options.model}
        for name, (base, rule) in arms_of(options.only).items():
            if name not in known and not (rule is None and not base.cache):
                known[name] = line = _line(model, ladder, clip, name, base, rule, cache)
                yield line
        rivals = set[int]().union(*(rival_steps(line) for line in known.values() if not is_rival(line)))
        rivals |= {base.steps for base in BASES.values()}
        for arm in (ladder.arm(steps) for steps in sorted(rivals)):
            if arm.name not in known:
                base = Base(steps=arm.num_inference_steps, cache=0.0, rule=None)
                yield _line(model, ladder, clip, arm.name, base, None, cache)


def measure_calls(options: argparse.Namespace, lines: Sequence[Line]) -> Iterator[Line]:
    """Give of each base without a step cache and clip the error of single calls by every rule, on the dense run."""
    model = EmbeddedModel(options.model, {"height": options.side, "width": options.side} if options.side else {})
    ladder = read_ladder(RESULTS / f"rivals-{options.model}.toml")
    done = {(line["arm"], line["clip"]) for line in lines if line["model"] == options.model}
    for clip in range(options.first, options.first + options.clips):
        for name, base in BASES.items():
            rules = {
                arm: rule for arm, (of, rule) in arms_of(options.only).items()
                if of is base and rule is not None and not base.cache and (arm, clip) not in done
            }  # fmt: skip
            tried = [Tried(rule) for rule in rules.values()]
            if tried:
                run_by(Beside(tried), model, clip, ladder.arm(base.steps))
            for arm, one in zip(rules, tried, strict=True):
                yield {
                    "model": model.name, "weights": model.weights, "arm": arm, "clip": clip, "base": name,
                    "rule": asdict(one.rule), "attended": float(np.mean(one.shares)),
                    "sparse": len(one.errors) / len(one.shares),
                    "call_error": float(np.mean(one.errors)), "repeats": _mean(one.repeats),
                }  # fmt: skip


def _line(
    model: EmbeddedModel, ladder: Ladder, clip: int, name: str, base: Base, rule: Rule | None, cache: Path
) -> Line:
    reference = converged(model, clip, default_cache())
    arm = ladder.arm(base.steps)
    made, tried = run_tried(model, clip, arm, base.cache, rule)
    shares, errors, repeats = (tried.shares, tried.errors, tried.repeats) if tried else ([1.0], [0.0], [0.0])
    attended = float(np.mean(shares))
    own = cache / f"{model.name}-{clip}-{base.steps}-{base.cache:g}.npy"
    cache.mkdir(parents=True, exist_ok=True)
    if rule is None:
        np.save(own, made.frames.astype(np.float16))
    elif not own.exists():
        np.save(own, run_tried(model, clip, arm, base.cache, None)[0].frames.astype(np.float16))
    return {
        "model": model.name, "weights": model.weights, "arm": name, "clip": clip, "num_inference_steps": base.steps,
        "solver": arm.solver, "flow_shift": arm.flow_shift, "cache": base.cache, "rule": rule and asdict(rule),
        "psnr": psnr(made.frames, reference.frames), "ssim": 0.0,
        "psnr_dense": psnr(made.frames, np.load(own).astype(np.float32)) if rule else None,
        "call_error": float(np.mean(errors)), "repeats": _mean(repeats),
        "attended": attended, **works(made.counts, reference.step, attended, model.own_share),
        "forwards": made.counts.blocks / reference.step.blocks, "reference": "", "methods": {},
    }  # fmt: skip


def table(lines: Sequence[Line]) -> str:
    """Return for each model the arms that ran, on how many clips, and what they lead by."""
    found = []
    for model in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == model]
        named = [name for name in arms_of("") if any(line["arm"] == name for line in own)]
        figures = {one.name: one for one in figures_of(own, named)}
        rows = [_cells(figures[name], [line for line in own if line["arm"] == name]) for name in named]
        heads = f"arm | clips | {' | '.join(WORKS.values())} | PSNR, dB | to the dense run of as many steps, dB"
        heads += " | relative error of a sparse call | cosine to the last one's"
        heads += "".join(f" | against fewer steps at equal {words}, dB (median)" for words in WORKS.values())
        found.append(f"{model}\n\n{markdown_table(heads, rows)}")
    return "\n\n".join(found)


def _mean(found: Sequence[float]) -> float | None:
    """Return the mean, None of nothing: no sparse call follows another."""
    return float(np.mean(found)) if found else None


def _cells(figures: ArmFigures, lines: Sequence[Line]) -> tuple[str, ...]:
    """Return an arm's cells of the table."""
    mean = lambda key: float(np.mean([line[key] or 0.0 for line in lines]))  # noqa: E731
    works, ahead = (figures.means[key] for key in WORKS), (figures.ahead[key] for key in WORKS)
    return (
        figures.name, str(figures.clips), *(f"{one:.2f}" for one in works), f"{figures.psnr:.2f}",
        f"{mean('psnr_dense'):.2f}" if lines[0]["rule"] else "", f"{mean('call_error'):.3f}", f"{mean('repeats'):.2f}",
        *(one.judged() for one in ahead),
    )  # fmt: skip


def calls_table(lines: Sequence[Line]) -> str:
    """Return for each model and rule the mean error of its sparse calls."""
    rows = []
    for model, arm in dict.fromkeys((line["model"], line["arm"]) for line in lines):
        own = [line for line in lines if (line["model"], line["arm"]) == (model, arm)]
        told = (float(np.mean([line[key] or 0.0 for line in own])) for key in ("attended", "call_error", "repeats"))
        rows.append((model, arm, len(own), *(f"{value:.3f}" for value in told)))
    heads = "model | arm | clips | pairs computed | relative error of a sparse call | cosine to the last one's"
    return markdown_table(heads, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, append one JSON line an arm and clip, and print the table; returns the exit code."""
    found = list(sys.argv[1:] if arguments is None else arguments)
    calls = "--calls" in found
    if calls:
        found.remove("--calls")
    return study(
        __doc__, found, measure_calls if calls else measure, calls_table if calls else table,
        out="frontier-calls.jsonl" if calls else "frontier-sparse.jsonl", resumes=True, model="wan-tiny", clips=4,
        first=FIRST_CLIP, only="", side=0, frames=str(default_cache().parent / "frontier"),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
