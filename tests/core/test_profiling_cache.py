"""ProfilingCache on a tiny model: which blocks run when, what reused blocks add, and what is refused."""

import json

import pytest
import torch
from block_calls import LAYERS, Counted, forward, run_inputs, six_blocks
from wan_tiny import denoise, require_runs_do_not_meet, tiny_transformer

import dit_accel
from dit_accel import ConfigError, EasyCache, ProfilingCache, TokenLayout
from dit_accel.methods.caches.profile_file import weights_of
from dit_accel.methods.caches.profiling import ProfilingHandler
from dit_accel.methods.registry import handler_of

ONCE = dict(every=100, warmup_steps=0)
"""Computed at step 0 alone."""


@pytest.fixture
def transformer():
    return six_blocks()


def drawn(transformer, config, steps=10):
    """The blocks that run at each step."""
    counted = Counted(transformer)
    starts = []
    transformer.patch_embedding.register_forward_hook(lambda *_: starts.append(len(counted.calls)))
    with dit_accel.attach(transformer, config) as attachment:
        denoise(transformer, steps, branches=("cond",))
        data = attachment.report().section("profilingcache").data
    ends = [*starts[1:], len(counted.calls)]
    ran = [counted.calls[one:two] for one, two in zip(starts, ends, strict=True)]
    assert data["computed_blocks"] == sum(map(len, ran)) / (steps * LAYERS)
    assert [entry["reused"] for entry in data["forwards"]] == [len(blocks) < LAYERS for blocks in ran]
    return ran


@pytest.mark.parametrize(
    "config",
    [
        ProfilingCache(blocks="1-3", every=1),
        ProfilingCache(blocks="0-5", warmup_steps=1000),
        ProfilingCache(blocks=(0, 5), refresh=(0, 1, 2, 3)),
        ProfilingCache(blocks="2", max_skips=0),
        ProfilingCache(blocks="2", steps=(1,) * 4),
    ],
)
def test_where_nothing_may_be_skipped_every_bit_stays_and_all_blocks_run(transformer, config):
    plain, counted = denoise(transformer), Counted(transformer)
    with dit_accel.attach(transformer, config) as attachment:
        assert torch.equal(denoise(transformer), plain)
        assert counted.by_forward() == [[*range(LAYERS)]] * 8
        assert attachment.report().section("profilingcache").data["computed_blocks"] == 1
    assert torch.equal(denoise(transformer), plain)


@pytest.mark.parametrize(
    ("blocks", "left"),
    [("1-3", [0, 4, 5]), ("0-2", [3, 4, 5]), ("5", [0, 1, 2, 3, 4]), ("0, 2, 4", [1, 3, 5]), ("0-5", [])],
)
def test_the_other_blocks_run_at_every_step(transformer, blocks, left):
    whole = [*range(LAYERS)]
    assert drawn(transformer, ProfilingCache(blocks=blocks, **ONCE), 4) == [whole, left, left, left]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(every=3, warmup_steps=2), "##+..+..+."),
        (dict(every=3, warmup_steps=0), "#..+..+..+"),
        (dict(every=4, every_last=1, warmup_steps=1), "#+...+..+."),
        (dict(refresh=(4, 5), warmup_steps=1), "#...++...."),
        (dict(refresh=(20, 25), measured_steps=50, warmup_steps=1), "#...++...."),
        (dict(every=10, measured_steps=50, warmup_steps=0.1), "#+.+.+.+.+"),
        (dict(every=100, warmup_steps=0, last_steps=2), "#.......##"),
        (dict(every=100, warmup_steps=0, max_consecutive=3), "#...#...#."),
        (dict(steps=(1, 0, 0, 0, 1, 0, 0, 0, 0, 1), every=100, warmup_steps=0), "#...#....#"),
    ],
)
def test_schedules(transformer, options, expected):
    ran = drawn(transformer, ProfilingCache(blocks="1-4", **options))
    assert "".join("#" if len(blocks) == LAYERS else "." for blocks in ran) == expected.replace("+", "#")


def test_two_lists_have_schedules_of_their_own(transformer):
    ran = drawn(
        transformer, ProfilingCache(blocks="3-4", refresh=(3,), blocks_2="1-2", refresh_2=(2, 4), warmup_steps=1), 6
    )
    assert ran == [[0, 1, 2, 3, 4, 5], [0, 5], [0, 1, 2, 5], [0, 3, 4, 5], [0, 1, 2, 5], [0, 5]]


@pytest.mark.parametrize("cached", [{1, 2, 3}, {0, 1, 4}, {0, 2, 5}, {0, 1, 2, 3, 4, 5}])
def test_the_rule_written_out(transformer, cached):
    """Against the published rule on the blocks of an untouched model: a run's delta is added at its last block."""
    model, deltas, steps = six_blocks(), {}, []
    starts = {index: max(i for i in range(index + 1) if i in cached and i - 1 not in cached) for index in cached}
    inputs = {}

    def take(index):
        def hook(block, args, output):
            if index == 0:
                steps.append(0)
            inputs[index] = args[0]
            computed = len(steps) - 1 in (0, 1, 4)
            if index in cached:
                if computed:
                    deltas[index] = output - inputs[starts[index]]
                else:
                    return args[0] if index + 1 in cached else args[0] + deltas[index]
            return output

        return hook

    for index, block in enumerate(model.blocks):
        block.register_forward_hook(take(index))
    expected = denoise(model, 6, branches=("cond",))
    config = ProfilingCache(blocks=tuple(sorted(cached)), refresh=(4,), warmup_steps=2)
    with dit_accel.attach(transformer, config):
        torch.testing.assert_close(denoise(transformer, 6, branches=("cond",)), expected)


@pytest.mark.parametrize("predictor", ["hold", "taylor", "heun", "chebyshev"])
def test_what_stands_still_is_reused_exactly_but_for_rounding(transformer, predictor):
    plain = forward(transformer)
    with dit_accel.attach(transformer, ProfilingCache(blocks="0, 2-4", every=100, warmup_steps=3, predictor=predictor)):
        given = [forward(transformer, step) for step in range(6)]
    assert all(torch.equal(out, plain) for out in given[:3])
    for out in given[3:]:
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5 if predictor != "chebyshev" else 0.05)


def test_a_line_is_continued_by_taylor_and_not_by_holding(transformer):
    """A block that adds n times a tensor at step n."""
    steps, added = [], torch.randn(1, 80, 32, generator=torch.Generator().manual_seed(0))
    transformer.blocks[2].register_forward_hook(
        lambda block, args, out: steps.append(0) or args[0] + len(steps) * added
    )
    model = six_blocks()
    errors = {}
    for predictor in ("hold", "taylor"):
        steps.clear()
        with dit_accel.attach(transformer, ProfilingCache(blocks="2", every=100, warmup_steps=2, predictor=predictor)):
            found = [forward(transformer, step) for step in range(4)][-1]
        handle = model.blocks[2].register_forward_hook(lambda block, args, out: args[0] + 4 * added)
        errors[predictor] = float((found - forward(model)).abs().max())
        handle.remove()
    assert errors["taylor"] < 1e-4 < errors["hold"]


def test_branches_keep_their_own_and_the_unconditional_one_may_be_skipped_alone(transformer):
    counted = Counted(transformer)
    with dit_accel.attach(transformer, ProfilingCache(blocks="1-5", branches="uncond", **ONCE)):
        denoise(transformer, 3)
    assert [len(ran) for ran in counted.by_forward()] == [6, 6, 6, 1, 6, 1]
    with dit_accel.attach(transformer, ProfilingCache(blocks="1-4", **ONCE)):
        together = denoise(transformer, 4)
    steps = [[], []]
    with dit_accel.attach(transformer, ProfilingCache(blocks="1-4", **ONCE)):
        for number, branch in enumerate(("cond", "uncond")):
            steps[number] = [forward(transformer, step, branch, 1 + 0.1 * step + number) for step in range(3)]
    with dit_accel.attach(transformer, ProfilingCache(blocks="1-4", **ONCE)):
        mixed = [
            [
                forward(transformer, step, branch, 1 + 0.1 * step + number)
                for number, branch in enumerate(("cond", "uncond"))
            ]
            for step in range(3)
        ]
    assert all(torch.equal(steps[number][step], mixed[step][number]) for step in range(3) for number in range(2))
    assert together.isfinite().all()


@pytest.mark.parametrize("options", [dict(), dict(predictor="taylor"), dict(offload="cpu")])
def test_runs_do_not_meet(options):
    require_runs_do_not_meet(ProfilingCache(blocks="0-1", every=2, warmup_steps=2, **options))


def test_memory_is_one_tensor_a_run_and_offloading_changes_no_bit(transformer):
    tokens, found = 80 * 32 * 4, []  # 5 x 4 x 4 tokens of 32 channels in float32
    for offload in ("none", "cpu"):
        with dit_accel.attach(transformer, ProfilingCache(blocks="0, 2-4", offload=offload, **ONCE)) as attachment:
            found.append(denoise(transformer, 4))
            assert attachment.report().state_bytes["profilingcache"] == 2 * 2 * tokens
            attachment.reset()
            assert not attachment.engine.handlers[0]._held()
    assert torch.equal(*found)


def test_what_is_offloaded_waits_on_the_cpu_and_comes_back(transformer):
    meta = transformer.to("meta")
    latents = torch.zeros(1, 12, 5, 8, 8, device="meta")
    with dit_accel.attach(meta, ProfilingCache(blocks="0, 2-4", offload="cpu", **ONCE)) as attachment:
        history = attachment.engine.handlers[0]
        history._start = 0.0
        one = history._new_history(None)
        one.take((torch.ones(2),), (torch.zeros(2),), 0, 0.0)
        assert one.points[0].values[0].device.type == "cpu"
        assert one.forecast((latents.new_zeros(2),), 1, 1.0, 9.0)[0].device.type == "meta"


def test_offloaded_groups_of_blocks_that_are_skipped(transformer):
    from diffusers.hooks import apply_group_offloading

    config = ProfilingCache(blocks="0, 2-3, 5", **ONCE)
    with dit_accel.attach(transformer, config):
        plain = denoise(transformer, 4)
    device = torch.device("cpu")
    for kind in (dict(offload_type="block_level", num_blocks_per_group=2), dict(offload_type="leaf_level")):
        kind |= dict(onload_device=device, offload_device=device)
        before, after = six_blocks(), six_blocks()
        apply_group_offloading(before, **kind)
        with dit_accel.attach(before, config), dit_accel.attach(after, config):
            apply_group_offloading(after, **kind)
            assert torch.equal(denoise(before, 4), plain)
            assert torch.equal(denoise(after, 4), plain)


@pytest.mark.gpu
def test_groups_that_streams_fetch_ahead_while_blocks_are_skipped(transformer):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: diffusers' group offloading has streams nowhere else")
    from diffusers.hooks import apply_group_offloading

    config, device = ProfilingCache(blocks="0, 2-3, 5", offload="cpu", **ONCE), torch.device("cuda")
    text, ones = torch.ones(1, 6, 64, device=device), torch.ones(1, 12, 5, 8, 8, device=device)
    found = []
    for streams in (None, False, True):
        model = six_blocks()
        if streams is None:
            model.to(device)
        else:
            apply_group_offloading(
                model, onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=streams
            )
        with torch.no_grad(), dit_accel.attach(model, config):
            for step in range(4):
                with model.cache_context("cond", step_index=step, num_inference_steps=4):
                    out = model(ones * (1 + step), torch.tensor([500 - step], device=device), text).sample
        found.append(out.cpu())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_compiled_blocks_skip_too(transformer):
    config = ProfilingCache(blocks="0, 2-3", **ONCE)
    with dit_accel.attach(transformer, config):
        plain = denoise(transformer, 3)
        transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        torch.testing.assert_close(denoise(transformer, 3), plain)


def test_gradients_and_training_are_computed(transformer):
    counted = Counted(transformer)
    with dit_accel.attach(transformer, ProfilingCache(blocks="0-3", **ONCE)):
        with torch.enable_grad():
            for step in range(3):
                with transformer.cache_context("cond", step_index=step, num_inference_steps=10):
                    transformer(**run_inputs())
        transformer.train()
        transformer(**run_inputs())
    assert [len(ran) for ran in counted.by_forward()] == [LAYERS] * 4


# Files.


def write_profile(path, transformer, **changes):
    entry = {"weights": weights_of(transformer), "blocks": LAYERS, "cached": [0, 2, 3], **changes}
    path.write_text(json.dumps({"profile": 1, "model": "tiny", "transformers": {"transformer": entry}}))
    return str(path)


def test_a_profile_says_what_is_cached(transformer, tmp_path):
    path = write_profile(tmp_path / "profile.json", transformer)
    assert drawn(transformer, ProfilingCache(blocks=path, **ONCE), 2) == [[*range(LAYERS)], [1, 4, 5]]
    assert weights_of(transformer) == weights_of(six_blocks().to(torch.bfloat16)) != weights_of(six_blocks(1))


def test_a_profile_of_other_weights(transformer, tmp_path):
    path = write_profile(tmp_path / "profile.json", six_blocks(1))
    with pytest.raises(ConfigError, match=r"profile\.json'.*'tiny'.*weights \w{12}, transformer"):
        dit_accel.attach(transformer, ProfilingCache(blocks=path))
    assert dit_accel.attachment_of(transformer) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r".*\(No such file.*tune profile -o"),
        ("{", r"is not JSON"),
        ("{}", r"is no .*\(version 1\)"),
        ('{"profile": 1, "transformers": {"transformer": {"weights": "", "blocks": 2, "cached": [2]}}}', "is no"),
        ('{"profile": 1, "transformers": {"other": {"weights": "", "blocks": 6, "cached": [2]}}}',
         r".*on other, .*transformer"),
        ('{"profile": 1, "transformers": {"transformer": {"weights": "", "blocks": 6, "cached": []}}}',
         r"names 0 blocks.*transformer"),
    ],
)  # fmt: skip
def test_files_that_are_no_profile(transformer, tmp_path, content, message):
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"^profilingcache\.blocks = '.*profile\.json' {message}"):
        dit_accel.attach(transformer, ProfilingCache(blocks=str(path)))


# Published lists.


@pytest.mark.parametrize(("family", "share", "runs"), [("wan2.1-14b", 0.496, 5), ("hunyuan-video", 0.544, 9)])
def test_published_lists(family, share, runs):
    from dit_accel.adapters import installed
    from dit_accel.estimate.estimate import estimate

    sizes = installed.family(family)
    adapter = next(one for one in installed.adapters().values() if sizes in one.families)
    found = estimate(adapter, sizes, methods=(ProfilingCache(),))
    assert found.computed_blocks == pytest.approx(share, abs=1e-12)
    stored = found.carried_bytes["profilingcache"]
    assert stored == runs * sizes.forwards_per_step * found.layout.tokens * sizes.heads * sizes.head_dim * 2
    other = estimate(adapter, sizes, methods=(ProfilingCache(every=1),))
    assert other.computed_blocks == 1
    half = estimate(adapter, sizes, num_inference_steps=25, methods=(ProfilingCache(offload="cpu"),))
    full = 3 + (8 if family == "wan2.1-14b" else 7.7)  # refreshes are as many, the steps between them fewer
    left = {"wan2.1-14b": 12 / 40, "hunyuan-video": 22 / 60}[family]
    assert half.computed_blocks == pytest.approx((full + (25 - full) * left) / 25, abs=0.01)
    assert half.carried_bytes == {}


def test_the_estimate_is_what_runs(transformer):
    """On a model of no released size, whose handler is asked directly."""
    from dit_accel.methods.find import resolve_model

    two = dict(refresh=(3,), blocks_2="0", refresh_2=(5,))
    for options in (dict(every=3, every_last=1), dict(max_consecutive=2, every=100), two, dict()):
        config = ProfilingCache(blocks="1-3", **options)
        handler = handler_of(config)(config, resolve_model("transformer", {"transformer": transformer}))
        assert isinstance(handler, ProfilingHandler)
        saving = handler.estimate(TokenLayout(frames=5, height=4, width=4), 10)
        skipped = saving.blocks
        assert saving.notes == ()  # one list of blocks, which runs in every step
        assert skipped == 10 * LAYERS - sum(map(len, drawn(six_blocks(), config)))


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(blocks="1", every=0), r"profilingcache\.every.*got 0"),
        (
            dict(blocks="1", every=2, refresh=(3,)),
            r"profilingcache\.every = 2 and profilingcache\.refresh = \(3,\)",
        ),
        (dict(blocks="1", every_last=2), r"every_last = 2.*profilingcache\.every"),
        (dict(blocks="1", every=2, every_last=3), r"every_last = 3.*profilingcache\.every.*2"),
        (dict(blocks="1", refresh=(3, 2)), r"profilingcache\.refresh.*got \[3, 2\]"),
        (dict(blocks="1", refresh=()), r"profilingcache\.refresh.*got \[\]"),
        (
            dict(blocks="1", refresh=(3, 20), measured_steps=20),
            r"step 20.*measured_steps = 20",
        ),
        (dict(blocks="1", blocks_2="2"), r"blocks_2 and profilingcache\.refresh_2"),
        (dict(blocks="1-3", blocks_2="3", refresh_2=(1,)), r"blocks_2.*block 3"),
        (dict(blocks="a.json", blocks_2="3", refresh_2=(1,)), r"blocks_2.*a profile"),
        (dict(blocks=()), r"profilingcache\.blocks.*0 blocks"),
        (dict(blocks="one"), r"profilingcache\.blocks = 'one'.*'one'"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        ProfilingCache(**options)


def test_blocks_that_are_not_there(transformer):
    with pytest.raises(
        ConfigError,
        match=r"^profilingcache\.blocks.*5 blocks.*transformer.*6-8.*6 \(6 of blocks\.\*\).*0 to 5",
    ):
        dit_accel.attach(transformer, ProfilingCache(blocks="4-8"))
    with pytest.raises(ConfigError, match=r"^profilingcache.*'wan, 6 layers, 2 heads'.*hunyuan"):
        dit_accel.attach(transformer, ProfilingCache())
    with pytest.raises(ConfigError, match=r"^EasyCache and ProfilingCache"):
        dit_accel.attach(transformer, ProfilingCache(blocks="1"), EasyCache())


def test_schedules_longer_than_the_run_are_refused_before_its_first_block(transformer):
    counted = Counted(transformer)
    with (
        dit_accel.attach(transformer, ProfilingCache(blocks="0", refresh=(6, 10), warmup_steps=6)),
        pytest.raises(ConfigError, match=r"^profilingcache\.refresh.*step 10.*10 steps"),
    ):
        denoise(transformer, 10)
    assert counted.calls == []


def test_a_run_whose_length_is_not_known():
    transformer = tiny_transformer()
    inputs = dict(
        hidden_states=torch.zeros(1, 12, 5, 8, 8),
        timestep=torch.tensor([500]),
        encoder_hidden_states=torch.zeros(1, 6, 64),
    )
    for options, what in ((dict(measured_steps=50), "measured_steps = 50"), (dict(every_last=1), "every_last = 1")):
        config = ProfilingCache(blocks="1", every=2, warmup_steps=1, **options)
        with (
            torch.no_grad(), dit_accel.attach(transformer, config),
            pytest.raises(ConfigError, match=rf"^profilingcache\.{what}.*steps"),
        ):  # fmt: skip
            [transformer(**{**inputs, "timestep": torch.tensor([time])}) for time in (500, 400)]
    with (
        torch.no_grad(),
        dit_accel.attach(transformer, ProfilingCache(blocks="1", every=3, warmup_steps=1)) as attachment,
    ):
        for time in (500, 400, 300, 200, 100):
            transformer(**{**inputs, "timestep": torch.tensor([time])})
        reused = [entry["reused"] for entry in attachment.report().section("profilingcache").data["forwards"]]
    assert reused == [False, False, True, True, False]
