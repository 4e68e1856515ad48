"""Foreground by motion, as profiles of blocks use it; against figures written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.rules.foreground import foreground, motion, otsu, predicted

GRID = (5, 3, 4)


@pytest.mark.parametrize("layout", ["bcthw", "bthwc", "btchw", "tokens"])
def test_predictions_by_token(layout):
    """x = x0 (1 - s) + s eps and v = eps - x0: x - s v is x0; a token holds its own patch and no other's."""
    torch.manual_seed(0)
    clean, noise, sigma = torch.randn(2, 7, 5, 6, 8), torch.randn(2, 7, 5, 6, 8), 0.7
    places = torch.arange(5 * 3 * 4.0).reshape(5, 3, 4).repeat_interleave(2, 1).repeat_interleave(2, 2)
    clean[:, 0] = places
    orders = {"bcthw": (0, 1, 2, 3, 4), "bthwc": (0, 2, 3, 4, 1), "btchw": (0, 2, 1, 3, 4)}
    x, v = (1 - sigma) * clean + sigma * noise, noise - clean
    if layout == "tokens":
        x, v = (z[:, :, :, ::2, ::2].flatten(2).mT for z in (x, v))
    else:
        x, v = (z.permute(orders[layout]) for z in (x, v))
    found = predicted(x, v, sigma, GRID)
    assert found.shape[:4] == (2, *GRID)
    own = found[..., :4] if layout != "tokens" else found[..., :1]
    expected = torch.arange(60.0).reshape(1, *GRID, 1).expand_as(own)
    torch.testing.assert_close(own, expected)


def test_conditions_beside_the_latents_are_left_out_and_other_shapes_are_none():
    x, v = torch.randn(1, 36, 5, 6, 8), torch.randn(1, 16, 5, 6, 8)
    torch.testing.assert_close(predicted(x, v, 0.5, GRID), predicted(x[:, :16], v, 0.5, GRID))
    assert predicted(v, x, 0.5, GRID) is None
    assert predicted(x, v, 0.5, (7, 3, 4)) is None
    for tokens in (59, 61):
        assert predicted(torch.randn(1, tokens, 4), torch.randn(1, tokens, 4), 0.5, GRID) is None


@pytest.mark.parametrize(("before", "after", "text"), [(12, 0, 0), (0, 24, 0), (12, 24, 0), (17, 0, 5), (0, 7, 7)])
def test_conditions_around_the_grid_are_left_out(before, after, text):
    """Reference frames and keyframes stand among the latents; text is counted with them and does not."""
    torch.manual_seed(0)
    first, last = (before - text if before >= text else 0), (after if before else after - text)
    x, v = torch.randn(2, 1, first + 60 + last, 3), torch.randn(2, 1, first + 60 + last, 3)
    own = predicted(*(z[:, 0, first : first + 60] for z in (x, v)), 0.5, GRID)
    torch.testing.assert_close(predicted(x[:, 0], v[:, 0], 0.5, GRID, before, after), own)
    if not text:
        x, v = (z[:, 0].unflatten(1, (-1, 3, 4)) for z in (x, v))
        torch.testing.assert_close(predicted(x, v, 0.5, GRID, before, after), own)


def test_channels_come_first_where_sizes_leave_it_open():
    x = torch.randn(1, 6, 6, 4, 4)
    found = predicted(x, torch.zeros_like(x), 0.5, (6, 2, 2))
    assert found.shape == (1, 6, 2, 2, 24)
    for frame in range(6):
        assert found[0, frame].flatten().sort().values.tolist() == x[0, :, frame].flatten().sort().values.tolist()


def test_what_moves_is_foreground_and_what_it_uncovers_is_not():
    clean = torch.zeros(1, 9, 8, 8, 3) + torch.rand(8, 8, 3) * 5
    truth = torch.zeros(9, 8, 8, dtype=torch.bool)
    for frame in range(9):
        truth[frame, 3:5, frame % 8 : frame % 8 + 2] = True
    clean[0, truth] = 9.0
    clean += 0.05 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(foreground(clean), truth)
    assert not foreground(torch.ones(1, 5, 4, 4, 2)).any()
    assert motion(clean).shape == (1, 9, 8, 8)


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=40))
def test_otsu_is_the_best_of_all_splits(values):
    x = torch.tensor(values, dtype=torch.float64)

    def between(threshold):
        low, high = x[x <= threshold], x[x > threshold]
        return 0.0 if not len(high) or not len(low) else float(len(low) * len(high) * (low.mean() - high.mean()) ** 2)

    best = max(between(value) for value in values)
    assert between(otsu(x)) >= best * (1 - 1e-9) - 1e-9


def test_otsu_splits_two_heaps():
    values = torch.cat([torch.linspace(0, 1, 50), torch.linspace(9, 10, 20)])
    assert 1 < otsu(values) < 9
    assert otsu(torch.ones(4)) == 1
