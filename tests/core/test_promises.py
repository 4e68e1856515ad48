"""What every method promises, once a promise over the table of methods; a method's own file holds its rule alone."""

import pytest
from method_table import TABLE

from dit_accel.adapters.installed import adapter_for
from dit_accel.methods.registry import handlers
from dit_accel.testing.promises import PROMISES
from dit_accel.testing.tiny_models import Case, tiny_wan

MODEL = Case(adapter_for("WanTransformer3DModel"), tiny_wan())


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize("promise", PROMISES)
def test_a_promise_is_kept(promise, row):
    PROMISES[promise](MODEL, TABLE[row])


def test_every_method_has_a_row():
    assert {case.config.name for case in TABLE.values()} == {
        name for name, one in handlers().items() if not one.objects
    }
