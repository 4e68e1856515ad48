"""What the pictures of docs/methods/ are drawn from, and how."""

import numpy as np
import pytest
from method_pictures import PICTURES, difference, frames_seen, pipeline, run, tile_states
from PIL import Image
from strips import DARK, GREY, LIGHT, NAMES, block_strip, map_picture, rows_picture, save

import dit_accel
from dit_accel.methods.registry import methods

SMALL = dict(height=32, width=32, num_frames=9, num_inference_steps=4)


def colours(picture: Image.Image) -> set[str]:
    counted = picture.convert("RGB").getcolors(picture.width * picture.height)
    assert counted is not None
    return {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in counted}


def test_every_method_but_rope_whose_picture_is_there_already_has_one():
    assert set(PICTURES) == set(methods()) - {"rope"}


def test_what_a_cache_skips_is_what_did_not_run():
    cache = dit_accel.StaticCache(steps=(1, 0, 1, 0), warmup_steps=1, last_steps=0)
    blocks = dit_accel.ProfilingCache(blocks="0-5", every=2, warmup_steps=1, last_steps=0)
    assert np.array_equal(run("wan-tiny", (cache,), **SMALL).computed, np.tile([True, False, True, False], (12, 1)))
    computed = run("wan-tiny", (blocks,), **SMALL).computed
    assert computed[6:].all()
    assert not computed[:6].all(axis=1).any()
    assert dit_accel.attachment_of(pipeline("wan-tiny")) is None


def test_tiles_are_told_by_lists_bits_and_routing():
    sizes, call = dict(block_size=16, dense_steps=0, dense_layers=0), {**SMALL, "num_inference_steps": 3}
    lite = run("wan-tiny", (dit_accel.LiteAttention(threshold=-1.0, **sizes),), **call).calls[-1]
    sol = run("wan-tiny", (dit_accel.SolAttention(beta=0.0, **sizes),), **call).calls[-1]
    assert set(np.unique(tile_states(lite))) == {0, 2}
    assert set(np.unique(tile_states(sol))) == {1, 2}
    lists = dit_accel.RadialAttention(decay_factor=0.2, near="half", sink=False, **sizes)
    seen = run("wan-tiny", (lists,), **call)
    assert set(np.unique(tile_states(seen.calls[-1]))) == {0, 2}
    assert colours(frames_seen(seen)) >= {GREY, DARK}


def test_a_difference_is_five_times_the_distance_and_at_most_white():
    one, other = np.zeros((1, 2, 2, 3)), np.full((1, 2, 2, 3), 0.1)
    assert difference(one, other) == pytest.approx(0.5)
    assert difference(one, 5 * other).max() == 1.0


def test_rows_are_as_high_as_their_pictures_and_stand_beside_their_names():
    picture = rows_picture([("a", [np.ones((8, 6, 3))] * 2), ("b", [np.zeros((8, 6, 3))] * 2)], scale=2)
    assert picture.size == (NAMES + 2 * 16 - 4, 2 * 20)
    assert picture.getpixel((NAMES + 1, 21)) == (0, 0, 0)
    assert picture.getpixel((NAMES + 13, 21)) == (255, 255, 255)


def test_steps_are_one_bar_where_all_blocks_agree_and_a_row_a_block_where_not():
    every = np.tile([True, False], (5, 2))
    some = every.copy()
    some[0, 1] = True
    assert block_strip(every, 100).height < block_strip(some, 100).height
    assert colours(block_strip(every, 100)) >= {DARK, LIGHT}
    assert LIGHT in colours(block_strip(np.ones((5, 4), dtype=bool), 400))  # in the legend alone


def test_a_map_names_what_occurs():
    values = np.array([[2, 0], [0, 2]])
    found = colours(map_picture(values, {0: "skipped", 1: "pooled", 2: "exact"}, "tiles"))
    assert found >= {DARK, GREY}
    assert LIGHT not in found


def test_a_picture_is_saved_with_as_many_colours_as_its_size_allows(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    save(Image.fromarray(noise), tmp_path / "all.png")
    save(Image.fromarray(noise), tmp_path / "few.png", most=5_000)
    with Image.open(tmp_path / "all.png") as everything, Image.open(tmp_path / "few.png") as few:
        assert everything.mode == "RGB"
        assert few.mode == "P"
    assert (tmp_path / "few.png").stat().st_size <= 5_000
