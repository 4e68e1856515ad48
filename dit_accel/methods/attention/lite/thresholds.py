"""Files of LiteAttention's thresholds by layer and step; only this module knows their format.

`dit-accel tune lite` writes them:

version = 1
model = "wan2.1-1.3b"         # `Model.name` of what they were tuned on
criterion = "maxgap"          # "maxgap": log2 units; "mass": shares of a row's softmax mass
num_inference_steps = 50
target_error = 0.05           # what the tuner aimed at; for readers alone
[thresholds]                  # component name -> one list per layer, one threshold per step; -inf drops nothing
transformer = [[-10.0, -9.5], [-8.0, -8.25]]
"""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ....errors import ConfigError
from ....files import read_text, write_text

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteThresholds:
    """Thresholds of one model and one number of steps: the content of a file, as the module's text shows it."""

    model: str
    criterion: Literal["maxgap", "mass"]
    num_inference_steps: int
    thresholds: Mapping[str, tuple[tuple[float, ...], ...]]
    target_error: float | None = None

    def __post_init__(self) -> None:
        if self.criterion not in ("maxgap", "mass"):
            raise ConfigError(f"lite thresholds are of 'maxgap' or 'mass', got criterion {self.criterion!r}")
        for name, layers in self.thresholds.items():
            for layer, row in enumerate(layers):
                where = f"lite thresholds of {name}, layer {layer}"
                if len(row) != self.num_inference_steps:
                    raise ConfigError(
                        f"{where}, must be one per step, {self.num_inference_steps} in all, got {len(row)}; tune again"
                    )
                for value in row:
                    check_threshold(where, self.criterion, value)
        if not self.thresholds or not all(self.thresholds.values()):
            raise ConfigError("lite thresholds need a list for every layer of every transformer, got none; tune again")

    def at(self, transformer: str, layer: int, step_index: int) -> float:
        """Return a layer's threshold at a step, 0-based; raise `ConfigError` for layers that the table lacks."""
        layers = self.thresholds.get(transformer, ())
        if layer >= len(layers):
            known = ", ".join(f"{len(rows)} layers of {name}" for name, rows in self.thresholds.items())
            raise ConfigError(
                f"lite needs thresholds for {transformer} layer {layer}, but the file has {known}; tune on this model"
            )
        return layers[layer][step_index]


def check_threshold(where: str, criterion: str, value: float, allow_positive: bool = False) -> None:
    """Raise `ConfigError` for a maxgap at 0 or above unless ``allow_positive``, a share outside (0, 1), or NaN."""
    if criterion == "maxgap":
        if math.isnan(value) or (value >= 0 and not allow_positive):
            raise ConfigError(
                f"{where} must be < 0 (log2 units), got {value}: at 0 and above a tile is dropped even if it holds a "
                "row's largest weight; -10 is usual, lite.allow_positive_threshold permits it for debugging"
            )
    elif not 0 < value < 1:
        raise ConfigError(f"{where} must be a share of the softmax mass in (0, 1) for {criterion!r}, got {value}")


def read_thresholds(path: str | Path) -> LiteThresholds:
    """Read a thresholds file; `ConfigError` for what is none."""
    try:
        table: dict[str, Any] = tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"lite.thresholds_file {path} can't be read ({reason}); run dit-accel tune lite") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"lite.thresholds_file {path} is not valid TOML: {error}") from None
    version = table.pop("version", None)
    if version != VERSION:
        raise ConfigError(
            f"lite.thresholds_file {path} has version {version!r}, this release reads version {VERSION}; tune again"
        )
    try:
        tables = {
            str(name): tuple(tuple(float(value) for value in row) for row in layers)
            for name, layers in table.pop("thresholds").items()
        }
        return LiteThresholds(thresholds=tables, **table)
    except ConfigError as error:
        raise ConfigError(f"{error} ({path})") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"lite.thresholds_file {path} is not what tune lite writes: {error!r}; tune again") from None


def write_thresholds(path: str | Path, thresholds: LiteThresholds) -> None:
    """Write a thresholds file, whole or not at all; the inverse of `read_thresholds`."""
    import tomli_w

    fields = {name: value for name, value in asdict(thresholds).items() if value is not None}
    write_text(path, tomli_w.dumps({"version": VERSION, **fields}))
