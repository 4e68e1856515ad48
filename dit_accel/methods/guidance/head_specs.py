"""Which heads a user means: ``L3H1``, ranges, whole layers, stacks, published sets, and files of these."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...errors import ConfigError, did_you_mean
from ...files import read_text
from ..options import JSON_FILE

Specs = Annotated[str | tuple[str, ...], JSON_FILE]
"""What a user writes."""

Heads = Mapping[int, tuple[int, ...]]
"""Index of an attention layer -> its heads, in rising order."""

_SPEC = re.compile(r"(?:(?P<stack>[\w.]+)\.)?L(?P<layers>\d+(?:-L?\d+)?)(?:H(?P<heads>\d+(?:-H?\d+)?))?")
_FORM = "write L3H1 (a head), L3H0-5, L3 or L3-5 (whole layers), a stack's name, a published set or a .json file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacks:
    """The attention layers of a model, as specs name them."""

    names: Sequence[str]  # attention module names, by their index; of a model that is not at hand, empty strings
    heads: int  # heads of each
    others: Collection[str] = ()  # names of attention modules that can't be perturbed: cross-attention and refiners

    def stack(self, name: str) -> list[int]:
        """Return the layers of a stack; none where there is no such stack."""
        return [index for index, of in enumerate(self.names) if stack_of(of) == name]

    @property
    def stacks(self) -> list[str]:
        """The stacks' names, in running order."""
        return list(dict.fromkeys(stack_of(name) for name in self.names if name))


def stack_of(name: str) -> str:
    """Return the stack of an attention module: what stands before its number."""
    return re.split(r"\.\d+(?:\.|$)", name)[0]


def split_specs(specs: str | Iterable[str]) -> tuple[str, ...]:
    """Return the single specs of a text with commas, or of several."""
    texts = [specs] if isinstance(specs, str) else list(specs)
    return tuple(part.strip() for text in texts for part in text.split(",") if part.strip())


def read_heads(
    specs: str | Iterable[str], stacks: Stacks, where: str, published: Mapping[str, Sequence[str]] | None = None
) -> Heads:
    """Return the heads that specs name.

    ``specs``: see `split_specs`; layers count over all stacks, behind a stack's name within it.
    """
    by_layer: dict[int, set[int]] = {}
    for spec in split_specs(specs):
        for layer, heads in _one(spec, stacks, where, published or {}).items():
            by_layer.setdefault(layer, set()).update(heads)
    return {layer: tuple(sorted(by_layer[layer])) for layer in sorted(by_layer)}


def first_layer(specs: str | Iterable[str], layers: int, heads: int) -> int | None:
    """Return the first layer that specs name, without a model; None where that takes one."""
    try:
        by_layer = read_heads(specs, Stacks(names=("",) * layers, heads=heads), "")
    except ConfigError:
        return None
    return min(by_layer, default=None)


def _one(spec: str, stacks: Stacks, where: str, published: Mapping[str, Sequence[str]]) -> Heads:
    whole = tuple(range(stacks.heads))
    if spec in published:
        return read_heads(published[spec], stacks, f"{where} {spec!r}")
    if spec.endswith(".json"):
        return read_heads(read_file(Path(spec), where), stacks, f"{spec}:")
    if spec in stacks.names:
        return {list(stacks.names).index(spec): whole}
    if spec in stacks.others:
        raise ConfigError(
            f"{where} names {spec}, which is cross-attention or a side path: queries and keys are of different tokens "
            f"there, so that no head can see itself alone; name self-attention, L0 to L{len(stacks.names) - 1}"
        )
    if layers := stacks.stack(spec):
        return dict.fromkeys(layers, whole)
    match = _SPEC.fullmatch(spec)
    if match is None:
        known = [*published, *stacks.stacks]
        raise ConfigError(f"{where} can't read {spec!r}; {_FORM}" + (f"; {did_you_mean(spec, known)}" if known else ""))
    return _numbered(spec, match, stacks, where)


def _numbered(spec: str, match: "re.Match[str]", stacks: Stacks, where: str) -> Heads:
    layers = list(range(len(stacks.names))) if match["stack"] is None else stacks.stack(match["stack"])
    within = "the model" if match["stack"] is None else match["stack"]
    if not layers:
        raise ConfigError(f"{where} {spec!r}: no stack is called {match['stack']!r}; known: {', '.join(stacks.stacks)}")
    first, last = _range(match["layers"])
    if last < first or last >= len(layers):
        raise ConfigError(f"{where} {spec!r}: {within} has attention layers 0 to {len(layers) - 1}; stay in that range")
    heads = tuple(range(stacks.heads))
    if match["heads"] is not None:
        least, most = _range(match["heads"])
        if most < least or most >= stacks.heads:
            raise ConfigError(
                f"{where} {spec!r}: each of the {len(layers)} attention layers of {within} has heads 0 to "
                f"{stacks.heads - 1}; stay in that range"
            )
        heads = tuple(range(least, most + 1))
    return dict.fromkeys(layers[first : last + 1], heads)


def _range(text: str) -> tuple[int, int]:
    first, _, last = re.sub("[LH]", "", text).partition("-")
    return int(first), int(last or first)


def read_file(path: Path, where: str) -> tuple[str, ...]:
    """Return the specs in a JSON file, a list or one under ``heads``; raise `ConfigError` if it holds none."""
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise ConfigError(f"{where} can't read {path}: {error.strerror}; give an existing file") from None
    except ValueError as error:
        raise ConfigError(f'{where}: {path} is not valid JSON ({error}); write a list such as ["L3H1"]') from None
    specs = content.get("heads") if isinstance(content, dict) else content
    if not isinstance(specs, list) or not all(isinstance(spec, str) and not spec.endswith(".json") for spec in specs):
        raise ConfigError(f'{where}: {path} must hold a list such as ["L3H1"], alone or under "heads"; got {specs!r}')
    return tuple(specs)
