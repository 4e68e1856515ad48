"""The roofline's arithmetic, by hand on round numbers, and what it says of the cards it knows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

from cards import CARDS, TARGETS, Card  # noqa: E402
from roofline import SHAPES, VOTE_INSTRUCTIONS, Mix, Shape, backward, features_of, predict, read_mix  # noqa: E402

CARD = Card(name="round", target="sm_80", tflops=100, bandwidth=1000, cores=100, clock=1.0, exp2=10, lanes=50)
SHAPE = Shape(name="round", heads=10, tokens=12800, dim=100)


def test_arithmetic_of_one_call():
    """1e4 x 1e4 tokens of 10 heads at density 0.5: 8.192e8 logits."""
    found = predict(SHAPE, 0.5, CARD, Mix(plain=5, exp2=1))
    logits = 10 * 12800 * 6400
    assert found["tensor"] == pytest.approx(4 * logits * 100 / 1e14)
    assert found["exp2"] == pytest.approx(logits / 1e12)
    assert found["plain"] == pytest.approx(5 * logits / 5e12)
    assert found["hbm"] == pytest.approx(4 * 10 * 12800 * 200 / 1e12)
    assert found["l2"] == pytest.approx(10 * 100 * 100 * 0.5 * 128 * 400 / 4e12)
    assert found["limit"] == "tensor"
    assert found["bound"] == found["tensor"]
    assert found["serial"] == pytest.approx(found["tensor"] + found["exp2"] + found["plain"])


def test_time_is_linear_in_density_and_pooling_costs_one_column_a_tile():
    half, whole = (predict(SHAPE, density, CARD, Mix()) for density in (0.5, 1.0))
    assert whole["bound"] == pytest.approx(2 * half["bound"])
    pooled = predict(SHAPE, 0.5, CARD, Mix(), pooled=0.5)
    assert pooled["tensor"] == pytest.approx(
        half["tensor"] * (1 + 1 / 64)
    )  # half the tiles, but all of them are walked
    assert pooled["hbm"] == pytest.approx(half["hbm"] * 6 / 4)  # k and v once more, for the means


def test_routing_reads_q_once_more_and_multiplies_means():
    pooled, routed = (predict(SHAPE, 0.5, CARD, Mix(), pooled=0.5, routed=x) for x in (False, True))
    assert routed["hbm"] == pytest.approx(pooled["hbm"] * 7 / 6)
    assert routed["tensor"] - pooled["tensor"] == pytest.approx(2 * 10 * 100 * 100 * 100 / 1e14)
    assert features_of("triton-routed", 0.25) == dict(pooled=0.75, routed=True, votes=False)
    assert features_of("triton-pooled", 0.25) == dict(pooled=0.75, routed=False, votes=False)
    assert features_of("triton-votes", 0.25) == dict(pooled=0.0, routed=False, votes=True)


def test_votes_cost_a_few_instructions_a_row_of_a_tile():
    plain, votes = (predict(SHAPE, 0.5, CARD, Mix(), votes=x) for x in (False, True))
    voted = 10 * 100 * 100 * 0.5 * 128
    assert votes["plain"] - plain["plain"] == pytest.approx(voted * VOTE_INSTRUCTIONS / 5e12)
    assert {k: votes[k] for k in ("tensor", "exp2", "hbm", "l2")} == {
        k: plain[k] for k in ("tensor", "exp2", "hbm", "l2")
    }


def test_votes_of_a_launch_that_votes_are_in_its_mix():
    assert features_of("triton-votes", 0.25, "fwd-bf16-d128-b128-plain")["votes"]
    for criterion in ("maxgap", "mass", "budget"):
        assert not features_of("triton-votes", 0.25, f"fwd-bf16-d128-b128-keep+{criterion}")["votes"]


def test_the_busiest_engine_limits():
    assert predict(SHAPE, 1.0, CARD, Mix(exp2=100))["limit"] == "exp2"
    assert predict(SHAPE, 1.0, CARD, Mix(plain=1000))["limit"] == "plain"
    small = Shape(name="small", heads=10, tokens=128, dim=100)
    assert predict(small, 0.0, CARD, Mix())["limit"] == "hbm"
    assert predict(small, 0.0, CARD, Mix())["serial"] == predict(small, 0.0, CARD, Mix())["hbm"]


def test_backward_is_seven_products_for_two():
    forward = predict(SHAPE, 0.5, CARD, Mix())
    found = backward(forward)
    assert found["tensor"] == pytest.approx(3.5 * forward["tensor"])
    assert found["bound"] == max(found[name] for name in ("tensor", "exp2", "plain", "hbm", "l2"))


@pytest.mark.parametrize(("density", "pooled"), [(-0.1, 0.0), (1.1, 0.0), (0.5, 0.6)])
def test_shares_must_be_shares(density, pooled):
    with pytest.raises(ValueError, match=rf"at most 1 together: found {density} and {pooled}"):
        predict(SHAPE, density, CARD, Mix(), pooled=pooled)


def test_mix_comes_from_the_compile_table(tmp_path):
    table = tmp_path / "aot.jsonl"
    mix = dict(tensor=64, exp2=32, instructions=160)
    record = dict(launch="fwd", target="sm_80", warps=4, logits=64 * 64, mix=mix)
    table.write_text(json.dumps(dict(launch="fwd", target="sm_90", error="no")) + "\n" + json.dumps(record) + "\n")
    assert read_mix(table, "fwd", "sm_80") == Mix(plain=64 * 128 / 4096, exp2=1.0)
    table.write_text(json.dumps({**record, "mix": {**mix, "rare": [32], "every": 129.0}}) + "\n")
    assert read_mix(table, "fwd", "sm_80") == Mix(plain=33 * 128 / 4096, exp2=1.0)
    with pytest.raises(ValueError, match="must hold launch 'fwd' on sm_90 with a hot loop, found none"):
        read_mix(table, "fwd", "sm_90")


def test_shapes_and_cards_are_what_the_issue_names():
    assert {"A100", "L40S", "RTX 4090", "H100", "B200", "MI300X"} <= set(CARDS)
    assert all(card.target in TARGETS for card in CARDS.values())
    assert SHAPES["wan-720p"].tokens == 75600
    assert SHAPES["wan-480p"].tokens == 32760
    assert SHAPES["hunyuan-720p"].tokens == 118800 + 256


def test_table_and_records(tmp_path):
    out = tmp_path / "roofline.jsonl"
    command = [
        sys.executable,
        str(BENCH / "roofline.py"),
        "--card",
        "H100,B200",
        "--density",
        "0.27,1",
        "--out",
        str(out),
    ]
    found = subprocess.run([*command, "--shape", "wan-720p"], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["card"], r["density"]) for r in records] == [
        ("H100", 0.27),
        ("H100", 1.0),
        ("B200", 0.27),
        ("B200", 1.0),
    ]
    assert records[0]["limit"] == "tensor"
    assert records[0]["speedup"] == pytest.approx(1 / 0.27)
    assert "wan-720p" in found.stdout
    gpu = tmp_path / "gpu.jsonl"
    lines = [
        dict(kind="check", device="NVIDIA H100"),
        dict(device="NVIDIA H100", shape="wan-720p", candidate="triton", density=0.27, seconds=0.123),
        dict(device="NVIDIA H100", shape="wan-720p", candidate="triton-votes", density=0.27, seconds=0.456),
    ]
    gpu.write_text("".join(json.dumps(x) + "\n" for x in lines))
    again = ["--shape", "wan-720p", "--measured", str(gpu), "--candidate"]
    for candidate, expected in (("triton", 0.123), ("triton-votes", 0.456), ("triton-backward", None)):
        subprocess.run([*command, *again, candidate], capture_output=True, text=True, check=True)
        records = [json.loads(line) for line in out.read_text().splitlines()]
        assert [r["measured"] for r in records] == [expected, None, None, None]
        assert {r["candidate"] for r in records} == {candidate}
    failed = subprocess.run([*command, "--shape", "wan"], capture_output=True, text=True, check=False)
    assert "--shape takes wan-480p, wan-720p" in failed.stderr
    assert failed.returncode == 1
