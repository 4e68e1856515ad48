"""What a method declares that it saves, and costs, on one layout: by arithmetic alone, before anything runs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSaving:
    """What a method leaves of the visual tiles of each attention call."""

    # N, tiles along each side over the visual tokens alone; None: whole rows, which no tile cuts, so that the call
    # stays the user's own dense attention unless another method thins it out
    tiles: int | None
    active: Callable[[int, int], bool]  # (step, layer) -> whether the method thins that call out
    # expected exact share of every tile, float [N, N], -> the same with the method's part taken off
    keep: Callable[[np.ndarray], np.ndarray]
    pools: bool = False  # tiles that are not exact enter as one key each
    expected: bool = False  # what stays depends on the data, and ``keep`` gives an expectation


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What one method saves and costs over a whole run; forwards are counted one per batch row."""

    # what it leaves of the self-attention; None: it drops nothing there, or nothing that can be counted
    tiles: TileSaving | None = None
    exact_rows: float = 0.0  # share of the query rows that it computes densely besides each planned call
    blocks: float = 0.0  # blocks that are not computed, of steps x layers x rows
    forwards: float = 0.0  # forwards that are not computed, of steps x rows
    skipped: frozenset[int] = frozenset()  # steps whose forwards it skips, where that is known
    rate: float = 1.0  # share of the forwards of those steps that it skips
    extra_forwards: float = 0.0  # forwards that are computed besides
    list_bytes: int = 0  # tile lists and bitmaps on the device, shared by all layers and steps
    carried_bytes: int = 0  # what is held from step to step, one batch row
    counted: bool = True  # False where what it saves is known only while it runs, so that nothing is counted
    notes: tuple[str, ...] = ()  # what a user should know about the estimate
    warnings: tuple[str, ...] = ()  # what a user should know about the method on this layout
