"""What a report says of a file of results: the figures of every arm and declared pair, its warnings; of two, a diff."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel import ConfigError
from dit_accel.methods.base import Phase
from dit_accel.methods.registry import handlers

from ..metrics.registered import DYNAMICS, FLOOR
from ..runs.clip_files import LOSSLESS
from ..runs.results import ITSELF, TIMED, WORKS, ResultLine, markdown_table
from ..statistics import FEWEST, judge
from ..suites.figures import ArmFigures, Comparison, PairFigures, pair_figures, reference_words, rival_words
from ..suites.suite import Pair, read_suite
from .lines import ONE, Results, read_results

HALF = 10 * math.log10(2)  # dB below the encoding's own PSNR at which half of the squared error is the encoding's
WORDS = {"ahead": "better", "behind": "worse"}  # verdict of a change -> what it is called here
LISTED = 8  # names that a warning lists, before it counts the rest


@dataclass(frozen=True, kw_only=True)
class SuiteReport:
    """What the pages are written from."""

    results: Results
    comparison: Comparison
    arms: tuple[ArmFigures, ...]
    settings: Mapping[str, ResultLine]
    prompts: Mapping[int, str]
    warnings: tuple[str, ...]
    pairs: tuple[PairFigures, ...]
    suite: str

    @property
    def name(self) -> str:
        """The suite's name."""
        return self.results.name

    @property
    def further(self) -> list[str]:
        """The metrics besides PSNR, SSIM and the score, as they first appear."""
        return list(dict.fromkeys(name for line in self.results.lines for name in line.metrics))

    @property
    def works(self) -> dict[str, str]:
        """Key -> in words, of the kinds of work, and time where it was measured, by which arms are made equal."""
        known = WORKS | TIMED
        works = {key: words for key, words in known.items() if any(key in arm.means for arm in self.arms)}
        return works or {"work": known["work"]}  # where no reference converged, no arm is judged

    @property
    def main(self) -> str:
        """The kind by which arms are ordered first: time where every arm was timed, else own work."""
        timed = "steps_in_time" in self.works and all("steps_in_time" in arm.means for arm in self.judged)
        return "steps_in_time" if timed else "work"

    @property
    def of_folders(self) -> bool:
        """Whether `eval folders` measured clips in files, of which only the time may be known."""
        return self.results.lines[0].of_folder

    @property
    def own(self) -> bool:
        """Whether arms are compared with the model's own steps instead of a converged run."""
        return self.results.lines[0].reference_agreement == ITSELF

    @property
    def full_steps(self) -> int:
        """The dense steps over which speed-ups are given: the model's own, else the most that any run took."""
        lines = self.results.lines
        return lines[0].reference_steps if self.own else max(line.num_inference_steps for line in lines)

    @cached_property
    def judged(self) -> list[ArmFigures]:
        """The arms under test: all but the dense runs, or those if there are no others."""
        return [arm for arm in self.arms if not self.is_dense(arm)] or list(self.arms)

    def lines_of(self, arm: ArmFigures) -> list[ResultLine]:
        """Return the lines of an arm."""
        return [line for line in self.results.lines if line.arm == arm.name]

    def is_dense(self, arm: ArmFigures) -> bool:
        """Whether an arm is a dense run of the best solver, which others are compared with."""
        return self.settings[arm.name].is_rival

    def leads(self, arm: ArmFigures, metric: str = "psnr") -> dict[int, float]:
        """Return clip -> how far an arm's metric is above that of the dense run of equal `main`."""
        return self.comparison.leads(arm.name, self.main, metric)

    def worst_first(self) -> list[int]:
        """Return the clips, those first at which the arms' mean PSNR is lowest."""
        psnrs: dict[int, list[float]] = {clip: [] for clip in self.prompts}
        for arm in self.judged:
            for line in self.lines_of(arm):
                psnrs[line.clip].append(line.psnr)
        return sorted(psnrs, key=lambda clip: float(np.mean(psnrs[clip] or [np.inf])))


def suite_report(results: Results, suite: Path | None = None) -> SuiteReport:
    """Return the report of result lines and of their suite's TOML; None: the one that lies beside them, if any."""
    lines, folder, near = results.lines, results.path.resolve().parent, f"{results.name}.toml"
    comparison, listed = Comparison(lines), list(dict.fromkeys(line.arm for line in lines if not line.is_rival))
    arms = tuple(comparison.figures(listed))
    prompts = {line.clip: line.prompt for line in sorted(lines, key=lambda line: line.clip)}
    warnings, pairs, text = list(_warnings(results, arms)), list[PairFigures](), ""
    path = suite or next(filter(Path.is_file, (folder / near, folder.parent / "suites" / near)), None)
    try:
        read = read_suite(path) if path else None
    except ConfigError as error:
        if suite:
            raise
        warnings.append(f"Pairs that the suite may declare are not shown: {error}.")
        read = None
    if path and read and read.name == results.name:
        pairs, text = pair_figures(read.pairs, lines, read.reference_steps), path.read_text(encoding="utf-8")
    if lines[0].of_folder and not comparison.curve:
        rivals = dict.fromkeys(line.arm for line in lines if line.is_rival)  # no seconds are known: each with each
        pairs = pair_figures([Pair(arm=arm, against=rival) for arm in listed for rival in rivals], lines, 1)
    return SuiteReport(
        results=results, comparison=comparison, arms=arms, settings={line.arm: line for line in reversed(lines)},
        prompts=prompts, warnings=tuple(warnings), pairs=tuple(pairs), suite=text,
    )  # fmt: skip


def suite_reports(paths: Sequence[Path], suites: Sequence[Path] = ()) -> list[SuiteReport]:
    """Return the reports of files of result lines, each with the suite of its name among those that are given."""
    read, by_name = [read_results(path) for path in paths], {read_suite(path).name: path for path in suites}
    names = [results.name for results in read]
    for name in by_name:
        if name not in names:
            raise ConfigError(f"--suite {name!r} is none of {', '.join(names)}, whose results these are; leave it out")
    return [suite_report(results, by_name.get(results.name)) for results in read]


def quantile_clips(lines: Sequence[ResultLine]) -> tuple[ResultLine, ResultLine]:
    """Return an arm's worst line by PSNR, and its median one; of an even number the lower of the two in the middle."""
    ranked = sorted(lines, key=lambda line: line.psnr)
    return ranked[0], ranked[(len(ranked) - 1) // 2]


def _warnings(results: Results, arms: Sequence[ArmFigures]) -> Iterator[str]:
    lines = results.lines
    if results.cut:
        yield "The last line of the results was cut off and is left out; the run may have been stopped."
    listed = {line.arm for line in lines if not line.is_rival}
    judging = {line.clip for line in lines if line.is_converged}
    missing = [f"{arm.name} ({arm.clips} of {len(judging)})" for arm in arms
               if arm.name in listed and arm.clips < len(judging)]  # fmt: skip
    if missing:
        yield f"Clips are missing, so means are not over the same prompts: {_some(missing)}."
    yield from reference_words(lines)
    if len(judging) < FEWEST:
        yield f"With {len(judging)} clips there is no verdict; it takes {FEWEST}."
    yield from filter(None, [rival_words(lines)])
    yield from _of_folders(lines, arms) if lines[0].of_folder else ()
    yield from _guided(lines)
    yield from _moved(arms)
    yield from _unmeasured(lines)
    for key in ("torch", "diffusers", "dit_accel", "protocol"):
        versions = sorted({str(line.raw[key]) for line in lines if key in line.raw})
        if len(versions) > 1:
            yield f"The runs are of several versions of {key}: {', '.join(versions)}."


def _of_folders(lines: Sequence[ResultLine], arms: Sequence[ArmFigures]) -> Iterator[str]:
    """Say which arms no rival equals in time, and what encoding with loss does to clips in files."""
    tested = [arm for arm in arms if any(line.arm == arm.name and not line.is_rival for line in lines)]
    if not any("steps_in_time" in arm.means for arm in arms):
        yield "No seconds are known, so nothing is held at equal time: each arm is held against each rival."
    else:
        lone = [f"{arm.name} ({arm.clips - count} of {arm.clips} clips)" for arm in tested
                if (count := arm.ahead["steps_in_time"].count if arm.ahead else 0) < arm.clips]  # fmt: skip
        yield from [f"Faster or slower than every rival, so not judged there: {_some(lone)}."] if lone else []
    floors = {arm.name: (arm.psnr.mean, arm.metrics[FLOOR].mean) for arm in arms if FLOOR in arm.metrics}
    if floors:
        near = [name for name, (psnr, floor) in floors.items() if floor - psnr < HALF]
        most = f"; most of the error is the encoding's of {_some(near)}" if near else ""
        highest = max(floor for _, floor in floors.values())
        yield f"Clips are encoded with loss, which alone leaves {highest:.1f} dB at most ({FLOOR}){most}."
    lossy = {line.raw["encoding"] for line in lines if FLOOR not in line.metrics} - {LOSSLESS}
    yield from [f"How much is lost by encoding as {', '.join(sorted(lossy))} is not known here."] if lossy else []


def _guided(lines: Sequence[ResultLine]) -> Iterator[str]:
    """Name the arms of which PSNR is no measure."""
    seeking = {name for name, handler in handlers().items() if handler.phase == Phase.GUIDANCE}
    arms = dict.fromkeys(
        line.arm for line in lines if seeking & {*line.methods} or {"guider", "arm_call"} & {*line.raw}
    )
    if arms:
        text = _some([*arms])
        yield f"Guidance seeks other clips than the converged run; judge these by their prompts, not by PSNR: {text}."


def _moved(arms: Sequence[ArmFigures]) -> Iterator[str]:
    """Name the arms that do not move as their references do."""
    changed = [
        f"{arm.name} {arm.dynamic_words(name)} ({DYNAMICS[name].head} {moved.mean:+.1f} points)"
        for arm in arms
        for name, moved in arm.dynamics.items()
        if moved.verdict in ("ahead", "behind")
    ]
    if changed:
        yield f"PSNR does not tell motion from stillness. Beside their references: {'; '.join(changed)}."


def _unmeasured(lines: Sequence[ResultLine]) -> Iterator[str]:
    """Say which metrics are missing, and why."""
    clips: dict[tuple[str, str], set[int]] = {}
    for line in lines:
        for missing in (*line.skipped.items(), *line.unavailable.items()):
            clips.setdefault(missing, set()).add(line.clip)
    together: dict[tuple[str, int], list[str]] = {}
    for (name, reason), where in clips.items():
        together.setdefault((reason, len(where)), []).append(name)
    for (reason, count), names in together.items():
        was, on = "was" if len(names) == 1 else "were", "1 clip" if count == 1 else f"{count} clips"
        yield f"{_some(names)} {was} skipped on {on}: {reason}."


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def diff_of(before: SuiteReport, after: SuiteReport) -> list[dict[str, Any]]:
    """Return an entry an arm that either report judges, those of the first in its order, then the new ones.

    ``before`` and ``after`` hold its PSNR in dB, the dense steps that it costs by time, else own work, and its verdict
    against fewer steps; ``clips`` counts those that both have with the same prompt, ``psnr_change`` is over these.
    """
    reports = (before, after)
    sides = [{arm.name: arm for arm in report.judged} for report in reports]
    first, second = ({line.key: line.psnr for line in report.results.lines} for report in reports)
    same = [clip for clip, prompt in before.prompts.items() if after.prompts.get(clip) == prompt]
    both = first.keys() & second.keys()
    changes = {
        name: [second[name, clip] - first[name, clip] for clip in same if (name, clip) in both]
        for name in dict.fromkeys([*sides[0], *sides[1]])
    }
    judged, entries = judge(changes), []
    for name, gaps in changes.items():
        words = "same" if not any(gaps) else WORDS.get(judged[name].verdict, judged[name].verdict)
        entries.append({
            "name": name, "before": _side(before, sides[0].get(name)), "after": _side(after, sides[1].get(name)),
            "clips": len(gaps), "psnr_change": asdict(judged[name]) if gaps else None, "change": words if gaps else "",
        })  # fmt: skip
    return entries


def _side(report: SuiteReport, arm: ArmFigures | None) -> dict[str, Any] | None:
    if arm is None:
        return None
    key = report.main if report.main in arm.means else next((key for key in report.works if key in arm.means), "")
    verdict = arm.ahead[key].verdict if key in arm.ahead else ""
    cost = {"steps": arm.means.get(key), "by": report.works.get(key, "")}
    return {"psnr": arm.psnr.mean, **cost, "verdict": verdict}


def others_of(before: SuiteReport, after: SuiteReport) -> list[str]:
    """Return what the two files do not share, so that a difference may come from it: the model, the call, versions."""
    first, second = before.results.lines[0].raw, after.results.lines[0].raw
    keys = (*ONE, "torch", "diffusers", "dit_accel", "device", "threads", "protocol")
    texts = [f"{key} {first.get(key)!r}, then {second.get(key)!r}" for key in keys if first.get(key) != second.get(key)]
    if before.prompts != after.prompts:
        texts.append(f"{len(before.prompts)} prompts, then {len(after.prompts)}")
    return texts


def diff_markdown(entries: Sequence[dict[str, Any]]) -> str:
    """Return the entries as a Markdown table, before and after in one cell."""
    rows = []
    for entry in entries:
        sides, change, words = [entry["before"], entry["after"]], entry["psnr_change"], entry["change"]
        if change and words != "same":
            ends = "" if change["low"] is None else f"[{change['low']:+.2f}, {change['high']:+.2f}] "
            words = f"{change['mean']:+.2f} {ends}{words}"
        kinds = dict.fromkeys(side["by"] for side in sides if side)
        cells = [
            " → ".join(dict.fromkeys(form.format(side[key]) if side and side[key] else "–" for side in sides))
            for key, form in (("psnr", "{:.2f}"), ("steps", "{:.2f}"), ("verdict", "{}"))
        ]
        rows.append((entry["name"], cells[0], words, f"{cells[1]} ({', then '.join(kinds)})", cells[2]))
    return markdown_table("arm | PSNR, dB | change, dB | dense steps' cost | verdict against fewer steps", rows)
