"""The three distributions: versions, extras and texts, what their files hold, and the script that releases them."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from wan_tiny import tiny_transformer

import dit_accel
from dit_accel.adapters import versions

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "release"))

import release_run  # noqa: E402
from release_run import PROJECTS, Refused  # noqa: E402

NUMBER = (ROOT / "kernels" / "VERSION").read_text().strip()
PYTHONS = {"3.11", "3.12", "3.13", "3.14"}
ROOMS = ("dit_accel", "kernels", "pipelines", "eval", "assets", "comfyui", "docs", "examples", "tests")
EXTRAS = {"triton", "fa4", "finetune", "eval", "ui", "docs", "dev", "all"}


def project(name: str) -> dict:
    return tomllib.loads((ROOT / PROJECTS[name] / "pyproject.toml").read_text(encoding="utf-8"))


def texts() -> list[Path]:
    """Return the pages and programs that say what to install."""
    found = [*ROOT.glob("*.md"), *(path for room in ROOMS for path in (ROOT / room).rglob("*"))]
    found = [path for path in found if path.suffix in (".py", ".md", ".ipynb") and path.name != "CHANGELOG.md"]
    return [path for path in found if "install" in path.read_text(encoding="utf-8")]


def test_the_version_stands_in_one_place():
    outer, kernels = project("dit-accel"), project("dit-accel-kernels")
    assert outer["tool"]["setuptools"]["dynamic"]["version"] == {"file": "kernels/VERSION"}
    assert kernels["tool"]["setuptools"]["dynamic"]["version"] == {"file": "VERSION"}
    assert all(project(name)["project"]["dynamic"] == ["version"] for name in PROJECTS)
    assert not list((ROOT / "assets").glob("*VERSION*"))
    texts = list(outer["project"]["dependencies"])
    for extra in outer["project"]["optional-dependencies"].values():
        texts += extra
    pins = [text for text in texts if re.match(r"dit-accel-\w+(?!\[)[~=<>]", text)]
    assert {text.split("~=")[0] for text in pins} == {"dit-accel-kernels", "dit-accel-assets"}
    assert {text.split("~=")[1] for text in pins} == {NUMBER}


def test_attach_asks_for_the_versions_that_pip_does(monkeypatch):
    """Servers install without what pip asks for."""
    asked = {
        name: text for name, _, text in (one.partition(">=") for one in project("dit-accel")["project"]["dependencies"])
    }
    assert {name: asked[name] for name in versions.NEEDED} == {name: x.asked for name, x in versions.NEEDED.items()}
    least = versions.NEEDED["diffusers"].least
    assert f"{least}.0" in (ROOT / "docs" / "serving.md").read_text()
    for name, found, said in (
        ("diffusers", "0.35.2", "diffusers 0.42 .*found 0.35.2"),
        ("torch", "2.8.0+cpu", "torch 2.9 .*found 2.8.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[name], "__version__", found)
            versions.require_versions.cache_clear()
            with pytest.raises(dit_accel.ConfigError, match=said):
                dit_accel.attach(tiny_transformer(), preset="none")
    monkeypatch.setattr(sys.modules["diffusers"], "__version__", f"{least}.0")
    with pytest.warns(UserWarning, match=rf"diffusers {least}.0 .*0\.42"):
        dit_accel.attach(tiny_transformer(), preset="none").detach()
    versions.require_versions.cache_clear()


def test_the_changelog_and_the_citation_are_of_that_version():
    release_run.check_texts(ROOT, NUMBER)


@pytest.mark.parametrize("name", PROJECTS)
def test_metadata_say_which_pythons_and_which_licence(name):
    said = project(name)["project"]
    assert (said["name"], said["license"], said["requires-python"]) == (name, "Apache-2.0", ">=3.11")
    classifiers = {text.rpartition(" :: ")[2] for text in said["classifiers"] if "Python :: 3." in text}
    assert (classifiers, "Typing :: Typed" in said["classifiers"]) == (PYTHONS, True)
    folder = ROOT / PROJECTS[name]
    assert (folder / said["readme"]).is_file()
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_each_extra_brings_what_it_is_for():
    extras = project("dit-accel")["project"]["optional-dependencies"]
    assert set(extras) >= EXTRAS
    said = {name: " ".join(texts) for name, texts in extras.items()}
    for name in ("triton", "fa4", "finetune", "eval", "ui"):
        assert name in re.search(r"dit-accel\[([\w,]+)\]", said["all"])[1].split(",")
    assert "dit-accel-assets" in said["eval"]
    assert "dit-accel-assets" in said["ui"]
    assert project("dit-accel-kernels")["project"]["dependencies"] == ["torch>=2.9"]
    assert {"triton", "fa4"} <= set(project("dit-accel-kernels")["project"]["optional-dependencies"])


def test_what_is_to_be_installed_is_there():
    """No index has the distributions: pip takes folders of a checkout, or wheels of a folder that is named."""
    extras = project("dit-accel")["project"]["optional-dependencies"]
    for path in texts():
        text = path.read_text(encoding="utf-8")
        for line in re.findall(r"pip install [^`\n;)#]+", text):
            assert "--find-links" in line or not re.search(r"[ '\"]dit-accel", line), (path, line)
            folders = re.findall(r" '?\./(\w+)", line)
            assert all((ROOT / folder / "pyproject.toml").is_file() for folder in folders), (path, line)
        for named in re.findall(r"'\.\[([\w,]+)\]'|\binstall\(\"(\w+)\"\)", text):
            assert {*"".join(named).split(",")} <= {*extras, "assets"}, (path, named)


def test_agents_have_sixty_lines_and_name_what_is_there():
    text = (ROOT / "AGENTS.md").read_text()
    assert len(text.splitlines()) <= 60
    named = re.findall(r"(?<![\w/.])((?:dit_accel|pipelines|eval|assets|kernels|tests|docs)/[\w./]*\w)", text)
    assert len(named) > 12
    made_up = [name for name in named if not (ROOT / name).exists() and "NAME" not in name and "test_x" not in name]
    assert not [name for name in made_up if not list(ROOT.glob(f"{name}*"))]


BUILD = """import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def built(kind: str, at: Path, out: Path) -> Path:
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    lines = subprocess.run(command, cwd=at, capture_output=True, text=True, check=True).stdout.splitlines()
    return out / lines[-1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Distribution -> its wheel, built from its source distribution, and that one, of the tree as it is."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("builds take setuptools 77 or newer, which this environment lacks")
    place = tmp_path_factory.mktemp("distributions")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists() and not name.startswith(("tests/", "docs/")):
            (place / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / "tree" / name)
    made = {}
    for name, folder in PROJECTS.items():
        source = built("build_sdist", place / "tree" / folder, place)
        with tarfile.open(source) as archive:
            archive.extractall(place / name, filter="data")
        (unpacked,) = (place / name).iterdir()
        made[name] = built("build_wheel", unpacked, place), source
    return made


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return set(opened.namelist())


@pytest.mark.slow
def test_each_wheel_holds_what_is_its_own(files):
    packages = {
        "dit-accel-kernels": {"dit_accel_kernels"},
        "dit-accel-assets": {"dit_accel_assets"},
        "dit-accel": {"dit_accel", "dit_accel_eval", "dit_accel_pipelines"},
    }
    for name, (wheel, _) in files.items():
        found, info = members(wheel), f"{name.replace('-', '_')}-{NUMBER}.dist-info"
        assert {path.split("/")[0] for path in found} == packages[name] | {info}
        assert {f"{package}/py.typed" for package in packages[name]} | {f"{info}/licenses/LICENSE"} <= found
        for package in packages[name]:
            folder = next(path for path in (ROOT, *(ROOT / one for one in PROJECTS.values()), ROOT / "pipelines",
                                            ROOT / "eval") if (path / package).is_dir()) / package  # fmt: skip
            kept = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
            assert {f"{package}/{path.relative_to(folder).as_posix()}" for path in kept} <= found


@pytest.mark.slow
def test_the_weights_are_in_the_assets_alone(files):
    heavy = {name: [path for path in members(wheel) if path.endswith((".safetensors", ".npz"))]
             for name, (wheel, _) in files.items()}  # fmt: skip
    kept = [path for kind in ("*.safetensors", "*.npz") for path in (ROOT / "assets" / "dit_accel_assets").rglob(kind)]
    assert len(heavy.pop("dit-accel-assets")) == len(kept) > 10
    assert heavy == {"dit-accel-kernels": [], "dit-accel": []}
    sizes = {name: wheel.stat().st_size / 1e6 for name, (wheel, _) in files.items()}
    assert sizes["dit-accel"] + sizes["dit-accel-kernels"] < 2 < 20 < sizes["dit-accel-assets"] < 40


@pytest.mark.slow
def test_metadata_as_an_index_shows_them(files):
    paths = [path for pair in files.values() for path in pair]
    assert release_run.check_versions(paths) == NUMBER
    for name, (wheel, source) in files.items():
        for path in (wheel, source):
            found = release_run.read_metadata(path)
            assert (found["Name"], found["Version"], found["License-Expression"]) == (name, NUMBER, "Apache-2.0")
            assert found["Description-Content-Type"] == "text/markdown"
            assert len(str(found.get_payload())) > 1000
    said = release_run.read_metadata(files["dit-accel"][0])
    assert set(said.get_all("Provides-Extra")) >= EXTRAS
    assert f"dit-accel-kernels~={NUMBER}" in said.get_all("Requires-Dist")
    assert not [need for need in said.get_all("Requires-Dist") if "assets" in need and "extra ==" not in need]


@pytest.mark.slow
def test_entry_points_lead_to_what_the_wheel_holds(files):
    wheel = files["dit-accel"][0]
    with zipfile.ZipFile(wheel) as opened:
        text = opened.read(f"dit_accel-{NUMBER}.dist-info/entry_points.txt").decode()
    targets = re.findall(r"^[\w-]+ = ([\w.]+):\w+$", text, re.MULTILINE)
    assert len(targets) > 25
    paths = members(wheel)
    for target in targets:
        path = target.replace(".", "/")
        assert {f"{path}.py", f"{path}/__init__.py"} & paths, target


@pytest.mark.slow
def test_the_source_distribution_holds_the_project_s_texts(files):
    with tarfile.open(files["dit-accel"][1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    texts = {"AGENTS.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"}
    assert texts | {"kernels/VERSION"} <= names


@pytest.mark.slow
def test_the_unpacked_wheels_run_from_an_empty_folder(files, tmp_path):
    for wheel, _ in files.values():
        with zipfile.ZipFile(wheel) as opened:
            opened.extractall(tmp_path / "site-packages")
    (tmp_path / "empty").mkdir()
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "site-packages"), "HOME": str(tmp_path)}
    smoke = ROOT / "tests" / "release" / "smoke.py"
    command = [sys.executable, str(smoke), "attach", NUMBER]
    found = subprocess.run(command, env=env, cwd=tmp_path / "empty", capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")


def metadata(**said: str) -> bytes:
    return "".join(f"{name.replace('_', '-')}: {value}\n" for name, value in said.items()).encode()


def fake(folder: Path, name: str, number: str, **said: str) -> Path:
    wheel = folder / f"{name}-{number}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr(f"{name}-{number}.dist-info/METADATA", metadata(Name=name, Version=number, **said))
    return wheel


def test_disagreeing_versions_are_refused(tmp_path):
    same = [fake(tmp_path, name.replace("-", "_"), "1.2.0") for name in PROJECTS]
    assert release_run.check_versions(same) == "1.2.0"
    with pytest.raises(Refused, match=r"dit_accel_assets-1\.3\.0-.* 1\.3\.0"):
        release_run.check_versions([*same, fake(tmp_path, "dit_accel_assets", "1.3.0")])
    old = fake(tmp_path, "dit_accel", "1.2.0", Requires_Dist="dit-accel-kernels~=1.1.0")
    with pytest.raises(Refused, match=r"'dit-accel-kernels~=1\.1\.0'.*~=1\.2\.0"):
        release_run.check_versions([old])


@pytest.mark.parametrize(
    ("changes", "cited", "said"),
    [
        ("## [1.2.0] - 2026-12-01\n\nNew.\n", ("1.2.0", "2026-12-01"), None),
        ("## [1.1.0] - 2026-12-01\n\nNew.\n", ("1.2.0", "2026-12-01"), r"1\.2\.0"),
        ("## [1.2.0]\n\nNew.\n", ("1.2.0", "2026-12-01"), "YYYY-MM-DD"),
        ("## [1.2.0] - 2026-12-01\n\n## [1.1.0] - 2026-11-01\n\nOld.\n", ("1.2.0", "2026-12-01"), r"1\.2\.0"),
        ("## [1.2.0] - 2026-12-01\n\nNew.\n", ("1.1.0", "2026-12-01"), r"CITATION.*1\.1\.0"),
        ("## [1.2.0] - 2026-12-01\n\nNew.\n", ("1.2.0", "2026-11-01"), r"CITATION.*2026-11-01"),
    ],
)
def test_a_version_without_its_texts_is_refused(tmp_path, changes, cited, said):
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## [Unreleased]\n\n{changes}")
    (tmp_path / "CITATION.cff").write_text(f"cff-version: 1.2.0\nversion: {cited[0]}\ndate-released: {cited[1]}\n")
    if said is None:
        release_run.check_texts(tmp_path, "1.2.0")
        return
    with pytest.raises(Refused, match=said):
        release_run.check_texts(tmp_path, "1.2.0")


def test_a_tree_with_changes_is_refused(tmp_path, monkeypatch, capsys):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    release_run.check_tree(tmp_path)
    (tmp_path / "new.txt").touch()
    with pytest.raises(Refused, match=r"new\.txt"):
        release_run.check_tree(tmp_path)
    monkeypatch.setattr(release_run, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*new\.txt"):
        release_run.main([])


def test_the_index_holds_each_distribution_s_own_files(tmp_path):
    wheels = [fake(tmp_path, name.replace("-", "_"), "1.2.0") for name in PROJECTS]
    url = release_run.write_index(wheels, tmp_path / "index")
    assert url.startswith("file://")
    for name, wheel in zip(PROJECTS, wheels, strict=True):
        page = (tmp_path / "index" / name / "index.html").read_text()
        assert re.findall(r'href="([^"#]+)#sha256=(\w+)"', page) == [(wheel.name, release_run.digest(wheel))]
        assert (tmp_path / "index" / name / wheel.name).read_bytes() == wheel.read_bytes()


def test_a_step_that_fails_ends_the_release_with_what_it_said():
    with pytest.raises(Refused, match=r"(?s)twine.*:.*'dit_accel\.whl'"):
        release_run.run("twine check", sys.executable, "-c", "raise SystemExit(repr('dit_accel.whl'))")
