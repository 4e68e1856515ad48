"""Token layouts: where a sequence's tokens lie, and what is no layout."""

import pytest

from dit_accel import ConfigError
from dit_accel.plan.layout import TokenLayout, layout_of, with_valid_text

LAYOUT = TokenLayout(frames=2, height=3, width=4, text_before=5, text_after=7)


def test_a_layout_counts_its_tokens():
    assert (LAYOUT.tokens_per_frame, LAYOUT.visual_tokens, LAYOUT.tokens) == (12, 24, 36)
    assert LAYOUT.visual == slice(5, 29)
    assert LAYOUT.lengths == {"frames": 2, "height": 3, "width": 4}
    assert layout_of([2.0, 3, 4, 5, 7]) == LAYOUT
    assert TokenLayout(frames=1, height=1, width=1).tokens == 1


@pytest.mark.parametrize("name", ["frames", "height", "width", "text_before", "text_after"])
def test_sizes_that_are_none(name):
    least = 0 if name.startswith("text") else 1
    sizes = {"frames": 2, "height": 3, "width": 4, name: least}
    assert getattr(TokenLayout(**sizes), name) == least
    for value in (least - 1, 1.0, True, "2", None):
        with pytest.raises(ConfigError, match=rf"layout.*{name}.*>= {least}, got "):
            TokenLayout(**{**sizes, name: value})


@pytest.mark.parametrize(
    ("length", "before", "after"),
    [(36, 5, 7), (35, 5, 6), (29, 5, 0), (24, 0, 0), (28, 5, 7), (37, 5, 7), (23, 5, 7)],
)
def test_text_that_a_sequence_left_out(length, before, after):
    """It is missing from the end; a video alone has none; what fits neither is left to be refused."""
    found = with_valid_text(LAYOUT, length)
    assert (found.text_before, found.text_after) == (before, after)
    assert found.visual_tokens == 24
