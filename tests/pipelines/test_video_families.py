"""What is particular to the later video families: sound, history, references, pairs, noise levels, sizes."""

import contextlib
import dataclasses

import diffusers
import pytest
import tiny_video_models as models
import torch
from dit_accel_pipelines.families.cosmos3 import COSMOS3
from dit_accel_pipelines.families.kandinsky import KANDINSKY5, KANDINSKY6
from dit_accel_pipelines.families.motif import MOTIF_VIDEO
from dit_accel_pipelines.families.wan import WAN
from tiny_stock import run_stock, stock_pipeline

import dit_accel
from dit_accel import ConfigError, RadialAttention
from dit_accel.adapters.position_ids import COMPILED
from dit_accel.methods.find import attention_modules
from dit_accel.testing.method_cases import METHOD_CASES
from dit_accel.testing.recording import recorded

ACTIVE = METHOD_CASES["radial"].active


def build(model) -> torch.nn.Module:
    torch.manual_seed(0)
    return model.transformer(**model.config).eval()


def run(transformer, inputs) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def planned_calls(model, **changes):
    transformer = build(model)
    with dit_accel.attach(transformer, ACTIVE) as attachment, recorded(attachment) as calls:
        run(transformer, {**model.inputs(1), **changes})
        return calls, dataclasses.astuple(attachment.engine.forward.layout)


@pytest.mark.parametrize(
    ("model", "grid"),
    [
        (models.HUNYUAN15[0], (7, 4, 8, 0, 6 + 5 + 3)),
        (models.LTX2[0], (7, 4, 8, 0, 0)),
        (models.LTX2[1], (7, 4, 8, 0, 10)),
        (models.MINIMAX[0], (7, 4, 8, 6 + 32 + 10, 0)),
        (models.WAN_ANIMATE[0], (7, 4, 8, 32, 0)),
        (models.KANDINSKY6[0], (7, 4, 8, 0, 32)),
        (models.FRAMEPACK[0], (7, 4, 8, 3 * 32 + 2 * 2 * 4 + 2 * 1 * 2, 6 + 3)),
        (models.HELIOS[0], (7, 4, 8, 2 * 32 + 2 * 2 * 4 + 2 * 1 * 2, 0)),
        (models.HELIOS[1], (7, 4, 8, 0, 0)),
        (models.COSMOS3[1], (7, 4, 8, 6 + 15, 9)),
        (models.EASYANIMATE[0], (7, 4, 8, 6 + 5, 0)),
    ],
    ids=lambda value: value.transformer.__name__ if hasattr(value, "transformer") else str(value),
)
def test_what_is_no_video_counts_as_text(model, grid):
    calls, found = planned_calls(model)
    assert found == grid
    padded = 1 if model in models.FRAMEPACK else 0  # of one row the valid text alone
    assert {call.q.shape[2] for call in calls} == {sum(grid[3:]) + 224 - padded}


def test_text_of_cosmos3_attends_by_itself_and_stays_dense():
    calls, _ = planned_calls(models.COSMOS3[0])
    assert [call.k.shape[2] for call in calls] == [230] * models.COSMOS3[0].config["num_hidden_layers"]
    assert all(call.q.shape[1] == 2 * call.k.shape[1] for call in calls)  # query heads share key heads
    assert all(not call.q[:, :, :6].any() for call in calls)  # made up: nobody asks for text


def test_decoder_blocks_of_motif_stay_dense():
    places = [name for name, *_ in attention_modules(build(models.MOTIF[0]), MOTIF_VIDEO)]
    assert places == [
        "transformer_blocks.0.attn", "transformer_blocks.1.attn",
        "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn",
    ]  # fmt: skip
    shallow = diffusers.MotifVideoTransformer3DModel(**{**models.MOTIF[0].config, "num_decoder_layers": 0})
    assert len(attention_modules(shallow, MOTIF_VIDEO)) == 5


def test_padded_prompts_are_hidden_from_pairs_without_waiting_for_the_device():
    calls, _ = planned_calls(models.HUNYUAN15[0])
    for call in calls:
        assert call.mask.shape == (1, 1, 1, 238)  # one row of [1, 1, 238, 238]
        assert call.mask.sum() == 224 + 3 + 4 + 5


def test_causal_blocks_of_skyreels_are_refused():
    model = models.SKYREELS[0]
    transformer, inputs = build(model), model.inputs(1)
    inputs["hidden_states"] = inputs["hidden_states"][:, :, :6]
    transformer._set_ar_attention(6)  # one block masks nothing
    with dit_accel.attach(transformer, ACTIVE):
        free = run(transformer, inputs)
    assert free.isfinite().all()
    transformer._set_ar_attention(3)
    with (
        dit_accel.attach(transformer, ACTIVE),
        pytest.raises(ConfigError, match=r"bool \[1, 1, 192, 192\].*pairs"),
    ):
        run(transformer, inputs)


def test_kandinskys_own_sparse_attention_is_refused():
    model = models.KANDINSKY5[0]
    transformer = build(model)
    inputs = {**model.inputs(1), "hidden_states": torch.randn(1, 7, 16, 32, 4)}
    inputs["visual_rope_pos"] = [torch.arange(size) for size in (7, 8, 16)]
    sparse = {"sta_mask": torch.ones(14, 14, dtype=torch.bool), "P": 0.9, "to_fractal": True}
    with (
        dit_accel.attach(transformer, ACTIVE),
        pytest.raises(ConfigError, match="type BlockMask"),
    ):
        run(transformer, {**inputs, "sparse_params": sparse})


def test_minimax_h3_in_a_whole_compiled_graph_has_no_grid(monkeypatch):
    model = models.MINIMAX[0]
    transformer = build(model)
    with dit_accel.attach(transformer, ACTIVE) as attachment:
        grid_of = attachment.engine.layers[0].state.adapter.grid
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert grid_of(transformer.config, model.inputs(1)) == COMPILED


@contextlib.contextmanager
def levels(attachment):
    """Give (step, noise level) of every planned call."""
    found = []
    with attachment.observe(lambda planned: found.append((planned.context.step_index, planned.context.sigma))):
        yield found


def test_every_chunk_is_a_run_of_its_own():
    pipe, call = stock_pipeline("HeliosPipeline")
    config = RadialAttention(block_size=16, dense_steps=1, dense_layers=0, decay_factor=0.2, near="half", sink=False)
    with dit_accel.attach(pipe, config) as attachment, levels(attachment) as found:
        video = run_stock(pipe, {**call, "num_frames": 50, "guidance_scale": 1.0, "num_inference_steps": 2})
        steps = [(step.step_index, step.sparse_layers) for step in attachment.report().steps]
    assert video.isfinite().all()
    assert steps == [(0, 0), (1, 3)]
    assert [step for step, _ in found] == [1] * 3 * 2  # both chunks begin dense


@pytest.mark.parametrize("name", ["Kandinsky5T2VPipeline", "MiniMaxH3ModularPipeline"])
def test_the_noise_level_comes_from_the_scheduler_where_no_pipeline_tells_it(name):
    pipe, call = stock_pipeline(name)
    with dit_accel.attach(pipe, ACTIVE) as attachment, levels(attachment) as found:
        run_stock(pipe, call)
    assert set(found) == set(enumerate(pipe.scheduler.sigmas[:-1].tolist()))


def test_warm_up_may_be_counted_in_noise_on_a_schedule_with_a_large_shift():
    pipe, call = stock_pipeline("MiniMaxH3ModularPipeline")
    config = RadialAttention(block_size=16, dense_steps=0, dense_layers=0, dense_above_sigma=0.95)
    with dit_accel.attach(pipe, config) as attachment:
        run_stock(pipe, call)
        dense = [step.step_index for step in attachment.report().steps if not step.sparse_layers]
    sigmas = pipe.scheduler.sigmas
    assert dense == [index for index, sigma in enumerate(sigmas[:-1].tolist()) if sigma > 0.95]
    assert 0 < len(dense) < len(sigmas) - 1


def test_sizes_are_read_under_every_name():
    config = dict(num_visual_blocks=32, model_dim=1792, axes_dims=(16, 24, 24), ff_dim=7168)
    assert KANDINSKY5.family(config).name == "kandinsky-5-lite"
    config = dict(num_visual_blocks=60, model_dim=4096, axes_dims=(32, 48, 48))
    assert KANDINSKY5.family(config).name == "kandinsky-5-pro"
    assert KANDINSKY6.family(config).name == "kandinsky-6-pro"
    assert KANDINSKY6.family({}) is None
    assert COSMOS3.family(dict(num_hidden_layers=36, num_attention_heads=32, head_dim=128)) is None
    vace = dict(num_layers=30, num_attention_heads=12, attention_head_dim=128, vace_layers=list(range(0, 30, 2)))
    assert WAN.family(vace).name == "wan2.1-vace-1.3b"


@pytest.mark.parametrize("model", [models.KANDINSKY5[0], models.COSMOS3[0], models.MINIMAX[0]])
def test_heads_are_told_under_every_name(model):
    described = dit_accel.describe(build(model)).transformers[0]
    assert (described.layers, described.heads) == (3, model.config.get("num_attention_heads", 2))
