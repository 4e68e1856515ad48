"""Measures videos by the official vbench package itself, in an environment of its own: `eval vbench --official ENV`.

The package asks for libraries of 2023, which can't lie beside a current torch and diffusers. A dimension is a process,
so that one that fails takes no other with it, and a run that was stopped goes on with the next.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dit_accel import ConfigError
from dit_accel.cli.console import warn

from ..metrics import weights
from ..metrics.weights import Archive, SetUp, folder
from .dimensions import DIMENSIONS, FIXED, FLICKERING, all_videos_of, check_custom, custom_videos, read_full_info
from .job import VideoJob, tell

PROMPTS = "vbench/VBench_full_info.json"

PACKAGE = Archive(
    requirement="vbench==0.1.5", file="vbench-0.1.5-py3-none-any.whl", licence="Apache-2.0",
    sha256="13266ed4715d91a7669ab58484b9e010bc91bb96e129d414fb512d4937890023", nets={}, modules=(PROMPTS,),
)  # fmt: skip

DRIVER = Path(__file__).with_name("package_driver.py")
RESULTS = "official_eval_results.json"  # the file of all dimensions' results, laid out as the package's own


def measure_officially(job: VideoJob, environment: Path) -> dict[str, list[Any]]:
    """Measure dimensions by the package of an environment, and return its results: dimension -> [score, [entries]]."""
    names = job.dimensions or tuple(name for name in DIMENSIONS if not (job.custom and name in FIXED))
    if job.custom:
        check_custom(names)
        custom_videos(job.clips, job.prompts)
    job.check_files(RESULTS)
    python, package = interpreter(environment, tell)
    full_info = (job.full_info or package / "VBench_full_info.json").resolve()
    every = [] if job.custom else read_full_info(full_info)
    for name in (name for name in names if every and name != FLICKERING):
        all_videos_of(every, job.clips, name)
    newest = max(path.stat().st_mtime for path in job.clips.iterdir())
    results, failed = {}, {}
    for name in names:
        result = job.file(f"official_{name}_eval_results.json")
        if result.is_file() and result.stat().st_mtime > newest:
            tell(f"{name}: is in {result}")
        else:
            tell(f"{name}: by {PACKAGE.requirement}")
            reason = _run(job, python, full_info, name, result)
            if reason is not None:
                failed[name] = reason
                warn(f"{name} is left out: {reason}")
                continue
        results[name] = _read(result, name)
    if not results:
        raise ConfigError("; ".join(f"{name} can't be measured: {reason}" for name, reason in failed.items()))
    job.write(RESULTS, results)
    return results


def interpreter(environment: Path, tell: Callable[[str], None]) -> tuple[Path, Path]:
    """Return an environment's Python and the package's folder there; makes and installs what is missing."""
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.is_file():
        if environment.exists() and (not environment.is_dir() or any(environment.iterdir())):
            raise ConfigError(f"{environment} is no virtual environment; name one, or a folder that can be made")
        tell(f"making the environment {environment}")
        _done([sys.executable, "-m", "venv", str(environment)], f"the environment {environment} can't be made")
    if _call([str(python), "-c", "import vbench"]).returncode:
        tell(f"installing {PACKAGE.requirement} into {environment}, gigabytes with its torch")
        install = [str(python), "-m", "pip", "install", "--quiet", PACKAGE.requirement]
        _done(install, f"{PACKAGE.requirement} can't be installed into {environment}; install it there by hand")
    probe = "import vbench, importlib.metadata as m; print(m.version('vbench')); print(vbench.__file__)"
    version, file = _done([str(python), "-c", probe], f"vbench can't be imported in {environment}; mend it there")[-2:]
    if PACKAGE.requirement != f"vbench=={version}":
        raise ConfigError(f"{environment} has vbench {version}, and {PACKAGE.requirement} is what is run; name another")
    return python, Path(file).parent


def _run(job: VideoJob, python: Path, full_info: Path, name: str, result: Path) -> str | None:
    """Measure one dimension in a process; returns why it failed, None if its results are there."""
    prompts = [] if job.prompts is None else json.loads(job.prompts.read_text(encoding="utf-8"))
    target = job.file("official_filtered")
    if filters := name == FLICKERING and not (job.filtered or job.custom):
        shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="dit-accel-vbench-") as scratch:
        request = {
            "videos": str(job.clips.resolve()), "output": str(job.output.resolve()), "dimension": name,
            "name": result.name.removesuffix("_eval_results.json"), "custom": job.custom, "prompts": prompts,
            "full_info": str(full_info), "device": job.device or "cuda", "local": job.folder is not None,
            "filter_to": str(target.resolve()) if filters else None,
        }  # fmt: skip
        file = Path(scratch) / "given.json"
        file.write_text(json.dumps(request), encoding="utf-8")
        more = {} if job.folder is None else {"VBENCH_CACHE_DIR": str(job.folder.resolve())}
        ended = _call([str(python), str(DRIVER), str(file)], **more)
    if ended.returncode == 0 and result.is_file():
        return None
    result.unlink(missing_ok=True)
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
    """Run a command without this process's own packages on its path, and return what it printed."""
    without = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(command, env=without | environment, capture_output=True, text=True, check=False)


def _last_line(ended: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (ended.stderr or ended.stdout).splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"it ended with exit code {ended.returncode} and said nothing"


def unpacked() -> Path:
    """Return where the prompts are unpacked."""
    return folder() / "vbench-package" / PROMPTS


def set_up_prompts(given: Path | None, tell: Callable[[str], None]) -> SetUp:
    """Unpack the prompts where they are missing."""
    reason = None
    if not unpacked().is_file():
        tell(f"{PACKAGE.requirement} ({PACKAGE.licence}) for its prompts")
        reason = weights.unpack(PACKAGE, given, folder() / "vbench-package")
    found = [] if reason else [f"VBench's prompts are at {unpacked()}"]
    return SetUp({"prompts": str(unpacked()), "missing": reason}, found, [reason] if reason else [])


def prompts_path(given: Path | None = None) -> Path:
    """Return the path of the official prompts: one that is given, or the unpacked one's."""
    if given is None and not unpacked().is_file():
        raise ConfigError("VBench's prompts are not here; run dit-accel eval setup --tier 2, or give --full-info FILE")
    return given or unpacked()
