"""Single attention calls: every way in which ComfyUI passes tensors, masks and grouped heads."""

from types import SimpleNamespace

import comfy_stand_in as comfy
import pytest
import torch
from dit_accel_comfyui.calls import AttentionArguments, Override, call_from
from dit_accel_comfyui.run import Run

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
