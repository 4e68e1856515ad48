"""Each image family's own pipelines, generating end to end with every method that applies, and telling what ran."""

import pytest
import torch
from dit_accel_pipelines.families.image_families import IMAGE_ADAPTERS
from some_cases import some
from tiny_image_pipelines import generate
from tiny_other_pipelines import PIPELINES

import dit_accel
from dit_accel.adapters import position_ids as positions
from dit_accel.methods.base import Place
from dit_accel.testing.method_cases import METHOD_CASES, cases_of, configs_of

BRANCHES = {  # of the models whose pipelines tell; the others' calls are counted, and two calls a step are these
    "qwen-image": ["cond", "uncond"], "flux2-klein": ["cond", "uncond"], "flux-kin": ["cond", "uncond"],
    "hunyuan-image": ["pred_cond", "pred_uncond"], "cogview": ["cond", "uncond"],
}  # fmt: skip


@pytest.mark.parametrize("name", some(PIPELINES, "flux", "sd3", "qwen-image", "z-image"))
def test_an_image_pipeline_generates_with_every_method_and_reports_it(name):
    pipe, call = PIPELINES[name]()
    plain = generate(pipe, call)
    with dit_accel.attach(pipe, preset="none") as attachment:
        states = list(dict.fromkeys(layer.state for layer in attachment.engine.layers))
        adapter = states[0].adapter
        assert name.startswith(adapter.name)
    applying = cases_of(adapter, states[0].transformer)
    assert {"sol", "lite", "sparsed"} <= set(applying)
    for method, case in applying.items():
        with dit_accel.attach(pipe, *configs_of(case.neutral), preset="none") as attachment:
            assert torch.equal(generate(pipe, call), plain)
            assert attachment.report().density == 1.0
        with dit_accel.attach(pipe, *configs_of(case.active), preset="none") as attachment:
            image = generate(pipe, call)
            report = attachment.report()
            print(f"{name}\n{report}")
            assert torch.equal(generate(pipe, call), image)
            assert attachment.report() == report
        assert image.isfinite().all()
        assert not torch.equal(image, plain)
        if Place.ATTENTION not in case.places:
            continue
        assert 0 < report.sparse_density <= 1
        assert (report.sparse_density < 1) == case.thins, method
        assert [step.step_index for step in report.steps] == sorted(step.step_index for step in report.steps)
        assert {step.step_index for step in report.steps} == set(range(call["num_inference_steps"]))
        for state in states:
            steps = [step for step in report.steps if step.transformer == state.name]
            assert {(step.dense_layers, step.sparse_layers) for step in steps} == {(0, len(state.layers))}
            branches = [step.branch for step in steps if step.step_index == 0]
            assert [step.branch for step in steps] == branches * call["num_inference_steps"]
            if name in BRANCHES:
                assert branches == BRANCHES[name]
    assert torch.equal(generate(pipe, call), plain)


def test_every_image_family_has_a_pipeline():
    missing = [a.name for a in IMAGE_ADAPTERS if not any(name.startswith(a.name) for name in PIPELINES)]
    assert not missing


@pytest.mark.parametrize(("name", "reads"), [("flux", 1), ("flux-kontext", 1), ("flux2", 1), ("flux2-references", 3)])
def test_positions_are_read_as_often_as_the_pipeline_makes_them(monkeypatch, name, reads):
    seen, first_image = [], positions.first_image
    monkeypatch.setattr(positions, "first_image", lambda ids: seen.append(len(ids)) or first_image(ids))
    pipe, call = PIPELINES[name]()
    with dit_accel.attach(pipe, METHOD_CASES["sol"].active):
        generate(pipe, call)
    assert len(seen) == reads  # FLUX.2 joins the ids of image and references anew at each of the three steps
