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

_HUB = "OpenGVLab/VBench_Used_Models"
_UMT, _VICLIP = "l16_ptk710_ftk710_ftk400_f16_res224.pth", "ViClip-InternVid-10M-FLT.pth"
_SPACE, _TAG2TEXT = "xinyu1205/recognize-anything", "tag2text_swin_14m.pth"
_RESOLVED = f"https://huggingface.co/{_HUB}/resolve/main"
_CLIP = "https://openaipublic.azureedge.net/clip/models"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFile:
    """One file of weights.

    Attributes:
        name: what commands and errors call it.
        path: where it lies in the folder.
        source: its address.
        sha256: its hash or the hash's beginning, as its publisher tells it; "" where none is told.
        hub: the hub's repository and file, where it is there.
        kind: of that repository.
    """

    name: str
    path: str
    source: str
    sha256: str = ""
    hub: tuple[str, str] | None = None
    kind: str = "model"


def _on_hub(name: str, folder: str, repository: str, file: str) -> WeightFile:
    source = f"https://huggingface.co/{repository}/resolve/main/{file}"
    return WeightFile(name=name, path=f"{folder}/{file}", source=source, hub=(repository, file))


_ALL = (
    WeightFile(
        name="clip-b32", path="clip_model/ViT-B-32.pt",
        source=f"{_CLIP}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    ),
    WeightFile(
        name="clip-l14", path="clip_model/ViT-L-14.pt",
        source=f"{_CLIP}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    ),
    WeightFile(
        name="clip-words", path="ViCLIP/bpe_simple_vocab_16e6.txt.gz",
        source="https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz",
    ),
    WeightFile(
        name="dino", path="dino_model/dino_vitbase16_pretrain.pth",
        source="https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    ),
    WeightFile(
        name="aesthetic", path="aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth",
        source="https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
    ),
    WeightFile(
        name="musiq", path="pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",
        source="https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
        sha256="358bb6af",
    ),
    WeightFile(
        name="raft", path="raft_model/models/raft-things.pth",
        source="https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
    ),
    WeightFile(
        name="amt", path="amt_model/amt-s.pth", source="https://huggingface.co/lalala125/AMT/resolve/main/amt-s.pth",
        hub=("lalala125/AMT", "amt-s.pth"),
    ),
    WeightFile(
        name="umt", path=f"umt_model/{_UMT}", source=f"{_RESOLVED}/{_UMT}", hub=(_HUB, _UMT),
    ),
    WeightFile(
        name="viclip", path=f"ViCLIP/{_VICLIP}", source=f"{_RESOLVED}/{_VICLIP}", hub=(_HUB, _VICLIP),
    ),
    WeightFile(
        name="tag2text", path=f"caption_model/{_TAG2TEXT}", hub=(_SPACE, _TAG2TEXT), kind="space",
        source=f"https://huggingface.co/spaces/{_SPACE}/resolve/main/{_TAG2TEXT}",
    ),
    WeightFile(
        name="grit", path="grit_model/grit_b_densecap_objectdet.pth",
        source="https://datarelease.blob.core.windows.net/grit/models/grit_b_densecap_objectdet.pth",
    ),
    WeightFile(
        name="bert-words", path="bert_model/vocab.txt", hub=("google-bert/bert-base-uncased", "vocab.txt"),
        source="https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt",
        sha256="07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    ),
    WeightFile(
        name="dinov2", path="dinov2_model/dinov2_vitb14_pretrain.pth",
        source="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    ),
    WeightFile(
        name="inception", path="inception_model/pt_inception-2015-12-05-6726825d.pth", sha256="6726825d",
        source="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
    ),
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
    found = hashlib.sha256()
    with path.open("rb") as opened:
        while part := opened.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def hash_of(name: str, at: Path) -> str:
    """Return the SHA-256 of a file that is there.

    Raises:
        ConfigError: if it is missing, or is another than its publisher tells.
    """
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
    """Return what a file of weights holds, its hash checked: tensors by name, in float32.

    Raises:
        ConfigError: if it is missing, another, or no file of weights.
    """
    hash_of(name, at)
    path = at / WEIGHT_FILES[name].path
    try:
        held = _scripted(path) if name.startswith("clip-") else _plain(path)
    except Exception as error:  # torch's readers raise all kinds
        raise ConfigError(
            f"{path} can't be read as weights ({str(error).splitlines()[0]}); download it again from "
            f"{WEIGHT_FILES[name].source}"
        ) from None
    tensors = {key: value for key, value in held.items() if isinstance(value, torch.Tensor)}
    return {
        key.removeprefix("module."): one.float() if one.is_floating_point() else one for key, one in tensors.items()
    }


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
    """Fetch a file that is on the hub into a folder; returns why it could not be, None if it is there.

    Args:
        name: of the file.
        at: the folder.
    """
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
