"""Write a repository of Hugging Face's Hub kernels: the sources that its builder takes, and the builds that users load.

`python kernels/hub/prepare.py OUT` fills the new folder OUT with build.toml, CARD.md, torch-ext/<name> and, for each
backend of build.toml, build/torch-<backend>: the package itself, since nothing in it is compiled before it runs, and
its metadata.json. A build's id, under which it is imported and which is the namespace of its ops, ends in a digest of
its files, so that two builds of different files never meet in one process.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OPS = "_ops.py"  # which the Hub's builder writes itself


def prepare(out: Path) -> list[Path]:
    """Fill the folder, which must be new or empty, and return its builds.

    Raises:
        FileExistsError: if there is something in it.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"the folder to write to must be new or empty, found {min(out.iterdir())} in it")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("build.toml", "CARD.md"):
        shutil.copy(HERE / name, out)
    config = tomllib.loads((HERE / "build.toml").read_text(encoding="utf-8"))
    name = config["general"]["name"].replace("-", "_")
    suffixes = tuple(f".{suffix}" for suffix in config["torch-noarch"]["pyext"])
    package = HERE.parent / name
    files = sorted(path.relative_to(package) for path in package.rglob("*") if path.suffix in suffixes)
    _copy(package, [file for file in files if file.name != OPS], out / "torch-ext" / name)
    return [_build(package, files, out / "build", backend, config) for backend in config["general"]["backends"]]


def _copy(package: Path, files: list[Path], to: Path) -> None:
    for file in files:
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(package / file, to / file)


def _build(package: Path, files: list[Path], root: Path, backend: str, config: dict[str, Any]) -> Path:
    """Write what users of a backend load, with its metadata as the Hub's kernel requirements name them."""
    variant, general = root / f"torch-{backend}", config["general"]
    _copy(package, files, variant)
    digests = {file.as_posix(): hashlib.sha256((variant / file).read_bytes()).digest() for file in files}
    unique = hashlib.sha256(repr(digests).encode()).hexdigest()[:12]
    archs = {"cuda": "cuda_capabilities", "rocm": "rocm_archs"}
    listed = {"archs": config["torch-noarch"][archs[backend]]} if backend in archs else {}
    metadata = {
        "id": f"_{package.name}_{backend}_{unique}",
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend, **listed},
        "digest": {
            "algorithm": "sha256",
            "files": {file: base64.b64encode(digest).decode() for file, digest in digests.items()},
        },
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return variant


def main() -> None:
    """Write the repository and name its builds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that is new or empty")
    try:
        builds = prepare(parser.parse_args().out)
    except OSError as error:
        raise SystemExit(str(error)) from None
    print("\n".join(map(str, builds)))


if __name__ == "__main__":
    main()
