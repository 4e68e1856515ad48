"""Tries what DFA's calls leave out as a kept difference: `python eval/studies/dfa_rest.py`.

Between full steps a call computes some rows over some keys; what that leaves out of the last full step for these
rows is added, or not. All is computed densely under masks: work is counted, not timed. Single calls of all arms are
computed beside one dense run, whose foreground they have; then each arm runs whole clips.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from dit_accel_eval.metrics.psnr import psnr
from dit_accel_eval.runs.counting import works
from dit_accel_eval.runs.loaded import EmbeddedModel
from dit_accel_eval.runs.results import Line, markdown_table
from dit_accel_eval.suites.ladder import read_ladder
from dit_accel_eval.suites.reference import converged, default_cache
from scipy import stats
from study import RESULTS, study
from torch import Tensor
from tried_rules import TILE, Dense, dense_call, masses, most, partial, rows_of

import dit_accel
from dit_accel.attachment.backends import UnplannedRun
from dit_accel.methods.attention.dfa import DFAHandler
from dit_accel.plan.call import Call
from dit_accel.plan.context import CallContext, Key

FIRST_CLIP = 16


@dataclass(frozen=True)
class Arm:
    """What a call computes between full steps.

    Attributes:
        rows: ``all``, or ``own``, those of text and foreground; others keep the last full step's output.
        keys: which they see: ``all``, ``own``, of ``own`` rows all and of others ``own``, or as many of those ``tiles``
            that had the most mass in the last full step.
        rest: what the keys leave out of a row's output in the last full step is added.
    """

    rows: Literal["all", "own"]
    keys: Literal["all", "own", "all of own", "tiles"]
    rest: bool = False


ARMS = {
    "dfa": Arm("own", "all"),
    "strict": Arm("own", "own"),
    "strict, cached rest": Arm("own", "own", rest=True),
    "all rows, over the foreground, cached rest": Arm("all", "own", rest=True),
    "dfa, background over the foreground, cached rest": Arm("all", "all of own", rest=True),
    "all rows, over as many tiles by mass, cached rest": Arm("all", "tiles", rest=True),
}


class Tried:
    """Computes the attention calls of a run by arms in place of an execution's own; the first one's outputs count.

    Attributes:
        shares: of each arm's calls, the share of the pairs that were computed.
        errors: of each arm's calls between full steps, the relative error to the dense one of the same q, k and v.
    """

    def __init__(self, arms: Sequence[Arm], dense: bool) -> None:
        self.arms, self.dense = arms, dense
        self.shares: list[list[float]] = [[] for _ in arms]
        self.errors: list[list[float]] = [[] for _ in arms]
        self.handler: Any = None
        self._full: dict[Key, Dense] = {}

    def run(self, plan: Any, call: Call, context: CallContext, *_: Any) -> tuple[Tensor, Any]:
        """Stand for `Execution._run`."""
        with torch.no_grad():
            now, full = dense_call(call), self._full.get(context.key)
            found = self.handler._rows_of(context) if self.handler._reuse and full is not None else None
            if found is None or full is None:
                self._full[context.key] = now
                for shares in self.shares:
                    shares.append(1.0)
                return now.out, plan
            made = [self._made(number, now, full, torch.stack(found[1])) for number in range(len(self.arms))]
            return now.out if self.dense else made[0], plan

    def _made(self, number: int, now: Dense, full: Dense, own: Tensor) -> Tensor:
        """Return what an arm gives in a call between full steps; ``own``: text and foreground, bool [B, S]."""
        arm = self.arms[number]
        rows, seen = own | (arm.rows == "all"), _keys(arm, full, own)
        out = partial(now, seen)[0]
        if arm.rest:
            out = out + full.out - partial(full, seen)[0]
        out = torch.where(rows[:, None, :, None], out, full.out)
        computed = seen & rows[:, None, :, None]
        self.shares[number].append(float(computed.expand_as(now.p).float().mean()))
        self.errors[number].append(float((out - now.out).norm() / now.out.norm()))
        return out


def _keys(arm: Arm, full: Dense, own: Tensor) -> Tensor:
    """Return which keys the rows of an arm see, bool to be expanded to [B, H, S, S]."""
    mine = own[:, None, None]
    if arm.keys == "tiles":
        mass = masses(full.p)
        chosen = most(mass, round(float(own.float().mean()) * mass.shape[-1]), 1)
        return rows_of(chosen.repeat_interleave(TILE, 3))
    return mine | (arm.keys == "all") | (own[:, None, :, None] & (arm.keys == "all of own"))


def run_by(tried: Tried, model: EmbeddedModel, clip: int, every: int, options: dict[str, Any]) -> Any:
    """Return a clip whose attention is computed by arms, with the full steps and the foreground of DFA."""
    with dit_accel.attach(model.pipe, dit_accel.DFA(every=every), preset="none") as attachment:
        execution: Any = attachment.engine
        (tried.handler,) = (one for one in execution.handlers if isinstance(one, DFAHandler))
        execution._run = tried.run
        with warnings.catch_warnings(action="ignore", category=UnplannedRun):
            return model.run(clip, **options)


def measure(options: argparse.Namespace, lines: Sequence[Line]) -> Iterator[Line]:
    """Give the lines of arms, steps and clips that are not there yet."""
    model = EmbeddedModel(options.model, {})
    ladder = read_ladder(RESULTS / f"rivals-{options.model}.toml")
    done = {(line["kind"], line["arm"], line["every"], line["num_inference_steps"], line["clip"]) for line in lines}
    for clip in range(options.first, options.first + options.clips):
        for steps in options.steps:
            given = ladder.arm(steps).run_options()
            for every in options.every:
                common = {"model": model.name, "weights": model.weights, "clip": clip, "every": every}
                common["num_inference_steps"] = steps
                left = [name for name in ARMS if ("call", name, every, steps, clip) not in done]
                tried = Tried([ARMS[name] for name in left], dense=True)
                if left:
                    run_by(tried, model, clip, every, given)
                for name, shares, errors in zip(left, tried.shares, tried.errors, strict=True):
                    yield {
                        **common, "kind": "call", "arm": name, "attended": float(np.mean(shares)),
                        "call_error": float(np.mean(errors)),
                    }  # fmt: skip
                yield from _whole(model, common, given, [n for n in ARMS if ("run", n, every, steps, clip) not in done])


def _whole(model: EmbeddedModel, common: Line, given: dict[str, Any], names: Sequence[str]) -> Iterator[Line]:
    """Give the lines of whole runs of some arms."""
    if not names:
        return
    clip = common["clip"]
    reference = converged(model, clip, default_cache())
    plain = model.run(clip, **given)
    for name in names:
        tried = Tried([ARMS[name]], dense=False)
        made = run_by(tried, model, clip, common["every"], given)
        attended = float(np.mean(tried.shares[0]))
        yield {
            **common, "kind": "run", "arm": name, "attended": attended, "call_error": float(np.mean(tried.errors[0])),
            "psnr": psnr(made.frames, reference.frames), "psnr_dense": psnr(made.frames, plain.frames),
            "psnr_of_dense": psnr(plain.frames, reference.frames),
            **works(made.counts, reference.step, attended, model.own_share),
        }  # fmt: skip


def table(lines: Sequence[Line]) -> str:
    """Return of each run and arm the means over clips, and by how much it lies from ``dfa``, with 95 % intervals."""
    rows = []
    for steps, every, arm in dict.fromkeys((x["num_inference_steps"], x["every"], x["arm"]) for x in lines):
        here = [x for x in lines if (x["num_inference_steps"], x["every"]) == (steps, every)]
        of = lambda kind, name, key: {x["clip"]: x[key] for x in here if (x["kind"], x["arm"]) == (kind, name)}  # noqa: B023, E731
        errors, base = of("call", arm, "call_error"), of("call", "dfa", "call_error")
        runs = {key: of("run", arm, key) for key in ("psnr", "psnr_dense", "work", "work_real")}
        cells = [f"{np.mean(list(found.values())):.3g}" if found else "" for found in runs.values()]
        against = [
            _interval([runs[key][clip] - of("run", other, key)[clip] for clip in runs[key]])
            for other, key in (("dfa", "psnr"), ("dfa", "psnr_dense"), ("strict", "psnr"))
            if runs[key]
        ]
        share = f"{np.mean(list(of('call', arm, 'attended').values())):.2f}"
        ratio = _interval([errors[clip] / base[clip] for clip in errors])
        rows.append((steps, every, arm, len(errors), share, f"{np.mean(list(errors.values())):.3f}", ratio, *cells,
                     *(against or ("", "", ""))))  # fmt: skip
    heads = "steps | every | arm | clips | pairs computed | error of a call | over dfa's | to converged, dB"
    heads += " | to the dense run, dB | own work | work at a = .72 | to converged over dfa, dB | to dense over dfa, dB"
    return markdown_table(heads + " | to converged over strict, dB", rows)


def _interval(values: Sequence[float]) -> str:
    """Return a mean with the 95 % interval of Student's t."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, append one JSON line an arm and clip, and print the table; returns the exit code."""
    return study(
        __doc__, arguments, measure, table, out="dfa-rest.jsonl", resumes=True, model="wan-tiny", clips=4,
        first=FIRST_CLIP, steps=(12, 20), every=(2,),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
