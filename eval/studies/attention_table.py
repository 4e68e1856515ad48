"""What lines of the study `attention_calls`, which is answered, come to: where sparse attention pays by the clock."""

from collections.abc import Sequence

from dit_accel_eval.runs.results import Line, markdown_table

DENSE = "dense SDPA"

PAYS = 1.1
"""A run that is so many times as fast is worth an approximation: less than that nobody sees."""

COLUMNS = ("shape", "tokens", "dtype", "call", "preset", "exact", "seconds", "x dense", "plan", "table", "block", "run")
"""Heads of the table; `EXPLAINED` says what they mean."""

EXPLAINED = (
    "`exact`: share of the tiles that are computed key by key; `seconds` of one call, median and quartiles of the "
    "rounds; `x dense`: dense SDPA's seconds over them. `plan`: what `dit-accel plan` predicts of such a call on any "
    "machine; `table`: what the kernels' own table predicts on this kind of processor. `block`: what a whole block "
    "would gain, with all heads, and its other layers by their FLOPs at the rate that the feed-forward reached; `run`: "
    "that over a run, whose first steps and first layer the preset leaves dense."
)


def page_text(lines: Sequence[Line]) -> str:
    """Return the table of all lines in Markdown, how they were measured, and what follows from them."""
    lines = sorted(lines, key=lambda line: (line["tokens"], line["shape"], line["dtype"] != "float32"))
    first, shapes = lines[0], dict[str, str]()
    for line in lines:
        size = " x ".join(str(line[name]) for name in ("height", "width", "num_frames") if line[name] > 1)
        heads = f"{line['heads']} of its {line['all_heads']} heads of {line['head_dim']}"
        shapes[line["shape"]] = f"{line['shape']} is {line['family']} at {size}, {heads}"
    conditions = (
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}; rounds: {first['rounds']}; standard "
        f"normal inputs; {'; '.join(shapes.values())}. The system's load before the measurement was "
        f"{max(line['load'] for line in lines):.1f} at most."
    )
    table = markdown_table(" | ".join(COLUMNS), map(cells, lines))
    curves: dict[str, list[Line]] = {}  # a further preset's beta moves the figures, not the answer
    for line in lines:
        if line["arm"] == "sol, beta 1":
            curves.setdefault(line["dtype"], []).append(line)
    return "\n\n".join([f"{conditions} {EXPLAINED}", table, *map(verdict, curves.values())])


def run_ratio(line: Line) -> float:
    """Return how many times as fast a run of the model's usual steps would be by a block's measured gain."""
    dense = line.get("dense_share", 1.0)
    return 1 / (dense + (1 - dense) / line["block_ratio"])


def cells(line: Line) -> tuple[str, ...]:
    """Return a line's cells under `COLUMNS`; what was left out has its reason in the last one."""
    presets = (level if rule == "sparse" else f"{level}: {rule}" for level, rule in line["presets"].items())
    first = (line["shape"], f"{line['tokens']:,}", line["dtype"], line["arm"], "; ".join(presets))
    if "reason" in line:
        return (*first, *[""] * 6, f"left out: {line['reason']}")
    dense = line["arm"] == DENSE
    predicted = (line.get("predicted"), line.get("predicted_by_table"))
    return (
        *first, f"{line['density']:.3f}", "{median:.3g} [{low:.3g}, {high:.3g}]".format(**line["seconds"]),
        "" if dense else "{median:.2f} [{low:.2f}, {high:.2f}]".format(**line["ratio"]),
        *("" if value is None else f"{value:.2f}" for value in predicted),
        *("" if dense else f"{value:.2f}" for value in (line["block_ratio"], run_ratio(line))),
    )  # fmt: skip


def verdict(curve: Sequence[Line]) -> str:
    """Return from how many tokens on a call pays, against the presets' rule, of lines of one dtype by tokens."""
    points = ", ".join(f"{line['visual_tokens']:,}: {line['ratio']['median']:.1f} / {run_ratio(line):.2f}"
                     for line in curve)  # fmt: skip
    first, least = curve[0], curve[0]["min_tokens"]
    paying = [
        f"{line['visual_tokens']:,}" for line in curve if run_ratio(line) >= PAYS and line["visual_tokens"] < least
    ]
    return (
        f"{first['arm']}, {first['dtype']}, times dense SDPA in a call / in a run, by visual tokens: {points}. By the "
        f"clock alone the presets' {least:,} is too high on this machine: a run would be at least {PAYS:g} times as "
        f"fast at {' and '.join(paying)} too. From {least:,} on all that was measured pays."
    )
