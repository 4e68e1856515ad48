"""What a command makes: one request for each output, with the name and the seed that it has."""

from collections.abc import Iterator, Sequence
from pathlib import Path


def singles(
    prompts: Sequence[str], output: Path, seed: int, *, same_seed: bool = False
) -> Iterator[tuple[str, Path, int]]:
    """Yield the prompt, file and seed of each output: the next seed for each prompt, unless they are to be one."""
    names = numbered(output, len(prompts))
    for place, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
        yield prompt, name, seed + (0 if same_seed else place)


def numbered(output: Path, count: int) -> list[Path]:
    """Return a path for each of so many outputs: the output itself, or with a number before its suffix."""
    if count == 1:
        return [output]
    digits = max(2, len(str(count)))
    return [output.with_name(f"{output.stem}-{n:0{digits}d}{output.suffix}") for n in range(1, count + 1)]
