"""Greedy rounds: the heads that are best together, found by judging sets that grow (HeadHunter, arXiv 2506.10978)."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Trial = tuple[tuple[str, ...], int]
"""What is judged: heads, such as ``L3H1``, in their usual order, and the number of a prompt."""


def search(
    heads: Sequence[str], evaluate: Callable[[Sequence[Trial]], Sequence[Any]], *, prompts: int, rounds: int,
    per_round: int, worth: Callable[[Sequence[Any]], float] = statistics.fmean,
) -> list[tuple[int, str, float]]:  # fmt: skip
    """Select heads round by round; it ends early where no head is left.

    Returns:
        Round from 1, head, and its worth beside those of earlier rounds; the best of a round first.
    """
    order = {head: at for at, head in enumerate(heads)}
    found: list[tuple[int, str, float]] = []
    for number in range(1, rounds + 1):
        selected = [head for _, head, _ in found]
        left = [head for head in heads if head not in selected]
        sets = [tuple(sorted((*selected, head), key=order.__getitem__)) for head in left]
        values = evaluate([(chosen, prompt) for chosen in sets for prompt in range(prompts)])
        scores = {head: worth(values[at * prompts : (at + 1) * prompts]) for at, head in enumerate(left)}
        best = sorted(left, key=lambda head: (-scores[head], order[head]))[:per_round]
        found += [(number, head, scores[head]) for head in best if scores[head] > -math.inf]
    return found
