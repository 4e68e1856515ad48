"""Shared by the core's tests."""

import pytest
from diffusers import WanTransformer3DModel
from wan_tiny import tiny_transformer


@pytest.fixture
def transformer() -> WanTransformer3DModel:
    return tiny_transformer()
