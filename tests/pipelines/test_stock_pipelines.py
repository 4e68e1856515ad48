"""Reports of stock pipelines: the branches of their steps, in order, and every layer of each."""

import pytest
from some_cases import some
from tiny_stock import run_stock, stock_pipeline

import dit_accel
from dit_accel import SparseD
from dit_accel.adapters import position_ids as positions

GUIDED, TOLD, COUNTED, ONE = ("cond", "uncond"), ("pred_cond", "pred_uncond"), ("call 0", "call 1"), ("call 0",)
BRANCHES = {
    **dict.fromkeys(("QwenImagePipeline", "QwenImageEditPipeline", "Flux2KleinPipeline", "OvisImagePipeline"), GUIDED),
    **dict.fromkeys(("CogView4Pipeline", "HunyuanVideoPipeline", "SkyReelsV2Pipeline", "HeliosPipeline"), GUIDED),
    **dict.fromkeys(("HunyuanImagePipeline", "HunyuanVideo15Pipeline", "MotifVideoPipeline"), TOLD),
    **dict.fromkeys(("Kandinsky5T2VPipeline", "HunyuanVideoFramepackPipeline", "CosmosTextToWorldPipeline"), COUNTED),
    **dict.fromkeys(("EasyAnimatePipeline", "AllegroPipeline", "AnyFlowPipeline", "MiniMaxH3ModularPipeline"), ONE),
    **dict.fromkeys(("MochiPipeline", "CogVideoXPipeline", "LTXPipeline"), ("cond_uncond",)),
    "LTX2Pipeline": ("cond_uncond", "uncond_stg", "uncond_modality"),
    "WanImageToVideoPipeline, a timestep a token": GUIDED,
    "WanAnimatePipeline": ("cond",),
}
"""Pipeline class -> the branches of a step, in the order in which they run; those that are told, and those counted."""

STEPS = {"MiniMaxH3ModularPipeline": 3}  # its schedule of four points
QUICK = ("Flux2KleinPipeline", "HunyuanImagePipeline", "Kandinsky5T2VPipeline", "AllegroPipeline", "LTXPipeline")


@pytest.mark.parametrize("name", some(BRANCHES, *QUICK))
def test_a_report_tells_the_branches_of_every_step_and_their_layers(name):
    pipe, call = stock_pipeline(name)
    with dit_accel.attach(pipe, SparseD(block_size=16, density=0.5, dense_steps=0, dense_layers=0)) as attachment:
        run_stock(pipe, call)
        states = list(dict.fromkeys(layer.state for layer in attachment.engine.layers))
        report = attachment.report()
    assert report.model["transformer"] == f"{states[0].adapter.name}, sizes of no released model"
    assert 0 < report.sparse_density < 1
    count = STEPS.get(name, call["num_inference_steps"])
    expected = [(index, branch) for index in range(count) for branch in BRANCHES[name]]
    assert [(step.step_index, step.branch) for step in report.steps] == expected
    for state in states:
        layers = {step.dense_layers + step.sparse_layers for step in report.steps if step.transformer == state.name}
        spared = {len(state.layers) - 1} if name == "LTX2Pipeline" else set()  # its perturbed block attends to none
        assert layers == {len(state.layers)} | spared


@pytest.mark.parametrize(
    ("name", "reads"),
    [("FluxPipeline", 1), ("FluxKontextPipeline", 1), ("Flux2Pipeline", 1), ("Flux2Pipeline, references", 3)],
)
def test_positions_are_read_as_often_as_the_pipeline_makes_them(monkeypatch, name, reads):
    seen, first_image = [], positions.first_image
    monkeypatch.setattr(positions, "first_image", lambda ids: seen.append(len(ids)) or first_image(ids))
    pipe, call = stock_pipeline(name)
    with dit_accel.attach(pipe, SparseD(block_size=16, density=0.5, dense_steps=0, dense_layers=0)):
        run_stock(pipe, call)
    assert len(seen) == reads  # FLUX.2 joins the ids of image and references anew at each of the three steps
