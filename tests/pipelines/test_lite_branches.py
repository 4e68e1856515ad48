"""LiteAttention with more branches than two, and what it holds from step to step."""

import dataclasses
import itertools
import json
import math

import diffusers
import pytest
import tiny_models
import torch
from diffusers.guiders import PerturbedAttentionGuidance, SkipLayerGuidance, SmoothedEnergyGuidance
from diffusers.hooks import HookRegistry, LayerSkipConfig
from dit_accel_pipelines.families.wan import WAN
from typer.testing import CliRunner
from wan_tiny import generate, tiny_transformer

import dit_accel
from dit_accel import LiteAttention, RadialAttention, SparseD
from dit_accel.adapters import installed
from dit_accel.cli.app import app
from dit_accel.estimate.prediction import estimate
from dit_accel.estimate.sizes import token_layout
from dit_accel.methods.base import AttentionHandler, Model, Phase
from dit_accel.methods.config import MethodConfig
from dit_accel.testing.recording import recorded
from dit_accel.testing.reference import attention

BRANCHES = ("cond", "uncond", "perturbed")
GUIDED = ("pred_cond", "pred_uncond", "pred_cond_skip")
STEPS = 5
LITE = LiteAttention(block_size=16, threshold=-0.002, dense_steps=0)
RUTHLESS = dataclasses.replace(LITE, threshold=1e3, allow_positive_threshold=True)


class MixingConfig(MethodConfig):
    name = "mixing"


class Mixing(AttentionHandler):
    """Replaces a share of each head's output by V in one branch, and does nothing else."""

    config_type = MixingConfig
    phase = Phase.TRANSFORMS

    def __init__(self, branch: str, model: Model) -> None:
        super().__init__(MixingConfig(), model)
        self.branch = branch

    def plan(self, plan, call, context):
        return plan.mix(torch.tensor([0.25, 0.75])) if context.branch == self.branch else plan


def run_branches(transformer, latents, text, branches=BRANCHES, told=True, mixing="perturbed"):
    """Run steps of sequential branches; return (branch, layer) -> planned calls, branch -> outputs, and the report."""
    calls_of, outs = {}, {branch: [] for branch in branches}
    with dit_accel.attach(transformer, LITE, backend="reference") as attachment, recorded(attachment) as calls:
        execution = attachment.engine
        (lite,) = execution.handlers
        execution.use((Mixing(mixing, lite.model), lite))
        for step in range(STEPS):
            where = dict(step_index=step, num_inference_steps=STEPS) if told else {}
            for branch in branches:
                with torch.no_grad(), transformer.cache_context(branch, **where):
                    at = torch.tensor([1000.0 - 100 * step])
                    outs[branch].append(transformer(latents[step], at, text[branch], return_dict=False)[0])
                for layer, call in enumerate(calls[-3:]):
                    calls_of.setdefault((branch, layer), []).append(call)
        report = attachment.report()
        held = len(lite._states)
    assert len(calls) == STEPS * len(branches) * 3
    return calls_of, outs, report, held


@pytest.fixture
def inputs():
    transformer = tiny_transformer().double()
    latents = torch.randn(1, 1, 12, 5, 8, 8).double() + 0.1 * torch.randn(STEPS, 1, 12, 5, 8, 8).double()
    text = {name: torch.randn(1, 6, 64).double() for name in ("cond", "uncond")}
    with torch.no_grad():
        for block in transformer.blocks:  # so that the text matters
            block.attn2.to_out[0].weight.mul_(40)
    return transformer, latents, text


@pytest.mark.parametrize("names", [BRANCHES, GUIDED], ids=["ours", "diffusers' guiders"])
@pytest.mark.parametrize("told", [True, False], ids=["steps told", "steps from timesteps"])
def test_three_branches_keep_three_states_one_of_them_mixed_with_identity(inputs, names, told):
    """Each evolves as it does alone; the mix changes the third branch's outputs, not how its calls vote."""
    transformer, latents, text = inputs
    texts = dict(zip(names, (text["cond"], text["uncond"], text["cond"]), strict=True))
    together, outs, report, held = run_branches(transformer, latents, texts, names, told, names[2])
    assert held == (0 if told else 9)
    assert {(step.branch, step.step_index) for step in report.steps} == {(n, s) for n in names for s in range(STEPS)}
    for name in names:
        alone, same, *_ = run_branches(transformer, latents, texts, (name,), told, names[2])
        assert all(torch.equal(one, other) for one, other in zip(outs[name], same[name], strict=True))
        for layer in range(3):
            pairs = zip(together[name, layer], alone[name, layer], strict=True)
            assert all(torch.equal(one.exact, other.exact) for one, other in pairs)
        assert report.sparse_density < 1
    assert not torch.equal(outs[names[0]][0], outs[names[2]][0])
    for (name, layer), calls in together.items():
        mix = torch.tensor([0.25, 0.75]).double()[:, None, None] if name == names[2] else 0.0
        for call in calls:
            plain = attention(call.plan, call.states(), call.q, call.k, call.v, None, call.scale)
            torch.testing.assert_close(call.out, torch.lerp(plain, call.v, torch.as_tensor(mix, dtype=plain.dtype)))
        if layer == 0 and name == names[2]:  # the same queries and keys as the unmixed branch has
            assert all(torch.equal(a.exact, b.exact) for a, b in zip(calls, together[names[0], 0], strict=True))
    for one, other in itertools.combinations(names, 2):  # shared lists would be the same at every layer
        pairs = zip(together[one, 2], together[other, 2], strict=True)
        assert any(not torch.equal(a.exact, b.exact) for a, b in pairs)


def guided(transformer, guider, inputs, steps=4):
    """Run a guider as diffusers' modular pipelines do; return the predictions by branch, one a step."""
    found: dict[str, list[torch.Tensor]] = {}
    for step in range(steps):
        guider.set_state(step=step, num_inference_steps=steps, timestep=torch.tensor(1000 - 100 * step))
        names = ["pred_cond", "pred_uncond", "pred_cond_skip", "pred_cond_seg"][: guider.num_conditions]
        if guider.num_conditions == 3:
            names = list(guider._input_predictions)
        for name in names:
            guider.prepare_models(transformer)
            with torch.no_grad(), transformer.cache_context(name):
                out = transformer(**{**inputs, "timestep": torch.tensor([1.0 - 0.1 * step])}, return_dict=False)[0]
            found.setdefault(name, []).append(out)
            guider.cleanup_models(transformer)
    return found


def qwen_image():
    model = tiny_models.QWEN_IMAGE[0]
    torch.manual_seed(0)
    transformer = model.transformer(**model.config).eval()
    return transformer, {**model.inputs(1)}


def assert_no_hooks(transformer):
    assert not any(
        module._diffusers_hook.hooks for module in transformer.modules() if hasattr(module, "_diffusers_hook")
    )


def test_perturbed_attention_guidance_perturbs_though_methods_are_attached():
    """Its perturbed layers go to diffusers' own attention, which it turns into V; the report counts them as dense."""
    transformer, inputs = qwen_image()

    def guider():
        return PerturbedAttentionGuidance(
            perturbed_guidance_layers=[1], perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
        )

    plain = guided(transformer, guider(), inputs)
    assert len(plain["pred_cond_skip"]) == 3  # the first step has two branches
    assert not torch.equal(plain["pred_cond_skip"][0], plain["pred_cond"][1])
    with dit_accel.attach(transformer, LiteAttention(dense_steps=1000)):
        neutral = guided(transformer, guider(), inputs)
    assert all(torch.equal(a, b) for name in plain for a, b in zip(plain[name], neutral[name], strict=True))
    everything = LiteAttention(block_size=16, threshold=-1e3, dense_steps=0)
    with dit_accel.attach(transformer, everything) as attachment:
        kept = guided(transformer, guider(), inputs)
        report = attachment.report()
    for name in plain:
        for one, other in zip(plain[name], kept[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    by_branch = {}
    for step in report.steps:
        by_branch.setdefault(step.branch, set()).add((step.dense_layers, step.sparse_layers))
    assert by_branch == {"pred_cond": {(0, 2)}, "pred_uncond": {(0, 2)}, "pred_cond_skip": {(1, 1)}}
    assert_no_hooks(transformer)


@pytest.mark.parametrize("kind", ["skip layer", "smoothed energy"])
def test_guiders_that_skip_blocks_or_smooth_queries_keep_their_branch_apart(kind):
    transformer, inputs = qwen_image()

    def guider():
        if kind == "skip layer":
            return SkipLayerGuidance(
                skip_layer_config=LayerSkipConfig([1]), skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
            )
        return SmoothedEnergyGuidance(seg_guidance_layers=[1], seg_guidance_start=0.0, seg_guidance_stop=1.0)

    plain = guided(transformer, guider(), inputs)
    third = next(name for name in plain if name not in ("pred_cond", "pred_uncond"))
    with dit_accel.attach(transformer, LiteAttention(dense_steps=1000)) as attachment:
        neutral = guided(transformer, guider(), inputs)
        dense = {(step.branch, step.dense_layers) for step in attachment.report().steps}
    assert all(torch.equal(a, b) for name in plain for a, b in zip(plain[name], neutral[name], strict=True))
    skipped = kind == "skip layer"
    assert dense == {("pred_cond", 2), ("pred_uncond", 2), (third, 1 if skipped else 2)}
    with dit_accel.attach(transformer, RUTHLESS) as attachment:
        first = guided(transformer, guider(), inputs)
        keys = attachment.engine.handlers[0]._states
        assert {(key[1], key[2]) for key in keys} == {
            (layer, name) for layer in (0, 1) for name in plain if not (skipped and layer == 1 and name == third)
        }
        begun = [step.density for step in attachment.report().steps if step.branch == third]
        assert begun[0] == 1  # the branch begins with its own dense call, in the second step of the run
        assert begun[1] < 1
        again = guided(transformer, guider(), inputs)
        assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], again[name], strict=True))
    assert_no_hooks(transformer)


def test_diffusers_sees_the_processors_as_its_own():
    transformer, _ = qwen_image()
    before = [type(block.attn.processor) for block in transformer.transformer_blocks]
    with dit_accel.attach(transformer, LITE):
        now = [block.attn.processor for block in transformer.transformer_blocks]
        assert [one.__class__ for one in now] == before
        assert all(type(one) is not cls and isinstance(one, cls) for one, cls in zip(now, before, strict=True))
    assert [type(block.attn.processor) for block in transformer.transformer_blocks] == before
    assert diffusers.hooks._helpers.AttentionProcessorRegistry.get(before[0])
    assert HookRegistry.check_if_exists_or_initialize(transformer).hooks == {}


WAN_PLAIN = WAN.families[-1]

SIZE = dict(height=48, width=32, num_frames=9, num_inference_steps=4)
EVERYWHERE = LiteAttention(block_size=16, dense_steps=0)
RADIAL = RadialAttention(block_size=32, dense_steps=0, dense_layers=1)


@pytest.mark.parametrize(
    "methods",
    [
        (EVERYWHERE,),
        (LiteAttention(block_size=16, dense_steps=1, dense_layers=2),),
        (LiteAttention(dense_steps=0, dense_layers=2), RADIAL),
        (SparseD(block_size=16, dense_steps=0, dense_layers=1),),
    ],
    ids=["all layers", "fewer layers", "in radial's tiles", "sparsed"],
)
def test_what_is_planned_is_what_a_run_holds(make_pipe, methods):
    name = methods[0].name
    planned = estimate(WAN, WAN_PLAIN, methods=methods, **SIZE)
    sizes = dict(
        num_attention_heads=WAN_PLAIN.heads, attention_head_dim=WAN_PLAIN.head_dim, num_layers=WAN_PLAIN.layers
    )
    transformer = tiny_transformer(text_dim=make_pipe().text_encoder.config.d_model, **sizes)
    pipe = make_pipe(transformer=transformer)
    with dit_accel.attach(pipe, *methods, preset="none") as attachment:
        generate(pipe, **SIZE)
        report = attachment.report()
    assert report.state_bytes[name] == planned.carried_bytes[name] > 0
    assert f"{name} held" in str(report)
    assert planned.state_bytes == planned.tile_list_bytes + planned.carried_bytes[name]
    assert planned.to_dict()["carried_bytes"] == dict(planned.carried_bytes)


@pytest.mark.parametrize("name", ["wan2.1-1.3b", "wan2.1-14b", "hunyuan-video"])
def test_it_is_a_thirtieth_of_the_original_s_lists(name):
    """Those are int16, two of [batch, heads, query tiles, key tiles + 2] in each attention module."""
    family = installed.family(name)
    adapter = next(adapter for adapter in installed.adapters().values() if family in adapter.families)
    config = LiteAttention(block_size=128, dense_steps=0, dense_layers=0)
    planned = estimate(adapter, family, methods=[config])
    layout = token_layout(family, height=family.height, width=family.width, num_frames=planned.num_frames)
    tiles, batch = math.ceil(layout.tokens / 128), family.forwards_per_step
    lists = family.layers * 2 * 2 * batch * family.heads * tiles * (tiles + 2)
    assert 30 < lists / planned.carried_bytes["lite"] < 33


def test_the_plan_shows_it():
    arguments = ["plan", "--family", "wan2.1-14b", "--lite", "--set", "lite.dense_layers=0"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0
    assert "lite state  137 MiB, held from step to step" in found.stdout
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(found.stdout)["carried_bytes"]["lite"] == 40 * 2 * 4 * 40 * 591 * 19
    found = CliRunner().invoke(app, ["plan", "--family", "wan2.1-14b", "--radial", "--json"])
    assert json.loads(found.stdout)["carried_bytes"] == {}
