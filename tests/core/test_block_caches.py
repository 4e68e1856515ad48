"""Caches of blocks on a tiny model: which blocks run, what skipped ones add by the published rules, what is refused."""

import pytest
import torch
from block_calls import LAYERS, WHOLE, Counted, forward, ran_by_step, run_inputs, six_blocks
from diffusers.hooks import group_offloading
from torch import nn
from wan_tiny import denoise

import dit_accel
from dit_accel import ConfigError, DBCache, DBPrune, EasyCache, FirstBlockCache, ProfilingCache

FOREVER = dict(threshold=1e9, warmup_steps=0, last_steps=0)
ONCE = dict(every=100, warmup_steps=0)
"""Computed at step 0 alone."""


@pytest.fixture
def transformer():
    return six_blocks()


def test_blocks_that_always_run(transformer):
    for config, left in (
        (FirstBlockCache(**FOREVER), [0]),
        (DBCache(first_blocks=4, last_blocks=1, **FOREVER), [0, 1, 2, 3, 5]),
        (DBPrune(first_blocks=2, last_blocks=1, **FOREVER), [0, 1, 5]),
        (ProfilingCache(blocks="0, 2, 4", **ONCE), [1, 3, 5]),
        (ProfilingCache(blocks="0-5", **ONCE), []),
    ):
        assert ran_by_step(transformer, config, 3, ("cond", "uncond")) == [WHOLE] * 2 + [left] * 4


@pytest.mark.parametrize(("first", "last", "threshold"), [(1, 0, 0.1), (2, 1, 0.02), (2, 1, 0.1), (2, 1, 0.3)])
def test_the_rule_of_dbcache(transformer, first, last, threshold):
    model = six_blocks()
    seen, skip = {}, []
    middle = range(first, LAYERS - last)

    def take(index):
        def hook(block, args, output):
            if index in middle and skip[-1]:
                output = args[0] if index < middle[-1] else args[0] + seen["middle"]
            seen[index] = args[0], output
            if index == first - 1:
                added = output - seen[0][0]
                changed = (added - seen["added"]).abs().mean() / seen["added"].abs().mean() if skip else torch.inf
                skip.append(bool(changed < threshold))
                if not skip[-1]:
                    seen["added"] = added
            if index == middle[-1] and not skip[-1]:
                seen["middle"] = output - seen[first][0]
            return output

        return hook

    for index, block in enumerate(model.blocks):
        block.register_forward_hook(take(index))
    expected = denoise(model, 10, branches=("cond",))
    config = DBCache(first_blocks=first, last_blocks=last, threshold=threshold, warmup_steps=0, last_steps=0)
    with dit_accel.attach(transformer, config) as attachment:
        torch.testing.assert_close(denoise(transformer, 10, branches=("cond",)), expected)
        section = attachment.report().section("dbcache")
    assert [entry["reused"] for entry in section.data["forwards"]] == skip
    assert 0 < sum(skip) < 9 or threshold != 0.1
    always = first + last
    assert section.lines[-1] == f"transformer: a reused forward runs {always} of {LAYERS} blocks"
    assert (section.data["blocks"], section.data["blocks_always_run"]) == ({"transformer": LAYERS}, always)


def test_the_rule_of_dbprune(transformer):
    """Of two branches, the first decides."""
    threshold, model, ran, expected_ran = 0.2, six_blocks(), [], []
    inputs, added, call, skipped = {}, {}, [-1], set()

    def take(index):
        def hook(block, args, output):
            x = args[0]
            call[0] += index == 0
            branch = call[0] % 2
            if branch == 0:
                skipped.discard(index)
            stored = inputs.get(index) if index and call[0] > 1 and branch == 0 else None
            if stored is not None and float((x - stored).abs().mean() / stored.abs().mean()) < threshold:
                skipped.add(index)
            if index in skipped:
                return x + added[index, branch]
            expected_ran.append(index)
            if branch == 0:
                inputs[index] = x
            added[index, branch] = output - x
            return output

        return hook

    for index, block in enumerate(model.blocks):
        block.register_forward_hook(take(index))
        transformer.blocks[index].register_forward_hook(lambda *_, index=index: ran.append(index))
    expected = denoise(model, 8)
    with dit_accel.attach(transformer, DBPrune(**{**FOREVER, "threshold": threshold})):
        torch.testing.assert_close(denoise(transformer, 8), expected)
    assert ran == expected_ran
    assert 0 < len(ran) < 16 * LAYERS


def test_what_may_not_be_skipped_leaves_nothing_to_reuse(transformer):
    """Values that are no numbers, gradients to some of the weights, other shapes."""
    counted = Counted(transformer)
    with dit_accel.attach(transformer, FirstBlockCache(**FOREVER)) as attachment:
        for step, scale in enumerate((1, 1, float("nan"), 1, 1, 1)):
            forward(transformer, step, scale=scale)
        reasons = [entry["reason"] for entry in attachment.report().section("firstblockcache").data["forwards"]]
    assert counted.lengths() == [6, 1, 6, 6, 1, 1]
    assert reasons[1:4] == ["measured", "not a number", "not a number"]
    for config in (FirstBlockCache(**FOREVER), DBPrune(**FOREVER)):  # where the first branch of the steps ends
        with dit_accel.attach(transformer, config):
            for step, branch in enumerate(("cond", "uncond", "uncond", "uncond")):
                forward(transformer, max(step - 1, 0), branch)
        assert counted.lengths() == [6, 6, 6, 1]
    transformer.requires_grad_(False)
    transformer.blocks[4].requires_grad_(True)  # as fine-tuning of some layers has it
    with dit_accel.attach(transformer, ProfilingCache(blocks="1-5", **ONCE)):
        for step, gradients in enumerate((False, False, True, False, False)):
            with torch.set_grad_enabled(gradients), transformer.cache_context("a", step_index=step):
                transformer(**run_inputs())
    assert counted.lengths() == [6, 1, 6, 6, 1]
    transformer.requires_grad_(False)
    with dit_accel.attach(transformer, ProfilingCache(blocks="1, 3", **ONCE)):
        for step, gradients in enumerate((True, False, False)):  # as of a prompt that is learned
            with transformer.cache_context("a", step_index=step):
                transformer(**{**run_inputs(), "encoder_hidden_states": torch.zeros(1, 6, 64, requires_grad=gradients)})
    assert counted.lengths() == [6, 6, 4]
    with dit_accel.attach(transformer, FirstBlockCache(**FOREVER)):
        for step, (frames, text) in enumerate(((5, 6), (5, 6), (4, 6), (4, 6), (4, 7), (4, 7))):
            latents, words = run_inputs()["hidden_states"][:, :, :frames], torch.zeros(1, text, 64)
            forward(transformer, step, hidden_states=latents, encoder_hidden_states=words)
    assert counted.lengths() == [6, 1, 6, 1, 6, 1]


def test_memory_is_counted_and_freed(transformer):
    tokens = 80 * 32 * 4  # of 5 x 4 x 4 tokens of 32 channels in float32
    for config, tensors in (
        (DBCache(first_blocks=2, warmup_steps=2, threshold=1e9), 2 + 1),
        (DBCache(first_blocks=2, warmup_steps=2, threshold=1e9, predictor="heun"), 2 * 3 + 1),
        (DBPrune(**FOREVER), (2 + 1) * 5),  # two branches of five blocks, and their inputs
        (ProfilingCache(blocks="0, 2-4", **ONCE), 2 * 2),  # one tensor a run of blocks
    ):
        with dit_accel.attach(transformer, config) as attachment:
            denoise(transformer, 5)
            assert attachment.report().state_bytes[config.name] == tensors * tokens, config
            attachment.reset()
            assert not attachment.engine.handlers[0]._histories


def calls_of(block, call):
    """Have the model call a function of a block's own call and arguments, outside of all that is attached."""

    class Replaced(type(block)):
        def __call__(self, *args, **kwargs):
            return call(super().__call__, *args, **kwargs)

    block.__class__ = Replaced


def test_blocks_that_are_left_out_as_guidance_by_a_skipped_layer_does_in_its_interval(transformer):
    without, left_out = six_blocks(), [True]
    del without.blocks[3]
    calls_of(transformer.blocks[3], lambda run, x, *args: x if left_out[0] else run(x, *args))
    with dit_accel.attach(transformer, FirstBlockCache(**FOREVER)):
        assert torch.equal(forward(transformer), forward(without))
        torch.testing.assert_close(forward(transformer, 1), forward(without))
        left_out[0] = False
        forward(transformer)
        left_out[0] = True
        with pytest.raises(ConfigError, match=r"^firstblockcache.*\[1, 2, 3, 4, 5\].*step 1.*\[1, 2, 4, 5\]"):
            forward(transformer, 1)
    counted = Counted(transformer)
    with dit_accel.attach(transformer, DBPrune(**FOREVER)):
        for step, left_out[0] in enumerate((True, False)):
            forward(transformer, step)
    assert counted.by_forward() == [[0, 1, 2, 4, 5], [0, 3]]
    calls_of(transformer.blocks[0], lambda run, x, *args: x if left_out[0] else run(x, *args))
    with dit_accel.attach(transformer, FirstBlockCache(**FOREVER)) as attachment:
        for step, left_out[0] in enumerate((False, True, False, False)):
            forward(transformer, step)
        reasons = [entry["reason"] for entry in attachment.report().section("firstblockcache").data["forwards"]]
    assert reasons == ["nothing stored", "nothing measured yet", "nothing measured yet", "measured"]


def test_models_that_write_into_streams_are_refused(transformer):
    calls_of(transformer.blocks[3], lambda run, x, *args: run(x.add_(1.0), *args))
    with dit_accel.attach(transformer, FirstBlockCache()), pytest.raises(ConfigError, match=r"^tran.*block 2 gave"):
        forward(transformer)
    first, profiled = FirstBlockCache(**FOREVER), ProfilingCache(blocks="1-3", **ONCE)
    for cache, writing in ((first, 0), (first, 1), (DBPrune(**FOREVER), 1), (profiled, 1)):
        model = six_blocks()
        model.blocks[writing].forward = lambda hidden_states, *args: hidden_states.add_(0.1)
        with dit_accel.attach(model, cache), pytest.raises(ConfigError, match=r"^transformer.*block \d took"):
            forward(model), forward(model, 1)


def test_spans_of_blocks_that_change_within_a_run_are_stored_anew(transformer):
    """As where a control branch adds to a stream in some steps alone."""
    added, counted = [0.5], Counted(transformer)
    calls_of(transformer.blocks[3], lambda run, x, *args: run(x + added[0] if added else x, *args))
    with dit_accel.attach(transformer, FirstBlockCache(**{**FOREVER, "warmup_steps": 2})):
        forward(transformer)
        added.clear()
        whole = forward(transformer, 1)
        torch.testing.assert_close(forward(transformer, 2), whole)
    assert counted.lengths() == [6, 6, 1]


def test_a_sequence_that_is_split_inside_the_first_block(transformer):
    """As diffusers' context parallelism does it, whose hooks lie further in."""
    half = lambda rotary: tuple(part[:, :40] for part in rotary)  # noqa: E731
    transformer.blocks[0].register_forward_hook(lambda block, args, output: output[:, :40])
    for block in transformer.blocks[1:]:
        block.register_forward_pre_hook(lambda block, args: (*args[:3], half(args[3])))
    transformer.norm_out.register_forward_pre_hook(lambda norm, args: (torch.cat([args[0]] * 2, 1),))
    plain, counted = forward(transformer), Counted(transformer)
    with dit_accel.attach(transformer, DBCache(first_blocks=2, **FOREVER)):
        for step in range(3):
            torch.testing.assert_close(forward(transformer, step), plain)
    assert counted.lengths() == [6, 2, 2]
    refused = pytest.raises(ConfigError, match=r"\[1, 80, 32\].*\[1, 40, 32\].*first_blocks = 2")
    with dit_accel.attach(transformer, FirstBlockCache(**FOREVER)), refused:
        forward(transformer)


def test_a_run_of_which_no_block_was_counted_reports_that_all_ran(transformer):
    with dit_accel.attach(transformer, FirstBlockCache(**FOREVER)) as attachment:
        denoise(transformer, 3)
        transformer.blocks[2].forward = None
        with pytest.raises(TypeError):
            forward(transformer)
        assert attachment.report().section("firstblockcache").data["computed_blocks"] == 1


def test_what_can_not_be_attached(transformer):
    for configs, text in (
        ((DBCache(),), r"^dbcache.*8 first.*0 last.*6"),
        ((FirstBlockCache(), EasyCache()), "^EasyCache and FirstBlockCache"),
        ((DBPrune(first_blocks=4, last_blocks=2),), r"^dbprune.*4 first and 2 last.*6"),
        ((DBPrune(first_blocks=1, last_blocks=8),), r"^dbprune.*1 first and 8 last.*6"),
        ((ProfilingCache(blocks="4-8"),), r"^prof.*\.blocks.*5 .*transformer.*6-8.*6 \(6 of blocks\.\*\).*0 to 5"),
        ((ProfilingCache(),), r"^profilingcache.*'wan, 6 layers, 2 heads'.* hunyuan-video, wan2\.1-14b;"),
    ):
        with pytest.raises(ConfigError, match=text):
            dit_accel.attach(transformer, *configs)
        assert dit_accel.attachment_of(transformer) is None


# Under diffusers' group offloading; a CPU has no second device, so that what is sent away lies on the meta device.

HERE, AWAY = torch.device("cpu"), torch.device("meta")


class Stream:
    """Copies at once."""

    def synchronize(self):
        """Wait for nothing."""


@pytest.fixture
def moves(monkeypatch):
    """What was fetched and sent away, by the groups' names, with the moving replaced."""
    noted = []

    def tensors(group):
        return [(module, name) for one in group.modules for module in one.modules() for name in module._parameters]

    def offload(group):
        group.kept = getattr(group, "kept", {})
        for module, name in tensors(group):
            if module._parameters[name] is not None and not module._parameters[name].is_meta:
                group.kept[module, name] = module._parameters[name]
                module._parameters[name] = nn.Parameter(module._parameters[name].to(AWAY), requires_grad=False)
        noted.append(("away", group))

    def onload(group):
        for (module, name), parameter in group.kept.items():
            module._parameters[name] = parameter
        noted.append(("here", group))

    monkeypatch.setattr(group_offloading.ModuleGroup, "offload_", offload)
    monkeypatch.setattr(group_offloading.ModuleGroup, "onload_", onload)
    monkeypatch.setattr(group_offloading.ModuleGroup, "_init_cpu_param_dict", lambda group: {})
    return noted


def offload(model, size, stream=None):
    config = group_offloading.GroupOffloadingConfig(
        onload_device=HERE, offload_device=AWAY, offload_type=group_offloading.GroupOffloadingType.BLOCK_LEVEL,
        non_blocking=False, record_stream=False, low_cpu_mem_usage=False, num_blocks_per_group=size, stream=stream,
    )  # fmt: skip
    group_offloading._apply_group_offloading(model, config)


def left_here(model):
    return [index for index, block in enumerate(model.blocks) if not next(block.parameters()).is_meta]


OFFLOADED = (2, False, "cache"), (LAYERS, False, "offload"), (1, True, "cache"), (1, True, "offload")
"""Blocks a group, whether streams fetch them, and what comes first."""

SKIPPING = {
    "apart": ProfilingCache(blocks="0, 2-3, 5", **ONCE), "all": ProfilingCache(blocks="0-5", **ONCE),
    "dbcache": DBCache(first_blocks=1, last_blocks=1, **FOREVER), "dbprune": DBPrune(first_blocks=2, **FOREVER),
}  # fmt: skip


@pytest.mark.parametrize("config", SKIPPING.values(), ids=SKIPPING)
def test_blocks_beside_skipped_ones_have_their_weights_and_nothing_stays(transformer, moves, config):
    with dit_accel.attach(transformer, config):
        expected = denoise(transformer, 3)
    for size, streams, first in OFFLOADED:
        model = six_blocks()
        if first == "offload":
            offload(model, size, Stream() if streams else None)
            assert left_here(model) == []
        with dit_accel.attach(model, config):
            if first == "cache":
                offload(model, size, Stream() if streams else None)
            assert torch.equal(denoise(model, 3), expected)
            assert left_here(model) == []


def test_a_group_that_is_skipped_whole_is_never_fetched(moves):
    model = six_blocks()
    offload(model, 2)
    groups = [block._diffusers_hook.get_hook("group_offloading").group for block in model.blocks]
    with dit_accel.attach(model, ProfilingCache(blocks="2-3", **ONCE)):
        forward(model, 0)
        moves.clear()
        forward(model, 1)
    ours = [(what, groups.index(group) // 2) for what, group in moves if group in groups]
    assert ours == [("here", 0), ("away", 0), ("here", 2), ("away", 2)]
