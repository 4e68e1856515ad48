"""SoftPAG, PAG and SLG on a tiny model: what is perturbed, beside what it may run, what it costs, what is refused."""

import dataclasses
import warnings

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch.nn.attention import SDPBackend, sdpa_kernel
from wan_tiny import RADIAL, denoise, guided

import dit_accel
from dit_accel import PAG, SLG, ConfigError, EasyCache, SoftPAG, StaticCache
from dit_accel.methods.guidance.log import UnperturbedRun
from dit_accel.testing.recording import recorded

HALF = SoftPAG(heads="L1H0", u=0.5)


@pytest.mark.parametrize("config", [HALF, PAG(layers="L1"), SLG(layers="L1-2", start=0.0, stop=1.0, scale=1.0)])
def test_a_branch_from_the_first_perturbed_block_is_the_whole_branch(transformer, config):
    shared, report, forwards = guided(transformer, config)
    whole, full, _ = guided(transformer, dataclasses.replace(config, share_prefix=False))
    assert torch.equal(shared, whole)
    assert not torch.equal(shared, denoise(transformer))
    assert forwards == 4 + 8
    assert [one.section(config.name).data["first_block"] for one in (report, full)] == [1, 0]


@attention_backend("native")  # diffusers keeps the last choice for the whole process: this puts it back
def test_every_dense_backend_is_perturbed(transformer):
    """A backend other than SDPA makes diffusers' own a silent no-op."""
    expected, _, _ = guided(transformer, HALF)
    with sdpa_kernel(SDPBackend.MATH):
        made = [guided(transformer, HALF)[0]]
    for change in (lambda: transformer.set_attention_backend("_native_math"), transformer.fuse_qkv_projections):
        change()
        made.append(guided(transformer, HALF)[0])
    torch.testing.assert_close(torch.stack(made), expected.expand(3, *expected.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_with_a_sparse_method_the_mix_is_in_the_kernel(transformer, backend):
    heads = SoftPAG(heads="L1H1", u=0.4)
    with dit_accel.attach(transformer, heads, RADIAL, backend=backend) as attachment, recorded(attachment) as calls:
        denoise(transformer, steps=1)
    (call,) = [call for call in calls if call.plan.identity_mix is not None]
    assert (call.context.branch, call.context.layer) == ("cond/softpag", 1)
    assert call.plan.tiles is not None
    beside = next(one for one in calls if one.context.branch == "cond" and one.context.layer == 1)
    assert torch.equal(call.q, beside.q)  # the first perturbed block takes what the conditional one took
    torch.testing.assert_close(call.out[:, 1], torch.lerp(beside.out[:, 1], call.v[:, 1], 0.4))
    torch.testing.assert_close(call.out[:, 0], beside.out[:, 0])


def test_beside_a_step_cache_each_branch_has_a_past_of_its_own(transformer):
    cache = StaticCache(every=2, warmup_steps=1, last_steps=0)
    made, report, forwards = guided(transformer, HALF, cache, steps=6)
    assert report.section("softpag").data["forwards_added"] == 6
    assert min(report.section("softpag").data["distance"].values()) > 0
    assert forwards == 3 * 3
    assert not torch.equal(made, guided(transformer, cache, steps=6)[0])
    expected = guided(transformer, HALF)[0]
    for never in (EasyCache(threshold=0.0), dit_accel.FirstBlockCache(threshold=0.0)):
        made, report, _ = guided(transformer, HALF, never)
        assert torch.equal(made, expected)
    assert report.section("softpag").data["first_block"] == 0  # beside a cache of blocks the whole branch runs
    with pytest.raises(ConfigError, match=r"slg.*firstblockcache.*mix"):
        dit_accel.attach(transformer, SLG(layers="L1"), never)


def test_another_size_within_a_run_is_not_taken_for_the_last(transformer):
    """The branch's own state is dropped with the layout, but not what the conditional pass just left for it."""

    def two_sizes(config):
        made = []
        with dit_accel.attach(transformer, config), torch.no_grad():
            for step, frames in enumerate((5, 3, 5)):
                torch.manual_seed(step)
                latents, text = torch.randn(1, 12, frames, 8, 8), torch.randn(1, 6, 64)
                with transformer.cache_context("cond", step_index=step, num_inference_steps=4):
                    made.append(transformer(latents, torch.tensor([500.0]), text, return_dict=False)[0])
        return made

    for one, other in zip(two_sizes(HALF), two_sizes(dataclasses.replace(HALF, share_prefix=False)), strict=True):
        assert torch.equal(one, other)


def test_temperature_at_its_end_weighs_all_tokens_alike(transformer):
    config = SoftPAG(heads="L1H0", u=1.0, target="temperature")
    with dit_accel.attach(transformer, config) as attachment, recorded(attachment) as calls:
        denoise(transformer, steps=1)
    (call,) = [call for call in calls if call.plan.head_scale is not None]
    torch.testing.assert_close(call.out[:, 0], call.v[:, 0].mean(1, keepdim=True).expand_as(call.v[:, 0]))


@pytest.mark.slow
def test_a_compiled_transformer_is_perturbed_alike(transformer):
    expected, _, _ = guided(transformer, HALF)
    transformer.compile(backend="aot_eager")
    made, report, _ = guided(transformer, HALF)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    assert report.section("softpag").data["first_block"] == 0


def test_a_run_that_perturbs_nothing_warns_once_and_says_why(transformer):
    with dit_accel.attach(transformer, SoftPAG(heads="L1", mode="free")) as attachment:
        denoise(transformer, branches=("cond",))
        with pytest.warns(UnperturbedRun, match=r"softpag.*mode = 'free'"):
            attachment.report()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert "perturbed nothing" in str(attachment.report())


def test_what_the_model_does_not_have_is_refused(transformer):
    for config, text in (
        (SoftPAG(), r"softpag\.heads.*published.*a wan"),
        (SLG(), r"slg\.layers.*published"),
        (SoftPAG(heads="L1H2"), r"3 attention layers.*heads 0 to 1"),
        (SoftPAG(heads="blocks.1.attn2"), r"blocks\.1\.attn2.*cross-attention"),
        (SLG(layers="L1H0"), r"slg\.layers.*heads \[0\] of layer 1"),
    ):
        with pytest.raises(ConfigError, match=text):
            dit_accel.attach(transformer, config)
        assert dit_accel.attachment_of(transformer) is None


def test_two_perturbations_and_a_choice_of_layers_are_refused(transformer):
    with pytest.raises(ConfigError, match=r"^pag.*softpag.*prediction"):
        dit_accel.attach(transformer, HALF, PAG(layers="L1"))
    with pytest.raises(ConfigError, match=r"layers.*attention layer 0"):
        dit_accel.attach(transformer, HALF, layers="1-2")


def test_a_window_needs_the_number_of_steps(transformer):
    with (
        dit_accel.attach(transformer, dataclasses.replace(HALF, stop=0.5)),
        pytest.raises(ConfigError, match=r"softpag.*0\.0 to 0\.5.*steps"),
        torch.no_grad(),
    ):
        transformer(torch.randn(1, 12, 5, 8, 8), torch.tensor([500.0]), torch.randn(1, 6, 64))


@pytest.mark.parametrize(("start", "stop", "acts"), [(0.0, 0.5, [0, 1]), (0.5, 1.0, [2, 3]), (0.01, 0.2, [1])])
def test_the_window_decides_by_steps_and_one_shorter_than_a_step_is_told(transformer, start, stop, acts):
    config = dataclasses.replace(HALF, start=start, stop=stop)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _, report, forwards = guided(transformer, config)
    assert report.section("softpag").data["steps"] == acts
    assert forwards == 8 + len(acts)
    short = any("window" in str(one.message) for one in warned), "shorter" in str(report)
    assert short == (start == 0.01,) * 2
