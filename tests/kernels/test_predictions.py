"""The bound's arithmetic, by hand on round numbers; the table of predictions and the page that holds it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "kernels" / "bench"
PAGE = ROOT / "docs" / "kernel-predictions.md"
sys.path.insert(0, str(BENCH))

import predictions  # noqa: E402
from predictions import CANDIDATES, CARDS, ENGINES, LAUNCH_SECONDS, SHAPES, Card, Shape, predict  # noqa: E402

CARD = Card(name="round", target="sm_80", tflops=100, bandwidth=1000, l2=4000, exp2=1)
SHAPE = Shape(name="round", heads=10, tokens=12800, dim=128)
LOGITS = 10 * 12800 * 6400  # at density 0.5


def test_arithmetic_of_one_call():
    found = predict(SHAPE, "triton", 0.5, CARD)
    assert found["tensor"] == pytest.approx(4 * LOGITS * 128 / 1e14)
    assert found["exp2"] == pytest.approx(LOGITS / 1e12)
    assert found["hbm"] == pytest.approx(4 * 10 * 12800 * 256 / 1e12)
    assert found["l2"] == pytest.approx(LOGITS / 128 * 512 / 4e12)
    assert found["limit"] == "tensor"
    assert found["bound"] == found["tensor"] + LAUNCH_SECONDS


@pytest.mark.parametrize(
    ("name", "figures"), [("exp2", {"exp2": 1e-3}), ("l2", {"l2": 1}), ("hbm", {"bandwidth": 1e-3})]
)
def test_the_slowest_engine_is_the_bound_and_named(name, figures):
    found = predict(SHAPE, "triton", 0.5, replace(CARD, **figures))
    assert found["limit"] == name
    assert found["bound"] == pytest.approx(max(found[engine] for engine in ENGINES) + LAUNCH_SECONDS)


def test_pooling_and_routing_walk_every_tile_of_a_row_as_a_column():
    plain, pooled, routed = (predict(SHAPE, x, 0.5, CARD) for x in ("triton", "triton-pooled", "triton-routed"))
    columns = 10 * 12800 * 100
    assert pooled["exp2"] - plain["exp2"] == pytest.approx(columns / 1e12)
    assert pooled["hbm"] == pytest.approx(plain["hbm"] * 6 / 4)  # k and v once more, for the means
    assert routed["hbm"] == pytest.approx(plain["hbm"] * 7 / 4)  # and q
    assert routed["tensor"] - pooled["tensor"] == pytest.approx(2 * 10 * 100 * 100 * 128 / 1e14)


def test_a_backward_is_seven_products_for_two():
    forward, backward = (predict(SHAPE, x, 0.5, CARD) for x in ("triton", "triton-backward"))
    assert backward["tensor"] == pytest.approx(3.5 * forward["tensor"])
    assert backward["exp2"] == pytest.approx(2 * forward["exp2"])


def test_tiles_of_half_the_rows_come_from_the_cache_twice_as_often():
    whole, half = (predict(replace(SHAPE, block=block), "triton", 0.5, CARD) for block in (128, 64))
    assert half["l2"] == pytest.approx(2 * whole["l2"])


@pytest.mark.parametrize("density", [-0.1, 1.1])
def test_a_density_is_a_share(density):
    with pytest.raises(ValueError, match=str(density)):
        predict(SHAPE, "triton", density, CARD)


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_every_card_has_a_prediction_for_every_candidate(card):
    for candidate in CANDIDATES:
        found = predict(SHAPES["wan-720p"], candidate, 0.27, card)
        assert found["bound"] > 0
        assert found["limit"] in ENGINES


def test_dense_attention_is_told_only_where_a_figure_is_published():
    shape = SHAPES["wan-720p"]
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
