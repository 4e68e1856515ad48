"""The committed list of the methods' calls is what they make now, and what is compiled and checked is among them."""

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"
sys.path.insert(0, str(BENCH))

import calls  # noqa: E402
import cases  # noqa: E402
import method_calls  # noqa: E402


@pytest.mark.slow
def test_methods_make_the_calls_that_are_listed():
    """After a change of a method: python tests/support/method_calls.py."""
    assert method_calls.recorded() == calls.kinds()


def test_what_is_compiled_is_what_methods_call():
    known = set(calls.kinds())
    for _, kinds in cases.CASES:
        assert set(kinds) <= known


def test_a_kind_is_read_back_from_its_call():
    """What a call of a kind holds is what the kind says, for every kind."""
    for kind in calls.kinds():
        call = calls.make(kind, calls.Setting(tile=16, dim=16, dtype="fp32"), "cpu")
        seen: dict[str, set[str]] = method_calls.defaultdict(set)
        with method_calls.recording(seen, "made"):
            call.run("torch")
        assert list(seen) == [kind]


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match=r"kind.*twist.*'twist\+mask'"):
        calls.make("twist+mask", calls.Setting(), "cpu")
