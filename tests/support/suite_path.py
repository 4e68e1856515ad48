"""How long the way of a suite's job is, followed from `dit-accel eval run`: our own files, functions and names.

A small job of one arm and clip is run under a profiler. Left out are the metrics' own files, and what runs as modules
are imported. A name is what one file calls of another: a function, a method, or a class that is made; operators and
functions inside functions are none. A call climbs if the file that is called imports the one that calls.

Run as a script it prints all as JSON.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import dit_accel_eval
import grimp
from typer.testing import CliRunner

from dit_accel.cli.app import app

EVAL = str(Path(dit_accel_eval.__file__).parent)
SUITE = """
version = 2
name = "small"
model = "wan-plain"
clips = 1
metrics = ["flickering"]
call = { num_frames = 5, height = 32, width = 32 }

[[arm]]
name = "thin"
num_inference_steps = 3
sol = { block_size = 16, dense_steps = 0, beta = 0.5 }
"""

Function = tuple[str, str]
"""File below the package, and qualified name."""


def followed(folder: Path) -> list[tuple[Function | None, Function]]:
    """Return the calls of the package's functions in a job, each with who called it, in order and once each.

    Args:
        folder: takes the job's files.
    """
    calls: dict[tuple[Function | None, Function], None] = {}

    def own(code: Any) -> Function | None:
        path, name = code.co_filename, code.co_qualname
        inside = path.startswith(EVAL) and "/metrics/" not in path and "<" not in name
        return (path.removeprefix(EVAL)[1:], name) if inside else None

    def note(frame: Any, event: str, argument: Any) -> None:
        if event != "call" or (called := own(frame.f_code)) is None:
            return
        caller, above = None, frame.f_back
        while above is not None and caller is None:
            if above.f_code.co_name == "<module>" and above.f_code.co_filename.startswith(EVAL):
                return  # a module is being imported
            caller, above = own(above.f_code), above.f_back
        calls[caller, called] = None

    (folder / "small.toml").write_text(SUITE)
    given = [f"--{name}={folder / name}" for name in ("out", "cache", "frames")]
    sys.setprofile(note)
    try:
        done = CliRunner().invoke(app, ["eval", "run", str(folder / "small.toml"), *given], catch_exceptions=False)
    finally:
        sys.setprofile(None)
    assert done.exit_code == 0, done.output
    return list(calls)


def figures(calls: list[tuple[Function | None, Function]]) -> dict[str, list[str]]:
    """Return the files, functions and names of a way, and its climbs."""
    graph = grimp.build_graph("dit_accel_eval")
    module = lambda path: "dit_accel_eval." + path.removesuffix(".py").replace("/", ".")  # noqa: E731
    across = [(one, other) for one, other in calls if one and one[0] != other[0]]
    names = {(path, name.removesuffix(".__init__")) for _, (path, name) in across}
    climbs = [
        f"{one[0]} {one[1]} -> {other[0]} {other[1]}"
        for one, other in across
        if graph.chain_exists(importer=module(other[0]), imported=module(one[0]))
    ]
    return {
        "files": list(dict.fromkeys(path for _, (path, _) in calls)),
        "functions": [f"{path} {name}" for path, name in dict.fromkeys(other for _, other in calls)],
        "names": [f"{path} {name}" for path, name in sorted(names) if not name.endswith("__")],
        "climbs": climbs,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(figures(followed(Path(temporary)))))
