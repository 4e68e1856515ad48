"""When guidance by a perturbed prediction acts, and what it adds."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.rules.guidance import added, normalized
from dit_accel.rules.steps import is_short, window

SHARES = st.floats(0, 1)


@given(SHARES, SHARES, st.integers(1, 100))
def test_a_window_is_never_empty(one, other, steps):
    start, stop = sorted((one, other))
    if start < stop:
        found = window(start, stop, steps)
        assert 0 <= found[0] <= found[-1] < steps


@pytest.mark.parametrize(
    ("start", "stop", "steps", "expected"),
    [
        (0.0, 1.0, 4, [0, 1, 2, 3]),
        (0.01, 0.2, 50, list(range(1, 10))),
        (0.01, 0.2, 8, [1]),  # empty in diffusers' guiders
        (0.01, 0.2, 4, [1]),
        (0.07, 1.0, 100, list(range(7, 100))),
        (0.99, 1.0, 4, [3]),
    ],
)
def test_the_steps_of_a_window(start, stop, steps, expected):
    assert list(window(start, stop, steps)) == expected


def test_a_window_shorter_than_a_step_is_known():
    assert is_short(0.01, 0.2, 4)
    assert not is_short(0.01, 0.2, 8)
    assert not is_short(0.0, 0.25, 4)


def test_what_is_added():
    torch.manual_seed(0)
    cond, perturbed = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.equal(added(cond, perturbed, 0.0), torch.zeros(2, 3, 5))
    assert torch.equal(added(cond, cond, 5.0), torch.zeros(2, 3, 5))
    assert torch.equal(added(cond, perturbed, 2.0), 2 * (cond - perturbed))
    low = added(cond.bfloat16(), perturbed.bfloat16(), 2.0)
    assert low.dtype == torch.float32
    assert added(cond.double(), perturbed.double(), 2.0).dtype == torch.float64


def test_rescaling_gives_the_conditional_deviation_back():
    torch.manual_seed(0)
    cond, perturbed = torch.randn(2, 300), torch.randn(2, 300)
    for phi in (0.0, 0.7, 1.0):
        whole = cond + added(cond, perturbed, 4.0)
        made = cond + added(cond, perturbed, 4.0, phi)
        expected = phi * whole * (cond.std(1, keepdim=True) / whole.std(1, keepdim=True)) + (1 - phi) * whole
        torch.testing.assert_close(made, expected)
    torch.testing.assert_close(made.std(1), cond.std(1))


def test_normalized_is_bounded_and_leaves_zeros_alone():
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(3, 5, 8, generator=generator) for _ in range(2))
    positive[0, 0] = 0
    led = normalized(positive, negative, 11.0, 1.5, 1.0)
    assert led.isfinite().all()
    assert not led[0, 0].any()
    assert (led.abs().sum(-1) <= 1.5 * positive.abs().sum(-1) * (1 + 1e-6)).all()
    torch.testing.assert_close(normalized(positive, negative, 1.0, 1.0, 0.7), positive)
    torch.testing.assert_close(normalized(positive, positive, 11.0, 1.5, 0.7), positive)
    assert torch.equal(normalized(positive, negative, 11.0, 1.5, 0.0), positive)
    free = normalized(positive[1:], negative[1:], 1.2, 1e9, 0.25)
    torch.testing.assert_close(free, positive[1:] + 0.25 * 0.2 * (positive[1:] - negative[1:]))
