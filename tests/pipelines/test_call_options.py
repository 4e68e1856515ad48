"""Options of a run that its pipeline's call or its layers take: shift, guidance scales, free arguments, attention."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch
from dit_accel_pipelines.generation import dense_attention
from dit_accel_pipelines.generation.loading import load_pipeline
from dit_accel_pipelines.generation.pipeline_call import CallSignature
from dit_accel_pipelines.generation.request import Request, resolve
from model_folders import model_folder

from dit_accel.errors import ConfigError

SMALL = dict(num_inference_steps=2, num_frames=5, height=32, width=48)


def request(folder: Path, **changes: Any) -> Request:
    return Request(**{"prompt": "a red circle", "output": folder / "a.png", **SMALL, **changes})


def test_a_scheduler_without_a_shift_is_refused_before_weights_are_loaded(tmp_path: Path):
    model = model_folder(tmp_path / "m", scheduler=["diffusers", "DDIMScheduler"])
    (model / "scheduler" / "scheduler_config.json").unlink()
    (model / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"DDIMScheduler .*flow_shift 2"):
        resolve(request(tmp_path, model=str(model), flow_shift=2.0))


def test_a_shift_that_a_pipeline_would_overrule_is_refused(tmp_path: Path):
    model = str(model_folder(tmp_path / "m", _class_name="Flux2Pipeline"))
    asked = Request(prompt="a red circle", output=tmp_path / "a.png", model=model, solver="unipc", flow_shift=2.0)
    with pytest.raises(ConfigError, match=r"Flux2Pipeline .*'unipc' .*flow_shift 2; .*'euler'"):
        resolve(asked)
    assert resolve(dataclasses.replace(asked, solver="euler")).request.flow_shift == 2.0


def test_the_scale_of_a_negative_prompt_wins_over_that_of_guidance(tmp_path: Path):
    asked, *_ = resolve(
        Request(
            prompt="a red circle", output=tmp_path / "a.png", model="flux-tiny", guidance_scale=4.0, true_cfg_scale=2.0
        )
    )
    call = CallSignature.of(type(load_pipeline(asked)))
    assert asked.full_call(call, {})["true_cfg_scale"] == 2.0
    assert dataclasses.replace(asked, true_cfg_scale=None).full_call(call, {})["true_cfg_scale"] == 4.0


def test_an_attention_backend_is_that_of_one_transformer(pipe):
    before = attention_dispatch._AttentionBackendRegistry._active_backend
    dense_attention.use_attention_backend(pipe.transformer, "_native_math")
    chosen = {
        module.processor._attention_backend for module in pipe.transformer.modules() if hasattr(module, "processor")
    }
    assert chosen == {attention_dispatch.AttentionBackendName._NATIVE_MATH}
    assert attention_dispatch._AttentionBackendRegistry._active_backend is before


def test_a_model_whose_layers_call_torch_themselves_takes_no_attention_backend(tmp_path: Path):
    files = type("Files", (), {"transformer": {"_class_name": "PixArtTransformer2DModel", "num_layers": 1}})
    with pytest.raises(ConfigError, match=r"PixArtTransformer2DModel .*'native'"):
        dense_attention.check_attention_backend("native", files, torch.device("cpu"))  # type: ignore[arg-type]
