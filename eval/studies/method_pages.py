"""What docs/methods/ has from the declarations: the options of every method's page, and the lists of its index.

`readme` writes it there, and `method_pictures` draws the pages' pictures.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dit_accel.cli.lists import attribute_docs
from dit_accel.methods.attention.sparse import SparseConfig
from dit_accel.methods.caches.cache_config import StepCacheConfig
from dit_accel.methods.config import MethodConfig, spell_type
from dit_accel.methods.registry import method, methods

FOLDER = Path("docs/methods")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "sparse": ("sol", "radial", "lite", "sparsed"),
    "correcting": ("delta",),
    "steps": ("easycache", "seacache", "magcache", "teacache", "staticcache"),
    "blocks": ("dbcache", "firstblockcache", "profilingcache", "dbprune", "dfa", "referencecache"),
    "longer": ("ultravico", "lvsa", "rope", "ultraimage"),
    "guidance": ("slg", "pag", "softpag", "seg", "autoguidance", "nag", "cfgcache"),
}
"""Group of the index -> its methods; the groups have marks of these names there."""

SHARED: Mapping[str, type[MethodConfig]] = {"sparse": SparseConfig, "caches": StepCacheConfig}
"""Section of shared.md -> the base whose options stand there, once for all methods that have them."""

HEAD = ("| option | type and range | default | what it is |", "|---|---|---|---|")


def options_table(name: str) -> str:
    """Return a method's options as Markdown: a table of its own, then a line with those that others share."""
    config_type = method(name)
    section = next((section for section, base in SHARED.items() if issubclass(config_type, base)), None)
    inherited = {field.name for field in dataclasses.fields(SHARED[section])} if section else set()
    listed, shared = [], []
    for option, *cells in _rows(config_type):
        if option in inherited and option not in _described(config_type):
            shared.append(f"`{option}`" + ("" if cells[1] == "unset" else f" ({cells[1]})"))
        else:
            listed.append(_row(f"`{option}`", *cells))
    notes = [f"In Python `{config_type.__name__}(OPTION=VALUE)`, on the command line `--set {name}.OPTION=VALUE`."]
    if any("model's, else" in line for line in (*listed, *shared)):
        notes.append("*Model's*: a value that is published for your model, where there is one.")
    if section:
        notes.append(f"[Shared with others](shared.md#{section}): {', '.join(shared)}.")
    table = [*HEAD, *listed, ""] if listed else []
    return "\n".join([*table, " ".join(notes)])


def shared_table(section: str) -> str:
    """Return the options of one of `SHARED` as a table; a method's page has its defaults."""
    rows = [_row(f"`{option}`", kind, meaning) for option, kind, _, meaning in _rows(SHARED[section])]
    return "\n".join([_row("option", "type and range", "what it is"), "|---|---|---|", *rows])


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _described(config_type: type[MethodConfig]) -> list[str]:
    """Return the options that a config's own docstring describes."""
    return re.findall(r"^ {4}(\w+): ", inspect.getdoc(config_type) or "", flags=re.M)


def _rows(config_type: type[MethodConfig]) -> list[tuple[str, str, str, str]]:
    """Return (option, type, default, meaning) for each option, those first that the config itself describes."""
    meanings, hints = attribute_docs(config_type), typing.get_type_hints(config_type, include_extras=True)
    filled = config_type.recipe_options(typing.cast(Any, config_type))  # it reads what the class declares alone
    described, rows = _described(config_type), []
    for field in sorted(dataclasses.fields(config_type), key=lambda field: field.name not in described):
        if field.name not in meanings:
            raise ValueError(f"{config_type.__name__} does not describe {field.name} below Attributes:")
        kind = re.sub(r"'([^']+)'( or(?= '))?", lambda match: f"`{match[1]}`" + ("," if match[2] else ""),
                      spell_type(hints[field.name])).removesuffix(" or unset")  # fmt: skip
        default = _spell(field.default)
        if field.default is None and field.name in filled:
            default = f"model's, else {_spell(config_type.defaults.get(field.name))}"
        rows.append((field.name, kind, default, re.sub(r"``?([^`]+)``?", r"`\1`", meanings[field.name])))
    return rows


def _spell(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != () else "none"


def group_table(group: str) -> str:
    """Return the rows of the index for one of `GROUPS`: a link, the switch and the config's first line."""
    known, listed = methods(), [name for names in GROUPS.values() for name in names]
    if sorted(listed) != sorted(known):
        raise ValueError(f"the groups of the index differ from the methods that there are: {set(listed) ^ set(known)}")
    rows = ["| method | switch | what it does |", "|---|---|---|"]
    for name in GROUPS[group]:
        summary = (inspect.getdoc(known[name]) or "").partition("\n")[0]
        rows.append(_row(f"[{known[name].__name__}]({name}.md)", f"`--{name}`", summary))
    return "\n".join(rows)


PAGES: dict[str, tuple[str, ...]] = {
    f"{FOLDER}/index.md": tuple(f"group-{group}" for group in GROUPS),
    f"{FOLDER}/shared.md": tuple(f"shared-{section}" for section in SHARED),
    **{f"{FOLDER}/{name}.md": (f"options-{name}",) for name in methods()},
}
"""Page -> its marks, as `readme.PAGES` has them."""

TABLES: Mapping[str, Callable[[Path], str]] = {
    f"{kind}-{name}": lambda root, table=table, name=name: table(name)
    for kind, table, names in (
        ("group", group_table, GROUPS), ("shared", shared_table, SHARED), ("options", options_table, methods())
    )
    for name in names
}  # fmt: skip
"""Mark -> what stands between its two halves; the project's root is not asked for anything."""
