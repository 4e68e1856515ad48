"""Options that count steps at the ends of a run: how they are checked, and how many steps they come to."""

from typing import Any

from ..errors import ConfigError
from ..rules.steps import whole_steps


def check_steps(config: Any, *options: str) -> None:
    """Check options that hold a number of steps, or a share of the run below 1.

    Args:
        config: of a method; has its ``name``.
        options: their names; an unset one is left alone.

    Raises:
        ConfigError: for one below 0, or one above 1 that is no whole number.
    """
    for option in options:
        value = getattr(config, option)
        if value is not None and (value < 0 or (value > 1 and value != int(value))):
            raise ConfigError(
                f"{config.name}.{option} must be a whole number of steps from 0 on, or a share of the run below 1, got "
                f"{value}; write 5 for five steps, 0.2 for a fifth of them"
            )


def end_steps(config: Any, first: str, last: str, count: int | None) -> tuple[int, int]:
    """Return how many steps two options come to, at a run's beginning and at its end; of an unset one none.

    Args:
        config: a method's config or settings; has its ``name``.
        first: the option that counts a run's first steps.
        last: the option that counts its last ones.
        count: steps of the run; None: not known.

    Raises:
        ConfigError: if the options need the number of steps, which is not known.
    """
    at_first, at_last = getattr(config, first) or 0, getattr(config, last) or 0
    if count is None and (at_last or 0 < at_first < 1):
        option, value = (last, at_last) if at_last else (first, at_first)
        raise ConfigError(
            f"{config.name}.{option} = {value} needs the number of steps, which is not known here; attach to the "
            f"pipeline, or set {first} to a whole number and {last} to 0"
        )
    return whole_steps(at_first, count or 0), whole_steps(at_last, count or 0)
