"""Rotary positions of every family under their check."""

import pytest
import tiny_models
from dit_accel_pipelines import ADAPTERS

from dit_accel.testing.rope_checks import check_rope
from dit_accel.testing.tiny_models import Case

BY_NAME = {adapter.name: adapter for adapter in ADAPTERS}
MODELS = [(name, number) for name, models in tiny_models.MODELS.items() for number in range(len(models))]


@pytest.mark.parametrize(("name", "number"), MODELS)
def test_positions_move_as_the_adapter_says(name, number):
    check_rope(Case(BY_NAME[name], tiny_models.MODELS[name][number]))
