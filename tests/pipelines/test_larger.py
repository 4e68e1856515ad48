"""What a pipeline needs besides methods for pictures larger than trained."""

import types

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from dit_accel_pipelines.families.flux import FLUX
from dit_accel_pipelines.generation.larger import prepare_larger
from dit_accel_pipelines.generation.request import Request

FLUX_DEV = FLUX.families[0]
FLUX_TINY = FLUX.families[-1]


@pytest.fixture
def pipe():
    tiled = []
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = types.SimpleNamespace(enable_tiling=lambda: tiled.append(True))
    return types.SimpleNamespace(scheduler=scheduler, vae=vae, tiled=tiled)


def request_of(tmp_path, side):
    return Request(prompts=("a kite",), output=tmp_path / "a.png", height=side, width=side)


def test_a_larger_picture_is_decoded_in_tiles_at_the_largest_shift(pipe, tmp_path):
    notes = prepare_larger(pipe, request_of(tmp_path, 4096), FLUX_DEV)
    assert pipe.tiled == [True]
    assert len(notes) == 2
    assert "held at that of 4096 tokens: along its line 65536" in notes[1]
    config = pipe.scheduler.config
    shift = calculate_shift(
        256 * 256, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    assert shift == pytest.approx(config.max_shift)


def test_other_pictures_and_models_are_left(pipe, tmp_path):
    before = dict(pipe.scheduler.config)
    assert prepare_larger(pipe, request_of(tmp_path, 2048), FLUX_DEV) == []
    assert prepare_larger(pipe, request_of(tmp_path, 4096), FLUX_TINY) == []
    assert prepare_larger(pipe, request_of(tmp_path, 4096), None) == []
    assert dict(pipe.scheduler.config) == before
    assert not pipe.tiled
