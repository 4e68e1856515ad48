"""HeadHunter: which attention heads to perturb, found by greedy rounds with an objective.

Source: HeadHunter (arXiv 2506.10978), its algorithm 1. Where we depart from it: heads that are selected are not
evaluated again, nor is a set that was in another order; early rungs judge all heads on few prompts and steps and pass
the better half on (successive halving); ties go to the head that comes first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Head = str
"""A head as `SoftPAG` names it, such as ``L3H1``."""

Evaluate = Callable[[tuple[Head, ...], int, int], float]
"""(heads, number of the prompt, steps) -> what the objective gives of that clip; higher is better."""


Job = tuple[tuple[Head, ...], int, int]
"""What `Evaluate` is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One judgement of all heads that are left: on how many prompts, from the first on, and denoising steps."""

    prompts: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round selected: the heads, the best first, and the objective's mean with each beside those before."""

    heads: tuple[Head, ...]
    scores: tuple[float, ...]


def rungs_of(prompts: int, steps: int, halvings: int, least_steps: int = 4) -> tuple[Rung, ...]:
    """Return the rungs of a round: each has twice the prompts and steps of the one before, the last one all.

    Before the last come ``halvings`` others, none with fewer than ``least_steps``.
    """
    return tuple(
        Rung(prompts=max(1, prompts >> back), steps=max(min(steps, least_steps), steps >> back))
        for back in range(halvings, -1, -1)
    )


def kept_after(count: int, rung: int, rungs: int, per_round: int) -> int:
    """Return how many of ``count`` heads a rung passes on; the last one selects."""
    return min(count, per_round if rung == rungs - 1 else max(per_round, -(-count // 2)))


def cost(heads: int, rounds: int, per_round: int, rungs: Sequence[Rung]) -> tuple[int, int]:
    """Return the most clips that a search generates, and their steps in all; those that repeat are not generated."""
    clips = steps = 0
    for done in range(rounds):
        left = heads - done * per_round
        for number, rung in enumerate(rungs):
            if left <= 0:
                break
            clips += left * rung.prompts
            steps += left * rung.prompts * rung.steps
            left = kept_after(left, number, len(rungs), per_round)
    return clips, steps


def search(
    heads: Sequence[Head],
    evaluate: Evaluate,
    rungs: Sequence[Rung],
    *,
    rounds: int,
    per_round: int,
    prepare: Callable[[Sequence[Job]], None] | None = None,
) -> list[Round]:
    """Select heads round by round, and return what each round selected; it ends early where no head is left.

    Args:
        heads: all heads, in the order in which ties are broken.
        evaluate: judges a set on one prompt; asked once for each set, prompt and number of steps.
        rungs: the judgements of a round.
        rounds: how many rounds.
        per_round: heads that a round adds.
        prepare: is given all that a rung will ask, before it does, so that several processes may share it.
    """
    order = {head: at for at, head in enumerate(heads)}
    known: dict[Job, float] = {}

    def mean(chosen: Sequence[Head], rung: Rung) -> float:
        return sum(known[job] for job in _jobs(chosen, rung, order)) / rung.prompts

    found: list[Round] = []
    selected: tuple[Head, ...] = ()
    for _ in range(rounds):
        left = [head for head in heads if head not in selected]
        if not left:
            break
        scores: dict[Head, float] = {}
        for number, rung in enumerate(rungs):
            jobs = dict.fromkeys(job for head in left for job in _jobs((*selected, head), rung, order))
            requested = [job for job in jobs if job not in known]
            if prepare is not None and requested:
                prepare(requested)
            known.update((job, evaluate(*job)) for job in requested)
            scores = {head: mean((*selected, head), rung) for head in left}
            ranked = sorted(left, key=lambda head: (-scores[head], order[head]))
            left = ranked[: kept_after(len(left), number, len(rungs), per_round)]
        found.append(Round(heads=tuple(left), scores=tuple(scores[head] for head in left)))
        selected = (*selected, *left)
    return found


def _jobs(chosen: Sequence[Head], rung: Rung, order: Mapping[Head, int]) -> list[Job]:
    """Return what a rung asks of a set, whose heads are in their usual order."""
    heads = tuple(sorted(chosen, key=order.__getitem__))
    return [(heads, prompt, rung.steps) for prompt in range(rung.prompts)]
