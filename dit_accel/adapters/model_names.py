"""What a user may call a model by: an embedded model's name, a folder, or a hub id."""

from pathlib import Path

import dit_accel_assets

from ..errors import ConfigError, did_you_mean


def model_source(name: str) -> str:
    """Return what diffusers loads for a model's name: a folder or a hub id.

    Raises:
        ConfigError: for what is neither an embedded model, a folder nor a hub id.
    """
    known = dit_accel_assets.model_names()
    if name in known:
        return str(dit_accel_assets.model_path(name))
    if "/" not in name and not Path(name).is_dir():
        raise ConfigError(
            f"{name!r} is no embedded model; {did_you_mean(name, known)}; or name a folder of a diffusers pipeline, or "
            "a hub id (owner/name)"
        )
    return name
