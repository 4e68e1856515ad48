"""diffusers' transformers and U-Nets that no adapter covers, each with the reason; a test demands one or the other."""

AUDIO = "it makes sound: there is no grid of frames, rows and columns"
LINEAR = "its self-attention is linear: there is no softmax over tiles"
PART = "it is a part of U-Nets, not a whole transformer"
UNET = "it is a U-Net, whose blocks differ in tokens and channels: methods take transformers of like blocks"
TINY = "its images have a few hundred tokens: attention costs next to nothing there"
APART = "its spatial and its temporal attention are separate: no call sees a video's grid"

NOT_SUPPORTED: dict[str, str] = {
    "AceStepTransformer1DModel": AUDIO,
    "AnyFlowFARTransformer3DModel": (
        "its attention runs on FlexAttention alone, under a causal block mask of its own, over a key-value cache of "
        "the frames before"
    ),
    "DiTTransformer2DModel": TINY,
    "DreamLiteTransformer2DModel": PART,
    "I2VGenXLUNet": UNET,
    "Kandinsky3UNet": UNET,
    "Kandinsky6SRTransformer3DModel": (
        "it was trained with its own sparse attention (NABLA) and has no dense one: every call gets a block mask of "
        "8 x 8 tokens"
    ),
    "LatteTransformer3DModel": APART,
    "LongCatAudioDiTTransformer": AUDIO,
    "MiniMaxMusic3RVQDepthDecoder": AUDIO,
    "MiniMaxMusic3Transformer1DModel": AUDIO,
    "MotionAdapter": PART,
    "OmniGenTransformer2DModel": (
        "its mask pairs queries with keys: a text token sees the text before it, and nothing of the image"
    ),
    "PriorTransformer": "it predicts an embedding of an image: there are no visual tokens",
    "RFD4ProteinaTransformer": "it makes proteins: there is no grid of frames, rows and columns",
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": (
        "it refines chunk by chunk: a chunk's queries meet keys of earlier chunks out of a key-value cache"
    ),
    "SanaWMTransformer3DModel": "most of its layers hold linear attention or a recurrence over frames",
    "StableAudio3DiTModel": AUDIO,
    "StableAudioDiTModel": AUDIO,
    "StableCascadeUNet": UNET,
    "T5FilmDecoder": AUDIO,
    "Transformer2DModel": PART,
    "TransformerTemporalModel": PART,
    "UNet1DModel": UNET,
    "UNet2DConditionModel": UNET,
    "UNet2DModel": UNET,
    "UNet3DConditionModel": UNET,
    "UNetMotionModel": UNET,
    "UNetSpatioTemporalConditionModel": UNET,
    "UVit2DModel": "it fills in masked picture tokens (Amused): there is no noise that is taken away in steps",
    "WanAnimate2Transformer3DModel": (
        "each frame also attends to its own reference frame, whose keys come from a cache and are paired with it by a "
        "FlexAttention block mask"
    ),
}
"""Class name -> not supported, because ..."""
