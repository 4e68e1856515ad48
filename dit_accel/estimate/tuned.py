"""Settings that `dit-accel tune pipeline` found for a model, kept in the user's cache where `recommend` finds them.

Such a file is what ``generate --config`` takes, with a table ``[tuned]`` that says for which model and output the
setting was measured, and how it came out.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..adapters.embedded import embedded_at, embedded_names
from ..errors import ConfigError
from ..files import read_text, user_cache, write_text
from ..methods.config import MethodConfig
from ..methods.toml import from_toml, run_table, to_toml, tuned_table

EMBEDDED = "embedded/"
"""What the repo of an embedded model's family begins with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedResult:
    """How a tuned setting came out, on prompts that the search never saw."""

    model: str  # embedded model, folder or hub id, by `model_key`
    height: int  # output height in pixels
    width: int  # output width in pixels
    num_frames: int  # output frames
    num_inference_steps: int  # steps of the dense run that it is held against
    metric: str  # what was measured, such as ``psnr``, against the converged run
    quality: float  # its mean
    speedup: float  # dense steps over the work of the setting
    prompts: int  # on how many


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedSetting:
    """A tuned setting and its file."""

    path: Path  # the TOML
    methods: Sequence[MethodConfig]  # what it attaches
    run: Mapping[str, Any]  # what it sets besides, such as ``num_inference_steps``
    measured: TunedResult  # how it came out


def model_key(model: str) -> str:
    """Return a model's name in tuned files: an embedded model's, a folder's whole path, or a hub id."""
    name = model.removeprefix(EMBEDDED)
    if name in embedded_names():
        return name
    if not Path(model).is_dir():
        return model
    return embedded_at(model) or str(Path(model).resolve())


def tuned_folder(model: str) -> Path:
    """Return the folder in the user's cache that holds a model's tuned files."""
    key = model_key(model)
    readable = re.sub(r"[^\w.-]+", "-", key).strip("-")[-60:]
    return user_cache() / "tuned" / f"{readable}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def tuned_text(methods: Sequence[MethodConfig], run: Mapping[str, Any], measured: TunedResult, what: str) -> str:
    """Return the text of a tuned file; ``what`` is the setting in words."""
    return f"# {what}, by dit-accel tune pipeline\n{to_toml(methods, run, asdict(measured))}"


def keep_tuned(name: str, text: str, model: str) -> Path:
    """Write a tuned file into the model's folder of the cache, where `recommend` looks; returns the file."""
    folder = tuned_folder(model)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / name, text)
    return folder / name


def find_tuned(model: str) -> list[TunedSetting]:
    """Read the settings that were tuned for a model, the fastest first; `ConfigError` if a file can't be read."""
    settings = [read_tuned(path) for path in sorted(tuned_folder(model).glob("*.toml"))]
    return sorted(settings, key=lambda setting: -setting.measured.speedup)


def read_tuned(path: Path) -> TunedSetting:
    """Read a tuned file; `ConfigError` for one that can't be read or was not measured."""
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the tuned setting {path} can't be read ({error}); delete it, or tune again") from None
    where = f"the tuned setting {path}"
    table = tuned_table(text, where)
    wrong = [name for name, kind in TunedResult.__annotations__.items() if not _is_of(table.get(name), kind)]
    if wrong or table.keys() - TunedResult.__annotations__.keys():
        raise ConfigError(f"{where} has no [tuned] table with a right {', '.join(wrong) or 'set of keys'}; tune again")
    return TunedSetting(
        path=path, methods=from_toml(text, where), run=run_table(text, where), measured=TunedResult(**table)
    )


def _is_of(value: Any, kind: Any) -> bool:
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
