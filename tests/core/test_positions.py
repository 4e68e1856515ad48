"""The grid of a packed sequence, read off its positions."""

import pytest
import torch

from dit_accel import ConfigError
from dit_accel.adapters.position_ids import last_video, read_once


def frames(count, height, width, start=0.0):
    t, h, w = torch.meshgrid(
        torch.arange(count) * 0.4 + start, torch.linspace(-1, 1, height), torch.linspace(-2, 2, width), indexing="ij"
    )
    return torch.stack([t, h, w], -1).flatten(0, 2).double()


def text(tokens):
    return torch.stack([torch.arange(tokens), torch.zeros(tokens), torch.zeros(tokens)], 1).double()


@pytest.mark.parametrize("front", [0, 1, 5, 13])
@pytest.mark.parametrize("size", [(7, 4, 8), (1, 4, 8), (3, 1, 5), (2, 5, 1)])
def test_the_last_video_is_found_behind_anything(front, size):
    assert last_video(torch.cat([text(front), frames(*size, start=front)])) == size


def test_a_keyframe_of_the_same_size_is_no_part_of_the_video():
    for anchor in (5.0, 5.4, 7.4):
        keyframe = frames(1, 4, 8, start=anchor)
        assert last_video(torch.cat([text(5), keyframe, frames(7, 4, 8, start=5.0)])) == (7, 4, 8)
        sound = torch.stack([torch.arange(6) + 5, torch.zeros(6), torch.full((6,), -2.0)], 1).double()
        assert last_video(torch.cat([text(5), keyframe, sound, frames(7, 4, 8, start=5.0)])) == (7, 4, 8)


def test_positions_are_read_once_and_again_when_they_change():
    calls = []

    def read(ids):
        calls.append(ids)
        return last_video(ids)

    places = torch.cat([text(3), frames(2, 3, 4, start=3)])
    assert read_once(places, read) == read_once(places, read) == (2, 3, 4)
    assert len(calls) == 1
    places[3:15, 0] += 100  # now the first frame is later than the last
    assert read_once(places, read) == (1, 3, 4)


def test_what_is_no_grid_is_refused():
    places = frames(2, 3, 4)[:-1]
    with pytest.raises(ConfigError, match="11 of 23 tokens"):
        last_video(places)
