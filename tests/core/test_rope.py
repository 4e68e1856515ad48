"""Rotary positions as data: frequencies, axes, what to set on a model, what is refused; no real model."""

import copy
import dataclasses
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


def test_axes_share_the_channels_as_the_config_says():
    axes = by_config("dims", ("text", "height", "width"), 256.0, theta_key="base", default=(8, 8))
    for config, expected in (
        ({"dims": (4, 6, 6)}, [("text", 4, 256.0), ("height", 6, 256.0), ("width", 6, 256.0)]),
        ({"base": 16}, [("height", 8, 16.0), ("width", 8, 16.0)]),
    ):
        assert [(axis.name, axis.channels, axis.theta) for axis in axes(config)] == expected
    assert [axis.channels for axis in thirds({"attention_head_dim": 128})] == [44, 42, 42]
    assert lengths_of_image("lens", (512, 512))({"lens": (300, 512, 256)}) == {"height": 512, "width": 256}
    assert lengths_of_image("lens", (512, 384))({}) == {"height": 512, "width": 384}
    for config, most in (({"most": 64}, 64), ({}, 1024)):
        assert same_length("most", 1024)(config) == dict.fromkeys(("frames", "height", "width"), most)
    with pytest.raises(ConfigError, match=r"along frames.*learned"):
        Axis(name="frames", channels=8, theta=None).frequencies()


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
    seen, model = [], Model()
    with replaced(model, change_rope(ROPE, model, {"height": lambda own: seen.append(own) or own / 4})):
        first = model(IDS)
        model(IDS)
    (own,) = seen
    assert own.tolist() == frequencies(4, 100.0).tolist()
    assert own.dtype == torch.float64
    assert torch.equal(first[0][24, :4], Model()(IDS)[0][6, :4])  # row 4, column 0; row 1, column 0


def test_a_copy_of_a_changed_model_is_changed_by_itself():
    model = Model()
    plain = model(IDS)
    with replaced(model, change_rope(ROPE, model, {"height": lambda own: own / 2})):
        expected, twin = model(IDS), copy.deepcopy(model)
    model.rope.theta = 5.0
    assert all(map(torch.equal, twin(IDS), expected))
    assert not torch.equal(expected[0], plain[0])


@pytest.mark.parametrize(
    ("change", "message", "axes"),
    [
        ({"frames": torch.ones(2)}, r"Model.*height, width, not 'frames'", ROPE.axes),
        ({"width": torch.ones(3)}, r"width.*4 frequencies.*Model.*\(3,\)", ROPE.axes),
        ({"width": lambda own: own[:2]}, r"width.*\(4,\).*\(2,\)", ROPE.axes),
        ({"width": lambda own: own / 0}, r"\(4,\).*\[inf, inf, inf, inf\]", ROPE.axes),
        ({"text": torch.ones(2)}, r"'text'.*images", by_config("dims", ("text", "width"), 100.0)),
        (
            {"frames": lambda own: own}, r"Turns.forward.*'theta'",
            lambda config: even(("frames", "height", "width"), 4, 100.0),
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, message, axes):
    model, rope = Model(), Rope(owner="rope", form="theta", axes=axes)
    with pytest.raises(ConfigError, match=message), replaced(model, change_rope(rope, model, change)):
        model(IDS)
    assert "forward" not in vars(model.rope)
    assert change_rope(rope, model, {}) == ([], None)


def test_text_rows_keep_their_positions():
    rope, model = dataclasses.replace(ROPE, text=lambda inputs: inputs["text"]), Model()
    plain, change = model(IDS, text=7), change_rope(rope, model, {"height": lambda own: own / 2})
    with replaced(model, change):
        made = model(IDS, text=7)
        moved = model(IDS, text=0)
    for now, before, all_moved in zip(made, plain, moved, strict=True):
        assert torch.equal(now[:7], before[:7])
        assert torch.equal(now[7:], all_moved[7:])
        assert not torch.equal(now[7:], before[7:])
    lost = change_rope(rope, model, {"height": lambda own: own / 2})._replace(inputs=None)
    with pytest.raises(ConfigError, match=r"Turns.*inputs.*text"), replaced(model, lost):
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


def test_a_model_without_rotary_positions_is_refused_with_the_reason():
    absent = Rope(form="theta", axes=ROPE.axes, absent=lambda config: config.get("why"))
    for rope, config, why in (
        ("positions are learned", {}, "positions are learned"),
        (None, {}, "its adapter describes none"),
        (absent, {"why": "this one adds them"}, "this one adds them"),
    ):
        with pytest.raises(ConfigError, match=rf"mine.*rotary positions.*: {why};"):
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
    model, value = Given(), pairs(places, (own, own))
    new = own * torch.tensor([1, 0.5, 1, 1, 2, 1, 1, 0.3], dtype=torch.float64)
    with replaced(model, change_rope(PAIRS, model, {"width": lambda own: own})):
        assert all(map(torch.equal, model(emb=value), value))
    with replaced(model, change_rope(PAIRS, model, {"width": new})):
        made = model(emb=value)
        assert model(value)[0] is made[0]  # the pipeline gives the same tensors at every step
        again = model(emb=pairs(places + 1, (own, own)))
        with pytest.raises(ConfigError, match=r"cos.*sin.*height.*theta 10000.0.*16 chann"):
            model(emb=(torch.rand(9, 32),) * 2)
        with pytest.raises(ConfigError, match=r"Given.*no emb"):
            model()
    for now, where in ((made, places), (again, places + 1)):
        for part, expected in zip(now, pairs(where, (own, new)), strict=True):
            assert torch.equal(part[:, :16], expected[:, :16])
            assert float((part - expected).abs().max()) < 3e-7  # steps of float32: those of the given ones, and ours
    assert model(emb=value) is value
