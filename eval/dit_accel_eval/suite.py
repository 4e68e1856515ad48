"""Suites: which arms are compared on which clips, read from versioned TOML files."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean
from dit_accel.methods.config import MethodConfig, from_dict
from dit_accel.methods.registry import method

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SUITE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One setting under test.

    Attributes:
        name: unique in the suite; the row's name.
        num_inference_steps: denoising steps.
        methods: what is attached.
        against: the arm whose PSNR is subtracted clip by clip; None: no paired column.
        num_frames: frames of its clips; None: the suite's. Only `longer` compares clips of several lengths.
    """

    name: str
    num_inference_steps: int
    methods: tuple[MethodConfig, ...]
    against: str | None = None
    num_frames: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """A comparison on held-out prompts of the embedded model.

    Attributes:
        name: the suite's name.
        num_frames: frames of a clip.
        num_inference_steps: steps of the dense reference and of every arm that names none.
        guidance_scale: classifier-free guidance.
        clips: held-out clips, seeds 0 .. clips - 1.
        arms: what is compared; each against the dense run of the same prompt and seed.
    """

    name: str
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    clips: int
    arms: tuple[Arm, ...]


def read_suite(path: Path) -> Suite:
    """Read a suite from a TOML file.

    Raises:
        ConfigError: for a missing file, another version, or an unknown or ill-typed key.
    """
    if not path.is_file():
        raise ConfigError(f"no suite at {path}; name a TOML file such as eval/suites/radial-tiny.toml")
    try:
        data = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    if data.pop("version", None) != SUITE_VERSION:
        raise ConfigError(f"{path} is not of version {SUITE_VERSION}, which this release reads; rewrite it for that")
    arms = data.pop("arm", [])
    known = [field for field in Suite.__slots__ if field != "arms"]
    for key in data:
        if key not in known:
            raise ConfigError(f"{path} has an unknown key {key!r}; {did_you_mean(key, known)}")
    missing = [key for key in known if key not in data]
    if missing or not arms:
        raise ConfigError(f"{path} lacks {', '.join(missing) or 'an [[arm]]'}; add what is missing")
    made = tuple(_arm(arm, data["num_inference_steps"], path) for arm in arms)
    names = [arm.name for arm in made]
    for arm in made:
        if names.count(arm.name) > 1:
            raise ConfigError(f"{path} has two arms called {arm.name!r}; rename one")
        if arm.against is not None and arm.against not in names:
            raise ConfigError(f"{path}: {arm.name!r} is against {arm.against!r}; {did_you_mean(arm.against, names)}")
    return Suite(**data, arms=made)


def _arm(values: Mapping[str, Any], steps: int, path: Path) -> Arm:
    if "name" not in values:
        raise ConfigError(f"{path} has an arm without a name: {dict(values)}; give it one")
    methods = [from_dict(method(key), value) for key, value in values.items() if isinstance(value, dict)]
    known = ("name", "num_inference_steps", "against", "num_frames")
    for key, value in values.items():
        if key not in known and not isinstance(value, dict):
            raise ConfigError(f"{path}: arm {values['name']!r} has an unknown key {key!r}; {did_you_mean(key, known)}")
    return Arm(
        name=values["name"],
        num_inference_steps=values.get("num_inference_steps", steps),
        methods=tuple(methods),
        against=values.get("against"),
        num_frames=values.get("num_frames"),
    )
