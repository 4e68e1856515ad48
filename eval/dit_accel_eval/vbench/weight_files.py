"""The files of weights of VBench's networks and some others: where each lies, where it comes from, and its hash.

The folder is laid out as the official cache (``~/.cache/vbench`` or ``$VBENCH_CACHE_DIR``), which can be used as it is;
Inception, I3D, HPSv2 and PickScore, which VBench does not ask, and BERT's words lie in folders beside.
"""

import hashlib
import re
import tomllib
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dit_accel import ConfigError

from ..metrics.weights import folder

_HUB = re.compile(r"https://huggingface\.co/(spaces/)?([^/]+/[^/]+)/resolve/main/(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One file of weights.

    Attributes:
        path: where it lies in the folder.
        source: its address.
        sha256: its hash or the hash's beginning, as its publisher gives it; "" where there is none.
    """

    path: str
    source: str
    sha256: str = ""

    @property
    def hub(self) -> tuple[str, str, str] | None:
        """The Hugging Face hub's repository, file and kind of repository; None where it is not there."""
        found = _HUB.fullmatch(self.source)
        return (found[2], found[3], "space" if found[1] else "model") if found else None


WEIGHT_FILES: dict[str, WeightFile] = {
    name: WeightFile(**held)
    for name, held in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")).items()
}
"""Name, as commands and errors have it -> the file."""


def default_folder() -> Path:
    """Return the folder of the files where none is named."""
    return folder() / "vbench"


def absent(name: str, at: Path) -> str | None:
    """Return why a file can't be had from a folder, with where to put what; None if it is there."""
    one = WEIGHT_FILES[name]
    if (at / one.path).is_file():
        return None
    return f"{name} is missing: put {one.source} at {at / one.path}"


@cache
def _hash(path: Path, changed: int) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def hash_of(name: str, at: Path) -> str:
    """Return the SHA-256 of a file; one that is missing, or another than its publisher's, is refused."""
    reason = absent(name, at)
    if reason is not None:
        raise ConfigError(reason)
    one = WEIGHT_FILES[name]
    path = at / one.path
    found = _hash(path, path.stat().st_mtime_ns)
    if not found.startswith(one.sha256):
        raise ConfigError(
            f"{path} has SHA-256 {found}, expected was {one.sha256}{'...' if len(one.sha256) < 64 else ''}; it is not "
            f"used, download it again from {one.source}"
        )
    return found


def state(name: str, at: Path) -> dict[str, Any]:
    """Return a file's path, source, expected hash and own hash, and the reason why it can't be used or None."""
    one = WEIGHT_FILES[name]
    try:
        own, reason = hash_of(name, at), None
    except ConfigError as error:
        own, reason = None, str(error)
    return {"path": str(at / one.path), "source": one.source, "expected": one.sha256, "sha256": own, "reason": reason}


def read(name: str, at: Path) -> dict[str, Any]:
    """Return what a file of weights holds, its hash checked: tensors by name, in float32; other files are refused."""
    hash_of(name, at)
    path = at / WEIGHT_FILES[name].path
    try:
        held = _scripted(path) if name.startswith("clip-") else _plain(path)
    except Exception as error:  # torch's readers raise all kinds
        raise ConfigError(
            f"{path} can't be read as weights ({str(error).splitlines()[0]}); download it again from "
            f"{WEIGHT_FILES[name].source}"
        ) from None
    tensors = ((key.removeprefix("module."), one) for key, one in held.items() if isinstance(one, torch.Tensor))
    return {key: one.float() if one.is_floating_point() else one for key, one in tensors}


def _scripted(path: Path) -> dict[str, Any]:
    """Return the tensors of OpenAI's files, which are TorchScript."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have its files in another form
        return torch.jit.load(path, map_location="cpu").state_dict()


def _plain(path: Path) -> dict[str, Any]:
    """Return a checkpoint's tensors, out of the one entry that holds them where there is one."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    held = torch.load(path, map_location="cpu", weights_only=True)
    for entry in ("state_dict", "model", "module"):
        if isinstance(held.get(entry), dict):
            return held[entry]
    return held


def from_hub(name: str, at: Path) -> str | None:
    """Fetch a file that is on the hub into a folder; returns why it could not be, None if it is there."""
    from shutil import copyfile

    from dit_accel.files import written_whole

    one = WEIGHT_FILES[name]
    if absent(name, at) is None:
        return None
    assert one.hub is not None, f"{name} is not on the hub"
    repository, file, kind = one.hub
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(repository, file, repo_type=kind)
        (at / one.path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(at / one.path) as temporary:
            copyfile(found, temporary)
    except Exception as error:  # the hub's client raises all kinds
        return f"{repository} could not be fetched from the hub: {str(error).splitlines()[0]}"
    return None
