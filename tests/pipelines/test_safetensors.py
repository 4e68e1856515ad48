"""Weights come from safetensors files alone: what could run code when it is read is refused."""

import shutil

import pytest
import torch
from dit_accel_assets import model_path
from dit_accel_pipelines.generation.loading import open_pipeline
from dit_accel_pipelines.generation.lora import check_lora
from safetensors.torch import load_file

from dit_accel import AutoGuidance, ConfigError, attach
from dit_accel.errors import UnsupportedModel


@pytest.fixture(params=["transformer", "text_encoder"])
def pickled(tmp_path, request):
    """An embedded model of which one part's weights are a torch file."""
    folder = shutil.copytree(model_path("flux-tiny"), tmp_path / "model")
    (file,) = (folder / request.param).glob("*.safetensors")
    name = "pytorch_model.bin" if request.param == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(load_file(file), file.with_name(name))
    file.unlink()
    return folder


def test_a_model_of_torch_files_is_refused(pickled):
    with pytest.raises(UnsupportedModel, match=r"safetensors"):
        open_pipeline(str(pickled), dtype="float32")


def test_so_is_a_weaker_model(tmp_path):
    pipe = open_pipeline(str(model_path("flux-tiny")), dtype="float32")
    pipe.transformer.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ConfigError, match=r"safetensors"):
        attach(pipe, AutoGuidance(weak=str(tmp_path)))


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "folder"])
def test_a_lora_is_a_safetensors_file(tmp_path, name):
    path = tmp_path / name
    torch.save({}, path) if path.suffix else path.mkdir()
    with pytest.raises(ConfigError, match=r"safetensors"):
        check_lora(str(path))
