"""The benches on a CPU, the list of the methods' calls, and the predictions for cards by hand on round numbers."""

import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "kernels" / "bench"))

import block_sparse  # noqa: E402
import calls  # noqa: E402
import cases  # noqa: E402
import method_calls  # noqa: E402
import predictions  # noqa: E402
import selection as selection_bench  # noqa: E402
from predictions import CANDIDATES, CARDS, ENGINES, LAUNCH_SECONDS, SHAPES, Card, Shape, predict  # noqa: E402

PAGE = ROOT / "docs" / "kernel-predictions.md"


def run(monkeypatch, bench, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--threads", "1", "--rounds", "1", *arguments])
    bench.main()


def test_the_bench_of_kernels_prints_a_table_and_appends_json_lines(tmp_path, monkeypatch, capsys):
    out, only = tmp_path / "results.jsonl", "torch,gather-sdpa,gather-bmm,tile-bmm"
    size = ("--block", "64", "--shape", "1,2,256,16", "--density", "0.5", "--dtype", "fp32")
    run(monkeypatch, block_sparse, *size, "--only", only, "--out", str(out))
    records, shown = [json.loads(line) for line in out.read_text().splitlines()], capsys.readouterr().out
    assert [r["candidate"] for r in records] == ["dense", *only.split(",")]
    for record in records:
        assert record["candidate"] in shown
        assert record["relative_error"] < 1e-5
        assert record["seconds_p20"] <= record["seconds"] <= record["seconds_p80"]
        assert record["density"] == (1.0 if record["candidate"] == "dense" else 0.5)
        assert abs(record["of_ideal"] - record["speedup"] * record["density"]) < 1e-9
        assert {"device", "processor", "torch", "threads", "shape", "dtype", "block", "lists", "tflops"} <= set(record)
    with pytest.raises(SystemExit, match=r"--shape .*found 100 tokens for --block 64"):
        run(monkeypatch, block_sparse, "--block", "64", "--shape", "1,2,100,16")


def test_selections_are_compared_with_static_lists_of_the_same_tiles(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.jsonl"
    run(monkeypatch, selection_bench, "--shapes", "1,2,256,16,32", "--density", "0.3", "--out", str(out))
    records = {record["call"]: record for record in map(json.loads, out.read_text().splitlines())}
    bases = {"keep": "lists", "keep, maxgap": "keep", "routed": "lists, pooled"}
    assert {name: records[name]["base"] for name in bases} == bases
    for name in ("keep", "routed"):
        assert records[name]["density"] == records[bases[name]]["density"]
    shown = capsys.readouterr().out
    assert all(name in shown for name in records)


@pytest.mark.slow
def test_methods_make_the_calls_that_are_listed():
    """After a change of a method: python tests/support/method_calls.py."""
    assert method_calls.recorded() == calls.kinds()


def test_a_kind_is_read_back_from_its_call_and_what_is_compiled_is_listed():
    for kind in calls.kinds():
        call = calls.make(kind, calls.Setting(tile=16, dim=16, dtype="fp32"), "cpu")
        seen: dict[str, set[str]] = defaultdict(set)
        with method_calls.recording(seen, "made"):
            call.run("torch")
        assert list(seen) == [kind]
    assert {kind for _, kinds in cases.CASES for kind in kinds} <= set(calls.kinds())
    with pytest.raises(ValueError, match=r"kind.*twist.*'twist\+mask'"):
        calls.make("twist+mask", calls.Setting(), "cpu")


CARD = Card(name="round", target="sm_80", tflops=100, bandwidth=1000, l2=4000, exp2=1)
SHAPE = Shape(name="round", heads=10, tokens=12800, dim=128)
LOGITS = 10 * 12800 * 6400  # at density 0.5


def test_a_call_takes_as_long_as_its_slowest_engine():
    plain = predict(SHAPE, "triton", 0.5, CARD)
    assert plain["tensor"] == pytest.approx(4 * LOGITS * 128 / 1e14)
    assert plain["exp2"] == pytest.approx(LOGITS / 1e12)
    assert plain["hbm"] == pytest.approx(4 * 10 * 12800 * 256 / 1e12)
    assert plain["l2"] == pytest.approx(LOGITS / 128 * 512 / 4e12)
    assert plain["bound"] == plain["tensor"] + LAUNCH_SECONDS
    for name, figures in (("tensor", {}), ("exp2", {"exp2": 1e-3}), ("l2", {"l2": 1}), ("hbm", {"bandwidth": 1e-3})):
        found = predict(SHAPE, "triton", 0.5, replace(CARD, **figures))
        assert found["limit"] == name
        assert found["bound"] == pytest.approx(max(found[engine] for engine in ENGINES) + LAUNCH_SECONDS)
    half = predict(replace(SHAPE, block=64), "triton", 0.5, CARD)
    assert half["l2"] == pytest.approx(2 * plain["l2"])  # tiles of half the rows come twice as often
    for density in (-0.1, 1.1):
        with pytest.raises(ValueError, match=str(density)):
            predict(SHAPE, "triton", density, CARD)


def test_pooling_and_routing_walk_every_tile_as_a_column_and_a_backward_is_seven_products_for_two():
    names = ("triton", "triton-pooled", "triton-routed", "triton-backward")
    plain, pooled, routed, backward = (predict(SHAPE, name, 0.5, CARD) for name in names)
    assert pooled["exp2"] - plain["exp2"] == pytest.approx(10 * 12800 * 100 / 1e12)
    assert pooled["hbm"] == pytest.approx(plain["hbm"] * 6 / 4)  # k and v once more, for the means
    assert routed["hbm"] == pytest.approx(plain["hbm"] * 7 / 4)  # and q
    assert routed["tensor"] - pooled["tensor"] == pytest.approx(2 * 10 * 100 * 100 * 128 / 1e14)
    assert backward["tensor"] == pytest.approx(3.5 * plain["tensor"])
    assert backward["exp2"] == pytest.approx(2 * plain["exp2"])


def test_every_card_has_a_prediction_and_dense_attention_one_where_a_figure_is_published():
    shape = SHAPES["wan-720p"]
    for card in CARDS.values():
        for candidate in CANDIDATES:
            found = predict(shape, candidate, 0.27, card)
            assert found["bound"] > 0
            assert found["limit"] in ENGINES
    assert shape.tokens == 75600
    dense = predictions.predict_dense(shape, CARDS["H100"])
    assert dense == pytest.approx(4 * 40 * 75600**2 * 128 / (989.4e12 * 0.75))
    assert predictions.predict_dense(shape, CARDS["RTX 4090"]) is None
    assert predictions.predict_dense(SHAPES["cogvideox1.5"], CARDS["H100"]) is None


def test_the_page_holds_the_table():
    text = PAGE.read_text()
    assert predictions.page(text) == text
    with pytest.raises(ValueError, match="<!-- times -->"):
        predictions.page("# nothing")
