"""open_clip's models by name, with published weights or a file's: unit embeddings of frames and of texts.

A model with its weights is written ``MODEL/TAG``, such as ``ViT-B-32/openai``, or ``MODEL=FILE``.
"""

import re
import warnings
import zipfile
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from dit_accel_pipelines.generation.media import to_uint8
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from dit_accel import ConfigError
from dit_accel.errors import did_you_mean

from .metric import Clip, NotMeasured, no_module

TOGETHER = 32  # frames that go through a model at once
USUAL = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # where a tag names no file

JUDGES = {
    ("ViT-H-14", "hpsv2.1"): {"hf_hub": "xswu/HPSv2/HPS_v2.1_compressed.pt", "resize_mode": "longest"},
    ("ViT-H-14", "pickscore"): {"hf_hub": "yuvalkirstain/PickScore_v1/model.safetensors"},
}
"""Tags besides open_clip's own, of models that people's choices trained: HPSv2 pads whole frames (arXiv 2306.09341)."""

TRANSFORMERS = {
    "text_model.": "", "vision_model.": "visual.", "encoder.layers": "transformer.resblocks",
    "embeddings.patch_embedding": "conv1", "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.": "", "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "final_layer_norm": "ln_final",
    "layer_norm": "ln_", "self_attn": "attn", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj", "q_proj.": "in_proj_",
}  # fmt: skip
"""Parts of the names that transformers gives a CLIP model's weights -> open_clip's, one after the other."""

no_library = partial(no_module, "open_clip", "open-clip-torch")


@dataclass(frozen=True, slots=True)
class Weighted:
    """A model of open_clip's with its weights: of a published tag, or of a file."""

    model: str
    tag: str = ""
    file: Path | None = None

    def __str__(self) -> str:
        return f"{self.model}/{self.tag}" if self.file is None else f"{self.model}={self.file}"

    @property
    def by_hand(self) -> str:
        """How to get published weights without `fetch`."""
        repository, files = self._published
        return f"download https://huggingface.co/{repository}/resolve/main/{files[0]} and write {self.model}=FILE"

    @property
    def described(self) -> dict[str, Any]:
        """What is said of published weights: where they are, and how pictures are prepared for them."""
        import open_clip

        judge = JUDGES.get((self.model, self.tag))
        return judge or (open_clip.get_pretrained_cfg(self.model, self.tag) if self.tag else {})

    @property
    def _published(self) -> tuple[str, tuple[str, ...]]:
        """The hub's repository, and the names of the file there, the first of which is sure or preferred."""
        repository, _, file = self.described["hf_hub"].rpartition("/")
        return repository, (file, str(Path(file).with_suffix(".safetensors"))) if file else USUAL

    def path(self) -> Path | None:
        """Return where the weights lie; None where published ones are not in the hub's cache."""
        import huggingface_hub

        if self.file is not None:
            return self.file
        repository, files = self._published
        held = (huggingface_hub.try_to_load_from_cache(repository, file) for file in files)
        return next((Path(path) for path in held if isinstance(path, str)), None)

    def missing(self) -> str | None:
        """Return why the model can't be had, None if it can, for which it is built."""
        try:
            self.embedder()
        except NotMeasured as reason:
            return str(reason)
        return None

    def embedder(self) -> "Embedder":
        """Return what embeds frames and texts by this model, built once; raises `NotMeasured` if it can't be had."""
        if (reason := no_library()) is not None:
            raise NotMeasured(reason)
        if (path := self.path()) is None:
            fetching = f"dit-accel eval setup --clip {self} fetches them"
            raise NotMeasured(f"the weights of {self} are not here; {fetching}, or {self.by_hand}")
        return _embedder(self, path, path.stat().st_mtime_ns)


def weighted(text: str) -> Weighted:
    """Return a model with its weights from ``MODEL/TAG`` or ``MODEL=FILE``."""
    import open_clip

    model, sign, rest = (*re.split("([/=])", text, maxsplit=1), "", "")[:3]
    if model not in open_clip.list_models():
        hint = did_you_mean(model, open_clip.list_models())
        hint = hint.replace("`dit-accel models` lists", "open_clip.list_models() lists")
        raise ConfigError(f"open_clip has no model {model!r}; {hint}")
    tags = [tag for named, tag in JUDGES if named == model] + open_clip.list_pretrained_tags_by_model(model)
    if not rest:
        published = f"{model}/TAG with a tag of {', '.join(tags)}, or " if tags else ""
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


def fetch_model(model: Weighted) -> str | None:
    """Fetch published weights, and the tokenizer where it is the hub's; returns why they can't be had, None if here."""
    import open_clip

    if model.path() is None:
        try:
            open_clip.download_pretrained(model.described)
        except Exception as error:  # the hub's client raises all kinds
            return f"{model} could not be fetched ({_line(error)}); {model.by_hand}"
    return model.missing()


class Embedder:
    """A model of open_clip's with the weights of a file, on a CUDA device if there is one."""

    def __init__(self, model: Weighted, path: Path) -> None:
        import open_clip

        described, scripted = model.described, _is_scripted(path)
        prepared: dict[str, Any] = {
            f"image_{key}": described.get(key) for key in ("mean", "std", "interpolation", "resize_mode")
        }
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self._tokenizer = open_clip.get_tokenizer(model.model)
        except Exception as error:  # the hub's client raises all kinds
            reason = f"the tokenizer of {model.model} is not here: {_line(error)}"
            raise NotMeasured(f"{reason}; run dit-accel eval setup --clip {model}") from None
        try:
            theirs = _by_transformers(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                parts: Any = open_clip.create_model_and_transforms(
                    model.model, pretrained=None if theirs else str(path), weights_only=not scripted,
                    force_quick_gelu=scripted or described.get("quick_gelu", False),  # OpenAI's were trained with it
                    device=self._device, **prepared,
                )  # fmt: skip
            if theirs:
                parts[0].load_state_dict(theirs)
        except Exception as error:  # torch's readers and open_clip's networks raise all kinds
            reason = f"{path} does not hold the weights of {model.model}: {_line(error)}"
            raise ConfigError(f"{reason}; name the model that it is of, or download it again") from None
        self.network, self._prepare = parts[0].eval(), parts[2]

    @torch.inference_mode()
    def pictures(self, frames: Clip) -> Tensor:
        """Return the embeddings [F, D] of unit length of frames [F, height, width, 3] in [0, 1]."""
        images = torch.stack([self._prepare(Image.fromarray(frame)) for frame in to_uint8(frames)])
        embeddings = [self.network.encode_image(part.to(self._device)).float().cpu() for part in images.split(TOGETHER)]
        return normalize(torch.cat(embeddings), dim=1)

    @torch.inference_mode()
    def text(self, text: str) -> Tensor:
        """Return the embedding [D] of unit length of a text, of which as many tokens are read as the model takes."""
        return normalize(self.network.encode_text(self._tokenizer(text).to(self._device)).float().cpu(), dim=1)[0]


@cache
def _embedder(model: Weighted, path: Path, changed: int) -> Embedder:
    return Embedder(model, path)


def _is_scripted(path: Path) -> bool:
    """Return whether a file is TorchScript, as OpenAI's are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as opened:
        return any("/code/" in name for name in opened.namelist())


def _by_transformers(path: Path) -> dict[str, Tensor]:
    """Return the weights of a CLIP model that transformers saved, by open_clip's names; {} of another file."""
    from safetensors.torch import load_file

    held = load_file(path) if path.suffix == ".safetensors" else {}
    if "visual_projection.weight" not in held:
        return {}
    weights = {}
    for theirs, value in held.items():
        name = theirs
        for part, mine in TRANSFORMERS.items():
            name = name.replace(part, mine)
        if name.endswith(("text_projection", "visual.proj")):
            value = value.T
        elif "in_proj_" in name:
            value = torch.cat([held[theirs.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
        if not any(text in name for text in ("k_proj", "v_proj", "position_ids")):
            weights[name] = value
    return weights


def _line(error: Exception) -> str:
    """Return the last line of an error's text, which says the most of one of torch's."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:160]
