"""Pipelines around the embedded model's parts, for the tests of this room."""

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import WanPipeline
from dit_accel_assets import model_path
from wan_tiny import tiny_transformer


@pytest.fixture(scope="session")
def _embedded() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(model_path("wan-plain"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def make_pipe(_embedded: WanPipeline) -> Callable[..., WanPipeline]:
    """Return a maker of pipelines: the embedded model's parts around a tiny random transformer."""

    def make(seed: int = 0, **extra: object) -> WanPipeline:
        width = _embedded.text_encoder.config.d_model
        parts = dict(_embedded.components, transformer=tiny_transformer(seed, text_dim=width))
        parts["scheduler"] = copy.deepcopy(_embedded.scheduler)
        pipe = WanPipeline(**{**parts, **extra})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def pipe(make_pipe: Callable[..., WanPipeline]) -> WanPipeline:
    return make_pipe()
