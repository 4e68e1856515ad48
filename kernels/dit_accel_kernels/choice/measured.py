"""What was measured on this machine, kept on disk: self checks and races, a file for each machine and its versions.

The folder is the user's alone (`cache_folder`), a file is replaced as a whole, and one that is cut short, another
machine's or somebody else's counts as none.
"""

import hashlib
import json
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

from ..backends.torch.compiled import cache_folder, is_own

_lock = threading.RLock()


class Measured:
    """Measurements of one machine by name; read once, and written with what other processes added meanwhile."""

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self._path: Path | None = None
        self._held: dict[str, Any] | None = None

    def _all(self) -> dict[str, Any]:
        if self._held is None:
            self._held = self._read()
        return self._held

    def __getitem__(self, key: str) -> Any:
        """What is kept under a name, or None."""
        with _lock:
            return self._all().get(key)

    def values(self) -> list[Any]:
        """All that is kept."""
        with _lock:
            return list(self._all().values())

    def __setitem__(self, key: str, value: Any) -> None:
        """Keep something, in this process and, where that can be, on the disk."""
        with _lock:
            self._held = {**self._all(), key: value}
            if self._path is None:
                return
            try:
                with tempfile.TemporaryDirectory(dir=self._path.parent) as folder:
                    path = Path(folder) / "kept"
                    path.touch(mode=0o600)
                    kept = {**self._read(), key: value}
                    path.write_text(json.dumps({"machine": self.machine, "kept": kept}, indent=1))
                    path.replace(self._path)
            except OSError as error:
                self._without_file(error)

    def _read(self) -> dict[str, Any]:
        try:
            digest = hashlib.sha256(self.machine.encode()).hexdigest()[:16]
            self._path = cache_folder() / f"measured-{digest}.json"
            if not self._path.exists():
                return {}
            found = json.loads(self._path.read_text()) if is_own(self._path) else None
        except ValueError:
            found = None
        except (OSError, RuntimeError) as error:
            self._without_file(error)
            return {}
        if isinstance(found, dict) and found.get("machine") == self.machine and isinstance(found.get("kept"), dict):
            return found["kept"]
        why = "it is cut short, another machine's or another user's"
        warnings.warn(f"{self._path} counts as none, since {why}: it is written anew", stacklevel=2)
        return {}

    def _without_file(self, error: Exception) -> None:
        self._path = None
        warnings.warn(f"measurements of kernels can't be kept ({error}): they hold for this run", stacklevel=2)
