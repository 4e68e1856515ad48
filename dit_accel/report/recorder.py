"""Counts what runs in one generation: dense layers, and the shares of every planned call's tiles."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from dit_accel_kernels import count_bits, torch_way
from torch import Tensor

from ..plan.context import CallContext, StepContext
from ..plan.plan import AttentionPlan
from ..plan.tiling import exact_bits
from .clock import Clock, Kind


@dataclass(slots=True)
class CallShares:
    """Shares of one planned attention call's tiles; tensors until `settle` reads them, so that no device is waited for.

    `by_head` is the exact share of each head, [H], where a selection chose by head.
    """

    layer: int
    exact: float | Tensor
    pooled: float | Tensor
    by_head: Tensor | Sequence[float] | None = None


Why = Literal["mask", "backend"]
"""Why a call of a layer in which methods act stayed dense: for its mask, or since dense attention is faster here."""


@dataclass(slots=True)
class ForwardCounts:
    """What one denoising call (transformer, step, branch) ran."""

    dense_layers: int = 0
    stayed: Counter[Why] = field(default_factory=Counter)
    calls: list[CallShares] = field(default_factory=list)


class Recorder:
    """Counts what runs, one generation long.

    `seen` holds the layers whose dense calls are seen when they run; those of compiled blocks are not. `forwards_run`
    counts the transformer's forwards, `reduced` the attention calls that followed a plan or were skipped with a block.
    """

    def __init__(self) -> None:
        self.forwards: defaultdict[tuple[str, int, str], ForwardCounts] = defaultdict(ForwardCounts)
        self.notes: list[str] = []
        self.backends: set[str] = set()
        self.torch_ways: set[str] = set()
        self.loop_calls: Counter[str] = Counter()
        self.precisions: set[str] = set()
        self.seen: set[int] = set()
        self.forwards_run = self.reduced = 0
        self.clock = Clock()

    @property
    def planned(self) -> bool:
        """Whether any attention call followed a plan."""
        return any(entry.calls for entry in self.forwards.values())

    def spell_backend(self, requested_name: str) -> str:
        """Return the requested backend and, once a planned call ran, what it resolved to and how it computed."""
        used = ", ".join(sorted(self.backends))
        spelled = f"{requested_name} ({used})" if used and used != requested_name else requested_name
        eight = (f"queries and keys in {precision}" for precision in sorted(self.precisions))
        return "; ".join([spelled, *(f"torch: {way}" for way in sorted(self.torch_ways)), *eight])

    def ran_by(self, backend: str, q: Tensor, precision: str | None = None) -> None:
        """Keep which backend ran a planned call, and in which precision where the call names one."""
        self.backends.add("torch" if backend == "gather" else backend)
        if precision is not None:
            self.precisions.add(precision)
        if backend in ("torch", "gather"):
            way = torch_way(q.device, q.dtype)
            lost = backend == "gather" and way.startswith("loop")
            self.torch_ways.add("gathered tiles, which were faster here than the loop" if lost else way)

    def dense_by_loop(self, q: Tensor, speed: float) -> None:
        """Count a dense call that the kernels' loop computes, so many times as fast as torch's attention."""
        dtype = str(q.dtype).removeprefix("torch.")
        self.loop_calls[
            f"{dtype} with head dim {q.shape[3]}, {speed:.2f} times as fast as torch's in a short test"
        ] += 1

    def dense_notes(self) -> list[str]:
        """Return the report's lines on dense calls by the kernels' loop."""
        return [
            f"{count} dense attention calls by the kernels' compiled loop, within rounding of your own: {of}"
            for of, count in self.loop_calls.items()
        ]

    def note(self, text: str) -> None:
        """Keep a remark for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def forward(self, transformer: str, branch: str, step_index: int, dense_layers: int) -> None:
        """Count one denoising call and the layers of it that run dense."""
        self.forwards[transformer, step_index, branch].dense_layers += dense_layers

    @contextmanager
    def timed(self, step: StepContext, device: torch.device, layers: Callable[[], int]) -> Iterator[None]:
        """Time a denoising call, methods around it included, and keep what it was.

        ``layers`` gives the attention calls of one forward, once it has run.
        """
        ran, reduced, begin = self.forwards_run, self.reduced, self.clock.begin(device)
        yield
        forwards = self.forwards_run - ran
        computed: Kind = "reduced" if self.reduced > reduced else "dense"
        kind: Kind = computed if forwards == 1 else "extended" if forwards else "skipped"
        key = step.transformer, step.step_index, step.branch
        self.clock.end(key, kind, begin, device, forwards * layers())

    def stays_dense(self, context: CallContext, why: Why) -> None:
        """Count an attention call that stays dense in a layer in which methods act."""
        self.forwards[context.transformer, context.step_index, context.branch].stayed[why] += 1

    def planned_call(
        self, context: CallContext, plan: AttentionPlan, exact: Tensor | None = None, rows: float = 1.0
    ) -> None:
        """Count one attention call that follows a plan, over a share ``rows`` of the pairs.

        ``exact`` are the tiles that its selection left exact, bits int32 [B, H, NQ, W]; None: it has none.
        """
        self.reduced += not plan.is_plain
        tiles, selection = plan.tiles, plan.selection
        calls = self.forwards[context.transformer, context.step_index, context.branch].calls
        if exact is None or tiles is None or selection is None:
            density, pooled = (1.0, 0.0) if tiles is None else (tiles.density, tiles.tiles_pooled / tiles.tiles_total)
            calls.append(CallShares(context.layer, rows * density, rows * pooled))
            return
        size = tiles.query_tiles * tiles.key_tiles
        by_head = count_bits(exact).sum(-1).float().mean(0) / size
        remaining = tiles.density
        if selection.keep is not None and selection.rest == "skip":
            free = selection.keep if selection.pinned is None else selection.keep | selection.pinned
            remaining = count_bits(exact_bits(tiles, exact.shape[1]) & free).sum(-1).float().mean() / size
        dropped = (remaining - by_head.mean()).clamp(min=0)  # rounding may leave -0
        pooled = tiles.tiles_pooled / tiles.tiles_total + dropped
        calls.append(CallShares(context.layer, rows * by_head.mean(), rows * pooled, rows * by_head))

    def settle(self) -> None:
        """Turn the shares that are still tensors into numbers, in one transfer a device."""
        waiting: dict[tuple[torch.device, int], list[CallShares]] = {}
        for entry in self.forwards.values():
            for call in entry.calls:
                if isinstance(call.by_head, Tensor):
                    waiting.setdefault((call.by_head.device, len(call.by_head)), []).append(call)
        for calls in waiting.values():
            shares = [torch.stack([torch.as_tensor(call.exact), torch.as_tensor(call.pooled)]) for call in calls]
            values = torch.stack([torch.cat([s, call.by_head]) for s, call in zip(shares, calls, strict=True)])  # type: ignore[list-item]
            for call, (exact, pooled, *by_head) in zip(calls, values.tolist(), strict=True):
                call.exact, call.pooled, call.by_head = exact, pooled, tuple(by_head)
