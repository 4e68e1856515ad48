"""What LiteAttention holds from step to step: as planned, as measured, and beside the original's lists."""

import json
import math

import pytest
from dit_accel_pipelines.families.wan import WAN
from typer.testing import CliRunner
from wan_tiny import generate, tiny_transformer

import dit_accel
from dit_accel import LiteAttention, RadialAttention, SparseD
from dit_accel.adapters import installed
from dit_accel.cli.app import app
from dit_accel.estimate.prediction import estimate
from dit_accel.estimate.sizes import token_layout

WAN_PLAIN = WAN.families[-1]

SIZE = dict(height=48, width=32, num_frames=9, num_inference_steps=4)
LITE = LiteAttention(block_size=16, dense_steps=0)
RADIAL = RadialAttention(block_size=32, dense_steps=0, dense_layers=1)


@pytest.mark.parametrize(
    "methods",
    [
        (LITE,),
        (LiteAttention(block_size=16, dense_steps=1, dense_layers=2),),
        (LiteAttention(dense_steps=0, dense_layers=2), RADIAL),
        (SparseD(block_size=16, dense_steps=0, dense_layers=1),),
    ],
    ids=["all layers", "fewer layers", "in radial's tiles", "sparsed"],
)
def test_what_is_planned_is_what_a_run_holds(make_pipe, methods):
    name = methods[0].name
    planned = estimate(WAN, WAN_PLAIN, methods=methods, **SIZE)
    sizes = dict(
        num_attention_heads=WAN_PLAIN.heads, attention_head_dim=WAN_PLAIN.head_dim, num_layers=WAN_PLAIN.layers
    )
    transformer = tiny_transformer(text_dim=make_pipe().text_encoder.config.d_model, **sizes)
    pipe = make_pipe(transformer=transformer)
    with dit_accel.attach(pipe, *methods, preset="none") as attachment:
        generate(pipe, **SIZE)
        report = attachment.report()
    assert report.state_bytes[name] == planned.carried_bytes[name] > 0
    assert f"{name} held" in str(report)
    assert planned.state_bytes == planned.tile_list_bytes + planned.carried_bytes[name]
    assert planned.to_dict()["carried_bytes"] == dict(planned.carried_bytes)


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.1-14b", "hunyuan-video"])
def test_it_is_a_thirtieth_of_the_original_s_lists(name):
    """Those are int16, two of [batch, heads, query tiles, key tiles + 2] in each attention module."""
    family = installed.family(name)
    adapter = next(adapter for adapter in installed.adapters().values() if family in adapter.families)
    config = LiteAttention(block_size=128, dense_steps=0, dense_layers=0)
    planned = estimate(adapter, family, methods=[config])
    layout = token_layout(family, height=family.height, width=family.width, num_frames=planned.num_frames)
    tiles, batch = math.ceil(layout.tokens / 128), family.forwards_per_step
    lists = family.layers * 2 * 2 * batch * family.heads * tiles * (tiles + 2)
    assert 30 < lists / planned.carried_bytes["lite"] < 33


def test_the_plan_shows_it():
    arguments = ["plan", "--family", "wan2.1-14b", "--lite", "--set", "lite.dense_layers=0"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0
    assert "lite state  137 MiB, held from step to step" in found.stdout
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(found.stdout)["carried_bytes"]["lite"] == 40 * 2 * 4 * 40 * 591 * 19
    found = CliRunner().invoke(app, ["plan", "--family", "wan2.1-14b", "--radial", "--json"])
    assert json.loads(found.stdout)["carried_bytes"] == {}
