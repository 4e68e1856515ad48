"""Each video family's own pipeline, generating end to end with every method that applies, and telling what ran.

Wan's is in `test_attach_wan`, those of the later families in `test_video_pipelines`.
"""

import dataclasses

import pytest
import torch
from some_cases import some
from tiny_pipelines import PIPELINES, generate

import dit_accel
from dit_accel.methods.base import Place
from dit_accel.testing.method_cases import METHOD_CASES, cases_of, configs_of

CONFIG = dataclasses.replace(METHOD_CASES["radial"].active, dense_steps=1, dense_layers=1)
BRANCHES = {"hunyuan-video": ["cond", "uncond"], "mochi": ["cond_uncond"], "cogvideox": ["cond_uncond"]}


@pytest.mark.parametrize("name", some(PIPELINES, "mochi"))
def test_a_pipeline_generates_with_radial_and_reports_it(name):
    pipe, call = PIPELINES[name]()
    plain = generate(pipe, call)
    latents = generate(pipe, call, output_type="latent")
    assert plain.shape[:2] == (1, call["num_frames"])
    with dit_accel.attach(pipe, METHOD_CASES["radial"].neutral) as attachment:
        assert torch.equal(generate(pipe, call, output_type="latent"), latents)
        assert attachment.report().density == 1.0
    with dit_accel.attach(pipe, CONFIG) as attachment:
        sparse = generate(pipe, call)
        report = attachment.report()
        print(f"{name}\n{report}")
        assert torch.equal(generate(pipe, call), sparse)
        assert attachment.report() == report
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, plain)
    state = attachment.engine.layers[0].state
    for method, case in cases_of(state.adapter, state.transformer).items():
        with dit_accel.attach(pipe, *configs_of(case.active), preset="none") as attachment:
            assert generate(pipe, call, output_type="latent").isfinite().all()
            assert Place.ATTENTION not in case.places or (attachment.report().sparse_density < 1) == case.thins, method
    assert torch.equal(generate(pipe, call, output_type="latent"), latents)

    branches = BRANCHES.get(name, ["cond_uncond"])
    layers = len(attachment.engine.layers)
    assert [(s.step_index, s.branch, s.dense_layers, s.sparse_layers) for s in report.steps] == [
        (step, branch, 1 if step else layers, layers - 1 if step else 0) for step in range(4) for branch in branches
    ]
    assert report.sparse_density < 0.8
    assert report.model == {"transformer": f"{name.partition(' ')[0]}, sizes of no released model"}
    assert f"attention calls: {len(branches) * (layers + 3)} dense, {len(branches) * 3 * (layers - 1)} sparse" in str(
        report
    )
