"""What a layer's output lacks over tile lists, kept from its last dense call and added to the calls after it.

Sources: DiTFastAttn (arXiv 2406.08552) shares what a window leaves out between steps, FlashBlock (arXiv 2602.05305) the
attention to outer blocks. Here the lists may be anybody's, also chosen by the data, and layers take turns to be dense,
when their lists are chosen anew. What is kept is the difference of the dense output and that over the lists: it comes
nearer to dense attention than the softmax over both parts does, since values move alike everywhere from step to step.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from .context import CallContext, Key

USUAL_TURN = 3
"""Calls of a layer from one dense call to the next where a cached rest is asked for and nothing else is said."""

RestType = Literal["int8", "int4"]

WITH_STREAMS = ("cuda", "xpu")
"""Devices on which copies from pinned memory run beside the computation; elsewhere each call copies its own."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """Rows of attention output, in their own type or in few bits with a scale a row."""

    values: Tensor  # [B, H, S, D] in the output's own type or int8, or uint8 [B, H, S, D / 2] with two numbers a byte
    scale: Tensor | None  # float32 [B, H, S, 1]; None: the values are what they are
    dtype: torch.dtype  # the output's

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return (self.values,) if self.scale is None else (self.values, self.scale)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Stored":
        """Return the rows with each of their tensors changed by a function."""
        return replace(self, values=change(self.values), scale=None if self.scale is None else change(self.scale))

    def read(self, device: torch.device) -> Tensor:
        """Return the rows on a device in the output's own type, [B, H, S, D]."""
        values = self.values.to(device, non_blocking=True)
        if self.scale is None:
            return values
        if values.dtype == torch.uint8:
            values = torch.stack([values & 15, values >> 4], -1).flatten(-2).to(torch.int8) - 8
        return (values * self.scale.to(device, non_blocking=True)).to(self.dtype)


def stored(rows: Tensor, dtype: RestType | None) -> Stored:
    """Return attention output [B, H, S, D] as it is kept; in ``int4`` D must be even."""
    if dtype is None:
        return Stored(values=rows, scale=None, dtype=rows.dtype)
    most = 127 if dtype == "int8" else 7
    scale = rows.abs().amax(-1, keepdim=True).float().clamp(min=torch.finfo(torch.float32).tiny * most) / most
    values = (rows / scale).round().to(torch.int8)
    if dtype == "int4":
        low, high = (values + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        values = low | high << 4
    return Stored(values=values, scale=scale, dtype=rows.dtype)


def on_host(tensor: Tensor) -> Tensor:
    """Return a tensor in the host's memory, pinned where it comes from another device, which copies by itself."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Copy:
    """Rows that are copied to a device beside its computation."""

    of: Stored  # what is copied
    there: Stored  # the copy, in memory of the stream that reads it
    stream: torch.Stream  # that one
    arrived: torch.Event  # the event that the copy is complete

    def serves(self, rows: Stored | None, device: torch.device) -> bool:
        """Tell whether it is of these very rows, for what runs on a device now."""
        return self.of is rows and self.stream == torch.accelerator.current_stream(device)

    def read(self, device: torch.device) -> Tensor:
        """Return the rows as `Stored.read` does; the stream waits for them, the host does not."""
        self.stream.wait_event(self.arrived)
        return self.there.read(device)

    def __del__(self) -> None:
        """Make the stream wait for the copy, which may be unread, before its memory is used again."""
        self.stream.wait_event(self.arrived)


@lru_cache
def side_stream(device: torch.device) -> torch.Stream:
    """Return a device's stream for copies."""
    return torch.Stream(device=device)


def start_copy(rows: Stored, device: torch.device) -> Copy | None:
    """Start to copy rows to a device, beside what its current stream is given from now on; None: it has no streams.

    The copy waits for what that stream was given before: it may have used the memory, or copied the rows to the host.
    """
    if device.type not in WITH_STREAMS:
        return None
    stream, beside = torch.accelerator.current_stream(device), side_stream(device)
    there = rows.mapped(lambda x: torch.empty_like(x, device=device))
    beside.wait_stream(stream)
    with beside:
        for to, of in zip(there.tensors, rows.tensors, strict=True):
            to.copy_(of, non_blocking=True)
    return Copy(of=rows, there=there, stream=stream, arrived=beside.record_event())


class Ahead:
    """Copies to the device what the next call reads, by the order in which calls came before; one copy at a time."""

    def __init__(self, start: Callable[[Stored, torch.device], Copy | None] = start_copy) -> None:
        self._start = start
        self.reset()

    def reset(self) -> None:
        """Forget the order, and free the copy."""
        self._next: dict[Key, tuple[Key, torch.device]] = {}
        self._last: Key | None = None
        self._copy: Copy | None = None

    def reading(
        self, key: Key, rest: Stored | None, device: torch.device, due: Callable[[Key], Stored | None]
    ) -> Stored | Copy | None:
        """Return the rest that a call reads, ``rest`` or its copy, and start to copy the one that is ``due`` next."""
        copy, self._copy = self._copy, None
        if self._last is not None:
            self._next[self._last] = key, device
        self._last = key
        following, there = self._next.get(key, (None, device))
        if following is not None and (rows := due(following)) is not None:
            self._copy = self._start(rows, there)
        return copy if copy is not None and copy.serves(rest, device) else rest


def merged(out: Tensor, lse: Tensor, rest: Tensor, rest_lse: Tensor) -> Tensor:
    """Return attention over two disjoint sets of keys from that over each; [B, H, S, D], 0 in rows without a key.

    ``lse``: log-sum-exp of its logits, [B, H, S]; -inf in rows without a key, whose output is 0.
    """
    share = torch.sigmoid(rest_lse - lse).nan_to_num(0.0)[..., None].to(out.dtype)
    return torch.lerp(out, rest.to(out.dtype), share.expand_as(out))


@dataclass(slots=True, kw_only=True, eq=False)
class KeptRest:
    """What the last dense call of a key left for those after it."""

    exact: Tensor  # int32 [B, H, NQ, W], the tiles that stay exact
    rest: Stored | None  # the dense output minus that over these tiles; None: it is not kept
    gain: float  # its norm over that of the output, where memory is bounded; else 0

    @property
    def nbytes(self) -> int:
        """Bytes that are held besides the bits."""
        return 0 if self.rest is None else self.rest.nbytes


class Rests:
    """Which calls of a method's layers are dense in turn, and what the others add.

    Args:
        every: calls of a layer from one dense call to the next; the layers take turns.
        cached: keep what the tiles leave out from each dense call; else it is left out, or pooled.
        dtype: in which it is kept; None: its own.
        memory: GB that it may take; None: as much as it needs. Where that is too little, the layers of whose output
            it is the smallest part leave it out.
        offload: let it wait in the host's memory; while one call computes, that of the next is copied back.
    """

    def __init__(
        self, every: int, cached: bool, dtype: RestType | None = None, memory: float | None = None,
        offload: bool = False,
    ) -> None:  # fmt: skip
        self.every, self.cached, self.memory, self.offload = every, cached, memory, offload
        self.dtype: RestType | None = dtype
        self.kept: dict[Key, KeptRest] = {}
        self._calls: dict[Key, int] = {}
        self._ahead = Ahead()
        self.most_held = 0
        self.measured: list[tuple[CallContext, Tensor]] = []  # dense turns, each with the squares of `lists_error`

    def reset(self) -> None:
        """Forget all turns, and free what is kept."""
        self.kept.clear()
        self._calls.clear()
        self._ahead.reset()

    def turned(self, context: CallContext, method: str) -> CallContext:
        """Return a call's context with its turn, and count it; `ConfigError` where a gradient is to be taken."""
        if context.training or context.differentiate:
            raise ConfigError(
                f"{method}.refresh = {self.every} counts the calls of one generation and has no gradient; train "
                "without refresh and rest = 'cached'"
            )
        calls = self._calls.get(context.key, 0)
        self._calls[context.key] = calls + 1
        if self.is_dense(calls, context.layer) or (self.cached and context.key not in self.kept):
            return replace(context, turn="dense")
        return replace(context, turn="frozen" if self.cached else None)

    def is_dense(self, calls: int, layer: int) -> bool:
        """Tell whether a layer is dense after so many calls."""
        return calls == 0 or (calls + layer) % self.every == 0

    def dense_share(self, calls: int, layers: range) -> float:
        """Return the share of dense calls among the ``calls`` that each of some layers makes."""
        dense = sum(self.is_dense(call, layer) for call in range(calls) for layer in layers)
        return dense / max(1, calls * len(layers))

    def bytes_of(self, rows: int, head_dim: int) -> int:
        """Return the bytes of some rows of a head in the stored format, 16 bits where none is set."""
        each = {None: 2 * head_dim, "int8": head_dim + 4, "int4": head_dim // 2 + 4}[self.dtype]
        return rows * each

    def reading(self, key: Key, device: torch.device) -> Stored | Copy | None:
        """Return the rest that a call on a device adds, or None; `turned` has counted the call."""
        entry = self.kept.get(key)
        rest = None if entry is None else entry.rest
        return self._ahead.reading(key, rest, device, self._due) if self.offload else rest

    def _due(self, key: Key) -> Stored | None:
        """Return the rest that the next call of a key adds, as far as is known."""
        _, layer, *_ = key
        entry = None if self.is_dense(self._calls[key], layer) else self.kept.get(key)
        return None if entry is None else entry.rest

    def keep(self, key: Key, rest: KeptRest) -> None:
        """Keep what a dense call left, as far as the memory allows."""
        self.kept[key] = rest
        if self.offload and rest.rest is not None:
            rest.rest = rest.rest.mapped(on_host)
        if self.memory is not None:
            held = [entry for entry in self.kept.values() if entry.rest is not None]
            while sum(entry.nbytes for entry in held) > self.memory * 1e9:
                least = min(held, key=lambda entry: entry.gain)
                least.rest = None
                held.remove(least)
        size = sum(entry.exact.nbytes + (0 if self.offload else entry.nbytes) for entry in self.kept.values())
        self.most_held = max(self.most_held, size)
