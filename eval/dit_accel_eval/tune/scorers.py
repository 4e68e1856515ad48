"""Objectives that published models judge by: CLIP's similarity, LAION's aesthetic predictor, PickScore.

Each is loaded by transformers' own classes from a folder or the hub. A clip's score is the mean over its frames.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from dit_accel_pipelines.generation.quiet import quiet_diffusers
from torch import Tensor, nn
from torch.nn.functional import normalize

from dit_accel.errors import ConfigError

from ..metrics.metric import Clip

Scorer = Callable[[Clip, str], float]

FRAMES_AT_ONCE = 16

PREFIX = "A photo depicts "
"""What HeadHunter's code puts before the prompt for CLIP's score."""


def scorer(name: str, place: str | None, device: Any) -> Scorer:
    """Return a scorer, loaded onto a device.

    Args:
        name: one of `SCORERS`.
        place: folder or hub id of its weights and of what prepares its input; None: the published one.
        device: where it computes.

    Raises:
        ConfigError: if its weights can't be loaded.
    """
    build, *published = SCORERS[name]
    model, processor = [place or one for one in published]
    try:
        with quiet_diffusers():
            return build(model, processor, device)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"the objective {name!r} can't be loaded from {model!r}: {reason}; give a folder or a hub id that holds "
            f"its weights and its processor, {name}=FOLDER"
        ) from None


def _clip_score(model: str, processor: str, device: Any) -> Scorer:
    """100 times the cosine of a picture and its prompt."""
    both = _Both(model, processor, device)

    def score(clip: Clip, prompt: str) -> float:
        out = both(clip, PREFIX + prompt)
        return 100.0 * _mean([(one.image_embeds * one.text_embeds).sum(-1) for one in out])

    return score


def _pick_score(model: str, processor: str, device: Any) -> Scorer:
    """PickScore (arXiv 2305.01569): the logit of a picture and its prompt."""
    both = _Both(model, processor, device)
    return lambda clip, prompt: _mean([one.logits_per_image[:, 0] for one in both(clip, prompt)])


class _Both:
    """A CLIP model over pictures and one text."""

    def __init__(self, model: str, processor: str, device: Any) -> None:
        from transformers import CLIPModel, CLIPProcessor

        self._model = _loaded(CLIPModel, model, device)
        self._processor: Any = CLIPProcessor.from_pretrained(processor)
        self._device = device

    @torch.no_grad()
    def __call__(self, clip: Clip, prompt: str) -> list[Any]:
        """Return the model's outputs of so many frames at once."""
        most = self._model.config.text_config.max_position_embeddings
        options = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": most}
        given = (self._processor(text=[prompt], images=pictures, **options) for pictures in _pictures(clip))
        return [self._model(**one.to(self._device)) for one in given]


def _aesthetic(model: str, processor: str, device: Any) -> Scorer:
    """LAION's aesthetic predictor: a few layers over CLIP's normed embedding of a picture, 1 to 10."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    vision = _loaded(CLIPVisionModelWithProjection, model, device)
    head = aesthetic_head(model).to(device)
    prepare = CLIPImageProcessor.from_pretrained(processor)

    @torch.no_grad()
    def score(clip: Clip, prompt: str) -> float:
        given = (prepare(images=pictures, return_tensors="pt")["pixel_values"] for pictures in _pictures(clip))
        embeds = (vision(pixel_values=pixels.to(device)).image_embeds for pixels in given)
        return _mean([head(normalize(one, dim=-1))[:, 0] for one in embeds])

    return score


def aesthetic_head(place: str) -> nn.Sequential:
    """Return the layers behind CLIP's embedding, of a folder or hub id that holds them beside it.

    ``predictor`` is one layer (v1), ``layers.N`` are several (v2), with ReLU between them where the config's class says
    so.

    Raises:
        ConfigError: if it holds no such layers.
    """
    weights = _weights(place)
    names = ["predictor"] if "predictor.weight" in weights else []
    names += sorted(
        (name.removesuffix(".weight") for name in weights if name.startswith("layers.") and name.endswith(".weight")),
        key=lambda name: int(name.split(".")[1]),
    )
    if not names:
        raise ConfigError(
            f"the objective 'aesthetic' finds CLIP in {place!r}, and no predictor.weight or layers.N.weight behind it; "
            "give the weights of LAION's aesthetic predictor, aesthetic=FOLDER"
        )
    with open(_file(place, "config.json"), encoding="utf-8") as file:
        architecture = str((json.load(file).get("architectures") or [""])[0])
    bent = architecture.lower().endswith("relu")
    layers: list[nn.Module] = []
    for name in names:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers += [layer.eval(), nn.ReLU()] if bent and name != names[-1] else [layer.eval()]
    return nn.Sequential(*layers)


def _loaded(cls: Any, place: str, device: Any) -> Any:
    """Return a model with all its weights; transformers itself would make up those that are not there."""
    found, loading = cls.from_pretrained(place, output_loading_info=True)
    if missing := sorted(loading["missing_keys"]):
        raise OSError(f"it lacks {missing[0]} of {cls.__name__}")
    return found.to(device).eval()


def _weights(place: str) -> Mapping[str, Tensor]:
    """Return the tensors of a folder or hub id, by name."""
    from safetensors.torch import load_file

    try:
        return load_file(_file(place, "model.safetensors"))
    except OSError:
        return torch.load(_file(place, "pytorch_model.bin"), map_location="cpu", weights_only=True)


def _file(place: str, name: str) -> str:
    """Return the path of a file of a folder or hub id; raises `OSError` if it is not there."""
    from transformers.utils import cached_file

    return str(cached_file(place, name))


def _pictures(clip: Clip) -> list[list[Any]]:
    """Return frames as Pillow's images, so many at once."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in (clip * 255).round().astype("uint8")]
    return [images[begin : begin + FRAMES_AT_ONCE] for begin in range(0, len(images), FRAMES_AT_ONCE)]


def _mean(values: list[Tensor]) -> float:
    return float(torch.cat(values).float().mean())


_CLIP = "openai/clip-vit-large-patch14"

SCORERS: Mapping[str, tuple[Callable[[str, str, Any], Scorer], str, str]] = {
    "aesthetic": (_aesthetic, "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE", _CLIP),
    "clip": (_clip_score, _CLIP, _CLIP),
    "pickscore": (_pick_score, "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
}
"""Objective -> what makes it, and the hub's ids of its published weights and of what prepares pictures and texts."""
