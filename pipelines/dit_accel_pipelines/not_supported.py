"""diffusers' transformer classes that no adapter covers, each with the reason; a test demands one or the other."""

IMAGE = "no adapter yet: an image model"
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
    "AnyFlowFARTransformer3DModel": CACHE,
    "AuraFlowTransformer2DModel": IMAGE,
    "BriaFibo2Transformer2DModel": IMAGE,
    "BriaFiboTransformer2DModel": IMAGE,
    "ChromaTransformer2DModel": PAIRS,
    "CogView3PlusTransformer2DModel": IMAGE,
    "CogView4Transformer2DModel": IMAGE,
    "DiTTransformer2DModel": TINY,
    "DreamLiteTransformer2DModel": UNET,
    "ErnieImageTransformer2DModel": IMAGE,
    "Flux2Transformer2DModel": "no adapter yet: reference images may come through a key-value cache",
    "Flux3Transformer2DModel": IMAGE,
    "GlmImageTransformer2DModel": "no adapter yet: reference images come through a key-value cache",
    "HiDreamImageTransformer2DModel": IMAGE,
    "HunyuanDiT2DModel": IMAGE,
    "HunyuanImageTransformer2DModel": IMAGE,
    "Ideogram4Transformer2DModel": PACKED,
    "JoyImageEditPlusTransformer3DModel": PACKED,
    "JoyImageEditTransformer3DModel": IMAGE,
    "Kandinsky6SRTransformer3DModel": VIDEO,
    "Krea2Transformer2DModel": IMAGE,
    "LatteTransformer3DModel": APART,
    "LongCatAudioDiTTransformer": AUDIO,
    "Lumina2Transformer2DModel": IMAGE,
    "LuminaNextDiT2DModel": IMAGE,
    "MiniMaxMusic3RVQDepthDecoder": AUDIO,
    "MiniMaxMusic3Transformer1DModel": AUDIO,
    "NucleusMoEImageTransformer2DModel": IMAGE,
    "OmniGenTransformer2DModel": PACKED,
    "PRXTransformer2DModel": IMAGE,
    "PixArtTransformer2DModel": IMAGE,
    "PriorTransformer": "it predicts an embedding of an image: there are no visual tokens",
    "QwenImage21Transformer2DModel": "no adapter yet: reference images may come through a key-value cache",
    "RFD4ProteinaTransformer": "it makes proteins: there is no grid of frames, rows and columns",
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": CACHE,
    "SanaWMTransformer3DModel": "most of its layers hold linear attention or a recurrence over frames",
    "StableAudio3DiTModel": AUDIO,
    "StableAudioDiTModel": AUDIO,
    "T5FilmDecoder": AUDIO,
    "Transformer2DModel": UNET,
    "TransformerTemporalModel": UNET,
    "WanAnimate2Transformer3DModel": CACHE,
    "ZImageTransformer2DModel": IMAGE,
}
"""Class name -> not supported, because ..."""
