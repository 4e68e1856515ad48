"""The file that `dit-accel tune profile` writes: which blocks of which weights may be cached."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ...files import read_text

VERSION = 1
SAMPLED = 8
"""Values of each parameter that go into `weights_digest`."""


def read_profile(path: str, option: str) -> dict[str, Any]:
    """Return the content of a profile, the JSON file that ``option`` names; raise `ConfigError` if it is none."""
    try:
        profile = json.loads(read_text(path))
    except OSError as error:
        raise ConfigError(
            f"{option} = {path!r} can't be read ({error.strerror}); write it with dit-accel tune profile -o {path}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{option} = {path!r} is not JSON ({error}); write it with dit-accel tune profile") from None
    try:
        right = profile["profile"] == VERSION
        for entry in profile["transformers"].values():
            right &= isinstance(entry["weights"], str) and isinstance(entry["blocks"], int)
            right &= all(isinstance(block, int) and 0 <= block < entry["blocks"] for block in entry["cached"])
    except (KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise ConfigError(
            f"{option} = {path!r} is no profile that this release reads (version {VERSION}); write it with dit-accel "
            "tune profile"
        )
    return profile


def cached_in(profile: dict[str, Any], path: str, option: str, name: str) -> tuple[int, ...]:
    """Return the blocks that a profile lets be cached in a transformer; raise `ConfigError` if it names none."""
    entries = profile["transformers"]
    if name not in entries:
        raise ConfigError(
            f"{option} = {path!r} was measured on {', '.join(entries)}, and this pipeline has {name}; measure it with "
            "dit-accel tune profile"
        )
    if not entries[name]["cached"]:
        raise ConfigError(f"{option} = {path!r} names 0 blocks of {name} that may be cached; measure it with --cached")
    return tuple(sorted(entries[name]["cached"]))


def require_weights(profile: dict[str, Any], path: str, option: str, name: str, transformer: nn.Module) -> None:
    """Raise `ConfigError` if a profile was measured on other weights than a transformer's."""
    known, here = profile["transformers"][name]["weights"], weights_digest(transformer)
    if here and known != here:
        raise ConfigError(
            f"{option} = {path!r} was measured on {profile.get('model')!r} with weights {known}, {name} has {here}; "
            "measure it with dit-accel tune profile, or copy the block numbers if you want them all the same"
        )


@torch.no_grad()
def weights_digest(transformer: nn.Module) -> str:
    """Return 12 hexadecimal digits that tell a transformer's weights from others'; empty where some are not loaded.

    They are made of the parameters' names and shapes and of a few values of each, as bfloat16, so that the type in
    which a model is loaded does not matter.
    """
    digest, values = hashlib.sha256(), {}
    for name, parameter in sorted(transformer.named_parameters()):
        if parameter.is_meta:
            return ""
        digest.update(f"{name} {tuple(parameter.shape)};".encode())
        if parameter.is_floating_point():
            first = parameter.reshape(-1)[:SAMPLED].to(torch.bfloat16)
            values.setdefault(parameter.device, []).append(first)
    for parts in values.values():
        digest.update(torch.cat(parts).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
