"""LiteAttention's config, thresholds files and memory: what is refused, in which words, and round trips."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lite_calls import MODEL, Calls

from dit_accel import LiteAttention
from dit_accel.errors import ConfigError
from dit_accel.methods.attention.lite.handler import LiteHandler
from dit_accel.methods.attention.lite.lite_config import THRESHOLDS
from dit_accel.methods.attention.lite.ranges import range_tiles
from dit_accel.methods.attention.lite.thresholds import LiteThresholds, read_thresholds, write_thresholds
from dit_accel.plan.layout import TokenLayout
from dit_accel.plan.tiling import bitmap_bytes


def test_unset_thresholds_are_the_criterion_s_and_a_recipe_can_t_set_one():
    for criterion, usual in THRESHOLDS.items():
        assert LiteAttention(criterion=criterion).filled().threshold == usual
    assert LiteAttention(threshold=-3).filled().threshold == -3
    assert LiteAttention(threshold=5, allow_positive_threshold=True).threshold == 5
    assert LiteAttention().filled({"block_size": 64}).block_size == 64
    with pytest.raises(ConfigError, match=r"recipe.*lite.*'threshold'"):
        LiteAttention().filled({"threshold": -3})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 60), unique=True, max_size=6).map(sorted), st.sampled_from([16, 32]),
    st.integers(0, 9), st.booleans(),
)  # fmt: skip
def test_ranges_round_outward_or_inward(edges, block, before, shuffled):
    ranges = edges[: len(edges) // 2 * 2]
    layout = TokenLayout(frames=1, height=1, width=61, text_before=before, text_after=3)
    order = torch.randperm(layout.tokens) if shuffled else None
    LiteAttention(must_keep=ranges)
    inside = {before + t for start, end in zip(ranges[::2], ranges[1::2], strict=True) for t in range(start, end)}
    tokens = list(range(layout.tokens)) if order is None else order.tolist()
    tiles = [set(tokens[start : start + block]) for start in range(0, len(tokens), block)]
    assert range_tiles(ranges, layout, order, block, inward=False).tolist() == [bool(t & inside) for t in tiles]
    assert range_tiles(ranges, layout, order, block, inward=True).tolist() == [t <= inside for t in tiles]


def test_a_range_beyond_the_video_is_refused_when_its_size_is_known():
    handler = Calls(LiteAttention(must_keep=(0, 81))).handler
    with pytest.raises(ConfigError, match=r"lite\.must_keep.*visual token 81.*80"):
        handler.check_layout(TokenLayout(frames=1, height=1, width=80))


def test_memory_is_a_small_part_of_the_original_s_lists():
    wan = TokenLayout(frames=21, height=45, width=80)
    bits = 40 * 2 * bitmap_bytes(LiteAttention().filled().tiling.tiles(wan.tokens), 40, 1)
    queries, keys = -(-wan.tokens // 128), -(-wan.tokens // 176)
    lists = 40 * 2 * 2 * 40 * queries * (keys + 2) * 2
    assert 0.10e9 < bits < 0.16e9
    assert lists / bits > 20  # with tiles as many as ours, 30
    assert bitmap_bytes(LiteAttention(block_size=64).filled().tiling.tiles(wan.tokens), 1, 1) == 4 * 1182 * 37


class TestThresholdsFile:
    TABLE = LiteThresholds(
        model="toy, 3 layers, 2 heads", criterion="maxgap", num_inference_steps=3, target_error=0.05,
        thresholds={"transformer": ((-10.0, -math.inf, -4.0), (-1.0, -2.0, -3.0)) * 2},
    )  # fmt: skip

    def test_it_survives_writing_and_sets_each_vote(self, tmp_path):
        path = tmp_path / "lite.toml"
        write_thresholds(path, self.TABLE)
        assert read_thresholds(path) == self.TABLE
        assert [p.name for p in tmp_path.iterdir()] == ["lite.toml"]
        assert MODEL.name == self.TABLE.model
        calls = Calls(LiteAttention(thresholds_file=str(path)), steps=3)
        assert calls.handler.is_active(calls.context(0), 0)
        votes = [calls.plan(step=step, layer=layer)[0].selection.vote for layer in (0, 1) for step in (0, 1, 2)]
        assert [vote and vote.threshold for vote in votes] == [-10.0, -math.inf, None, -1.0, -2.0, None]
        with pytest.raises(ConfigError, match=r"layer 7.*4 layers"):
            calls.plan(layer=7)

    def test_another_model_criterion_or_step_count_is_refused_naming_both(self, tmp_path):
        path = tmp_path / "lite.toml"
        write_thresholds(path, self.TABLE)
        calls = Calls(LiteAttention(thresholds_file=str(path)))
        with pytest.raises(ConfigError, match=r"3 steps.*50"):
            calls.handler.is_active(calls.context(0, num_inference_steps=50), 0)
        with pytest.raises(ConfigError, match=r"3 steps.*unknown"):
            calls.handler.is_active(calls.context(0, num_inference_steps=None), 0)
        with pytest.raises(ConfigError, match=r"'maxgap', lite\.criterion.*'mass'"):
            LiteHandler(LiteAttention(thresholds_file=str(path), criterion="mass"), MODEL)
        text = path.read_text().replace("toy", "other")
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"'other, 3 layers, 2 heads'.*'toy, 3 layers, 2 heads'"):
            LiteHandler(LiteAttention(thresholds_file=str(path)), MODEL)

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            (None, r"thresholds_file .*\(No such file.*tune lite"),
            ("a = = b", r"thresholds_file.*TOML"),
            ("version = 2", r"version 2.*version 1"),
            ("version = 1\nmodel = 'm'", r"tune lite.*KeyError\('thresholds'\)"),
            ("version = 1\nmodel='m'\ncriterion='maxgap'\nnum_inference_steps=2\n[thresholds]\ntransformer=[[-1.0]]",
             r"layer 0.*per step.*2 in all, got 1"),
            ("version = 1\nmodel='m'\ncriterion='maxgap'\nnum_inference_steps=1\n[thresholds]\ntransformer=[[1.0]]",
             r"lite.*layer 0.*< 0 \(log2 units\).*got 1\.0"),
            ("version = 1\nmodel='m'\ncriterion='sum'\nnum_inference_steps=1\n[thresholds]\ntransformer=[[-1.0]]",
             r"lite.*'maxgap'.*'mass'.*'sum'"),
            ("version = 1\nmodel='m'\ncriterion='mass'\nnum_inference_steps=1\n[thresholds]",
             r"every layer.*got none"),
        ],
    )  # fmt: skip
    def test_what_is_no_thresholds_file_is_refused(self, tmp_path, text, error):
        path = tmp_path / "lite.toml"
        if text is not None:
            path.write_text(text)
        with pytest.raises(ConfigError, match=error):
            read_thresholds(path)
