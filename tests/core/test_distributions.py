"""The distributions: one version, what each asks for and holds, what a release is refused for; no assets."""

import platform
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
from typer.testing import CliRunner
from wan_tiny import denoise, tiny_transformer

import dit_accel
from dit_accel.adapters import versions
from dit_accel.adapters.embedded import assets, embedded_names
from dit_accel.adapters.model_files import model_source
from dit_accel.cli.app import app
from dit_accel.errors import ConfigError, install

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "release"))

import release_run  # noqa: E402
from release_run import PROJECTS, Refused  # noqa: E402

NUMBER = (ROOT / "kernels" / "VERSION").read_text().strip()
PYTHONS = {"3.11", "3.12", "3.13", "3.14"}
ROOMS = ("dit_accel", "kernels", "pipelines", "eval", "assets", "comfyui", "docs", "examples", "tests")
PARSED = {
    name: tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))
    for name, folder in PROJECTS.items()
}
NEEDS = PARSED["dit-accel"]["project"]["dependencies"]
EXTRAS = PARSED["dit-accel"]["project"]["optional-dependencies"]


def test_the_version_stands_in_one_place():
    for name, file in (("dit-accel", "kernels/VERSION"), ("dit-accel-kernels", "VERSION")):
        assert PARSED[name]["tool"]["setuptools"]["dynamic"]["version"] == {"file": file}
    assert all(parsed["project"]["dynamic"] == ["version"] for parsed in PARSED.values())
    assert not list((ROOT / "assets").glob("*VERSION*"))
    pins = [text for text in sum(EXTRAS.values(), NEEDS) if re.match(r"dit-accel-\w+(?!\[)[~=<>]", text)]
    assert {*pins} == {f"dit-accel-kernels~={NUMBER}", f"dit-accel-assets~={NUMBER}"}
    release_run.check_texts(ROOT, NUMBER)


def test_attach_asks_for_the_versions_that_pip_does(monkeypatch):
    """Servers install without what pip asks for."""
    asked = dict(text.split(">=") for text in NEEDS if ">=" in text)
    assert {name: asked[name] for name in versions.NEEDED} == {name: x.asked for name, x in versions.NEEDED.items()}
    least = versions.NEEDED["diffusers"].least
    assert f"{least}.0" in (ROOT / "docs" / "serving.md").read_text()
    for name, installed, message in (
        ("diffusers", "0.35.2", "diffusers 0.42 .*found 0.35.2"),
        ("torch", "2.8.0+cpu", "torch 2.9 .*found 2.8.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[name], "__version__", installed)
            versions.require_versions.cache_clear()
            with pytest.raises(dit_accel.ConfigError, match=message):
                dit_accel.attach(tiny_transformer(), preset="none")
    monkeypatch.setattr(sys.modules["diffusers"], "__version__", f"{least}.0")
    with pytest.warns(UserWarning, match=rf"diffusers {least}.0 .*0\.42"):
        dit_accel.attach(tiny_transformer(), preset="none").detach()
    versions.require_versions.cache_clear()


@pytest.mark.parametrize("name", PROJECTS)
def test_metadata_say_which_pythons_and_which_licence(name):
    project, folder = PARSED[name]["project"], ROOT / PROJECTS[name]
    assert (project["name"], project["license"], project["requires-python"]) == (name, "Apache-2.0", ">=3.11")
    classifiers = {text.rpartition(" :: ")[2] for text in project["classifiers"] if "Python :: 3." in text}
    assert (classifiers, "Typing :: Typed" in project["classifiers"]) == (PYTHONS, True)
    assert (folder / project["readme"]).is_file()
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_each_extra_brings_what_it_is_for_and_no_module_imports_the_assets_as_it_is_loaded():
    texts = {name: " ".join(needs) for name, needs in EXTRAS.items()}
    assert {"triton", "fa4", "finetune", "eval", "ui"} <= {*re.search(r"accel\[([\w,]+)\]", texts["all"])[1].split(",")}
    assert all("dit-accel-assets" in texts[name] for name in ("eval", "ui"))
    kernels = PARSED["dit-accel-kernels"]["project"]
    assert kernels["dependencies"] == ["torch>=2.9"]
    assert {"triton", "fa4"} <= set(kernels["optional-dependencies"])
    for room in ("dit_accel", "pipelines/dit_accel_pipelines", "eval/dit_accel_eval"):
        for path in (ROOT / room).rglob("*.py"):
            assert not re.search(r"^(from|import) dit_accel_assets", path.read_text(), re.MULTILINE), path


def test_what_is_to_be_installed_is_there():
    """No index has the distributions: pip takes folders of a checkout, or wheels of a folder that is named."""
    paths = [*ROOT.glob("*.md"), *(path for room in ROOMS for path in (ROOT / room).rglob("*"))]
    for path in paths:
        if path.suffix not in (".py", ".md", ".ipynb") or path.name == "CHANGELOG.md":
            continue
        text = path.read_text(encoding="utf-8")
        for line in re.findall(r"pip install [^`\n;)#]+", text):
            assert "--find-links" in line or not re.search(r"[ '\"]dit-accel", line), (path, line)
            folders = re.findall(r" '?\./(\w+)", line)
            assert all((ROOT / folder / "pyproject.toml").is_file() for folder in folders), (path, line)
        for named in re.findall(r"'\.\[([\w,]+)\]'|\binstall\(\"(\w+)\"\)", text):
            assert {*"".join(named).split(",")} <= {*EXTRAS, "assets"}, (path, named)


def test_agents_have_sixty_lines_and_name_what_is_there():
    text = (ROOT / "AGENTS.md").read_text()
    assert len(text.splitlines()) <= 60
    named = re.findall(r"(?<![\w/.])((?:dit_accel|pipelines|eval|assets|kernels|tests|docs)/[\w./]*\w)", text)
    assert len(named) > 12
    assert not [name for name in named if "NAME" not in name and "test_x" not in name and not [*ROOT.glob(f"{name}*")]]


BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


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
def test_each_wheel_holds_what_is_its_own_and_the_weights_are_in_the_assets_alone(files):
    packages = {
        "dit-accel-kernels": ("kernels/dit_accel_kernels",),
        "dit-accel-assets": ("assets/dit_accel_assets",),
        "dit-accel": ("dit_accel", "eval/dit_accel_eval", "pipelines/dit_accel_pipelines"),
    }
    for name, (wheel, _) in files.items():
        paths, info = members(wheel), f"{name.replace('-', '_')}-{NUMBER}.dist-info"
        assert {path.split("/")[0] for path in paths} == {*(Path(one).name for one in packages[name]), info}
        assert f"{info}/licenses/LICENSE" in paths
        for folder in map(ROOT.joinpath, packages[name]):
            kept = {path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}
            assert folder / "py.typed" in kept
            assert {path.relative_to(folder.parent).as_posix() for path in kept} <= paths
        weights = [path for path in paths if path.endswith((".safetensors", ".npz"))]
        assert (len(weights) > 10) if name == "dit-accel-assets" else not weights
    with zipfile.ZipFile(files["dit-accel"][0]) as opened:
        text = opened.read(f"dit_accel-{NUMBER}.dist-info/entry_points.txt").decode()
        paths = [path.partition(".")[0].removesuffix("/__init__") for path in opened.namelist()]
    targets = re.findall(r"^[\w-]+ = ([\w.]+):\w+$", text, re.MULTILINE)
    assert {path.replace(".", "/") for path in targets} <= {*paths}
    assert len(targets) > 25
    sizes = {name: wheel.stat().st_size / 1e6 for name, (wheel, _) in files.items()}
    assert sizes["dit-accel"] + sizes["dit-accel-kernels"] < 2 < 20 < sizes["dit-accel-assets"] < 42


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is here to build the loop")
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="the loop is built for Linux")
def test_the_wheel_for_linux_computes_by_its_own_loop_without_a_compiler(files, tmp_path, monkeypatch):
    monkeypatch.setenv("DIT_ACCEL_SHIP_LOOP", "1")
    (folder,) = (files["dit-accel-kernels"][0].parent / "dit-accel-kernels").iterdir()
    wheel = built("build_wheel", folder, tmp_path)
    assert re.fullmatch(r".*-py3-none-manylinux_2_\d\d_x86_64\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "installed")
    lines = (
        "import torch, dit_accel_kernels as k",
        "q, tiles = torch.ones(1, 1, 9, 8), k.TileLists.full(9, 9, block_q=8, block_k=8)",
        "out = k.block_sparse_attention(q, q, q, tiles, layout='bhsd', backend='torch')",
        "print(k.torch_way(q.device, q.dtype), '|', float(out.sum()))",
    )
    env = {"PATH": "", "PYTHONPATH": str(tmp_path / "installed"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=env, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert re.fullmatch(r"loop of the package, for avx\w+ \| 72\.0", ended.stdout.strip())
    assert not (tmp_path / "cache").exists()


def fake(folder: Path, name: str, number: str, needs: str = "") -> Path:
    """Write a wheel that holds nothing but its metadata."""
    wheel = folder / f"{name}-{number}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        lines = f"Name: {name}\nVersion: {number}\n" + f"Requires-Dist: {needs}\n" * bool(needs)
        made.writestr(f"{name}-{number}.dist-info/METADATA", lines)
    return wheel


def test_disagreeing_versions_are_refused_and_the_index_holds_each_one_s_own_files(tmp_path):
    wheels = [fake(tmp_path, name.replace("-", "_"), "1.2.0") for name in PROJECTS]
    assert release_run.check_versions(wheels) == "1.2.0"
    assert release_run.write_index(wheels, tmp_path / "index").startswith("file://")
    for name, wheel in zip(PROJECTS, wheels, strict=True):
        page = (tmp_path / "index" / name / "index.html").read_text()
        assert re.findall(r'href="([^"#]+)#sha256=(\w+)"', page) == [(wheel.name, release_run.digest(wheel))]
        assert (tmp_path / "index" / name / wheel.name).read_bytes() == wheel.read_bytes()
    with pytest.raises(Refused, match=r"dit_accel_assets-1\.3\.0-.* 1\.3\.0"):
        release_run.check_versions([*wheels, fake(tmp_path, "dit_accel_assets", "1.3.0")])
    with pytest.raises(Refused, match=r"'dit-accel-kernels~=1\.1\.0'.*~=1\.2\.0"):
        release_run.check_versions([fake(tmp_path, "dit_accel", "1.2.0", "dit-accel-kernels~=1.1.0")])


def test_a_version_without_its_texts_is_refused(tmp_path):
    for changes, cited, message in (
        ("## [1.2.0] - 2026-12-01\n\nNew.\n", ("1.2.0", "2026-12-01"), None),
        ("## [1.1.0] - 2026-12-01\n\nNew.\n", ("1.2.0", "2026-12-01"), r"1\.2\.0"),
        ("## [1.2.0]\n\nNew.\n", ("1.2.0", "2026-12-01"), "YYYY-MM-DD"),
        ("## [1.2.0] - 2026-12-01\n\n## [1.1.0] - 2026-11-01\n\nOld.\n", ("1.2.0", "2026-12-01"), r"1\.2\.0"),
        ("## [1.2.0] - 2026-12-01\n\nNew.\n", ("1.1.0", "2026-12-01"), r"CITATION.*1\.1\.0"),
        ("## [1.2.0] - 2026-12-01\n\nNew.\n", ("1.2.0", "2026-11-01"), r"CITATION.*2026-11-01"),
    ):
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## [Unreleased]\n\n{changes}")
        (tmp_path / "CITATION.cff").write_text(f"cff-version: 1.2.0\nversion: {cited[0]}\ndate-released: {cited[1]}\n")
        if message is None:
            release_run.check_texts(tmp_path, "1.2.0")
        else:
            with pytest.raises(Refused, match=message):
                release_run.check_texts(tmp_path, "1.2.0")


def test_a_tree_with_changes_and_a_step_that_fails_end_the_release(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    release_run.check_tree(tmp_path)
    (tmp_path / "new.txt").touch()
    monkeypatch.setattr(release_run, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*new\.txt"):
        release_run.main([])
    with pytest.raises(Refused, match=r"(?s)twine.*:.*'dit_accel\.whl'"):
        release_run.run("twine check", sys.executable, "-c", "raise SystemExit(repr('dit_accel.whl'))")


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "dit_accel_assets", None)  # as Python keeps what can't be imported


def test_they_are_there_or_not_and_a_package_that_they_lack_is_named(monkeypatch, tmp_path):
    assert embedded_names() == assets().model_names()
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "dit_accel_assets", None)
        assert embedded_names() == ()
        with pytest.raises(ConfigError, match=install("assets")):
            assets()
    (tmp_path / "dit_accel_assets.py").write_text("import no_such_package\n")
    monkeypatch.delitem(sys.modules, "dit_accel_assets", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        embedded_names()


@pytest.mark.parametrize(
    "words",
    ["generate circle --model wan-tiny -o a.mp4", "describe", "eval compare --easycache",
     "tune pipeline --target psnr=30 -o fast.toml", "finetune clips -o lora"],
)  # fmt: skip
def test_what_takes_one_by_default_says_what_to_install(absent, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    found = CliRunner().invoke(app, words.split())
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert "'wan-tiny'" in found.stderr
    assert install("assets") in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_folders_hub_ids_and_attaching_need_none_of_them(absent, tmp_path):
    assert model_source(str(tmp_path)) == str(tmp_path)
    assert model_source("owner/name") == "owner/name"
    found = CliRunner().invoke(app, ["models"])
    assert (found.exit_code, f"embedded: none are installed; {install('assets')}" in found.stdout) == (0, True)
    transformer = tiny_transformer(num_layers=1)
    with dit_accel.attach(transformer, dit_accel.RadialAttention(dense_steps=0)) as attachment:
        denoise(transformer, 1)
        assert "radial" in str(attachment.report())
