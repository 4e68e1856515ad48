"""What is derived from tile lists and frames, kept on their storage: it lives as long as they do, and no longer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Derived = TypeVar("Derived")
_ATTRIBUTE = "_dit_accel_derived"
_CAPTURED: dict[int, tuple[Any, ...]] = {}  # what captured graphs read must not move or go


@dataclass(frozen=True, slots=True)
class _Entry:
    """A value, what it was derived from, and on a GPU the stream that made it and the event of its being made."""

    value: Any
    storages: tuple[weakref.ref[torch.UntypedStorage], ...]
    versions: tuple[int, ...]
    stream: Any
    event: Any

    def fits(self, storages: list[torch.UntypedStorage], versions: tuple[int, ...]) -> bool:
        return self.versions == versions and all(a() is b for a, b in zip(self.storages, storages, strict=True))

    def hand_over(self, stream: Any) -> None:
        """Let another stream wait until the value is made, and its memory wait for that stream."""
        if stream is not None and stream != self.stream:
            stream.wait_event(self.event)
            for tensor in tensors_in(self.value):
                tensor.record_stream(stream)


class StorageCache(Generic[Derived]):
    """Values derived from tensors, kept on the storage of the first of them; nothing is ever evicted.

    A storage rather than a Python object holds them: compiled graphs hand over aliases. A value counts while all its
    tensors live and none was written to. Nothing is kept of inference tensors, whose writes nobody counts, nor while a
    stream captures, since memory is then the graph's. A stream other than the one that made a value waits for it.
    """

    def get(
        self,
        parts: Iterable[Tensor | None],
        key: tuple[Hashable, ...],
        build: Callable[[], Derived],
        loose: Iterable[Tensor | None] = (),
    ) -> Derived:
        """The value for these tensors and this key, built on first use.

        Args:
            parts: what it is derived from, None for what is absent; the first one there owns the value.
            key: what else it depends on.
            build: makes it. It must not hold the tensors themselves, which would keep each other alive.
            loose: more of what it is derived from, which a caller may write to between replays of a graph: a capture
                builds what depends on it anew, inside of the graph.
        """
        parts, loose = list(parts), [x for x in loose if x is not None]
        here = [x for x in (*parts, *loose) if x is not None]
        device = here[0].device
        graph = capturing(device)
        if any(x.is_inference() for x in here) or (graph and loose):
            return _built(build)
        storages, versions = [x.untyped_storage() for x in here], tuple(x._version for x in here)
        entries: dict[tuple, _Entry] = storages[0].__dict__.setdefault(_ATTRIBUTE, {})
        shape = tuple(None if x is None else (x.storage_offset(), x.shape, x.stride()) for x in (*parts, *loose))
        place = (self, key, tuple(map(id, storages)), shape)
        found = entries.get(place)
        if found is not None and found.fits(storages, versions):
            if graph:
                _CAPTURED.setdefault(id(found), (found, here))
            else:
                found.hand_over(current_stream(device))
            return found.value
        value = _built(build)
        if not graph:
            stream = current_stream(device)
            for old in [k for k, entry in list(entries.items()) if any(x() is None for x in entry.storages)]:
                entries.pop(old, None)
            entries[place] = _Entry(
                value=value,
                storages=tuple(map(weakref.ref, storages)),
                versions=versions,
                stream=stream,
                event=None if stream is None else stream.record_event(),
            )
        return value


def _built(build: Callable[[], Derived]) -> Derived:
    with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could not be used outside
        return build()


def capturing(device: torch.device) -> bool:
    """Whether what this thread launches on a device is recorded for a graph instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> Any:
    """The stream that work on a device goes to now; None on a CPU."""
    return None if device.type == "cpu" else torch.get_device_module(device).current_stream(device)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def count_writes(owner: object, names: Iterable[str]) -> None:
    """Replace those of a frozen object's tensors that don't count writes, made under `torch.inference_mode`, by copies.

    A call being compiled keeps what it has, of which nothing is remembered then.
    """
    if torch.compiler.is_compiling():
        return
    for name in names:
        tensor = getattr(owner, name)
        if tensor is not None and tensor.is_inference():
            with torch.inference_mode(False):
                object.__setattr__(owner, name, tensor.clone())
