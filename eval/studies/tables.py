"""Tables of studies that left the tree once their question was answered, drawn from the lines that they left behind.

Each function returns what a page says of one study's lines, without the command that made them: `readme.ANSWERED` names
it. To run such a study again, check out `TAG`, which has all of them.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from dit_accel_eval.runs.results import Line, markdown_table
from scipy import stats

from dit_accel.methods.registry import methods

TAG = "studies-2026-12"
"""The tag at which the studies can be run."""


def drawn(lines: Sequence[Line], columns: Mapping[str, str]) -> str:
    """Return a Markdown table, a row a line, of columns: head -> the format of its cell, by the line's keys."""
    return markdown_table(" | ".join(columns), ([cell.format_map(line) for cell in columns.values()] for line in lines))


def attention_spread(lines: Sequence[Line]) -> str:
    """How far attention spreads beyond the trained size, by size and arm."""
    head = (
        "{prompts} held-out prompts, {steps} UniPC steps, the second and the middle one of them; {rows} rows of every "
        "head and layer, torch {torch}."
    )
    columns = {
        "model": "{model}", "times the trained size": "{size:g}", "arm": "{arm}", "tokens": "{tokens}",
        "their logarithm": "{most_entropy:.2f}", "entropy, nats": "{entropy:.2f}", "near": "{near}",
        "mass near": "{mass:.3f}", "if uniform": "{uniform_mass:.3f}",
    }  # fmt: skip
    return f"{head.format_map(lines[0])}\n\n{drawn(lines, columns)}"


def call_error(lines: Sequence[Line]) -> str:
    """How far planned attention calls are from dense ones, means over clips."""
    heads = "model | arm | clips | density | relative error | best choice, skipped | best choice, pooled | mass lost"
    names = ("density", "error", "best_error", "best_pooled_error", "lost", "best_lost")
    rows = []
    lines = [line for line in lines if not line["arm"].startswith("best")]
    for model, arm in dict.fromkeys((line["model"], line["arm"]) for line in lines):
        runs = [line for line in lines if (line["model"], line["arm"]) == (model, arm)]
        density, *values = (float(np.mean([line[name] for line in runs])) for name in names)
        rows.append((model, arm, len(runs), f"{density:.2f}", *(f"{value:.3f}" for value in values)))
    first = lines[0]
    head = f"{first['steps']} UniPC steps, tiles of {first['tile']} tokens, torch {first['torch']}."
    return f"{head}\n\n{markdown_table(f'{heads} | by the best choice', rows)}"


def tiles_kept_by_sol(lines: Sequence[Line]) -> str:
    """What share of the tiles Sol keeps of trained models and of normal scores, by the lines of `call_error`."""
    densities: dict[float, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if beta := re.fullmatch(r"sol (\S+), pooled", line["arm"]):
            densities[float(beta[1])][line["model"]].append(line["density"])
    trained = [
        f"at beta {beta:g} {' and '.join(f'{np.mean(shares):.2f} of {model}' for model, shares in models.items())}, "
        f"where normal scores keep {0.5 * math.erfc(beta / math.sqrt(2)):.2f}"
        for beta, models in densities.items()
    ]
    return (
        "Of the tiles of the embedded trained models, whose clips and pictures are short, Sol kept "
        f"{'; '.join(trained)}; the share of normal scores is that of the other tiles than those that are always exact"
    )


def combining(lines: Sequence[Line]) -> str:
    """What each pair of methods computes of a dense run, and why pairs are refused."""
    cells = {frozenset(line["pair"]): line for line in lines}
    names = [name for name in methods() if frozenset([name]) in cells]
    firsts: dict[str, Line] = {}
    for line in lines:
        if "refused" in line:
            firsts.setdefault(_refusal(line), line)
    marks = {kind: place for place, kind in enumerate(firsts, 1)}

    def cell(first: str, second: str) -> str:
        line = cells[frozenset([first, second])]
        return f"[{marks[_refusal(line)]}]" if "refused" in line else f"{line['work']:.2f}".lstrip("0")

    rows = [[f"{place} {name}", *(cell(name, other) for other in names)] for place, name in enumerate(names, 1)]
    square = markdown_table(" | ".join(["method", *map(str, range(1, len(names) + 1))]), rows)
    why = [
        [f"[{marks[kind]}]", " + ".join(dict.fromkeys(line["pair"])), line["refused"].replace("|", "\\|")]
        for kind, line in firsts.items()
    ]
    ran = [line for line in lines if "work" in line]
    assert all(line["orders_agree"] for line in ran)
    head = (
        f"{len(ran)} pairs and single methods ran, {len(lines) - len(ran)} are refused; attached in either order they "
        "gave the same frames bit for bit."
    )
    return f"{head}\n\n{square}\n\n{markdown_table('mark | first such pair | why', why)}"


def _refusal(line: Line) -> str:
    """Return why a pair is refused without the names of its methods."""
    names = {word for name in line["pair"] for word in (name, methods()[name].__name__)}
    return re.sub("|".join(sorted(names, key=len, reverse=True)), "", line["refused"])


def dropped_mass(lines: Sequence[Line]) -> str:
    """How much softmax mass LiteAttention's budget left out."""
    first, calls = lines[0], sum(line["calls"] for line in lines)
    head = (
        f"wan-plain, {len(lines)} held-out clips of {first['num_frames']} frames, {first['steps']} steps, tiles of "
        f"{first['block_size']}."
    )
    mean, rows, density = (
        sum(line[key] * line["calls"] for line in lines) / calls for key in ("mean", "rows_within", "sparse_density")
    )
    largest, row = (max(line[key] for line in lines) for key in ("largest_mean", "largest_row"))
    share = sum(line["calls_within"] for line in lines) / calls
    cells = (f"{first['budget']:g}", calls, f"{share:.1%}", f"{mean:.4f}", f"{largest:.4f}", f"{rows:.2%}")
    heads = "budget | calls | whose mean mass is within | mean | largest mean of a call | rows within | largest row"
    table = markdown_table(f"{heads} | density of sparse calls", [(*cells, f"{row:.3f}", f"{density:.3f}")])
    return f"{head}\n\n{table}"


def eight_bit_linears(lines: Sequence[Line]) -> str:
    """What linear layers in eight bits cost a clip, with Student's t intervals."""
    rows, by_run = [], {(line["linears"], line["method"], line["clip"]): line for line in lines}
    for linears, method in dict.fromkeys((line["linears"], line["method"]) for line in lines):
        runs = [line for (*kind, _), line in by_run.items() if kind == [linears, method]]
        lost = np.array([line["psnr"] - by_run["plain", method, line["clip"]]["psnr"] for line in runs])
        half = stats.t.ppf(0.975, len(lost) - 1) * lost.std(ddof=1) / len(lost) ** 0.5
        beside = ("", "") if linears == "plain" else (
            f"{np.mean([line['to_plain'] for line in runs]):.1f}",
            f"{lost.mean():+.2f} [{lost.mean() - half:+.2f}, {lost.mean() + half:+.2f}]",
        )  # fmt: skip
        rows.append((linears, method, len(runs), f"{np.mean([line['psnr'] for line in runs]):.2f}", *beside))
    heads = "linear layers | method | clips | PSNR, dB | to plain layers, dB | against plain, dB"
    return f"wan-tiny's clips, 95 % intervals.\n\n{markdown_table(heads, rows)}"


def quantized(lines: Sequence[Line]) -> str:
    """What weights in fewer bits save and cost on a CPU."""
    rows, by_kind = [], dict.fromkeys((line["model"], line["quantize"]) for line in lines)
    for model, kind in by_kind:
        runs = [line for line in lines if (line["model"], line["quantize"]) == (model, kind)]
        near = "" if kind is None else f"{np.mean([line['psnr'] for line in runs]):.1f}"
        seconds = np.median([line["seconds"] for line in runs])
        rows.append((model, kind or "float32", f"{runs[0]['weight_bytes'] / 1e6:.1f} MB", f"{seconds:.1f}", near))
    first = lines[0]
    clips = len({line["clip"] for line in lines})
    told = f"{clips} prompts, {first['steps']} steps, torch {first['torch']}, torchao {first['torchao']}"
    heads = "model | weights | transformer | seconds of the processor | PSNR to float32, dB"
    return f"{told}; blocks are not compiled.\n\n{markdown_table(heads, rows)}"


def guidance_cost(lines: Sequence[Line]) -> str:
    """What a perturbed branch costs, a table a model."""
    parts = []
    for model in dict.fromkeys(line["model"] for line in lines):
        runs = [line for line in lines if line["model"] == model]
        first = runs[0]
        layers = [name.split()[1] for name in first["seconds"] if name.startswith("full ")]
        rows = [
            (words, *(_added(runs, f"{kind} {layer}", "plain, guided") for layer in layers))
            for kind, words in (("full", "a whole third forward"), ("shared", "begun at that block"))
        ]
        parts += [
            f"{model}, {first['steps']} steps, {len(runs)} rounds, {first['threads']} thread, {first['processor']}: "
            "median [quartiles] over the rounds of processor time added to the same run without, as a share of it "
            "(guided: two forwards a step, so that a third one is 50 %).",
            markdown_table(" | ".join(["first perturbed block", *layers]), rows),
            f"Free mode adds {_added(runs, 'free mode', 'plain, guided')}; `NAG`, to a run without guidance, "
            f"{_added(runs, 'nag', 'plain, alone')}.",
        ]
    return "\n\n".join(parts) + "\n"


def _added(lines: Sequence[Line], arm: str, plain: str) -> str:
    shares = [100 * (line["seconds"][arm] / line["seconds"][plain] - 1) for line in lines]
    low, middle, high = np.quantile(shares, (0.25, 0.5, 0.75))
    return f"{middle:.1f} % [{low:.1f}, {high:.1f}]"


def overhead(lines: Sequence[Line]) -> str:
    """What an attached method that saves nothing costs a step."""
    head = (
        "{pairs} steps of two forwards on each of two copies in turn, {threads} thread of processor time, torch "
        "{torch}, {processor}; medians and their 95 % intervals. A plain step takes "
    ).format_map(lines[0])
    plain = {line["model"]: f"{line['plain_seconds_a_step']:.3g} s ({line['model']})" for line in lines[::-1]}
    columns = {
        "attached, all computed": "{arm}", "model": "{model}", "measured": "{measured}",
        "more than a plain step": "{overhead:+.2%} [{overhead_interval[0]:+.2%}, {overhead_interval[1]:+.2%}]",
        "in ms": "{more:+.2f}",
    }  # fmt: skip
    rows = [
        line | {"more": 1000 * line["overhead"] * line["plain_seconds_a_step"],
                "measured": "alone" if line["alone"] else "in whole steps"} for line in lines
    ]  # fmt: skip
    return f"{head}{', '.join(plain.values())}.\n\n{drawn(rows, columns)}"


def positions_cost(lines: Sequence[Line]) -> str:
    """What decay and head scales cost an attention call."""
    head = (
        "a layer of Wan 2.1 1.3B's shape, {tokens} tokens, {rounds} rounds, {threads} thread of processor time, torch "
        "{torch}, {processor}; medians of the ratio and its range."
    )
    columns = {"call": "{call}", "density": "{density:.2f}", "with": "{with}"}
    columns["times the call without"] = "{ratio:.2f} [{range[0]:.2f}, {range[1]:.2f}]"
    return f"{head.format_map(lines[0])}\n\n{drawn(lines, columns)}"


def product_time(lines: Sequence[Line]) -> str:
    """What a sparse method and a step cache save together, in a sentence on the last run."""
    return (
        "{layers} block of Wan 2.1 1.3B's shape with random weights, {tokens} tokens, {steps} steps, {rounds} rounds, "
        "{threads} thread of processor time, torch {torch}, {processor}: Radial at density {density:.2f} takes "
        "{sparse_share:.2f} of the dense time, a cache that computes every second step {cache_share:.2f}, both "
        "{both_share:.2f}: {both_over_product:+.1%} [{both_over_product_range[0]:+.1%}, "
        "{both_over_product_range[1]:+.1%}] from the product."
    ).format_map(lines[-1])


def scaling(lines: Sequence[Line]) -> str:
    """What Ulysses sends, holds and computes for released models, worked out from their sizes."""
    columns = {
        "model, frames": "{family}, {frames}", "tokens": "{tokens:,}", "cards": "{cards}",
        "heads, tokens a card": "{heads_a_card}, {tokens_a_card:,}", "sent a step": "{sent_bytes:.1f} GB",
        "in attention a layer": "{attention_bytes:.2f} GB", "Lite's bitmaps": "{bitmap_bytes:.2f} GB",
        "PFLOP a step, dense / density .3": "{flops[0]:.1f} / {flops[1]:.1f}",
        "sending over computing, dense / density .3": "{share[0]:.1%} / {share[1]:.1%}",
    }  # fmt: skip
    rows = [
        line | {name: line[name] / 1e9 for name in ("sent_bytes", "attention_bytes", "bitmap_bytes")}
        | {"flops": [x / 1e15 for x in line["flops"]], "share": line["sending_over_computing"]} for line in lines
    ]  # fmt: skip
    table = drawn(rows, columns)
    return table.replace("|---" * 9 + "|", "|---|" + "---:|" * 8)


def denoising_time(lines: Sequence[Line]) -> str:
    """What LiteAttention at falling densities takes of the time of denoising, beside fewer steps."""
    head = (
        "{tokens} tokens ({num_frames} frames), {steps} steps, tiles of {block_size}, {threads} threads, torch "
        "{torch}, {rounds} rounds, {processor}"
    )
    columns = {"arm": "{arm}", "density of the run": "{density:.3f}", "time over dense": "{time:.2f}"}
    columns["distance of the latents"] = "{distance:.3f}"
    return f"{head.format_map(lines[0])}\n\n{drawn(lines, columns)}"


def false_verdicts(lines: Sequence[Line]) -> str:
    """How often a verdict is wrong where two arms are alike, by simulation."""
    cells: dict[str, dict[str, str]] = {}
    for line in lines:
        cell = "{alone:.1%} ({student:.1%}); {together:.1%}".format_map(line)
        cells.setdefault(line["shape"], {})[f"{line['clips']} clips"] = cell
    heads = " | ".join(["paired differences of mean 0", *cells[lines[0]["shape"]]])
    head = (
        "{draws} draws, seed {seed}: false verdicts of one arm, in brackets by Student's t alone; then of any of "
        "{arms} arms after Holm's correction, {families} draws."
    )
    table = markdown_table(heads, ((shape, *clips.values()) for shape, clips in cells.items()))
    return f"{head.format_map(lines[0])}\n\n{table}"
