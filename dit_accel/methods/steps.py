"""Options that count steps at the ends of a run, and how many steps they come to."""

from typing import Any

from ..errors import ConfigError
from ..rules.steps import whole_steps


def end_steps(config: Any, first: str, last: str, count: int | None) -> tuple[int, int]:
    """Count the steps of two options, at a run's beginning and at its end; of an unset one none."""
    at_first, at_last = getattr(config, first) or 0, getattr(config, last) or 0
    if count is None and (at_last or 0 < at_first < 1):
        option = last if at_last else first
        raise unknown_steps(config, option, f"set {first} to a whole number and {last} to 0")
    return whole_steps(at_first, count or 0), whole_steps(at_last, count or 0)


def unknown_steps(config: Any, option: str, instead: str) -> ConfigError:
    """Return the error of an option that needs the run's number of steps where it is not known, and what to do."""
    return ConfigError(
        f"{config.name}.{option} = {getattr(config, option)} needs the number of steps, which is not known here; "
        f"attach to the pipeline, or {instead}"
    )
