"""Clips and captions encoded once and kept on disk, under names that tell what encoded what."""

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.errors import ConfigError
from dit_accel.files import written_whole

from ..generation.progress import Stages
from ..processes.ranks import Ranks
from .clips import Clip
from .recipe import FineTuning
from .trainable import Text, Trainable, text_parts

NO_CAPTION = ""
"""The caption of a clip that is trained without its own."""

FORMAT = 2
"""Of the files, which is part of their names: one of another format is not read."""


def module_hash(module: nn.Module) -> str:
    """Hash a module's weights and number formats, hexadecimal; every byte counts."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def part_hash(part: Any) -> str:
    """Hash an encoder (weights and config) or a tokenizer (its files), hexadecimal."""
    digest = hashlib.sha256()
    if isinstance(part, nn.Module):
        config: Any = part.config
        parts = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        plain = {name: value for name, value in parts.items() if not name.startswith("_")}  # but releases and paths
        plain.pop("transformers_version", None)
        digest.update(f"{module_hash(part)} {json.dumps(plain, sort_keys=True, default=str)}".encode())
        return digest.hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        part.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*.*")):
            digest.update(f"{path.name} ".encode() + path.read_bytes())
    return digest.hexdigest()


class Encoded:
    """The encoded clips of one training, read from disk when they are requested.

    Attributes:
        digest: what tells these clips and captions, as encoded, from others; hexadecimal.
    """

    def __init__(self, folder: Path, latents: Sequence[str], texts: Sequence[str], no_caption: str) -> None:
        self._folder, self._latents, self._texts, self._no_caption = folder, latents, texts, no_caption
        self.digest = hashlib.sha256(json.dumps([*latents, *texts]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._latents)

    def latents(self, place: int) -> Tensor:
        """Return the normalised latents of a clip, float32 [C, F', h, w]."""
        return _read(self._folder, self._latents[place])["latents"]

    def text(self, place: int) -> Text:
        """Return a clip's caption, encoded, without the batch's dimension."""
        return _read(self._folder, self._texts[place])

    def no_caption(self) -> Text:
        """Return the same of a clip that is trained without its caption."""
        return _read(self._folder, self._no_caption)


def encode_clips(
    pipe: Any, trainable: Trainable, clips: Sequence[Clip], recipe: FineTuning, ranks: Ranks, stages: Stages
) -> Encoded:
    """Encode the clips and captions that the cache lacks, each in one of the processes."""
    folder = recipe.cache_folder
    size = [recipe.num_frames, recipe.height, recipe.width]
    kind, vae = type(pipe).__name__, part_hash(pipe.vae)
    encoders = {name: part_hash(part) for name, part in text_parts(pipe).items()}
    latents = [_name("latents", kind, vae, clip.digest, *size) for clip in clips]
    texts = {text: _name("text", kind, encoders, text) for text in (NO_CAPTION, *(clip.caption for clip in clips))}
    jobs: dict[str, Any] = dict(zip(latents, clips, strict=True))
    jobs |= {name: text for text, name in texts.items()}

    def missing() -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        return [name for name in jobs if not (folder / name).exists()]

    mine = ranks.own(ranks.shared(missing))

    def make() -> None:
        stages.stage("encoding clips and captions", len(mine))
        for name in mine:
            _write(folder, name, _encoded(pipe, trainable, jobs[name], recipe))
            stages.advance()

    ranks.together(make)
    return Encoded(folder, latents, [texts[clip.caption] for clip in clips], texts[NO_CAPTION])


def _encoded(pipe: Any, trainable: Trainable, job: Clip | str, recipe: FineTuning) -> Text:
    if isinstance(job, str):
        return {name: value[0] for name, value in trainable.text(pipe, job).items()}
    frames = torch.from_numpy(job.read(int(recipe.num_frames or 0)))
    video = frames.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    return {"latents": trainable.latents(pipe, video)[0]}


def _name(kind: str, *parts: Any) -> str:
    return f"{kind}-{hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:40]}.safetensors"


def _write(folder: Path, name: str, values: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with written_whole(folder / name) as temporary:
        save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, temporary)


def _read(folder: Path, name: str) -> Text:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{folder / name} can't be read ({error}); delete it and go on with --resume, which encodes it again"
        ) from None
