"""RoPE: the rules of its frequencies by published numbers, what models' positions become, and where it is refused."""

import dataclasses
import itertools

import numpy as np
import pytest
import tiny_models
import torch
from diffusers.hooks import HookRegistry, ModelHook
from dit_accel_pipelines import ADAPTERS
from hypothesis import given
from hypothesis import strategies as st
from one_layer import FAMILY, MODEL
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import LVSA, ConfigError, RoPE, UltraViCo
from dit_accel.methods.positions.rope import RoPEHandler
from dit_accel.methods.positions.rope_switcher import KEPT_SIZES, inside_hooks
from dit_accel.rules.rotary_frequencies import KINDS, corrections, dominant, edited, frequencies
from dit_accel.testing.tiny_models import Case

BY_NAME = {adapter.name: adapter for adapter in ADAPTERS}
EVERY = dict(trained_frames=2, trained_height=2, trained_width=2)


def tiny(name, number=0, **config):
    model = tiny_models.MODELS[name][number]
    return Case(BY_NAME[name], dataclasses.replace(model, config={**model.config, **config}))


class _Plain(ModelHook):
    """A hook as context parallelism's: it changes what comes out."""

    def post_forward(self, module, output):
        return 2 * output


class _Instead(ModelHook):
    """A hook as the caches': it runs in place of the module."""

    def new_forward(self, module, *args, **kwargs):
        return 2 * self.fn_ref.original_forward(*args, **kwargs)


@pytest.mark.parametrize("hook", [_Plain, _Instead])
def test_what_hooks_wrap_is_changed_inside_them(hook):
    module, x = torch.nn.Identity(), torch.ones(1)
    own = module.forward
    assert inside_hooks(module, "forward") == (module, "forward")
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook(), "some")
    owner, name = inside_hooks(module, "forward")
    assert getattr(owner, name) == own
    assert inside_hooks(module, "training") == (module, "training")
    setattr(owner, name, lambda x: x + 1)
    assert module(x) == 4


def test_a_model_of_unknown_size_is_asked_for_it():
    transformer = tiny_transformer()
    with pytest.raises(ConfigError, match=r"rope.*size.*model"):
        dit_accel.attach(transformer, RoPE())
    with pytest.raises(ConfigError, match=r"height.*wan.*trained_h"):
        dit_accel.attach(transformer, RoPE(axes=("height",), trained_frames=3))
    assert dit_accel.attachment_of(transformer) is None
    assert not [module for module in transformer.modules() if "forward" in vars(module)]


@pytest.mark.parametrize(("options", "frames"), [(dict(), 3), (dict(trained_frames=5), 5)])
def test_a_released_model_tells_its_sizes(options, frames):
    handler = RoPEHandler(RoPE(**options), dataclasses.replace(MODEL, adapter=BY_NAME["wan"], family=FAMILY))
    assert handler._trained == {"frames": frames, "height": 4, "width": 6}


def wan_angles(transformer, frames):
    """Frames' angles of position 1 in the tables that a forward of so many frames reads."""
    cos, sin = transformer.rope(torch.zeros(1, 12, frames, 4, 4))
    at = slice(4, 5)  # 2 x 2 tokens a frame
    return torch.atan2(sin[0, at, 0, :8:2].double(), cos[0, at, 0, :8:2].double()).flatten()


def test_positions_are_those_of_the_rule_at_every_length():
    transformer, inside = tiny_transformer(rope_max_seq_len=64, attention_head_dim=24, num_layers=1), []
    own = frequencies(8, 10000.0)
    transformer.blocks[0].register_forward_pre_hook(lambda *_: inside.append(wan_angles(transformer, 7).numpy()))
    for kind in ("pi", "ntk", "yarn", "riflex", "ultraimage"):
        with dit_accel.attach(transformer, RoPE(kind=kind, trained_frames=4)):
            for frames in (9, 4, 33, 9, 3):
                denoise(transformer, 1, frames=frames, branches=("cond",))
                expected = edited(kind, own, trained=4, length=frames)
                assert inside[-1] == pytest.approx(expected, rel=1e-4)
                assert (frames <= 4) == bool(np.array_equal(expected, own))
                assert wan_angles(transformer, 7).numpy() == pytest.approx(own, rel=1e-5)  # of what is no step
        assert wan_angles(transformer, 7).numpy() == pytest.approx(own, rel=1e-5)


def test_more_sizes_than_are_kept_give_the_same_again_and_leave_no_trace():
    transformer, sizes = tiny_transformer(num_layers=1), [5, 7, 4, 8, 6, 9]
    assert len(sizes) > KEPT_SIZES

    def runs():
        return [denoise(transformer, 1, frames=frames) for frames in sizes]

    plain = runs()
    with dit_accel.attach(transformer, RoPE(kind="pi", trained_frames=2)):
        first, again = runs(), runs()
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, plain))
    assert all(map(torch.equal, runs(), plain))


def test_a_factor_holds_at_every_length():
    transformer, outs = tiny_transformer(), []
    for options in (dict(trained_frames=10), dict(trained_frames=10, factor=2.0), dict(trained_frames=7, factor=2.0)):
        with dit_accel.attach(transformer, RoPE(kind="pi", **options)):
            outs.append(denoise(transformer, 1))
    assert not torch.equal(outs[0], outs[1])
    assert torch.equal(outs[1], outs[2])


def test_axes_change_alone():
    case, outs = tiny("wan"), []
    for axes in (("frames",), ("height",), ("width",), ("frames", "height", "width"), None):
        with dit_accel.attach(case.transformer, RoPE(kind="pi", axes=axes, **EVERY)):
            outs.append(case.run(case.inputs(1)))
    assert torch.equal(outs[3], outs[4])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outs[:4], 2))


def test_honest_limits():
    for name, number, options, message in (
        ("sd3", 0, {}, r"rope.*sd3.*SD3"),
        ("cogvideox", 0, {}, r"cogvideox .*sinusoidal.*CogVideoX-2B"),
        ("cogvideox", 1, dict(axes=("height",)), r"cogvideox .*along height"),
        ("cogview", 0, {}, "cogview"),
        ("cogview", 1, {}, r"cogview4? .*height, width"),
        ("mochi", 0, {}, r"'riflex'.*mochi.*'pi'.*'yarn'"),
        ("mochi", 0, dict(kind="ntk"), r"'ntk'.*mochi"),
        ("ltx", 0, dict(kind="yarn"), r"'yarn'.*ltx.*'pi'$"),
        ("flux", 0, dict(axes=("frames",)), r"flux.*height, width, not 'frames'"),
    ):
        transformer = tiny(name, number).transformer
        with pytest.raises(ConfigError, match=message):
            dit_accel.attach(transformer, RoPE(**{**EVERY, **options}))
        if not options and name != "mochi":
            (described,) = dit_accel.describe(transformer).transformers
            assert not {"rope", "ultraimage"} & {*described.methods}
            assert "positions" in described.refused["rope"]


def test_tables_have_an_end():
    for method in (RoPE(kind="pi", trained_frames=2), UltraViCo(trained_frames=2), LVSA(trained_frames=2, window=0)):
        transformer = tiny_transformer(rope_max_seq_len=8)
        with dit_accel.attach(transformer, method):
            for _ in range(2):
                denoise(transformer, 1, frames=8)
                with pytest.raises(ConfigError, match=r"wan.*8 tokens.*frames, got 9"):
                    denoise(transformer, 1, frames=9)


HUNYUAN, COGVIDEOX, WAN, FLUX = (16, 256.0), (16, 1e4), (44, 1e4), (56, 1e4)  # channels and base of an axis

lengths = st.floats(1, 4096)
axes = st.tuples(st.integers(2, 64).map(lambda n: 2 * n), st.floats(2, 1e6))


def longer(kind, *axis, **options):
    return edited(kind, frequencies(*axis), **options)


def test_the_dominant_frequency_is_the_published_one():
    for axis, trained, place, period in (
        (HUNYUAN, 33, 3, 50.3),
        (COGVIDEOX, 13, 1, 19.9),
        (WAN, 21, 3, 22.1),  # LVSA's
        (FLUX, 128, 9, 121.3),  # FLUX.1, 2048 pixels
        (FLUX, 83, 8, 87.3),  # Qwen-Image, 1328 pixels
    ):
        own = frequencies(*axis)
        assert dominant(own, trained) == place
        assert 2 * np.pi / own[place] == pytest.approx(period, abs=0.05)


def test_riflex_is_its_code():
    own, lengths = frequencies(*HUNYUAN), dict(trained=33, length=66)
    riflex = longer("riflex", *HUNYUAN, **lengths)
    assert (riflex != own).nonzero()[0].tolist() == [3]
    assert 2 * np.pi / riflex[3] == pytest.approx(66 / 0.9)
    named = longer("riflex", *HUNYUAN, trained=33, length=99, period=25.0)
    assert (named != own).nonzero()[0].tolist() == [2]
    assert 66 * longer("riflex", *HUNYUAN, **lengths, turn=1.0)[3] == pytest.approx(2 * np.pi)


def test_ultraimage_corrects_the_published_lists():
    own = frequencies(*FLUX)
    assert corrections(own, 128, 225) == (9,)  # FLUX.1 at 3600 pixels
    assert corrections(own, 83, 256) == (8, 9)  # Qwen-Image at 4096
    flux = longer("ultraimage", *FLUX, trained=128, length=225, turn=0.85)
    assert (flux != own).nonzero()[0].tolist() == [9]
    assert 2 * np.pi / flux[9] == pytest.approx(264.7, abs=0.05)
    qwen = longer("ultraimage", *FLUX, trained=83, length=256)
    assert (2 * np.pi / qwen[[8, 9]]).tolist() == pytest.approx([256, 256])
    assert edited("ultraimage", own[::-1].copy(), trained=83, length=256).tolist() == qwen[::-1].tolist()
    listed = longer("ultraimage", *FLUX, trained=83, length=384, indices=(8, 9))
    assert (listed != own).nonzero()[0].tolist() == [8, 9]


@given(axis=axes, trained=lengths, ratio=st.floats(1.01, 16))
def test_the_formulas(axis, trained, ratio):
    own, length = frequencies(*axis), trained * ratio
    dim, theta = axis
    s = length / trained
    assert longer("pi", *axis, trained=trained, length=length) == pytest.approx(own / s)
    base = theta * s ** (dim / (dim - 2))
    assert longer("ntk", *axis, trained=trained, length=length) == pytest.approx(frequencies(dim, base))
    ramp = np.clip((trained * own / (2 * np.pi) - 1) / 31, 0, 1)
    yarn = longer("yarn", *axis, trained=trained, length=length)
    assert yarn == pytest.approx(ramp * own + (1 - ramp) * own / s)


@given(axis=axes, kind=st.sampled_from(KINDS), trained=lengths, ratio=st.floats(0.01, 1))
def test_nothing_changes_up_to_the_trained_length(axis, kind, trained, ratio):
    own = frequencies(*axis)
    assert longer(kind, *axis, trained=trained, length=trained * ratio).tolist() == own.tolist()


def test_learned_frequencies_have_no_place_of_their_own():
    own = np.array([[0.5, -0.1], [0.2, 0.3]])
    assert edited("pi", own, trained=4, length=8).tolist() == (own / 2).tolist()
    assert edited("yarn", own, trained=4, length=8).shape == own.shape
    for kind in ("ntk", "riflex", "ultraimage"):
        with pytest.raises(ConfigError, match=rf"'{kind}'.*\(2, 2\).*'pi'"):
            edited(kind, own, trained=4, length=8)


def test_the_least_period_that_is_near_is_dominant():
    """NEAR times the extent itself is near; of longer ones the shortest is taken, in whatever order they stand."""
    own = 2 * np.pi / np.array([40.0, 9.0, 18.0, 8.999])
    assert dominant(own, 10) == 1
    assert dominant(own, 10.001) == 2
    assert dominant(own, 44.4) == 0
    with pytest.raises(ConfigError, match=r"8\.999 to 40 positions.*44\.5"):
        dominant(own, 44.5)


def test_a_period_that_fits_twice_to_the_token_is_corrected():
    own = 2 * np.pi / np.array([10.0, 20.0, 40.0])
    assert corrections(own, 10, 39.999) == (0,)
    assert corrections(own, 10, 40) == (0, 1)
    assert corrections(own, 10, 80.001) == (0, 1, 2)


def test_a_frequency_changes_from_its_period_on():
    own = 2 * np.pi / np.array([10.0, 20.0])
    assert edited("riflex", own, trained=10, length=10.0).tolist() == own.tolist()
    assert edited("riflex", own * 1.05, trained=10, length=10.0).tolist() == (own * 1.05).tolist()
    assert edited("riflex", own, trained=9, length=10.0, period=10.0).tolist() == own.tolist()
    assert edited("riflex", own, trained=9, length=10.001, period=10.0)[0] == pytest.approx(0.9 * 2 * np.pi / 10.001)
    assert edited("riflex", own, trained=9, length=12, period=14.9)[0] != own[0]  # the nearer of both
    assert edited("riflex", own, trained=9, length=22, period=15.1)[1] != own[1]


def test_options_at_their_bounds():
    assert frequencies(2, 1.001).tolist() == [1.0]
    assert frequencies(4, 9.0, exponents=[0.0, 0.5]).tolist() == pytest.approx([1.0, 1 / 3])
    for kind, options in (
        ("riflex", dict(turn=1.0)), ("riflex", dict(period=1e-9)), ("ultraimage", dict(turn=1e-9)),
        ("ultraimage", dict(indices=(0,))), ("ultraimage", dict(indices=(7,))),
    ):  # fmt: skip
        assert longer(kind, 16, 256.0, trained=33, length=66, **options).shape == (8,)
    for kind in KINDS:  # an axis of one frequency
        assert np.isfinite(longer(kind, 2, 100.0, trained=4, length=8)).all()


def test_bad_options_are_refused():
    for kind, options, message in (
        ("rifelx", {}, r"'rifelx'.*'riflex'\?"),
        ("pi", dict(period=3), r"'pi'.*got period=3;"),
        ("ntk", dict(turn=0.9), r"'ntk'.*no turn"),
        ("riflex", dict(indices=(1,)), r"'riflex'.*got indices=\(1,\)"),
        ("riflex", dict(period=0), r"period.*above 0, got 0"),
        ("riflex", dict(turn=1.5), r"turn.*0.*1, got 1.5"),
        ("riflex", dict(turn=0), r"turn.*0.*1, got 0"),
        ("ultraimage", dict(indices=(-1,)), r"indices.*0.*got \(-1,\)"),
        ("ultraimage", dict(indices=()), r"indices.*0.*got \(\)"),
        ("ultraimage", dict(indices=(8,)), r"8 frequencies, 0 to 7, got indices=\(8,\)"),
        ("riflex", dict(trained=4000, length=8000), r"6.283 to 804.2 positions"),
        ("none", dict(dim=0), "got dim=0"),
        ("none", dict(dim=1), "got dim=1"),
        ("none", dict(dim=3), "got dim=3"),
        ("none", dict(theta=1.0), r"above 1, got theta=1\.0"),
        ("none", dict(exponents=[0.0]), r"dim=16.*8 frequencies, got 1 exponents"),
    ):
        options = {"trained": 4, "length": 8, **options}
        axis = {name: options.pop(name) for name in ("dim", "theta", "exponents") if name in options}
        with pytest.raises(ConfigError, match=message):
            edited(kind, frequencies(**{"dim": 16, "theta": 256.0, **axis}), **options)
