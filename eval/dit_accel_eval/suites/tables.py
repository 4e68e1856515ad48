"""A suite's figures in words and Markdown tables: its arms against dense runs that cost as much, and its pairs."""

from collections.abc import Callable, Sequence

from dit_accel_pipelines.generation.solvers import BEST

from ..metrics.registered import decimals_of
from ..runs.model import OWN
from ..runs.results import markdown_table
from ..statistics import FEWEST, p_words
from .figures import ArmFigures, PairFigures, pair_figures, rival_kind, suite_figures
from .ladder import setting_words
from .lines import AGREE, TIMED, TUNED, WORKS, ResultLine
from .suite import Suite

NOTHING = "saved nothing"
"""What stands in place of a lead of an arm whose methods left nothing out: it is the dense run, at its cost."""


def suite_markdown(suite: Suite, lines: Sequence[ResultLine]) -> str:
    """Return a suite's tables: a row an arm, means over clips, by what rule they are judged, and its pairs.

    Dense runs that only some clips needed as rivals have no row.
    """
    arms = suite_figures(suite, lines)
    most = max((arm.clips for arm in arms), default=0)
    shown = [arm for arm in arms if arm.ahead or arm.saved_nothing or arm.clips == most]
    lost = len({line.clip for line in lines if not line.is_converged})
    below = [rule_words(arms), rival_words(lines), suite.ladder.loose if suite.ladder else ""]
    below += reference_words(lines) if lost else []
    pairs = pairs_markdown(pair_figures(suite.pairs, lines, suite.reference_steps)) if suite.pairs else ""
    return "\n\n".join(filter(None, (arms_markdown(shown, suite.clips - lost), " ".join(filter(None, below)), pairs)))


def reference_words(lines: Sequence[ResultLine]) -> list[str]:
    """Return in words which references did not converge, and which were confirmed afterwards."""
    clips = sorted({line.clip: line for line in lines if line.reference_agreement < AGREE}.items())
    lost = [f"clip {clip} ({line.reference_steps} steps, {line.reference_agreement:.1f} dB)"
            for clip, line in clips if not line.is_converged]  # fmt: skip
    sure = [f"clip {clip} ({line.reference_steps} steps, {line.reference_confirmed['agreement']:.1f} dB to "
            f"{line.reference_confirmed['steps']})" for clip, line in clips if line.is_converged]  # fmt: skip
    return [
        *([f"Left out, since their references did not converge to {AGREE:g} dB: {', '.join(lost)}."] if lost else []),
        *([f"References that a run of twice as many steps confirmed: {', '.join(sure)}."] if sure else []),
    ]


def rule_words(arms: Sequence[ArmFigures]) -> str:
    """Return in words how many arms are judged together, and by what rule."""
    together = max((lead.together for arm in arms for lead in arm.ahead.values()), default=0)
    if not together:
        return f"No verdict: it takes {FEWEST} clips."
    number = "1 arm" if together == 1 else f"{together} arms"
    return f"Ahead and behind: after Holm's correction over {number}; else open."


def rival_words(lines: Sequence[ResultLine]) -> str:
    """Return in words which dense runs arms are compared with."""
    if rival_kind(lines) == BEST:
        return "Fewer steps are UniPC's at the model's own noise shift, not the best solver and shift for each number."
    rivals = [line for line in lines if line.is_rival]
    solver = rivals[0].reference.partition(",")[0]
    if solver != BEST:
        whose = "the model's own scheduler" if solver == OWN else solver
        return f"The reference and fewer steps are runs of {whose}, not of the best solver and shift for each number."
    words = {line.num_inference_steps: setting_words(line.solver, line.flow_shift)
             for line in rivals if line.arm.startswith(f"{TUNED} ")}  # fmt: skip
    settings: dict[str, list[str]] = {}
    for steps in sorted(words):
        settings.setdefault(words[steps], []).append(str(steps))
    each = "; ".join(f"{setting} at {', '.join(steps)}" for setting, steps in settings.items())
    return f"Fewer steps are the best dense runs of the ladder of rivals: {each} steps."


def arms_markdown(arms: Sequence[ArmFigures], clips: int | None = None) -> str:
    """Return the Markdown table of arms; those of fewer clips than ``clips``, None: than another, say how many."""
    whole = max((arm.clips for arm in arms), default=0) if clips is None else clips
    works = WORKS | (TIMED if any("steps_in_time" in arm.ahead for arm in arms) else {})
    columns: dict[str, Callable[[ArmFigures], str]] = {"arm": lambda arm: arm.name}
    if any(arm.clips < whole for arm in arms):
        columns["clips"] = lambda arm: str(arm.clips)
    columns |= {words: _mean(key, ".2f") for key, words in works.items()}
    if any("seconds" in arm.means for arm in arms):
        columns["seconds, of dense"] = seconds_cell
    columns |= {"PSNR to the reference, dB (median)": lambda arm: arm.psnr.cell(), "SSIM": _mean("ssim", ".3f")}
    if any("score" in arm.means for arm in arms):
        columns["score"] = _mean("score", ".0%")
    columns |= {f"against fewer steps at equal {words}, dB (median)": _lead(key) for key, words in works.items()}
    columns |= {name: _metric(name) for name in dict.fromkeys(name for arm in arms for name in arm.metrics)}
    return markdown_table(" | ".join(columns), [[cell(arm) for cell in columns.values()] for arm in arms])


def _mean(key: str, spec: str) -> Callable[[ArmFigures], str]:
    return lambda arm: f"{arm.means[key]:{spec}}" if key in arm.means else ""


def _lead(key: str) -> Callable[[ArmFigures], str]:
    return lambda arm: arm.ahead[key].judged() if key in arm.ahead else NOTHING * arm.saved_nothing


def _metric(name: str) -> Callable[[ArmFigures], str]:
    return lambda arm: f"{arm.metrics[name]:.{decimals_of(name)}f}" if name in arm.metrics else ""


def seconds_cell(arm: ArmFigures) -> str:
    """Return an arm's seconds, and their share of those of the dense run of as many steps, "" if not timed."""
    if not {"seconds", "dense_seconds"} <= {*arm.means}:
        return ""
    return f"{arm.means['seconds']:.2f}, {arm.means['seconds'] / arm.means['dense_seconds']:.0%}"


def pairs_rule(pairs: Sequence[PairFigures]) -> str:
    """Return in words how pairs are judged."""
    together = max(pair.ahead.together for pair in pairs)
    if not together:
        return f"Pairs declared in the suite, PSNR clip by clip; there is no verdict under {FEWEST} clips."
    return (
        f"Pairs declared in the suite, PSNR clip by clip; p by Holm's rule over {together}, of the difference being 0, "
        "or the margin where one is given."
    )


def pairs_markdown(pairs: Sequence[PairFigures]) -> str:
    """Return the Markdown table of pairs and how they were judged, "" where there is none."""
    if not pairs:
        return ""
    scored, cost = any(pair.score for pair in pairs), pairs[0].by
    heads = "pair | PSNR ahead, dB (median) | Holm p | verdict "
    heads += f"{'| score, % ' if scored else ''}| share of dense {cost}"
    rows = []
    for pair in pairs:
        costs = f"{pair.costs[0]:.2f} vs {pair.costs[1]:.2f}" + ("" if pair.by == cost else f" by {pair.by}")
        cells = [str(pair.pair), pair.ahead.cell("+"), p_words(pair.ahead.p_holm), pair.verdict]
        rows.append((*cells, *([pair.score.judged("+.1f") if pair.score else ""] if scored else []), costs))
    return f"{pairs_rule(pairs)}\n\n{markdown_table(heads, rows)}"
