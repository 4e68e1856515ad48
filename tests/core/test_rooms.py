"""The page on how it works lists every room that there is."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("dit_accel", "pipelines/dit_accel_pipelines", "eval/dit_accel_eval")


def folders(base: Path) -> set[str]:
    """Names of a folder's folders that hold Python, or pages."""
    inner = (path for path in base.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))
    return {path.name for path in inner if any(path.rglob("*.py")) or (path / "index.md").is_file()}


def test_every_room_stands_in_the_drawing():
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    words = set(re.findall(r"[\w./]+", page[page.index("## The rooms") :].partition("```")[2].partition("```")[0]))
    words = {word.strip("/.") for word in words} | {word.partition("/")[2] for word in words}
    rooms = {*folders(ROOT), *(room for package in PACKAGES for room in folders(ROOT / package)), "studies"}
    assert rooms - {"build", "dist", "site"} <= words
