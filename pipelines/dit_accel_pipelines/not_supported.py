"""diffusers' transformer classes that no adapter covers, each with the reason; a test demands one or the other."""

VIDEO = "no adapter yet: a video model"
PACKED = "no adapter yet: it packs text and images into one sequence whose places are among the forward's inputs"
PAIRS = "no adapter yet: its mask pairs queries with keys, ours are rows of keys"
AUDIO = "it makes sound: there is no grid of frames, rows and columns"
LINEAR = "its self-attention is linear: there is no softmax over tiles"
UNET = "it is a part of U-Nets, not a whole transformer"
TINY = "its images have few hundred tokens: attention is no cost there"
APART = "its spatial and its temporal attention are apart: no call sees a video's grid"
HISTORY = "no adapter yet: earlier frames join the sequence at several resolutions"
CACHE = "no adapter yet: it attends to earlier chunks through a key-value cache, which no plan covers"
SOUND_TOO = "no adapter yet: sound and video meet in one attention, and sound must stay exact"

NOT_SUPPORTED: dict[str, str] = {
    "AceStepTransformer1DModel": AUDIO,
    "AllegroTransformer3DModel": "no adapter yet: its masks are additive biases, and key validity is boolean here",
    "AnyFlowFARTransformer3DModel": CACHE,
    "AnyFlowTransformer3DModel": VIDEO,
    "Cosmos3OmniTransformer": PACKED,
    "CosmosTransformer3DModel": VIDEO,
    "DiTTransformer2DModel": TINY,
    "DreamLiteTransformer2DModel": UNET,
    "EasyAnimateTransformer3DModel": VIDEO,
    "HeliosTransformer3DModel": HISTORY,
    "HunyuanVideo15Transformer3DModel": PAIRS,
    "HunyuanVideoFramepackTransformer3DModel": HISTORY,
    "Kandinsky5Transformer3DModel": "no adapter yet: its own sparse attention comes as a mask of pairs",
    "Kandinsky6SRTransformer3DModel": VIDEO,
    "Kandinsky6Transformer3DModel": SOUND_TOO,
    "LTX2VideoTransformer3DModel": SOUND_TOO,
    "LatteTransformer3DModel": APART,
    "LongCatAudioDiTTransformer": AUDIO,
    "MiniMaxH3Transformer3DModel": PACKED,
    "MiniMaxMusic3RVQDepthDecoder": AUDIO,
    "MiniMaxMusic3Transformer1DModel": AUDIO,
    "MotifVideoTransformer3DModel": VIDEO,
    "OmniGenTransformer2DModel": "its text attends causally: the mask pairs each text token with those before it",
    "PriorTransformer": "it predicts an embedding of an image: there are no visual tokens",
    "RFD4ProteinaTransformer": "it makes proteins: there is no grid of frames, rows and columns",
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": CACHE,
    "SanaWMTransformer3DModel": "most of its layers hold linear attention or a recurrence over frames",
    "SkyReelsV2Transformer3DModel": "no adapter yet: diffusion forcing gives every frame a timestep of its own",
    "StableAudio3DiTModel": AUDIO,
    "StableAudioDiTModel": AUDIO,
    "T5FilmDecoder": AUDIO,
    "Transformer2DModel": UNET,
    "TransformerTemporalModel": UNET,
    "WanAnimate2Transformer3DModel": CACHE,
    "WanAnimateTransformer3DModel": "no adapter yet: a reference frame stands before the video",
}
"""Class name -> not supported, because ..."""
