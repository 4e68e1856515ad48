"""What is derived from tile lists and frames, kept on their storage: it lives as long as they do, and no longer."""

import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Derived = TypeVar("Derived")
Tensors = Iterable[Tensor | None]
Version = tuple[object, ...]
_WRITTEN = "_dit_accel_written"  # of a storage: its last announced write, for every copy of this package
_ATTRIBUTE, _COPIED = f"_derived_{__package__}", f"_copied_{__package__}"  # of a storage, for this copy alone
_CAPTURED: dict[int, tuple["_Entry", list[Tensor]]] = {}  # what captured graphs read must not move or go


@dataclass(frozen=True, slots=True)
class _Entry:
    """A value, what it was derived from, and on a GPU the stream that made it and the event of its being made."""

    value: Any
    storages: tuple[weakref.ref[torch.UntypedStorage], ...]
    versions: tuple[Version, ...]
    stream: Any
    event: Any

    def fits(self, storages: list[torch.UntypedStorage], versions: tuple[Version, ...]) -> bool:
        return self.versions == versions and all(a() is b for a, b in zip(self.storages, storages, strict=True))

    def hand_over(self, stream: Any) -> None:
        """Let another stream wait until the value is made, and its memory wait for that stream."""
        if stream is not None and stream != self.stream:
            stream.wait_event(self.event)
            for tensor in nested_tensors(self.value):
                tensor.record_stream(stream)


class StorageCache(Generic[Derived]):
    """Values derived from tensors, kept on the storage of the first of them; nothing is ever evicted.

    A storage rather than a Python object holds them: compiled graphs hand over aliases. A value counts while all its
    tensors live and none was written to, as TileLists says. Nothing is kept of inference tensors, whose writes nobody
    counts, nor while a call is compiled or a stream captures, since memory is then the graph's. A stream other than the
    one that made a value waits for it. A capture takes the value that is there for all replays of its graph, and keeps
    it until `release_captured`, since replays run no Python that could look; a later call that finds changes warns.
    """

    def get(
        self, parts: Tensors, key: tuple[Hashable, ...], build: Callable[[], Derived], loose: Tensors = ()
    ) -> Derived:
        """The value that `build` makes of some tensors and a key, built on first use.

        `parts` are what it is derived from, None for what is absent; the first one there owns the value, which must not
        hold the tensors themselves: they would keep each other alive. `loose` are more of them, which a caller may
        write to between replays of a graph: a capture builds what depends on these anew, inside of the graph.
        """
        if torch.compiler.is_compiling():
            return build()
        parts, loose = list(parts), list(loose)
        here = [x for x in (*parts, *loose) if x is not None]
        device = here[0].device
        graph = capturing(device)
        if any(x.is_inference() for x in here) or (graph and any(x is not None for x in loose)):
            return _built(build)
        storages, versions = [x.untyped_storage() for x in here], tuple(map(_version, here))
        entries: dict[tuple, _Entry] = storages[0].__dict__.setdefault(_ATTRIBUTE, {})
        shape = tuple(None if x is None else (x.storage_offset(), x.shape, x.stride()) for x in (*parts, *loose))
        slot = (self, key, tuple(map(id, storages)), shape)
        entry = entries.get(slot)
        if entry is not None and entry.fits(storages, versions):
            if graph:
                _CAPTURED.setdefault(id(entry), (entry, here))
            else:
                entry.hand_over(current_stream(device))
            return entry.value
        if id(entry) in _CAPTURED:
            _warn_of_graphs()
        value = _built(build)
        if not graph:
            stream = current_stream(device)
            for old in [k for k, entry in list(entries.items()) if any(x() is None for x in entry.storages)]:
                entries.pop(old, None)
            event = None if stream is None else stream.record_event()
            entries[slot] = _Entry(value, tuple(map(weakref.ref, storages)), versions, stream, event)
        return value


def _built(build: Callable[[], Derived]) -> Derived:
    with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode could not be used outside
        return build()


def _version(x: Tensor) -> Version:
    """What changes with a tensor's values: torch's count of writes, and the last one by `changed` or seen on a CPU."""
    storage = x.untyped_storage().__dict__
    known = x._version, storage.get(_WRITTEN)
    if not readable(x.device):
        return known
    copies: dict[tuple, tuple[object, Tensor]] = storage.setdefault(_COPIED, {})
    view = (x.storage_offset(), x.shape, x.stride())
    if view not in copies or not torch.equal(x, copies[view][1]):
        copies[view] = (object(), x.clone())
    return *known, copies[view][0]


def readable(device: torch.device) -> bool:
    """Whether the values of a device's tensors can be read without waiting for it."""
    return device.type == "cpu"


def changed(tensors: Tensors) -> None:
    """Tell that tensors were written to in a way that torch doesn't count: what was derived from them is made anew."""
    for x in tensors:
        if x is None:
            continue
        storage = x.untyped_storage()
        storage.__dict__[_WRITTEN] = object()
        if any(y.untyped_storage() is storage for _, here in _CAPTURED.values() for y in here):
            _warn_of_graphs()


def release_captured() -> None:
    """Let go of everything that is kept for captured CUDA graphs: for when none of these graphs is replayed again.

    Nothing tells when a graph is gone. Until this is called, each set of lists that was captured stays on the device,
    with what was derived from it.
    """
    _CAPTURED.clear()


def _warn_of_graphs() -> None:
    warnings.warn(
        "tile lists or frames that a captured CUDA graph reads were written to: its replays go on with what was made "
        "of their old values; capture the graph again",
        stacklevel=2,
    )


def capturing(device: torch.device) -> bool:
    """Whether what this thread launches on a device is recorded for a graph instead of run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> Any:
    """The stream that work on a device goes to now; None where a device has none, such as a CPU or MPS."""
    if device.type in ("cpu", "meta"):
        return None
    ask = getattr(torch.get_device_module(device), "current_stream", None)
    return None if ask is None else ask(device)


def nested_tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    parts = [getattr(value, field.name) for field in fields(value)] if is_dataclass(value) else value
    if isinstance(parts, (list, tuple)):
        for part in parts:
            yield from nested_tensors(part)


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
