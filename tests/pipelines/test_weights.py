"""Weights as `generate` loads them: in fewer bits, from single files, with LoRAs, and below a memory."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, WanPipeline, WanTransformer3DModel
from diffusers.loaders import single_file_utils
from dit_accel_assets import model_path
from dit_accel_pipelines.generation import fit, generate, loading, weights
from dit_accel_pipelines.generation.few_steps import proposals
from dit_accel_pipelines.generation.loading import load_pipeline, open_pipeline
from dit_accel_pipelines.generation.pipeline_call import CallSignature
from dit_accel_pipelines.generation.request import Request, resolve
from dit_accel_pipelines.generation.resume import request_digest
from method_table import TABLE
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import dit_accel
from dit_accel.adapters.installed import adapter_for
from dit_accel.adapters.model_files import read_model_files
from dit_accel.cli.app import app
from dit_accel.errors import ConfigError, DitAccelError, MissingBackend
from dit_accel.testing.method_cases import configs_of
from dit_accel.testing.runs import outputs
from dit_accel.testing.tiny_models import Case, tiny_wan

PROMPT = "a red circle moving right"
SIZES: dict[str, Any] = dict(num_inference_steps=2, num_frames=1, height=32, width=32)
FILE = model_path("wan-tiny") / "transformer/diffusion_pytorch_model.safetensors"
OTHER = model_path("flux-tiny") / "transformer/diffusion_pytorch_model.safetensors"


def request(tmp_path: Path, **changes: Any) -> Request:
    return Request(**{"prompt": PROMPT, "output": tmp_path / "a.png", **SIZES, **changes})


def frames(request: Request) -> np.ndarray:
    resolved = resolve(request).request
    return generate.run(load_pipeline(resolved), resolved).frames.astype(float)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(20 * np.log10(255) - 10 * np.log10(np.mean((one - other) ** 2)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> np.ndarray:
    return frames(request(tmp_path_factory.mktemp("plain")))


def lora(path: Path, seed: int = 0, model: str = "wan-tiny", **changes: Any) -> Path:
    """Write a LoRA of a model's transformer, or of one with other settings, that changes much."""
    cls = {"wan-tiny": WanPipeline, "flux-tiny": FluxPipeline}[model]
    torch.manual_seed(seed)
    transformer = weights.empty_model({**read_model_files(str(model_path(model))).transformer, **changes})
    transformer.to_empty(device="cpu").add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False))
    cls.save_lora_weights(path.parent, get_peft_model_state_dict(transformer), weight_name=path.name)
    return path


def gguf(path: Path) -> Path:
    """Write wan-tiny's transformer as a GGUF file, its matrices in 8 bits."""
    writing = pytest.importorskip("gguf", reason="gguf is not installed")
    writer = writing.GGUFWriter(path, "wan")
    for name, weight in load_file(FILE).items():
        packed = weight.ndim == 2 and weight.shape[1] % 32 == 0
        kind = writing.GGMLQuantizationType.Q8_0 if packed else writing.GGMLQuantizationType.F32
        writer.add_tensor(name, writing.quants.quantize(weight.float().numpy(), kind), raw_dtype=kind)
    for write in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, write)()
    return path


def test_fewer_bits_give_nearly_the_same_and_are_in_the_side_car(tmp_path: Path, plain):
    pytest.importorskip("torchao", reason="torchao is not installed")
    for kind, least in (("int8-weights", 35), ("int8", 30), ("fp8-weights", 25)):
        assert least < psnr(frames(request(tmp_path, quantize=kind)), plain) < 80, kind
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    more = ["--quantize", "int8-weights", "--quantize-text-encoder", "int8-weights", "-o", str(tmp_path / "b.png")]
    result = CliRunner().invoke(app, ["generate", PROMPT, *words, *more])
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "b.png.json").read_text())
    assert (record["quantize"], record["quantize_text_encoder"]) == ("int8-weights", "int8-weights")
    pipe = load_pipeline(resolve(request(tmp_path, quantize_text_encoder="int8-weights")).request)
    held = [weight for part in (pipe.text_encoder, pipe.transformer) for weight in part.parameters()]
    assert {type(weight).__name__ for weight in held} == {"Parameter", "Int8Tensor"}
    assert request_digest(request(tmp_path)) != request_digest(request(tmp_path, quantize="int8"))


def test_single_files_hold_the_same_weights(tmp_path: Path, plain):
    pipe = load_pipeline(resolve(request(tmp_path, transformer=(str(FILE),))).request)
    assert (generate.run(pipe, resolve(request(tmp_path)).request).frames == plain).all()
    assert 35 < psnr(frames(request(tmp_path, transformer=(str(gguf(tmp_path / "a.gguf")),))), plain) < 80
    digests = {request_digest(request(tmp_path, transformer=(name,))) for name in (str(FILE), str(tmp_path / "a.gguf"))}
    assert len(digests) == 2


def test_a_model_may_be_a_single_file(tmp_path: Path, monkeypatch, plain):
    """By diffusers' table, of which one entry is set here to a folder, as the hub is out of reach."""
    keys = {"patch_embedding.weight": torch.zeros(8, 16, 1, 2, 2), "head.modulation": torch.zeros(1, 2, 1536)}
    path = tmp_path / "wan.safetensors"
    save_file(keys, path)
    assert weights.named_by_file(request(tmp_path, model=str(path)))[0].model.startswith("Wan-AI/Wan2.1-")
    monkeypatch.setattr(single_file_utils, "infer_diffusers_model_type", lambda names: "mine")
    monkeypatch.setitem(
        single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS, "mine",
        {"pretrained_model_name_or_path": str(model_path("wan-tiny"))},
    )  # fmt: skip
    sizes = dict(guidance_scale=4.0, num_inference_steps=2)
    resolved = resolve(request(tmp_path, model=str(FILE), **sizes))
    assert any("is taken as the transformer of" in note for note in resolved.notes)
    assert resolved.request.transformer == (str(FILE),)
    load_pipeline(resolved.request)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (dict(quantize="int9"), "int9"),
    (dict(quantize="fp8"), "fp8.*card"),
    (dict(quantize="nf4"), "nf4.*card"),
    (dict(quantize="int4"), "int4.*card"),
    (dict(quantize_text_encoder="fp8"), "quantize_text_encoder 'fp8'"),
    (dict(revision="v2"), "revision 'v2'"),
    (dict(vae="tile,tiles"), "'tiles'"),
    (dict(max_memory="much"), "'much'"),
    (dict(fuse_lora=True), "fuse_lora"),
    (dict(transformer=("none.safetensors",)), "none.safetensors"),
    (dict(transformer=("weights.bin",)), "weights.bin"),
    (dict(transformer=(str(FILE), str(FILE))), "transformer_2:FILE"),
    (dict(transformer=(f"transformer_2:{FILE}",)), "transformer_2 of .*wan-tiny"),
    (dict(transformer=(str(OTHER),)), "fit WanTransformer3DModel"),
    (dict(model=str(OTHER)), "--transformer"),
    (dict(lora=("none.safetensors=0.5",)), "none.safetensors"),
    (dict(lora=(str(FILE.parent),)), "pytorch_lora_weights.safetensors"),
    (dict(lora=(f"{FILE}=half",)), "'half'"),
    (dict(lora=(f"transformer_2:{FILE}",)), "transformer_2"),
    (dict(guidance_scale_2=3.0), r"two experts, got 3 for .*wan-tiny"),
    (dict(true_cfg_scale=3.0), r"WanPipeline takes no true_cfg_scale, got 3\.0"),
    (dict(strength=0.5), r"WanPipeline takes no strength, got 0\.5"),
    (dict(strength=1.5), r"strength must be .* got 1\.5"),
    (dict(flow_shift=0.0), r"flow_shift must be .* got 0"),
    (dict(arg=["steps=3"]), r"WanPipeline takes no 'steps'; known: "),
    (dict(attention_backend="natve"), r"'natve'; did you mean 'native'"),
    (dict(attention_backend="sage"), r"attention backend 'sage' .* on cpu .*sageattention"),
    (dict(attention_backend="_native_cudnn"), r"attention backend '_native_cudnn' .* on cpu"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refused_before_weights_are_loaded(tmp_path: Path, monkeypatch, options, words):
    monkeypatch.setattr(loading, "open_pipeline", lambda *args, **more: pytest.fail("weights were loaded"))
    with pytest.raises(DitAccelError, match=words):
        generate.generate([request(tmp_path, device="cpu", **options)])
    assert not list(tmp_path.iterdir())


def test_what_a_card_or_a_library_lacks_is_refused_by_name(tmp_path: Path, monkeypatch):
    cuda = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"fp8.*8, 9.*8, 0"):
        weights.check_quantized(request(tmp_path, quantize="fp8"), cuda, "bfloat16")
    with pytest.raises(ConfigError, match=r"int4.*float16"):
        weights.check_quantized(request(tmp_path, quantize="int4"), cuda, "float16")
    weights.check_quantized(request(tmp_path, quantize="int4"), cuda, "bfloat16")
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    for options, library in ((dict(quantize="nf4"), "bitsandbytes"), (dict(quantize="int8"), "torchao")):
        with pytest.raises(MissingBackend, match=library):
            weights.check_quantized(request(tmp_path, **options), cuda, "bfloat16")
    (tmp_path / "a.gguf").touch()
    with pytest.raises(MissingBackend, match="gguf"):
        request(tmp_path, transformer=(str(tmp_path / "a.gguf"),))


@pytest.mark.slow
def test_every_method_acts_on_int8_weights():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    case = Case(adapter_for("WanTransformer3DModel"), tiny_wan())
    torchao.quantize_(case.transformer, torchao.Int8DynamicActivationInt8WeightConfig())
    before = outputs(case, 4)
    for name, row in TABLE.items():
        if name == "referencecache":  # which Wan has no references for
            continue
        with dit_accel.attach(case.transformer, *configs_of(row.active), preset="none"):
            after = outputs(case, 4)
        assert after.isfinite().all(), name
        assert not torch.equal(after, before), name
        assert torch.equal(outputs(case, 4), before), name


def test_loras_add_up_by_their_weights(tmp_path: Path, plain):
    one, two = lora(tmp_path / "one.safetensors"), lora(tmp_path / "two.safetensors", seed=1)
    alone = frames(request(tmp_path, lora=(str(one),)))
    assert psnr(alone, plain) < 40
    assert (frames(request(tmp_path, lora=(f"{one}=0",))) == plain).all()
    assert psnr(frames(request(tmp_path, lora=(f"{one}=0.25", f"{one}=0.75"))), alone) > 60
    assert psnr(frames(request(tmp_path, lora=(f"{one}=1.0", f"{two}=0.5"))), alone) < 40
    fused = load_pipeline(resolve(request(tmp_path, lora=(f"{one}=1.0",), fuse_lora=True)).request)
    assert not any("lora" in name for name, _ in fused.transformer.named_parameters())
    assert psnr(generate.run(fused, resolve(request(tmp_path)).request).frames.astype(float), alone) > 50
    (tmp_path / "copy.safetensors").write_bytes(one.read_bytes())
    names = [(), (str(one),), (str(two),), (f"{one}=0.5",), (str(one), str(two)), (str(two), str(one))]
    digests = [request_digest(request(tmp_path, lora=of)) for of in (*names, (str(tmp_path / "copy.safetensors"),))]
    assert (len({*digests}), digests[-1]) == (6, digests[1])
    pytest.importorskip("torchao", reason="torchao is not installed")
    assert psnr(frames(request(tmp_path, lora=(str(one),), quantize="int8-weights")), alone) > 30


def test_a_lora_for_the_second_expert_is_loaded_there(tmp_path: Path):
    pipe = open_pipeline(str(model_path("wan-tiny")), dtype="float32")
    second = WanTransformer3DModel.from_config(pipe.transformer.config)
    pipe.register_modules(transformer_2=second)
    loading.load_loras(pipe, [f"transformer_2:{lora(tmp_path / 'one.safetensors')}=0.5"])
    assert not any("lora" in name for name, _ in pipe.transformer.named_parameters())
    assert second.blocks[0].attn1.to_q.scaling == {"lora_0": 0.5}


def test_a_lora_of_another_model_is_refused_by_its_first_layer(tmp_path: Path):
    wide = lora(tmp_path / "wide.safetensors", num_attention_heads=8)
    deep = lora(tmp_path / "deep.safetensors", num_layers=40)
    flux = lora(tmp_path / "flux.safetensors", model="flux-tiny")
    for path, words in ((wide, "wide where"), (deep, "not there"), (flux, "not there")):
        with pytest.raises(ConfigError, match=f"{path.name} .*another .*{words}"):
            resolve(request(tmp_path, lora=(str(path),)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wan-lightning-4steps-v2", "--num-inference-steps 4 --guidance-scale 1 --shift 5"),
        ("Wan21_CausVid_14B", "--num-inference-steps 4 --guidance-scale 1"),
        ("Qwen-Image-Lightning-8steps", "--num-inference-steps 8 --guidance-scale 1 --shift 3"),
        ("Hyper-8step", "--num-inference-steps 8"),
        ("mine_16-steps", "--num-inference-steps 16 --guidance-scale 1"),
        ("a-style", None),
    ],
)
def test_options_of_few_step_loras_are_proposed_by_name_or_title(tmp_path: Path, name: str, options):
    call = CallSignature.of(WanPipeline)
    save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors", metadata={"ss_output_name": name})
    for file in (f"{name}.safetensors", "plain.safetensors"):
        found = list(proposals(request(tmp_path, lora=(str(tmp_path / file),)), call))
        assert [text.split("try ")[1].split(",")[0] for text in found] == ([options] if options else [])
    done = dict(num_inference_steps=4, guidance_scale=1.0, flow_shift=5.0)
    assert not list(proposals(request(tmp_path, lora=("owner/wan-lightning-4steps",), **done), call))


def test_presets_and_few_steps_that_do_not_fit_are_refused_before_anything_is_loaded(tmp_path: Path):
    few = str(lora(tmp_path / "wan-4steps.safetensors"))
    for options, words in (
        (dict(lora=(few,), preset="fast"), r"fast .*4steps.* 2; .*few-steps"),
        (dict(preset="few-steps", num_inference_steps=9), r"few-steps .* 9; .*balanced"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve(request(tmp_path, **options))
    for options in (dict(lora=(few,), preset="few-steps"), dict(lora=(few,), preset="fast", num_inference_steps=12)):
        assert resolve(request(tmp_path, **options)).request.preset == options["preset"]


def test_the_autoencoder_in_tiles_and_a_text_encoder_that_waits(tmp_path: Path, plain):
    pipe = load_pipeline(resolve(request(tmp_path, vae="tile,slice")).request)
    assert (pipe.vae.use_tiling, pipe.vae.use_slicing) == (True, True)
    loading._to_device(pipe, torch.device("cpu"), "text")  # where the hooks run and nothing moves
    made = generate.run(pipe, resolve(request(tmp_path)).request).frames
    assert (made == plain).all()  # the picture is smaller than a tile
    for part, waits in ((pipe.text_encoder, True), (pipe.transformer, False)):
        hooks = [module._diffusers_hook for module in part.modules() if hasattr(module, "_diffusers_hook")]
        assert any(hook.get_hook("group_offloading") for hook in hooks) is waits


def test_a_memory_is_estimated_kept_and_told(tmp_path: Path):
    needs = fit.Needs(text=10, transformers=(20, 20), vae=1, denoising=5, decoding=30, tiles=4)
    peaks = [needs.peak(offload, tiled) for offload in fit.OFFLOADS for tiled in (False, True)]
    assert peaks == [81, 56, 71, 46, 31, 25, 31, 6]
    decoding = dict(height=64, width=96, num_frames=17)
    resolved = resolve(request(tmp_path, **decoding))
    files = read_model_files(str(model_path("wan-tiny")))
    needs = fit.needs_of(resolved.request, files, resolved.family, on_cpu=True)
    pipe = load_pipeline(resolved.request)
    real = [sum(w.numel() * 4 for w in part.parameters()) for part in (pipe.text_encoder, pipe.transformer, pipe.vae)]
    assert [needs.text, *needs.transformers, needs.vae] == real
    latents = torch.zeros(1, pipe.vae.config.z_dim, 5, 64 // resolved.family.vae[1], 96 // resolved.family.vae[1])
    with torch.no_grad(), fit.Alive() as alive:
        pipe.vae.decode(latents)
    assert needs.decoding == pytest.approx(alive.most, rel=0.2)
    roomy, tight = (resolve(request(tmp_path, max_memory=size, **decoding)) for size in ("60GB", "0.01GB"))
    assert (roomy.request.vae, roomy.request.offload) == (None, "none")
    assert any("max_memory 60GB" in note for note in roomy.notes)
    assert any("which may not fit" in text for text in tight.warnings)
    text, below = fit.memory_used(tight.request, {"host": 2**30}) or ("", True)
    assert (text, below) == ("the run took 1 GiB of max_memory 0.01GB", False)
