"""The request of a run that writes nothing, and prompts that no suite evaluates."""

import tempfile
from pathlib import Path
from typing import Any

from dit_accel_assets import held_out_prompts
from dit_accel_pipelines.generation.request import Request

FIRST_PROMPT = 64
"""Number of the first held-out prompt that tuning may look at; the suites evaluate those below it."""


def embedded_prompts(name: str, count: int = 2) -> tuple[str, ...]:
    """Return prompts that an embedded model knows, none of those that the suites evaluate."""
    return tuple(held_out_prompts(name, FIRST_PROMPT + count)[FIRST_PROMPT:])


def tuning_request(**options: Any) -> Request:
    """Return a generation request that writes nothing; the options are `Request`'s.

    Raises:
        ConfigError: for a value out of range.
    """
    return Request(output=Path(tempfile.gettempdir()) / "unused.mp4", **options)
