"""The frames a second of an output: what its model is told, and what its file says."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dit_accel.errors import ConfigError

from .pipeline_call import CallSignature

RATES = ("frame_rate", "fps")
"""Names of a call's argument for the frames a second."""

TRAINED_RATES = {"SkyReelsV2DiffusionForcing": (16, 24)}
"""Beginning of a pipeline class's name -> the rates that its model has an embedding for."""

PLAYED = {
    "Allegro": 15, "CogVideoX": 8, "ConsisID": 8, "EasyAnimate": 8, "Helios": 24, "HunyuanVideoFramepack": 30,
    "HunyuanVideo": 24, "Kandinsky5": 24, "LucyEdit": 24, "Mochi": 30, "MotifVideo": 24, "SkyReelsV2": 24,
    "WanAnimate": 30,
}  # fmt: skip
"""The same -> the rate of the clips that its model was made for, which its call does not ask for; others: 16."""


def with_rate(request: Any, call: CallSignature) -> tuple[Any, list[str]]:
    """Fill in a `Request`'s rate by that of its model, and refuse what the model can't make; also return notes."""
    name, fps = _argument(call), request.fps
    default = _of_class(PLAYED, call) if name is None else call.default(name)
    if fps is None:
        return (dataclasses.replace(request, fps=float(default)) if default and not request.embedded else request), []
    if name is None:
        note = f"{call.name} takes no frame rate, so that the same frames play at {fps:g} a second"
        return request, [note] if call.takes("num_frames") and fps != default else []
    known = _of_class(TRAINED_RATES, call)
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


def _of_class(table: Mapping[str, Any], call: CallSignature) -> Any:
    return next((value for beginning, value in table.items() if call.name.startswith(beginning)), None)


def _argument(call: CallSignature) -> str | None:
    return next((name for name in RATES if call.takes(name)), None)


def _is_whole(call: CallSignature, name: str) -> bool:
    return call.parameters[name].annotation in (int, "int")
