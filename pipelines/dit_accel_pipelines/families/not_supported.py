"""diffusers' transformers and U-Nets that no adapter covers, each with the reason; a test demands one or the other."""

REASONS = {
    "it makes sound: there is no grid of frames, rows and columns": (
        "AceStepTransformer1DModel LongCatAudioDiTTransformer MiniMaxMusic3RVQDepthDecoder "
        "MiniMaxMusic3Transformer1DModel StableAudio3DiTModel StableAudioDiTModel T5FilmDecoder"
    ),
    "its attention runs on FlexAttention alone, under a causal block mask of its own, over a key-value cache of the "
    "frames before": "AnyFlowFARTransformer3DModel",
    "its images have a few hundred tokens: attention costs next to nothing there": "DiTTransformer2DModel",
    "it is a part of U-Nets, not a whole transformer": (
        "DreamLiteTransformer2DModel MotionAdapter Transformer2DModel TransformerTemporalModel"
    ),
    "it is a U-Net, whose blocks differ in tokens and channels: methods take transformers of like blocks": (
        "I2VGenXLUNet Kandinsky3UNet StableCascadeUNet UNet1DModel UNet2DConditionModel UNet2DModel "
        "UNet3DConditionModel UNetMotionModel UNetSpatioTemporalConditionModel"
    ),
    "it was trained with its own sparse attention (NABLA) and has no dense one: every call gets a block mask of 8 x 8 "
    "tokens": "Kandinsky6SRTransformer3DModel",
    "its spatial and its temporal attention are separate: no call sees a video's grid": "LatteTransformer3DModel",
    "its mask pairs queries with keys: a text token sees the text before it, and nothing of the image": (
        "OmniGenTransformer2DModel"
    ),
    "it predicts an embedding of an image: there are no visual tokens": "PriorTransformer",
    "it makes proteins: there is no grid of frames, rows and columns": "RFD4ProteinaTransformer",
    "its self-attention is linear: there is no softmax over tiles": (
        "SanaTransformer2DModel SanaVideoTransformer3DModel"
    ),
    "it refines chunk by chunk: a chunk's queries meet keys of earlier chunks out of a key-value cache": (
        "SanaWMLTX2RefinerTransformer3DModel"
    ),
    "most of its layers hold linear attention or a recurrence over frames": "SanaWMTransformer3DModel",
    "it fills in masked picture tokens (Amused): there is no noise that is taken away in steps": "UVit2DModel",
    "each frame also attends to its own reference frame, whose keys come from a cache and are paired with it by a "
    "FlexAttention block mask": "WanAnimate2Transformer3DModel",
}
"""Not supported, because ... -> class names."""

NOT_SUPPORTED = dict(sorted((name, reason) for reason, names in REASONS.items() for name in names.split()))
"""Class name -> not supported, because ..."""
