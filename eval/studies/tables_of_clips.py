"""Tables of answered studies that judged whole clips, drawn as those of `tables` are."""

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from dit_accel_eval.metrics import metric
from dit_accel_eval.runs.loaded import FIRST_PROMPT
from dit_accel_eval.runs.results import WORKS, Line, ResultLine, markdown_table
from dit_accel_eval.statistics import FEWEST, clip_mean, judge
from dit_accel_eval.suites.figures import ArmFigures, Comparison
from dit_accel_eval.suites.suite import Suite
from dit_accel_eval.tune.profile import CRITERIA, cached_blocks
from dit_accel_eval.vbench.dimensions import DIMENSIONS
from judging import paired_cell
from scipy import stats

from dit_accel.methods.caches.block_numbers import spell_numbers

BUDGETS = (8, 10, 12, 16)
"""Steps' work, of the dense model's own, that a run may cost; an arm may stay below by `SLACK`."""

SLACK, SHOWN = 2, 2
"""Steps' work, and how many caches are shown for a budget, the furthest ahead first."""


def budgets(measured: Sequence[tuple[Suite, Sequence[ResultLine]]]) -> str:
    """Which caches lead furthest over UniPC of equal work within a budget, among the arms of several suites."""
    heads, rows = "model | budget | cache | clips | own work | PSNR to converged, dB (median)", []
    for model in dict.fromkeys(suite.model for suite, _ in measured):
        both = [(suite, lines) for suite, lines in measured if suite.model == model]
        caches = {arm.name: arm.methods[0] for suite, _ in both for arm in suite.arms if len(arm.methods) == 1}
        kinds = {name: (cache.name, str(cache.to_dict().get("config"))) for name, cache in caches.items()}
        figures = Comparison([line for _, lines in both for line in lines]).figures([*caches])
        for budget in BUDGETS:
            best: dict[object, ArmFigures] = {}
            judged = (arm for arm in figures if arm.name in kinds and arm.clips >= FEWEST and "work" in arm.ahead)
            for arm in sorted(judged, key=lambda arm: -arm.ahead["work"].mean):
                if budget - SLACK < arm.means["work"] <= budget:
                    best.setdefault(kinds[arm.name], arm)
            for arm in [*best.values()][:SHOWN]:
                cells = (model, budget, arm.name, arm.clips, f"{arm.means['work']:.2f}", arm.psnr.cell())
                rows.append((*cells, arm.ahead["work"].judged()))
    return markdown_table(f"{heads} | against UniPC at equal work, dB (median)", rows)


def block_choices(lines: Sequence[Line], scores: Mapping[str, Sequence[float]]) -> str:
    """Where each criterion's choice of blocks, by its scores, comes among the others of as many of a suite's lines."""
    psnr: dict[tuple[int, ...], dict[int, float]] = defaultdict(dict)
    for line in lines:
        if [*line["methods"]] == ["profilingcache"]:
            psnr[tuple(line["methods"]["profilingcache"]["blocks"])][line["clip"]] = line["psnr"]
    clips = sorted(set.intersection(*map(set, psnr.values())))
    table = {blocks: np.array([by_clip[clip] for clip in clips]) for blocks, by_clip in psnr.items()}
    everyone = np.array([*table.values()])
    rows = []
    for criterion in CRITERIA:
        values = scores[criterion]
        chosen = tuple(cached_blocks(list(values), count=len(next(iter(table))))[0])
        place = 1 + int((everyone.mean(1) > table[chosen].mean()).sum())
        places = ", ".join(map(str, 1 + (everyone > table[chosen]).sum(0)))
        ahead = clip_mean((table[chosen] - everyone.mean(0)).tolist())
        order = [-sum(values[block] for block in blocks) for blocks in table]
        agreement = stats.spearmanr(order, everyone.mean(1))[0]
        place_words = f"{place} of {len(table)}"
        rows.append((criterion, spell_numbers(chosen), place_words, places, f"{ahead:+}", f"{agreement:+.2f}"))
    heads = "criterion | blocks | place by mean PSNR | places by clip | against the mean choice, dB | Spearman"
    first = lines[0]
    head = f"{first['model']}, {len(table)} choices, {len(clips)} held-out clips, {first['num_inference_steps']} UniPC"
    return f"{head} steps.\n\n{markdown_table(heads, rows)}"


def every_set(lines: Sequence[Line]) -> str:
    """What HeadHunter selects, beside the best of all heads, all pairs and all layers."""
    first = lines[0]
    by_clip: dict[str, dict[int, Line]] = defaultdict(dict)
    for line in lines:
        by_clip[line["set"]][line["clip"]] = line
    tuning = {name: clips[FIRST_PROMPT] for name, clips in by_clip.items()}
    worth = {name: line["closeness"] for name, line in tuning.items()}
    heads = [name for name in worth if re.fullmatch(r"L\d+H\d+", name)]
    heads.sort(key=lambda head: [*map(int, re.findall(r"\d+", head))])
    pairs = [f"{head}+{other}" for at, head in enumerate(heads) for other in heads[at + 1 :]]
    head = max(heads, key=worth.__getitem__)
    beside = ["+".join(sorted((head, other), key=heads.index)) for other in heads if other != head]
    shown = {
        "no guidance": "none", "HeadHunter's first head": head, "best single head": head,
        "HeadHunter's two heads": max(beside, key=worth.__getitem__), "best pair": max(pairs, key=worth.__getitem__),
        **{f"best {kind} layer": max((name for name in worth if name.startswith(f"{kind} ")), key=worth.__getitem__)
           for kind in ("pag", "slg")},
    }  # fmt: skip
    held_out = sorted(clip for clip in by_clip["none"] if clip < FIRST_PROMPT)
    rows = []
    for what, name in shown.items():
        alike = next((sets for sets in (heads, pairs) if name in sets), [])
        rank = f"{1 + sum(worth[entry] > worth[name] for entry in alike)} of {len(alike)}" if alike else ""
        close, plain = ([by_clip[entry][clip]["closeness"] for clip in held_out] for entry in (name, "none"))
        gained = clip_mean([100 * (value - other) for value, other in zip(close, plain, strict=True)])
        gain = "" if name == "none" else f"{gained:+}"
        rows.append((what, name, rank, f"{worth[name]:.3f}", f"{np.mean(close):.3f}", gain))
    every, search = (sum(tuning[name]["forwards"] for name in sets) for sets in ([*heads, *pairs], [*heads, *beside]))
    columns = "what | set | rank by tuning | closeness, tuning | closeness, held out | gained over no guidance, points"
    return (
        f"{first['model']}, guided by the perturbed branch alone, {first['steps']} steps; prompts of tuning: "
        f"1, held-out prompts and seeds 0 to {held_out[-1]}; 95 % intervals.\n\n{markdown_table(columns, rows)}\n\n"
        f"HeadHunter ran {search:.0f} forwards for its two rounds, all heads and pairs take {every:.0f}: "
        f"{every / search:.1f} times as many."
    )


def finetuned(lines: Sequence[Line]) -> str:
    """What LoRAs for longer clips came to: the trainings, then the arms, each against the longer clips as they are."""
    trainings = {line["arm"].removeprefix("training "): line for line in lines if "log" in line}
    arms: dict[str, dict[int, Line]] = defaultdict(dict)
    clips = [line for line in lines if "clip" in line]
    for line in clips:
        arms[line["arm"]][line["clip"]] = line
    first = next(iter(trainings.values()))
    frames = first["training"]["num_frames"]
    plain = next(line["arm"] for line in clips if (line["lora"], line["methods"], line["frames"]) == (None, {}, frames))
    recipe = next(line["recipe"] for line in lines if line.get("recipe"))
    settings = ", ".join(f"{name} {value}" for name, value in recipe.items() if name not in ("methods", "num_frames"))
    trained = "training | steps | density | loss, first and last quarter | seconds a step | times dense"
    judged = (
        "arm | clips | frames | score | motion x 1000 | sharpness x 1000 | loop | pairs computed | paired difference "
        f"to {plain}, points of the score | of the loop"
    )
    return (
        f"{first['model']}, one thread; each training {settings}, {frames} frames; judged on "
        f"{len(arms[plain])} held-out prompts and seeds, {arms[plain][0]['num_inference_steps']} UniPC steps; 95 % "
        f"intervals.\n\n{markdown_table(trained, _trainings(trainings))}\n\n"
        f"{markdown_table(judged, _arms(arms, plain))}"
    )


def _trainings(trainings: Mapping[str, Line]) -> Iterator[Sequence[object]]:
    """Give the rows of the trainings; seconds are medians over the log, ratios those to the first's same turns."""
    logs = {name: line["log"] for name, line in trainings.items()}
    dense = [entry["seconds_a_step"] for entry in next(iter(logs.values()))]
    for name, log in logs.items():
        seconds, quarter = [entry["seconds_a_step"] for entry in log], len(log) // 4
        ratio = statistics.median(value / other for value, other in zip(seconds, dense, strict=True))
        losses = (np.mean([entry["loss"] for entry in part]) for part in (log[:quarter], log[-quarter:]))
        yield (
            name, log[-1]["step"], f"{log[-1]['density']:.2f}", ", ".join(f"{loss:.3f}" for loss in losses),
            f"{statistics.median(seconds):.2f}", f"{ratio:.2f}",
        )  # fmt: skip


def _arms(arms: Mapping[str, Mapping[int, Line]], plain: str) -> Iterator[Sequence[object]]:
    for name, clips in arms.items():
        keys = ("frames", "score", "motion", "sharpness", "loop", "attended")
        frames, score, motion, sharp, loop, pairs = (np.mean([line[key] for line in clips.values()]) for key in keys)
        rivals = arms[plain] if name != plain and frames == arms[plain][0]["frames"] else {}
        yield (
            name, len(clips), f"{frames:.0f}", f"{score:.0%}", f"{1000 * motion:.2f}", f"{1000 * sharp:.2f}",
            f"{loop:.2f}", f"{pairs:.0%}", paired_cell(clips, rivals, "score", scale=100),
            paired_cell(clips, rivals, "loop"),
        )  # fmt: skip


PROXIES: dict[str, tuple[str, ...]] = {
    "temporal_flickering": ("flickering", "warp-error@dis"),
    "motion_smoothness": ("warp-error@dis",),
    "dynamic_degree": ("dynamic@dis", "motion"),
    "imaging_quality": ("sharpness",),
}
"""Dimension of VBench -> metrics that one might take for it."""


def vbench_proxies(lines: Sequence[Line]) -> str:
    """How well metrics stand in for VBench's names on damaged clips, and the world's scores by damage."""
    damages = dict.fromkeys(line["damage"] for line in lines)
    cells = {
        name: [_mean([line for line in lines if line["damage"] == damage], name) for damage in damages]
        for name in DIMENSIONS
    }
    rows = [(name, *means) for name, means in cells.items() if any(means)]
    return (
        f"{len({line['scene'] for line in lines})} scenes drawn with {lines[0]['frames']} frames of 64 x 64 pixels, "
        f"{len(damages)} damages each. Spearman's rank correlation of a metric with the world's score over one scene's "
        "clips, turned where less is better: mean over scenes, 95 % interval over scenes; scenes in which either is "
        f"constant say nothing.\n\n{_correlations(lines, 'scene')}\n\n"
        f"{markdown_table(' | '.join(['name@world', *damages]), rows)}"
    )


def vbench_arms(lines: Sequence[Line]) -> str:
    """What a suite's arms come to by VBench's names, each against the first, on the clips that all of them have."""
    known = {(line["arm"], line["clip"]): line for line in lines}
    arms = [*dict.fromkeys(line["arm"] for line in lines)]
    clips = [clip for clip in sorted({clip for _, clip in known}) if all((arm, clip) in known for arm in arms)]
    held = {arm: [known[arm, clip] for clip in clips] for arm in arms}
    differences: dict[tuple[str, str], list[float]] = defaultdict(list)
    worlds = {arm: [line["world"] for line in lines] for arm, lines in held.items()}
    for arm in arms[1:]:
        for name in DIMENSIONS:
            for world, plain in zip(worlds[arm], worlds[arms[0]], strict=True):
                differences[name, arm] += [world[name] - plain[name]] if name in world and name in plain else []
    judged = judge({key: values for key, values in differences.items() if values})
    apart = {key: f" {verdict.verdict}" for key, verdict in judged.items() if verdict.verdict in ("ahead", "behind")}
    rows = [
        (f"*{words}, steps*", len(clips), *(f"{np.mean([line[key] for line in held[arm]]):.1f}" for arm in arms))
        for key, words in WORKS.items()
    ]
    counts = {name: sum(name in line["world"] for line in held[arms[0]]) for name in DIMENSIONS}
    for name, count in counts.items():
        if count:
            rows.append((name, count, *(_mean(held[arm], name) + apart.get((name, arm), "") for arm in arms)))
    parts = [
        f"{lines[0]['model']}, held-out prompts and seeds {clips[0]} to {clips[-1]}; 95 % intervals.",
        markdown_table(" | ".join(["name@world", "clips", *arms]), rows),
        f"Not reported for this model's clips: {', '.join(name for name, count in counts.items() if not count)}.",
    ]
    if measured := [{**line, "scene": line["clip"]} for of in held.values() for line in of if line.get("metrics")]:
        what = "Spearman's rank correlation of a metric with the world's score over one clip's arms, as above over"
        parts += [f"{what} damages.", _correlations(measured, "clip")]
    return "\n\n".join(parts)


def _correlations(lines: Sequence[Line], what: str) -> str:
    """Return the table of each proxy's rank correlation with the world within a scene, which is called ``what``."""
    rows = []
    for name, metrics in PROXIES.items():
        for key in metrics:
            sign, pairs = -1 if metric(key).better == "less" else 1, defaultdict(list)
            for line in lines:
                if name in line["world"] and key in line["metrics"]:
                    pairs[line["scene"]].append((line["world"][name], sign * line["metrics"][key]))
            several = (np.array(scene) for scene in pairs.values() if len(scene) > 2)
            known: list[Any] = [stats.spearmanr(scene)[0] for scene in several if np.ptp(scene, 0).all()]
            unknown = "constant" if pairs else "not measured"
            rows.append((name, f"`{key}`", str(clip_mean(known)) if known else unknown, len(known)))
    return markdown_table(f"dimension | metric | rank correlation within a {what} | {what}s", rows)


def _mean(lines: Sequence[Line], name: str) -> str:
    values = [line["world"][name] for line in lines if name in line["world"]]
    return f"{np.mean(values):.2f}" if values else ""
