"""ProfilingCache on a tiny model: its rule and schedules, published lists, profiles, and what is offloaded."""

import json

import pytest
import torch
from block_calls import LAYERS, WHOLE, Counted, forward, ran_by_step, run_inputs, six_blocks
from diffusers.hooks import apply_group_offloading
from hypothesis import given
from hypothesis import strategies as st
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel import ConfigError, ProfilingCache, TokenLayout
from dit_accel.adapters import installed
from dit_accel.estimate.prediction import estimate
from dit_accel.methods.caches.block_numbers import read_numbers, spell_numbers
from dit_accel.methods.caches.profile_file import weights_digest
from dit_accel.methods.find import resolve_model
from dit_accel.methods.registry import handler_of
from dit_accel.rules.block_schedule import rescaled_steps, runs_of

ONCE = dict(every=100, warmup_steps=0)
"""Computed at step 0 alone."""


@pytest.fixture
def transformer():
    return six_blocks()


@pytest.mark.parametrize("cached", [{1, 2, 3}, {0, 1, 4}, {0, 2, 5}, {0, 1, 2, 3, 4, 5}])
def test_the_rule_of_profilingcache(transformer, cached):
    """What a run of blocks added is added again at its last block."""
    model, deltas, steps = six_blocks(), {}, []
    starts = {index: max(i for i in range(index + 1) if i in cached and i - 1 not in cached) for index in cached}
    inputs = {}

    def take(index):
        def hook(block, args, output):
            if index == 0:
                steps.append(0)
            inputs[index] = args[0]
            if index in cached:
                if len(steps) - 1 not in (0, 1, 4):
                    return args[0] if index + 1 in cached else args[0] + deltas[index]
                deltas[index] = output - inputs[starts[index]]
            return output

        return hook

    for index, block in enumerate(model.blocks):
        block.register_forward_hook(take(index))
    expected = denoise(model, 6, branches=("cond",))
    config = ProfilingCache(blocks=tuple(sorted(cached)), refresh=(4,), warmup_steps=2)
    with dit_accel.attach(transformer, config):
        torch.testing.assert_close(denoise(transformer, 6, branches=("cond",)), expected)


def test_what_is_offloaded_waits_on_the_cpu_and_comes_back(transformer):
    meta = transformer.to("meta")
    for offload, where in (("cpu", "cpu"), ("none", "meta")):
        with dit_accel.attach(meta, ProfilingCache(blocks="0, 2-4", offload=offload, **ONCE)) as attachment:
            handler = attachment.engine.handlers[0]
            handler._start = 0
            history = handler._new_history(None, False)
            history.take((torch.ones(2, device=where), None), (torch.zeros(2, device=where),), 0)
            assert history.points[0].values[0].device.type == where
            stream, other = history.forecast((torch.zeros(2, device="meta"),), 1, 9)
            assert (stream.device.type, other) == ("meta", None)


@pytest.mark.gpu
def test_groups_that_streams_fetch_ahead_while_blocks_are_skipped():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: diffusers' group offloading has streams nowhere else")
    config, device = ProfilingCache(blocks="0, 2-3, 5", offload="cpu", **ONCE), torch.device("cuda")
    inputs, outputs = {name: x.to(device) for name, x in run_inputs().items()}, []
    for streams in (None, False, True):
        model, group = six_blocks(), dict(offload_type="block_level", num_blocks_per_group=1, use_stream=streams)
        model.to(device) if streams is None else apply_group_offloading(model, onload_device=device, **group)
        with dit_accel.attach(model, config):
            outputs.append([forward(model, step, **inputs).cpu() for step in range(4)])
    assert all(map(torch.equal, outputs[0], outputs[1]))
    assert all(map(torch.equal, outputs[0], outputs[2]))


SCHEDULES = {
    "##+..+..+.": dict(every=3, warmup_steps=2),
    "#...++....": dict(refresh=(0, 4, 5), warmup_steps=1),
    "#+.+.+.+.+": dict(every=10, measured_steps=50, warmup_steps=0.1),
    "#...#...#.": dict(every=100, warmup_steps=0, max_consecutive=3),
    "#.......##": dict(every=100, warmup_steps=0, last_steps=2),
}


def test_schedules_of_profilingcache(transformer):
    for drawn, options in SCHEDULES.items():
        ran = ran_by_step(transformer, ProfilingCache(blocks="1-4", **options))
        assert "".join("#" if blocks == WHOLE else "." for blocks in ran) == drawn.replace("+", "#")
    two = ProfilingCache(blocks="3-4", refresh=(3,), blocks_2="1-2", refresh_2=(2, 4), warmup_steps=1)
    expected = [WHOLE, [0, 5], [0, 1, 2, 5], [0, 3, 4, 5], [0, 1, 2, 5], [0, 5]]
    assert ran_by_step(transformer, two, 6) == expected
    usual = ProfilingCache(blocks="1").filled()
    assert (usual.every, usual.measured_steps, usual.warmup_steps, usual.last_steps) == (6, 50, 0.12, 0)


def test_the_estimate_is_what_runs(transformer):
    """On a model of no released size, whose handler is asked directly."""
    two = dict(refresh=(3,), blocks_2="0", refresh_2=(5,), max_consecutive=2)
    other_length = dict(refresh=(20, 25), measured_steps=50)
    for options in (dict(max_consecutive=2, every=2), two, other_length, dict()):
        config = ProfilingCache(blocks="1-3", **options)
        handler = handler_of(config)(config, resolve_model("transformer", {"transformer": transformer}))
        saving = handler.estimate(TokenLayout(frames=5, height=4, width=4), 10)
        assert saving.notes == ()  # one list of blocks, which runs in every step
        assert saving.blocks == 10 * LAYERS - sum(map(len, ran_by_step(six_blocks(), config)))


@pytest.mark.parametrize(
    ("family", "share", "runs", "full", "left"),
    [("wan2.1-14b", 0.496, 5, 3 + 8, 12 / 40), ("hunyuan-video", 0.544, 9, 3 + 7.7, 22 / 60)],
)
def test_published_lists(family, share, runs, full, left):
    """In half as many steps refreshes are as many, and the steps between them, which run a part, are fewer."""
    sizes = installed.family(family)
    adapter = next(one for one in installed.adapters().values() if sizes in one.families)

    def planned(steps=None, **options):
        return estimate(adapter, sizes, num_inference_steps=steps, methods=(ProfilingCache(**options),))

    whole, half = planned(), planned(25, offload="cpu")
    assert whole.computed_blocks == pytest.approx(share, abs=1e-12)
    stored = runs * sizes.forwards_per_step * whole.layout.tokens * sizes.heads * sizes.head_dim * 2
    assert (whole.carried_bytes, half.carried_bytes) == ({"profilingcache": stored}, {})
    assert half.computed_blocks == pytest.approx((full + (25 - full) * left) / 25, abs=0.01)
    assert planned(every=1).computed_blocks == 1
    with pytest.raises(ConfigError, match=rf"\.blocks.*{family} lacks {sizes.layers}-99"):
        planned(blocks="3-99")
    assert planned(every=2, warmup_steps=0).computed_blocks == pytest.approx((1 + left) / 2)


def write_profile(path, weights, **changes):
    entry = {"weights": weights, "blocks": LAYERS, "cached": [3, 0, 2], **changes}
    path.write_text(json.dumps({"profile": 1, "model": "tiny", "transformers": {"transformer": entry}}))
    return str(path)


def test_a_profile_says_what_is_cached(transformer, tmp_path):
    weights = weights_digest(transformer)
    counting = torch.nn.Linear(5, 4)
    torch.nn.utils.vector_to_parameters(torch.arange(24.0), counting.parameters())
    assert weights_digest(counting) == "c854f3c0a86a"  # profiles that were written keep theirs
    path = write_profile(tmp_path / "profile.json", weights)
    assert ran_by_step(transformer, ProfilingCache(blocks=path, **ONCE), 2) == [WHOLE, [1, 4, 5]]
    assert ProfilingCache(blocks=path).groups() == ((0, 2, 3),)
    assert weights == weights_digest(six_blocks().to(torch.bfloat16)) != weights_digest(six_blocks(1))
    write_profile(tmp_path / "profile.json", weights_digest(six_blocks(1)))
    with pytest.raises(ConfigError, match=r"profile\.json'.*'tiny'.*weights \w{12}, transformer"):
        dit_accel.attach(transformer, ProfilingCache(blocks=path))


def test_files_that_are_no_profile(transformer, tmp_path):
    path, entry = tmp_path / "profile.json", '{"weights": "", "blocks": %s, "cached": [%s]}'
    for content, message in (
        (None, r".*\(No such file.*tune profile -o"),
        ("{", "is not JSON"),
        ("{}", r"is no .*\(version 1\)"),
        ('{"profile": 1, "transformers": {"transformer": %s}}' % (entry % (2, "0, 2")), "is no"),
        ('{"profile": 1, "transformers": {"transformer": %s}}' % (entry % (6.5, "2")), "is no"),
        ('{"profile": 1, "transformers": {"other": %s}}' % (entry % (6, "2")), r".*on other, .*transformer"),
        ('{"profile": 1, "transformers": {"transformer": %s}}' % (entry % (6, "")), r"names 0 blocks.*transformer"),
    ):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=rf"^profilingcache\.blocks = '.*profile\.json' {message}"):
            dit_accel.attach(transformer, ProfilingCache(blocks=str(path)))
        assert dit_accel.attachment_of(transformer) is None


def test_schedules_that_the_run_is_too_short_for_or_whose_length_is_not_known(transformer):
    counted = Counted(transformer)
    refused = pytest.raises(ConfigError, match=r"^profilingcache\.refresh.*step 10.*10 steps")
    with dit_accel.attach(transformer, ProfilingCache(blocks="0", refresh=(6, 10), warmup_steps=6)), refused:
        denoise(transformer, 10)
    assert counted.calls == []
    short = tiny_transformer()

    def run(config, *times):
        with torch.no_grad(), dit_accel.attach(short, config) as attachment:
            for time in times:
                short(**{**run_inputs(), "timestep": torch.tensor([time])})
            return [entry["reused"] for entry in attachment.report().section("profilingcache").data["forwards"]]

    with pytest.raises(ConfigError, match=r"^profilingcache\.measured_steps = 50.*steps"):
        run(ProfilingCache(blocks="1", every=2, warmup_steps=1, measured_steps=50), 500, 400)
    alone = ProfilingCache(blocks="1", every=3, warmup_steps=1)
    assert run(alone, 500, 400, 300, 200, 100) == [False, False, True, True, False]


@given(st.sets(st.integers(0, 49), min_size=1), st.integers(1, 200))
def test_rescaled_steps_are_of_the_run_and_keep_their_share_of_it(listed, steps):
    found = rescaled_steps(sorted(listed), 50, steps)
    assert found == tuple(sorted({*found}))
    assert all(type(step) is int for step in found)
    assert 0 <= found[0] <= found[-1] < steps
    assert all(min(abs(step / steps - one / 50) for one in listed) <= 1 / steps for step in found)
    assert rescaled_steps(sorted(listed), 50, 50) == tuple(sorted(listed))


@given(st.sets(st.integers(0, 99), min_size=1))
def test_numbers_are_read_as_they_are_spelt(numbers):
    assert read_numbers(spell_numbers(numbers), "x") == tuple(sorted(numbers))
    assert sum(last - first + 1 for first, last in runs_of([*numbers])) == len(numbers)
    for text in ("a", "3-", "3-2", "1;2", "-1", ""):
        with pytest.raises(ConfigError, match=rf"^here\.blocks = {text!r}.*'0, 2-7'"):
            read_numbers(text, "here.blocks")
    with pytest.raises(ConfigError, match=r"^here\.blocks.*0 blocks"):
        read_numbers((), "here.blocks")
