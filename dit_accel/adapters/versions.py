"""The versions of torch and diffusers that an attachment needs: pip asks for them, and a server may go around pip."""

import importlib
import warnings
from functools import lru_cache
from typing import NamedTuple

from torch.torch_version import TorchVersion

from ..errors import ConfigError


class Needed(NamedTuple):
    """Versions of a package."""

    asked: str  # what pyproject.toml asks for
    least: str  # the oldest one that was tried; servers pin some that are older than ``asked``


NEEDED = {"torch": Needed("2.9", "2.9"), "diffusers": Needed("0.42", "0.37")}


@lru_cache(maxsize=1)
def require_versions() -> None:
    """Warn of a package that is older than it should be, once a process; refuse one older than any that was tried."""
    for name, needed in NEEDED.items():
        installed = TorchVersion(importlib.import_module(name).__version__)
        if installed < needed.least:
            raise ConfigError(f"dit-accel needs {name} {needed.asked} or newer, found {installed}; update {name}")
        if installed < needed.asked:
            warnings.warn(
                f"{name} {installed} is older than {needed.asked}, which dit-accel asks for: some methods were tried "
                f"with it, the newer models are not there; update {name} where your server lets you",
                stacklevel=2,
            )
