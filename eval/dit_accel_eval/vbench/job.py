"""What a run of `dit-accel eval vbench` works on, and the files that it leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel import ConfigError
from dit_accel.files import check_writable, json_text, written_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoJob:
    """A run, as the command's options of these names (`options`) have it."""

    videos: Path
    output: Path
    name: str
    dimensions: tuple[str, ...] = ()
    custom: bool = False
    prompts: Path | None = None
    full_info: Path | None = None
    samples: int = 5
    subset: int | None = None
    filtered: bool = False
    cache: Path | None = None
    device: str = "cuda"
    tell: Callable[[str], None]
    warn: Callable[[str], None]

    def file(self, what: str) -> Path:
        """Return a file of the results."""
        return self.output / f"{self.name}_{what}"

    def check(self, *files: str) -> None:
        """Make the folder of results, and refuse files there that can't be written, before anything is measured."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output {self.output} can't be made: {error.strerror}; name another folder") from None
        for what in files:
            check_writable(self.file(what), "results")

    def write(self, what: str, held: Any) -> None:
        """Write a file of the results as JSON, whole or not at all."""
        with written_whole(self.file(what)) as temporary:
            temporary.write_text(json_text(held) + "\n", encoding="utf-8")
