"""LTX-2: video and sound in two streams; ``attn1`` is video's own, sound and text come in by cross-attention.

Sound is never thinned out: its attention and both crossings are left alone. Reference tokens of the IC-LoRA and
keyframe pipelines stand behind the video and count as text.
"""

from functools import partial

from dit_accel.adapters import Adapter, BlockList, Guidance, Rope, read_sizes

from .ltx import fractions, packed_grid
from .released import released

LTX2 = Adapter(
    name="ltx-2",
    transformers=("LTX2VideoTransformer3DModel",),
    guidance=Guidance(
        alone=("LTX2DFRPipeline", "LTX2DFRTemporalRefinePipeline", "EchoModularPipeline"),
        converted=("LTX2ModularPipeline",),
    ),
    self_attention=("transformer_blocks.*.attn1",),
    blocks=(
        BlockList(
            pattern="transformer_blocks.*", takes=("hidden_states", "audio_hidden_states"), gives=(0, 1), joined=True
        ),
    ),
    sizes=partial(read_sizes, mlp_ratio=4.0),
    grid=packed_grid,
    rope=Rope(
        owner="rope",
        form="theta of all axes",
        axes=fractions,
        kinds=("none", "pi"),
        note="as LTX; sound, and attention between video and sound, keep their own positions",
    ),
    families=released("ltx-2", patch=(1, 1, 1)),
)
