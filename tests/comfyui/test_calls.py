"""Single attention calls as ComfyUI passes them, where their tokens stand, which step it is, and whose forward."""

from types import SimpleNamespace

import comfy_stand_in as comfy
import pytest
import torch
from dit_accel_comfyui.calls import AttentionArguments, Override, call_from
from dit_accel_comfyui.placing import Steps, TokenPlacement, inputs_of, layout_from_options, placement_of
from dit_accel_comfyui.run import Run

from dit_accel.errors import ConfigError
from dit_accel.methods.attention.sol import SolAttention

TOKENS = 40
LATENTS = torch.zeros(2, 4, 10, 4, 4)


class Told(comfy.Wan):
    """A model whose forward is one attention call of the test's."""

    call = staticmethod(lambda options: None)

    def forward_orig(self, x, timestep, context, options):
        self.out = self.call(options)
        return x


def attended(call, beta=-8.0, options=None):
    """Return what an attention call gives inside a forward of a run, and the run."""
    run = Run((SolAttention(beta=beta, block_size=16, dense_steps=0, dense_layers=0),), "torch")
    model = Told()
    model.call = call
    options = {"sample_sigmas": torch.tensor([1.0, 0.5, 0.0]), "sigmas": torch.tensor([1.0]), **(options or {})}
    inputs = {"x": LATENTS, "context": torch.zeros(2, 7, 8), "transformer_options": options}
    run.forward(model, lambda: model.forward_orig(LATENTS, None, None, options), inputs, options)
    return model.out, run


def tensors(heads=4, kv_heads=None, size=16, flat=False):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, TOKENS, size) for n in (heads, kv_heads or heads, kv_heads or heads)]
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.transpose(1, 2).flatten(2) for x in found] if flat else found


MASKS = {
    "none": None,
    "padding": torch.where(torch.arange(TOKENS) < 31, 0.0, -torch.inf).expand(2, TOKENS, TOKENS),
    "one row": torch.where(torch.arange(TOKENS) < 31, 0.0, -torch.inf)[None, None, None],
    "boolean": (torch.arange(TOKENS) < 31).expand(2, 1, 1, TOKENS),
    "queries x keys": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(),
    "a bias": torch.linspace(-1, 1, TOKENS).expand(2, TOKENS, TOKENS),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("flat", "whole"), [(True, False), (True, True), (False, False), (False, True)])
@pytest.mark.parametrize("kv_heads", [None, 2])
def test_a_call_gives_what_dense_attention_gives(mask, flat, whole, kv_heads):
    q, k, v = tensors(kv_heads=kv_heads, flat=flat)
    given = {"mask": MASKS[mask], "skip_reshape": not flat, "skip_output_reshape": whole}

    def call(options):
        others = {"transformer_options": options, "enable_gqa": bool(kv_heads)}
        return comfy.optimized_attention(q, k, v, heads=4, **others, **given)

    out, run = attended(call)
    expected = comfy.plain(q, k, v, 4, **given)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    planned = any(entry.calls for entry in run.engine.recorder.forwards.values())
    assert planned == (mask not in ("queries x keys", "a bias"))
    assert bool(run.declined) != planned


def test_the_scale_of_a_call_is_kept_and_an_override_outside_a_forward_passes_everything_on():
    given, options = tensors(), dict(skip_reshape=True, scale=0.5)
    out, _ = attended(lambda more: comfy.optimized_attention(*given, heads=4, transformer_options=more, **options))
    torch.testing.assert_close(out, comfy.plain(*given, 4, **options), rtol=1e-4, atol=1e-5)
    given, override = tensors(flat=True), Override(Run((), "torch").attend, None)
    assert torch.equal(override(comfy.plain, *given, 4), comfy.plain(*given, 4))


def test_calls_that_are_not_understood_are_refused_with_their_reason():
    """Logits in float32 of half tensors are left to the model, too."""
    wide, narrow, heads = torch.zeros(2, 4, 40, 16).double(), torch.zeros(2, 4, 40, 8), torch.zeros(2, 3, 40, 16)
    half = dict(zip("qkv", (x.half() for x in tensors()), strict=True)) | {"attn_precision": torch.float32}
    arguments = dict(zip("qkv", tensors(), strict=True)) | {"heads": 4, "mask": None, "attn_precision": None}
    arguments |= {"skip_reshape": True, "skip_output_reshape": False, "kwargs": {}}
    for changed, said in (
        ({"kwargs": {"window": 3}}, "window"), ({"q": wide}, "float64"), ({"v": narrow}, "shapes"),
        ({"k": heads}, "shapes"), (half, "float32"),
    ):  # fmt: skip
        refusal = call_from(AttentionArguments(**{**arguments, **changed}), "torch")
        assert isinstance(refusal, str)
        assert said in refusal


def test_a_kernel_that_fails_leaves_the_call_and_all_after_it_dense(monkeypatch):
    q, k, v = tensors(flat=True)

    def fails(*_, **__):
        raise ValueError("this kernel takes\nno such thing")

    monkeypatch.setattr("dit_accel.attachment.engine.run_kernel", fails)

    def call(options):
        return [comfy.optimized_attention(q, k, v, heads=4, transformer_options=options) for _ in range(3)]

    outs, run = attended(call, beta=1.0)
    assert all(torch.equal(out, comfy.plain(q, k, v, 4)) for out in outs)
    (problem,) = run.problems
    assert problem.endswith("this kernel takes no such thing")


def test_a_sequence_that_the_model_packs_itself_is_placed_as_it_says():
    q, k, v = tensors()
    segments = [(0, 5, "text"), (5, 8, "audio"), (8, 40, "video")]
    told = SimpleNamespace(seq_len=TOKENS, segments=segments, signature=(5, 2, 8, 8, 3))

    def call(options):
        options["minimax_h3_layout"] = told
        return comfy.optimized_attention(q, k, v, heads=4, transformer_options=options, skip_reshape=True)

    _, run = attended(call)
    layout = run.engine.forward.layout
    assert (layout.frames, layout.height, layout.width, layout.text_before, layout.text_after) == (2, 4, 4, 8, 0)
    assert not run.declined


def test_layers_are_told_by_their_block_where_the_model_says_it():
    q, k, v = tensors(flat=True)

    def call(options):
        for kind, index in (("double", 0), ("double", 0), ("single", 0), ("double", 1)):
            options |= {"block_type": kind, "block_index": index}
            comfy.optimized_attention(q, k, v, heads=4, transformer_options=options)

    _, run = attended(call)
    assert sorted(run._layers) == [("double", 0, 0), ("double", 0, 1), ("double", 1, 0), ("single", 0, 0)]


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
    inputs = {"x": torch.zeros(1, 16, 8, 8), "context": torch.zeros(1, 7, 8), "ref_latents": [torch.zeros(1, 16, 4, 4)]}
    assert sizes(placement_of(FLUX, inputs).layout(16 + 7 + 4)) == (1, 4, 4, 7, 4)  # further pictures stand behind


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


def test_a_noise_level_tells_the_step_and_inputs_are_told_by_name():
    for sigma, step in ((1.0, 0), (0.8, 1), (0.80001, 1), (0.7, 1), (0.5, 2), (0.05, 2), (2.0, 0)):
        assert Steps((1.0, 0.8, 0.5, 0.0)).index(sigma) == step
    with pytest.raises(ConfigError, match="sample_sigmas"):
        Steps().index(1.0)
    model = comfy.Wan()
    found = inputs_of(model._forward, (1, 2, 3), {"transformer_options": {}, "reference_latent": 4})
    assert found == {"x": 1, "timestep": 2, "context": 3, "transformer_options": {}, "reference_latent": 4}


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
