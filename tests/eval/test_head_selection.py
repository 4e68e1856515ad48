"""What perturbed heads are ranked by, where one objective or several are measured."""

import math

import pytest
from dit_accel_eval.tune.head_selection import HeadSelection

from dit_accel import ConfigError


def test_one_objective_is_its_mean():
    selection = HeadSelection.of("clip-score@open_clip:ViT-L-14/openai")
    assert selection.objectives == ("clip-score@open_clip:ViT-L-14/openai",)
    assert selection.worth([[1.0], [4.0]]) == 2.5


def test_means_are_taken_before_they_are_combined():
    harmonic = HeadSelection.of("harmonic: one, two")
    assert harmonic.objectives == ("one", "two")
    assert harmonic.worth([[1.0, 30.0], [3.0, 10.0]]) == pytest.approx(2 / (1 / 2 + 1 / 20))
    published = HeadSelection.of("threshold: clip, pick >= 20, aesthetic >= 6")
    assert published.worth([[0.3, 19.0, 7.0], [0.1, 21.0, 5.0]]) == pytest.approx(0.2)
    assert published.worth([[0.9, 19.0, 7.0], [0.9, 20.9, 7.0]]) == -math.inf


@pytest.mark.parametrize(
    "text", ["harmonic: one", "harmonic: one, two >= 3", "threshold: one >= 2, two >= 3", "threshold: one, two",
             "threshold: one, two >= many", "harmonic: , one", "harmonic:"],
)  # fmt: skip
def test_what_says_nothing_is_refused(text):
    with pytest.raises(ConfigError, match=rf"'harmonic: A, B'.*got '{text}'"):
        HeadSelection.of(text)


def test_no_harmonic_mean_of_what_is_not_above_0():
    with pytest.raises(ConfigError, match=r"got -1, 2 for one, two;"):
        HeadSelection.of("harmonic: one, two").worth([[-1.0, 2.0]])
