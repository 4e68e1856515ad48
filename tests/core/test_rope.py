"""Rotary positions as data: frequencies, axes, what to set on a model, what is refused; no real model."""

import copy
import types

import numpy as np
import pytest
import torch
from torch import nn

from dit_accel import ConfigError
from dit_accel.adapters.adapter import Adapter
from dit_accel.adapters.rope_axes import by_config, even, interleaved, lengths_of_image, same_length, thirds
from dit_accel.adapters.rope_forms import change_rope
from dit_accel.adapters.rotary import Axis, Rope, rope_of
from dit_accel.rules.rotary_frequencies import frequencies
from dit_accel.testing.rope_checks import replaced


def test_frequencies_fall_from_one_by_equal_ratios():
    found = frequencies(16, 256.0)
    assert found.dtype == np.float64
    assert 2 * np.pi / found[:5] == pytest.approx([6.28, 12.57, 25.13, 50.27, 100.53], abs=0.01)  # HunyuanVideo's
    assert (2 * np.pi / frequencies(56, 10000.0))[9] == pytest.approx(121.3, abs=0.05)  # FLUX.1's
    assert frequencies(4, 100.0, exponents=(0.0, -1.0)).tolist() == [1.0, 100.0]


def test_axes_share_the_channels_as_the_config_says():
    axes = by_config("dims", ("text", "height", "width"), 256.0, theta_key="base", default=(8, 8))
    assert [(a.name, a.channels, a.theta) for a in axes({"dims": (4, 6, 6)})] == [
        ("text", 4, 256.0), ("height", 6, 256.0), ("width", 6, 256.0),
    ]  # fmt: skip
    assert [(a.name, a.channels, a.theta) for a in axes({"base": 16})] == [("height", 8, 16.0), ("width", 8, 16.0)]
    assert [axis.channels for axis in thirds({"attention_head_dim": 128})] == [44, 42, 42]
    assert lengths_of_image("lens", (512, 512))({"lens": (300, 512, 256)}) == {"height": 512, "width": 256}
    assert lengths_of_image("lens", (512, 384))({}) == {"height": 512, "width": 384}
    assert same_length("most", 1024)({"most": 64})["frames"] == 64
    assert same_length("most", 1024)({}) == {"frames": 1024, "height": 1024, "width": 1024}


def test_interleaved_axes_share_out_one_axis_frequencies():
    axes = interleaved((24, 20, 20), 128, 5e6)
    assert [axis.channels for axis in axes] == [48, 40, 40]
    assert axes[1].frequencies()[:2] == pytest.approx([5e6 ** (-2 / 128), 5e6 ** (-8 / 128)])
    whole = np.sort(np.concatenate([axis.frequencies() for axis in axes]))[::-1]
    assert whole == pytest.approx(frequencies(128, 5e6))


class Turns(nn.Module):
    """A rope as many models have it: (cos, sin) [S, D] of position ids [S, 2], from its base."""

    def __init__(self, theta=100.0):
        super().__init__()
        self.theta = theta

    def forward(self, ids):
        angles = []
        for axis, dim in enumerate((4, 8)):
            own = 1.0 / (self.theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
            angles.append(torch.outer(ids[:, axis].double(), own).repeat_interleave(2, 1))
        return torch.cat(angles, 1).cos().float(), torch.cat(angles, 1).sin().float()


class Model(nn.Module):
    config = types.MappingProxyType({"dims": (4, 8)})

    def __init__(self):
        super().__init__()
        self.rope = Turns()

    def forward(self, ids, text=0):
        return self.rope(ids)


ROPE = Rope(owner="rope", form="theta", axes=by_config("dims", ("height", "width"), 100.0))
IDS = torch.stack(torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij"), -1).flatten(0, 1)


def test_positions_follow_the_given_frequencies():
    model = Model()
    plain = model(IDS)
    new = torch.tensor([0.3, 0.7, 1.1, 0.01], dtype=torch.float64)
    with replaced(model, change_rope(ROPE, model, {"width": new})):
        found = model(IDS)
    angles = torch.outer(IDS[:, 1].double(), new).repeat_interleave(2, 1)
    for now, before, expected in zip(found, plain, (angles.cos(), angles.sin()), strict=True):
        assert torch.equal(now[:, :4], before[:, :4])
        assert torch.equal(now[:, 4:], expected.float())
    assert all(map(torch.equal, model(IDS), plain))
    assert "forward" not in vars(model.rope)


def test_a_function_is_given_the_own_frequencies_once():
    seen = []
    model = Model()
    change = change_rope(ROPE, model, {"height": lambda own: seen.append(own) or own / 4})
    with replaced(model, change):
        first = model(IDS)
        model(IDS)
    assert [own.tolist() for own in seen] == [frequencies(4, 100.0).tolist()]
    assert seen[0].dtype == torch.float64
    assert torch.equal(first[0][24, :4], Model()(IDS)[0][6, :4])  # row 4, column 0; row 1, column 0


def test_a_copy_of_a_changed_model_is_changed_by_itself():
    model = Model()
    plain = model(IDS)
    with replaced(model, change_rope(ROPE, model, {"height": lambda own: own / 2})):
        expected, twin = model(IDS), copy.deepcopy(model)
    model.rope.theta = 5.0
    assert all(map(torch.equal, twin(IDS), expected))
    assert not torch.equal(expected[0], plain[0])


def test_what_does_not_fit_is_refused():
    text = by_config("dims", ("text", "width"), 100.0)
    more = lambda config: even(("frames", "height", "width"), 4, 100.0)  # noqa: E731
    for change, message, axes in (
        ({"frames": torch.ones(2)}, r"Model.*height, width, not 'frames'", ROPE.axes),
        ({"width": torch.ones(3)}, r"width.*4 frequencies.*Model.*\(3,\)", ROPE.axes),
        ({"width": lambda own: own[:2]}, r"width.*\(4,\).*\(2,\)", ROPE.axes),
        ({"width": lambda own: own / 0}, r"\(4,\).*\[inf, inf, inf, inf\]", ROPE.axes),
        ({"text": torch.ones(2)}, r"'text'.*images", text),
        ({"frames": lambda own: own}, r"Turns.forward.*'theta'", more),
    ):
        model, rope = Model(), Rope(owner="rope", form="theta", axes=axes)
        with pytest.raises(ConfigError, match=message), replaced(model, change_rope(rope, model, change)):
            model(IDS)
        assert "forward" not in vars(model.rope)
    assert change_rope(ROPE, Model(), {}) == ([], None)


def test_text_rows_keep_their_positions():
    rope = Rope(owner="rope", form="theta", axes=ROPE.axes, text=lambda inputs: inputs["text"])
    model = Model()
    plain = model(IDS, text=7)
    change = change_rope(rope, model, {"height": lambda own: own / 2})
    with replaced(model, change):
        found = model(IDS, text=7)
        moved = model(IDS, text=0)
    for now, before, all_moved in zip(found, plain, moved, strict=True):
        assert torch.equal(now[:7], before[:7])
        assert torch.equal(now[7:], all_moved[7:])
        assert not torch.equal(now[7:], before[7:])
    lost = change_rope(rope, model, {"height": lambda own: own / 2})
    with (
        pytest.raises(ConfigError, match=r"Turns.*inputs.*text"),
        replaced(model, lost._replace(inputs=None)),
    ):
        model(IDS, text=7)


def test_what_is_no_rope_is_refused():
    for arguments, message in (
        (dict(form="thetta"), r"'thetta'.*'theta'\?"),
        (dict(form="pairs"), r"form='pairs'.*input=''"),
        (dict(form="theta", input="emb"), r"form='theta'.*input='emb'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Rope(axes=ROPE.axes, **arguments)
    for rope in (ROPE, "positions are learned", None):
        assert Adapter(name="mine", transformers=(), self_attention=(), rope=rope).rope is rope
    with pytest.raises(ConfigError, match=r"'mine': rope.*Rope.*got 7"):
        Adapter(name="mine", transformers=(), self_attention=(), rope=7)


def adapter(rope):
    return Adapter(name="mine", transformers=("Mine",), self_attention=("blocks.*.attn",), rope=rope)


def test_a_model_without_rotary_positions_is_refused_with_the_reason():
    absent = Rope(form="theta", axes=ROPE.axes, absent=lambda config: config.get("why"))
    text = "mine.*rotary positions.*: {};"
    for rope, config, why in (
        ("positions are learned", {}, "positions are learned"),
        (None, {}, "its adapter describes none"),
        (absent, {"why": "this one adds them"}, "this one adds them"),
    ):
        with pytest.raises(ConfigError, match=text.format(why)):
            rope_of("mine", rope, config)
    assert rope_of("mine", absent, {}) is absent


class Given(nn.Module):
    config = types.MappingProxyType({})

    def forward(self, emb=None):
        return emb


PAIRS = Rope(input="emb", form="pairs", axes=lambda config: even(("height", "width"), 16))


def pairs(places, turns):
    angles = torch.cat([torch.outer(p, t) for p, t in zip(places, turns, strict=True)], 1).repeat_interleave(2, 1)
    return angles.cos().float(), angles.sin().float()


def test_given_positions_are_read_off_and_turned():
    own = torch.from_numpy(frequencies(16, 10000.0))
    places = torch.rand(2, 300, dtype=torch.float64) * 900 - 300  # neither whole nor from 0 on
    model = Given()
    value, new = pairs(places, (own, own)), own * torch.tensor([1, 0.5, 1, 1, 2, 1, 1, 0.3], dtype=torch.float64)
    with replaced(model, change_rope(PAIRS, model, {"width": lambda own: own})):
        assert all(map(torch.equal, model(emb=value), value))
    with replaced(model, change_rope(PAIRS, model, {"width": new})):
        found = model(emb=value)
        assert model(value)[0] is found[0]  # the pipeline gives the same tensors at every step
        again = model(emb=pairs(places + 1, (own, own)))
    for now, where in ((found, places), (again, places + 1)):
        for part, expected in zip(now, pairs(where, (own, new)), strict=True):
            assert torch.equal(part[:, :16], expected[:, :16])
            assert float((part - expected).abs().max()) < 3e-7  # steps of float32: those of the given ones, and ours
    assert model(emb=value) is value


def test_given_values_of_no_positions_are_refused():
    model, noise = Given(), torch.rand(9, 32)
    change = change_rope(PAIRS, model, {"height": lambda own: own})
    with replaced(model, change):
        with pytest.raises(ConfigError, match=r"cos.*sin.*height.*theta 10000.0.*16 chann"):
            model(emb=(noise, noise))
        with pytest.raises(ConfigError, match=r"Given.*no emb"):
            model()


def test_learned_frequencies_have_no_formula():
    with pytest.raises(ConfigError, match=r"along frames.*learned"):
        Axis(name="frames", channels=8, theta=None).frequencies()
