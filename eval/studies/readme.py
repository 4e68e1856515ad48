"""Writes the tables of README.md and docs/ from adapters and results: `python eval/studies/readme.py`."""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import tables
import tables_of_clips as of_clips
from attention_table import page_text as shapes_text
from dit_accel_eval.protocol import committed, power_table, protocol_rules
from dit_accel_eval.runs.results import Line, ResultLine, markdown_table, read_lines, result_lines
from dit_accel_eval.suites.figures import suite_table
from dit_accel_eval.suites.suite import Rung, Suite, clip_words, read_ladder, read_suite, setting_words
from dit_accel_pipelines.generation.solvers import BEST
from method_pages import PAGES as METHOD_PAGES
from method_pages import TABLES as METHOD_TABLES
from preset_table import long_table, short_table
from report_tables import demo_text, report_table, score_words, tuned_text
from site_pages import ROOMS, errors_list, models_table, not_supported_table, reasons_table

SPEED = Path("kernels/bench/results/cpu.jsonl")
PAGES = {
    page: tuple(marks.split())
    for page, marks in {
        "README.md": "demo presets",
        "docs/models.md": "models reasons not-supported",
        "docs/combining.md": "combining",
        "docs/troubleshooting.md": " ".join(f"errors-{room}" for room in ROOMS),
        "docs/evidence/index.md": "report",
        "docs/evidence/kernels-cpu.md": "speed",
        "docs/quality.md": "rivals-wan-tiny rivals-flux-tiny report-wan-tiny report-flux-tiny",
        "docs/generate.md": "quantized",
        "docs/guidance.md": "guidance-cost",
        "docs/kernel-predictions.md": "attention-shapes eight-bit-linears",
        "docs/evaluating.md": "false-verdicts",
        "docs/benchmark.md": "protocol power board-wan-tiny board-flux-tiny",
        "docs/presets.md": "presets preset-levels presets-wan-tiny presets-flux-tiny "
        "few-steps-flux-tiny-4 few-steps-flux-tiny-8 few-steps-wan-tiny-4 "
        "few-steps-wan-tiny-8",
        "docs/scaling.md": "scaling",
        "docs/finetuning.md": "finetuned-wan-plain finetuned-4x-wan-plain",
        "docs/longer.md": "attention-spread positions-cost",
        "docs/evidence/quality.md": "knee-wan-tiny knee-flux-tiny call-error sparse-wan-tiny caches-wan-tiny "
        "caches-time-wan-tiny caches-flux-tiny tuned-flux-tiny held-out-flux-tiny dropped-mass denoising-time overhead "
        "product-time",
        "docs/evidence/caching.md": "budgets",
        "docs/evidence/guidance.md": "every-set-wan-plain every-set-flux-tiny guidance-wan-plain guidance-flux-tiny",
        "docs/evidence/block-caches.md": "profiling-wan-plain profiling-flux-tiny blocks-wan-plain blocks-flux-tiny "
        "blocks-time-wan-plain blocks-time-flux-tiny",
        "docs/frontier.md": "frontier-wan-tiny frontier-flux-tiny staged-flux-sizes-128 staged-flux-sizes-64 "
        "staged-flux-sizes-96 guidance-reuse-wan-tiny",
        "docs/evidence/longer.md": "longer-wan-tiny larger-flux-tiny guided-flux-tiny",
        "docs/evidence/vbench-names.md": "vbench-proxies vbench-wan-plain vbench-flux-tiny",
    }.items()
} | METHOD_PAGES
"""Page -> its tables, by the names of their marks; a suite's name stands for its table."""


LONG = 12
"""Rows of a table from which a page of measurements shows it folded."""

OPEN = ("README.md", "docs/models.md", "docs/combining.md", "docs/troubleshooting.md", *METHOD_PAGES)
"""Pages that are there for their tables."""


def folded(content: str) -> str:
    """Return a text whose long tables open by a click, on GitHub and on the site."""

    def fold(match: re.Match[str]) -> str:
        table = match[0].strip()
        head = f"Table of {len(table.splitlines()) - 2} rows"
        return f'<details markdown="1"><summary>{head}</summary>\n\n{table}\n\n</details>\n'

    return re.sub(rf"(?:^\|.*\n?){{{LONG + 2},}}", fold, content, flags=re.M).rstrip("\n")


def filled(root: Path, page: str) -> str:
    """Return the text of one of `PAGES` with the tables of the committed results between its marks."""
    text = (root / page).read_text()
    for mark in PAGES[page]:
        content = _TABLES[mark](root) if mark in _TABLES else _suite(root, mark)
        content = content if page in OPEN else folded(content)
        text, count = re.subn(
            rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.S
        )
        if count != 1:
            raise ValueError(f"{page} needs one pair of marks <!-- {mark} --> <!-- /{mark} -->, found {count}")
    return text


def main() -> None:
    """Rewrite the pages below the current folder."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    for page in PAGES:
        Path(page).write_text(filled(Path(), page))


def _suite(root: Path, name: str) -> str:
    path = Path(f"eval/suites/{name}.toml")
    command, lines = f"dit-accel eval run {path}", result_lines(root / f"eval/results/{name}.jsonl")
    suite = read_suite(root / path)
    if not lines:
        return f"Not measured yet; `{command}` measures it on {suite.model}."
    command += " --time" if any(line.seconds is not None for line in lines) else ""
    about = _seeds(suite, lines) if suite.judge else _clips(lines)
    drawn = not suite.judge and (root / f"docs/evidence/{name}.png").is_file()
    picture = f"![PSNR over work]({name}.png)\n\n" if drawn else ""
    head = f"`{command}`: {suite.model}, {about}; 95 % intervals."
    head += f" {words}" if not suite.judge and (words := score_words(lines)) else ""
    return f"{head}\n\n{picture}{suite_table(suite, lines)}"


def _rivals(root: Path, model: str) -> str:
    """The best dense runs of each number of steps on the choosing clips, beside UniPC's at the model's own shift."""
    path, command = Path(f"eval/results/rivals-{model}.toml"), f"python eval/studies/best_rival.py --model {model}"
    ladder = read_ladder(root / path)
    rows = [
        [str(rung.num_inference_steps), setting_words(rung.solver, rung.flow_shift), f"{rung.psnr:.1f}",
         f"{rung.tried[BEST]:.1f}", _elsewhere(rung)]
        for rung in ladder.rungs
    ]  # fmt: skip
    heads = "steps | best solver and noise shift | PSNR to converged, dB | UniPC at the model's own shift, dB "
    heads += "| on other prompts, dB"
    clips = clip_words(ladder.first_clip, ladder.clips)
    low, high = ladder.confirmed_on or (0, -1)
    on = f"; other prompts: clips {clip_words(low, high - low + 1)} (`--confirm`)" if high >= low else ""
    return f"`{command}`: {model}, choosing clips {clips}{on}.\n\n{markdown_table(heads, rows)}"


def _elsewhere(rung: Rung) -> str:
    """What a rung came to on prompts that did not choose it, and what was better there if it is not confirmed."""
    best = rung.best_elsewhere
    if best is None:
        return "not confirmed: not run"
    psnr = f"{rung.confirming[setting_words(rung.solver, rung.flow_shift)]:.1f}"
    return psnr if rung.confirmed else f"{psnr}, not confirmed: {best[0]} {best[1]:.1f}"


def _clips(lines: Sequence[ResultLine]) -> str:
    clips, call = len({line.clip for line in lines}), ", ".join(f"{k} {v}" for k, v in lines[0].raw["call"].items())
    timed = next((line.raw for line in lines if line.seconds is not None), None)
    machine = f"; {timed['threads']} threads, {timed['processor']}" if timed else ""
    return f"{clips} held-out clips ({call}{machine})"


def _seeds(suite: Suite, lines: Sequence[ResultLine]) -> str:
    seeds, steps = sorted({line.clip for line in lines}), {arm.num_inference_steps for arm in suite.arms}
    message = f", {min(steps)} UniPC steps" if len(steps) == 1 else ""
    return f"held-out prompts and seeds {seeds[0]} to {seeds[-1]}{message}"


def _speed(root: Path) -> str:
    records = read_lines(root / SPEED)
    first, devices = records[0], dict.fromkeys(record["device"] for record in records)
    head = (
        f"`python kernels/bench/block_sparse.py --out {SPEED}`: {first['threads']} threads, torch {first['torch']}, "
        f"B, H, S, D = {', '.join(map(str, first['shape']))}, tiles of {first['block']}, {first['lists']} lists. Times "
        f"faster than dense SDPA in the same process, and that as a share of 1 / density."
    )
    extra = [record for record in records if record["shape"] != first["shape"] and record["candidate"] == "torch"]
    records = [record for record in records if record["shape"] == first["shape"] and record["candidate"] != "dense"]
    settings = sorted({(row["dtype"], row["density"]) for row in records}, key=lambda row: (row[0] != "fp32", row[1]))
    known: dict[tuple[str, str], dict[tuple[str, float], str]] = defaultdict(dict)
    for record in sorted(records, key=lambda record: list(devices).index(record["device"])):
        cell = f"{record['speedup']:.2f}x ({record['of_ideal']:.2f})"
        known[record["device"], record["candidate"]][record["dtype"], record["density"]] = cell
    rows = [(*place, *(cells.get(setting, "") for setting in settings)) for place, cells in known.items()]
    return f"{head}\n\n{_by_density('candidate', settings, rows)}" + (f"\n\n{_other_sizes(extra)}" if extra else "")


def _by_density(what: str, settings: Sequence[tuple[str, float]], rows: Iterable[Sequence[object]]) -> str:
    heads = (f"{dtype} {density:.2f}" for dtype, density in settings)
    return markdown_table(" | ".join(["processor", what, *heads]), rows)


SHARES = (0.1, 0.25, 0.5, 0.8)


def _other_sizes(records: Sequence[Line]) -> str:
    """The torch backend at other sizes, in columns by the share of `SHARES` that a density is nearest to."""
    columns = [(dtype, share) for dtype in ("fp32", "bf16") for share in SHARES]
    rows: dict[Any, dict[Any, str]] = defaultdict(dict)
    for row in records:
        share = min(SHARES, key=lambda share, row=row: abs(share - row["density"]))
        rows[row["device"], ", ".join(map(str, row["shape"]))][row["dtype"], share] = f"{row['speedup']:.2f}x"
    head = "`torch` at other sizes, tiles as long as D, at the densities nearest to these that so many tiles have:"
    cells = ((*place, *(cells.get(column, "") for column in columns)) for place, cells in rows.items())
    return f"{head}\n\n{_by_density('B, H, S, D', columns, cells)}"


Write = Callable[[list[dict[str, Any]]], str]


def _answered(root: Path, command: str, write: Write, results: str) -> str:
    """What the committed lines of a study say that left the tree, under its command and the tag that has it."""
    return f"`{command}` at the tag `{tables.TAG}`: {write(_lines(root, results))}"


def _lines(root: Path, results: str) -> list[Line]:
    return read_lines(root / f"eval/results/{results}.jsonl")


def _shapes(root: Path) -> str:
    """What calls of released models' sizes take on a CPU, and what share of the tiles Sol keeps of trained models."""
    measured = _answered(root, "python eval/studies/attention_calls.py", shapes_text, "attention-shapes")
    sentence = tables.tiles_kept_by_sol(_lines(root, "call-error"))
    return f"{measured}\n\n{sentence} (`python eval/studies/call_error.py` at the tag `{tables.TAG}`)."


def _choices(root: Path, name: str, profiles: tuple[str, ...]) -> str:
    """Where the choices of profiles come, each criterion by the first profile that tells it of every block."""
    scores: dict[str, list[float]] = {}
    for profile in profiles:
        (entry,) = json.loads((root / f"eval/results/{profile}.json").read_text())["transformers"].values()
        scores |= {key: values for key, values in entry["scores"].items() if key not in scores and None not in values}
    return f"`dit-accel eval run eval/suites/{name}.toml`: {of_clips.block_choices(_lines(root, name), scores)}"


def _budgets(root: Path) -> str:
    names = ("caches-wan-tiny", "caches-flux-tiny", "blocks-flux-tiny")
    suites = [read_suite(root / f"eval/suites/{name}.toml") for name in names]
    return of_clips.budgets([(suite, result_lines(root / f"eval/results/{suite.name}.jsonl")) for suite in suites])


ANSWERED: dict[str, tuple[str, Write]] = {
    **{
        name: (f"python eval/studies/{name.replace('-', '_')}.py", getattr(tables, name.replace("-", "_")))
        for name in (
            "combining", "call-error", "overhead", "attention-spread", "positions-cost", "product-time",
            "eight-bit-linears", "dropped-mass", "guidance-cost", "denoising-time", "false-verdicts",
        )
    },
    "vbench-proxies": ("python eval/studies/vbench_proxies.py", of_clips.vbench_proxies),
    **{
        f"vbench-{model}": (f"dit-accel eval run eval/suites/vbench-{model}.toml", of_clips.vbench_arms)
        for model in ("wan-plain", "flux-tiny")
    },
    **{
        f"every-set-{model}": (f"python eval/studies/every_set.py --model {model}", of_clips.every_set)
        for model in ("wan-plain", "flux-tiny")
    },
    **{
        name: (f"python eval/studies/finetuned.py eval/finetuning/{name}.toml", of_clips.finetuned)
        for name in ("finetuned-wan-plain", "finetuned-4x-wan-plain")
    },
}  # fmt: skip
"""Mark, which names the lines too -> command of a study at `tables.TAG` and how its table is drawn."""

_TABLES: dict[str, Callable[[Path], str]] = {
    "models": models_table,
    "reasons": reasons_table,
    "not-supported": not_supported_table,
    **{f"errors-{room}": partial(errors_list, room=room) for room in ROOMS},
    "protocol": lambda root: protocol_rules(),
    "power": lambda root: power_table(committed()),
    "quantized": lambda root: f"`python eval/studies/quantized.py`: {tables.quantized(_lines(root, 'quantized'))}",
    "presets": short_table,
    "preset-levels": long_table,
    "speed": _speed,
    "demo": demo_text,
    "rivals-wan-tiny": partial(_rivals, model="wan-tiny"),
    "rivals-flux-tiny": partial(_rivals, model="flux-tiny"),
    "report": report_table,
    "tuned-flux-tiny": tuned_text,
    "scaling": lambda root: tables.scaling(_lines(root, "scaling")),
    "attention-shapes": _shapes,
    "budgets": _budgets,
    "profiling-wan-plain": partial(_choices, name="profiling-wan-plain", profiles=("profile-wan-plain",)),
    "profiling-flux-tiny": partial(
        _choices, name="profiling-flux-tiny", profiles=("profile-flux-tiny", "profile-flux-tiny-masked")
    ),
    **{mark: partial(_answered, command=entry[0], write=entry[1], results=mark) for mark, entry in ANSWERED.items()},
    **METHOD_TABLES,
}


if __name__ == "__main__":
    main()
