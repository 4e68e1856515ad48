"""The frames a second of an output: what its model is told, and what its file says."""

import dataclasses
from typing import Any

from dit_accel.errors import ConfigError

from .pipeline_call import CallSignature

RATES = ("frame_rate", "fps")
"""Names of a call's argument for the frames a second."""

TRAINED_RATES = {"SkyReelsV2DiffusionForcing": (16, 24)}
"""Beginning of a pipeline class's name -> the rates that its model has an embedding for."""


def with_rate(request: Any, call: CallSignature) -> tuple[Any, list[str]]:
    """Fill in a `Request`'s rate by its pipeline's default, and refuse what the model can't make; also return notes."""
    name, fps = _argument(call), request.fps
    if name is None:
        stays = f"{call.name} takes no frame rate, so that the same frames play at {fps:g} a second" if fps else None
        return request, [stays] if stays and call.takes("num_frames") else []
    if fps is None:
        default = call.default(name)
        return (dataclasses.replace(request, fps=float(default)) if default and not request.embedded else request), []
    known = next((rates for beginning, rates in TRAINED_RATES.items() if call.name.startswith(beginning)), None)
    if known and fps not in known:
        raise ConfigError(f"{call.name} knows {' and '.join(map(str, known))} frames a second, got fps {fps:g}; choose")
    if _is_whole(call, name) and fps % 1:
        raise ConfigError(f"{call.name} takes a whole {name}, got fps {fps:g}; use {round(fps)}")
    return request, []


def rate_arguments(request: Any, call: CallSignature) -> dict[str, Any]:
    """Return the argument of the call that says the frames a second; empty where it takes none, or none is set."""
    name = _argument(call)
    if name is None or request.fps is None:
        return {}
    return {name: int(request.fps) if _is_whole(call, name) else request.fps}


def _argument(call: CallSignature) -> str | None:
    return next((name for name in RATES if call.takes(name)), None)


def _is_whole(call: CallSignature, name: str) -> bool:
    return call.parameters[name].annotation in (int, "int")
