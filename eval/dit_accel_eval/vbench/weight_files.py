"""The files of weights of VBench's networks and some others: where each lies, where it comes from, and its hash.

The folder is laid out as the official cache (``~/.cache/vbench`` or ``$VBENCH_CACHE_DIR``), which can be used as it is;
Inception, I3D, HPSv2 and PickScore, which VBench does not ask, and BERT's words lie in folders beside.
"""

import hashlib
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dit_accel import ConfigError

from ..metrics.weights import folder


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One file of weights.

    Attributes:
        name: what commands and errors call it.
        path: where it lies in the folder.
        source: its address.
        sha256: its hash or the hash's beginning, as its publisher gives it; "" where there is none.
        hub: the hub's repository and file, where it is there.
        kind: of that repository.
    """

    name: str
    path: str
    source: str
    sha256: str = ""
    hub: tuple[str, str] | None = None
    kind: str = "model"


def _at(name: str, folder: str, source: str, sha256: str = "") -> WeightFile:
    """Return a file that is called as in its address."""
    return WeightFile(name=name, path=f"{folder}/{source.rpartition('/')[2]}", source=source, sha256=sha256)


def _on_hub(name: str, folder: str, repository: str, file: str, *, kind: str = "model", sha256: str = "") -> WeightFile:
    source = f"https://huggingface.co/{'spaces/' if kind == 'space' else ''}{repository}/resolve/main/{file}"
    hub = (repository, file)
    return WeightFile(name=name, path=f"{folder}/{file}", source=source, hub=hub, kind=kind, sha256=sha256)


_VBENCH, _MODELS = "OpenGVLab/VBench_Used_Models", "https://openaipublic.azureedge.net/clip/models"
_META, _CODE = "https://dl.fbaipublicfiles.com", "https://github.com"
_B32 = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"
_L14 = "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
_BERT = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"

_ALL = (
    _at("clip-b32", "clip_model", f"{_MODELS}/{_B32}/ViT-B-32.pt", _B32),
    _at("clip-l14", "clip_model", f"{_MODELS}/{_L14}/ViT-L-14.pt", _L14),
    _at("dino", "dino_model", f"{_META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"),
    _at("aesthetic", "aesthetic_model/emb_reader",
        f"{_CODE}/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth"),
    _at("musiq", "pyiqa_model",
        f"{_CODE}/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth", "358bb6af"),
    WeightFile(name="raft", path="raft_model/models/raft-things.pth",
               source="https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip"),
    _on_hub("amt", "amt_model", "lalala125/AMT", "amt-s.pth"),
    _on_hub("umt", "umt_model", _VBENCH, "l16_ptk710_ftk710_ftk400_f16_res224.pth"),
    _on_hub("viclip", "ViCLIP", _VBENCH, "ViClip-InternVid-10M-FLT.pth"),
    _on_hub("tag2text", "caption_model", "xinyu1205/recognize-anything", "tag2text_swin_14m.pth", kind="space"),
    _at("grit", "grit_model",
        "https://datarelease.blob.core.windows.net/grit/models/grit_b_densecap_objectdet.pth"),
    _on_hub("bert-words", "bert_model", "google-bert/bert-base-uncased", "vocab.txt", sha256=_BERT),
    _at("dinov2", "dinov2_model", f"{_META}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"),
    _at("inception", "inception_model",
        f"{_CODE}/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth", "6726825d"),
    _on_hub("i3d", "i3d_model", "flateon/FVD-I3D-torchscript", "i3d_torchscript.pt"),
    _on_hub("hpsv2", "hps_model", "xswu/HPSv2", "HPS_v2.1_compressed.pt"),
    _on_hub("pickscore", "pickscore_model", "yuvalkirstain/PickScore_v1", "model.safetensors"),
)  # fmt: skip

WEIGHT_FILES: dict[str, WeightFile] = {one.name: one for one in _ALL}


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
    from huggingface_hub import hf_hub_download

    try:
        found = hf_hub_download(*one.hub, repo_type=one.kind)
        (at / one.path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(at / one.path) as temporary:
            copyfile(found, temporary)
    except Exception as error:  # the hub's client raises all kinds
        return f"{one.hub[0]} could not be fetched from the hub: {str(error).splitlines()[0]}"
    return None
