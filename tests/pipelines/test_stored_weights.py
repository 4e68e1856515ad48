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
from dit_accel import AutoGuidance, ConfigError, EasyCache, FirstBlockCache, LiteAttention, RadialAttention, SoftPAG
from dit_accel.errors import UnsupportedModel

SPARSE = dict(block_size=16, dense_steps=0, dense_layers=0)
METHODS = {
    "radial, pooled": (RadialAttention(decay_factor=0.2, near="half", sink=False, rest="pooled", **SPARSE),),
    "lite": (LiteAttention(threshold=-0.05, **SPARSE),),
    "softpag": (SoftPAG(heads="L1H1", scale=1.0),),
    "caches": (EasyCache(threshold=1e9, warmup_steps=1, max_consecutive=1),),
    "block caches": (FirstBlockCache(threshold=1e9, warmup_steps=1, max_consecutive=1),),
}
SIZES = dict(num_attention_heads=2, attention_head_dim=32, ffn_dim=128)


def cast_by_layer(_folder, transformer=None):
    transformer = transformer or tiny_transformer(**SIZES)
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return transformer


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


@pytest.mark.parametrize("name", ["lite", "block caches"])
def test_casting_by_layer_may_come_after_attaching(name):
    expected, transformer = cast_by_layer(None), tiny_transformer(**SIZES)
    with dit_accel.attach(expected, *METHODS[name], preset="none"):
        wanted = denoise(expected)
    with dit_accel.attach(transformer, *METHODS[name], preset="none"):
        cast_by_layer(None, transformer)
        assert torch.equal(denoise(transformer), wanted)
    assert torch.equal(denoise(transformer), denoise(expected))


PICKLES = {"text_encoder": "pytorch_model.bin", "transformer": "diffusion_pytorch_model.bin"}


def test_weights_in_torch_files_are_refused(tmp_path):
    refused = pytest.raises((UnsupportedModel, ConfigError), match="safetensors")
    for part, name in PICKLES.items():
        folder = shutil.copytree(model_path("flux-tiny"), tmp_path / part)
        (file,) = (folder / part).glob("*.safetensors")
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
        with refused:
            open_pipeline(str(folder), dtype="float32")
    transformer = tiny_transformer(**SIZES)
    with refused:
        dit_accel.attach(transformer, AutoGuidance(weak=str(tmp_path / "transformer/transformer")))
    torch.save({}, tmp_path / "lora.bin")
    for path in (tmp_path / "lora.bin", tmp_path):
        with refused:
            check_lora(str(path))
