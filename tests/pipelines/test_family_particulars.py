"""What is particular to a family: what counts as text, ragged rows, packed latents, noise levels, what is refused."""

import contextlib
import dataclasses

import diffusers
import pytest
import tiny_models
import tiny_video_models as models
import torch
from dit_accel_pipelines.families.ltx import LTX
from dit_accel_pipelines.families.motif import MOTIF_VIDEO
from dit_accel_pipelines.families.sd3 import SD3
from tiny_stock import run_stock, stock_pipeline

import dit_accel
from dit_accel import DFA, ConfigError, RadialAttention
from dit_accel.adapters.adapter import IMAGE_REFUSED
from dit_accel.attachment.forward_state import as_tensors
from dit_accel.attachment.op import planned_attention
from dit_accel.methods.find import attention_modules
from dit_accel.plan.layout import TokenLayout
from dit_accel.testing.everything import planned
from dit_accel.testing.method_cases import METHOD_CASES
from dit_accel.testing.recording import recorded

ACTIVE = METHOD_CASES["radial"].active


def build(model):
    torch.manual_seed(0)
    return model.transformer(**model.config).eval()


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def planned_calls(model, batch=1):
    """Return the calls of a forward, the layout of its tokens, and the report."""
    transformer = build(model)
    with dit_accel.attach(transformer, ACTIVE) as attachment, recorded(attachment) as calls:
        run(transformer, model.inputs(batch))
        return calls, dataclasses.astuple(attachment.engine.forward.layout), attachment.report()


LAYOUTS = [
    (models.HUNYUAN15[0], 0, 6 + 5 + 3),
    (models.LTX2[0], 0, 0),
    (models.LTX2[1], 0, 10),
    (models.MINIMAX[0], 6 + 32 + 10, 0),
    (models.WAN_ANIMATE[0], 32, 0),
    (models.KANDINSKY6[0], 0, 32),
    (models.FRAMEPACK[0], 3 * 32 + 2 * 2 * 4 + 2 * 1 * 2, 6 + 3),
    (models.HELIOS[0], 2 * 32 + 2 * 2 * 4 + 2 * 1 * 2, 0),
    (models.HELIOS[1], 0, 0),
    (models.COSMOS3[1], 6 + 15, 9),
    (models.EASYANIMATE[0], 6 + 5, 0),
]


@pytest.mark.parametrize(("model", "before", "after"), LAYOUTS)
def test_what_is_no_video_counts_as_text(model, before, after):
    calls, layout, _ = planned_calls(model)
    assert layout == (7, 4, 8, before, after)
    padded = 1 if model in models.FRAMEPACK else 0  # of one row the valid text alone
    assert {call.q.shape[2] for call in calls} == {before + after + 224 - padded}


def test_mochi_plans_each_row_with_its_own_valid_text_and_counts_its_rising_timesteps():
    (model,) = tiny_models.MOCHI
    calls, _, report = planned_calls(model, 2)
    valid = model.inputs(2)["encoder_attention_mask"].sum(1)
    assert [call.q.shape[2] for call in calls] == [224 + int(tokens) for tokens in valid] * 3
    assert [step.sparse_layers for step in report.steps] == [3]
    transformer, inputs = build(model), model.inputs(2)
    inputs["encoder_attention_mask"][:] = True
    with dit_accel.attach(transformer, ACTIVE) as attachment:
        run(transformer, inputs)
        tiles = ACTIVE.filled().tiles(TokenLayout(frames=7, height=4, width=8, text_after=6))
        assert attachment.report().sparse_density == pytest.approx(tiles.density)
        attachment.reset()
        for timestep, counted in ((0.0, [0]), (100.0, [0, 1]), (600.0, [0, 1, 2]), (0.0, [0])):
            with transformer.cache_context("cond_uncond"):
                run(transformer, {**model.inputs(1), "timestep": torch.tensor([timestep])})
            assert [step.step_index for step in attachment.report().steps] == counted
        layer, grid, q = torch.tensor(0), as_tensors((7, 4, 8, 0, 6)), torch.zeros(1, 2, 223, 16)
        with pytest.raises(ConfigError, match=r"layer 0.*223 tokens.*'mochi'"):
            planned_attention(q, q, q, None, layer, grid, attachment.engine.number, False, None, False)


def test_padded_text_is_hidden_from_every_key_without_waiting_for_the_device():
    calls, *_ = planned_calls(tiny_models.HUNYUAN[0], 2)
    assert [call.mask.reshape(2, -1).sum(1).tolist() for call in calls] == [[229, 228]] * 4
    calls, *_ = planned_calls(models.HUNYUAN15[0])
    for call in calls:
        assert call.mask.shape == (1, 1, 1, 238)  # one row of [1, 1, 238, 238]
        assert call.mask.sum() == 224 + 3 + 4 + 5
    calls, *_ = planned_calls(models.COSMOS3[0])
    assert [call.k.shape[2] for call in calls] == [230] * models.COSMOS3[0].config["num_hidden_layers"]
    assert all(call.q.shape[1] == 2 * call.k.shape[1] for call in calls)  # query heads share key heads
    assert all(not call.q[:, :, :6].any() for call in calls)  # made up: nobody asks for text


def test_attention_modules_of_several_kinds_and_the_second_of_sd3_which_sees_the_image_alone():
    places = [(name, depth) for name, _, depth in attention_modules(build(tiny_models.SD3[1]), SD3)]
    assert places == [
        *((f"transformer_blocks.{block}.attn", block) for block in range(3)),
        *((f"transformer_blocks.{block}.attn2", block) for block in range(2)),
    ]
    places = [name for name, *_ in attention_modules(build(models.MOTIF[0]), MOTIF_VIDEO)]  # its decoder's stay dense
    assert places == [f"{kind}transformer_blocks.{block}.attn" for kind in ("", "single_") for block in (0, 1)]
    shallow = diffusers.MotifVideoTransformer3DModel(**{**models.MOTIF[0].config, "num_decoder_layers": 0})
    assert len(attention_modules(shallow, MOTIF_VIDEO)) == 5
    transformer = build(tiny_models.SD3[1])
    with planned(transformer, SD3) as attachment, recorded(attachment) as calls:
        run(transformer, tiny_models.SD3[1].inputs(1))
    assert [call.q.shape[2] for call in calls] == [86, 80, 86, 80, 86]


def test_ltx_refuses_tokens_without_a_grid_and_reads_a_long_videos_window_off_its_coordinates():
    model = next(model for model in tiny_models.LTX if "video_coords" not in model.inputs(1))
    transformer, sizes = build(model), dict.fromkeys(("num_frames", "height", "width"))
    scattered = torch.rand(1, 3, 224)
    scattered[:, 0] = 0.0  # one frame, by the times
    inputs = {**model.inputs(1), **sizes, "video_coords": scattered}
    refused = pytest.raises(ConfigError, match=r"\(ltx\).*LTX's video_coords.*last 224 of 224")
    with dit_accel.attach(transformer, ACTIVE), refused:
        run(transformer, inputs)
    why = LTX.grid(transformer.config, {**inputs, "video_coords": None})
    assert why.startswith("LTX was given neither num_frames, height and width nor video_coords")
    spans = torch.stack([scattered, scattered + 1], -1)  # as LTX-2's pipeline for keyframes gives them
    assert "which of its tokens are the video's" in LTX.grid(transformer.config, {**inputs, "video_coords": spans})
    frames = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(4)).float()
    coords = torch.cat([frames, frames[:8]]).mT[None]  # the window, then the frame that guides it
    sizes = dict.fromkeys(("num_frames", "height", "width"), 1)  # as diffusers' pipeline of long videos gives them
    inputs = {"hidden_states": torch.zeros(1, 32, 4), "video_coords": coords, **sizes}
    assert LTX.grid(None, inputs) == (3, 2, 4, 0, 8)
    assert LTX.grid(None, {**inputs, "video_coords": coords[..., :24]}) == (3, 2, 4, 0, 0)


def test_masks_of_pairs_are_refused():
    """Causal blocks of SkyReels, of which one alone masks nothing, and Kandinsky's own sparse attention."""
    model = models.SKYREELS[0]
    transformer, inputs = build(model), model.inputs(1)
    inputs["hidden_states"] = inputs["hidden_states"][:, :, :6]
    with dit_accel.attach(transformer, ACTIVE):
        transformer._set_ar_attention(6)
        assert run(transformer, inputs).isfinite().all()
        transformer._set_ar_attention(3)
        with pytest.raises(ConfigError, match=r"bool \[1, 1, 192, 192\].*pairs"):
            run(transformer, inputs)
    model = models.KANDINSKY5[0]
    transformer = build(model)
    inputs = {**model.inputs(1), "hidden_states": torch.randn(1, 7, 16, 32, 4)}
    inputs["visual_rope_pos"] = [torch.arange(size) for size in (7, 8, 16)]
    inputs["sparse_params"] = {"sta_mask": torch.ones(14, 14, dtype=torch.bool), "P": 0.9, "to_fractal": True}
    with dit_accel.attach(transformer, ACTIVE), pytest.raises(ConfigError, match="type BlockMask"):
        run(transformer, inputs)


@pytest.mark.parametrize("model", [models.KANDINSKY5[0], models.COSMOS3[0], models.MINIMAX[0], tiny_models.HUNYUAN[0]])
def test_layers_and_heads_are_told_under_every_name_and_over_every_list(model):
    described = dit_accel.describe(build(model)).transformers[0]
    layers = 4 if model is tiny_models.HUNYUAN[0] else 3
    assert (described.layers, described.heads) == (layers, model.config.get("num_attention_heads", 2))
    if layers == 4:
        assert (described.adapter, described.methods["radial"]["decay_factor"]) == ("hunyuan-video", 0.95)


def test_dense_layers_count_over_both_block_lists():
    transformer = build(tiny_models.HUNYUAN[0])
    with dit_accel.attach(transformer, RadialAttention(block_size=16, dense_steps=0, dense_layers=3)) as attachment:
        run(transformer, tiny_models.HUNYUAN[0].inputs(1))
        assert [(step.dense_layers, step.sparse_layers) for step in attachment.report().steps] == [(3, 1)]


# Pictures

PICTURES = [
    ("flux", 6, 0, set()),
    ("sd3", 0, 6, {"rope", "teacache", "referencecache"}),
    ("qwen-image", 6, 6, {"teacache"}),
]


@pytest.mark.parametrize(("name", "before", "after", "own"), PICTURES)
def test_images_refuse_what_is_for_videos_and_what_they_lack(name, before, after, own):
    model = tiny_models.MODELS[name][-1]
    transformer = build(model)
    with dit_accel.attach(transformer, preset="none") as attachment:
        run(transformer, model.inputs(2))
        layout = attachment.engine.forward.layout
    assert (layout.visual_tokens, layout.text_before, layout.text_after) == (80, before, after)
    described = dit_accel.describe(transformer).transformers[0]
    assert {of: described.refused[of] for of in IMAGE_REFUSED} == IMAGE_REFUSED
    assert set(described.refused) == {*own, *IMAGE_REFUSED}
    assert "teacache" not in own or "give the adapter a signal" in described.refused["teacache"]


# Steps, noise levels and the foreground


@contextlib.contextmanager
def levels(attachment):
    """Give (step, noise level) of every planned call."""
    pairs = []
    with attachment.observe(lambda planned: pairs.append((planned.context.step_index, planned.context.sigma))):
        yield pairs


def test_every_chunk_is_a_run_of_its_own():
    pipe, call = stock_pipeline("HeliosPipeline")
    config = RadialAttention(block_size=16, dense_steps=1, dense_layers=0, decay_factor=0.2, near="half", sink=False)
    with dit_accel.attach(pipe, config) as attachment, levels(attachment) as pairs:
        video = run_stock(pipe, {**call, "num_frames": 50, "guidance_scale": 1.0, "num_inference_steps": 2})
        steps = [(step.step_index, step.sparse_layers) for step in attachment.report().steps]
    assert video.isfinite().all()
    assert steps == [(0, 0), (1, 3)]
    assert [step for step, _ in pairs] == [1] * 3 * 2  # both chunks begin dense


@pytest.mark.parametrize("name", ["Kandinsky5T2VPipeline", "MiniMaxH3ModularPipeline"])
def test_the_noise_level_comes_from_the_scheduler_where_no_pipeline_tells_it(name):
    pipe, call = stock_pipeline(name)
    with dit_accel.attach(pipe, ACTIVE) as attachment, levels(attachment) as pairs:
        run_stock(pipe, call)
    sigmas = pipe.scheduler.sigmas[:-1].tolist()
    assert set(pairs) == set(enumerate(sigmas))
    if name.startswith("MiniMax"):  # whose schedule has a large shift
        config = RadialAttention(block_size=16, dense_steps=0, dense_layers=0, dense_above_sigma=0.95)
        with dit_accel.attach(pipe, config) as attachment:
            run_stock(pipe, call)
            dense = [step.step_index for step in attachment.report().steps if not step.sparse_layers]
        assert dense == [index for index, sigma in enumerate(sigmas) if sigma > 0.95]
        assert 0 < len(dense) < len(sigmas)


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "mochi", "wan-animate", "framepack", "cosmos-3"])
def test_without_a_foreground_every_visual_row_keeps_what_it_gave_and_text_attends(name):
    """Whatever stands beside the video in a call: valid text, reference frames, a history, sound."""
    model = tiny_models.MODELS[name][-1]
    transformer, inputs, calls = build(model), model.inputs(1), []
    with dit_accel.attach(transformer, DFA(share=0.0, every=2, warmup_steps=0, last_steps=0)) as attachment:
        attachment.engine.observers.append(calls.append)
        for step in range(2):
            with transformer.cache_context("cond", step_index=step, num_inference_steps=4):
                run(transformer, inputs)
    full, partial = calls[: len(calls) // 2], calls[len(calls) // 2 :]
    assert [call.context.key for call in full] == [call.context.key for call in partial]
    for before, now in zip(full, partial, strict=True):
        layout = now.context.layout
        assert before.plan.reused is None
        assert now.plan.reused.rows[0].tolist() == [
            *range(layout.text_before), *range(layout.visual.stop, layout.tokens),
        ]  # fmt: skip
        assert torch.equal(now.out[:, :, layout.visual], before.out[:, :, layout.visual])
