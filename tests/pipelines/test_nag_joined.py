"""NAG where text joins the self-attention: stock pipelines agree with `negative_pairs`; what is refused, and why."""

import diffusers
import dit_accel_assets
import pytest
import torch
from negative_pairs import Meeting, negative_pairs
from tiny_stock import run_stock, stock_pipeline

import dit_accel
from dit_accel import NAG, ConfigError, EasyCache, LiteAttention, SoftPAG

NEGATIVE = dict(negative_prompt_embeds=torch.ones(1, 6, 16), negative_pooled_prompt_embeds=torch.ones(1, 8))
ALL, LAST = slice(0, 1), slice(1, 2)
CASES = {
    "flux, guidance embedded": ("FluxPipeline", {}, "before", None, lambda n: ALL),
    "flux, two calls": (
        "FluxPipeline", dict(true_cfg_scale=2.0, **NEGATIVE), "before", None, lambda n: None if n % 2 else ALL,
    ),
    "flux kontext, a reference": ("FluxKontextPipeline", {}, "before", None, lambda n: ALL),
    "sd3, one call": ("StableDiffusion3Pipeline", dict(guidance_scale=3.0), "after", None, lambda n: LAST),
    "sd3, guidance off": ("StableDiffusion3Pipeline", dict(guidance_scale=1.0), "after", None, lambda n: ALL),
    "hunyuan-video, two calls": (
        "HunyuanVideoPipeline", {}, "after", "encoder_attention_mask", lambda n: None if n % 2 else ALL,
    ),
    "hunyuan-video, embedded": (
        "HunyuanVideoPipeline", dict(true_cfg_scale=1.0), "after", "encoder_attention_mask", lambda n: ALL,
    ),
    "qwen-image, two calls": (
        "QwenImagePipeline", {}, "before", "encoder_hidden_states_mask", lambda n: None if n % 2 else ALL,
    ),
    "qwen-image, guidance off": (
        "QwenImagePipeline", dict(true_cfg_scale=1.0), "before", "encoder_hidden_states_mask", lambda n: ALL,
    ),
    "cogvideox, one call": ("CogVideoXPipeline", {}, "before", None, lambda n: LAST),
}  # fmt: skip


PLACES = {name: place for name, _, place, _, _ in CASES.values()}


def text_of(tokens):
    return torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(7))


def picture_of(pipe, name, call, changes):
    """The tokens of its pictures, as attention has them besides text."""
    with dit_accel.attach(pipe, NAG(negative_embeds=text_of(6))) as attachment:
        layouts = []
        attachment.engine.observers.append(lambda one: layouts.append((one.context.layout, one.call.tokens)))
        run_stock(pipe, call, **changes)
    layout, tokens = max(layouts, key=lambda one: one[1])
    return tokens - (layout.text_before if PLACES[name] == "before" else layout.text_after)


@pytest.mark.sample
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tau", [1.02, 2.5])
def test_stock_pipelines_are_the_formula(case, tau):
    name, changes, place, mask, conditional = CASES[case]
    pipe, call = stock_pipeline(name)
    plain = run_stock(pipe, call, **changes)
    embeds = text_of(6 if mask is None else 4)  # a mask tells texts of another length
    meeting = Meeting(picture_of(pipe, name, call, changes), place == "before", 8.0, tau, 0.5)
    with negative_pairs(pipe.transformer, embeds, meeting, mask=mask, conditional=conditional):
        expected = run_stock(pipe, call, **changes)
    with dit_accel.attach(pipe, NAG(scale=8.0, tau=tau, alpha=0.5, negative_embeds=embeds)) as attachment:
        made = run_stock(pipe, call, **changes)
        section = attachment.report().section("nag")
        again = run_stock(pipe, call, **changes)
    assert 2 * section.data["calls"] == meeting.met > 0
    assert float((expected - plain).norm() / plain.norm()) > 1e-4
    assert float((made - expected).norm() / expected.norm()) <= 1e-5
    assert torch.equal(made, again)
    assert torch.equal(run_stock(pipe, call, **changes), plain)


@pytest.mark.parametrize(
    "name", ["FluxPipeline", "StableDiffusion3Pipeline", "HunyuanVideoPipeline", "QwenImagePipeline"]
)
def test_neutral_settings_change_no_bit(name):
    pipe, call = stock_pipeline(name)
    plain = run_stock(pipe, call)
    for neutral in (dict(scale=1.0), dict(alpha=0.0)):
        with dit_accel.attach(pipe, NAG(negative_embeds=text_of(6), **neutral)):
            assert torch.equal(run_stock(pipe, call), plain)


def test_it_goes_beside_sparse_methods_caches_and_perturbed_branches():
    pipe, call = stock_pipeline("FluxPipeline")
    nag = NAG(scale=8.0, negative_embeds=text_of(6))
    plain = run_stock(pipe, call)

    def made(*methods):
        with dit_accel.attach(pipe, *methods, preset="none") as attachment:
            return run_stock(pipe, call), attachment.report()

    alone, _ = made(nag)
    lite = LiteAttention(block_size=16, dense_steps=0, threshold=-1e4)
    together, report = made(nag, lite)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)  # nothing is skipped at that threshold
    assert {step.branch for step in report.steps} == {"cond/nag"}
    cached, _ = made(nag, EasyCache(threshold=0.0))
    assert torch.equal(cached, alone)
    heads = SoftPAG(heads="L1", u=1e-9, scale=1000.0)  # a branch that is all but the conditional one
    for share in (True, False):
        both, report = made(nag, SoftPAG(heads="L1", u=1e-9, scale=1000.0, share_prefix=share))
        torch.testing.assert_close(both, alone, rtol=1e-3, atol=1e-3)
        assert report.section("nag").data["branches"] == ["cond", "cond/softpag"]
    _, report = made(NAG(scale=8.0, stop=0.5, negative_embeds=text_of(6)), heads)
    assert report.section("nag").data["steps"] == [0, 1]
    assert torch.equal(run_stock(pipe, call), plain)


@pytest.mark.slow
def test_compiled_blocks_are_guided_as_well():
    pipe, call = stock_pipeline("FluxPipeline")
    nag = NAG(scale=8.0, stop=0.5, negative_embeds=text_of(6))
    with dit_accel.attach(pipe, nag):
        expected = run_stock(pipe, call)
    torch.compiler.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with dit_accel.attach(pipe, nag) as attachment:
        torch.testing.assert_close(run_stock(pipe, call), expected, rtol=1e-4, atol=1e-5)
        assert attachment.report().section("nag").data["calls"] == 2 * 4


def test_texts_that_can_t_be_laid_beside_the_prompt_are_refused_with_the_reason():
    pipe, call = stock_pipeline("FluxPipeline")
    for embeds, why in (
        (text_of(4), r"negative text.*4 tokens.*6.*mask"),
        (text_of(6)[..., :8], r"negative text.*8 channels.*16"),
    ):
        with dit_accel.attach(pipe, NAG(negative_embeds=embeds)), pytest.raises(ConfigError, match=why):
            run_stock(pipe, call)
    pipe, call = stock_pipeline("Flux2KleinKVPipeline")
    with (
        dit_accel.attach(pipe, NAG(negative_embeds=text_of(6))),
        pytest.raises(ConfigError, match=r"kv_cache.*prompt's rows"),
    ):
        run_stock(pipe, call)
    pipe, call = stock_pipeline("MochiPipeline")
    with pytest.raises(ConfigError, match=r"nag.*mochi.*processor"):
        dit_accel.attach(pipe, NAG(negative_embeds=text_of(6)))
    assert dit_accel.attachment_of(pipe) is None


def test_a_negative_prompt_is_encoded_to_the_prompt_s_own_length():
    """By both text encoders of the embedded image model, whose prompts are shorter than the pipeline's usual ones."""
    pipe = diffusers.FluxPipeline.from_pretrained(dit_accel_assets.model_path("flux-tiny"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def made(length, *methods):
        call = dict(height=32, width=32, num_inference_steps=2, max_sequence_length=length, output_type="latent")
        with dit_accel.attach(pipe, *methods, preset="none"):
            return pipe("a red circle", **call, generator=torch.Generator().manual_seed(0)).images

    for length in (64, 32):
        with torch.no_grad():
            embeds = pipe.encode_prompt("a blue square", None, max_sequence_length=length)[0]
        assert embeds.shape[1] == length
        told = made(length, NAG(negative_prompt="a blue square", scale=8.0))
        assert torch.equal(told, made(length, NAG(negative_embeds=embeds, scale=8.0)))
        assert not torch.equal(told, made(length, NAG(negative_prompt="a red circle", scale=8.0)))


def test_gradients_through_guided_attention_are_refused():
    pipe, call = stock_pipeline("FluxPipeline")
    inputs = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *call: inputs.append(call[2]), with_kwargs=True)
    run_stock(pipe, call)
    hook.remove()
    with dit_accel.attach(pipe.transformer, NAG(negative_embeds=text_of(6))), torch.enable_grad():
        out = pipe.transformer(**inputs[0])[0]
        with pytest.raises(ConfigError, match="nag"):
            out.sum().backward()
