"""NAG on a tiny model: when it acts, beside what it may run, what is undone, what is refused."""

import dataclasses

import pytest
import torch
from diffusers import LuminaNextDiT2DModel, PyramidAttentionBroadcastConfig
from torch import nn
from wan_tiny import denoise, guided, tiny_transformer

import dit_accel
from dit_accel import NAG, ConfigError, SoftPAG
from dit_accel.adapters.adapter import Adapter
from dit_accel.adapters.cross_attention import CrossAttention
from dit_accel.adapters.installed import adapter_for
from dit_accel.adapters.joined_text import JoinedText
from dit_accel.estimate.prediction import estimate
from dit_accel.methods.guidance.log import UnperturbedRun

EMBEDS = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(7))
METHOD = NAG(scale=6.0, negative_embeds=EMBEDS)
ANY = dict(name="a", transformers=("A",), self_attention=("b",))


def changed(config, **options):
    return dataclasses.replace(config, **options)


def test_it_acts_in_the_conditional_branch_and_its_window_and_leaves_nothing_behind(transformer):
    plain = denoise(transformer)
    before = {name: list(vars(module)) for name, module in transformer.named_modules()}
    made, report, forwards = guided(transformer, METHOD)
    assert made.isfinite().all()
    assert forwards == 8
    assert report.section("nag").data == {"steps": [0, 1, 2, 3], "branches": ["cond"], "forwards": 4, "calls": 12}
    early, report, _ = guided(transformer, changed(METHOD, stop=0.5))
    assert report.section("nag").data["steps"] == [0, 1]
    assert len({float(out.sum()) for out in (plain, made, early)}) == 3
    assert before == {name: list(vars(module)) for name, module in transformer.named_modules()}
    _, report, _ = guided(transformer, NAG(negative_embeds=EMBEDS), steps=1)
    assert report.methods["nag"] == {"scale": 5.0, "tau": 3.5, "alpha": 0.5, "start": 0.0, "stop": 1.0}  # Wan's recipe


def test_projections_replaced_after_attaching_are_seen(transformer):
    """As by a LoRA that is loaded then."""
    twin = tiny_transformer()

    def replace(part):
        torch.manual_seed(3)
        attention = part.blocks[1].attn2
        attention.to_q, attention.to_out[0] = nn.Linear(32, 32), nn.Linear(32, 32)

    replace(twin)
    expected, _, _ = guided(twin, METHOD)
    with dit_accel.attach(transformer, METHOD):
        replace(transformer)
        assert torch.equal(denoise(transformer), expected)
    transformer.fuse_qkv_projections()
    torch.testing.assert_close(guided(transformer, METHOD)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_a_perturbed_branch_is_guided_as_the_conditional_one(transformer, share):
    """Else what is added would hold the negative text's part as well."""
    heads = SoftPAG(heads="L1", u=1e-9, scale=1000.0, share_prefix=share)
    alone, _, _ = guided(transformer, METHOD)
    made, report, _ = guided(transformer, METHOD, heads)
    torch.testing.assert_close(made, alone, rtol=1e-3, atol=1e-3)
    assert report.section("nag").data["branches"] == ["cond", "cond/softpag"]


def test_a_cache_of_attention_outputs_is_refused(transformer):
    cache = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2, cross_attention_timestep_skip_range=(0, 1000),
        cross_attention_block_identifiers=("blocks",), current_timestep_callback=lambda: 500,
    )  # fmt: skip
    transformer.enable_cache(cache)
    with (
        dit_accel.attach(transformer, METHOD),
        pytest.raises(ConfigError, match=r"blocks\.0\.attn2.*pyramid_attention_broadcast"),
    ):
        denoise(transformer)


def test_compiled_code_around_cross_attention_is_refused(transformer):
    with dit_accel.attach(transformer, METHOD):
        block = transformer.blocks[1]
        for compiles in (transformer.compile, block.compile, block.attn2.compile, transformer.compile_repeated_blocks):
            with pytest.raises(ConfigError, match=r"modules.*compiled graph"):
                compiles()
        denoise(transformer, steps=1)
    block.compile(backend="eager")
    with pytest.raises(ConfigError, match=r"transformer\.blocks\.1.*compiled"):
        dit_accel.attach(transformer, METHOD)


def test_texts_that_are_not_there_or_of_another_model(transformer):
    for options, text in (
        (dict(), r"nag.*none is.*nag\.negative_prompt"),
        (dict(negative_prompt="blurry"), "'blurry'.*encode_prompt"),
    ):
        with pytest.raises(ConfigError, match=text):
            dit_accel.attach(transformer, NAG(**options))
    with (
        dit_accel.attach(transformer, NAG(negative_embeds=EMBEDS[..., :48])),
        pytest.raises(ConfigError, match=r"negative text.*48 channels.*64"),
    ):
        denoise(transformer)


def test_beside_a_picture_the_texts_must_be_as_long():
    transformer = tiny_transformer(added_kv_proj_dim=32, image_dim=24)
    inputs = dict(
        hidden_states=torch.randn(1, 12, 5, 8, 8), timestep=torch.tensor([900.0]),
        encoder_hidden_states=torch.randn(1, 512, 64), encoder_hidden_states_image=torch.randn(1, 7, 24),
    )  # fmt: skip
    with (
        dit_accel.attach(transformer, METHOD),
        torch.no_grad(),
        transformer.cache_context("cond"),
        pytest.raises(ConfigError, match=r"negative text.*9 tokens.*prompt 512"),
    ):
        transformer(**inputs)


def test_models_whose_text_can_t_be_told_are_refused_with_the_reason():
    lumina = LuminaNextDiT2DModel(
        sample_size=8, hidden_size=16, num_layers=1, num_attention_heads=2, num_kv_heads=1, cross_attention_dim=16
    )
    with pytest.raises(ConfigError, match=r"nag.*lumina-next.*gated"):
        dit_accel.attach(lumina, METHOD)
    wan = adapter_for("WanTransformer3DModel")
    with pytest.raises(ConfigError, match=r"nag.*on wan.*adapter"):
        estimate(dataclasses.replace(wan, cross_attention=None), wan.families[0], methods=[NAG()])


def test_adapters_that_describe_it_wrongly():
    for make, text in (
        (lambda: CrossAttention(modules="attn2"), r"modules.*got 'attn2'.*\(entry,\)"),
        (lambda: Adapter(**ANY, cross_attention=("attn2",)), r"cross_attention.*CrossAttention"),
        (lambda: JoinedText(place="in front"), r"place.*'before'.*'after', got 'in front'"),
        (lambda: Adapter(**ANY, joined_text=3), r"joined_text.*JoinedText"),
        (
            lambda: CrossAttention(modules=("blocks.*.text",)).found(tiny_transformer()),
            r"\.text.*WanTransformer3DModel",
        ),
    ):
        with pytest.raises(ConfigError, match=text):
            make()


def test_a_run_that_guides_nothing_is_told(transformer):
    with dit_accel.attach(transformer, METHOD) as attachment:
        denoise(transformer, branches=("uncond",))
        with pytest.warns(UnperturbedRun, match=r"nag.*4 forwards.*start = 0"):
            assert "nag guided nothing" in str(attachment.report())
    with (
        dit_accel.attach(transformer, changed(METHOD, start=0.0, stop=0.01)),
        pytest.warns(UserWarning, match=r"window.*0 to 0\.01.*4 steps"),
    ):
        denoise(transformer)
