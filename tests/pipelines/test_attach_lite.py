"""LiteAttention on pipelines: state by row and expert, weights that change, diffusers' guiders, report and plan."""

import dataclasses
import itertools
import json

import diffusers
import pytest
import tiny_models
import torch
from diffusers.guiders import PerturbedAttentionGuidance, SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from dit_accel_kernels import unpack_bits
from dit_accel_pipelines.families.wan import WAN
from typer.testing import CliRunner
from wan_tiny import generate, tiny_transformer

import dit_accel
from dit_accel import ConfigError, LiteAttention, RadialAttention, SparseD
from dit_accel.attachment.forward_state import as_tensors
from dit_accel.attachment.op import planned_attention
from dit_accel.cli.app import app
from dit_accel.estimate.prediction import estimate
from dit_accel.testing.recording import recorded

# Random weights make flat attention: a threshold this near to 0 drops what is new to no row of a tile.
ACTIVE = LiteAttention(block_size=16, threshold=-0.01, dense_steps=0)
RUTHLESS = dataclasses.replace(ACTIVE, threshold=1e3, allow_positive_threshold=True)


def test_it_drops_tiles_after_the_first_call_and_frees_everything_at_the_end(make_pipe):
    pipe = make_pipe(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=12.0))  # its second step drops some
    with dit_accel.attach(pipe, ACTIVE) as attachment:
        generate(pipe)
        report = attachment.report()
        assert not attachment.engine.handlers[0]._states
    assert report.state_bytes == {"lite": 3 * 2 * 4 * 2 * 5}  # layers, branches, bytes, heads, tiles
    by_step = [step.density for step in report.steps if step.branch == "cond"]
    assert by_step[0] == 1 > by_step[1]
    assert all(later <= earlier for earlier, later in itertools.pairwise(by_step))
    assert len(report.calls) == 4 * 2 * 3
    assert sum(report.calls[-1].by_head) / 2 == pytest.approx(report.calls[-1].density)
    assert json.loads(json.dumps(report.to_dict()))["calls"][0]["by_head"] == [1.0, 1.0]
    assert "lite seldom pays below 30000 visual tokens, and there are 80 here" in str(report)


def test_the_experts_of_wan_2_2_begin_anew(make_pipe):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipe = make_pipe(transformer_2=tiny_transformer(5, text_dim=96), boundary_ratio=0.6, scheduler=scheduler)
    with dit_accel.attach(pipe, RUTHLESS) as attachment:
        first = generate(pipe, num_inference_steps=10)
        assert torch.equal(generate(pipe, num_inference_steps=10), first)
        steps = attachment.report().steps
    for name in ("transformer", "transformer_2"):
        densities = [step.density for step in steps if (step.transformer, step.branch) == (name, "cond")]
        assert densities[0] == 1 > densities[1]


def test_another_lora_or_scale_within_a_run_begins_anew(make_pipe):
    from peft import LoraConfig

    pipe = make_pipe()
    transformer = pipe.transformer
    lora = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    transformer.add_adapter(lora, adapter_name="a")

    def dense_steps(change):
        def at_step(pipe, step, timestep, tensors):
            if step == 1:
                change()
            return tensors

        with dit_accel.attach(pipe, RUTHLESS) as attachment:
            generate(pipe, callback_on_step_end=at_step)
            steps = attachment.report().steps
        return [step.step_index for step in steps if step.branch == "cond" and step.density == 1]

    assert dense_steps(lambda: None) == [0]
    for change in (
        lambda: transformer.set_adapters(["a"], [0.5]),
        transformer.disable_lora,
        transformer.enable_lora,
        lambda: transformer.add_adapter(lora, adapter_name="b"),
        lambda: transformer.delete_adapters(["a", "b"]),
    ):
        assert dense_steps(change) == [0, 2]


def test_mochi_keeps_a_state_for_each_row():
    transformer, inputs = built(tiny_models.MOCHI[0], 2)
    with dit_accel.attach(transformer, ACTIVE, backend="reference") as attachment, recorded(attachment) as calls:
        for step in range(2):
            with torch.no_grad(), transformer.cache_context("cond_uncond", step_index=step, num_inference_steps=5):
                transformer(**inputs, return_dict=False)
        keys = attachment.engine.handlers[0]._states
        assert sorted(keys) == [("transformer", layer, "cond_uncond", row, 1) for layer in range(3) for row in range(2)]
    for call in calls[6:]:
        exact = unpack_bits(call.exact, -(-call.k.shape[2] // 16))
        assert len(exact) == 1
        assert exact[:, :, 14:].all()  # 224 visual tokens, then text
        assert exact[..., 14:].all()
        assert not exact.all()


def test_masks_that_are_no_key_padding_leave_the_call_dense_and_the_report_says_so():
    transformer = tiny_transformer().double()
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 80, 2, 16, dtype=torch.float64))
    mask, layer, grid = torch.randn(1, 1, 80, 80).double(), torch.tensor(0), as_tensors((5, 4, 4, 0, 0))
    step = dict(step_index=0, num_inference_steps=4)
    with dit_accel.attach(transformer, ACTIVE) as attachment, transformer.cache_context("cond", **step):
        out, _ = planned_attention(q, k, v, mask, layer, grid, attachment.engine.number, True, None, True)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        report = attachment.report()
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), (q, k, v)))
    assert "passes masks torch.float64 [1, 1, 80, 80]" in str(report)
    assert (report.steps[0].dense_layers, report.steps[0].stayed) == (1, {"mask": 1})
    radial = RadialAttention(block_size=16, dense_steps=0, dense_layers=0)
    with (
        dit_accel.attach(transformer, radial, ACTIVE) as attachment,
        transformer.cache_context("cond", **step),
        pytest.raises(ConfigError, match=r"sparse attention.*hide keys"),
    ):
        planned_attention(q, k, v, mask, layer, grid, attachment.engine.number, True, None, False)


def built(model, batch=1):
    torch.manual_seed(0)
    return model.transformer(**model.config).eval(), model.inputs(batch)


def guided(transformer, guider, inputs, steps=3):
    """Run a guider as diffusers' modular pipelines do; return the predictions by branch, one a step."""
    predictions = {}
    for step in range(steps):
        guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(1000 - 100 * step))
        third = guider.num_conditions == 3
        for name in guider._input_predictions if third else ["pred_cond", "pred_uncond"]:
            guider.prepare_models(transformer)
            with torch.no_grad(), transformer.cache_context(name):
                out = transformer(**{**inputs, "timestep": torch.tensor([1.0 - 0.1 * step])}, return_dict=False)[0]
            predictions.setdefault(name, []).append(out)
            guider.cleanup_models(transformer)
    return predictions


ALL = dict(start=0.0, stop=1.0)
GUIDERS = {
    "perturbed attention": (
        lambda: PerturbedAttentionGuidance(
            perturbed_guidance_layers=[1], perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
        ),
        (1, 1),
    ),
    "skipped layer": (
        lambda: SkipLayerGuidance(
            skip_layer_config=LayerSkipConfig([1]), skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
        ),
        (0, 1),
    ),
}  # fmt: skip
"""A guider, and how many layers of its third branch are dense and planned."""


@pytest.mark.parametrize("kind", GUIDERS)
def test_guiders_of_diffusers_perturb_their_branch_though_methods_are_attached(kind):
    """What the guider turns into values, or smooths, is left to diffusers' own attention."""
    make, layers = GUIDERS[kind]
    transformer, inputs = built(tiny_models.QWEN_IMAGE[0])
    plain = guided(transformer, make(), inputs)
    (third,) = plain.keys() - {"pred_cond", "pred_uncond"}
    assert not torch.equal(plain[third][0], plain["pred_cond"][1])  # the first step has two branches
    with dit_accel.attach(transformer, LiteAttention(dense_steps=1000)):
        neutral = guided(transformer, make(), inputs)
    assert all(torch.equal(a, b) for name in plain for a, b in zip(plain[name], neutral[name], strict=True))
    with dit_accel.attach(transformer, RUTHLESS) as attachment:
        first = guided(transformer, make(), inputs)
        steps = attachment.report().steps
        held = {key[1:3] for key in attachment.engine.handlers[0]._states}
        again = guided(transformer, make(), inputs)
    assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], again[name], strict=True))
    assert {(s.dense_layers, s.sparse_layers) for s in steps if s.branch == third} == {layers}
    assert {(s.dense_layers, s.sparse_layers) for s in steps if s.branch != third} == {(0, 2)}
    planned = {(layer, name) for layer in (0, 1) for name in plain} - {(1, third)}
    assert held == planned
    begun = [step.density for step in steps if step.branch == third]
    assert begun[1] < begun[0] == 1
    assert not any(part._diffusers_hook.hooks for part in transformer.modules() if hasattr(part, "_diffusers_hook"))


SIZE = dict(height=48, width=32, num_frames=9, num_inference_steps=3)
HELD = {
    "all layers": (LiteAttention(block_size=16, dense_steps=0),),
    "fewer layers": (LiteAttention(block_size=16, dense_steps=1, dense_layers=2),),
    "radial's tiles": (
        LiteAttention(dense_steps=0, dense_layers=2), RadialAttention(block_size=32, dense_steps=0, dense_layers=1),
    ),
    "sparsed": (SparseD(block_size=16, dense_steps=0, dense_layers=1),),
}  # fmt: skip


@pytest.mark.parametrize("methods", HELD.values(), ids=HELD)
def test_what_is_planned_is_what_a_run_holds(make_pipe, methods):
    name, family = methods[0].name, WAN.families[-1]
    planned = estimate(WAN, family, methods=methods, **SIZE)
    sizes = dict(num_attention_heads=family.heads, attention_head_dim=family.head_dim, num_layers=family.layers)
    pipe = make_pipe(transformer=tiny_transformer(text_dim=96, **sizes))
    with dit_accel.attach(pipe, *methods, preset="none") as attachment:
        generate(pipe, **SIZE)
        report = attachment.report()
    assert report.state_bytes[name] == planned.carried_bytes[name] > 0
    assert planned.state_bytes == planned.tile_list_bytes + planned.carried_bytes[name]
    assert planned.to_dict()["carried_bytes"] == dict(planned.carried_bytes)


def test_the_plan_shows_what_is_held():
    arguments = ["plan", "--family", "wan2.1-14b", "--lite", "--set", "lite.dense_layers=0"]
    assert "lite state  137 MiB, held from step to step" in CliRunner().invoke(app, arguments).stdout
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(result.stdout)["carried_bytes"] == {"lite": 40 * 2 * 4 * 40 * 591 * 19}
