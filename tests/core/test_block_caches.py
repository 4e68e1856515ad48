"""DBCache and FirstBlockCache on a tiny model: which blocks run, what a reused step gives, what is refused."""

from dataclasses import dataclass

import pytest
import torch
from block_calls import LAYERS, Counted, forward, run_inputs
from wan_tiny import denoise, require_runs_do_not_meet, sharp_transformer, tiny_transformer

import dit_accel
from dit_accel import ConfigError, DBCache, DBPrune, EasyCache, FirstBlockCache, StaticCache
from dit_accel.methods import Handler, MethodConfig, Phase, Place, registry

FOREVER = dict(threshold=1e9, warmup_steps=0, last_steps=0)


@pytest.fixture
def transformer():
    return tiny_transformer(num_layers=LAYERS)


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCache(threshold=0.0),
        DBCache(threshold=0.0, first_blocks=2, last_blocks=1),
        FirstBlockCache(threshold=1e9, warmup_steps=1000),
        DBCache(first_blocks=1, threshold=1e9, steps=(1,) * 4),
        FirstBlockCache(threshold=1e9, max_skips=0),
    ],
)
def test_where_nothing_may_be_skipped_every_bit_stays_and_all_blocks_run(transformer, config):
    plain, counted = denoise(transformer), Counted(transformer)
    with dit_accel.attach(transformer, config) as attachment:
        assert torch.equal(denoise(transformer), plain)
        assert counted.by_forward() == [[*range(LAYERS)]] * 8
        assert attachment.report().section(config.name).data["reused"] == 0
    assert torch.equal(denoise(transformer), plain)


@pytest.mark.parametrize(
    ("config", "ran"),
    [
        (FirstBlockCache(**FOREVER), [0]),
        (DBCache(first_blocks=1, **FOREVER), [0]),
        (DBCache(first_blocks=2, last_blocks=1, **FOREVER), [0, 1, 5]),
        (DBCache(first_blocks=4, last_blocks=1, **FOREVER), [0, 1, 2, 3, 5]),
    ],
)
def test_a_reused_step_runs_the_first_and_last_blocks(transformer, config, ran):
    counted = Counted(transformer)
    with dit_accel.attach(transformer, config) as attachment:
        denoise(transformer, 5)
        section = attachment.report().section(config.name)
    assert counted.by_forward() == [[*range(LAYERS)]] * 2 + [ran] * 8
    assert section.title == f"{config.name}: 8 of 10 forwards reused (# computed, . reused)"
    assert section.lines[-1] == f"transformer: a reused forward runs {len(ran)} of {LAYERS} blocks"
    assert (section.data["blocks"], section.data["blocks_always_run"]) == ({"transformer": LAYERS}, len(ran))


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        (dict(), "#........."),
        (dict(warmup_steps=0.25), "###......."),
        (dict(last_steps=2), "#.......##"),
        (dict(max_consecutive=2), "#..#..#..#"),
        (dict(max_skips=4), "#....#####"),
        (dict(steps=(1, 0, 0, 1, 0, 0, 1, 1, 0, 0)), "#..#..##.."),
    ],
)
def test_the_guards_of_all_step_caches(transformer, options, drawn):
    counted = Counted(transformer)
    with dit_accel.attach(transformer, DBCache(first_blocks=2, **{**FOREVER, **options})):
        denoise(transformer, 10, branches=("cond",))
    assert "".join("#" if len(ran) == LAYERS else "." for ran in counted.by_forward()) == drawn


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3])
@pytest.mark.parametrize(("first", "last"), [(1, 0), (2, 1)])
def test_the_rule_written_out(transformer, first, last, threshold):
    """Against the published rule, on the blocks of an untouched model."""
    model = tiny_transformer(num_layers=LAYERS)
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
        forwards = attachment.report().section("dbcache").data["forwards"]
    assert [entry["reused"] for entry in forwards] == skip
    assert 0 < sum(skip) < 9 or threshold != 0.1


@pytest.mark.parametrize("predictor", ["hold", "taylor", "heun", "chebyshev"])
def test_what_stands_still_is_reused_exactly_but_for_rounding(transformer, predictor):
    plain = forward(transformer)
    config = DBCache(first_blocks=2, last_blocks=1, threshold=1e9, warmup_steps=3, last_steps=0, predictor=predictor)
    with dit_accel.attach(transformer, config) as attachment:
        given = [forward(transformer, step) for step in range(6)]
        assert attachment.report().section("dbcache").data["reused"] == 3
    assert all(torch.equal(out, plain) for out in given[:3])
    for out in given[3:]:
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5 if predictor != "chebyshev" else 0.05)


def test_a_reused_step_follows_its_own_input_through_first_and_last_blocks(transformer):
    with dit_accel.attach(transformer, DBCache(first_blocks=2, last_blocks=1, **FOREVER)):
        first, second = forward(transformer), forward(transformer, 1, scale=1.5)
        third = forward(transformer, 2, scale=1.5)
    assert not torch.allclose(first, second)
    assert torch.equal(second, third)


def test_not_a_number_is_computed():
    transformer = tiny_transformer(num_layers=LAYERS)
    counted = Counted(transformer)
    with dit_accel.attach(transformer, FirstBlockCache(**FOREVER)) as attachment:
        for step, scale in enumerate((1, 1, float("nan"), 1, 1, 1)):
            forward(transformer, step, scale=scale)
        reasons = [entry["reason"] for entry in attachment.report().section("firstblockcache").data["forwards"]]
    assert [len(ran) for ran in counted.by_forward()] == [LAYERS, 1, LAYERS, LAYERS, 1, 1]
    assert reasons[2:4] == ["not a number", "not a number"]


def test_the_first_branch_decides_and_each_keeps_its_own(transformer):
    with dit_accel.attach(
        transformer, DBCache(first_blocks=2, threshold=0.1, warmup_steps=1, last_steps=0)
    ) as attachment:
        together = [forward(transformer, step, branch, 1 + 0.01 * step) for step in range(4) for branch in ("a", "b")]
        values = [entry["value"] for entry in attachment.report().section("dbcache").data["forwards"]]
    assert [value is None for value in values] == [True, True, False, True, False, True, False, True]
    assert all(torch.equal(one, two) for one, two in zip(together[::2], together[1::2], strict=True))


@pytest.mark.parametrize("config", [DBCache(first_blocks=2, **FOREVER), DBPrune(threshold=0.05, warmup_steps=1)])
def test_what_the_first_branch_measures_is_its_own(transformer, config):
    found = []
    for others in ((), ("b",)):
        with dit_accel.attach(transformer, config) as attachment:
            counted, ran = Counted(transformer), []
            for step in range(6):
                forward(transformer, step, "a", 1 + 0.02 * step)
                ran.append(counted.by_forward()[-1])
                for branch in others:
                    forward(transformer, step, branch, 2 - 0.1 * step)
            entries = attachment.report().section(config.name).data["forwards"]
        found.append((ran, [entry["value"] for entry in entries if entry["branch"] == "a"]))
    assert found[0] == found[1]


def test_a_forward_with_gradients_leaves_nothing_to_reuse(transformer):
    counted = Counted(transformer)
    with dit_accel.attach(transformer, FirstBlockCache(**FOREVER)):
        for step, gradients in enumerate((False, False, True, False, False)):
            with torch.set_grad_enabled(gradients), transformer.cache_context("a", step_index=step):
                transformer(**run_inputs())
    assert [len(ran) for ran in counted.by_forward()] == [LAYERS, 1, LAYERS, LAYERS, 1]


def test_a_forward_whose_weights_take_gradients_is_not_skipped(transformer):
    counted = Counted(transformer)
    with dit_accel.attach(transformer, StaticCache(every=100, warmup_steps=0, last_steps=0)):
        for step, gradients in enumerate((False, False, True)):
            with torch.set_grad_enabled(gradients), transformer.cache_context("a", step_index=step):
                output = transformer(**run_inputs())
    assert [len(ran) for ran in counted.by_forward()] == [LAYERS, LAYERS]
    assert output.sample.requires_grad


def test_only_the_unconditional_branch_is_skipped(transformer):
    counted = Counted(transformer)
    with dit_accel.attach(transformer, FirstBlockCache(branches="uncond", **FOREVER)):
        denoise(transformer, 3)
    assert [len(ran) for ran in counted.by_forward()] == [LAYERS, LAYERS, LAYERS, 1, LAYERS, 1]


@pytest.mark.parametrize("predictor", ["hold", "taylor", "heun"])
def test_runs_do_not_meet(predictor):
    require_runs_do_not_meet(
        DBCache(first_blocks=1, last_blocks=1, threshold=1e9, max_consecutive=1, warmup_steps=2, predictor=predictor)
    )


def test_other_shapes_are_computed_afresh(transformer):
    counted = Counted(transformer)
    with dit_accel.attach(transformer, FirstBlockCache(**FOREVER)):
        forward(transformer, 0)
        with torch.no_grad():
            for step, (frames, text) in enumerate(((5, 6), (4, 6), (4, 6), (4, 7), (4, 7)), start=1):
                inputs = run_inputs()
                inputs["hidden_states"] = inputs["hidden_states"][:, :, :frames]
                inputs["encoder_hidden_states"] = torch.zeros(1, text, 64)
                with transformer.cache_context("cond", step_index=step, num_inference_steps=10):
                    transformer(**inputs, return_dict=False)
    assert [len(ran) for ran in counted.by_forward()] == [LAYERS, 1, LAYERS, 1, LAYERS, 1]


def test_gradients_and_training_are_computed(transformer):
    counted = Counted(transformer)
    with dit_accel.attach(transformer, FirstBlockCache(**FOREVER)) as attachment:
        with torch.enable_grad():
            for step in range(2):
                with transformer.cache_context("cond", step_index=step, num_inference_steps=10):
                    transformer(**run_inputs())
        transformer.requires_grad_(False)
        transformer.blocks[4].requires_grad_(True)  # as fine-tuning of some layers has it
        for step in range(2, 4):
            with transformer.cache_context("cond", step_index=step, num_inference_steps=10):
                transformer(**run_inputs())
        attachment.engine.handlers[0]._histories.clear()
        transformer.train()
        transformer(**run_inputs())
    assert [len(ran) for ran in counted.by_forward()] == [LAYERS] * 5


def test_memory_is_counted_and_freed(transformer):
    tokens = 80 * 32 * 4  # of 5 x 4 x 4 tokens of 32 channels in float32
    for predictor, tensors in (("hold", 1), ("taylor", 2), ("heun", 3)):
        options = dict(first_blocks=2, warmup_steps=2, threshold=1e9, predictor=predictor)
        with dit_accel.attach(transformer, DBCache(**options)) as attachment:
            denoise(transformer, 5)
            assert attachment.report().state_bytes["dbcache"] == (2 * tensors + 1) * tokens
            attachment.reset()
            assert not attachment.engine.handlers[0]._held()


def test_the_visual_stream_is_measured_in_float32():
    transformer = tiny_transformer(num_layers=LAYERS).to(torch.bfloat16)
    with dit_accel.attach(transformer, FirstBlockCache(threshold=0.3, warmup_steps=0, last_steps=0)) as attachment:
        with torch.no_grad():
            for step in range(3):
                inputs = {
                    name: x.bfloat16() if x.is_floating_point() else x for name, x in run_inputs(1 + 0.1 * step).items()
                }
                with transformer.cache_context("cond", step_index=step, num_inference_steps=10):
                    out = transformer(**inputs, return_dict=False)[0]
        reused = [entry["reused"] for entry in attachment.report().section("firstblockcache").data["forwards"]]
    assert reused == [False, True, True]
    assert out.dtype == torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveOut(MethodConfig):
    name = "leave-out"

    from_step: int = 0


class LeaveOutHandler(Handler):
    """Leaves block 3 out from some step on, as guidance by a skipped layer does in its interval."""

    config_type = LeaveOut
    phase = Phase.GUIDANCE
    places = frozenset({Place.BLOCKS})

    def install(self, site):
        site.around_blocks(self.around, site.blocks[3:4])

    def around(self, context, block, run, streams):
        return streams if context.step_index >= self.settings.from_step else run(streams)


def test_blocks_that_another_method_leaves_out(transformer, monkeypatch):
    monkeypatch.setitem(registry.handlers(), "leave-out", LeaveOutHandler)
    without = tiny_transformer(num_layers=LAYERS)
    del without.blocks[3]
    with dit_accel.attach(transformer, LeaveOut(), FirstBlockCache(**FOREVER)):
        assert torch.equal(forward(transformer), forward(without))
        torch.testing.assert_close(forward(transformer, 1), forward(without))
    with dit_accel.attach(transformer, LeaveOut(from_step=1), FirstBlockCache(**FOREVER)):
        forward(transformer)
        with pytest.raises(
            ConfigError,
            match=r"^firstblockcache.*\[1, 2, 3, 4, 5\].*step 1.*\[1, 2, 4, 5\]",
        ):
            forward(transformer, 1)


def test_a_model_that_writes_into_streams_between_its_blocks_is_refused(transformer):
    class Written(type(transformer.blocks[3])):
        def __call__(self, *args, **kwargs):  # before all that is attached, as the model would
            args[0].add_(1.0)
            return super().__call__(*args, **kwargs)

    transformer.blocks[3].__class__ = Written
    with (
        dit_accel.attach(transformer, FirstBlockCache()),
        pytest.raises(ConfigError, match=r"^transformer.*block 2 gave"),
    ):
        forward(transformer)


def test_spans_of_blocks_that_change_within_a_run_are_stored_anew(transformer):
    class Changed(type(transformer.blocks[3])):
        def __call__(self, hidden_states, *args, **kwargs):  # as a control branch adds to a stream in some steps alone
            return super().__call__(hidden_states + 0.5 * self.strength, *args, **kwargs)

    transformer.blocks[3].__class__, counted = Changed, Counted(transformer)
    with dit_accel.attach(transformer, FirstBlockCache(**{**FOREVER, "warmup_steps": 2})):
        transformer.blocks[3].strength = 1
        forward(transformer)
        del Changed.__call__
        whole = forward(transformer, 1)
        torch.testing.assert_close(forward(transformer, 2), whole)
    assert [len(ran) for ran in counted.by_forward()] == [LAYERS, LAYERS, 1]


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
    assert [len(ran) for ran in counted.by_forward()] == [LAYERS, 2, 2]
    with (
        dit_accel.attach(transformer, FirstBlockCache(**FOREVER)),
        pytest.raises(
            ConfigError,
            match=r"\[1, 80, 32\].*\[1, 40, 32\].*first_blocks = 2",
        ),
    ):
        forward(transformer)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            lambda: FirstBlockCache(threshold=-1.0),
            r"firstblockcache\.threshold.*got -1\.0",
        ),
        (
            lambda: DBCache(threshold=-0.1),
            r"dbcache\.threshold.*got -0\.1",
        ),
        (lambda: DBCache(first_blocks=0), r"dbcache\.first_blocks.*got 0"),
        (lambda: DBCache(last_blocks=-1), r"dbcache\.last_blocks.*got -1"),
    ],
)
def test_options_out_of_range(config, message):
    with pytest.raises(ConfigError, match=message):
        config()


def test_what_can_not_be_attached(transformer):
    with pytest.raises(ConfigError, match=r"^dbcache.*8 first.*0 last.*6"):
        dit_accel.attach(transformer, DBCache())
    with pytest.raises(ConfigError, match=r"^EasyCache and FirstBlockCache"):
        dit_accel.attach(transformer, FirstBlockCache(), EasyCache())
    assert dit_accel.attachment_of(transformer) is None
    whole = torch.compile(transformer, backend="eager")
    with pytest.raises(ConfigError, match=r"transformer.*compiled.*compile_repeated_blocks"):
        dit_accel.attach(whole, FirstBlockCache())


def test_beside_a_sparse_method_both_act():
    transformer = sharp_transformer()
    sparse = dit_accel.SparseD(block_size=16, density=0.5, dense_steps=2, dense_last_steps=0, dense_layers=0)
    with dit_accel.attach(transformer, sparse, FirstBlockCache(**FOREVER)) as attachment:
        denoise(transformer, 5, branches=("cond",))
        steps = [(step.step_index, step.sparse_layers, step.dense_layers) for step in attachment.report().steps]
    assert steps == [(0, 0, 3), (1, 0, 1), (2, 3, 0), (3, 1, 0), (4, 1, 0)]  # the pattern is learned in step 2


def test_a_run_that_raised_before_any_block_was_counted_reports_that_all_ran(transformer):
    def fail(*_):
        raise RuntimeError("stopped")

    with dit_accel.attach(transformer, FirstBlockCache(**FOREVER)) as attachment:
        hook = transformer.blocks[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stopped"):
            forward(transformer)
        hook.remove()
        section = attachment.report().section("firstblockcache")
        assert section.data["computed_blocks"] == 1
        assert "blocks computed: 1.000 of the run's (0 of 0)" in section.lines
