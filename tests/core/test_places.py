"""The four places where a method acts, by small methods made here: eager and compiled, composed, and undone exactly."""

import copy
import dataclasses
import io

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from one_layer import OneLayer
from some_cases import some
from torch._dynamo.utils import counters
from wan_tiny import RADIAL, tiny_transformer

import dit_accel
from dit_accel import AttachError, ConfigError, RadialAttention, RoPE
from dit_accel.adapters.installed import adapter_for
from dit_accel.attachment import attachment as attachment_module
from dit_accel.methods import (
    AttentionHandler,
    Handler,
    MethodConfig,
    Phase,
    Place,
    config,
    registry,
    sample_of,
    with_sample,
)
from dit_accel.methods.base import Model
from dit_accel.methods.compose import make_handlers

WAN = adapter_for("WanTransformer3DModel")


@config
class SkipForwards(MethodConfig):
    name = "skip-forwards"


class SkipForwardsHandler(Handler):
    """Reuses the last output at every second step of a branch."""

    config_type = SkipForwards
    phase = Phase.CACHES
    places = frozenset({Place.FORWARD})

    def __init__(self, config, model):
        super().__init__(config, model)
        self.last = {}
        self.seen = []

    def install(self, site):
        site.around_forward(self.around)

    def around(self, context, run):
        self.seen.append((context.step_index, context.branch, context.layout.tokens, "hidden_states" in context.inputs))
        if context.step_index % 2 == 0 or context.branch not in self.last:
            self.last[context.branch] = run()
        return self.last[context.branch]

    def reset(self):
        self.last.clear()


@config
class SkipBlock(MethodConfig):
    name = "skip-block"


class SkipBlockHandler(Handler):
    """Leaves the second block out from the second step on."""

    config_type = SkipBlock
    phase = Phase.CACHES
    places = frozenset({Place.BLOCKS})

    def install(self, site):
        site.around_blocks(self.around, (site.blocks[1],))

    def around(self, context, block, run, streams):
        return streams if context.step_index else run(streams)


@config
class Positions(MethodConfig):
    name = "positions"


class PositionsHandler(Handler):
    """Puts every token at position 0."""

    config_type = Positions
    phase = Phase.POSITIONS
    places = frozenset({Place.POSITIONS})

    def install(self, site):
        rope = site.transformer.rope
        site.replace(rope, "freqs_cos", torch.ones_like(rope.freqs_cos))
        site.replace(rope, "freqs_sin", torch.zeros_like(rope.freqs_sin))
        site.replace(site.transformer, "remark", "here")


class Mixing(AttentionHandler):
    """Mixes V into all heads, and notes the branches in which it does."""

    def __init__(self, config, model):
        super().__init__(config, model)
        self.branches = []

    def plan(self, plan, call, context):
        self.branches.append(context.branch)
        return plan.mix(torch.full((call.q.shape[1],), 0.75))


@config
class Guide(MethodConfig):
    name = "guide"

    weight: float = 0.5


class GuideHandler(Mixing):
    """Runs the model again in a branch of its own, all heads mixed with V there, and leads away from that."""

    config_type = Guide
    phase = Phase.GUIDANCE
    places = frozenset({Place.FORWARD, Place.ATTENTION})

    def install(self, site):
        self.site = site
        site.around_forward(self.around)

    def around(self, context, run):
        out = run()
        with self.site.branch("perturbed"):
            perturbed = run()
        sample = sample_of(out)
        return with_sample(out, sample + self.settings.weight * (sample - sample_of(perturbed)))

    def is_active(self, step, depth):
        return step.branch.endswith("/perturbed")


@config
class Probe(MethodConfig):
    name = "probe"

    batch: int = 2


class ProbeHandler(Mixing):
    """Mixes V into all heads, and runs the model on other latents inside one block: there nothing is mixed."""

    config_type = Probe
    phase = Phase.TRANSFORMS
    places = frozenset({Place.ATTENTION, Place.BLOCKS})

    def install(self, site):
        self.site = site
        site.around_blocks(self.around, (site.blocks[1],))

    def around(self, context, block, run, streams):
        if self.settings.batch and not context.branch.endswith("/probe"):
            latents, text = torch.ones(self.settings.batch, 12, 2, 4, 4), torch.ones(self.settings.batch, 6, 64)
            with self.site.branch("probe"):
                self.site.transformer(latents, torch.tensor([500.0]), text)
        return run(streams)

    def is_active(self, step, depth):
        return not step.branch.endswith("/probe")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for handler in (SkipForwardsHandler, SkipBlockHandler, PositionsHandler, GuideHandler, ProbeHandler):
        monkeypatch.setitem(registry.handlers(), handler.config_type.name, handler)


def forward(model, step=0, branch="cond", scale=1.0, frames=5, height=8):
    noise = torch.Generator().manual_seed(3)
    latents = scale * torch.randn(1, 12, frames, height, 8, generator=noise)
    text = torch.randn(1, 6, 64, generator=noise)
    with torch.no_grad(), model.cache_context(branch, step_index=step, num_inference_steps=6):
        return model(latents, timestep=torch.tensor([500]), encoder_hidden_states=text, return_dict=False)[0]


def handler_of(attachment, handler_type):
    return next(one for one in attachment.engine.handlers if isinstance(one, handler_type))


def ran(attachment):
    """The steps and branches that ran."""
    return {(step.step_index, step.branch) for step in attachment.report().steps}


def test_a_forward_is_skipped_repeated_and_passed_on(transformer):
    plain = [forward(transformer, scale=scale) for scale in (1, 2, 3)]
    with dit_accel.attach(transformer, SkipForwards()) as attachment:
        for step, branch, scale, expected in (
            (0, "cond", 1, 0), (0, "uncond", 3, 2), (1, "cond", 2, 0), (1, "uncond", 2, 2), (2, "cond", 2, 1)
        ):  # fmt: skip
            assert torch.equal(forward(transformer, step, branch, scale), plain[expected])
        seen = handler_of(attachment, SkipForwardsHandler).seen
        assert seen[:3] == [(0, "cond", 80, True), (0, "uncond", 80, True), (1, "cond", 80, True)]
        assert ran(attachment) == {(0, "cond"), (0, "uncond"), (2, "cond")}  # what was skipped did not run
        assert torch.equal(forward(transformer, 0, scale=3), plain[2])  # a new generation reuses nothing
    assert torch.equal(forward(transformer), plain[0])


def test_a_block_is_skipped(transformer):
    plain, without = forward(transformer), tiny_transformer()
    del without.blocks[1]
    with dit_accel.attach(transformer, SkipBlock()):
        assert torch.equal(forward(transformer, 0), plain)
        assert torch.equal(forward(transformer, 1), forward(without))
    assert torch.equal(forward(transformer), plain)


def test_positions_change_and_come_back(transformer):
    plain, still = forward(transformer), tiny_transformer()
    still.rope.freqs_cos.fill_(1), still.rope.freqs_sin.zero_()
    old = transformer.rope.freqs_cos
    with dit_accel.attach(transformer, Positions()):
        assert torch.equal(forward(transformer), forward(still))
        assert transformer.remark == "here"
        assert "freqs_cos" in dict(transformer.rope.named_buffers())
    assert torch.equal(forward(transformer), plain)
    assert transformer.rope.freqs_cos is old
    attachment = dit_accel.attach(transformer, Positions())
    transformer.to(torch.float64).to(torch.float32)  # makes new tensors, as a move to a device does
    attachment.detach()
    assert torch.equal(transformer.rope.freqs_cos, old)
    assert "remark" not in transformer.__dict__


def test_a_nested_branch_has_state_of_its_own_and_moves_nothing(transformer):
    plain = forward(transformer)
    with dit_accel.attach(transformer, Guide(), RADIAL) as attachment:
        guided = forward(transformer, 0)
        forward(transformer, 1)
        assert ran(attachment) == {(step, branch) for step in (0, 1) for branch in ("cond", "cond/perturbed")}
        assert set(handler_of(attachment, GuideHandler).branches) == {"cond/perturbed"}
    with dit_accel.attach(transformer, Guide(weight=0.0)):
        assert torch.equal(forward(transformer), plain)
    assert not torch.allclose(guided, plain)
    assert torch.equal(forward(transformer), plain)
    with dit_accel.attach(transformer, Guide(), backend="reference") as attachment, attention_backend("_native_math"):
        assert forward(transformer).isfinite().all()
        assert attachment.engine.recorder.backends == set()  # a plan that needs no kernel runs on the user's backend


def test_a_context_that_a_nested_branch_enters_is_named_after_it():
    layer = OneLayer()
    layer.denoising.enter(layer.state, "cond", {"step_index": 0})
    with layer.denoising.nested(layer.state, "perturbed", (1,)):
        layer.denoising.enter(layer.state, "inner", {})
        assert [(branch.name, branch.rows) for branch in layer.state.branches[1:]] == [
            ("cond/perturbed", (1,)), ("cond/perturbed/inner", (1,))
        ]  # fmt: skip


def test_a_branch_inside_a_block_leaves_the_rest_of_the_forward_as_it_was(transformer):
    """Its rows, grid and dense layers are its own: the blocks behind it run as without it."""
    with dit_accel.attach(transformer, RADIAL, Probe(batch=0), backend="torch") as attachment:
        alone, calls = [forward(transformer, step) for step in range(2)], attachment.report().to_dict()["calls"]
    with dit_accel.attach(transformer, RADIAL, Probe(), backend="torch") as attachment:
        for step, plain in enumerate(alone):
            assert torch.equal(forward(transformer, step), plain)
            assert [int(size) for size in attachment.engine.forward.grid] == [5, 4, 4, 0, 0]
        outside = [call for call in attachment.report().to_dict()["calls"] if not call["branch"].endswith("/probe")]
        assert outside == calls
        assert {branch for _, branch in ran(attachment)} == {"cond", "cond/probe"}


def test_a_forward_without_a_grid_is_refused_if_any_layer_follows_a_plan(transformer, monkeypatch):
    adapter = dataclasses.replace(WAN, grid=lambda config, inputs: "its tokens lie anywhere")
    monkeypatch.setattr(attachment_module, "adapter_for", lambda name: adapter)
    plain = forward(transformer)
    for layers in (0, 1, 2):
        radial = dataclasses.replace(RADIAL, dense_layers=layers)
        with dit_accel.attach(transformer, radial), pytest.raises(ConfigError, match=r"wan\).*tokens.*anywhere"):
            forward(transformer)
    with dit_accel.attach(transformer, dataclasses.replace(RADIAL, dense_layers=3)):
        assert torch.equal(forward(transformer), plain)


def test_guidance_lies_around_caches_around_the_model_and_branches_have_names(transformer):
    with dit_accel.attach(transformer, SkipForwards(), Guide(), SkipBlock(), RADIAL) as attachment:
        first = [forward(transformer, step) for step in range(3)]
        cached = handler_of(attachment, SkipForwardsHandler).last
        assert set(cached) == {"cond", "cond/perturbed"}
        assert not torch.equal(*(sample_of(out) for out in cached.values()))
    with dit_accel.attach(transformer, RADIAL, SkipBlock(), Guide(), SkipForwards()):
        assert all(torch.equal(forward(transformer, step), out) for step, out in enumerate(first))


COMPILED = ["blocks before", "blocks after", "compile before", "compile after", "torch.compile before"]


@pytest.mark.parametrize("how", some(COMPILED, "blocks before"))
def test_compiled_or_not_the_seams_hold_without_a_further_graph(transformer, how):
    """A forward is skipped and lists are followed whether the model is compiled before or after they are attached."""
    kind, when = how.split()
    plain = forward(transformer, scale=2)
    with dit_accel.attach(transformer, RADIAL):
        sparse = forward(transformer)

    def compiled(model):
        if kind == "torch.compile":
            return torch.compile(model, fullgraph=True, backend="aot_eager")
        (model.compile_repeated_blocks if kind == "blocks" else model.compile)(fullgraph=True, backend="aot_eager")
        return model

    torch._dynamo.reset()
    counters.clear()
    caller = compiled(transformer)
    forward(caller)
    own = counters["stats"]["unique_graphs"]
    if when == "after":
        torch._dynamo.reset()
        caller = transformer = tiny_transformer()
    with dit_accel.attach(caller, SkipForwards(), RADIAL) as attachment:
        caller = compiled(caller) if when == "after" else caller
        counters.clear()
        outs = [forward(caller, step, scale=1 + step % 2) for step in range(4)]
        assert counters["stats"]["unique_graphs"] <= own  # planned calls are another graph than dense ones
        torch.testing.assert_close(outs[0], sparse)
        assert torch.equal(outs[1], outs[0])
        assert attachment.report().density < 1
    torch.testing.assert_close(forward(caller, scale=2), plain)
    assert "compile" not in transformer.__dict__


def test_inside_a_graph_of_the_whole_transformer_nothing_is_skipped_without_a_word(transformer):
    whole, refused = torch.compile(transformer, backend="aot_eager"), r"transformer.*compiled.*compile_repeated_blocks"
    with pytest.raises(ConfigError, match=refused):
        dit_accel.attach(whole, SkipBlock())
    with dit_accel.attach(transformer, SkipBlock()):
        with pytest.raises(ConfigError, match=r"graph.*whole transformer"):
            transformer.compile()
        forward(transformer)
    transformer.compile(backend="aot_eager")
    with pytest.raises(ConfigError, match=refused):
        dit_accel.attach(transformer, SkipBlock())
    assert dit_accel.attachment_of(transformer) is None


@pytest.mark.slow
def test_latent_grids_share_the_graphs():
    """Neutral or planned, a further size of latents is no further graph than the untouched model makes."""

    def graphs(*methods):
        torch._dynamo.reset()
        model = tiny_transformer()
        model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="aot_eager")
        counters.clear()
        counts = []
        with dit_accel.attach(model, *methods, preset="none") if methods else torch.no_grad():
            for frames, height in ((5, 8), (3, 8), (4, 12), (5, 10), (2, 14), (6, 8)):
                forward(model, frames=frames, height=height)
                counts.append(counters["stats"]["unique_graphs"])
        return counts

    plain = graphs()
    assert graphs(RadialAttention(block_size=16, dense_steps=1000)) == plain
    assert graphs(RADIAL)[-1] <= plain[-1]


def test_copies_and_pickles_are_plain_models(transformer):
    plain = forward(transformer)
    rope = RoPE(kind="pi", trained_frames=2)
    with dit_accel.attach(transformer, SkipForwards(), SkipBlock(), rope, RADIAL) as attachment:
        sparse = forward(transformer, 0)
        file = io.BytesIO()
        torch.save(transformer, file)
        file.seek(0)
        for other in (copy.deepcopy(transformer), torch.load(file, weights_only=False)):
            assert dit_accel.attachment_of(other) is None
            assert all(torch.equal(forward(other, step), plain) for step in range(3))
            with dit_accel.attach(other, RADIAL):
                assert not torch.equal(forward(other), plain)
            assert torch.equal(forward(other), plain)
        assert torch.equal(forward(transformer, 1), sparse)  # running the copies changed nothing here
        with pytest.raises(AttachError, match=r"attachment.*pickled"):
            copy.deepcopy(attachment)
    assert torch.equal(forward(transformer), plain)


def test_a_method_without_its_place_is_refused_by_name():
    model = Model(adapter=dataclasses.replace(WAN, blocks=(), rope=None), family=None, heads=2, layers=3)
    for method, message in ((SkipBlock(), r"skip-block.*blocks.*'wan'"), (Positions(), r"rotary positions.*wan")):
        with pytest.raises(ConfigError, match=message):
            make_handlers([method], model)
