"""Runs diffusers' own test suite with dit-accel attached to every model that its tests build: ``make test-diffusers``.

They come from a sparse, shallow clone of diffusers at the installed version's tag in ``.diffusers/``, or from the
checkout that ``DIFFUSERS_TESTS`` names; where neither can be had, the run is skipped. They are run four times on the
CPU, without the hub: plain; neutral, with no method attached, where each forward must equal a plain one in every bit;
keep-all, with LiteAttention that plans every call and drops no tile, where forwards in float32 must agree with plain
ones but for rounding; and active, with SolAttention, which changes what attention calls give.

Attaching and detaching a model that was just built must leave each of its attributes the object that it was; after
each test nothing of ours may be left in a model. Beyond that a test must end attached as it ends plain, but for those
that ``expected.toml`` lists with reasons; a listed one that ends as it does plain fails the run too.

    make test-diffusers                        # the transformers' tests, all modes
    make test-diffusers ARGS="--modes neutral tests/pipelines/wan"
    make test-diffusers ARGS="-k Wan"          # all else goes to pytest; paths are the checkout's

Forwards are not compared where a hook carries state from one to the next (diffusers' caches), and in tests that compile
models. What upstream's tests need beyond ours is not installed (torchvision for Cosmos): such tests fail plain as well,
which says nothing of us, and the run lists them. A log and the outcomes of each mode lie in ``.diffusers/``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from upstream_judge import MODES, problems, read_expected

HERE = Path(__file__).parent
WORK = HERE.parents[1] / ".diffusers"
REPOSITORY = "https://github.com/huggingface/diffusers"
DEFAULT = ["tests/models/transformers"]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DIFFUSERS_TEST_DEVICE": "cpu"}
"""The list of expected differences holds for these; whoever sets another value must do without it."""


def checkout(work: Path, repository: str, release: str) -> Path | str:
    """Return the root of the checkout whose tests to run, cloned into `work` if need be, or why there is none.

    Raises ValueError if ``DIFFUSERS_TESTS`` names no checkout, or diffusers' installed `release` has no tag.
    """
    if given := os.environ.get("DIFFUSERS_TESTS"):
        path = Path(given).expanduser().resolve()
        if not (path / "tests" / "models").is_dir():
            raise ValueError(f"DIFFUSERS_TESTS = {given!r} holds no tests/models; name a checkout of diffusers")
        return path
    tag, target = f"v{release}", work / f"v{release}"
    if target.is_dir():
        return target
    part = work / f"{tag}.part"
    shutil.rmtree(part, ignore_errors=True)
    work.mkdir(exist_ok=True)
    clone = ["git", "clone", "--quiet", "--depth=1", "--filter=blob:none", "--sparse", f"--branch={tag}"]
    try:
        for command in ([*clone, repository, str(part)], ["git", "-C", str(part), "sparse-checkout", "set", "tests"]):
            environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
            subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    except FileNotFoundError:
        return "git is not installed; set DIFFUSERS_TESTS to a checkout of diffusers"
    except subprocess.CalledProcessError as error:
        shutil.rmtree(part, ignore_errors=True)
        said = (error.stderr.strip().splitlines() or [f"git ended with {error.returncode}"])[-1]
        if "not found in upstream" in said:
            raise ValueError(
                f"diffusers {release} is installed, {repository} has no tag {tag}; set DIFFUSERS_TESTS to its checkout"
            ) from error
        return f"diffusers' tests can't be cloned ({said}); set DIFFUSERS_TESTS to a checkout of diffusers"
    part.rename(target)
    return target


def run_tests(mode: str, root: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the tests in one mode, in a process of its own, and return what the plugin wrote down."""
    WORK.mkdir(exist_ok=True)
    out, log = WORK / f"{mode}.json", WORK / f"{mode}.log"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", mode, str(out), str(root), *arguments]
    with log.open("w") as stream:
        done = subprocess.run(command, cwd=root, stdout=stream, stderr=stream, env={**ENVIRONMENT, **os.environ})
    if done.returncode not in (0, 1) or not out.exists():  # 1: tests failed, which is to be judged
        raise RuntimeError(f"{mode}: pytest ended with {done.returncode}; see {log}")
    return json.loads(out.read_text())


def work_off(mode: str, out: str, root: str, arguments: Sequence[str]) -> int:
    """Run pytest in this process with the plugin; what the four runs are made of."""
    import pytest
    import torch
    from upstream_plugin import UpstreamPlugin  # imports the installed diffusers before the checkout's can be found

    torch.set_num_threads(1)
    options = ["-c", os.devnull, "--rootdir", root, "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short"]
    options += ["--continue-on-collection-errors", "--disable-warnings"]
    return int(pytest.main([*options, *arguments], plugins=[UpstreamPlugin(mode, Path(out))]))


def summary(mode: str, run: Mapping[str, Any]) -> str:
    """Return one line about a run."""
    outcomes = [outcome for outcome, _ in run["tests"].values()]
    parts = [f"{outcomes.count(name)} {name}" for name in sorted(set(outcomes))]
    counts = [f"{count} {name}" for name, count in run["counts"].items()]
    if run["built"]:
        counts.append(f"{len(run['built'])} classes")
    return f"{mode}: {len(outcomes)} tests: {', '.join([*parts, *counts])}"


def untold(plain: Mapping[str, Any]) -> list[str]:
    """Return what tells little, since it fails without us too: files that can't be imported, tests by their reason."""
    lines = [f"  not run: {file}: {why}" for file, why in plain["not_collected"].items()]
    fails = [message for outcome, message in plain["tests"].values() if outcome in ("failed", "error")]
    reasons = Counter((message.strip().splitlines() or ["no message"])[-1][:160] for message in fails)
    return [*lines, *(f"  fail plain: {count} tests: {why}" for why, count in reasons.most_common())]


def main(arguments: Sequence[str]) -> int:
    """Run the modes and print what is wrong; 0 if nothing is, or the tests are not to be had."""
    if arguments[:1] == ["--worker"]:
        return work_off(*arguments[1:4], arguments[4:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated; default: %(default)s")
    options, given = parser.parse_known_args(arguments)
    modes = options.modes.split(",")
    if unknown := set(modes) - {*MODES}:
        parser.error(f"no mode is called {', '.join(sorted(unknown))}; known: {', '.join(MODES)}")
    try:
        expected = read_expected(HERE / "expected.toml")
        root = checkout(WORK, REPOSITORY, version("diffusers"))
    except ValueError as error:
        parser.error(str(error))
    if isinstance(root, str):
        print(f"skipped: {root}")
        return 0
    named = any((root / argument.partition("::")[0]).exists() for argument in given)
    picked = given if named else [*DEFAULT, *given]
    found: list[str] = []
    plain = run_tests("plain", root, picked)
    print(summary("plain", plain), flush=True)
    for line in untold(plain):
        print(line, flush=True)
    for mode in modes:
        attached = run_tests(mode, root, picked)
        print(summary(mode, attached), flush=True)
        found += problems(mode, plain, attached, expected, whole=not given)
    print("\n".join(found) or "every test ends as it should")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
