"""open_clip's models by name, with published weights or a file's: unit embeddings of frames and of texts.

A model with its weights is written ``MODEL/TAG``, open_clip's own tag of published weights, such as
``ViT-B-32/openai``, or ``MODEL=FILE`` for weights of one's own. Nothing is downloaded but by `fetch`.
"""

import importlib.util
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from .metric import Clip, levels
from .weights import folder

TOGETHER = 32
"""Frames that go through a model at once."""

USUAL = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
"""Files of a hub repository that open_clip takes where a tag names none, the first of which it prefers."""

SIZES = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's files hold besides weights."""

LISTED = 6
"""The most tags that an error lists."""

PREPARED = {"image_mean": "mean", "image_std": "std", "image_interpolation": "interpolation",
            "image_resize_mode": "resize_mode"}  # fmt: skip
"""open_clip's options of how pictures are prepared -> what they are called in a tag's description."""


def no_library() -> str | None:
    """Return why open_clip can't be had: it is not installed."""
    found = importlib.util.find_spec("open_clip") is not None
    return None if found else "open-clip-torch is not installed; pip install 'dit-accel[metrics]'"


@dataclass(frozen=True, slots=True)
class Weighted:
    """A model of open_clip's with its weights: of a published tag, or of a file.

    Attributes:
        model: its name.
        tag: of published weights; empty: they are a file's.
        file: of weights; None: they are published.
    """

    model: str
    tag: str = ""
    file: Path | None = None

    def __str__(self) -> str:
        return f"{self.model}/{self.tag}" if self.file is None else f"{self.model}={self.file}"

    @property
    def place(self) -> Path:
        """Where a published file is looked for first, before the hub's cache."""
        return folder() / "open_clip" / self.model / f"{self.tag}{Path(self._published[1][0]).suffix}"

    @property
    def source(self) -> str:
        """The address of the published file."""
        return f"https://huggingface.co/{self._published[0]}/resolve/main/{self._published[1][0]}"

    @property
    def _described(self) -> dict[str, Any]:
        import open_clip

        return open_clip.get_pretrained_cfg(self.model, self.tag) if self.tag else {}

    @property
    def _published(self) -> tuple[str, tuple[str, ...]]:
        """The hub's repository, and the files there, the first of which is preferred."""
        repository, _, file = self._described["hf_hub"].rpartition("/")
        return repository, (str(Path(file).with_suffix(".safetensors")), file) if file else USUAL

    def width(self) -> int:
        """Return the features of an embedding."""
        import open_clip

        return (open_clip.get_model_config(self.model) or {})["embed_dim"]

    def path(self) -> Path | None:
        """Return where the weights lie; None where published ones are neither at `place` nor in the hub's cache."""
        from huggingface_hub import try_to_load_from_cache

        if self.file is not None:
            return self.file
        repository, files = self._published
        held = (try_to_load_from_cache(repository, file) for file in files)
        return next(
            (Path(one) for one in (str(self.place), *held) if isinstance(one, str) and Path(one).is_file()), None
        )

    def missing(self) -> str | None:
        """Return why the model can't be had, None if it can, for which it is built.

        Raises:
            ConfigError: for weights of another model.
        """
        reason = no_library()
        if reason is None and self.path() is None:
            reason = f"the weights of {self} are not here; dit-accel eval setup --clip {self} fetches them, or put "
            reason += f"{self.source} at {self.place}"
        if reason is None:
            try:
                _tokenizer(self.model)
            except Exception as error:  # of all kinds
                return (
                    f"the tokenizer of {self.model} is not here: {_line(error)}; run dit-accel eval setup --clip {self}"
                )
            self.embedder()
        return reason

    def embedder(self) -> "Embedder":
        """Return what embeds frames and texts by this model, built once of weights that are there."""
        path = self.path()
        if path is None:
            raise ConfigError(str(self.missing()))
        return _embedder(self, path, path.stat().st_mtime_ns)


def weighted(text: str) -> Weighted:
    """Return a model with its weights from ``MODEL/TAG`` or ``MODEL=FILE``.

    Raises:
        ConfigError: for an unknown model or tag, with the nearest, no weights at all, or a file that is not there.
    """
    import open_clip

    model, sign, rest = (*re.split("([/=])", text, maxsplit=1), "", "")[:3]
    if model not in open_clip.list_models():
        hint = did_you_mean(model, open_clip.list_models())
        hint = hint.replace("`dit-accel models` lists", "open_clip.list_models() lists")
        raise ConfigError(f"open_clip has no model {model!r}; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not rest:
        more = f" and {len(tags) - LISTED} more" if len(tags) > LISTED else ""
        published = f"{model}/TAG with a tag of {', '.join(tags[:LISTED])}{more}, or " if tags else ""
        raise ConfigError(f"{text!r} does not say which weights; write {published}{model}=FILE for a file of yours")
    if sign == "=":
        file = Path(rest).expanduser()
        if not file.is_file():
            raise ConfigError(f"there is no file {file} of weights of {model}; name one that is there")
        return Weighted(model, file=file)
    if rest not in tags:
        listed = did_you_mean(rest, tags) if tags else "none are published"
        raise ConfigError(f"open_clip has no weights {rest!r} of {model}; {listed}; write {model}=FILE for a file")
    return Weighted(model, tag=rest)


def fetch(one: Weighted) -> str | None:
    """Fetch published weights, and the tokenizer where it is the hub's; returns why they can't be had, None if here."""
    import open_clip

    if one.path() is None:
        try:
            open_clip.download_pretrained(one._described)
        except Exception as error:  # the hub's client raises all kinds
            return f"{one} could not be fetched ({_line(error)}); put {one.source} at {one.place}"
    return one.missing()


@cache
def _tokenizer(model: str) -> Any:
    import open_clip

    return open_clip.get_tokenizer(model)


class Embedder:
    """A model of open_clip's, with what prepares its pictures and cuts its texts.

    Args:
        network: the model, on its device.
        prepare: a Pillow image -> [3, height, width].
        tokenizer: texts -> int64 [B, T].
    """

    def __init__(self, network: Any, prepare: Any, tokenizer: Callable[[str], Tensor]) -> None:
        self.network, self._prepare, self._tokenizer = network, prepare, tokenizer
        self._device = next(network.parameters()).device

    @torch.inference_mode()
    def pictures(self, frames: Clip) -> Tensor:
        """Return the embeddings [F, D] of unit length of frames [F, height, width, 3] in [0, 1]."""
        images = [self._prepare(Image.fromarray(frame)) for frame in levels(frames)]
        parts = torch.stack(images).split(TOGETHER)
        found = [self.network.encode_image(part.to(self._device)).float().cpu() for part in parts]
        return normalize(torch.cat(found), dim=1)

    @torch.inference_mode()
    def text(self, text: str) -> Tensor:
        """Return the embedding [D] of unit length of a text, of which as many tokens are read as the model takes."""
        return normalize(self.network.encode_text(self._tokenizer(text).to(self._device)).float().cpu(), dim=1)[0]


@cache
def _embedder(one: Weighted, path: Path, changed: int) -> Embedder:
    import open_clip

    described = one._described
    scripted = _is_scripted(path)
    prepared = {option: described[key] for option, key in PREPARED.items() if key in described}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network, _, prepare = open_clip.create_model_and_transforms(
                one.model, pretrained=None if scripted else str(path),
                force_quick_gelu=scripted or described.get("quick_gelu", False),  # OpenAI's were trained with it
                device="cuda" if torch.cuda.is_available() else "cpu", **prepared,
            )  # fmt: skip
            if scripted:
                held = torch.jit.load(path, map_location="cpu").state_dict()
                network.load_state_dict({name: value for name, value in held.items() if name not in SIZES})
    except Exception as error:  # torch's readers and open_clip's networks raise all kinds
        raise ConfigError(
            f"{path} does not hold the weights of {one.model}: {_line(error)}; name the model that it is of, "
            "or download it again"
        ) from None
    return Embedder(network.eval(), prepare, _tokenizer(one.model))


def _is_scripted(path: Path) -> bool:
    """Return whether a file is TorchScript, as OpenAI's are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as opened:
        return any("/code/" in name for name in opened.namelist())


def _line(error: Exception) -> str:
    """Return the last line of an error's text, which says the most of one of torch's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:160]
