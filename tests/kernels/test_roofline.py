"""The roofline's arithmetic, by hand on round numbers, and what it says of the cards it knows."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

from cards import CARDS, TARGETS, Card  # noqa: E402
from mixes import Mix, launch_of, mixes_of, read_mix, read_table  # noqa: E402
from roofline import (  # noqa: E402
    CACHE_CYCLES,
    ENGINES,
    FIRST_LOADS,
    LAUNCH_SECONDS,
    SHAPES,
    VOTE_INSTRUCTIONS,
    Shape,
    predict,
    predict_backward,
    predict_call,
    predict_dense,
)

CARD = Card(
    name="round", target="sm_80", tflops=100, bandwidth=1000, l2=(2000, 4000), cores=100, clock=1.0, exp2=10, lanes=50
)
SHAPE = Shape(name="round", heads=10, tokens=12800, dim=100)
EXACT = Mix(plain=5, exp2=1, fp32=2, tensor=0.5, shared=16)
LOGITS = 10 * 12800 * 6400  # at density 0.5


def at(density: float, mix: Mix = EXACT, **arguments) -> dict:
    return predict(SHAPE, density, CARD, {"exact": mix}, **arguments)


def test_arithmetic_of_one_call():
    """12800 x 12800 tokens of 10 heads at density 0.5, on 100 SMs that issue 4 x 32 lanes a clock of 1 ns."""
    found = at(0.5)
    assert found["tensor"] == pytest.approx(4 * LOGITS * 100 / 1e14)
    assert found["exp2"] == pytest.approx(LOGITS / 1e12)
    assert found["plain"] == pytest.approx(LOGITS * max(2 / 50, 5 / 128) / 1e11)
    assert found["issue"] == pytest.approx(LOGITS * 6.5 / 128 / 1e11)
    assert found["shared"] == pytest.approx(LOGITS * 16 / 128 / 1e11)
    assert found["hbm"] == pytest.approx(4 * 10 * 12800 * 200 / 1e12)
    assert found["l2"] == pytest.approx(10 * 100 * 100 * 0.5 * 128 * 400 / 4e12)
    waves = 10 * 100 / 100
    assert found["latency"] == pytest.approx(LAUNCH_SECONDS + waves * FIRST_LOADS * CACHE_CYCLES / 1e9)
    assert found["limit"] == "tensor"
    assert found["bound"] == found["tensor"] + found["latency"]
    work = found["tensor"] + found["exp2"] + found["plain"]
    assert found["serial"] == pytest.approx(work + found["latency"])


@pytest.mark.parametrize(
    ("name", "mix", "shape"),
    [
        ("exp2", Mix(plain=0, exp2=100), SHAPE),
        ("plain", Mix(plain=0, exp2=0, fp32=1000), SHAPE),
        ("issue", Mix(plain=0, exp2=0, tensor=1000), SHAPE),
        ("shared", Mix(plain=0, exp2=0, shared=1000), SHAPE),
        ("l2", Mix(plain=0, exp2=0, rows=4), SHAPE),
        ("latency", EXACT, Shape(name="small", heads=1, tokens=128, dim=100)),
    ],
)
def test_the_slowest_engine_is_the_bound_and_named(name, mix, shape):
    found = predict(shape, 1.0, CARD, {"exact": mix})
    assert found["limit"] == name
    assert found["bound"] >= max(found[engine] for engine in ENGINES)
    assert found["serial"] >= found["bound"]


def test_the_cache_is_taken_at_its_highest_figure_for_the_bound_and_its_lowest_without_overlap():
    found = at(1.0, Mix(plain=0, exp2=0, rows=4))
    assert found["bound"] == found["l2"] + found["latency"]
    assert found["serial"] == 2 * found["l2"] + found["latency"]


def test_fewer_rows_or_blocks_cost_bytes_of_cache_and_waves():
    whole, half = (at(0.5, Mix(plain=5, exp2=1, rows=rows)) for rows in (128, 64))
    assert half["l2"] == 2 * whole["l2"]
    first = FIRST_LOADS * CACHE_CYCLES / 1e9
    assert half["latency"] - whole["latency"] == pytest.approx(10 * first)
    two = at(0.5, Mix(plain=5, exp2=1, rows=64, blocks=2))
    assert two["latency"] == pytest.approx(whole["latency"])


def test_pooling_walks_every_column_of_a_row_in_whole_chunks():
    """Half of 100 tiles are pooled, all 100 columns walked, in a chunk of 128, by the loop's own mix."""
    pooled = Mix(plain=20, exp2=2, columns=128)
    half, found = at(0.5), predict(SHAPE, 0.5, CARD, {"exact": EXACT, "pooled": pooled}, pooled=0.5)
    columns = 10 * 12800 * 128
    assert found["tensor"] - half["tensor"] == pytest.approx(4 * columns * 100 / 1e14)
    assert found["exp2"] - half["exp2"] == pytest.approx(columns * 2 / 1e12)
    assert found["hbm"] == pytest.approx(half["hbm"] * 6 / 4)  # k and v once more, for the means
    assert found["latency"] == pytest.approx(half["latency"] + LAUNCH_SECONDS)
    gathered = predict(
        SHAPE, 0.5, CARD, {"exact": EXACT, "pooled": Mix(plain=20, exp2=2, columns=32)}, pooled=0.5, gathered=True
    )
    assert gathered["exp2"] - half["exp2"] == pytest.approx(10 * 12800 * 64 * 2 / 1e12)  # 50 columns in two chunks


def test_routing_reads_q_once_more_and_multiplies_means():
    pooled, routed = (at(0.5, pooled=0.5, routed=x) for x in (False, True))
    assert routed["hbm"] == pytest.approx(pooled["hbm"] * 7 / 6)
    assert routed["tensor"] - pooled["tensor"] == pytest.approx(2 * 10 * 100 * 100 * 100 / 1e14)


def test_votes_cost_a_few_instructions_a_row_of_a_tile():
    plain, votes = (at(0.5, votes=x) for x in (False, True))
    voted = 10 * 100 * 100 * 0.5 * 128 * VOTE_INSTRUCTIONS / (1e11 * 128)
    for name in ("plain", "issue"):
        assert votes[name] - plain[name] == pytest.approx(voted)
    assert {k: votes[k] for k in ("tensor", "exp2", "hbm", "l2")} == {
        k: plain[k] for k in ("tensor", "exp2", "hbm", "l2")
    }


def test_backward_is_seven_products_for_two_in_kernels_one_after_the_other():
    mixes = {"dq": Mix(plain=6, exp2=1, shared=8, rows=64), "dkdv": Mix(plain=8, exp2=1, shared=800, rows=32)}
    forward, found = at(0.5), predict_backward(SHAPE, 0.5, CARD, mixes)
    assert found["tensor"] == pytest.approx(3.5 * forward["tensor"])
    assert found["exp2"] == pytest.approx(2 * forward["exp2"])
    assert found["hbm"] == pytest.approx(13 / 4 * forward["hbm"])
    assert found["l2"] == pytest.approx((2 + 4) * forward["l2"])
    assert found["limit"] == "shared"
    dq, dkdv = 1.5 * forward["tensor"], LOGITS * 800 / 128 / 1e11
    assert found["bound"] == pytest.approx(dq + dkdv + 2 * forward["hbm"] / 4 + found["latency"])


@pytest.mark.parametrize(("density", "pooled"), [(-0.1, 0.0), (1.1, 0.0), (0.5, 0.6)])
def test_shares_must_be_shares(density, pooled):
    with pytest.raises(ValueError, match=rf"at most 1 together: found {density} and {pooled}"):
        at(density, pooled=pooled)


COUNTS = dict(tensor=64, exp2=32, fp32=40, instructions=160, rows=64, columns=64, shared_bytes=8192)


def test_mixes_come_from_the_compile_table():
    record = dict(launch="fwd-plain", target="sm_80", warps=4, blocks=2, mix=COUNTS)
    votes = {**COUNTS, "rare": [32], "every": 129.0}
    table = {
        ("fwd-plain", "sm_80"): {**record, "pooled": {**COUNTS, "columns": 32}},
        ("fwd-votes", "sm_80"): {**record, "mix": votes},
        ("dkdv-x", "sm_80"): {**record, "mix": {**COUNTS, "columns": 128}},
        ("fwd-plain", "sm_90"): dict(launch="fwd-plain", target="sm_90", error="no"),
    }
    plain = read_mix(table, "fwd-plain", "sm_80")
    assert plain == Mix(plain=2.0, exp2=1.0, fp32=1.25, tensor=2.0, shared=2.0, rows=64, columns=64, blocks=2)
    assert read_mix(table, "fwd-votes", "sm_80").plain == 33 * 128 / 4096
    assert mixes_of("fwd-plain", "sm_80", table)["pooled"].plain == 4.0
    of_keys = read_mix(table, "dkdv-x", "sm_80")
    assert (of_keys.rows, of_keys.columns) == (128, 64)
    with pytest.raises(ValueError, match=r"must hold launch 'fwd-plain' on sm_90 with a hot loop, found none"):
        read_mix(table, "fwd-plain", "sm_90")
    with pytest.raises(ValueError, match="with a loop over pooled tiles, found none"):
        read_mix(table, "fwd-votes", "sm_80", "pooled")


def test_a_call_takes_the_launch_of_its_kind_or_the_plain_one():
    table = read_table()
    assert launch_of("triton-votes", 128, 128, "sm_90", table) == "fwd-bf16-d128-b128-keep+maxgap"
    assert launch_of("triton-votes", 64, 128, "sm_90", table) == "fwd-bf16-d64-b128-plain"
    assert launch_of("triton-backward", 128, 128, "sm_90", table) == "dq-bf16-d128-b128-backward"
    assert launch_of("triton-backward", 64, 128, "sm_90", table) is None
    counted = predict_call(SHAPES["wan-720p"], "triton-votes", 0.27, CARDS["H100"], table)
    mixes = mixes_of("fwd-bf16-d128-b128-keep+maxgap", "sm_90", table)
    assert counted == predict(SHAPES["wan-720p"], 0.27, CARDS["H100"], mixes)  # its votes are in its mix
    small = SHAPES["cogvideox1.5"]
    added = predict_call(small, "triton-votes", 0.27, CARDS["H100"], table)
    plain = predict_call(small, "triton", 0.27, CARDS["H100"], table)
    assert added is not None
    assert plain is not None
    assert added["issue"] > plain["issue"]
    assert predict_call(small, "triton-backward", 0.27, CARDS["H100"], table) is None


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_every_card_has_its_launches_and_a_prediction(card):
    table = read_table()
    for candidate in ("triton", "triton-pooled", "triton-routed", "triton-votes", "triton-backward"):
        found = predict_call(SHAPES["wan-720p"], candidate, 0.27, card, table)
        assert found is not None, candidate
        assert 0 < found["bound"] <= found["serial"]
        assert found["limit"] in ENGINES
    assert "pooled" in mixes_of("fwd-bf16-d128-b128-pooled", card.target, table)


def test_shapes_and_cards_are_what_the_issue_names():
    assert {"A100", "L40S", "RTX 4090", "H100", "B200", "MI300X"} <= set(CARDS)
    assert all(card.target in TARGETS for card in CARDS.values())
    assert SHAPES["wan-720p"].tokens == 75600
    assert SHAPES["wan-480p"].tokens == 32760
    assert SHAPES["hunyuan-720p"].tokens == 118800 + 256


def test_dense_attention_is_told_only_where_a_figure_is_published():
    shape = SHAPES["wan-720p"]
    dense = predict_dense(shape, CARDS["H100"])
    assert dense == pytest.approx(4 * 40 * 75600**2 * 128 / (989.4e12 * 0.75))
    assert predict_dense(shape, CARDS["RTX 4090"]) is None
    assert predict_dense(SHAPES["cogvideox1.5"], CARDS["H100"]) is None
