"""CLIP's towers by open_clip, filled from official files: OpenAI's, OpenCLIP's ViT-H/14 as PickScore and HPSv2, ViCLIP.

Sources: CLIP (Radford et al., arXiv 2103.00020), ViCLIP (Wang et al., arXiv 2307.06942), PickScore (Kirstain et al.,
arXiv 2305.01569), HPSv2 (Wu et al., arXiv 2306.09341). Depth and width are those of the weights.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel import ConfigError

from .vit import HEAD, Weights, _blocks

SIZES = ("input_resolution", "context_length", "vocab_size")
"""Numbers that OpenAI's files hold besides weights."""

HUGE_HEAD = 80
"""Width of a head of ViT-H/14's picture tower; all others are 64 wide."""

NAMES = {
    "text_model.": "", "vision_model.": "visual.", "encoder.layers": "transformer.resblocks",
    "embeddings.patch_embedding": "conv1", "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.": "", "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "final_layer_norm": "ln_final",
    "layer_norm": "ln_", "self_attn": "attn", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj", "q_proj.": "in_proj_",
}  # fmt: skip
"""Parts of transformers' names -> OpenAI's, one after the other."""


def openai(held: Weights) -> Any:
    """Return OpenAI's CLIP."""
    return _clip(held, quick_gelu=True)


def huge(held: Weights) -> Any:
    """Return OpenCLIP's ViT-H/14, of weights by open_clip's names or by transformers'."""
    return _clip(_by_openai(held) if "visual_projection.weight" in held else held, HUGE_HEAD)


def viclip(held: Weights) -> Any:
    """Return ViCLIP as a CLIP, whose picture tower has ``times``, [1, frames, D], besides: see `clip_video`."""
    parts = {"vision_encoder.": "visual.", "text_encoder.": ""}
    found = {name.replace(old, new): one for old, new in parts.items() for name, one in held.items()
             if name.startswith(old)}  # fmt: skip
    found["visual.conv1.weight"] = found["visual.conv1.weight"].squeeze(2)
    times = found.pop("visual.temporal_positional_embedding")
    made = _clip(found, quick_gelu=True)
    made.visual.register_buffer("times", times)
    return made


def _clip(held: Weights, head: int = HEAD, *, quick_gelu: bool = False) -> Any:
    """Return a CLIP with all its weights; raises `KeyError` or `RuntimeError` for those of another network."""
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg

    kernel, places = held["visual.conv1.weight"], held["positional_embedding"]
    side = int((len(held["visual.positional_embedding"]) - 1) ** 0.5) * kernel.shape[-1]
    pictures = CLIPVisionCfg(
        width=len(kernel), head_width=head, patch_size=kernel.shape[-1], image_size=side,
        layers=len(_blocks(held, "visual.transformer.resblocks")),
    )  # fmt: skip
    texts = CLIPTextCfg(
        width=places.shape[1], heads=places.shape[1] // HEAD, context_length=len(places),
        vocab_size=len(held["token_embedding.weight"]), layers=len(_blocks(held, "transformer.resblocks")),
    )  # fmt: skip
    made = CLIP(held["text_projection"].shape[1], pictures, texts, quick_gelu=quick_gelu)
    scale = {"logit_scale": torch.zeros(())}  # ViCLIP has none
    made.load_state_dict(scale | {name: value for name, value in held.items() if name not in SIZES})
    return made


def _by_openai(held: Weights) -> dict[str, Tensor]:
    """Return a CLIP model's weights by OpenAI's names, from those by transformers'; projections are turned besides."""
    found = {}
    for theirs, value in held.items():
        name = theirs
        for part, mine in NAMES.items():
            name = name.replace(part, mine)
        if name.endswith(("text_projection", "visual.proj")):
            value = value.T
        elif "in_proj_" in name:
            value = torch.cat([held[theirs.replace("q_proj", f"{one}_proj")] for one in "qkv"])
        if not any(one in name for one in ("k_proj", "v_proj", "position_ids")):
            found[name] = value
    return found


def clip_video(network: Any, frames: Tensor) -> Tensor:
    """Return ViCLIP's embedding [1, D] of normalized frames [F, 3, height, width], which it looks at all at once."""
    tower = network.visual
    patches = tower.conv1(frames).flatten(2).transpose(1, 2)  # [F, patches, width]
    x = patches + tower.positional_embedding[1:] + tower.times.transpose(0, 1)
    first = tower.class_embedding + tower.positional_embedding[0]
    x = torch.cat([first[None, None], x.flatten(0, 1)[None]], 1)
    return tower.ln_post(tower.transformer(tower.ln_pre(x))[:, 0]) @ tower.proj


def cosines(network: Any, frames: Tensor, tokens: Tensor) -> Tensor:
    """Return the cosines [F] of frames [F, 3, 224, 224] and one text, int64 [1, T]."""
    seen, read = network.encode_image(frames), network.encode_text(tokens)
    return (F.normalize(seen, dim=1) @ F.normalize(read, dim=1).T)[:, 0]


@cache
def _tokenizer() -> Any:
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


def tokens(text: str, context: int, *, places: int | None = None, cut: bool = True) -> Tensor:
    """Return a text's tokens int64 [1, places], zeros behind the last.

    Args:
        text: the text, which open_clip's tokenizer cleans as CLIP's does.
        context: how many of them are read, with those of its start and end.
        places: how many there are in all; None: ``context``.
        cut: whether a longer text is cut off; else it is refused.
    """
    made = _tokenizer()
    found = len(made.encode(text)) + 2
    if found > context and not cut:
        raise ConfigError(f"CLIP reads {context} tokens, and {text!r} has {found}; shorten it")
    return F.pad(made(text, context), (0, (places or context) - context))
