"""What is derived from tile lists and other tensors that seldom change, remembered as long as those tensors live."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from threading import Lock
from typing import Generic, TypeVar

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Derived = TypeVar("Derived")


class StorageCache(Generic[Derived]):
    """Values by the storage and version of the tensors they were made from, the oldest leaving first.

    Keyed by storage, not by Python object: compiled graphs hand over aliases. A dead storage drops its entry.
    """

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[tuple, tuple[list[StorageWeakRef], Derived]] = OrderedDict()
        self._lock = Lock()

    def get(self, parts: Iterable[Tensor | None], key: tuple[Hashable, ...], build: Callable[[], Derived]) -> Derived:
        """The value for these tensors (None: absent) and this key, built on first use."""
        tensors = list(parts)
        refs = [StorageWeakRef(t.untyped_storage()) for t in tensors if t is not None]
        live = iter(refs)
        full_key = (
            key,
            *(
                None if t is None else (next(live).cdata, t.storage_offset(), tuple(t.shape), t.stride(), _version(t))
                for t in tensors
            ),
        )
        with self._lock:
            found = self._entries.get(full_key)
            if found is not None and not any(r.expired() for r in found[0]):
                self._entries.move_to_end(full_key)
                return found[1]
        value = build()
        with self._lock:
            for stale in [k for k, (rs, _) in self._entries.items() if any(r.expired() for r in rs)]:
                del self._entries[stale]
            self._entries[full_key] = (refs, value)
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        return value


def _version(tensor: Tensor) -> int:
    """In-place write counter, 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version
