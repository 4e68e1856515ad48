"""DBPrune on a tiny model: which blocks are skipped, what a skipped one adds, and what is refused."""

import pytest
import torch
from block_calls import LAYERS, Counted, forward, six_blocks
from wan_tiny import denoise, require_runs_do_not_meet

import dit_accel
from dit_accel import ConfigError, DBPrune

FOREVER = dict(threshold=1e9, warmup_steps=0, last_steps=0)


@pytest.fixture
def transformer():
    return six_blocks()


@pytest.mark.parametrize(
    "config",
    [
        DBPrune(threshold=0.0, warmup_steps=0),
        DBPrune(threshold=1e9, warmup_steps=1000),
        DBPrune(threshold=1e9, max_skips=0),
        DBPrune(threshold=1e-9, warmup_steps=0),
    ],
)
def test_where_nothing_may_be_skipped_every_bit_stays_and_all_blocks_run(transformer, config):
    plain, counted = denoise(transformer), Counted(transformer)
    with dit_accel.attach(transformer, config) as attachment:
        assert torch.equal(denoise(transformer), plain)
        assert counted.by_forward() == [[*range(LAYERS)]] * 8
        assert attachment.report().section("dbprune").data["computed_blocks"] == 1
    assert torch.equal(denoise(transformer), plain)


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (dict(), [0]),
        (dict(first_blocks=2, last_blocks=1), [0, 1, 5]),
        (dict(first_blocks=1, keep="2, 4"), [0, 2, 4]),
        (dict(first_blocks=1, keep=(3,)), [0, 3]),
    ],
)
def test_blocks_that_always_run(transformer, options, left):
    counted = Counted(transformer)
    with dit_accel.attach(transformer, DBPrune(**FOREVER, **options)) as attachment:
        denoise(transformer, 3)
        data = attachment.report().section("dbprune").data
    assert counted.by_forward() == [[*range(LAYERS)]] * 2 + [left] * 4
    assert data["computed_blocks"] == pytest.approx((2 * LAYERS + 4 * len(left)) / (6 * LAYERS))


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("threshold", [0.05, 0.2])
def test_the_rule_written_out(transformer, threshold, limit):
    """Against the rule on the blocks of an untouched model, two branches of which the first decides."""
    model, ran, expected_ran = six_blocks(), [], []
    inputs, added, call = {}, {}, [-1]
    skipped, changes, moving = set(), [], [threshold]

    def take(index):
        def hook(block, args, output):
            x = args[0]
            if index == 0:
                call[0] += 1
                if call[0] % 2 == 0:
                    if changes and limit:
                        moving[0] = max(threshold, min(1.25 * sum(changes) / len(changes), limit))
                    else:
                        moving[0] = threshold
                    skipped.clear()
                    changes.clear()
            branch = call[0] % 2
            if index and call[0] > 1 and branch == 0:
                change = float((x - inputs[index]).abs().mean() / inputs[index].abs().mean())
                changes.append(change)
                if change < moving[0]:
                    skipped.add(index)
            if index and call[0] > 1 and index in skipped:
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
    config = DBPrune(threshold=threshold, max_threshold=limit, warmup_steps=0, last_steps=0)
    with dit_accel.attach(transformer, config):
        torch.testing.assert_close(denoise(transformer, 8), expected)
    assert ran == expected_ran
    assert len(ran) < 16 * LAYERS or threshold == 0.05


def test_a_threshold_that_may_rise_skips_more(transformer):
    shares = []
    for limit in (None, 0.5):
        config = DBPrune(threshold=0.2, max_threshold=limit, warmup_steps=0, last_steps=0)
        with dit_accel.attach(transformer, config) as attachment:
            denoise(transformer, 8)
            shares.append(attachment.report().section("dbprune").data["computed_blocks"])
    assert shares[1] < shares[0] < 1


def test_what_stands_still_is_reused_exactly_but_for_rounding(transformer):
    plain = forward(transformer)
    with dit_accel.attach(transformer, DBPrune(threshold=0.01, warmup_steps=0, last_steps=0)):
        given = [forward(transformer, step) for step in range(3)]
    assert torch.equal(given[0], plain)
    for out in given[1:]:
        torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


def test_not_a_number_is_computed(transformer):
    counted = Counted(transformer)
    with dit_accel.attach(transformer, DBPrune(**FOREVER)):
        for step, scale in enumerate((1, 1, float("nan"), 1, 1)):
            forward(transformer, step, scale=scale)
    assert [len(ran) for ran in counted.by_forward()] == [LAYERS, 1, LAYERS, LAYERS, 1]


@pytest.mark.parametrize("options", [dict(), dict(predictor="taylor"), dict(branches="uncond")])
def test_runs_do_not_meet(options):
    require_runs_do_not_meet(DBPrune(**{**FOREVER, "threshold": 0.5}, **options))


def test_memory_is_counted_and_freed(transformer):
    tokens = 80 * 32 * 4
    with dit_accel.attach(transformer, DBPrune(**FOREVER)) as attachment:
        denoise(transformer, 3)
        assert attachment.report().state_bytes["dbprune"] == (2 + 1) * 5 * tokens  # two branches, and the inputs
        attachment.reset()
        assert not attachment.engine.handlers[0]._held()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(threshold=-0.1), r"^dbprune\.threshold.*got -0\.1"),
        (dict(first_blocks=-1), r"^dbprune\.first_blocks.*got -1"),
        (dict(threshold=0.2, max_threshold=0.1), r"max_threshold = 0\.1.*dbprune\.threshold = 0\.2"),
        (dict(keep="x"), r"^dbprune\.keep = 'x'.*'x'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        DBPrune(**options)


def test_what_can_not_be_attached(transformer):
    with pytest.raises(ConfigError, match=r"^dbprune\.keep.*1 blocks.*lacks 6.*6 \(6 of"):
        dit_accel.attach(transformer, DBPrune(keep="6"))
    with pytest.raises(
        ConfigError,
        match=r"^dbprune.*4 first, 1 last.*1 kept.*6",
    ):
        dit_accel.attach(transformer, DBPrune(first_blocks=4, last_blocks=1, keep="4"))
