"""The triton backend: plan, sizes and launches; every feature in one kernel, rows read and written where they lie."""

# pyright: basic, reportCallIssue=false
# (launches take options that a kernel's signature doesn't show)

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from ...bits import word_count
from ...errors import BackendUnavailableError
from ...problem import Problem
from ...selection import LOG2_E
from ..rows import moves_in_pieces, with_whole_rows
from ..slices import join_slices, slice_of, slices
from . import launch as sizes
from .eight import Scales, eight_bits
from .expand import bits_of_lists, expand
from .forward import _fwd_kernel
from .launch import architecture, bulk_copies, launch_of
from .plan import RowPlan, row_plan, scale_stride
from .pool import pool
from .route import route
from .support import check
from .votes import fold


def attend(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output, LSE, exact tiles and the bits that a vote keeps of one call, without a device sync.

    Output [B, H, S_q, Dv] in the caller's layout and natural-log LSE float32 [B, H, S_q] (empty where not returned),
    both in the problem's token order: with `token_order` the kernel gathers and scatters rows itself. Both bitmaps
    int32 [B, H, NQ, W], None without a selection and without a vote. Only rows that are not contiguous cost a copy.
    """
    check(problem)
    cuts = slices(problem)
    if len(cuts) == 1:
        return _attend(problem)
    parts = [_attend(slice_of(problem, cut)) for cut in cuts]
    out, lse, exact, kept = (list(part) for part in zip(*parts, strict=True))
    return (
        join_slices(out, cuts, problem.empty_output()),
        join_slices(lse, cuts) if problem.return_lse else lse[0],
        join_slices(exact, cuts),
        None if kept[0] is None else join_slices(kept, cuts),
    )


def add_rest(problem: Problem, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Output and LSE of a call, from those of its exact tiles without a mask, into whose memory they are written.

    The call has no selection and is in tiled order; `out` [B, H, S_q, Dv] in q's dtype has contiguous rows; natural-log
    `lse` float32 [B, H, S_q] is contiguous; rows without a key have 0 and -inf.
    """
    return _attend(replace(problem, return_lse=True), (out, lse))[:2]


def _attend(
    problem: Problem, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`attend` of batches and heads that are computed together, or `add_rest` to a start."""
    problem = in_pieces(problem)
    q, eight = problem.q, problem.precision is not None
    plan = row_plan(problem, without_whole=start is not None)
    with on_device(q.device):
        means, scales = None, (None, None, None)  # which eight bits have
        if problem.may_pool or eight:
            means = pool(problem, plan.valid, torch.float32 if eight else q.dtype)
        plan, exact = _select(problem, plan, means)
        if eight:
            problem, means, scales = eight_bits(problem, means, plan.valid, architecture(q.device))
        features = ("eight",) * eight + ("decay",) * (problem.decay is not None)
        with fitting("fwd", problem, features, problem.block_q) as launch:
            out, lse, words = _launch(problem, plan, means, scales, launch, start)
        kept = None if words is None else fold(problem, plan, words)
    return out, lse, exact, kept


def in_pieces(problem: Problem) -> Problem:
    """The call as kernels read it: the rows of q, k and v in one piece each, and so are token order, scales, masks."""
    rows = {name: with_whole_rows(getattr(problem, name)) for name in "qkv"}
    whole = {name: getattr(problem, name) for name in ("token_order", "head_scale", "mask_bits")}
    return replace(problem, **rows, **{name: x.contiguous() for name, x in whole.items() if x is not None})


def _select(
    problem: Problem, plan: RowPlan, means: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[RowPlan, Tensor | None]:
    """The plan with what a selection leaves of it, and the call's exact tiles as bits where it has a selection."""
    selection = problem.selection
    if selection is None or not selection.narrows:
        return plan, None if selection is None else bits_of_lists(problem)
    routed = selection.routed
    if selection.routing is not None:
        assert means is not None
        products = sizes.products_of(architecture(problem.q.device), torch.float32)
        routed = route(problem, selection.routing, means[0].to(problem.k.dtype), means[2], products)
    return expand(problem, plan, routed)


def _launch(
    problem: Problem, plan: RowPlan, means: tuple[Tensor, Tensor, Tensor] | None, scales: Scales, launch: sizes.Launch,
    start: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Run the forward kernel: output and LSE, written into those of a start where there is one, and words of votes."""
    q, k, v, selection = problem.q, problem.k, problem.v, problem.selection
    batch, heads, num_q, dim = q.shape
    if problem.token_order is not None:
        launch = sizes.with_order(launch, decay=problem.decay is not None)
    block_q = sizes.query_block(problem.block_q, launch.block_q)
    block_k, _ = sizes.key_block(problem.block_k, launch.block_k)
    rows = (batch, heads, num_q) if problem.return_lse else (0,)
    out, lse = start or (problem.empty_output(), q.new_empty(rows, dtype=torch.float32))
    tiles, parts = (batch, heads, problem.query_tiles), -(-problem.block_q // block_q)
    words = None
    if problem.votes:
        words = torch.empty(*tiles, parts, word_count(problem.key_tiles), dtype=torch.int32, device=q.device)
    (d1, d2), (d1v, d2v) = sizes.column_parts(dim, 16 if scales[0] is None else 32), sizes.column_parts(v.shape[3])
    pooled = (None, None, None) if means is None else (*means[:2], means[2].log2())
    vote = None if selection is None else selection.vote
    products = sizes.products_of(architecture(q.device), q.dtype)
    _fwd_kernel[(math.prod(tiles) * parts,)](
        q, k, v, out, lse if problem.return_lse else None, *listed(problem, plan, pooled), *scales, words,
        *_descriptors(k, v, block_k, problem.token_order is None and problem.block_k % block_k == 0),
        *((None, None) if means is None else _descriptors(*means[:2], pooled_block(problem, launch), True)),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:2], None if v.stride(2) == k.stride(2) else v.stride(2),
        *out.stride()[:3], *launch_sizes(problem, plan), problem.scale * LOG2_E,
        -1 if selection is not None and selection.reverse else 1, None if vote is None else float(vote.threshold),
        TILE_Q=problem.block_q, TILE_K=problem.block_k, BLOCK_Q=block_q, BLOCK_K=block_k,
        BLOCK_S=min(block_k, launch.block_s, launch.block_s if plan.entry_mask is None else 32),
        BLOCK_P=pooled_block(problem, launch), DIM=dim, D1=d1, D2=d2, DIM_V=v.shape[3], D1V=d1v, D2V=d2v,
        PRECISION=products, VOTE=None if vote is None else vote.criterion,
        STARTED=start is not None,
        num_warps=sizes.warps(launch, block_q), num_stages=launch.num_stages,
    )  # fmt: skip
    return out, lse, words


def listed(problem: Problem, plan: RowPlan, pooled: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What kernels of query tiles read beside rows: lists, features, masks and pooled tiles (means and lengths)."""
    return (
        plan.indices, plan.bounds, plan.q_order, plan.entry_t, *features_of(problem, plan),
        None if pooled[0] is None else plan.pooled_t, plan.entry_mask, problem.mask_bits, plan.pooled_bits, *pooled,
    )  # fmt: skip


def features_of(problem: Problem, plan: RowPlan) -> tuple[Tensor | None, ...]:
    """Token order, valid keys, factors of heads, and the table and frames of decay: what every kernel reads."""
    table = None if problem.decay is None else problem.decay[0].contiguous()
    return problem.token_order, plan.valid, problem.head_scale, table, plan.q_frames, plan.k_frames


def last_distance(problem: Problem) -> int:
    """The last entry of the table of decay; 0 without decay."""
    return 0 if problem.decay is None else problem.decay[0].numel() - 1


def launch_sizes(problem: Problem, plan: RowPlan) -> tuple[int | None, ...]:
    """Strides of what `listed` gives, tokens, heads and tiles, as kernels of query tiles take them."""
    static = plan.entry_strides is None
    return (
        *plan.strides, scale_stride(problem), *(plan.entry_strides or (None, None)),
        *((None, None) if static and plan.pooled_bits is None else plan.pooled_strides),
        problem.q.shape[2], problem.k.shape[2], problem.q.shape[1], problem.k.shape[1],
        problem.query_tiles, problem.key_tiles, last_distance(problem),
    )  # fmt: skip


def pooled_block(problem: Problem, launch: sizes.Launch) -> int:
    """Pooled tiles of a chunk: as many as the plain loop has keys in one, or with decay as the slow loop.

    On NVIDIA's cards without bulk copies at most 32: the addresses of more spill registers.
    """
    arch = architecture(problem.q.device)
    if problem.decay is not None:
        return min(launch.block_k, launch.block_s)
    gathers = arch.startswith("sm_") and not bulk_copies(arch, problem.q.dtype)
    return min(launch.block_k, 32) if gathers else launch.block_k


def _descriptors(first: Tensor, second: Tensor, rows: int, in_sequence: bool) -> Sequence[TensorDescriptor | None]:
    """Two tensors [B, HK, N, D or Dv] for bulk copies of chunks of so many rows, where the card has them and they fit.

    They copy whole power-of-2 rows, those of a chunk `in_sequence`, from addresses and strides of whole 16 bytes.
    """
    pair = first, second
    whole = in_sequence and all(x.shape[-1] * x.element_size() >= 32 and x.shape[-1].bit_count() == 1 for x in pair)
    aligned = all(moves_in_pieces(x) and all(x.stride()) for x in pair)
    if not bulk_copies(architecture(first.device), second.dtype) or not whole or not aligned:
        return None, None
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[-1]]) for x in pair]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it this one."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


@contextmanager
def fitting(kernel: str, problem: Problem, features: Sequence[str], tile: int = sizes.LARGE) -> Iterator[sizes.Launch]:
    """Sizes of a kernel by the launch table, whose launch within runs or raises BackendUnavailableError with its row.

    The larger head dim chooses the row. Every row fits the cards that it was compiled for (bench/aot.py); others may
    have less.
    """
    arch, dim = architecture(problem.q.device), max(problem.q.shape[-1], problem.v.shape[-1])
    try:
        yield launch_of(arch, problem.q.dtype, dim, tile, kernel, features=features)
    except OutOfResources as error:
        row = sizes.row_of(arch, problem.q.dtype, dim, tile, kernel, features)
        named = ", ".join(f"{name} {value!r}" for name, value in row._asdict().items())
        raise BackendUnavailableError(
            f"backend 'triton' needs {error.required} of {error.name} for the row of launch_table.json with {named} "
            f"(found {error.limit} on {arch}): use backend='torch'"
        ) from error
