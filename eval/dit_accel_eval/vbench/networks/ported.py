"""Transformers' own networks with the weights of official checkpoints: Tag2Text's Swin and GRiT's ViTDet.

Sources: Swin (Liu et al., arXiv 2103.14030) with 12 x 12 windows; ViTDet (Li et al., arXiv 2203.16527) with windows of
14 x 14 patches but in every third block. Depth, width and heads are those of the weights. Official names become those
of the hub's checkpoints, which any release of transformers reads.
"""

import re
from collections.abc import Sequence
from typing import Any

from dit_accel_pipelines.generation.quiet import quiet_diffusers

from .vit import Weights, _blocks

Names = Sequence[tuple[str, str]]
"""Regular expressions of official names -> the hub's; ``{}`` is query, key and value, which the official ones join."""

SWIN: Names = (
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^patch_embed", "embeddings"),
    (r"^layers", "encoder.layers"), (r"^norm", "layernorm"), (r"\.norm1", ".layernorm_before"),
    (r"\.norm2", ".layernorm_after"), (r"attn\.qkv", "attention.self.{}"), (r"attn\.proj", "attention.output.dense"),
    (r"attn\.relative", "attention.self.relative"), (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"),
)  # fmt: skip

VITDET: Names = (
    (r"^blocks", "encoder.layer"), (r"attn", "attention"), (r"^pos_embed", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.projection"),
)  # fmt: skip

SIDE = 384
"""Pixels of the side of the pictures that Tag2Text takes."""

WINDOW, WHOLE = 14, 3
"""Patches of a window's side in ViTDet, and every how manieth block looks at the whole picture."""


def swin(weights: Weights, at: str) -> Any:
    """Return Tag2Text's tower: ``last_hidden_state`` [B, tokens, D] of normalized pictures [B, 3, side, side].

    Its names begin with ``at``, such as ``visual_encoder.``.
    """
    from transformers import SwinConfig, SwinModel

    kernel, stages = weights[f"{at}patch_embed.proj.weight"], _blocks(weights, f"{at}layers")
    tables = [weights[f"{stage}.blocks.0.attn.relative_position_bias_table"] for stage in stages]
    config = SwinConfig(
        image_size=SIDE, patch_size=kernel.shape[-1], embed_dim=len(kernel), num_heads=[one.shape[1] for one in tables],
        depths=[len(_blocks(weights, f"{stage}.blocks")) for stage in stages],
        window_size=(int(len(tables[0]) ** 0.5) + 1) // 2,
    )  # fmt: skip
    return _ported(SwinModel, config, weights, at, SWIN, add_pooling_layer=False)


def vitdet(weights: Weights, head: int) -> Any:
    """Return GRiT's tower: ``last_hidden_state`` [1, D, Y, X] of a normalized picture, in patches.

    ``head`` is the width of a head.
    """
    from transformers import VitDetConfig, VitDetModel

    at = "backbone.bottom_up."
    kernel, blocks = weights[f"{at}patch_embed.proj.weight"], _blocks(weights, f"{at}blocks")
    patch, trained = kernel.shape[-1], int((weights[f"{at}pos_embed"].shape[1] - 1) ** 0.5)
    longest = max(len(weights[f"{block}.attn.rel_pos_h"]) for block in blocks)
    config = VitDetConfig(
        hidden_size=len(kernel), num_hidden_layers=len(blocks), num_attention_heads=len(kernel) // head,
        patch_size=patch, image_size=patch * (longest + 1) // 2, pretrain_image_size=patch * trained,
        window_size=WINDOW, window_block_indices=[at for at in range(len(blocks)) if (at + 1) % WHOLE],
        use_relative_position_embeddings=True,
    )  # fmt: skip
    return _ported(VitDetModel, config, weights, at, VITDET)


def _ported(network: Any, config: Any, weights: Weights, at: str, names: Names, **options: Any) -> Any:
    """Return a network with those weights whose names begin with ``at``; raises `KeyError` for one that is missing."""
    held = {}
    for official, value in weights.items():
        name = official.removeprefix(at)
        for pattern, replacement in names if official.startswith(at) else ():
            name = re.sub(pattern, replacement, name)
        parts = zip(("query", "key", "value"), value.chunk(3), strict=True) if "{}" in name else [("", value)]
        held |= {name.format(part): one for part, one in parts if official.startswith(at)}
    with quiet_diffusers():
        made, loading = network.from_pretrained(
            None, config=config, state_dict=held, output_loading_info=True, **options
        )
    if missing := sorted(loading["missing_keys"]):
        raise KeyError(missing[0])
    return made.to(next(iter(held.values())).device).eval()
