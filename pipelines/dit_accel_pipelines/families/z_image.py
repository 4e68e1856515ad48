"""Z-Image: the image, then text, each padded to a multiple of 32.

Omni: text, earlier images, the image, SigLIP tokens.
"""

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from typing import Any

from dit_accel.adapters import Adapter, BlockList, Grid, Guidance, Rope, by_config, read_sizes
from dit_accel.adapters.rope_axes import lengths_of_image

from .released import released

MULTIPLE = 32
"""What the model pads text and each image to, in tokens."""


def padded(tokens: int) -> int:
    """Return the tokens that the model makes of ``tokens``."""
    return tokens + -tokens % MULTIPLE


def list_grid(config: Any, inputs: Mapping[str, Any]) -> Grid | str:
    """Read the grid off the list of images [C, F, H, W], one per row of the batch.

    Omni: one list per row, of which the last image is made.
    """
    patch, frame_patch = inputs.get("patch_size", 2), inputs.get("f_patch_size", 1)

    def size(image: Any) -> tuple[int, int, int]:
        return image.shape[1] // frame_patch, image.shape[2] // patch, image.shape[3] // patch

    def tokens(image: Any) -> int:
        frames, height, width = size(image)
        return frames * height * width

    rows, texts = inputs["x"], inputs["cap_feats"]
    if not isinstance(rows[0], list):
        return *size(rows[0]), 0, padded(tokens(rows[0])) - tokens(rows[0]) + max(padded(len(text)) for text in texts)
    grids = []
    for images, text, extra in zip(rows, texts, inputs["siglip_feats"], strict=True):
        before = sum(padded(len(part)) for part in text)
        before += sum(MULTIPLE if image is None else padded(tokens(image)) for image in images[:-1])
        after = padded(tokens(images[-1])) - tokens(images[-1])
        after += sum(MULTIPLE if x is None else padded(x.shape[0] * x.shape[1]) for x in extra or ())
        grids.append((*size(images[-1]), before, after))
    if len({grid[:4] for grid in grids}) > 1:
        return "the rows of the batch have prompts or reference images of different lengths; make one image per call"
    return max(grids)


Z_IMAGE = Adapter(
    name="z-image",
    transformers=("ZImageTransformer2DModel",),
    guidance=Guidance(
        converted=("ZImageModularPipeline",),
        together=(
            "ZImagePipeline",
            "ZImageImg2ImgPipeline",
            "ZImageInpaintPipeline",
            "ZImageOmniPipeline",
            "ZImageControlNetPipeline",
            "ZImageControlNetInpaintPipeline",
        ),
        first_rows="cond",
        rows=dict.fromkeys(("x", "cap_feats", "siglip_feats", "image_noise_mask"), "each"),
    ),
    self_attention=("layers.*.attention",),
    blocks=(BlockList(pattern="layers.*", takes=("x",), joined=True),),
    sizes=partial(
        read_sizes,
        layers=("n_layers",),
        heads="n_heads",
        head_dim=None,
        width="dim",
        mlp_ratio=Fraction(8, 3),
        gated=True,
        patch=(1, 2, 2),
    ),
    grid=list_grid,
    latents="x",
    timestep="t",
    rope=Rope(
        owner="rope_embedder",
        method="precompute_freqs_cis",
        form="object of tables",
        values="complex",
        parts=("freqs_cis",),
        axes=by_config("axes_dims", ("text", "height", "width"), 256.0),
        max_positions=lengths_of_image("axes_lens", (512, 512)),
    ),
    joined_text="it takes texts as a list and packs them with the image",
    families=released("z-image", forwards_per_step=1),
    makes_images=True,
)
