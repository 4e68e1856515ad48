"""Preferences of pictures and prompts by OpenCLIP's ViT-H/14, tuned on people's choices: PickScore and HPSv2.

Sources: PickScore, Kirstain et al., arXiv 2305.01569, logit of picture and prompt; HPSv2, Wu et al., arXiv 2306.09341,
their cosine. A clip's is the mean over its frames.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from . import vit

PICTURE_HEAD, TEXT_HEAD = 80, 64
"""Width of a head of ViT-H/14's towers."""

_NAMES = {
    "text_model.": "", "vision_model.": "visual.", "encoder.layers": "transformer.resblocks",
    "embeddings.patch_embedding": "conv1", "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.": "", "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post", "final_layer_norm": "ln_final",
    "layer_norm": "ln_", "self_attn": "attn", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj", "q_proj.": "in_proj_",
}  # fmt: skip
"""Parts of transformers' names -> OpenAI's, one after the other."""


def by_openai(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIP model's weights by OpenAI's names, from those by transformers'; projections are turned besides."""
    found = {}
    for theirs, value in held.items():
        name = theirs
        for part, mine in _NAMES.items():
            name = name.replace(part, mine)
        if name.endswith(("text_projection", "visual.proj")):
            value = value.T
        elif "in_proj_" in name:
            value = torch.cat([held[theirs.replace("q_proj", f"{one}_proj")] for one in "qkv"])
        found[name] = value
    return found


def cosines(frames: Tensor, tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the cosines [F] of frames [F, 3, 224, 224] and one text, int64 [1, T], by OpenCLIP's towers."""
    seen = vit.clip_video(frames[:, :, None], weights, "visual.", PICTURE_HEAD, F.gelu)
    read = vit.clip_text(tokens, weights, "", TEXT_HEAD, F.gelu)
    return (F.normalize(seen, dim=1) @ F.normalize(read, dim=1).T)[:, 0]
