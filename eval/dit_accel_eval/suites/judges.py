"""Judges: Python files beside a suite that judge each clip by itself, where no converged run can be the measure."""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel import ConfigError

from ..runs.model import ModelRun, SuiteModel
from ..runs.results import Line
from .suite import Suite


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """How clips are judged by themselves, by functions of these names in a suite's file."""

    measures: Callable[[SuiteModel, int, ModelRun], Line]  # of a clip's number and run; ``score`` is among what it says
    table: Callable[[Suite, Sequence[Line]], str]


def judge_of(suite: Suite) -> Judge:
    """Return the judge of a suite that has one."""
    path = (suite.folder / suite.judge).resolve()
    sys.path.insert(0, str(path.parent))
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:  # whatever a file of one's own raises
        raise ConfigError(f"the judge {path} can't be imported: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    if Path(module.__file__ or "").resolve() != path:
        raise ConfigError(f"the judge {path} has the name of the module {module.__file__}; rename it")
    functions: dict[str, Any] = {name: getattr(module, name, None) for name in Judge.__dataclass_fields__}
    for name, function in functions.items():
        if not callable(function):
            raise ConfigError(f"the judge {path} has no function {name}; see Judge in {__name__}")
    return Judge(**functions)
