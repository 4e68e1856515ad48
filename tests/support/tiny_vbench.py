"""A tiny CLIP by open_clip, and files of weights as OpenAI's are."""

import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import open_clip
import torch
from dit_accel_pipelines.generation.media import read_video
from torch import Tensor, nn

MODEL, OTHER, WIDTH = "tiny-clip", "tiny-other", 16


def _register() -> None:
    """Tell open_clip of two models of one layer, of which a forward takes a millisecond."""
    with tempfile.TemporaryDirectory() as folder:
        for name, width in ((MODEL, WIDTH), (OTHER, 2 * WIDTH)):
            text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": 1, "layers": 1}
            seen = {"image_size": 224, "layers": 1, "width": 2 * width, "head_width": width, "patch_size": 56}
            config = {"embed_dim": width, "vision_cfg": seen, "text_cfg": text}
            Path(folder, f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(Path(folder))


_register()


def weights(folder: Path) -> Path:
    """Write random weights of `MODEL` as a file of a folder; returns it."""
    torch.manual_seed(0)
    torch.save(open_clip.create_model(MODEL, pretrained=None).state_dict(), folder / "small.pt")
    return folder / "small.pt"


def frames_of(path: Path) -> np.ndarray:
    """Return a video's frames, uint8."""
    return np.stack([np.asarray(frame) for frame in read_video(path)])


def scripted(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as OpenAI's files hold them, a TorchScript module's."""
    root = nn.Module()
    for name, value in tensors.items():
        at, *inner = root, *name.split(".")
        for part in inner[:-1]:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.register_parameter(inner[-1], nn.Parameter(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(root), path)
