"""LiteAttention on tiny pipelines: state by branch, row and expert, resets, other methods, compilation, the report."""

import itertools
import json

import pytest
import tiny_models
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from dit_accel_kernels import count_bits, unpack_bits
from wan_tiny import generate, tiny_transformer

import dit_accel
from dit_accel import LiteAttention, RadialAttention
from dit_accel.attachment.forward_state import as_tensors
from dit_accel.attachment.op import planned_attention
from dit_accel.testing.recording import recorded

# Random weights make flat attention: a threshold this near to 0 drops what is new to no row of a tile.
OPTIONS = dict(block_size=16, threshold=-0.01, dense_steps=0)
ACTIVE = LiteAttention(**OPTIONS)
RUTHLESS = LiteAttention(block_size=16, threshold=1e3, allow_positive_threshold=True, dense_steps=0)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch"])


def exact_by_branch(pipe, config, backend="torch", **call):
    """Exact bits of every planned call of a run, by branch, in the order of the calls."""
    found: dict[str, list[torch.Tensor]] = {}
    with dit_accel.attach(pipe, config, backend=backend) as attachment, recorded(attachment) as calls:
        latents = generate(pipe, **call)
    for made in calls:
        found.setdefault(made.context.branch, []).append(made.exact)
    return found, latents


@BACKENDS
def test_it_drops_tiles_after_the_first_call_and_frees_everything_at_the_end(make_pipe, backend):
    pipe = make_pipe(scheduler=FlowMatchEulerDiscreteScheduler(shift=12.0))  # whose second step drops some already
    dense = generate(pipe)
    with dit_accel.attach(pipe, ACTIVE, backend=backend) as attachment:
        sparse = generate(pipe)
        states = attachment.engine.handlers[0]._states
        assert not states
        report = attachment.report()
        assert report.state_bytes == {"lite": 3 * 2 * 4 * 2 * 5}  # layers, branches, bytes, heads, tiles
    assert not torch.equal(sparse, dense)
    assert torch.equal(generate(pipe), dense)
    by_step = [step.density for step in report.steps if step.branch == "cond"]
    assert by_step[0] == 1
    assert by_step[1] < 1
    assert all(later <= earlier for earlier, later in itertools.pairwise(by_step))
    assert len(report.calls) == 4 * 2 * 3
    assert all(len(call.by_head) == 2 for call in report.calls)
    last = report.calls[-1]
    assert sum(last.by_head) / 2 == pytest.approx(last.density)
    assert json.loads(json.dumps(report.to_dict()))["calls"][0]["by_head"] == [1.0, 1.0]
    assert "lite held" in str(report)
    assert "lite seldom pays below 30000 visual tokens, and there are 80 here" in str(report)


@BACKENDS
def test_sequential_branches_never_share_their_state(pipe, backend):
    """Each branch of guidance evolves as it does where another handler serves the other branch."""
    with torch.no_grad():
        for block in pipe.transformer.blocks:  # so that the prompt matters
            block.attn2.to_out[0].weight.mul_(40)
    both, latents = exact_by_branch(pipe, ACTIVE, backend)
    crossed = False
    for cond, uncond in zip(both["cond"], both["uncond"], strict=True):
        crossed |= bool(((cond & ~uncond) != 0).any() and ((uncond & ~cond) != 0).any())
    assert crossed  # one list for both would have been their intersection
    for kept in ("cond", "uncond"):
        only = _exact_of_one_branch(pipe, backend, kept, latents)
        assert all(torch.equal(a, b) for a, b in zip(only, both[kept], strict=True))


def _exact_of_one_branch(pipe, backend, kept, latents):
    """Exact bits of one branch where another attachment's state serves the other branch."""
    with dit_accel.attach(pipe, ACTIVE, backend=backend) as attachment, recorded(attachment) as calls:
        (handler,) = attachment.engine.handlers
        other = type(handler)(ACTIVE, handler.model)
        plan, after = handler.plan, handler.after
        handler.plan = lambda made, call, context: (plan if context.branch == kept else other.plan)(made, call, context)
        handler.after = lambda made, call, context, result: (after if context.branch == kept else other.after)(
            made, call, context, result
        )
        attachment.engine.use([handler])
        assert torch.equal(generate(pipe), latents)
    assert {call.context.branch for call in calls} == {"cond", "uncond"}
    return [call.exact for call in calls if call.context.branch == kept]


def test_a_target_density_holds_within_two_points(pipe):
    for target in (0.5, 0.8):
        config = LiteAttention(block_size=16, dense_steps=0, target_density=target)
        with dit_accel.attach(pipe, config) as attachment:
            generate(pipe, height=48, width=64)
            steps = attachment.report().steps
        assert all(step.density == 1 if step.step_index == 0 else abs(step.density - target) < 0.02 for step in steps)


def test_the_experts_of_wan_2_2_begin_anew(make_pipe):
    pipe = make_pipe(transformer_2=tiny_transformer(5, text_dim=96), boundary_ratio=0.6)
    with dit_accel.attach(pipe, RUTHLESS) as attachment:
        first = generate(pipe, num_inference_steps=20)
        assert torch.equal(generate(pipe, num_inference_steps=20), first)
        assert not attachment.engine.handlers[0]._states
        report = attachment.report()
    for name in ("transformer", "transformer_2"):
        densities = [s.density for s in report.steps if (s.transformer, s.branch) == (name, "cond")]
        assert len(densities) > 1
        assert densities[0] == 1
        assert densities[1] < 1


@BACKENDS
def test_compiled_blocks_choose_the_same_tiles(make_pipe, backend):
    torch._dynamo.reset()
    pipe = make_pipe()
    eager, latents = exact_by_branch(pipe, ACTIVE, backend)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    compiled, same = exact_by_branch(pipe, ACTIVE, backend)
    torch._dynamo.reset()
    torch.testing.assert_close(same, latents, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for name in eager for a, b in zip(eager[name], compiled[name], strict=True))


def test_another_lora_or_scale_within_a_run_begins_anew(make_pipe):
    from peft import LoraConfig

    pipe = make_pipe()
    lora = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(lora, adapter_name="a")

    def densities(change):
        def at_step(pipe, step, timestep, tensors):
            if step == 3 and change is not None:
                change()
            return tensors

        with dit_accel.attach(pipe, RUTHLESS) as attachment:
            generate(pipe, num_inference_steps=7, callback_on_step_end=at_step)
            steps = [s for s in attachment.report().steps if s.branch == "cond"]
        return [s.density == 1 for s in steps]

    assert densities(None) == [True] + [False] * 6
    begun_anew = [True, False, False, False, True, False, False]
    assert densities(lambda: pipe.transformer.set_adapters(["a"], [0.5])) == begun_anew
    assert densities(pipe.transformer.disable_lora) == begun_anew
    assert densities(pipe.transformer.enable_lora) == begun_anew
    assert densities(lambda: pipe.transformer.add_adapter(lora, adapter_name="b")) == begun_anew
    assert densities(lambda: pipe.transformer.delete_adapters(["a", "b"])) == begun_anew


@BACKENDS
def test_radial_s_list_is_the_universe_in_radial_s_tiles(pipe, backend):
    radial = RadialAttention(block_size=16, decay_factor=0.2, near="half", sink=False, dense_steps=1, dense_layers=0)
    radial = type(radial)(**{**radial.to_dict(), "order": "tiles"})
    lite = LiteAttention(threshold=-0.01, dense_steps=0)
    results = []
    for methods in ((radial, lite), (lite, radial)):
        with (
            dit_accel.attach(pipe, *methods, preset="none", backend=backend) as attachment,
            recorded(attachment) as calls,
        ):
            results.append(generate(pipe, height=64, num_inference_steps=5))
            report = attachment.report()
        assert report.methods["lite"]["block_size"] == 16
    assert torch.equal(*results)
    listed = unpack_bits(torch.zeros(1, dtype=torch.int32), 1)  # shape only
    for call in calls[6:]:  # radial keeps its first step dense, lite votes there already
        states = call.plan.tiles.states()[0] == 2
        listed = unpack_bits(call.exact, len(states))
        assert not (listed & ~states).any()
    assert not (listed | ~states).all()


def test_mochi_keeps_a_state_for_each_row():
    (model,) = tiny_models.MOCHI
    torch.manual_seed(0)
    transformer = model.transformer(**model.config).eval()
    inputs = model.inputs(2)
    with dit_accel.attach(transformer, ACTIVE, backend="reference") as attachment, recorded(attachment) as calls:
        for step in range(3):
            with torch.no_grad(), transformer.cache_context("cond_uncond", step_index=step, num_inference_steps=5):
                transformer(**inputs, return_dict=False)
        keys = attachment.engine.handlers[0]._states
        assert sorted(keys) == [("transformer", layer, "cond_uncond", row, 1) for layer in range(3) for row in range(2)]
        assert [s.sparse_layers for s in attachment.report().steps] == [3, 3, 3]
    for call in calls[6:]:
        exact = unpack_bits(call.exact, -(-call.k.shape[2] // 16))
        assert exact[:, :, 14:].all()  # 224 visual tokens, then text
        assert exact[..., 14:].all()
        assert not exact.all()
    assert all(call.exact.shape[0] == 1 for call in calls)


def test_gradients_follow_the_bits_of_their_own_call_and_checkpointing_repeats_them():
    transformer = tiny_transformer().double()
    text = torch.randn(1, 6, 64, dtype=torch.float64)
    latents = torch.randn(3, 1, 12, 5, 8, 8, dtype=torch.float64)
    grads = {}
    for how in ("late", "at once", "checkpointed"):
        if how == "checkpointed":
            transformer.enable_gradient_checkpointing()
            transformer.train()
        waiting, found = [], grads.setdefault(how, [])
        with dit_accel.attach(transformer, ACTIVE, backend="reference") as attachment:
            for step in range(3):
                with transformer.cache_context("cond", step_index=step, num_inference_steps=9):
                    x = latents[step].clone().requires_grad_()
                    loss = transformer(x, torch.tensor([500.0]), text, return_dict=False)[0].square().sum()
                    if how != "late":
                        loss.backward()
                waiting.append((x, loss))
            assert attachment.report().sparse_density < 1
            for x, loss in waiting:
                if how == "late":
                    loss.backward()
                found.append(x.grad)
    for late, soon, checkpointed in zip(*grads.values(), strict=True):
        assert torch.equal(late, soon)
        torch.testing.assert_close(checkpointed, soon)


def test_masks_that_are_no_key_padding_leave_the_call_dense_and_the_report_says_so():
    transformer = tiny_transformer().double()
    inputs = (torch.randn(1, 12, 5, 8, 8).double(), torch.tensor([500.0]), torch.randn(1, 6, 64).double())
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 80, 2, 16, dtype=torch.float64))
    mask = torch.randn(1, 1, 80, 80, dtype=torch.float64)
    layer, grid = torch.tensor(0), as_tensors((5, 4, 4, 0, 0))
    told = dict(step_index=0, num_inference_steps=4)
    with dit_accel.attach(transformer, ACTIVE) as attachment:
        number = attachment.engine.number
        with transformer.cache_context("cond", **told):
            out, _ = planned_attention(q, k, v, mask, layer, grid, number, True, None, True)
            grads = torch.autograd.grad(out.sum(), (q, k, v))
        report = attachment.report()
        with torch.no_grad():
            assert transformer(*inputs, return_dict=False)[0].isfinite().all()
    leaves = [x.transpose(1, 2).clone().requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*leaves, mask)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    wanted = torch.autograd.grad(expected.sum(), leaves)
    for found, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found, want.transpose(1, 2))
    assert r"passes masks torch.float64 [1, 1, 80, 80] that are not key padding; such calls stayed dense" in str(report)
    assert report.steps[0].dense_layers == 1
    assert report.steps[0].stayed == {"mask": 1}
    radial = RadialAttention(block_size=16, dense_steps=0, dense_layers=0)
    with dit_accel.attach(transformer, radial, ACTIVE) as attachment:
        number = attachment.engine.number
        with (
            transformer.cache_context("cond", **told),
            pytest.raises(dit_accel.ConfigError, match=r"sparse attention.*hide keys"),
        ):
            planned_attention(q, k, v, mask, layer, grid, number, True, None, False)


def test_a_budget_bounds_the_mean_mass_of_every_call(pipe):
    """Measured in float64 against dense probabilities of the same call; single rows may drift beyond it."""
    for budget in (0.3, 0.9):
        config = LiteAttention(block_size=16, criterion="budget", threshold=budget, dense_steps=0)
        with dit_accel.attach(pipe, config) as attachment, recorded(attachment) as calls:
            generate(pipe, height=48, width=48, num_inference_steps=6)
            density = attachment.report().density
        for call in calls:
            q, k = call.q.double(), call.k.double()
            tiles = -(-k.shape[2] // 16)
            exact = unpack_bits(call.exact, tiles).repeat_interleave(16, 2).repeat_interleave(16, 3)
            exact = exact[:, :, : q.shape[2], : k.shape[2]]
            lost = ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) * ~exact).sum(-1)
            assert float(lost.mean()) <= budget
    assert density < 1


def test_bits_take_a_bit_a_tile(pipe):
    with dit_accel.attach(pipe, ACTIVE) as attachment:

        def look(pipe, step, timestep, tensors):
            if step < 3:
                (handler,), states = attachment.engine.handlers, attachment.engine.handlers[0]._states
                assert handler.state_bytes() == sum(state.bits.nbytes for state in states.values())
                assert all(int(count_bits(state.bits).max()) <= 5 for state in states.values())
                assert len(states) == 6
            return tensors

        generate(pipe, callback_on_step_end=look)
