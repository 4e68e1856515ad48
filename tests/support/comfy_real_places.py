"""Where the text of ComfyUI's models stands: by the nodes' package, and by which queries change with the text."""

from typing import Any

import torch


def models() -> dict[str, Any]:
    """Return a tiny model of each class whose place of text or patch the package states, and of Cosmos."""
    import comfy.ops
    from comfy.ldm.chroma.model import Chroma
    from comfy.ldm.cosmos.predict2 import MiniTrainDIT
    from comfy.ldm.hunyuan_video.model import HunyuanVideo
    from comfy.ldm.lightricks.model import LTXVModel
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    cpu = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    common = {
        "in_channels": 64, "out_channels": 64, "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 2.0,
        "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 28, 28], "theta": 10000, "patch_size": 2,
        "qkv_bias": True,
    }  # fmt: skip
    video = {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 32, "guidance_embed": False}
    made = {
        "Chroma": Chroma(**common, in_dim=64, out_dim=128, hidden_dim=128, n_layers=1, **cpu),
        "HunyuanVideo": HunyuanVideo(**{**common, **video, "byt5": False, "meanflow": False}, **cpu),
        "QwenImageTransformer2DModel": QwenImageTransformer2DModel(
            num_layers=1, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=64,
            axes_dims_rope=(8, 28, 28), **cpu
        ),
        "LTXVModel": LTXVModel(
            in_channels=16, cross_attention_dim=128, attention_head_dim=64, num_attention_heads=2, caption_channels=64,
            num_layers=1, **cpu
        ),
        "MiniTrainDIT": MiniTrainDIT(
            max_img_h=24, max_img_w=24, max_frames=8, in_channels=16, out_channels=16, patch_spatial=2,
            patch_temporal=1, concat_padding_mask=False, model_channels=128, num_blocks=1, num_heads=2,
            crossattn_emb_channels=64, pos_emb_cls="rope3d", **cpu
        ),
    }  # fmt: skip
    for model in made.values():
        for weight in model.parameters():
            weight.data.normal_(std=0.05)
    return made


def queries(name: str, model: Any, latents: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
    """Return the queries of a forward's attention calls, [B, H, S, D] each."""
    calls: list[torch.Tensor] = []

    def keep(func: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(q if kwargs.get("skip_reshape") else q.unflatten(2, (2, -1)).transpose(1, 2))
        return func(q, *args, **kwargs)

    others = {
        "Flux": {"y": torch.zeros(1, 32)}, "HunyuanVideo": {"y": torch.zeros(1, 32)},
        "Chroma": {"guidance": torch.ones(1)},
        "QwenImageTransformer2DModel": {"attention_mask": None}, "LTXVModel": {"attention_mask": None},
    }.get(name, {})  # fmt: skip
    with torch.inference_mode():
        model(latents, torch.ones(1), text, transformer_options={"optimized_attention_override": keep}, **others)
    return calls


def changed(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return which tokens have other queries, bool [S]."""
    return (before != after).transpose(1, 2).flatten(2).any(2)[0]


def places(given: dict[str, Any]) -> dict[str, Any]:
    """Return whether a change of the text, and of one pixel, changes the tokens that the package takes for them.

    Args:
        given: tiny models by their class's name, beside those that are made here.
    """
    from dit_accel_comfyui.placing import placement_of

    found = {}
    for name, model in {**given, **models()}.items():
        frames = () if name in ("Flux", "Chroma") else (1,) if "Qwen" in name else (3,)
        latents, text = torch.randn(1, 16, *frames, 12, 16), torch.randn(1, 7, 4096 if name == "WanModel" else 64)
        pixel = latents.clone()
        pixel[..., 7, 10] += 1  # of the last frame alone, where there are several
        if frames:
            pixel[:, :, :-1] = latents[:, :, :-1]
        usual, of_text, of_pixel = (
            queries(name, model, *inputs) for inputs in ((latents, text), (latents, text + 1), (pixel, text))
        )
        placing = placement_of(model, {"x": latents, "context": text})
        layouts = [placing.layout(q.shape[2]) for q in usual]
        at = next(index for index, layout in enumerate(layouts) if not isinstance(layout, str))
        layout, patch = layouts[at], 12 // placing.height
        stated = torch.ones(layout.tokens, dtype=torch.bool)
        stated[layout.visual] = False
        token = ((placing.frames - 1) * placing.height + 7 // patch) * placing.width + 10 // patch
        found[name] = {
            "text": int(stated.sum()), "equal": bool((changed(usual[at], of_text[at]) == stated).all()),
            "pixel": changed(usual[at], of_pixel[at]).nonzero()[:, 0].tolist(), "token": token + layout.text_before,
        }  # fmt: skip
    return found
