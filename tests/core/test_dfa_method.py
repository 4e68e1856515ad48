"""DFA on tiny models: full steps, what the background keeps, what the foreground sees, beside sparse lists."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import MODELS
from wan_tiny import denoise, sharp_transformer, tiny_transformer

import dit_accel
from dit_accel import PAG, ConfigError, LiteAttention, RadialAttention, SoftPAG, SolAttention, SparseD, TokenLayout
from dit_accel.adapters import installed
from dit_accel.attachment.engine import run_kernel
from dit_accel.attachment.kernel_call import computed_rows
from dit_accel.estimate.work import tiles_left
from dit_accel.methods.attention.delta import DeltaAttention
from dit_accel.methods.attention.dfa import DFA
from dit_accel.methods.find import resolve_model
from dit_accel.methods.registry import handler_of
from dit_accel.rules.foreground import foreground, predicted
from dit_accel.testing.tiny_models import Case

SPARSE = dict(block_size=16, dense_steps=0, dense_last_steps=0, dense_layers=0)
EVERY_2 = dict(every=2, warmup_steps=0, last_steps=0)


@pytest.fixture
def transformer():
    return tiny_transformer()


def steps_of(transformer, *methods, steps=4, seed=0, told=True, branches=("cond",)):
    """The planned calls of some steps on moving latents, and the outputs."""
    calls, outputs = [], []
    generator = torch.Generator().manual_seed(seed)
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
            for branch in branches:
                named = dict(step_index=step, num_inference_steps=steps)
                with transformer.cache_context(branch, **named, **(dict(sigma=sigma) if told else {})):
                    time = torch.tensor([1000.0 * sigma])
                    noisy = still + 0.1 * sigma * torch.randn(still.shape, generator=generator)
                    outputs.append(transformer(noisy, time, text, return_dict=False)[0])
        return calls, outputs, attachment.report()


@pytest.mark.parametrize("config", [DFA(every=1), DFA(share=1.0, **EVERY_2), DFA(share=0.0, warmup_steps=1000)])
def test_full_steps_and_a_foreground_of_everything_keep_every_bit(transformer, config):
    plain = denoise(transformer)
    with dit_accel.attach(transformer, config):
        assert torch.equal(denoise(transformer), plain)
    assert torch.equal(denoise(transformer), plain)


def test_no_foreground_is_pyramid_attention_broadcast(transformer):
    model, held, calls = tiny_transformer(), {}, [0]

    def count(*_):
        calls[0] += 1

    def hook(index):
        def broadcast(attention, args, output):
            step, branch = divmod(calls[0] - 1, 2)
            if step % 3 == 0:
                held[index, branch] = output
            return held[index, branch]

        return broadcast

    model.register_forward_pre_hook(count)
    for index, block in enumerate(model.blocks):
        block.attn1.register_forward_hook(hook(index))
    expected = denoise(model, 7)
    with dit_accel.attach(transformer, DFA(share=0.0, every=3, warmup_steps=0, last_steps=0)) as attachment:
        torch.testing.assert_close(denoise(transformer, 7), expected)
        report = attachment.report()
    assert [step.density for step in report.steps] == [1.0, 1.0, *[0.0] * 4] * 2 + [1.0, 1.0]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("share", [None, 0.25])
def test_the_foreground_attends_and_the_background_keeps_its_output(transformer, share, strict):
    calls, _, report = steps_of(transformer, DFA(share=share, strict=strict, **EVERY_2))
    by_step = [calls[step * 3 : step * 3 + 3] for step in range(4)]
    for step in (1, 3):
        for now, before in zip(by_step[step], by_step[step - 1], strict=True):
            (rows,), call = now.plan.reused.rows, now.call
            k, v = (x[:, :, rows] if strict else x for x in (call.k, call.v))
            own = torch.nn.functional.scaled_dot_product_attention(call.q[:, :, rows], k, v)
            torch.testing.assert_close(now.out[:, :, rows], own)
            rest = torch.ones(80, dtype=torch.bool).index_fill(0, rows, False)
            assert torch.equal(now.out[:, :, rest], before.out[:, :, rest])
            assert 0 < len(rows) < 80
            assert len(rows) == 20 or share is None
    shares = [step.density for step in report.steps]
    rows = len(by_step[1][0].plan.reused.rows[0]) / 80
    assert shares[1] == pytest.approx(rows**2 if strict else rows)
    assert shares[0] == shares[2] == 1


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "perturbed", [PAG(layers="L0", start=0.0), SoftPAG(heads="L0H1", u=0.5, start=0.0), SoftPAG(heads="L0", start=0.0)]
)
def test_the_foreground_of_a_perturbed_branch_is_perturbed(transformer, perturbed, strict, sparse):
    """Where only some rows are computed, each takes the share of its own V; the kernel knows V by the rows of Q."""
    masks = [RadialAttention(decay_factor=0.2, near="half", **SPARSE)] if sparse else []
    calls, _, _ = steps_of(transformer, DFA(strict=strict, **EVERY_2), perturbed, *masks)
    found = 0
    for seen in calls:
        plan, reused = seen.plan, seen.plan.reused
        if reused is not None and plan.identity_mix is not None and len(reused.rows[0]):
            rows, share = reused.rows[0], plan.value_share(seen.out.shape[1], seen.out.dtype)
            bare = replace(plan, identity_mix=None, only_values=False)
            cut, small, rows = computed_rows(bare, seen.call, rows, reused.keys)
            logits = small.q @ small.k.transpose(-1, -2) * small.q.shape[-1] ** -0.5
            if cut.tiles is None:
                expected = torch.lerp(logits.softmax(-1) @ small.v, seen.call.v[:, :, rows], share)
                torch.testing.assert_close(seen.out[:, :, rows], expected)
            whole, rows = (share == 1).flatten(), reused.rows[0] if plan.skips_logits else rows
            assert torch.equal(seen.out[:, whole][:, :, rows], seen.call.v[:, whole][:, :, rows])
            found += 1
    assert found


def test_the_mask_is_what_moves_in_the_models_own_prediction(transformer):
    seen, model = [], tiny_transformer()
    model.register_forward_hook(lambda m, args, output: seen.append((args[0].clone(), output[0].clone())))
    steps_of(model, steps=4)
    calls, _, report = steps_of(transformer, DFA(**EVERY_2))
    expected = foreground(predicted(*seen[0], 1.0, (5, 4, 4)))
    assert calls[3].plan.reused.rows[0].tolist() == expected.flatten().nonzero()[:, 0].tolist()
    entries = report.section("dfa").data["foreground"]
    assert [entry["step_index"] for entry in entries] == [0, 2]
    assert entries[0]["foreground"] == [pytest.approx(float(expected.float().mean()))]


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        (dict(every=3, warmup_steps=0, last_steps=0), "#..#..#."),
        (dict(every=2, warmup_steps=3, last_steps=1), "###.#.##"),
        (dict(every=100, warmup_steps=0.25, last_steps=2), "##....##"),
    ],
)
def test_schedules(transformer, options, drawn):
    config = DFA(share=0.5, **options)
    calls, _, _ = steps_of(transformer, config, steps=8)
    assert "".join("#" if call.plan.reused is None else "." for call in calls[::3]) == drawn
    assert config.reusing(8) == {step for step, mark in enumerate(drawn) if mark == "."}


@pytest.mark.parametrize("strict", [False, True])
def test_the_plan_counts_what_runs_where_the_share_is_set(transformer, strict):
    """On a model of no released size, whose handler is asked directly."""
    config = DFA(share=0.25, strict=strict, every=3, warmup_steps=2, last_steps=1)
    _, _, report = steps_of(transformer, config, steps=9)
    handler = handler_of(config)(config, resolve_model("transformer", {"transformer": transformer}))
    saving = handler.estimate(TokenLayout(frames=5, height=4, width=4), 9)
    found = tiles_left({"dfa": saving}, 9, 3, 80)
    assert found.rows_alone
    counted = found.dense_share + (1 - found.dense_share) * found.density
    assert counted == pytest.approx(sum(step.density for step in report.steps) / 9, abs=0.001)
    assert saving.counted
    assert not handler_of(config)(DFA(), handler.model).estimate(TokenLayout(frames=5, height=4, width=4), 9).counted


@pytest.mark.parametrize(
    "sparse",
    [
        RadialAttention(decay_factor=0.2, near="half", sink=False, **SPARSE),
        RadialAttention(decay_factor=0.2, near="half", sink=False, rest="pooled", **SPARSE),
        SolAttention(**SPARSE),
        SparseD(block_size=16, density=0.5, dense_steps=0, dense_last_steps=0, dense_layers=0),
    ],
    ids=["radial", "pooled", "sol", "sparsed"],
)
def test_the_foreground_follows_the_sparse_methods_lists(sparse):
    transformer, found = sharp_transformer(), []
    calls, outputs, report = steps_of(transformer, sparse, DFA(share=0.03, **EVERY_2))
    with dit_accel.attach(transformer, sparse) as attachment:
        for now in calls[3:6]:
            whole = run_kernel(replace(now.plan, reused=None), now.call, attachment.engine.recorder).out
            changed = (now.out != now.plan.reused.out).any(-1)[0].any(0)
            (rows,) = now.plan.reused.rows
            torch.testing.assert_close(now.out[:, :, rows], whole[:, :, rows], rtol=1e-4, atol=1e-5)
            found.append(int(changed.sum()))
    assert all(len(calls[3].plan.reused.rows[0]) <= count < 80 for count in found)
    assert report.steps[1].density < report.steps[0].density
    assert all(out.isfinite().all() for out in outputs)


def rows_of_prompts(methods, seeds, branch="cond"):
    """The outputs of four steps of some rows in one batch, each with a moving thing of its own, and the calls."""
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


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "methods",
    [
        (),
        (RadialAttention(decay_factor=0.2, near="half", sink=False, **SPARSE),),
        (RadialAttention(decay_factor=0.2, near="half", sink=False, rest="pooled", **SPARSE),),
        (SolAttention(**SPARSE),),
        (SparseD(block_size=16, density=0.5, dense_steps=0, dense_last_steps=0, dense_layers=0),),
    ],
    ids=["alone", "radial", "pooled", "sol", "sparsed"],
)
def test_rows_of_a_batch_are_what_they_are_alone(methods, strict):
    methods = (*methods, DFA(share=0.1, strict=strict, **EVERY_2))
    plain, _, _ = rows_of_prompts(methods[:-1], [1, 3])
    alone = [rows_of_prompts(methods, [seed]) for seed in (1, 3)]
    both, calls, report = rows_of_prompts(methods, [1, 3])
    found = calls[3].plan.reused
    assert len(found.rows) == 2
    assert found.rows[0].tolist() != found.rows[1].tolist()
    for row, (expected, own, _) in enumerate(alone):
        assert own[3].plan.reused.rows[0].tolist() == found.rows[row].tolist()
        assert not torch.allclose(expected, plain[row : row + 1], rtol=0, atol=1e-4)
        torch.testing.assert_close(both[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    densities = [[step.density for step in one.steps] for one in (alone[0][2], alone[1][2], report)]
    assert densities[2] == pytest.approx([(one + other) / 2 for one, other, _ in zip(*densities, strict=True)])
    assert [step.sparse_layers for step in report.steps] == [step.sparse_layers for step in alone[0][2].steps]
    values = report.section("dfa").data["foreground"][0]["foreground"]
    assert len(values) == 2


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


def test_text_attends_at_every_step():
    (case, *_) = (Case(installed.adapters()["hunyuan-video"], model) for model in MODELS["hunyuan-video"])
    calls = []
    with dit_accel.attach(case.transformer, DFA(share=0.0, **EVERY_2)) as attachment, attachment.observe(calls.append):
        for step in range(2):
            case.run(case.inputs(2), step)
    count = len(calls) // 2
    for before, now in zip(calls[:count], calls[count:], strict=True):
        layout = now.context.layout
        text = [*range(layout.text_before), *range(layout.visual.stop, layout.tokens)]
        assert text
        assert now.plan.reused.rows[0].tolist() == text
        assert torch.equal(now.out[:, :, layout.visual], before.out[:, :, layout.visual])


def test_beside_a_step_cache_it_counts_the_steps_that_run(transformer):
    config = dit_accel.StaticCache(steps=(1, 0, 1, 0, 1, 0, 1, 0))
    calls, _, _ = steps_of(transformer, DFA(share=0.25, **EVERY_2), config, steps=8)
    drawn = {call.context.step_index: "." if call.plan.reused else "#" for call in calls}
    assert drawn == {0: "#", 2: ".", 4: "#", 6: "."}


def test_what_is_refused(transformer):
    lite, delta = LiteAttention(block_size=16), DeltaAttention(stride=8)
    for others, name in (((lite,), "lite"), ((SparseD(block_size=16), delta), "delta")):
        with pytest.raises(ConfigError, match=rf"^dfa.*rows.*{name}"):
            dit_accel.attach(transformer, DFA(), *others)
    with pytest.raises(ConfigError, match=r"^dfa.*noise level.*EasyCache"):
        steps_of(transformer, DFA(**EVERY_2), told=False)
    case = Case(installed.adapters()["flux"], MODELS["flux"][0])
    with pytest.raises(ConfigError, match=r"^dfa.*flux.*image"):
        dit_accel.attach(case.transformer, DFA())
    with (
        dit_accel.attach(transformer, DFA()),
        pytest.raises(ConfigError, match=r"^dfa\.last_steps = 1"),
    ):
        transformer(torch.zeros(1, 12, 5, 8, 8), torch.tensor([500]), torch.zeros(1, 6, 64))


def test_in_a_pipeline_the_scheduler_tells_the_noise_level():
    from dit_accel_pipelines.generation.loading import load_pipeline
    from dit_accel_pipelines.generation.request import Request, resolve

    request = Request(
        prompts=("a red circle moving right",), output=Path("unused.mp4"), num_frames=9, height=32, width=32
    )
    pipe = load_pipeline(resolve(request)[0])
    call = dict(num_frames=9, height=32, width=32, num_inference_steps=6, output_type="latent")
    with dit_accel.attach(pipe, DFA(every=2, warmup_steps=2)) as attachment:
        pipe("a red circle moving right", **call)
        report = attachment.report()
    values = [value for entry in report.section("dfa").data["foreground"] for value in entry["foreground"]]
    assert all(0 < value < 1 for value in values)
    assert [step.density < 1 for step in report.steps if step.branch == "cond"] == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
