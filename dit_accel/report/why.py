"""Why a run was not faster: the causes by their share of its time, largest first, and what to do about each."""

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..rules.steps import whole_steps
from .clock import KINDS, Key, TimedForward, Timing

Cause = tuple[str, str]
"""What took the time, and what to do."""

Options = Mapping[str, Mapping[str, Any]]
"""Method name -> its options."""

LEAST = 0.03
"""Share of the run's time from which a cause is named."""

_WAITED: Cause = (
    "waiting for offloaded weights",
    "keep the transformer on the device, or offload by component (--offload model)",
)
_BETWEEN: Cause = (
    "between the forwards: the scheduler, offloading, guidance",
    "keep the model on the device if it fits; the methods can't change this",
)
_OUTSIDE: Cause = ("outside the denoising loop: text encoder, decoder", "the methods can't change this")
_STARTED: Cause = ("the first forward's own start: compilation, loading, tuning", "run once before you measure")
_LISTS: Cause = (
    "planning attention calls, tile lists included",
    "lists by place are kept for one size: generate more of that",
)
_TEXT: Cause = (
    "attention calls over a part of the keys (the text alone, image prompts), which stay dense",
    "no option changes this; a step cache skips them",
)
_ADDED: Cause = ("further forwards beside the model's own", "narrow guidance's window (start, stop), or leave out tau")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCauses:
    """What ran, as far as it tells why."""

    timing: Timing  # the forwards
    methods: Options  # what was attached
    # cache's name -> what it logged of each forward (`dit_accel.methods.caches.log.CachedForward`)
    logs: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    # forward -> share of its attention calls that stayed dense beside others that followed a plan
    dense_layers: Mapping[Key, float] = field(default_factory=dict)
    # forward -> why calls of layers in which methods act stayed dense -> how many of all its calls
    stayed: Mapping[Key, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # the methods' remarks
    problem: str = ""  # why what is attached did not act, and what to do; "" where nothing is wrong
    cached: bool = False  # whether a cache acted that no log is of: one that was enabled in diffusers

    def cache_or(self, what: str) -> str:
        """Return an advice, beside that of a step cache where none acts yet."""
        return what if self.logs or self.cached else f"use a step cache, or {what}"

    def why_stayed(self, why: str) -> Cause:
        """Return the cause of calls that stayed dense, which `Why` names."""
        if why == "mask":
            what = "attention calls that stayed dense for a mask that is not key padding"
            return what, "generate prompts one at a time, or of one length"
        what = "attention calls that stayed dense, since lists gain nothing on this processor"
        return what, self.cache_or("name a backend to run the lists all the same")


def why_not_faster(ran: RunCauses) -> list[str]:
    """Return a line for each cause that took at least `LEAST` of the run's time."""
    timing = ran.timing
    if not timing.forwards:
        return []
    lost: dict[Cause, float] = defaultdict(float)
    computed, skipped = why_computed(ran.logs, ran.methods)
    usually, starts = {kind: timing.usual(kind) or 0.0 for kind in KINDS}, timing.starts
    for place, forward in enumerate(timing.forwards):
        key = (forward.transformer, forward.step_index, forward.branch)
        usual = usually[forward.kind]
        if place in starts:  # what loads, warms up or compiles takes its time once
            lost[_STARTED] += max(0.0, forward.seconds - usual)
        taken = min(forward.seconds, usual)  # what it took beyond that was its start, or other work on the machine
        waited = taken * (timing.share("fetching", forward.kind) or 0.0)
        lost[_WAITED] += waited
        taken -= waited
        if forward.kind == "extended" and timing.dense is not None:  # the further forward is no fault of the first
            lost[_ADDED] += max(0.0, taken - timing.dense)
            taken = min(taken, timing.dense)
        if key in computed:
            lost[computed[key]] += taken
        elif key in skipped:
            lost[
                f"what {skipped[key]} computes of the steps that it skips", "a cache of whole steps computes less"
            ] += taken
        elif forward.kind == "reduced":
            for cause, seconds in _of_reduced(forward, key, taken, ran):
                lost[cause] += seconds
        else:
            lost[_of_dense(forward, key, ran)] += taken
    lost[_BETWEEN] += sum(forward.before for forward in timing.forwards)
    lost[_OUTSIDE] += timing.whole - timing.elapsed
    shares = sorted(((seconds / timing.whole, cause) for cause, seconds in lost.items()), reverse=True)
    return [f"{share:.0%} {what}; {advice}" for share, (what, advice) in shares if share >= LEAST]


def _of_dense(forward: TimedForward, key: Key, ran: RunCauses) -> Cause:
    """Find the cause for which a forward that no cache could skip was dense."""
    stayed = ran.stayed.get(key)
    if stayed:
        return ran.why_stayed(max(stayed, key=lambda why: stayed[why]))
    steps = 1 + max(other.step_index for other in ran.timing.forwards)
    for name, options in ran.methods.items():
        if any(note.startswith(f"{name} stays dense") for note in ran.notes):
            return "too few tokens for sparse attention to pay", ran.cache_or(f"lower {name}.min_tokens")
        first, last = (whole_steps(options.get(option) or 0, steps) for option in ("dense_steps", "dense_last_steps"))
        within = {
            "dense_steps": forward.step_index < first,
            "dense_last_steps": forward.step_index >= steps - last,
            "dense_above_sigma": options.get("dense_above_sigma") is not None,
        }
        for option in (option for option, acts in within.items() if acts):
            return f"steps that {name} leaves dense", f"lower {name}.{option} = {options[option]}"
    if ran.problem:
        return "forwards in which no method acted", ran.problem
    remark = "; ".join(ran.notes)
    what = "forwards in which no method acted" + (f" ({remark})" if remark else "")
    return what, "loosen the cache that is enabled in diffusers" if ran.cached else "add a step cache"


def _of_reduced(forward: TimedForward, key: Key, taken: float, ran: RunCauses) -> Iterator[tuple[Cause, float]]:
    """Yield each cause of the time that a reduced forward still took, and its seconds."""
    timing, lists = ran.timing, min(forward.lists, taken)
    yield _LISTS, lists
    share = timing.share("attention", forward.kind)
    attention = taken - lists if share is None else max(0.0, share * taken - lists)
    if share is not None:
        text = taken * (timing.share("text", forward.kind) or 0.0)
        yield _TEXT, text
        yield _besides(timing), max(0.0, (1 - share) * taken - text)
    stayed = ran.stayed.get(key, {})
    for why, part in stayed.items():
        yield ran.why_stayed(why), part * attention
    left_dense = max(0.0, ran.dense_layers.get(key, 0.0) - sum(stayed.values()))
    if left_dense:
        names = [name for name, options in ran.methods.items() if options.get("dense_layers")]
        advice = "see the notes"
        if names:
            advice = f"lower {names[0]}.dense_layers = {ran.methods[names[0]]['dense_layers']}"
        what = "attention calls that stayed dense in forwards that were thinned out"
        yield (what, advice), left_dense * attention
    if timing.dense and forward.seconds > 0.9 * timing.dense:
        what = "thinned-out attention in forwards that take as long as dense ones"
        longer = ran.cache_or("generate longer clips or larger pictures, where sparse attention pays")
        yield (what, longer), max(0.0, 1.0 - sum(stayed.values()) - left_dense) * attention


def _besides(timing: Timing) -> Cause:
    """Return the cause of the time that a thinned-out forward takes for all but its self-attention."""
    what = "what is not self-attention (projections, feed-forward, cross-attention to the text)"
    share = timing.share("attention", "dense")
    if share is None or share == 1:
        return what, "a step cache skips it too"
    most = 1 / (1 - share)
    return (
        f"{what}: that is {1 - share:.0%} of a dense forward here",
        f"a step cache skips it too; with sparse attention alone {most:.2f} is the most there is to gain",
    )


def why_computed(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], methods: Options
) -> tuple[dict[Key, Cause], dict[Key, str]]:
    """Find the cause of each computed forward in the caches' logs, and the cache that skipped each of the others."""
    computed: dict[Key, Cause] = {}
    skipped: dict[Key, str] = {}
    for name, log in logs.items():
        above = [
            entry["value"]
            for entry in log
            if not entry["reused"] and entry["reason"] == "measured" and entry["value"] is not None
        ]
        never = not any(entry["reused"] for entry in log)
        half = statistics.median(above) if above else None
        for entry in log:
            key = (entry["transformer"], entry["step_index"], entry["branch"])
            if entry["reused"]:
                skipped[key] = name
            else:
                computed[key] = _cause(name, entry["reason"], methods.get(name, {}), half, never)
    return computed, skipped


def _cause(name: str, reason: str, options: Mapping[str, Any], half: float | None, never: bool) -> Cause:
    def option(key: str) -> str:
        return f"{name}.{key} = {options[key]}" if key in options else f"{name}.{key}"

    if reason == "measured" and options.get("error") is not None:
        raised = f"raise {option('error')}"
        raised += f"; {half:.3g} would skip half of them, at a loss of quality" if half is not None else ""
        return f"steps whose forecast {name} expected to be off by more than its error", raised
    if reason == "measured":
        raised = f"raise {option('threshold')}"
        raised += f"; {half:.3g} would skip half of them, at a loss of quality" if half is not None else ""
        if never:
            return f"{name} never skipped: every step that it measured changed more than its threshold", raised
        return f"steps that changed more than {name}'s threshold", raised
    table: dict[str, Cause] = {
        "first steps": ("first steps, always computed", f"lower {option('warmup_steps')}"),
        "last steps": ("last steps, always computed", f"lower {option('last_steps')}"),
        "few steps": ("a run of few steps, which is computed whole", f"lower {option('min_steps')}"),
        "conditional": ("conditional forwards, always computed", f"set {name}.branches to all"),
        "listed": (
            "steps that are listed to be computed",
            f"list fewer in {option('steps' if 'steps' in options else 'compute_at')}",
        ),
        "full size": ("steps at full size", f"lower {option('until')}, or raise {option('every')}"),
        "threshold 0": (f"{name} skips nothing", f"raise {option('threshold')}"),
        "not a number": (f"steps in which {name} measured no number", "look for nan in the model's outputs"),
        "its own rule": (f"steps that diffusers' {options.get('config')} computed", "loosen its options"),
        "refreshed": (f"steps in which {name} computed every block", f"lower {option('warmup_steps')}"),
    }
    if reason in table:
        return table[reason]
    if re.fullmatch(r"\d+ skipped in a row", reason):
        return f"steps that {name} computes after so many that it skipped", f"raise {option('max_consecutive')}"
    if match := re.fullmatch(r"(\w+) needs it", reason):
        return f"steps that {match[1]} needs computed", f"detach {match[1]}, if {name} serves you better"
    return f"forwards that {name} computed: {reason}", "no option changes this"
