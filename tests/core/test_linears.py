"""Linear layers in 8 bits, and what a report gives besides its text: values of a schema, and a prediction."""

import json
import math

import pytest
import torch
from jsonschema import Draft202012Validator
from torch import nn
from typer.testing import CliRunner
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import PAG, EasyCache, RadialAttention, StaticCache
from dit_accel.adapters import installed
from dit_accel.adapters.installed import described
from dit_accel.cli.app import app
from dit_accel.errors import ConfigError
from dit_accel.estimate.hardware import HARDWARE, card_called, linears_of, linears_of_config
from dit_accel.estimate.prediction import Prediction, estimate, predict_attached
from dit_accel.methods.base import Model
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.preset_figures import promise
from dit_accel.methods.presets import Choice, PresetMethods
from dit_accel.report.report import PredictedSpeedup
from dit_accel.report.schema import report_schema

WAN_720P = dict(height=720, width=1280, num_frames=81)


def plan(name: str, **options) -> Prediction:
    return estimate(*described(name), **options)


def quantised(
    transformer: nn.Module, dtype: torch.dtype = torch.int8, inputs: bool = True, only: str = ""
) -> nn.Module:
    """Give linear weights what torchao's tensors hold."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and only in name:
            module.weight.qdata = torch.zeros(module.weight.shape, dtype=dtype)
            module.weight.act_quant_kwargs = object() if inputs else None
    return transformer


def test_near_the_published_whole_pipelines():
    for family, sizes, kind, card, seconds in (
        ("flux.1-dev", {}, "fp8", "h100", (4.209, 3.039)),
        ("flux.1-dev", {}, "int8", "h100", (4.209, 3.406)),
        ("cogvideox-5b", dict(height=480, width=720, num_frames=49), "fp8", "h100", (87.455, 75.255)),
        ("cogvideox-5b", dict(height=480, width=720, num_frames=49), "int8", "h100", (87.455, 78.945)),
        ("cogvideox-5b", dict(height=480, width=720, num_frames=49), "int8", "a100-80gb", (211.377, 177.666)),
    ):
        # diffusers-torchao's tables, compiled, 16 bits against 8: text encoder, autoencoder and norms are in the
        # seconds and not in the prediction
        published = seconds[0] / seconds[1]
        assert 0.96 * published < plan(family, **sizes, linears=kind, hardware=card).speedup < 1.09 * published


def test_each_factor_is_beside_those_before_it():
    methods = [RadialAttention(), StaticCache(every=2)]
    stack = plan("wan2.1-14b", **WAN_720P, methods=methods, linears="fp8")
    less = plan("wan2.1-14b", **WAN_720P, methods=methods)
    alone = plan("wan2.1-14b", **WAN_720P, linears="fp8")
    assert less.factors["linears"] == 1
    assert less.speedup == less.speedup_of_methods
    assert math.prod(stack.factors.values()) == pytest.approx(stack.speedup, rel=1e-12)
    assert stack.factors["linears"] == pytest.approx(stack.speedup / less.speedup, rel=1e-12)
    assert stack.factors["linears"] > alone.speedup > 1.05
    assert alone.speedup == pytest.approx(1 / (1 - alone.linear_share * (1 - alone.linear_time)), rel=1e-12)
    assert stack.speedup_of_methods == pytest.approx(stack.speedup / alone.speedup, rel=1e-12)
    assert "linear layers in fp8, weights and activations" in alone._repr_html_()
    assert "linear layers" not in less._repr_html_()


def test_quantising_the_inputs_takes_time():
    inputs = 4 * 5120 + (5120 + 13824) + 2 * 5120  # numbers a token, of 2 bytes read and 1 written
    flops = 12 * 5120**2 + 4 * 5120 * 13824
    free = 3 * inputs / 3350e9 / (flops / (0.75 * 989.4e12))
    assert plan("wan2.1-14b", linears="fp8").linear_time == pytest.approx(1.2 * 989.4 / 1978.9 + free, rel=2e-3)
    assert plan("wan2.1-14b", linears="fp8", linear_cost=1.0).linear_time == pytest.approx(0.5 + free, abs=1e-3)
    assert plan("wan2.1-14b", linears="fp8", linear_cost=2.0).speedup < 1


def test_weights_alone_take_a_byte_and_save_no_time():
    plain, eight = plan("wan2.1-14b"), plan("wan2.1-14b", linears="weight-only", hardware="24GB")
    assert plain.weight_bytes == 2 * 40 * (8 * 5120**2 + 2 * 5120 * 13824) == 2 * eight.weight_bytes
    assert plain.speedup == eight.speedup == 1
    assert any("save memory and no time" in note for note in eight.notes)
    for kind, size in (("int8-weights", 1), ("fp8-weights", 1), ("int4", 0.53), ("nf4", 0.56), ("fp8", 1)):
        fewer = plan("wan2.1-14b", linears=kind)
        assert fewer.weight_bytes == pytest.approx(size / 2 * plain.weight_bytes)
        assert (fewer.speedup > 1) == (kind == "fp8")
        assert dit_accel.recommend("wan2.1-14b", quantize=kind).weight_bytes == fewer.weight_bytes
    seconds = [
        dit_accel.recommend("wan2.1-14b", hardware="h100", quantize=kind).settings[-1].seconds for kind in (None, "fp8")
    ]
    assert 1.05 < seconds[0] / seconds[1] < plan("wan2.1-14b", linears="fp8").speedup
    for model, kind in (("wan2.1-14b", "int9"), (tiny_transformer(), "int8")):
        with pytest.raises(ConfigError, match=kind):
            dit_accel.recommend(model, quantize=kind)


@pytest.mark.parametrize(
    ("dtype", "inputs", "kind"),
    [(torch.int8, True, "int8"), (torch.int8, False, "weight-only"), (torch.float8_e4m3fn, True, "fp8")],
)
def test_read_off_a_loaded_model(dtype, inputs, kind):
    assert linears_of(tiny_transformer()) is None
    adapted = quantised(tiny_transformer(), dtype, inputs)
    adapted.lora_A = nn.Linear(1000, 1000)
    assert (linears_of(adapted).kind, linears_of(adapted).share) == (kind, 1.0)
    part = linears_of(quantised(tiny_transformer(), dtype, inputs, only="blocks.0."))
    assert part.kind == kind
    assert 0 < part.share < 1
    assert f"{part.share:.0%} of the linear weights are" in part.notes[0]


def test_torchaos_own_tensors_are_read():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    for config, kind in ((torchao.Int8DynamicActivationInt8WeightConfig(), "int8"),
                         (torchao.Int8WeightOnlyConfig(), "weight-only")):  # fmt: skip
        transformer = tiny_transformer()
        torchao.quantize_(transformer, config)
        assert linears_of(transformer).kind == kind


def test_a_saved_models_config_tells():
    data = {"default": {"_type": "Int8DynamicActivationInt8WeightConfig", "_data": {"reduce_range": False}}}
    config = {"quantization_config": {"quant_method": "torchao", "quant_type": data}}
    assert linears_of_config({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}) is None
    run = plan("wan2.1-14b", config=config)
    assert run.linears.kind == "int8"
    assert run.notes[0] == "100% of the linear weights are in int8, weights and activations, by the model's config"
    assert plan("wan2.1-14b", config=config, linears="weight-only").linears.kind == "weight-only"


def test_a_report_predicts_beside_them():
    adapter, family = described("wan2.1-14b")
    handlers = make_handlers([RadialAttention()], Model(adapter=adapter, family=family, heads=40, layers=40))
    layout = plan("wan2.1-14b", **WAN_720P).layout
    plain = predict_attached(handlers, layout, 50, None, tiny_transformer())
    eight = predict_attached(handlers, layout, 50, None, quantised(tiny_transformer()))
    assert eight.speedup > plain.speedup  # attention is more of the time where linear layers take less
    assert str(plain) == f"predicted {plain.speedup:.2f}"
    assert str(eight) == f"predicted {eight.speedup:.2f} with linear layers in int8, weights and activations"


def test_recommend_counts_them_in_the_dense_run_too():
    plain, eight = (
        dit_accel.recommend(model, hardware="h100") for model in (tiny_transformer(), quantised(tiny_transformer()))
    )
    dense, other = (next(row for row in found.settings if row.name == "dense") for found in (eight, plain))
    assert dense.speedup == other.speedup == 1
    assert dense.seconds > other.seconds  # 32 wide: quantising the inputs takes longer than the products save
    assert eight.weight_bytes < 0.5 * plain.weight_bytes
    assert "speed-ups are over the dense run of the model as it is" in eight.notes
    eight_bits = quantised(tiny_transformer(), torch.float8_e4m3fn)
    for refusing in (linears_of, lambda model, card: dit_accel.recommend(model, hardware=card.name)):
        with pytest.raises(ConfigError, match="a100-80gb"):
            refusing(eight_bits, HARDWARE["a100-80gb"])


def test_cards_by_their_names(monkeypatch):
    for name, card in (("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
                       ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("Tesla V100", None)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = card_called("cuda")
        assert (found and found.name) == card


def test_the_command_prints_each_factor():
    words = "--family wan2.1-14b --radial --staticcache --set staticcache.every=2 --linears fp8"
    result = CliRunner().invoke(app, ["plan", *words.split()])
    text = " ".join(result.stdout.split())
    for part in ("by computed forwards and blocks x", "by sparse attention x", "by 8-bit linear layers", "27.7% of the",
                 "fp8 on h100 takes 0.66", "13.1 GiB or more, 26.2 GiB in 16 bits"):  # fmt: skip
        assert part in text
    assert "without torch.compile" in " ".join(result.stderr.split())
    weights = CliRunner().invoke(app, ["plan", *words.split()[:2], "--linears", "weight-only"])
    assert "predicted speed-up" not in weights.stdout


RADIAL = RadialAttention(block_size=16, dense_steps=1, dense_layers=0)


@pytest.mark.parametrize(
    "methods", [(), (RADIAL,), (StaticCache(every=2), RADIAL), (PAG(layers="L1", scale=1.0),)], ids=len
)
def test_the_schema_describes_real_reports(methods):
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, *methods, preset="none", backend="torch") as attachment:
        before = json.loads(json.dumps(attachment.report().to_dict()))
        denoise(transformer, 4)
        report = attachment.report()
    assert report.predicted is None  # no model of these sizes is released
    assert "predicted" not in str(report)
    data = json.loads(json.dumps(report.to_dict()))
    schema = Draft202012Validator(report_schema())
    assert [*schema.iter_errors(before), *schema.iter_errors(data)] == []
    assert data["version"] == 2
    assert data["measured_speedup"] == data["timing"]["speedup"]
    data["steps"][0]["density"] = "much"
    del data["notes"]
    data["more"] = 1
    assert len([*schema.iter_errors(data)]) == 3


PRESET = Choice(EasyCache(threshold=0.05, min_steps=10), "all", "", "", level="fast")


def test_a_report_predicts_what_plan_says():
    adapter, family = installed.described("wan2.1-14b")
    model, dense = Model(adapter=adapter, family=family, heads=40, layers=40), estimate(adapter, family)

    def predicted(*methods, steps=30, preset=None):
        return predict_attached(make_handlers(methods, model), dense.layout, steps, preset, nn.Linear(1, 1))

    planned = estimate(adapter, family, methods=[RadialAttention()])
    assert predicted(RadialAttention(), steps=50) == PredictedSpeedup(speedup=planned.speedup)
    assert predicted(PRESET.config) == PredictedSpeedup(speedup=1.0, uncounted=("easycache",))
    assert str(predicted(PRESET.config)).startswith("not predicted: what easycache saves")
    assert " without easycache" in str(predicted(PRESET.config, RadialAttention()))
    preset = PresetMethods("fast", model, (PRESET,))
    measured = estimate(adapter, family, num_inference_steps=30, preset=preset)
    assert predicted(PRESET.config, preset=preset) == PredictedSpeedup(speedup=measured.speedup)
    assert measured.speedup == pytest.approx(1 / (1 - promise("fast", 30).skipped))
    assert predicted(PRESET.config, preset=preset, steps=8) == PredictedSpeedup(speedup=1.0)  # computed whole
    some = PredictedSpeedup(speedup=2.0, uncounted=("seacache",), linears="in int8, weights and activations")
    assert str(some).startswith("predicted 2.00 with linear layers in int8, weights and activations, without seacache,")


def test_the_report_asks_the_attached_transformer_and_knows_its_preset(monkeypatch):
    adapter, family = installed.described("wan2.1-14b")
    seen = []
    monkeypatch.setattr(dit_accel.estimate.prediction, "linears_of", seen.append)
    monkeypatch.setattr(
        "dit_accel.attachment.attachment.model_of",
        lambda transformer: Model(adapter=adapter, family=family, heads=4, layers=len(transformer.blocks)),
    )
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, preset="fast", backend="torch") as attachment:
        denoise(transformer, 12)
        assert attachment.report().predicted.uncounted == ()
        assert attachment.report().predicted.speedup == pytest.approx(1 / (1 - promise("fast", 12).skipped))
    assert seen[0] is transformer
