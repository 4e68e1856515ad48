"""What a report gives besides its text: values that a schema describes, a prediction, and HTML for notebooks."""

import json

import pytest
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import PAG, EasyCache, RadialAttention, StaticCache
from dit_accel.adapters import installed
from dit_accel.estimate.estimate import estimate
from dit_accel.estimate.predicted import predicted
from dit_accel.methods.base import Model
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.preset_figures import promise
from dit_accel.methods.presets import PRESETS, PresetMethods
from dit_accel.report.predicted import Predicted
from dit_accel.report.schema import report_schema

TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None),
         "boolean": bool}  # fmt: skip
RADIAL = RadialAttention(block_size=16, dense_steps=1, dense_layers=0)


def faults(value, schema, where="report"):
    """What of a schema a value breaks: of the words of JSON Schema those that ours has."""
    if "const" in schema and value != schema["const"]:
        yield f"{where}: {value} is not {schema['const']}"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value} is none of {schema['enum']}"
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(
        isinstance(value, TYPES[name]) for name in types if isinstance(value, bool) == (name == "boolean")
    ):
        yield f"{where}: {value!r} is no {types}"
    elif "minimum" in schema and value < schema["minimum"]:
        yield f"{where}: {value} is below {schema['minimum']}"
    if isinstance(value, list):
        for place, one in enumerate(value):
            yield from faults(one, schema.get("items", {}), f"{where}[{place}]")
    if isinstance(value, dict):
        yield from (f"{where} has no {name}" for name in schema.get("required", ()) if name not in value)
        further = schema.get("additionalProperties", True)
        for name, one in value.items():
            yield from faults(name, schema.get("propertyNames", {}), f"{where}, key")
            if name in schema.get("properties", {}):
                yield from faults(one, schema["properties"][name], f"{where}.{name}")
            elif further is False:
                yield f"{where}.{name} is not described"
            elif further is not True:
                yield from faults(one, further, f"{where}.{name}")


@pytest.mark.parametrize(
    "methods", [(), (RADIAL,), (StaticCache(every=2), RADIAL), (PAG(layers="L1", scale=1.0),)], ids=len
)
def test_the_schema_describes_real_reports(methods):
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, *methods, preset="none", backend="torch") as attachment:
        before = json.loads(json.dumps(attachment.report().to_dict()))
        denoise(transformer, 4)
        data = json.loads(json.dumps(attachment.report().to_dict()))
    assert [*faults(before, report_schema())] == []
    assert [*faults(data, report_schema())] == []
    assert data["version"] == 2
    assert data["measured_speedup"] == data["timing"]["speedup"]
    data["steps"][0]["density"] = "much"
    del data["notes"]
    data["more"] = 1
    assert len([*faults(data, report_schema())]) == 3


def handlers(*methods, family="wan2.1-14b"):
    adapter, sizes = installed.described(family)
    return make_handlers(methods, Model(adapter=adapter, family=sizes, heads=sizes.heads, layers=sizes.layers)), sizes


def test_what_was_predicted_is_what_plan_says():
    made, family = handlers(RadialAttention())
    adapter, _ = installed.described(family.name)
    planned = estimate(adapter, family, methods=[RadialAttention()])
    found = predicted(made, planned.layout, planned.num_inference_steps)
    assert found == Predicted(speedup=planned.speedup)
    assert planned.speedup > 1
    assert str(found) == f"predicted {planned.speedup:.2f}"


def test_a_cache_that_decides_by_data_is_predicted_where_it_was_measured_alone():
    made, family = handlers(EasyCache(threshold=0.05, min_steps=10))
    adapter, _ = installed.described(family.name)
    layout = estimate(adapter, family).layout
    assert predicted(made, layout, 30) == Predicted(speedup=1.0, uncounted=("easycache",))
    assert str(predicted(made, layout, 30)).startswith("not predicted: what easycache saves")
    preset = PresetMethods("fast", made[0].model, PRESETS["fast"][:1])
    skipped = promise("fast", 30).skipped
    assert predicted(made, layout, 30, preset).speedup == pytest.approx(1 / (1 - skipped), rel=0.05)
    assert predicted(made, layout, 8, preset) == Predicted(speedup=1.0)  # computed whole
    both, _ = handlers(EasyCache(threshold=0.05), RadialAttention())
    assert " without easycache" in str(predicted(both, layout, 30))


def test_models_of_no_released_sizes_are_not_predicted():
    transformer = tiny_transformer()
    with dit_accel.attach(transformer, RADIAL, backend="torch") as attachment:
        denoise(transformer, 2)
        report = attachment.report()
    assert report.predicted is None
    assert "predicted" not in str(report)


def test_notebooks_show_descriptions_and_estimates_in_the_page_s_colours():
    described = dit_accel.describe(tiny_transformer())._repr_html_()
    assert described.startswith("<div><b>transformer: WanTransformer3DModel, adapter wan")
    assert "<td" in described
    assert "easycache" in described
    adapter, family = installed.described("wan2.1-14b")
    page = estimate(adapter, family, methods=[RadialAttention()])._repr_html_()
    assert page.startswith(f"<div><b>wan2.1-14b: {family.width} x {family.height} pixels, ")
    assert ">radial</td>" in page
    assert "<script" not in described + page
    assert "color:#" not in described + page
