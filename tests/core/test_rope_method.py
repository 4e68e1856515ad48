"""RoPE: its config, what it does to models' positions, where it is refused, and that it leaves no trace."""

import dataclasses

import numpy as np
import pytest
import tiny_models
import torch
from diffusers.hooks import HookRegistry, ModelHook
from dit_accel_pipelines import ADAPTERS
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import LVSA, ConfigError, EasyCache, RoPE, UltraViCo
from dit_accel.adapters.adapter import Family
from dit_accel.methods.base import Model
from dit_accel.methods.positions.rope import RoPEHandler
from dit_accel.methods.positions.rope_switcher import KEPT_SIZES, inside_hooks
from dit_accel.rules.rotary_frequencies import edited, frequencies
from dit_accel.testing.tiny_models import Case

BY_NAME = {adapter.name: adapter for adapter in ADAPTERS}
EVERY = dict(trained_frames=2, trained_height=2, trained_width=2)
WAN = RoPE(trained_frames=3)


def tiny(name, number=0, **config):
    model = tiny_models.MODELS[name][number]
    return Case(BY_NAME[name], dataclasses.replace(model, config={**model.config, **config}))


def test_options_at_their_bounds():
    RoPE(factor=1.0), RoPE(turn=1.0), RoPE(trained_frames=1), RoPE(trained_height=1)
    with pytest.raises(ConfigError, match=r"^rope\.factor.*got 0\.99"):
        RoPE(factor=0.99)


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


def test_a_released_model_tells_its_sizes():
    family = Family(
        name="some", repo="", layers=1, heads=2, head_dim=8, ffn_dim=8, patch=(1, 2, 2), vae=(4, 8), height=16,
        width=16, num_frames=9, trained_frames=3, trained_size=(4, 6),
    )  # fmt: skip
    handler = RoPEHandler(RoPE(), Model(adapter=BY_NAME["wan"], family=family, heads=2, layers=1))
    assert handler._trained == {"frames": 3, "height": 4, "width": 6}
    given = RoPEHandler(RoPE(trained_frames=5), Model(adapter=BY_NAME["wan"], family=family, heads=2, layers=1))
    assert given._trained["frames"] == 5


def wan_angles(transformer, frames):
    """Frames' angles of position 1 in the tables that a forward of so many frames reads."""
    cos, sin = transformer.rope(torch.zeros(1, 12, frames, 4, 4))
    at = slice(4, 5)  # 2 x 2 tokens a frame
    return torch.atan2(sin[0, at, 0, :8:2].double(), cos[0, at, 0, :8:2].double()).flatten()


def test_positions_are_those_of_the_rule_at_every_length():
    transformer, dim = tiny_transformer(rope_max_seq_len=64, attention_head_dim=24), 8
    own = frequencies(dim, 10000.0)
    assert wan_angles(transformer, 7).numpy() == pytest.approx(own, rel=1e-5)
    inside = []
    transformer.blocks[0].register_forward_pre_hook(lambda *_: inside.append(wan_angles(transformer, 7).numpy()))
    for kind in ("pi", "ntk", "yarn", "riflex", "ultraimage"):
        with dit_accel.attach(transformer, RoPE(kind=kind, trained_frames=4)):
            for frames in (9, 4, 33, 9, 3):
                denoise(transformer, 1, frames=frames)
                expected = edited(kind, own, trained=4, length=frames)
                assert inside[-1] == pytest.approx(expected, rel=1e-4)
                assert (frames <= 4) == bool(np.array_equal(expected, own))
                assert wan_angles(transformer, 7).numpy() == pytest.approx(own, rel=1e-5)  # of what is no step
        assert wan_angles(transformer, 7).numpy() == pytest.approx(own, rel=1e-5)


def test_more_sizes_than_are_kept_give_the_same_again_and_leave_no_trace():
    transformer = tiny_transformer()
    sizes = [5, 7, 4, 8, 6, 9]
    assert len(sizes) > KEPT_SIZES
    plain = [denoise(transformer, 2, frames=frames) for frames in sizes]
    with dit_accel.attach(transformer, RoPE(kind="pi", trained_frames=2)):
        first, again = ([denoise(transformer, 2, frames=frames) for frames in sizes] for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, plain))
    assert all(map(torch.equal, [denoise(transformer, 2, frames=frames) for frames in sizes], plain))


def test_a_factor_holds_at_every_length():
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, RoPE(kind="pi", trained_frames=10)):
        expected = denoise(transformer, 2, frames=5)
    with dit_accel.attach(transformer, RoPE(kind="pi", trained_frames=10, factor=2.0)):
        halved = denoise(transformer, 2, frames=5)
    assert not torch.equal(halved, expected)
    with dit_accel.attach(transformer, RoPE(kind="pi", trained_frames=7, factor=2.0)):
        assert torch.equal(denoise(transformer, 2, frames=5), halved)


def test_axes_change_alone():
    case = tiny("wan")
    inputs = case.inputs(1)
    found = {}
    for axes in (("frames",), ("height",), ("width",), ("frames", "height", "width"), None):
        with dit_accel.attach(case.transformer, RoPE(kind="pi", axes=axes, **EVERY)):
            found[axes] = case.run(inputs)
    assert torch.equal(found[None], found["frames", "height", "width"])
    several = list(found.values())[:4]
    assert not any(torch.equal(a, b) for i, a in enumerate(several) for b in several[:i])


def test_honest_limits():
    for name, number, options, message in (
        ("sd3", 0, {}, r"rope.*sd3.*SD3"),
        ("cogvideox", 0, {}, r"cogvideox .*sinusoidal.*CogVideoX-2B"),
        ("cogvideox", 1, dict(axes=("height",)), r"cogvideox .*along height"),
        ("cogview", 0, {}, "cogview"),
        ("cogview", 1, {}, r"cogview4? .*height, width"),
        ("mochi", 0, {}, r"'riflex'.*mochi.*'pi'.*'yarn'"),
        ("mochi", 0, dict(kind="ntk"), r"'ntk'.*mochi"),
        ("ltx", 0, {}, r"'riflex'.*ltx.*coordinates"),
        ("ltx", 0, dict(kind="yarn"), r"'yarn'.*ltx.*'pi'$"),
        ("flux", 0, dict(axes=("frames",)), r"flux.*height, width, not 'frames'"),
    ):
        case = tiny(name, number)
        with pytest.raises(ConfigError, match=message):
            dit_accel.attach(case.transformer, RoPE(**{**EVERY, **options}))
        assert dit_accel.attachment_of(case.transformer) is None
        if (name, number) in (("cogvideox", 0), ("cogview", 0), ("cogview", 1), ("sd3", 0)):
            (described,) = dit_accel.describe(case.transformer).transformers
            assert not {"rope", "ultraimage"} & {*described.methods}
            assert "positions" in described.refused["rope"]


def test_tables_have_an_end():
    transformer = tiny_transformer(rope_max_seq_len=8)
    for method in (
        RoPE(kind="pi", trained_frames=2), UltraViCo(trained_frames=2), LVSA(trained_frames=2, window=0)
    ):  # fmt: skip
        with dit_accel.attach(transformer, method):
            for _ in range(2):
                denoise(transformer, 1, frames=8)
                for _ in range(2):
                    with pytest.raises(ConfigError, match=r"wan.*8 tokens.*frames, got 9"):
                        denoise(transformer, 1, frames=9)


def test_methods_beside_it():
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, WAN, UltraViCo(trained_frames=3), EasyCache(threshold=0.5)) as attachment:
        denoise(transformer, 4, frames=7)
        report = str(attachment.report())
    assert "rope, kind riflex: 7 tokens along frames, trained on 3" in report
    with pytest.raises(ConfigError, match="two RoPE"):
        dit_accel.attach(transformer, WAN, RoPE(kind="pi", trained_frames=3))
