"""Preferences of pictures and prompts by OpenCLIP's ViT-H/14, tuned on people's choices: PickScore and HPSv2.

Sources: PickScore, Kirstain et al., arXiv 2305.01569, logit of picture and prompt; HPSv2, Wu et al., arXiv 2306.09341,
their cosine. A clip's is the mean over its frames.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from . import vit

PICTURE_HEAD, TEXT_HEAD = 80, 64
"""Width of a head of ViT-H/14's towers."""

_BLOCK = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")

_INNER = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
          "mlp.fc2": "mlp.c_proj"}  # fmt: skip

_OUTER = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "logit_scale": "logit_scale",
    **{f"text_model.final_layer_norm.{kind}": f"ln_final.{kind}" for kind in ("weight", "bias")},
    **{f"vision_model.pre_layrnorm.{kind}": f"visual.ln_pre.{kind}" for kind in ("weight", "bias")},
    **{f"vision_model.post_layernorm.{kind}": f"visual.ln_post.{kind}" for kind in ("weight", "bias")},
}
"""transformers' names -> OpenAI's, of what lies outside the blocks; projections are turned besides."""


def by_openai(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a CLIP model's weights by OpenAI's names, from those by transformers'; others are left out."""
    found = {mine: held[theirs] for theirs, mine in _OUTER.items() if theirs in held}
    for theirs, mine in (("text_projection.weight", "text_projection"), ("visual_projection.weight", "visual.proj")):
        if theirs in held:
            found[mine] = held[theirs].T
    for name, value in held.items():
        text = _BLOCK.fullmatch(name)
        if text is None:
            continue
        at = f"{'visual.' if text[1] == 'vision_model' else ''}transformer.resblocks.{text[2]}"
        if text[3] in _INNER:
            found[f"{at}.{_INNER[text[3]]}.{text[4]}"] = value
        elif text[3] == "self_attn.q_proj":
            parts = [held[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            found[f"{at}.attn.in_proj_{text[4]}"] = torch.cat(parts)
    return found


def cosines(frames: Tensor, tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Return the cosines [F] of frames [F, 3, 224, 224] and one text, int64 [1, T], by OpenCLIP's towers."""
    seen = vit.clip_video(frames[:, :, None], weights, "visual.", PICTURE_HEAD, F.gelu)
    read = vit.clip_text(tokens, weights, "", TEXT_HEAD, F.gelu)
    return (F.normalize(seen, dim=1) @ F.normalize(read, dim=1).T)[:, 0]
