"""What lines of `attention_calls` come to: the table, and from which length on sparse attention pays by the clock."""

from collections.abc import Iterable, Sequence

from dit_accel_eval.runs.results import Line, markdown_table

DENSE = "dense SDPA"
SPARSE = "sparse"

KEY = ("family", "height", "width", "num_frames", "heads", "dtype", "arm", "threads", "torch", "device")
"""What tells one line from another; of lines that are alike in it the last one counts."""

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


def last_of(lines: Iterable[Line]) -> list[Line]:
    """Return of lines that are of one call on one machine the last, a measured one before one that was left out."""
    found: dict[tuple[object, ...], Line] = {}
    for line in lines:
        key = tuple(line[name] for name in KEY)
        if "reason" not in line or "reason" in found.get(key, {"reason": ""}):
            found[key] = line
    return sorted(found.values(), key=lambda line: (line["tokens"], line["shape"], line["dtype"] != "float32"))


def run_ratio(line: Line) -> float:
    """Return how many times as fast a run of the model's usual steps would be by a block's measured gain."""
    dense = line.get("dense_share", 1.0)
    return 1 / (dense + (1 - dense) / line["block_ratio"])


def cells(line: Line) -> tuple[str, ...]:
    """Return a line's cells under `COLUMNS`; what was left out has its reason in the last one."""
    first = (line["shape"], f"{line['tokens']:,}", line["dtype"], line["arm"], _presets(line))
    if "reason" in line:
        return (*first, *[""] * 6, f"left out: {line['reason']}")
    dense = line["arm"] == DENSE
    predicted = (line.get("predicted"), line.get("predicted_by_table"))
    return (
        *first, f"{line['density']:.3f}", "{median:.3g} [{low:.3g}, {high:.3g}]".format(**line["seconds"]),
        "" if dense else "{median:.2f} [{low:.2f}, {high:.2f}]".format(**line["ratio"]),
        *("" if one is None else f"{one:.2f}" for one in predicted),
        *("" if dense else f"{one:.2f}" for one in (line["block_ratio"], run_ratio(line))),
    )  # fmt: skip


def _presets(line: Line) -> str:
    """Return which presets compute such a call so, and which would if their rule did not keep it dense."""
    return "; ".join(level if rule == SPARSE else f"{level}: {rule}" for level, rule in line["presets"].items())


def shapes_in(lines: Iterable[Line]) -> str:
    """Return what the names of shapes stand for, in the order of the lines."""
    meant: dict[str, str] = {}
    for line in lines:
        size = " x ".join(str(line[name]) for name in ("height", "width", "num_frames") if line[name] > 1)
        heads = f"{line['heads']} of its {line['all_heads']} heads of {line['head_dim']}"
        meant[line["shape"]] = f"{line['shape']} is {line['family']} at {size}, {heads}"
    return "; ".join(meant.values())


def machine_of(line: Line) -> str:
    """Return where a line was measured."""
    return f"{line['device']}, {line['threads']} threads, torch {line['torch']}"


def page_text(lines: Sequence[Line]) -> str:
    """Return the table of all lines in Markdown, machine by machine, with what follows from it."""
    parts, found = [], last_of(lines)
    for machine in dict.fromkeys(machine_of(line) for line in found):
        own = [line for line in found if machine_of(line) == machine]
        parts += [
            f"{conditions(own)} {EXPLAINED}",
            markdown_table(" | ".join(COLUMNS), map(cells, own)),
            *verdicts(own),
        ]
    return "\n\n".join(parts)


def conditions(lines: Sequence[Line]) -> str:
    """Return in two sentences what was measured and where, of lines of one machine."""
    rounds = sorted({line["rounds"] for line in lines if "rounds" in line})
    count = f" rounds: {' to '.join(map(str, rounds[:: max(1, len(rounds) - 1)]))};" if rounds else ""
    busy = [line["load"] for line in lines if line.get("load") is not None]
    load = f" The system's load before the measurement was {max(busy):.1f} at most." if busy else ""
    return f"{machine_of(lines[0])};{count} standard normal inputs; {shapes_in(lines)}.{load}"


def verdicts(lines: Sequence[Line]) -> list[str]:
    """Return in a sentence for each dtype from how many tokens on sparse attention pays, against the presets' rule."""
    curves: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if "ratio" in line and line.get("min_tokens") and line["backend"] == "auto":
            curves.setdefault((line["arm"], line["dtype"]), []).append(line)
    first = next(iter(curves), ("", ""))[0]  # a further preset's beta moves the figures, not the answer
    return [_verdict(arm, dtype, curve) for (arm, dtype), curve in curves.items() if arm == first]


def _verdict(arm: str, dtype: str, curve: Sequence[Line]) -> str:
    """Return the sentence of one curve, which is sorted by tokens."""
    points = ", ".join(f"{line['visual_tokens']:,}: {line['ratio']['median']:.1f} / {run_ratio(line):.2f}"
                     for line in curve)  # fmt: skip
    least = curve[0]["min_tokens"]
    below = [line for line in curve if line["visual_tokens"] < least]
    above = [line for line in curve if line["visual_tokens"] >= least]
    paying = [line for line in below if run_ratio(line) >= PAYS]
    failing = [line for line in above if run_ratio(line) < PAYS]
    parts = [f"{arm}, {dtype}, times dense SDPA in a call / in a run, by visual tokens: {points}."]
    if paying:
        parts.append(
            f"By the clock alone the presets' {least:,} is too high on this machine: a run would be at least {PAYS:g} "
            f"times as fast at {_tokens(paying)} too."
        )
    elif below:
        parts.append(f"Below the presets' {least:,} no measured run would be {PAYS:g} times as fast, as the rule says.")
    if failing:
        parts.append(f"At {_tokens(failing)} the rule switches it on, and a run would not be {PAYS:g} times as fast.")
    elif above:
        parts.append(f"From {least:,} on all that was measured pays.")
    return " ".join(parts)


def _tokens(lines: Sequence[Line]) -> str:
    return " and ".join(f"{line['visual_tokens']:,}" for line in lines)
