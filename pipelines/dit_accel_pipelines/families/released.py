"""The released models of all families: their sizes, a row each, from the configs on the hub.

Layers count double and single blocks, and the blocks of control branches. A gated feed-forward has three matrices for
two, so it counts as 3/2 of its width. Text that varies with the prompt counts as a usual prompt's.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_accel.adapters import Family


def _tuples(value: Any) -> Any:
    """Return what TOML reads with tuples for its lists, as methods' options have them."""
    if isinstance(value, dict):
        return {name: _tuples(entry) for name, entry in value.items()}
    return tuple(value) if isinstance(value, list) else value


PUBLISHED: dict[str, dict[str, Any]] = _tuples(tomllib.loads(Path(__file__).with_name("published.toml").read_text()))
"""Method -> model -> its options there; ``head_sets`` -> model -> name -> heads."""

# layers, heads, head_dim, ffn_dim; pixels a latent covers in time and space; text tokens in the sequence and in the
# cross-attention; height x width, frames, steps; name; hub id
SIZES = """
[wan]
# 257 more cross tokens for each image; VACE's control blocks count as layers. The embedded models come last.
30 12 128 8960  4x8  0    512   480x832  81  50 wan2.1-1.3b Wan-AI/Wan2.1-T2V-1.3B-Diffusers
40 40 128 13824 4x8  0    512   720x1280 81  50 wan2.1-14b Wan-AI/Wan2.1-T2V-14B-Diffusers
40 40 128 13824 4x8  0    769   480x832  81  50 wan2.1-i2v-14b-480p Wan-AI/Wan2.1-I2V-14B-480P-Diffusers
40 40 128 13824 4x8  0    769   720x1280 81  50 wan2.1-i2v-14b-720p Wan-AI/Wan2.1-I2V-14B-720P-Diffusers
40 40 128 13824 4x8  0    1026  720x1280 81  50 wan2.1-flf2v-14b Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers
45 12 128 8960  4x8  0    512   480x832  81  50 wan2.1-vace-1.3b Wan-AI/Wan2.1-VACE-1.3B-diffusers
48 40 128 13824 4x8  0    512   720x1280 81  50 wan2.1-vace-14b Wan-AI/Wan2.1-VACE-14B-diffusers
40 40 128 13824 4x8  0    512   720x1280 81  40 wan2.2-a14b Wan-AI/Wan2.2-T2V-A14B-Diffusers
40 40 128 13824 4x8  0    512   720x1280 81  40 wan2.2-i2v-a14b Wan-AI/Wan2.2-I2V-A14B-Diffusers
30 24 128 14336 4x16 0    512   704x1280 121 50 wan2.2-ti2v-5b Wan-AI/Wan2.2-TI2V-5B-Diffusers
12 2  64  512   2x4  0    512    64x64   17  20 wan-tiny embedded/wan-tiny
12 2  64  512   2x4  0    512    64x64   17  4  wan-tiny-4 embedded/wan-tiny-4
12 2  64  512   2x4  0    512    64x64   17  8  wan-tiny-8 embedded/wan-tiny-8
6  5  32  480   2x4  0    512    64x64   17  20 wan-plain embedded/wan-plain
[wan-animate]
# Frames as made at a time, as those of helios and framepack.
40 40 128 13824 4x8  0    769   720x1280 77  20 wan2.2-animate-14b Wan-AI/Wan2.2-Animate-14B-Diffusers
[skyreels-v2]
30 12 128 8960  4x8  0    512   544x960  97  50 skyreels-v2-1.3b Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers
40 40 128 13824 4x8  0    512   544x960  97  50 skyreels-v2-14b-540p Skywork/SkyReels-V2-T2V-14B-540P-Diffusers
40 40 128 13824 4x8  0    512   720x1280 121 50 skyreels-v2-14b-720p Skywork/SkyReels-V2-T2V-14B-720P-Diffusers
[anyflow]
40 40 128 13824 4x8  0    512   480x832  81  4  anyflow-14b nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers
[helios]
40 40 128 13824 4x8  0    512   384x640  33  50 helios-14b BestWishYsh/Helios-Base
[hunyuan-video]
60 24 128 12288 4x8  256  0     720x1280 129 50 hunyuan-video hunyuanvideo-community/HunyuanVideo
[hunyuan-video-1.5]
# text: prompt, glyphs, image
54 16 128 8192  4x16 1985 0     480x848  121 50 hunyuan-video-1.5-480p hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v
54 16 128 8192  4x16 1985 0     720x1280 121 50 hunyuan-video-1.5-720p hunyuanvideo-community/HunyuanVideo-1.5-720p_t2v
[framepack]
# text: prompt and image; the history comes on top
60 24 128 12288 4x8  985  0     720x1280 33  50 framepack lllyasviel/FramePackI2V_HY
[ltx]
28 32 64  8192  8x32 0    128   512x704  161 50 ltx-video-2b Lightricks/LTX-Video
48 32 128 16384 8x32 0    128   512x704  161 50 ltx-video-13b Lightricks/LTX-Video-0.9.7-dev
[ltx-2]
48 32 128 16384 8x32 0    1024  512x768  121 30 ltx-2-19b Lightricks/LTX-2
[kandinsky-5]
32 28 64  7168  4x8  0    512   512x768  121 50 kandinsky-5-lite kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers
60 32 128 16384 4x8  0    512   512x768  121 50 kandinsky-5-pro kandinskylab/Kandinsky-5.0-T2V-Pro-sft-5s-Diffusers
[kandinsky-6]
60 32 128 16384 4x8  0    1024  512x768  121 50 kandinsky-6-pro kandinskylab/Kandinsky-6.0-Pro-distill-5s-Diffusers
[cosmos]
28 32 128 16384 8x8  0    512   704x1280 121 36 cosmos-1-7b nvidia/Cosmos-1.0-Diffusion-7B-Text2World
36 40 128 20480 8x8  0    512   704x1280 121 36 cosmos-1-14b nvidia/Cosmos-1.0-Diffusion-14B-Text2World
28 16 128 8192  4x8  0    512   704x1280 93  35 cosmos-predict2-2b nvidia/Cosmos-Predict2-2B-Video2World
[mochi]
48 24 128 12288 6x8  256  0     480x848  163 64 mochi-1 genmo/mochi-1-preview
[cogvideox]
30 30 64  7680  4x8  226  0     480x720  49  50 cogvideox-2b THUDM/CogVideoX-2b
42 48 64  12288 4x8  226  0     480x720  49  50 cogvideox-5b THUDM/CogVideoX-5b
42 48 64  12288 4x8  226  0     768x1360 81  50 cogvideox1.5-5b THUDM/CogVideoX1.5-5B
42 48 64  12288 4x8  226  0     768x1360 81  50 cogvideox1.5-5b-i2v THUDM/CogVideoX1.5-5B-I2V
[easyanimate]
48 48 64  12288 4x8  256  0     512x512  49  50 easyanimate-5.1-12b alibaba-pai/EasyAnimateV5.1-12b-zh-diffusers
[flux]
# the embedded models come last
57 24 128 12288 1x8  512  0    1024x1024 1   28 flux.1-dev black-forest-labs/FLUX.1-dev
57 24 128 12288 1x8  256  0    1024x1024 1   4  flux.1-schnell black-forest-labs/FLUX.1-schnell
57 24 128 12288 1x8  512  0    1024x1024 1   28 flux.1-kontext-dev black-forest-labs/FLUX.1-Kontext-dev
12 2  64  512   1x4  64   0      96x96   1   20 flux-tiny embedded/flux-tiny
12 2  64  512   1x4  64   0      96x96   1   20 flux-sizes embedded/flux-sizes
12 2  64  512   1x4  64   0      96x96   1   4  flux-tiny-4 embedded/flux-tiny-4
12 2  64  512   1x4  64   0      96x96   1   8  flux-tiny-8 embedded/flux-tiny-8
[flux2]
56 48 128 27648 1x8  512  0    1024x1024 1   50 flux.2-dev black-forest-labs/FLUX.2-dev
[sd3]
# text: CLIP and T5
24 24 64  6144  1x8  333  0    1024x1024 1   28 sd3-medium stabilityai/stable-diffusion-3-medium-diffusers
38 38 64  9728  1x8  333  0    1024x1024 1   28 sd3.5-large stabilityai/stable-diffusion-3.5-large
[qwen-image]
60 24 128 12288 1x8  128  0    1328x1328 1   50 qwen-image Qwen/Qwen-Image
[z-image]
30 30 128 15360 1x8  128  0    1024x1024 1   9  z-image-turbo Tongyi-MAI/Z-Image-Turbo
[chroma]
57 24 128 12288 1x8  512  0    1024x1024 1   35 chroma1-hd lodestones/Chroma1-HD
[hunyuan-image]
# text: Qwen2.5-VL and ByT5
60 28 128 14336 1x32 1128 0    2048x2048 1   50 hunyuan-image-2.1 hunyuanvideo-community/HunyuanImage-2.1-Diffusers
[hidream]
# feed-forward: two of four gated experts, and the shared one
48 20 128 26112 1x8  384  0    1024x1024 1   50 hidream-i1 HiDream-ai/HiDream-I1-Full
[cogview]
28 32 128 16384 1x8  224  0    1024x1024 1   50 cogview4-6b THUDM/CogView4-6B
30 64 40  10240 1x8  224  0    1024x1024 1   50 cogview3-plus-3b THUDM/CogView3-Plus-3B
[lumina2]
26 24 96  13824 1x8  128  0    1024x1024 1   50 lumina-image-2.0 Alpha-VLLM/Lumina-Image-2.0
[aura-flow]
36 12 256 12288 1x8  264  0    1024x1024 1   50 aura-flow-0.3 fal/AuraFlow-v0.3
[pixart]
28 16 72  4608  1x8  0    300  1024x1024 1   20 pixart-sigma PixArt-alpha/PixArt-Sigma-XL-2-1024-MS
"""


def released(adapter: str, further: Mapping[str, Mapping[str, Any]] | None = None, **common: Any) -> tuple[Family, ...]:
    """Return an adapter's released models, with the recipes that are published for them.

    Args:
        further: model -> field of `Family` -> value, beside the table.
        common: fields of `Family` that all of them have; patches are (1, 2, 2) unless named.
    """
    block = SIZES.partition(f"[{adapter}]\n")[2].partition("[")[0]
    rows = [row.split() for row in block.splitlines() if row and not row.startswith("#")]
    return tuple(_family(row, {**common, **(further or {}).get(row[-2], {})}) for row in rows)


def _family(row: list[str], fields: dict[str, Any]) -> Family:
    *numbers, name, repo = row
    layers, heads, head_dim, ffn_dim, time, space, text, cross, height, width, frames, steps = (
        int(number) for number in " ".join(numbers).replace("x", " ").split()
    )
    published = {method: models[name] for method, models in PUBLISHED.items() if name in models}
    head_sets = published.pop("head_sets", {})
    return Family(
        name=name, repo=repo, layers=layers, heads=heads, head_dim=head_dim, ffn_dim=ffn_dim, vae=(time, space),
        text_tokens=text, cross_tokens=cross, height=height, width=width, num_frames=frames, num_inference_steps=steps,
        head_sets=head_sets,
        **{"patch": (1, 2, 2), **fields, "recipes": {**fields.get("recipes", {}), **published}},
    )  # fmt: skip
