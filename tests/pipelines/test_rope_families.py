"""Rotary positions: what is particular to some families, against formulas, and adapters that are wrong."""

import dataclasses
import inspect
from functools import partial

import diffusers
import pytest
import tiny_image_models
import tiny_models
import torch
from diffusers.models import embeddings
from dit_accel_pipelines import ADAPTERS
from tiny_inputs import ids, packed

from dit_accel import ConfigError
from dit_accel.adapters.rope_axes import even
from dit_accel.adapters.rope_forms import change_rope
from dit_accel.adapters.rotary import Rope, RopeChange, rope_of
from dit_accel.testing import rope_checks
from dit_accel.testing.rope_checks import check_rope, replaced
from dit_accel.testing.tiny_models import Case

BY_NAME = {adapter.name: adapter for adapter in ADAPTERS}


def tiny(name, number=0, inputs=None, **config):
    model = tiny_models.MODELS[name][number]
    changes = dict(config={**model.config, **config}, inputs=inputs or model.inputs)
    return Case(BY_NAME[name], dataclasses.replace(model, **changes))


def longcat(batch):
    """Text along height and width, the image behind it, as its pipeline lays them."""
    text = torch.arange(6.0)[:, None].expand(-1, 3) * torch.tensor([0, 1, 1])
    return dict(packed(batch), txt_ids=text, img_ids=ids() + torch.tensor([1, 16, 16]))


def layered(batch):
    return dict(
        tiny_models.MODELS["qwen-image"][0].inputs(batch), img_shapes=[[(1, 4, 10), (1, 4, 10), (1, 4, 10)]] * batch,
        hidden_states=torch.randn(batch, 120, 4),
    )  # fmt: skip


PARTICULAR = {
    "LongCat's text lies along the image's axes": ("flux-kin", 1, longcat, {}),
    "Ovis's text lies where the image does": ("flux-kin", 2, lambda batch: dict(longcat(batch), img_ids=ids()), {}),
    "ConsisID's rotary positions": (
        "cogvideox", 2, lambda batch: {**tiny_models.MODELS["cogvideox"][2].inputs(batch), "image_rotary_emb": 0},
        {"use_rotary_positional_embeddings": True},
    ),
    "LTX-2's positions, split by head": ("ltx-2", 0, None, {"rope_type": "split"}),
    "LTX-2's positions in single precision": ("ltx-2", 0, None, {"rope_double_precision": False}),
    "Qwen-Image-Layered": ("qwen-image", 0, layered, {"use_layer3d_rope": True}),
    "Qwen-Image 2.1 with an image in its text": (
        "qwen-image-2.1", 0, partial(tiny_image_models.qwen_image_21, references=True), {}
    ),
    "Ideogram's padding": ("ideogram4", 0, partial(tiny_image_models.ideogram4, padding=3), {}),
    "JoyImage's text behind the image": ("joyimage-edit", 0, None, {"rope_type": "mrope"}),
    "Cosmos's learned positions": ("cosmos", 0, None, {"extra_pos_embed_type": "learnable"}),
}  # fmt: skip


@pytest.mark.parametrize("what", PARTICULAR)
def test_what_is_particular_to_a_family(what):
    name, number, inputs, config = PARTICULAR[what]
    assert check_rope(tiny(name, number, inputs, **config)) is None


@pytest.mark.parametrize(("name", "kind"), [("pixart", "sinusoidal"), ("sd3", "sinusoidal|learned")])
def test_a_model_without_rotary_positions_says_what_it_has(name, kind):
    case = tiny(name)
    with pytest.raises(ConfigError, match=rf"{name}.*rotary positions.*({kind})"):
        rope_of(name, case.adapter.rope, case.transformer.config)


WRONG = [
    ("wan", dict(axes=lambda c: even(("frames", "height", "width"), 4)), "frames: .*model.*frequencies"),
    ("flux", dict(axes=lambda c: even(("height", "width", "frames"), 4)), "height: two neighbours"),
    ("helios", dict(parts=("freqs_base_t", "freqs_base_x", "freqs_base_y")), "height: .*along width"),
    ("kandinsky-5", dict(parts=("args_0", "args_2", "args_1")), "height: .*along width"),
    ("hunyuan-video", dict(asks=(0, 2, 1)), "height: .*along width"),
    ("hunyuan-video", dict(asks=(0, 1)), "width: nothing"),
    ("qwen-image", dict(parts=()), "height: halved, its|two neighbours"),
    ("qwen-image", dict(asks=(0, 1, 2)), "height: "),
    ("ideogram4", dict(text=lambda inputs: 7), "frames: .*along height"),
    ("flux-kin", dict(text=lambda inputs: 7), "tokens.*for text"),
    ("longcat", dict(text=None), "text moves"),
    ("longcat", dict(text=lambda inputs: 5), "text moves"),
    ("anyflow", dict(caches=()), "every axis.*'theta'"),
    ("wan", dict(owner="rope.nothing"), "'rope.nothing'.*WanTransformer3DModel"),
]


@pytest.mark.parametrize(("name", "changes", "message"), WRONG)
def test_a_wrong_adapter_is_found(name, changes, message):
    case = tiny("flux-kin", 1, longcat) if name == "longcat" else tiny(name)
    case.adapter = dataclasses.replace(case.adapter, rope=dataclasses.replace(case.adapter.rope, **changes))
    with pytest.raises((AssertionError, ConfigError), match=message):
        check_rope(case)


def test_a_change_of_a_class_is_found(monkeypatch):
    def on_the_class(*args):
        change = change_rope(*args)
        return RopeChange([(type(owner), name, value) for owner, name, value in change.attributes], change.inputs)

    monkeypatch.setattr(rope_checks, "change_rope", on_the_class)
    with pytest.raises(AssertionError, match="was changed"):
        check_rope(tiny("flux"))


def test_one_frequency_moves_two_columns_to_the_formula():
    case = tiny("wan", attention_head_dim=128)
    latents = torch.zeros(1, 12, 21, 4, 4)
    plain = case.transformer.rope(latents)

    def slower(own):
        own[3] = 2 * torch.pi / 63
        return own

    rope = rope_of("wan", case.adapter.rope, case.transformer.config)
    with replaced(case.transformer, change_rope(rope, case.transformer, {"frames": slower})):
        tables = case.transformer.rope(latents)
    angles = torch.arange(21).double() * (2 * torch.pi / 63)
    for now, before, expected in zip(tables, plain, (angles.cos(), angles.sin()), strict=True):
        assert (now != before).flatten(0, 2).any(0).nonzero().flatten().tolist() == [6, 7]
        frames = now.reshape(21, 4, 128)[:, 0, 6:8]
        assert torch.equal(frames, expected.float()[:, None].expand(-1, 2))


def changed(name, value, frequencies, number=0, **config):
    case = tiny(name, number, **config)
    rope = rope_of(name, case.adapter.rope, case.transformer.config)
    inputs = change_rope(rope, case.transformer, frequencies).inputs
    return inputs({rope.input: value})[rope.input]


def test_cogvideox_positions_between_whole_numbers():
    crop = ((2, 0), (28, 45))
    value = embeddings.get_3d_rotary_pos_embed(64, crop, (34, 60), 13)
    tables = changed("cogvideox", value, {"height": lambda own: own / 3}, 1, attention_head_dim=64)
    rows = torch.linspace(2, 28 * 33 / 34, 34, dtype=torch.float64) / 3
    expected = embeddings.get_1d_rotary_pos_embed(24, rows, use_real=True, freqs_dtype=torch.float64)
    for now, before, height in zip(tables, value, expected, strict=True):
        assert torch.equal(now[:, :16], before[:, :16])
        assert torch.equal(now[:, 40:], before[:, 40:])
        spread = height[None, :, None].expand(13, 34, 60, 24).reshape(-1, 24)
        assert float((now[:, 16:40] - spread).abs().max()) < 2e-6  # the given ones' float32 frequencies, times 28


def test_hunyuan_dit_lays_width_first():
    value = embeddings.get_2d_rotary_pos_embed(16, ((0, 0), (32, 32)), (8, 10))
    for axis, columns, still in (("width", slice(0, 8), slice(8, 16)), ("height", slice(8, 16), slice(0, 8))):
        tables = changed("hunyuan-dit", value, {axis: lambda own: own / 2})
        for now, before in zip(tables, value, strict=True):
            assert torch.equal(now[:, still], before[:, still])
            assert not torch.equal(now[:, columns], before[:, columns])


def test_allegro_frames_as_its_own_interpolation():
    def make(scale):
        return embeddings.get_3d_rotary_pos_embed_allegro(18, ((0, 0), (4, 8)), (4, 8), 7, (scale, 2.0, 2.0))

    places = [torch.zeros(1, 3, dtype=torch.long)] * 3
    (*tables,), grid = changed("allegro", (make(1.5)[:3], places), {"frames": lambda own: own / 2})
    for now, expected in zip(tables, make(3.0)[:3], strict=True):
        for part, other in zip(now, expected, strict=True):
            torch.testing.assert_close(part, other, rtol=0, atol=1e-6)
    assert grid is places


def test_lumina_next_changes_what_its_pipeline_scaled_already():
    def make(**factor):
        return embeddings.get_2d_rotary_pos_embed_lumina(16, 384, 384, **factor)

    for factor in (dict(linear_factor=2.0), dict(ntk_factor=1.7)):
        value = make(**factor)
        assert torch.equal(changed("lumina-next", value, {"height": lambda own: own}), value)
        tables = changed("lumina-next", value, {"height": lambda own: own / 2, "width": lambda own: own / 2})
        for at in ((10, 0), (0, 310), (200, 142)):
            torch.testing.assert_close(tables[at], value[at[0] // 2, at[1] // 2], rtol=0, atol=2e-5)


def test_a_model_of_half_precision_keeps_its_own():
    for name in ("wan", "kandinsky-5", "helios", "minimax-h3"):
        case = tiny(name)
        transformer, inputs = case.transformer, case.inputs(1)
        rope = rope_of(name, case.adapter.rope, transformer.config)
        calls = rope_checks._recorded(case, rope, inputs)
        change = change_rope(rope, transformer, {"frames": lambda own: own})
        rope.find_owner(transformer).to(torch.bfloat16)
        plain = [leaf for call in calls for leaf in rope_checks._leaves(call())]
        if change.inputs:
            change.inputs(inputs)
        with replaced(transformer, change):
            tables = [leaf for call in calls for leaf in rope_checks._leaves(call())]
        assert [leaf.dtype for leaf in tables] == [leaf.dtype for leaf in plain]
        assert all(map(torch.equal, tables, plain))


TABLES = [
    ("wan", {"rope_max_seq_len": 8}),
    ("wan-animate", {"rope_max_seq_len": 9}),
    ("skyreels-v2", {"rope_max_seq_len": 8}),
    ("cosmos", {"max_size": (8, 8, 8)}),
]


@pytest.mark.parametrize(("name", "config"), TABLES)
def test_tables_are_as_long_as_told(name, config):
    case = tiny(name, **config)
    most = case.adapter.rope.max_positions(case.transformer.config)["frames"]
    assert case.transformer.rope(torch.zeros(1, 4, most, 4, 4))[0].numel() > 0
    with pytest.raises(RuntimeError):
        case.transformer.rope(torch.zeros(1, 4, most + 1, 4, 4))


def test_limits_of_the_released_models():
    def limits(name, **config):
        return BY_NAME[name].rope.max_positions(config)

    assert limits("wan", rope_max_seq_len=1024) == dict(frames=1024, height=1024, width=1024)
    assert limits("lumina2", axes_lens=(300, 512, 512)) == dict(height=512, width=512)
    assert limits("qwen-image-2.1") == dict(height=2048, width=2048)
    assert limits("cogvideox", patch_size=2, sample_height=60, sample_width=90) == {}
    cut = limits("cogvideox", patch_size=2, patch_size_t=2, sample_height=96, sample_width=170)
    assert cut == dict(height=48, width=85)
    cosmos1 = dict(max_size=(128, 240, 240), patch_size=(1, 2, 2), extra_pos_embed_type="learnable")
    assert limits("cosmos", **cosmos1) == dict(frames=128, height=120, width=120)
    assert BY_NAME["hunyuan-video"].rope.max_positions is None
    limited = [one for one in ADAPTERS if isinstance(one.rope, Rope) and one.rope.max_positions is not None]
    for adapter, name in [(one, name) for one in limited for name in one.transformers]:
        parameters = inspect.signature(getattr(diffusers, name)).parameters
        defaults = {key: one.default for key, one in parameters.items() if one.default is not one.empty}
        assert adapter.rope.max_positions({}) == adapter.rope.max_positions(defaults), name
