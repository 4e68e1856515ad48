"""`examples/run.py` as a module, by which examples and pages run on tiny models."""

import importlib.util
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("examples_run", Path(__file__).parents[2] / "examples" / "run.py")
assert _SPEC is not None
assert _SPEC.loader is not None
run = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(run)
