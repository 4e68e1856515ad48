"""DFA: which tokens move, full steps, what the background keeps, what the foreground sees, beside sparse lists."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_layer import layout_of
from tiny_models import MODELS
from wan_tiny import RADIAL, sharp_transformer, tiny_transformer

import dit_accel
from dit_accel import PAG, ConfigError, LiteAttention, SoftPAG, SolAttention, SparseD
from dit_accel.adapters import installed
from dit_accel.attachment.engine import run_kernel
from dit_accel.attachment.kernel_call import computed_rows
from dit_accel.estimate.work import tiles_left
from dit_accel.methods.attention.delta import DeltaAttention
from dit_accel.methods.attention.dfa import DFA
from dit_accel.methods.find import resolve_model
from dit_accel.methods.registry import handler_of
from dit_accel.rules.foreground import foreground, motion, otsu, predicted
from dit_accel.testing.tiny_models import Case

SPARSE = dict(block_size=16, dense_steps=0, dense_last_steps=0, dense_layers=0)
BESIDE = {
    "radial": RADIAL,
    "pooled": replace(RADIAL, rest="pooled"),
    "sol": SolAttention(**SPARSE),
    "sparsed": SparseD(density=0.5, **SPARSE),
}
EVERY_2 = dict(every=2, warmup_steps=0, last_steps=0)


def steps_of(transformer, *methods, steps=4, noise_level=True):
    """The planned calls of some steps on moving latents, and the report."""
    calls, generator = [], torch.Generator().manual_seed(0)
    text = torch.randn(1, 6, 64, generator=generator)
    still = torch.randn(1, 12, 1, 8, 8, generator=generator).expand(1, 12, 5, 8, 8).clone()
    for frame in range(5):
        still[:, :, frame, 2:4, frame : frame + 3] += 8  # something passes
    with (
        dit_accel.attach(transformer, *methods, preset="none") as attachment,
        attachment.observe(calls.append),
        torch.no_grad(),
    ):
        for step in range(steps):
            sigma = 1 - step / steps
            where = dict(step_index=step, num_inference_steps=steps) | (dict(sigma=sigma) if noise_level else {})
            with transformer.cache_context("cond", **where):
                noisy = still + 0.1 * sigma * torch.randn(still.shape, generator=generator)
                transformer(noisy, torch.tensor([1000.0 * sigma]), text, return_dict=False)
        return calls, attachment.report()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("share", [None, 0.25])
def test_the_foreground_attends_and_the_background_keeps_its_output(transformer, share, strict):
    calls, report = steps_of(transformer, DFA(share=share, strict=strict, **EVERY_2))
    for now, before in zip([*calls[3:6], *calls[9:]], [*calls[:3], *calls[6:9]], strict=True):
        (rows,), call = now.plan.reused.rows, now.call
        k, v = (x[:, :, rows] if strict else x for x in (call.k, call.v))
        expected = before.out.clone()
        expected[:, :, rows] = torch.nn.functional.scaled_dot_product_attention(call.q[:, :, rows], k, v)
        torch.testing.assert_close(now.out, expected)
        rest = torch.ones(80, dtype=torch.bool).index_fill(0, rows, False)
        assert torch.equal(now.out[:, :, rest], before.out[:, :, rest])
        assert 0 < len(rows) < 80
        assert len(rows) == 20 or share is None
    rows = len(calls[3].plan.reused.rows[0]) / 80
    assert [step.density for step in report.steps[:3]] == pytest.approx([1, rows**2 if strict else rows, 1])


@pytest.mark.sample
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "perturbed", [PAG(layers="L0", start=0.0), SoftPAG(heads="L0H1", u=0.5, start=0.0), SoftPAG(heads="L0", start=0.0)]
)
def test_the_foreground_of_a_perturbed_branch_is_perturbed(transformer, perturbed, strict, sparse):
    """Where only some rows are computed, each takes the share of its own V; the kernel knows V by the rows of Q."""
    calls, _ = steps_of(transformer, DFA(strict=strict, **EVERY_2), perturbed, *([RADIAL] if sparse else []))
    mixed = [seen for seen in calls if seen.plan.reused and seen.plan.identity_mix is not None]
    assert mixed
    for seen in mixed:
        plan, (rows,) = seen.plan, seen.plan.reused.rows
        share = plan.value_share(seen.out.shape[1], seen.out.dtype)
        bare = replace(plan, identity_mix=None, only_values=False)
        cut, small, computed = computed_rows(bare, seen.call, rows, plan.reused.keys)
        logits = small.q @ small.k.transpose(-1, -2) * small.q.shape[-1] ** -0.5
        if cut.tiles is None:
            expected = torch.lerp(logits.softmax(-1) @ small.v, seen.call.v[:, :, computed], share)
            torch.testing.assert_close(seen.out[:, :, computed], expected)
        whole, rows = (share == 1).flatten(), rows if plan.skips_logits else computed
        assert torch.equal(seen.out[:, whole][:, :, rows], seen.call.v[:, whole][:, :, rows])


def test_the_mask_is_what_moves_in_the_models_own_prediction(transformer):
    seen, model = [], tiny_transformer()
    model.register_forward_hook(lambda m, args, output: seen.append((args[0].clone(), output[0].clone())))
    steps_of(model)
    calls, report = steps_of(transformer, DFA(**EVERY_2))
    expected = foreground(predicted(*seen[0], 1.0, (5, 4, 4)))
    assert calls[3].plan.reused.rows[0].tolist() == expected.flatten().nonzero()[:, 0].tolist()
    entries = report.section("dfa").data["foreground"]
    assert [entry["step_index"] for entry in entries] == [0, 2]
    assert entries[0]["foreground"] == [pytest.approx(float(expected.float().mean()))]


def test_schedules(transformer):
    for options, drawn in (
        (dict(every=3, warmup_steps=0, last_steps=0), "#..#..#."),
        (dict(every=2, warmup_steps=3, last_steps=1), "###.#.##"),
        (dict(every=100, warmup_steps=0.25, last_steps=2), "##....##"),
    ):
        config = DFA(share=0.5, **options)
        calls, _ = steps_of(transformer, config, steps=8)
        assert "".join("#" if call.plan.reused is None else "." for call in calls[::3]) == drawn
        assert config.reusing(8) == {step for step, mark in enumerate(drawn) if mark == "."}


@pytest.mark.parametrize("strict", [False, True])
def test_the_plan_counts_what_runs_where_the_share_is_set(transformer, strict):
    """On a model of no released size, whose handler is asked directly."""
    config, layout = DFA(share=0.25, strict=strict, every=3, warmup_steps=2, last_steps=1), layout_of((5, 4, 4))
    _, report = steps_of(transformer, config, steps=9)
    handler = handler_of(config)(config, resolve_model("transformer", {"transformer": transformer}))
    saving = handler.estimate(layout, 9)
    left = tiles_left({"dfa": saving}, 9, 3, 80)
    assert left.rows_alone
    counted = left.dense_share + (1 - left.dense_share) * left.density
    assert counted == pytest.approx(sum(step.density for step in report.steps) / 9, abs=0.001)
    assert saving.counted
    assert not handler_of(config)(DFA(), handler.model).estimate(layout, 9).counted


@pytest.mark.parametrize("beside", BESIDE)
def test_the_foreground_follows_the_sparse_methods_lists(beside):
    transformer, sparse = sharp_transformer(), BESIDE[beside]
    calls, report = steps_of(transformer, sparse, DFA(share=0.03, **EVERY_2), steps=2)
    with dit_accel.attach(transformer, sparse) as attachment:
        for now in calls[3:6]:
            whole = run_kernel(replace(now.plan, reused=None), now.call, attachment.engine.recorder).out
            changed = (now.out != now.plan.reused.out).any(-1)[0].any(0)
            (rows,) = now.plan.reused.rows
            torch.testing.assert_close(now.out[:, :, rows], whole[:, :, rows], rtol=1e-4, atol=1e-5)
            assert len(rows) <= int(changed.sum()) < 80
    assert report.steps[1].density < report.steps[0].density


def rows_of_prompts(methods, seeds, branch="cond"):
    """The outputs of four steps of a batch, in each row a moving thing of its own, the calls and the report."""
    transformer, calls, outputs = sharp_transformer(), [], []
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    clips = [torch.randn(12, 5, 8, 8, generator=generator) for generator in generators]
    for clip, seed in zip(clips, seeds, strict=True):
        for frame in range(5):
            clip[:, frame, seed : seed + 2, frame : frame + 1 + seed] += 8
    x, text = torch.stack(clips), torch.stack([clip[:6, 0].flatten(1)[:, :64] for clip in clips])
    with (
        dit_accel.attach(transformer, *methods, preset="none") as attachment,
        attachment.observe(calls.append),
        torch.no_grad(),
    ):
        for step in range(4):
            with transformer.cache_context(branch, step_index=step, num_inference_steps=4, sigma=1 - step / 4):
                time = torch.full((len(x),), 1000.0 - 250 * step)
                noise = torch.stack([torch.randn(x[0].shape, generator=generator) for generator in generators])
                outputs.append(transformer(x + noise, time, text, return_dict=False)[0])
        return torch.stack(outputs, 1), calls, attachment.report()


@pytest.mark.sample
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("beside", [None, *BESIDE])
def test_rows_of_a_batch_are_what_they_are_alone(beside, strict):
    others = [BESIDE[beside]] if beside else []
    methods = (*others, DFA(share=0.1, strict=strict, **EVERY_2))
    plain, _, _ = rows_of_prompts(others, [1, 3])
    alone = [rows_of_prompts(methods, [seed]) for seed in (1, 3)]
    both, calls, report = rows_of_prompts(methods, [1, 3])
    first, second = (rows.tolist() for rows in calls[3].plan.reused.rows)
    assert first != second
    for row, (expected, own, _) in enumerate(alone):
        assert own[3].plan.reused.rows[0].tolist() == (first, second)[row]
        assert not torch.allclose(expected, plain[row : row + 1], rtol=0, atol=1e-4)
        torch.testing.assert_close(both[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    densities = [[step.density for step in one.steps] for one in (alone[0][2], alone[1][2], report)]
    assert densities[2] == pytest.approx([(one + other) / 2 for one, other, _ in zip(*densities, strict=True)])
    assert len(report.section("dfa").data["foreground"][0]["foreground"]) == 2


def test_a_prompt_that_moves_everywhere_leaves_another_its_background():
    transformer, calls = tiny_transformer(), []
    with dit_accel.attach(transformer, DFA(share=0.3, **EVERY_2)) as attachment, attachment.observe(calls.append):
        (handler,) = attachment.engine.handlers
        for step in range(2):
            with transformer.cache_context("cond", step_index=step, num_inference_steps=4, sigma=0.5), torch.no_grad():
                transformer(torch.randn(2, 12, 5, 8, 8), torch.tensor([500.0] * 2), torch.randn(2, 6, 64))
            handler._masks["transformer"][1][0] = True
    everything, some = calls[3].plan.reused.rows
    assert everything.tolist() == list(range(80))
    assert len(some) == 24


def test_a_prompt_and_its_negative_one_share_a_foreground_in_one_call():
    config = DFA(share=0.2, **EVERY_2)
    _, calls, _ = rows_of_prompts((config,), [1, 3, 2, 1], branch="cond_uncond")
    (_, pairs, _), (_, other, _) = (rows_of_prompts((config,), seeds, "cond_uncond") for seeds in ([1, 2], [3, 1]))
    found = [rows.tolist() for rows in calls[3].plan.reused.rows]
    assert found == [one[3].plan.reused.rows[0].tolist() for one in (pairs, other)]
    assert len(pairs[3].plan.reused.rows) == 1
    _, calls, _ = rows_of_prompts((config,), [1, 2, 3], branch="cond_uncond")  # no pairs
    assert len(calls[3].plan.reused.rows) == 3


def test_beside_a_step_cache_it_counts_the_steps_that_run(transformer):
    config = dit_accel.StaticCache(steps=(1, 0, 1, 0, 1, 0, 1, 0))
    calls, _ = steps_of(transformer, DFA(share=0.25, **EVERY_2), config, steps=8)
    drawn = {call.context.step_index: "." if call.plan.reused else "#" for call in calls}
    assert drawn == {0: "#", 2: ".", 4: "#", 6: "."}


def test_what_is_refused(transformer):
    lite, delta = LiteAttention(block_size=16), DeltaAttention(stride=8)
    for others, name in (((lite,), "lite"), ((SparseD(block_size=16), delta), "delta")):
        with pytest.raises(ConfigError, match=rf"^dfa.*rows.*{name}"):
            dit_accel.attach(transformer, DFA(), *others)
    with pytest.raises(ConfigError, match=r"^dfa.*noise level.*EasyCache"):
        steps_of(transformer, DFA(**EVERY_2), noise_level=False)
    case = Case(installed.adapters()["flux"], MODELS["flux"][0])
    with pytest.raises(ConfigError, match=r"^dfa.*flux.*image"):
        dit_accel.attach(case.transformer, DFA())


GRID = (5, 3, 4)


@pytest.mark.parametrize("layout", ["bcthw", "bthwc", "btchw", "tokens"])
def test_predictions_by_token(layout):
    """x = x0 (1 - s) + s eps and v = eps - x0: x - s v is x0; a token holds its own patch and no other's."""
    torch.manual_seed(0)
    clean, noise, sigma = torch.randn(2, 7, 10, 6, 8), torch.randn(2, 7, 10, 6, 8), 0.7
    expected = clean.reshape(2, 7, 5, 2, 3, 2, 4, 2).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)
    orders = {"bcthw": (0, 1, 2, 3, 4), "bthwc": (0, 2, 3, 4, 1), "btchw": (0, 2, 1, 3, 4)}
    x, v = (1 - sigma) * clean + sigma * noise, noise - clean
    if layout == "tokens":
        x, v = (z[:, :, ::2, ::2, ::2].flatten(2).mT for z in (x, v))
        expected = expected[..., ::8]
    else:
        x, v = (z.permute(orders[layout]) for z in (x, v))
    torch.testing.assert_close(predicted(x, v, sigma, GRID), expected)


def test_conditions_beside_the_latents_are_left_out_and_other_shapes_are_none():
    x, v = torch.randn(1, 36, 5, 6, 8), torch.randn(1, 16, 5, 6, 8)
    torch.testing.assert_close(predicted(x, v, 0.5, GRID), predicted(x[:, :16], v, 0.5, GRID))
    assert predicted(v, x, 0.5, GRID) is None
    assert predicted(x, v, 0.5, (7, 3, 4)) is None
    for tokens in (59, 61):
        assert predicted(torch.randn(1, tokens, 4), torch.randn(1, tokens, 4), 0.5, GRID) is None


@pytest.mark.parametrize(("before", "after", "text"), [(12, 0, 0), (0, 24, 0), (12, 24, 0), (17, 0, 5), (0, 7, 7)])
def test_conditions_around_the_grid_are_left_out(before, after, text):
    """Reference frames and keyframes stand among the latents; text is counted with them and does not."""
    torch.manual_seed(0)
    first, last = (before - text if before >= text else 0), (after if before else after - text)
    x, v = torch.randn(2, 1, first + 60 + last, 3), torch.randn(2, 1, first + 60 + last, 3)
    own = predicted(*(z[:, 0, first : first + 60] for z in (x, v)), 0.5, GRID)
    torch.testing.assert_close(predicted(x[:, 0], v[:, 0], 0.5, GRID, before, after), own)
    if not text:
        x, v = (z[:, 0].unflatten(1, (-1, 3, 4)) for z in (x, v))
        torch.testing.assert_close(predicted(x, v, 0.5, GRID, before, after), own)


def test_channels_come_first_where_sizes_leave_it_open():
    x = torch.randn(1, 6, 6, 4, 4)
    found = predicted(x, torch.zeros_like(x), 0.5, (6, 2, 2))
    assert found.shape == (1, 6, 2, 2, 24)
    for frame in range(6):
        assert found[0, frame].flatten().sort().values.tolist() == x[0, :, frame].flatten().sort().values.tolist()


def test_what_moves_is_foreground_and_what_it_uncovers_is_not():
    clean = torch.zeros(1, 9, 8, 8, 3) + torch.rand(8, 8, 3) * 5
    truth = torch.zeros(9, 8, 8, dtype=torch.bool)
    for frame in range(9):
        truth[frame, 3:5, frame % 8 : frame % 8 + 2] = True
    clean[0, truth] = 9.0
    clean += 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(foreground(clean), truth)
    assert not foreground(torch.ones(1, 5, 4, 4, 2)).any()
    apart = (clean - clean.quantile(0.5, 1, keepdim=True)).norm(dim=-1) / 3**0.5
    torch.testing.assert_close(motion(clean), apart)


@settings(max_examples=40)
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=40))
def test_otsu_is_the_best_of_all_splits(values):
    x = torch.tensor(values, dtype=torch.float64)

    def between(threshold):
        low, high = x[x <= threshold], x[x > threshold]
        return 0.0 if not len(high) or not len(low) else float(len(low) * len(high) * (low.mean() - high.mean()) ** 2)

    best = max(between(value) for value in values)
    assert between(otsu(x)) >= best * (1 - 1e-9) - 1e-9


def test_otsu_of_values_that_are_alike():
    assert [float(otsu(torch.tensor(x))) for x in ([1.0] * 4, [3.0], [1.0, 2.0, 7.0, 9.0])] == [1, 3, 4.5]
