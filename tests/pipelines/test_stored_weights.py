"""Weights that are stored in fewer bits or cast layer by layer, and files of weights that are refused."""

import shutil

import pytest
import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig, WanTransformer3DModel
from dit_accel_assets import model_path
from dit_accel_pipelines.generation.loading import open_pipeline
from dit_accel_pipelines.generation.lora import check_lora
from safetensors.torch import load_file
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import (
    AutoGuidance,
    ConfigError,
    EasyCache,
    FirstBlockCache,
    LiteAttention,
    RadialAttention,
    SoftPAG,
    UltraViCo,
    attach,
)
from dit_accel.errors import UnsupportedModel

SPARSE = dict(block_size=16, dense_steps=0, dense_layers=0)
METHODS = {
    "radial, pooled": (RadialAttention(decay_factor=0.2, near="half", sink=False, rest="pooled", **SPARSE),),
    "lite": (LiteAttention(threshold=-0.05, **SPARSE),),
    "ultravico": (UltraViCo(trained_frames=2, alpha=0.5),),
    "softpag": (SoftPAG(heads="L1H1", scale=1.0),),
    "caches": (EasyCache(threshold=1e9, warmup_steps=1, max_consecutive=1),),
    "block caches": (FirstBlockCache(threshold=1e9, warmup_steps=1, max_consecutive=1),),
}
SIZES = dict(num_attention_heads=2, attention_head_dim=32, ffn_dim=128)


def cast_by_layer(_folder):
    transformer = tiny_transformer(**SIZES)
    as_float8(transformer)
    return transformer


def as_float8(transformer):
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def by_torchao(folder):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    return loaded(folder, TorchAoConfig(Int8WeightOnlyConfig()))


def by_bitsandbytes(folder):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return loaded(folder, BitsAndBytesConfig(**config))


def loaded(folder, config):
    tiny_transformer(**SIZES).save_pretrained(folder)
    return WanTransformer3DModel.from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32).eval()


def kept(transformer):
    """What each weight is kept as: its class and format."""
    return {name: (type(weight), weight.dtype) for name, weight in transformer.named_parameters()}


@pytest.mark.parametrize("make", [cast_by_layer, by_torchao, pytest.param(by_bitsandbytes, marks=pytest.mark.gpu)])
def test_methods_act_and_leave_no_trace(tmp_path, make):
    transformer = make(tmp_path)
    before, plain = kept(transformer), denoise(transformer)
    assert before != kept(tiny_transformer(**SIZES))
    for name, methods in METHODS.items():
        with dit_accel.attach(transformer, *methods, preset="none"):
            out = denoise(transformer)
        assert out.isfinite().all(), name
        assert not torch.equal(out, plain), name
        assert torch.equal(denoise(transformer), plain), name
        assert kept(transformer) == before, name


@pytest.mark.parametrize("name", METHODS)
def test_casting_by_layer_may_come_after_attaching(name):
    expected = cast_by_layer(None)
    with dit_accel.attach(expected, *METHODS[name], preset="none"):
        wanted = denoise(expected)
    transformer = tiny_transformer(**SIZES)
    with dit_accel.attach(transformer, *METHODS[name], preset="none"):
        as_float8(transformer)
        found = denoise(transformer)
    assert torch.equal(found, wanted)
    assert torch.equal(denoise(transformer), denoise(expected))


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
