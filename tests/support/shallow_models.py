"""Tiny models with two attention layers, for pairs of methods: more layers are tried with each method alone."""

from dataclasses import replace

from dit_accel.testing.adapter_checks import TinyModel

DEPTHS = {"num_layers", "num_single_layers", "num_visual_blocks", "num_hidden_layers", "n_layers", "depth"}
ONE_A_BLOCK = {  # settings of models that have more for each block: its text, what is beside it
    "vace_layers", "dual_attention_layers", "llama_layers", "injection_layer_ids", "num_decoder_layers",
    "inject_face_latents_blocks", "text_encoder_dim",
}  # fmt: skip


def shallow(model: TinyModel) -> TinyModel:
    """The model with two blocks, or one of each of two kinds; as it is where more than a number counts them."""
    counted = DEPTHS & set(model.config)
    if not counted or ONE_A_BLOCK & set(model.config):
        return model
    blocks = 2 if len(counted) == 1 else 1
    return replace(model, config={**model.config, **{name: min(blocks, model.config[name]) for name in counted}})
