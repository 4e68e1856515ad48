"""Stock pipelines with every method that applies: themselves under neutral settings, and what their reports tell."""

import pytest
import torch
from some_cases import some
from tiny_stock import run_stock, stock_pipeline

import dit_accel
from dit_accel.adapters import position_ids as positions
from dit_accel.methods.base import Place
from dit_accel.testing.method_cases import METHOD_CASES, cases_of, configs_of

GUIDED, TOLD, COUNTED = ("cond", "uncond"), ("pred_cond", "pred_uncond"), ("call 0", "call 1")
ALONE = ("call 0",)
BRANCHES = {
    **dict.fromkeys(("QwenImagePipeline", "QwenImageEditPipeline", "Flux2KleinPipeline", "OvisImagePipeline"), GUIDED),
    **dict.fromkeys(("CogView4Pipeline", "HunyuanVideoPipeline", "SkyReelsV2Pipeline", "HeliosPipeline"), GUIDED),
    **dict.fromkeys(("HunyuanImagePipeline", "HunyuanVideo15Pipeline", "MotifVideoPipeline"), TOLD),
    **dict.fromkeys(("Kandinsky5T2VPipeline", "HunyuanVideoFramepackPipeline", "CosmosTextToWorldPipeline"), COUNTED),
    **dict.fromkeys(
        ("EasyAnimatePipeline", "AllegroPipeline", "AnyFlowPipeline", "MiniMaxH3ModularPipeline"), ("call 0",)
    ),
    **dict.fromkeys(("MochiPipeline", "CogVideoXPipeline", "LTXPipeline"), ("cond_uncond",)),
    "LTX2Pipeline": ("cond_uncond", "uncond_stg", "uncond_modality"),
    "WanImageToVideoPipeline, a timestep a token": GUIDED,
    "WanAnimatePipeline": ("cond",),
}
"""Pipeline class -> the branches of a step, in the order in which they run; those that are told, and those counted."""

OTHERS = ("FluxPipeline", "StableDiffusion3Pipeline", "ZImagePipeline", "Ideogram4Pipeline", "LTXConditionPipeline")
STEPS = {"MiniMaxH3ModularPipeline": 3}  # its schedule of four points
QUICK = ("FluxPipeline", "MochiPipeline", "QwenImagePipeline", "Kandinsky5T2VPipeline")
SLOW = ("StableDiffusion3Pipeline", "HunyuanVideo15Pipeline", "LTX2Pipeline", "Ideogram4Pipeline")


@pytest.mark.parametrize("name", some([*BRANCHES, *OTHERS], *QUICK, slow=SLOW))
def test_a_pipeline_runs_with_every_method_and_tells_what_ran(name):
    pipe, call = stock_pipeline(name)
    plain = run_stock(pipe, call)
    with dit_accel.attach(pipe, preset="none") as attachment:
        states = list(dict.fromkeys(layer.state for layer in attachment.engine.layers))
    for method, case in cases_of(states[0].adapter, states[0].transformer).items():
        with dit_accel.attach(pipe, *configs_of(case.neutral), preset="none") as attachment:
            assert torch.equal(run_stock(pipe, call), plain), method
            assert attachment.report().density == 1.0, method
        with dit_accel.attach(pipe, *configs_of(case.active), preset="none") as attachment:
            made, report = run_stock(pipe, call), attachment.report()
        assert made.isfinite().all(), method
        assert not torch.equal(made, plain), method
        assert report.model["transformer"] == f"{states[0].adapter.name}, sizes of no released model"
        if Place.ATTENTION not in case.places:
            continue
        assert (0 < report.sparse_density < 1) == case.thins, method
        count = STEPS.get(name, call["num_inference_steps"])
        branches = tuple(step.branch for step in report.steps if step.step_index == 0)
        assert name not in BRANCHES or branches == BRANCHES[name]
        assert [(step.step_index, step.branch) for step in report.steps] == [
            (index, branch) for index in range(count) for branch in branches
        ]
        for state in states:
            layers = {step.dense_layers + step.sparse_layers for step in report.steps if step.transformer == state.name}
            spared = {len(state.layers) - 1} if name == "LTX2Pipeline" else set()  # its perturbed block attends to none
            assert layers == {len(state.layers)} | spared
    assert torch.equal(run_stock(pipe, call), plain)


@pytest.mark.parametrize(
    ("name", "reads"),
    [("FluxPipeline", 1), ("FluxKontextPipeline", 1), ("Flux2Pipeline", 1), ("Flux2Pipeline, references", 3)],
)
def test_positions_are_read_as_often_as_the_pipeline_makes_them(monkeypatch, name, reads):
    seen, first_image = [], positions.first_image
    monkeypatch.setattr(positions, "first_image", lambda ids: seen.append(len(ids)) or first_image(ids))
    pipe, call = stock_pipeline(name)
    with dit_accel.attach(pipe, METHOD_CASES["sol"].active):
        run_stock(pipe, call)
    assert len(seen) == reads  # FLUX.2 joins the ids of image and references anew at each of the three steps
