"""Where tokens stand, which step it is, and whose forward."""

from types import SimpleNamespace

import comfy_stand_in as comfy
import pytest
import torch
from dit_accel_comfyui.placing import Steps, TokenPlacement, inputs_of, layout_from_options, placement_of
from dit_accel_comfyui.run import Run

from dit_accel.errors import ConfigError


def named(name, **attributes):
    return type(name, (), attributes)()


def sizes(layout):
    return layout.frames, layout.height, layout.width, layout.text_before, layout.text_after


WAN, FLUX = named("WanModel", patch_size=(1, 2, 2)), named("Flux", patch_size=2)
HUNYUAN = named("HunyuanVideo", patch_size=[1, 2, 2])


@pytest.mark.parametrize(
    ("model", "latents", "tokens", "expected"),
    [
        (WAN, (1, 16, 21, 60, 104), 21 * 30 * 52, (21, 30, 52, 0, 0)),
        (WAN, (1, 16, 21, 61, 103), 21 * 31 * 52, (21, 31, 52, 0, 0)),
        (FLUX, (1, 16, 128, 128), 4096 + 512, (1, 64, 64, 512, 0)),
        (named("Cosmos", patch_spatial=2, patch_temporal=1), (1, 16, 4, 8, 8), 64, (4, 4, 4, 0, 0)),
        (HUNYUAN, (1, 16, 33, 90, 160), 33 * 45 * 80 + 512, (33, 45, 80, 0, 512)),
        (named("LTXVModel"), (1, 128, 13, 16, 24), 13 * 16 * 24, (13, 16, 24, 0, 0)),
    ],
)
def test_a_sequence_is_placed_by_the_latents_and_the_text(model, latents, tokens, expected):
    inputs = {"x": torch.zeros(1).expand(latents), "context": torch.zeros(1).expand(1, 512, 8)}
    placing = placement_of(model, inputs)
    assert isinstance(placing, TokenPlacement)
    assert sizes(placing.layout(tokens)) == expected


def test_further_pictures_stand_behind_the_one_that_is_made():
    inputs = {"x": torch.zeros(1, 16, 8, 8), "context": torch.zeros(1, 7, 8), "ref_latents": [torch.zeros(1, 16, 4, 4)]}
    assert sizes(placement_of(FLUX, inputs).layout(16 + 7 + 4)) == (1, 4, 4, 7, 4)


def test_another_number_of_tokens_and_a_forward_that_can_not_be_placed_say_why():
    for model, tokens, text in (
        (WAN, 4 * 16 + 1, 7), (WAN, 63, 7), (WAN, 64, 64), (FLUX, 70, 7), (FLUX, 80, 7), (HUNYUAN, 64, 7),
        (HUNYUAN, 70, 70),
    ):  # fmt: skip
        placing = placement_of(model, {"x": torch.zeros(1, 16, 4, 8, 8), "context": torch.zeros(1, text, 8)})
        assert isinstance(refusal := placing.layout(tokens), str)
        assert str(tokens) in refusal
    picture = {"x": torch.zeros(1, 4, 8, 8)}
    for model, inputs, said in (
        (named("UNetModel"), picture, "UNetModel"), (named("Odd", patch_size="big"), picture, "patch_size"),
        (FLUX, picture, "context"), (named("AudioModel", patch_size=1), {"x": torch.zeros(1, 4, 8)}, "axes"),
        (WAN, {"x": torch.zeros(1, 4, 1, 8, 8), "keyframe_idxs": 1}, "keyframe_idxs"),
    ):  # fmt: skip
        assert isinstance(refusal := placement_of(model, inputs), str)
        assert said in refusal


def test_a_packed_sequence_is_placed_as_the_model_tells_it():
    segments = [(0, 7, "text"), (7, 39, "video"), (39, 45, "audio"), (45, 45 + 5 * 4 * 6, "video")]
    told = SimpleNamespace(seq_len=165, segments=segments, signature=(7, 5, 8, 12, 3))
    layout = layout_from_options({"minimax_h3_layout": told}, 165)
    assert layout is not None
    assert sizes(layout) == (5, 4, 6, 45, 0)
    assert layout_from_options({"minimax_h3_layout": told}, 164) is None
    assert layout_from_options({}, 165) is None
    told.segments = segments[:2]
    assert layout_from_options({"minimax_h3_layout": told}, 165) is None


def test_inputs_are_told_by_name_however_they_are_passed():
    model = comfy.Wan()
    found = inputs_of(model._forward, (1, 2, 3), {"transformer_options": {}, "reference_latent": 4})
    assert found == {"x": 1, "timestep": 2, "context": 3, "transformer_options": {}, "reference_latent": 4}


def test_a_noise_level_tells_the_step():
    for sigma, step in ((1.0, 0), (0.8, 1), (0.80001, 1), (0.7, 1), (0.5, 2), (0.05, 2), (2.0, 0)):
        assert Steps((1.0, 0.8, 0.5, 0.0)).index(sigma) == step
    with pytest.raises(ConfigError, match="sample_sigmas"):
        Steps().index(1.0)


def test_forwards_of_other_prompts_windows_and_repeats_have_state_of_their_own():
    run = Run((), "torch")
    both = {"cond_or_uncond": [0, 1], "uuids": ["a", "b"]}
    window = SimpleNamespace(index_list=[0, 1])
    given = [
        both, {"cond_or_uncond": [0], "uuids": ["a"]}, {"cond_or_uncond": [0], "uuids": ["c"]},
        {**both, "context_window": window}, both,
    ]  # fmt: skip
    names = [run._branch(options, 1.0) for options in given]
    assert names == ["cond_uncond", "cond", "cond 2", "cond_uncond 2", "cond_uncond 3"]
    assert [run._branch(options, 0.5) for options in given] == names
