"""Calls cut by batch and head: where lists of their own for all of them would fill the memory, or few are timed."""
# pyright: basic

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from ..problem import Problem

SCRATCH_BYTES = 1 << 30  # of lists that one launch may read; at 460k tokens and 40 heads all of them take 8 GB
Slice = tuple[slice, slice]  # of batches and of heads


def slices(problem: Problem) -> list[Slice]:
    """Batches and heads to be computed together, query heads that share a key head among them always."""
    (batch, heads), key_heads = problem.q.shape[:2], problem.k.shape[1]
    groups = problem.exact_offsets.shape[0]
    room = max(1, SCRATCH_BYTES // (4 * (problem.exact_indices.numel() + 2)))
    copies = 1 if groups == 1 else heads if groups == heads else batch * heads  # of a head's lists, in one copy
    if not problem.selection or not problem.selection.narrows or room * copies >= batch * heads:
        return [(slice(0, batch), slice(0, heads))]
    if room * copies >= heads:
        return [(part, slice(0, heads)) for part in _cut(batch, room * copies // heads)]
    repeat = heads // key_heads
    parts = list(_cut(heads, max(repeat, room // repeat * repeat)))
    return [(slice(b, b + 1), part) for b in range(batch) for part in parts]


def _cut(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def slice_of(problem: Problem, part: Slice) -> Problem:
    """The call for some batches and heads; lists that heads share stay as they are."""
    batches, heads = part
    selection, scale = problem.selection, problem.head_scale
    if selection is not None:
        keep, routed = (None if x is None else x[part] for x in (selection.keep, selection.routed))
        selection = replace(selection, keep=keep, routed=routed)
    of_batch = {name: getattr(problem, name) for name in ("key_valid", "key_length", "key_mask")}
    return replace(
        problem,
        q=problem.q[part],
        k=problem.k[key_part(problem, part)],
        v=problem.v[key_part(problem, part)],
        head_scale=None if scale is None else scale[batches if scale.shape[0] > 1 else slice(None), heads],
        selection=selection,
        **{name: None if x is None else x[batches] for name, x in of_batch.items()},
    )


def key_part(problem: Problem, part: Slice) -> Slice:
    """The batches and key heads of a part."""
    repeat = problem.q.shape[1] // problem.k.shape[1]
    return part[0], slice(part[1].start // repeat, part[1].stop // repeat)


def join_slices(parts: list[Tensor], cuts: list[Slice], whole: Tensor | None = None) -> Tensor:
    """The whole [B, H, ...], contiguous where its memory isn't given, written with its parts."""
    if whole is None:
        whole = parts[0].new_empty(cuts[-1][0].stop, cuts[-1][1].stop, *parts[0].shape[2:])
    for part, cut in zip(parts, cuts, strict=True):
        whole[cut] = part
    return whole
