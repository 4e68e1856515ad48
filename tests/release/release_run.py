"""Builds the distributions from what is committed, and tries them as a stranger gets them: ``make release-check``.

The steps, each of which ends the run with one sentence if it finds something:
1. nothing is uncommitted, the three distributions, CITATION.cff and CHANGELOG.md agree on the version and its date;
2. source distributions and wheels are built from an export of the commit, wheels from the source distributions; on
   Linux on x86-64 one more, of the kernels with their compiled loop;
3. ``twine check --strict`` reads their metadata;
4. a fresh environment installs dit-accel from an index on this disk, which holds these files alone, and what else it
   takes from the usual index; without dit-accel-assets it must attach, and say what to install for embedded models;
5. with dit-accel-assets it must make a clip by the command line and by Python, in an empty folder.

It uploads nothing; at the end it prints what would be uploaded, with hashes, and the command.

    make dist                                        # step 2 alone, into dist/
    make release-check                               # all steps
    make release-check ARGS="--python python3.13"    # with another Python in the fresh environment
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from email import message_from_bytes
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
PROJECTS = {"dit-accel-kernels": "kernels", "dit-accel-assets": "assets", "dit-accel": "."}
"""Distribution -> its folder, in the order in which they are uploaded: none before what it needs."""

told = partial(print, flush=True)
PROMPT = "a red circle moving right on a navy background"


class Refused(Exception):  # noqa: N818 - reads as what it is
    """Why nothing can be released as things are."""


def main(words: Sequence[str] | None = None) -> None:
    """Run the steps; what they find goes to stderr, with exit code 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of what is built; emptied first")
    parser.add_argument("--build", action="store_true", help="build alone, whatever the tree's state")
    parser.add_argument("--no-isolation", action="store_true", help="build with this environment's setuptools")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the fresh environment")
    options = parser.parse_args(words)
    try:
        if not options.build:
            check_tree(ROOT)
        files = build(ROOT, options.out, isolated=not options.no_isolation)
        version = check_versions(files)
        if options.build:
            told(f"built {', '.join(path.name for path in files)}")
            return
        check_texts(ROOT, version)
        run("twine check", sys.executable, "-m", "twine", "check", "--strict", *files)
        with tempfile.TemporaryDirectory(prefix="dit-accel-release-") as folder:
            try_out(files, version, Path(folder), options.python)
        tell_upload(files, version)
    except Refused as error:
        sys.exit(f"error: {error}")


def check_tree(root: Path) -> None:
    """Refuse a tree in which something is not committed."""
    changed = git(root, "status", "--porcelain").splitlines()
    if changed:
        raise Refused(f"{len(changed)} paths are not committed, such as {changed[0][3:]}; commit or remove them")


def check_texts(root: Path, version: str) -> None:
    """Refuse a version without a dated entry in CHANGELOG.md, or another one in CITATION.cff."""
    changes = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    entry = re.search(rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)\n+(.*?)(?=^## |\Z)", changes, re.M | re.S)
    if entry is None or not entry[2].strip():
        raise Refused(f"CHANGELOG.md says nothing of {version}; add `## [{version}] - YYYY-MM-DD` and what changed")
    cited = dict(re.findall(r"^(version|date-released): [\"']?([^\"'\n]+)", (root / "CITATION.cff").read_text(), re.M))
    found = {"version": version, "date-released": entry[1]}
    if cited != found:
        raise Refused(f"CITATION.cff says {cited}, CHANGELOG.md and kernels/VERSION say {found}; make them agree")


def build(root: Path, out: Path, *, isolated: bool) -> list[Path]:
    """Build the commit's distributions, and return their files in the order of upload, source distributions last."""
    for old in (*out.glob("dit_accel*.whl"), *out.glob("dit_accel*.tar.gz")):
        old.unlink()
    with tempfile.TemporaryDirectory(prefix="dit-accel-tree-") as folder:
        export = Path(folder) / "tree.tar"
        git(root, "archive", "--output", str(export), "HEAD")
        with tarfile.open(export) as archive:
            archive.extractall(Path(folder) / "tree", filter="data")
        for name, place in PROJECTS.items():
            more = () if isolated else ("--no-isolation",)
            run(f"build of {name}", sys.executable, "-m", "build", *more, "-o", out, Path(folder) / "tree" / place)
        loop = "dit-accel-kernels" if (sys.platform, platform.machine()) == ("linux", "x86_64") else None
        if loop:
            words = (sys.executable, "-m", "build", "--wheel", *more, "-o", out, Path(folder) / "tree" / PROJECTS[loop])
            run("build of the compiled loop", "env", "DIT_ACCEL_SHIP_LOOP=1", *words)
    kinds = [(name, kind) for kind in ("-py3-none-any.whl", ".tar.gz") for name in PROJECTS]
    kinds[1:1] = [(loop, "-py3-none-manylinux*_x86_64.whl")] if loop else []
    return [only(out, f"{name.replace('-', '_')}-[0-9]*{kind}") for name, kind in kinds]


def only(folder: Path, pattern: str) -> Path:
    """Return the one file of a pattern."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise Refused(f"{folder} holds {len(found)} files {pattern}, one was to be built")
    return found[0]


def check_versions(files: Sequence[Path]) -> str:
    """Return the version of all files; refuses files of several, and needs of each other that they do not meet."""
    metadata = {path: read_metadata(path) for path in files}
    versions = {str(found["Version"]) for found in metadata.values()}
    if len(versions) != 1:
        listed = ", ".join(f"{path.name} {found['Version']}" for path, found in metadata.items())
        raise Refused(f"the distributions have several versions: {listed}; kernels/VERSION is the place of all")
    (version,) = versions
    for path, found in metadata.items():
        for need in found.get_all("Requires-Dist") or ():
            other = re.match(r"dit-accel-(?:kernels|assets)(?!\[)\s*([^;\s]*)", need)
            if other and other[1] != f"~={version}":
                raise Refused(f"{path.name} needs {need!r}; pyproject.toml must say ~={version}")
    return version


def read_metadata(path: Path):
    """Return the metadata of a wheel or a source distribution."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
            return message_from_bytes(wheel.read(name))
    with tarfile.open(path) as archive:
        file = archive.extractfile(f"{path.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert file is not None
        return message_from_bytes(file.read())


def write_index(files: Sequence[Path], folder: Path) -> str:
    """Write a simple index (PEP 503) of the files, and return its URL."""
    for name in PROJECTS:
        page = folder / name
        page.mkdir(parents=True)
        own = [path for path in files if re.match(rf"{name.replace('-', '_')}-\d", path.name)]
        for path in own:
            shutil.copy(path, page)
        links = "".join(f'<a href="{path.name}#sha256={digest(path)}">{path.name}</a>\n' for path in own)
        (page / "index.html").write_text(f"<!DOCTYPE html><html><body>\n{links}</body></html>\n", encoding="utf-8")
    return folder.resolve().as_uri()


def try_out(files: Sequence[Path], version: str, folder: Path, python: str) -> None:
    """Install the files into a fresh environment and use them from an empty folder, without and with the assets."""
    index, place = write_index(files, folder / "index"), folder / "empty"
    place.mkdir()
    run("fresh environment", python, "-m", "venv", folder / "venv")
    inside = folder / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    pip = (inside / "python", "-m", "pip", "--disable-pip-version-check")
    ours = ("install", "--quiet", "--no-deps", "-i", index)
    run("install from the local index", *pip, *ours, f"dit-accel=={version}", f"dit-accel-kernels=={version}")
    run("install of what it needs", *pip, "install", "--quiet", f"dit-accel=={version}")
    run("dit-accel --help", inside / "dit-accel", "--help", at=place)
    run("attach without the assets", inside / "python", SMOKE, "attach", version, at=place)
    refused = ask(inside / "dit-accel", "generate", PROMPT, "-o", "out.mp4", at=place)
    if refused.returncode != 2 or "pip install ./assets" not in refused.stderr:
        raise Refused(f"generate without the assets exits {refused.returncode}, and says: {refused.stderr.strip()}")
    run("install of the assets", *pip, *ours, f"dit-accel-assets=={version}")
    run("needs of all", *pip, "check")
    run("first clip", inside / "dit-accel", "generate", PROMPT, "-o", "out.mp4", at=place)
    if (made := json.loads((place / "out.mp4.json").read_text())["versions"].get("dit-accel")) != version:
        raise Refused(f"the side-car of out.mp4 says dit-accel {made}, not {version}")
    run("load and attach", inside / "python", SMOKE, "load", version, at=place)


def tell_upload(files: Sequence[Path], version: str) -> None:
    """Print what would be uploaded."""
    told(f"\n{version} can be released. Files, in the order of upload:")
    for path in files:
        told(f"{path.stat().st_size:>12,} bytes  sha256 {digest(path)}  {path.name}")
    told(f"python -m twine upload {' '.join(str(path) for path in files)}")


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def git(root: Path, *words: str) -> str:
    """Return what a git command prints."""
    found = ask("git", "-C", root, *words)
    if found.returncode:
        raise Refused(f"git {words[0]} fails in {root}: {found.stderr.strip()}")
    return found.stdout


def ask(*command: str | Path, at: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, away from this checkout's packages."""
    cleared = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run([str(word) for word in command], cwd=at, env=cleared, capture_output=True, text=True)


def run(what: str, *command: str | Path, at: Path | None = None) -> None:
    """Run a command that must succeed, and tell how long it took."""
    begin = time.monotonic()
    ended = ask(*command, at=at)
    if ended.returncode:
        raise Refused(f"{what} fails:\n{(ended.stdout + ended.stderr).strip()[-2000:]}")
    told(f"{time.monotonic() - begin:7.1f} s  {what}")


if __name__ == "__main__":
    main()
