"""What is particular to a family: valid text row by row, rising timesteps, packed latents, what is refused."""

import json

import diffusers
import pytest
import tiny_models
import torch
from dit_accel_pipelines.families.hunyuan_video import HUNYUAN_VIDEO
from dit_accel_pipelines.families.ltx import LTX
from dit_accel_pipelines.families.mochi import MOCHI
from dit_accel_pipelines.families.sd3 import SD3

import dit_accel
from dit_accel import ConfigError, RadialAttention, UnsupportedModel
from dit_accel.adapters.adapter import IMAGE_REFUSED
from dit_accel.adapters.installed import adapters
from dit_accel.adapters.model_files import ModelFiles, read_model_files
from dit_accel.attachment.forward_state import as_tensors
from dit_accel.attachment.op import planned_attention
from dit_accel.methods.find import attention_modules
from dit_accel.plan.layout import TokenLayout
from dit_accel.testing.everything import planned
from dit_accel.testing.method_cases import METHOD_CASES
from dit_accel.testing.recording import recorded

ACTIVE = METHOD_CASES["radial"].active


def build(model) -> torch.nn.Module:
    torch.manual_seed(0)
    return model.transformer(**model.config).eval()


def run(transformer, inputs) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def test_mochi_plans_each_row_with_its_own_valid_text():
    (model,) = tiny_models.MOCHI
    transformer, inputs = build(model), model.inputs(2)
    with dit_accel.attach(transformer, ACTIVE) as attachment, recorded(attachment) as calls:
        run(transformer, inputs)
        report = attachment.report()
    valid = [224 + int(row) for row in inputs["encoder_attention_mask"].sum(1)]
    assert [call.q.shape[2] for call in calls] == valid * 3
    assert [step.sparse_layers for step in report.steps] == [3]
    with dit_accel.attach(transformer, ACTIVE) as attachment:
        inputs["encoder_attention_mask"][:] = True
        run(transformer, inputs)
        assert attachment.report().sparse_density == pytest.approx(
            ACTIVE.filled().tiles(TokenLayout(frames=7, height=4, width=8, text_after=6)).density
        )


def test_mochi_counts_its_rising_timesteps():
    (model,) = tiny_models.MOCHI
    transformer = build(model)
    with dit_accel.attach(transformer, ACTIVE) as attachment:
        for timestep, counted in ((0.0, [0]), (100.0, [0, 1]), (600.0, [0, 1, 2]), (0.0, [0])):
            with transformer.cache_context("cond_uncond"):
                run(transformer, {**model.inputs(1), "timestep": torch.tensor([timestep])})
            assert [step.step_index for step in attachment.report().steps] == counted


def test_a_sequence_of_another_length_is_refused_where_text_is_ragged():
    (model,) = tiny_models.MOCHI
    transformer = build(model)
    with dit_accel.attach(transformer, ACTIVE) as attachment:
        run(transformer, model.inputs(1))
        layer, grid, q = torch.tensor(0), as_tensors((7, 4, 8, 0, 6)), torch.zeros(1, 2, 223, 16)
        with pytest.raises(ConfigError, match=r"layer 0.*223 tokens.*'mochi'"):
            planned_attention(q, q, q, None, layer, grid, attachment.engine.number, False, None, False)


def test_hunyuan_video_hides_padded_text_from_every_key():
    model = tiny_models.HUNYUAN[0]
    transformer, inputs = build(model), model.inputs(2)
    with dit_accel.attach(transformer, ACTIVE) as attachment, recorded(attachment) as calls:
        run(transformer, inputs)
    assert len(calls) == 4
    for call in calls:
        assert call.mask is not None
        assert call.mask.reshape(2, -1).sum(1).tolist() == [229, 228]


def test_ltx_refuses_tokens_without_a_grid():
    model = next(model for model in tiny_models.LTX if "video_coords" not in model.inputs(1))
    transformer, inputs = build(model), model.inputs(1)
    sizes = dict.fromkeys(("num_frames", "height", "width"))
    scattered = torch.rand(1, 3, 224)
    scattered[:, 0] = 0.0  # one frame, by the times
    inputs = {**inputs, **sizes, "video_coords": scattered}
    plain = run(transformer, inputs)
    text = r"\(ltx\).*LTX's video_coords.*last 224 of 224"
    with dit_accel.attach(transformer, ACTIVE), pytest.raises(ConfigError, match=text):
        run(transformer, inputs)
    assert torch.equal(run(transformer, inputs), plain)
    told = LTX.grid(transformer.config, {**inputs, "video_coords": None})
    assert told.startswith("LTX was given neither num_frames, height and width nor video_coords")
    spans = torch.stack([scattered, scattered + 1], -1)  # as LTX-2's pipeline for keyframes gives them
    assert "which of its tokens are the video's" in LTX.grid(transformer.config, {**inputs, "video_coords": spans})


def test_ltx_reads_a_long_videos_window_off_its_coordinates():
    frames = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(4)).float()
    coords = torch.cat([frames, frames[:8]]).mT[None]  # the window, then the frame that guides it
    sizes = dict.fromkeys(("num_frames", "height", "width"), 1)  # as diffusers' pipeline of long videos gives them
    inputs = {"hidden_states": torch.zeros(1, 32, 4), "video_coords": coords, **sizes}
    assert LTX.grid(None, inputs) == (3, 2, 4, 0, 8)
    assert LTX.grid(None, {**inputs, "video_coords": coords[..., :24]}) == (3, 2, 4, 0, 0)


def test_released_sizes_are_recognised_over_both_block_lists(tmp_path):
    config = dict(num_layers=20, num_single_layers=40, num_attention_heads=24, attention_head_dim=128)
    assert HUNYUAN_VIDEO.family(config).name == "hunyuan-video"
    assert HUNYUAN_VIDEO.recipe("radial", None)["sink"] is False
    assert MOCHI.family(dict(num_layers=48, num_attention_heads=24, attention_head_dim=128)).name == "mochi-1"
    full = dict(config, _class_name="HunyuanVideoTransformer3DModel", patch_size=2, patch_size_t=1)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text(
        json.dumps({"transformer": ["diffusers", "x"], "vae": ["diffusers", "x"]})
    )
    (tmp_path / "transformer/config.json").write_text(json.dumps(full))
    (tmp_path / "vae/config.json").write_text("{}")
    adapter, family = read_model_files(str(tmp_path)).identify()
    assert adapter is HUNYUAN_VIDEO
    assert (family.layers, family.patch, family.ffn_dim) == (60, (1, 2, 2), 12288)


def test_describe_tells_the_layers_of_every_list():
    described = dit_accel.describe(build(tiny_models.HUNYUAN[0])).transformers[0]
    assert (described.layers, described.heads, described.adapter) == (4, 2, "hunyuan-video")
    assert described.methods["radial"]["decay_factor"] == 0.95


def test_the_classes_of_a_family_are_diffusers_own():
    for name, models in tiny_models.MODELS.items():
        adapter = adapters()[name]
        assert {model.transformer for model in models} == {getattr(diffusers, cls) for cls in adapter.transformers}


def test_dense_layers_count_over_both_block_lists():
    model = tiny_models.HUNYUAN[0]
    transformer = build(model)
    config = RadialAttention(block_size=16, dense_steps=0, dense_layers=3)
    with dit_accel.attach(transformer, config) as attachment:
        run(transformer, model.inputs(1))
        assert [(s.dense_layers, s.sparse_layers) for s in attachment.report().steps] == [(3, 1)]


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen-image"])
def test_images_take_an_attachment_and_refuse_radial(name):
    model = tiny_models.MODELS[name][-1]
    transformer, inputs = build(model), model.inputs(2)
    plain = run(transformer, inputs)
    with pytest.raises(ConfigError, match=rf"radial.*{name}.*image"):
        dit_accel.attach(transformer, RadialAttention())
    with dit_accel.attach(transformer, preset="none") as attachment:
        assert torch.equal(run(transformer, inputs), plain)
        assert attachment.report().density == 1.0
        layout = attachment.engine.forward.layout
    assert layout.visual_tokens == 80
    assert (layout.text_before, layout.text_after) == {"flux": (6, 0), "sd3": (0, 6), "qwen-image": (6, 6)}[name]
    described = dit_accel.describe(transformer).transformers[0]
    own = {"flux": set(), "sd3": {"rope", "teacache"}, "qwen-image": {"teacache"}}[name]
    assert {of: described.refused[of] for of in IMAGE_REFUSED} == IMAGE_REFUSED
    assert set(described.refused) == {*own, *IMAGE_REFUSED}
    assert "teacache" not in own or "give the adapter a signal" in described.refused["teacache"]
    # no numbers are published for a model of such sizes
    unmeasured = {"magcache": "ratios or family", "teacache": "polynomial or family", "profilingcache": "blocks"}
    guided = {"nag", "pag", "slg", "seg", "autoguidance", "softpag"}
    assert set(described.needs) == {*unmeasured, *guided, "rope", "ultraimage", "delta"} - own
    assert unmeasured.items() - {("teacache", unmeasured["teacache"])} <= described.needs.items()
    assert described.needs.get("teacache", unmeasured["teacache"]) == unmeasured["teacache"]
    assert described.methods["sol"]["beta"] == 1.0


def test_the_second_attention_of_sd3_sees_the_image_alone():
    model = tiny_models.SD3[1]
    transformer = build(model)
    names = [(name, depth) for name, _, depth in attention_modules(transformer, SD3)]
    assert names == [
        *((f"transformer_blocks.{block}.attn", block) for block in range(3)),
        *((f"transformer_blocks.{block}.attn2", block) for block in range(2)),
    ]
    with planned(transformer, SD3) as attachment, recorded(attachment) as calls:
        run(transformer, model.inputs(1))
    assert [call.q.shape[2] for call in calls] == [86, 80, 86, 80, 86]


def test_steps_are_counted_where_no_context_is_opened():
    model = tiny_models.SD3[0]
    transformer = build(model)
    assert not hasattr(transformer, "cache_context")
    with dit_accel.attach(transformer, preset="none") as attachment:
        for timestep in (900.0, 500.0):
            run(transformer, {**model.inputs(1), "timestep": torch.tensor([timestep])})
        assert [step.step_index for step in attachment.report().steps] == [0, 1]
    assert not hasattr(transformer, "cache_context")


def test_a_family_without_sizes_cannot_be_planned():
    index = {"transformer": ["diffusers", "x"]}
    config = {"_class_name": "OvisImageTransformer2DModel"}
    files = ModelFiles(name="some/model", index=index, transformer=config, vae={})
    with pytest.raises(UnsupportedModel, match=r"some/model.*flux-kin.*sizes.*--fam"):
        files.identify()
