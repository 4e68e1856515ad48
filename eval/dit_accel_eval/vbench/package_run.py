"""Measures videos by the official vbench package itself, in an environment of its own: `eval vbench --official ENV`.

The package asks for libraries of 2023, which can't lie beside a current torch and diffusers. A dimension is a process,
so that one that fails takes no other with it, and a run that was stopped goes on with the next. Scores are read from
the result files that the package writes.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel import ConfigError
from dit_accel.files import json_text, written_whole

from .official import PACKAGE
from .prompts import FLICKERING, check_custom, custom_videos, read_prompts, videos_of
from .run import check_results

DRIVER = Path(__file__).with_name("package_driver.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageRun:
    """A run of the package.

    Attributes:
        environment: folder of a virtual environment; made, and the package installed there, where it is missing.
        videos: folder of videos, called as VBench calls them.
        output: folder of the results.
        name: what result files begin with.
        custom: whether videos are of prompts of one's own.
        prompts_file: JSON {file name: prompt} of those; None: their names tell.
        full_info: VBench's prompts; None: the package's.
        filtered: whether temporal flickering's videos passed its filter.
        weights: folder of weights, laid out as VBench's cache; None: where the package itself looks.
        device: where networks run.
        tell: is given a line of progress.
        warn: is given what should be known of the scores.
    """

    environment: Path
    videos: Path
    output: Path
    name: str
    custom: bool = False
    prompts_file: Path | None = None
    full_info: Path | None = None
    filtered: bool = False
    weights: Path | None = None
    device: str = "cuda"
    tell: Callable[[str], None]
    warn: Callable[[str], None]

    @property
    def results(self) -> Path:
        """The file of all dimensions' results, laid out as the package's own."""
        return self.output / f"{self.name}_official_eval_results.json"

    def of_dimension(self, name: str) -> Path:
        """Return the package's own file of one dimension's results."""
        return self.output / f"{self.name}_official_{name}_eval_results.json"


def measure(job: PackageRun, names: Sequence[str]) -> dict[str, list[Any]]:
    """Measure dimensions by the package, and return its results: dimension -> [score, [one entry a video]].

    Raises:
        ConfigError: for an environment that can't be made or used, a folder without videos, and dimensions of which
            none could be measured, each with the last line that the package printed.
    """
    if job.custom:
        check_custom(names)
        custom_videos(job.videos, job.prompts_file, names)
    check_results(job.output, job.results)
    python, package = interpreter(job.environment, job.tell)
    full_info = (job.full_info or package / "VBench_full_info.json").resolve()
    for name in () if job.custom else names:
        if name != FLICKERING:
            videos_of(read_prompts(full_info), job.videos, name)
    newest = max(one.stat().st_mtime for one in job.videos.iterdir())
    found, failed = {}, {}
    for name in names:
        result = job.of_dimension(name)
        if result.is_file() and result.stat().st_mtime > newest:
            job.tell(f"{name}: is in {result}")
        else:
            job.tell(f"{name}: by {PACKAGE.requirement}")
            reason = _run(job, python, full_info, name)
            if reason is not None:
                failed[name] = reason
                job.warn(f"{name} is left out: {reason}")
                continue
        found[name] = _read(result, name)
    if not found:
        raise ConfigError("; ".join(f"{name} can't be measured: {reason}" for name, reason in failed.items()))
    with written_whole(job.results) as temporary:
        temporary.write_text(json_text(found) + "\n", encoding="utf-8")
    return found


def interpreter(environment: Path, tell: Callable[[str], None]) -> tuple[Path, Path]:
    """Return an environment's Python and the package's folder there; makes and installs what is missing.

    Raises:
        ConfigError: for a folder that is none, or where installing or importing the package fails, with the last line.
    """
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.is_file():
        if environment.exists() and (not environment.is_dir() or any(environment.iterdir())):
            raise ConfigError(f"{environment} is no virtual environment; name one, or a folder that can be made")
        tell(f"making the environment {environment}")
        _done([sys.executable, "-m", "venv", str(environment)], f"the environment {environment} can't be made")
    if _call([str(python), "-c", "import vbench"]).returncode:
        tell(f"installing {PACKAGE.requirement} ({PACKAGE.licence}) into {environment}, gigabytes with its torch")
        install = [str(python), "-m", "pip", "install", "--quiet", PACKAGE.requirement]
        _done(install, f"{PACKAGE.requirement} can't be installed into {environment}; install it there by hand")
    asked = "import vbench, importlib.metadata as m; print(m.version('vbench')); print(vbench.__file__)"
    version, file = _done([str(python), "-c", asked], f"vbench can't be imported in {environment}; mend it there")[-2:]
    if PACKAGE.requirement != f"vbench=={version}":
        raise ConfigError(f"{environment} has vbench {version}, and {PACKAGE.requirement} is what is run; name another")
    return python, Path(file).parent


def _run(job: PackageRun, python: Path, full_info: Path, name: str) -> str | None:
    """Measure one dimension in a process; returns why it failed, None if its results are there."""
    stem = job.of_dimension(name).name.removesuffix("_eval_results.json")
    prompts = [] if job.prompts_file is None else json.loads(job.prompts_file.read_text(encoding="utf-8"))
    kept = job.output / f"{job.name}_official_filtered"
    if filters := name == FLICKERING and not (job.filtered or job.custom):
        shutil.rmtree(kept, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="dit-accel-vbench-") as scratch:
        given = {
            "videos": str(job.videos.resolve()), "output": str(job.output.resolve()), "name": stem, "dimension": name,
            "custom": job.custom, "prompts": prompts, "full_info": str(full_info), "device": job.device,
            "local": job.weights is not None, "filter_to": str(kept.resolve()) if filters else None,
        }  # fmt: skip
        file = Path(scratch) / "given.json"
        file.write_text(json.dumps(given), encoding="utf-8")
        more = {} if job.weights is None else {"VBENCH_CACHE_DIR": str(job.weights.resolve())}
        ended = _call([str(python), str(DRIVER), str(file)], **more)
    if ended.returncode == 0 and job.of_dimension(name).is_file():
        return None
    job.of_dimension(name).unlink(missing_ok=True)
    return _last_line(ended)


def _read(path: Path, name: str) -> list[Any]:
    """Return one dimension's results as the package wrote them; a file of another form is refused."""
    try:
        score, entries = json.loads(path.read_text(encoding="utf-8"))[name]
        return [float(score), list(entries)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no result of vbench for {name} ({error}); delete it, and run again") from None


def _done(command: Sequence[str], what: str) -> list[str]:
    """Run a command, and return the lines that it printed; one that fails is refused with its last line."""
    ended = _call(command)
    if ended.returncode:
        raise ConfigError(f"{what}: {_last_line(ended)}")
    return ended.stdout.splitlines()


def _call(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command apart from this process's own packages, and return what it printed."""
    without = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(command, env=without | environment, capture_output=True, text=True, check=False)


def _last_line(ended: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (ended.stderr or ended.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"it ended with exit code {ended.returncode} and said nothing"
