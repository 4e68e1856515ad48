"""What a method declares that it saves, and costs, on one layout: by arithmetic alone, before anything runs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSaving:
    """What a method leaves of the visual tiles of each attention call.

    Attributes:
        tiles: N, tiles along each side over the visual tokens alone; None: whole rows, which no tile cuts, so that the
            call stays the user's own dense attention unless another method thins it out.
        active: (step, layer) -> whether the method thins that call out.
        keep: (expected exact share of the tiles in some rows, float [R, N], and which rows these are) -> the same with
            the method's part taken off.
        pools: tiles that are not exact enter as one key each.
        expected: what stays depends on the data, and ``keep`` gives an expectation.
    """

    tiles: int | None
    active: Callable[[int, int], bool]
    keep: Callable[[np.ndarray, slice], np.ndarray]
    pools: bool = False
    expected: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What one method saves and costs over a whole run; forwards are counted one per batch row.

    Attributes:
        tiles: what it leaves of the self-attention; None: it drops nothing there, or nothing that can be counted.
        exact_rows: share of the query rows that it computes densely besides each planned call.
        blocks: blocks that are not computed, of steps x layers x rows.
        forwards: forwards that are not computed, of steps x rows.
        skipped: steps whose forwards it skips, where that is known.
        rate: share of the forwards of those steps that it skips.
        extra_forwards: forwards that are computed besides.
        list_bytes: tile lists and bitmaps on the device, shared by all layers and steps.
        carried_bytes: what is held from step to step, one batch row.
        counted: False where what it saves is known only while it runs, so that nothing is counted.
        notes: what a user should know about the estimate.
        warnings: what a user should know about the method on this layout.
    """

    tiles: TileSaving | None = None
    exact_rows: float = 0.0
    blocks: float = 0.0
    forwards: float = 0.0
    skipped: frozenset[int] = frozenset()
    rate: float = 1.0
    extra_forwards: float = 0.0
    list_bytes: int = 0
    carried_bytes: int = 0
    counted: bool = True
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
