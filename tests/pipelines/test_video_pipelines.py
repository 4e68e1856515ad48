"""The later video families' own pipelines, generating with every method that applies, and telling what ran."""

import dataclasses

import pytest
import torch
from dit_accel_pipelines import VIDEO
from some_cases import some
from tiny_pipelines import PIPELINES as EARLIER
from tiny_video_pipelines import PIPELINES, generate

import dit_accel
from dit_accel.methods.base import Place
from dit_accel.testing.method_cases import METHOD_CASES, cases_of, configs_of

CONFIG = dataclasses.replace(METHOD_CASES["radial"].active, dense_steps=1, dense_layers=1)
GUIDED, TOLD = ["cond", "uncond"], ["pred_cond", "pred_uncond"]
BRANCHES = {
    "hunyuan-video-1.5": TOLD, "motif-video": TOLD, "ltx-2": ["cond_uncond", "uncond_stg", "uncond_modality"],
    "kandinsky-5": ["call 0", "call 1"], "framepack": ["call 0", "call 1"], "cosmos": ["call 0", "call 1"],
    **{name: ["call 0"] for name in ("minimax-h3", "easyanimate", "allegro", "anyflow")}, "wan-animate": ["cond"],
}  # fmt: skip
STEPS = {"minimax-h3": 3}  # its schedule of four points
LATENTS_ALONE = {"minimax-h3", "ltx-2", "allegro"}  # assembled without what decodes, or it decodes large tiles alone


@pytest.mark.parametrize("name", some(PIPELINES))
def test_a_video_pipeline_generates_and_reports_it(name):
    pipe, call = PIPELINES[name]()
    plain = generate(pipe, call)
    with dit_accel.attach(pipe, METHOD_CASES["radial"].neutral) as attachment:
        assert torch.equal(generate(pipe, call), plain)
        assert attachment.report().density == 1.0
    with dit_accel.attach(pipe, CONFIG) as attachment:
        sparse, report, layers = generate(pipe, call), attachment.report(), len(attachment.engine.layers)
    print(f"{name}\n{report}")
    assert sparse.isfinite().all()
    assert not torch.equal(sparse, plain)

    branches, family = BRANCHES.get(name, GUIDED), name.partition(" ")[0]
    found = [(step.step_index, step.branch, step.dense_layers, step.sparse_layers) for step in report.steps]
    assert [(step, branch) for step, branch, *_ in found] == [
        (step, branch) for step in range(STEPS.get(name, 4)) for branch in branches
    ]
    for step, branch, dense, thinned in found:
        spared = branch == "uncond_stg" and step  # LTX-2's perturbed block attends to nothing
        assert (dense, thinned + bool(spared)) == ((1, layers - 1) if step else (layers, 0))
    assert report.sparse_density < 0.95
    assert report.model == {"transformer": f"{family}, sizes of no released model"}

    state = attachment.engine.layers[0].state
    for method, case in cases_of(state.adapter, state.transformer).items():
        with dit_accel.attach(pipe, *configs_of(case.active), preset="none") as attachment:
            selected = generate(pipe, call, output_type="latent" if name in LATENTS_ALONE else "pt")
            assert Place.ATTENTION not in case.places or (attachment.report().sparse_density < 1) == case.thins, method
        assert selected.isfinite().all()
    assert torch.equal(generate(pipe, call), plain)


def test_every_video_family_has_a_pipeline():
    named = {name.partition(" ")[0] for name in (*EARLIER, *PIPELINES)}
    assert {adapter.name for adapter in VIDEO} == {"wan", *named}
