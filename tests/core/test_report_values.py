"""What a report gives besides its text: values that a schema describes, a prediction, and HTML for notebooks."""

import json

import pytest
from jsonschema import Draft202012Validator
from torch import nn
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import PAG, EasyCache, RadialAttention, StaticCache
from dit_accel.adapters import installed
from dit_accel.estimate.prediction import estimate, predict_attached
from dit_accel.methods.base import Model
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.preset_figures import promise
from dit_accel.methods.presets import Choice, PresetMethods
from dit_accel.report.report import PredictedSpeedup
from dit_accel.report.schema import report_schema

RADIAL = RadialAttention(block_size=16, dense_steps=1, dense_layers=0)


@pytest.mark.parametrize(
    "methods", [(), (RADIAL,), (StaticCache(every=2), RADIAL), (PAG(layers="L1", scale=1.0),)], ids=len
)
def test_the_schema_describes_real_reports(methods):
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, *methods, preset="none", backend="torch") as attachment:
        before = json.loads(json.dumps(attachment.report().to_dict()))
        denoise(transformer, 4)
        data = json.loads(json.dumps(attachment.report().to_dict()))
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


def test_models_of_no_released_sizes_are_not_predicted():
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, RADIAL, backend="torch") as attachment:
        denoise(transformer, 2)
        report = attachment.report()
    assert report.predicted is None
    assert "predicted" not in str(report)


def test_notebooks_show_estimates_in_the_page_s_colours():
    adapter, family = installed.described("wan2.1-14b")
    page = estimate(adapter, family, methods=[RadialAttention()])._repr_html_()
    assert page.startswith(f"<div><b>wan2.1-14b: {family.width} x {family.height} pixels, ")
    assert ">radial</td>" in page
    assert not [text for text in ("<script", "color:#") if text in page]
