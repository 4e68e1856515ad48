"""Print what the roofline predicts for calls on cards, beside measurements, and write the page of predictions.

`python kernels/bench/predictions.py` prints a table from the compile table, without a card; `--measured` takes the JSON
lines of gpu.py. With `--page docs/kernel-predictions.md` it writes that page's tables instead.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from cards import CARDS, TARGETS, Card
from goals import goals
from mixes import KINDS, TABLE, Table, mixes_of, read_mix, read_table
from roofline import ENGINES, SHAPES, Found, Shape, predict, predict_call, predict_dense

TRIED = TABLE.with_name("tried.jsonl")
TOLD_CARDS = ("A100", "H100", "B200", "RTX 4090")
TOLD_CALLS = (("Wan 720p at .27", "wan-720p", 0.27), ("128k at .10", "128k", 0.1))
POOLED = "fwd-bf16-d128-b128-pooled"
Rows = list[list[str]]


def read_tried(variant: str, path: Path = TRIED) -> Table:
    """The records of a variant that tried.py compiled."""
    found = [record for record in map(json.loads, path.read_text().splitlines()) if record["variant"] == variant]
    return {(record["launch"], record["target"]): record for record in found}


def measured(path: Path | None, shape: str, card: str, candidate: str, density: float) -> float | None:
    """Median seconds that gpu.py's JSON lines hold for a call on this card (the last of them), None without any."""
    found = None
    for record in map(json.loads, path.read_text().splitlines()) if path else ():
        here = record.get("kind", "time") == "time" and card in record["device"] and record["shape"] == shape
        if here and (record["candidate"], record["density"]) == (candidate, density):
            found = record.get("seconds")
    return found


def markdown(head: list[str], rows: Rows) -> str:
    """A table, its first column to the left and the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _span(low: float, high: float, digits: int = 2) -> str:
    low, high = sorted((low, high))
    return f"{low:.{digits}f} to {high:.{digits}f}"


def instructions(table: Table, gathered: Table) -> str:
    """What a logit takes in the loops over exact and pooled tiles, by target."""
    plain, small = "fwd-bf16-d128-b128-plain", "fwd-bf16-d128-b64-plain"
    rows = []
    for target in TARGETS:
        found: list[tuple[str, Table, str, str]] = [
            ("exact", table, plain, "mix"), ("exact, tiles of 64", table, small, "mix"),
            ("pooled", table, POOLED, "pooled"), ("pooled, gathered", gathered, POOLED, "pooled"),
        ]  # fmt: skip
        for name, source, launch, loop in found:
            if (launch, target) in source:
                turn = source[launch, target][loop]
                mix = read_mix(source, launch, target, loop)
                counts = (f"{turn['instructions']}", f"{turn['rows']} x {turn['columns']}")
                each = (f"{mix.plain:.1f}", f"{mix.fp32:.1f}", f"{mix.exp2:.2f}", f"{mix.shared:.1f}")
                rows.append([f"{target}, {name}", *counts, *each])
    return markdown(["loop", "instructions", "logits", "plain", "of it fp32", "exp2", "shared bytes"], rows)


def times(table: Table, gathered: Table) -> str:
    """Milliseconds of every engine for the told calls on the told cards."""
    rows = []
    for name, shape, density in TOLD_CALLS:
        for card in (CARDS[card] for card in TOLD_CARDS):
            for rest, found in _predictions(SHAPES[shape], density, card, table, gathered):
                dense = predict_dense(SHAPES[shape], card)
                faster = "" if dense is None or "backward" in rest else _span(
                    dense / found["bound"], dense / found["serial"], 1
                )  # fmt: skip
                cells = [_milliseconds(found[engine]) for engine in ENGINES]
                ends = [_milliseconds(found["bound"]), found["limit"], _milliseconds(found["serial"])]
                rows.append([f"{name}, {card.name}", rest, *cells, *ends, faster])
    return markdown(["call", "rest", *ENGINES, "bound", "by", "serial", "x dense"], rows)


def _predictions(shape: Shape, density: float, card: Card, table: Table, gathered: Table) -> list[tuple[str, Found]]:
    """Predictions of one call with its rest skipped, pooled as before and as now, and of its backward."""
    now = [
        (rest, predict_call(shape, candidate, density, card, table))
        for rest, candidate in (("skipped", "triton"), ("pooled", "triton-pooled"), ("backward", "triton-backward"))
    ]
    mixes = mixes_of(POOLED, card.target, gathered)
    before = predict(shape, density, card, mixes, pooled=1 - density, gathered=True)
    found = [now[0], ("pooled, gathered", before), *now[1:]]
    return [(rest, prediction) for rest, prediction in found if prediction is not None]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"


def goal_table(table: Table) -> str:
    """Every goal with its prediction by card; where it can't be met, the better end of the prediction."""
    rows = []
    for block, names in ((128, None), (64, ("with pooled rest over without",))):
        found = {name: goals([], CARDS[name], table, block) for name in TOLD_CARDS}
        for each in zip(*found.values(), strict=True):
            if names is None or each[0].name in names:
                cells = [
                    "" if goal.predicted is None or goal.best is None
                    else _span(goal.predicted[0], goal.predicted[1])
                    + (f"; dropped, {goal.best:.3f} at best" if goal.limit is not None and not goal.possible else "")
                    for goal in each
                ]  # fmt: skip
                name = each[0].name + (f", tiles of {block}" if block != 128 else "")
                rows.append([name, each[0].asked.replace("<", "&lt;").replace(">", "&gt;"), *cells])
    return markdown(["ratio", "goal", *TOLD_CARDS], rows)


def tiles(table: Table) -> str:
    """Time at tiles of 64 over that at tiles of 128, for Wan 720p routed at .16 with the rest pooled, by card."""
    rows = []
    for card in CARDS.values():
        shape, found = SHAPES["wan-720p"], []
        for block in (128, 64):
            prediction = predict_call(replace(shape, block=block), "triton-routed", 0.16, card, table)
            assert prediction is not None
            found.append(prediction)
        ratios = [f"{found[1][end] / found[0][end]:.2f}" for end in ("bound", "serial")]
        rows.append([card.name, *ratios, found[0]["limit"], found[1]["limit"]])
    return markdown(["card", "by bound", "by serial", "slowest engine at 128", "at 64"], rows)


def tried(table: Table, lazy: Table, specialised: Table) -> str:
    """Instructions of a turn, and the ends of the prediction for Wan 720p at .27, as they are and as tried."""
    rows = []
    for name, variant in (("lazy rescale", lazy), ("warps specialised", specialised)):
        for (launch, target), record in variant.items():
            tile = launch.split("-")[3]
            head = [f"{name}, {target}, tiles of {tile.removeprefix('b')}"]
            now = table[launch, target]
            if "error" in record:
                rows.append([*head, str(now["mix"]["instructions"]), "does not compile", *[""] * 4])
                continue
            mix = record["mix"]
            ends = [_ends(source, launch, target) for source in (table, variant)]
            rows.append([
                *head, str(now["mix"]["instructions"]), f"{mix['every']} + {mix['behind']}",
                f"{now['mix']['barriers']} / {mix['barriers']}",
                f"{now['registers']} / {record['registers']}",
                *(f"{a:.1f} / {b:.1f}" for a, b in zip(*ends, strict=True)),
            ])  # fmt: skip
    head = ["variant", "now", "tried, every turn + rarely", "waits", "registers", "bound, ms", "serial, ms"]
    return markdown(head, rows)


def _ends(table: Table, launch: str, target: str) -> tuple[float, float]:
    """Milliseconds of bound and serial for Wan 720p at .27 on the first card of a target."""
    card = next(card for card in CARDS.values() if card.target == target)
    found = predict(SHAPES["wan-720p"], 0.27, card, {"exact": read_mix(table, launch, target)})
    return found["bound"] * 1e3, found["serial"] * 1e3


def page(text: str, table: Table) -> str:
    """The page of predictions with its tables made anew.

    Raises ValueError where it lacks the marks of a table.
    """
    gathered = read_tried("gathered")
    parts = {
        "instructions": instructions(table, gathered),
        "times": times(table, gathered),
        "goals": goal_table(table),
        "tiles": tiles(table),
        "tried": tried(table, read_tried("lazy"), read_tried("specialised")),
    }
    for name, part in parts.items():
        marks = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(marks, lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the page needs one pair of marks <!-- {name} --> <!-- /{name} -->, found {count}")
    return text


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=",".join(SHAPES), help="comma list (default %(default)s)")
    parser.add_argument("--card", default=",".join(CARDS), help="comma list (default %(default)s)")
    parser.add_argument("--density", default="0.1,0.27,0.5,1.0", help="comma list of kept shares (default %(default)s)")
    parser.add_argument("--candidate", default="triton", choices=KINDS, help="as in gpu.py (default %(default)s)")
    parser.add_argument("--measured", type=Path, help="JSON lines of gpu.py, to be shown beside the prediction")
    parser.add_argument("--table", type=Path, default=TABLE, help="JSON lines of aot.py (default %(default)s)")
    parser.add_argument("--out", type=Path, help="write one JSON line a row to this file")
    parser.add_argument("--page", type=Path, help="write this page's tables, and print none")
    return parser.parse_args()


def pick(names: str, known: dict[str, Any], option: str) -> list[Any]:
    """The named entries; an unknown name ends the program with the known ones."""
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise SystemExit(f"--{option} takes {', '.join(known)}: found {', '.join(unknown)}")
    return [known[name] for name in names.split(",")]


def main() -> None:
    """Print the table and write the records, or write the page."""
    args = arguments()
    compiled = read_table(args.table)
    if args.page:
        args.page.write_text(page(args.page.read_text(), compiled))
        return
    rows, records = [], []
    for shape in pick(args.shape, SHAPES, "shape"):
        for card in pick(args.card, CARDS, "card"):
            for density in map(float, args.density.split(",")):
                found = predict_call(shape, args.candidate, density, card, compiled)
                if found is None:
                    continue
                took = measured(args.measured, shape.name, card.name, args.candidate, density)
                called = {"shape": shape.name, "card": card.name, "candidate": args.candidate, "density": density}
                records.append({**called, **found, "measured": took})
                cells = [f"{found[name] * 1e3:.2f}" for name in (*ENGINES, "bound", "serial")]
                last = [found["limit"], "" if took is None else f"{took * 1e3:.2f}"]
                rows.append([f"{shape.name} {card.name} {density:g}", *cells, *last])
    print(f"{args.candidate}: milliseconds; the slowest engine (limit) and latency are the bound")
    print(markdown(["call", *ENGINES, "bound", "serial", "limit", "measured"], rows))
    if args.out:
        args.out.write_text("".join(json.dumps(record) + "\n" for record in records))


if __name__ == "__main__":
    main()
