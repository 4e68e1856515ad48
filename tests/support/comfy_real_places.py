"""Where the text of ComfyUI's models stands: by the nodes' package, and by which queries change with the text."""

from typing import Any

import torch


def models(flux: Any) -> dict[str, Any]:
    """Return a tiny model of each class whose text's place the package states; Flux's is given."""
    import comfy.ops
    from comfy.ldm.chroma.model import Chroma
    from comfy.ldm.hunyuan_video.model import HunyuanVideo
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    cpu = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    common = {
        "in_channels": 64, "out_channels": 64, "context_in_dim": 64, "hidden_size": 128, "mlp_ratio": 2.0,
        "num_heads": 2, "depth": 1, "depth_single_blocks": 1, "axes_dim": [8, 28, 28], "theta": 10000, "patch_size": 2,
        "qkv_bias": True,
    }  # fmt: skip
    video = {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 32, "guidance_embed": False}
    made = {
        "Flux": flux,
        "Chroma": Chroma(**common, in_dim=64, out_dim=128, hidden_dim=128, n_layers=1, **cpu),
        "HunyuanVideo": HunyuanVideo(**{**common, **video, "byt5": False, "meanflow": False}, **cpu),
        "QwenImageTransformer2DModel": QwenImageTransformer2DModel(
            num_layers=1, attention_head_dim=64, num_attention_heads=2, joint_attention_dim=64,
            axes_dims_rope=(8, 28, 28), **cpu
        ),
    }  # fmt: skip
    for model in made.values():
        for weight in model.parameters():
            weight.data.normal_(std=0.05)
    return made


def places(flux: Any) -> dict[str, Any]:
    """Return where the text of each model stands: by the package, and by which queries change with the text."""
    from dit_accel_comfyui.placing import placing_of

    found = {}
    for name, model in models(flux).items():
        flat = name in ("Flux", "Chroma")
        latents = torch.randn((1, 16, 12, 12) if flat else (1, 16, 1 if "Qwen" in name else 3, 12, 12))
        queries: list[list[torch.Tensor]] = []
        for _ in range(2):
            calls: list[torch.Tensor] = []

            def keep(func: Any, q: Any, *args: Any, calls: list[torch.Tensor] = calls, **kwargs: Any) -> Any:
                calls.append(q if kwargs.get("skip_reshape") else q.unflatten(2, (2, -1)).transpose(1, 2))
                return func(q, *args, **kwargs)

            text = torch.randn(1, 7, 64)
            options = {"optimized_attention_override": keep}
            others = {"guidance": torch.ones(1)} if name == "Chroma" else {"y": torch.zeros(1, 32)}
            others = {"attention_mask": None} if "Qwen" in name else others
            with torch.inference_mode():
                model(latents, torch.ones(1), text, transformer_options=options, **others)
            queries.append(calls)
        placing = placing_of(model, {"x": latents, "context": text})
        layouts = [placing.layout(q.shape[2]) for q in queries[0]]
        at = next(index for index, layout in enumerate(layouts) if not isinstance(layout, str))
        layout, differs = layouts[at], (queries[0][at] != queries[1][at]).flatten(3).any(3).any(1)[0]
        stated = torch.ones(layout.tokens, dtype=torch.bool)
        stated[layout.visual] = False
        found[name] = {"equal": bool((differs == stated).all()), "text": int(stated.sum()), "calls": len(layouts)}
    return found
