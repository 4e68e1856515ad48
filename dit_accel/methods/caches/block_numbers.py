"""Numbers of blocks as users write them, such as ``0, 2-7``."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from ...errors import ConfigError
from ...rules.block_schedule import runs_of
from ..site import Block


def read_numbers(text: str | Sequence[int], option: str) -> tuple[int, ...]:
    """Return the numbers that a list or a text of numbers and ranges names, the value of an option, sorted."""
    numbers: set[int] = set()
    for part in text.split(",") if isinstance(text, str) else text:
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(part))
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(
                f"{option} = {text!r} can't be read at {str(part)!r}; write block numbers and ranges such as '0, 2-7'"
            )
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not numbers:
        raise ConfigError(f"{option} names 0 blocks; name some, such as '0, 2-7', or leave it unset")
    return tuple(sorted(numbers))


def spell_numbers(blocks: Iterable[int]) -> str:
    """Return block numbers as a text of numbers and ranges."""
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs_of([*blocks]))


def kinds_of(blocks: Sequence[Block]) -> str:
    """Return the number of blocks of each list, as text."""
    kinds = Counter(block.list.pattern for block in blocks)
    return f" ({', '.join(f'{count} of {pattern}' for pattern, count in kinds.items())})"


def require_there(numbers: Sequence[int], option: str, model: str, count: int, kinds: str = "") -> None:
    """Raise `ConfigError` for block numbers that a model of ``count`` blocks does not have; it tells the counts."""
    beyond = [number for number in numbers if number >= count]
    if beyond:
        raise ConfigError(
            f"{option} names {len(numbers)} blocks, of which {model} lacks {spell_numbers(beyond)}: it has {count}"
            f"{kinds}, numbered from 0 to {count - 1}; name some of these"
        )
