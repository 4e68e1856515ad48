"""Strangers: registries that are open to them, and pages for authors, whose files run as a reader would run them."""

import ast
import contextlib
import importlib
import io
import json
import re
import runpy
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from dit_accel import ConfigError, UnsupportedModel
from dit_accel.adapters import Adapter, installed
from dit_accel.cli.app import app
from dit_accel.methods import registry
from dit_accel.methods.base import Handler, Phase
from dit_accel.methods.config import MethodConfig
from dit_accel.testing import check_adapter

ADAPTERS, REASONS = installed.ADAPTER_GROUP, installed.REASON_GROUP


def forget():
    for module in (installed, registry):
        module._registered.clear()
    for cached in (installed.adapters, installed.not_supported, registry.handlers):
        cached.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """Return a function that adds an entry point, which names a value or gives an object; later ones replace it."""
    real = installed.entry_points

    def add(group, given, name="us"):
        if isinstance(given, str):
            entry = EntryPoint(name, given, group)
        else:
            entry = SimpleNamespace(name=name, value=f"stranger:{given!r}", group=group, load=lambda: given)
        for module in (installed, registry):
            monkeypatch.setattr(
                module, "entry_points", lambda group: [*real(group=group), *[entry] * (entry.group == group)]
            )
        forget()

    yield add
    monkeypatch.undo()
    forget()


@pytest.fixture(autouse=True)
def unregistered():
    yield
    forget()


def adapter(name="mine", *classes, **changes):
    return Adapter(**{"name": name, "transformers": classes or ("MyTransformer",), "self_attention": (), **changes})


def test_a_stranger_adds_an_adapter_of_another_name_for_another_class(install):
    install(ADAPTERS, (adapter(),))
    assert installed.adapter_for("MyTransformer").name == "mine"
    for other, message in (
        (adapter("wan"), r"adapter 'wan'.*twice"),
        (adapter("mine", "WanTransformer3DModel"), r"WanTransformer3DModel.*'wan' and 'mine'"),
    ):
        install(ADAPTERS, (other,))
        with pytest.raises(ConfigError, match=message):
            installed.adapters()


def test_an_adapter_of_a_script_is_known_to_its_process():
    mine, again = adapter(), adapter(self_attention=("blocks.*.attn",))
    assert installed.register(mine) is installed.adapter_for("MyTransformer") is mine
    assert installed.register(again) is installed.adapter_for("MyTransformer")
    with pytest.raises(ConfigError, match=r"register.*Adapter, got 3"):
        installed.register(3)


@pytest.mark.parametrize(("name", "cls"), [("mine", "WanTransformer3DModel"), ("wan", "MyTransformer")])
def test_an_adapter_stands_in_the_place_of_an_installed_one_where_that_is_said(name, cls):
    mine = adapter(name, cls)
    with pytest.raises(ConfigError, match=rf"({cls}|{name}) is.*'wan'.*'{name}'.*override=True"):
        installed.register(mine)
    installed.register(mine, override=True)
    assert installed.adapter_for(cls) is installed.adapters()[name] is mine


WAN, RADIAL = "dit_accel_pipelines.families.wan", "dit_accel.methods.attention.radial"


def test_an_entry_point_that_gives_no_adapters_is_named(install):
    for value, message in (
        (f"{WAN}:WAN", rf"'{WAN}:WAN'.*dit_accel\.adapters.*got Adapter.*ADAPTERS = \(MY_ADAPTER,\)"),
        (f"{WAN}:__name__", "adapters, got str"),
        (f"{WAN}:NONE", r"wan:NONE'.*'NONE'"),
        ("dit_accel_nowhere:ADAPTERS", r"module named 'dit_accel_nowhere'.*adapters"),
    ):
        install(ADAPTERS, value)
        with pytest.raises(ConfigError, match=message):
            installed.adapters()


def test_a_stranger_says_why_a_class_is_not_supported(install):
    install(REASONS, {"MyTransformer": "no attention"})
    with pytest.raises(UnsupportedModel, match=r"MyTransformer is.*: no attention$"):
        installed.adapter_for("MyTransformer")
    install(REASONS, {"MyTransformer": 3})
    with pytest.raises(ConfigError, match=r"stranger:.* of dit_accel\.not_supported.*reasons, got dict"):
        installed.not_supported()


def test_unknown_names_get_the_nearest_and_a_class_is_not_guessed_at():
    rest = r" or '\S+' or '\S+'\? \d+ are known, `dit-accel models`"  # too many to name each
    for find, name, error, message in (
        (installed.adapter_for, "WanTransformer3D", UnsupportedModel, "WanTransformer3D; `dit-accel models`"),
        (installed.family, "wan2.1-14", UnsupportedModel, rf"family.*'wan2\.1-14'.*'wan2\.1-14b'{rest}"),
        (registry.method, "radail", ConfigError, r"method.*'radail'.*'radial'\?"),
    ):
        with pytest.raises(error, match=message):
            find(name)


class Mine(MethodConfig):
    """A stranger's config."""

    name = "mine"


class MyHandler(Handler):
    """A stranger's method."""

    config_type = Mine
    phase = Phase.LISTS


def test_a_stranger_adds_a_method(install):
    install(registry.METHOD_GROUP, MyHandler, "mine")
    assert registry.method("mine") is Mine
    assert registry.handler_of(Mine()) is MyHandler
    names = list(registry.handlers())
    assert names.index("mine") < names.index("sparsed")  # by phase, then by name
    phases = [handler.phase for handler in registry.handlers().values()]
    assert phases == sorted(phases)


def test_an_entry_point_that_gives_no_method_or_a_doubled_one_is_named(install):
    for name, given, message in (
        ("radial", f"{RADIAL}:RadialHandler", r"method 'radial'.*twice.*dit_accel\.methods.*:RadialHandler"),
        ("mine", f"{RADIAL}:Nothing", r"mine = '.*' of dit_accel\.methods.*'Nothing'"),
        ("mine", "dit_accel_nowhere:Mine", r"module named 'dit_accel_nowhere'.*handler"),
        ("mine", Mine, r"mine = .*handler type, got <class .*Mine'>.*dit_accel\.methods\.Handler"),
        ("mine", Handler, r"gives Handler.*config_type.*name = 'mine'"),
        ("mine", f"{RADIAL}:RadialHandler", r"gives RadialHandler.*config_type.*name = 'mine'"),
    ):
        install(registry.METHOD_GROUP, given, name)
        with pytest.raises(ConfigError, match=message):
            registry.handlers()


def test_a_method_of_a_script_is_known_to_its_process_until_a_cell_runs_again():
    with pytest.raises(ConfigError, match=r"Mine.*entry point.*dit_accel\.m"):
        registry.handler_of(Mine())
    assert registry.register(MyHandler) is registry.handler_of(Mine()) is MyHandler
    assert registry.method("mine") is Mine
    again = type("Again", (MethodConfig,), {"name": "mine"})
    registry.register(second := type("SecondHandler", (MyHandler,), {"config_type": again}))
    assert registry.handler_of(again()) is second
    with pytest.raises(ConfigError, match=r"Mine\(\).*dit_accel\.methods"):
        registry.handler_of(Mine())


def test_what_can_t_be_registered_is_refused():
    radial = type("Radial", (MethodConfig,), {"name": "radial"})
    for handler, message in (
        (type("Bare", (Handler,), {}), "Bare"),
        (type("Nameless", (Handler,), {"config_type": MethodConfig}), "Nameless"),
        (type("Mine", (Handler,), {"config_type": radial}), "'radial'.*Mine"),
        (type("Stranger", (), {"config_type": Mine}), "register.*Stranger"),
    ):
        with pytest.raises(ConfigError, match=message):
            registry.register(handler)
    assert "mine" not in registry.handlers()


ROOT = Path(__file__).resolve().parents[2]
METHOD, MODEL = "adding-a-method.md", "adding-a-model.md"
FILES = re.compile(r"^`([\w.]+\.(?:py|toml))`[^\n]*:\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROPOSED = re.compile(r"prints .*?^```\n(Adapter\(.*?)^```", re.MULTILINE | re.DOTALL)
LONGEST = {METHOD: {"window.py": 20, "stillcache.py": 25, "smoothed.py": 30}, MODEL: {"my_video.py": 15}}
"""The most lines that a file of the pages may have, imports, docstrings and blank lines counted."""


def text_of(page):
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Return a function that writes a page's files to the folder where it stands, and installs them."""

    def write(page, install=True):
        files = dict(FILES.findall(text_of(page)))
        for name, text in files.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        project = tomllib.loads(files["pyproject.toml"])["project"]
        info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"  # as of pip install -e
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
        groups = [
            "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
            for group, entries in project["entry-points"].items()
        ]
        (info / "entry_points.txt").write_text("\n".join(groups) if install else "")
        forget()

    before = {*sys.modules}
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in {*sys.modules} - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    monkeypatch.undo()
    forget()


def printed(file):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(file)
    return out.getvalue()


def test_files_of_a_page_are_as_short_as_promised_and_the_proposal_for_the_model_is_what_the_page_shows(reader):
    for page, longest in LONGEST.items():
        lengths = {name: len(text.splitlines()) for name, text in FILES.findall(text_of(page))}
        assert all(lengths[name] <= most for name, most in longest.items()), lengths
    reader(MODEL, install=False)
    assert [printed("propose.py")] == PROPOSED.findall(text_of(MODEL))


@pytest.mark.slow
def test_the_model_of_the_page_passes_every_check(reader):
    reader(MODEL)
    verdicts = ast.literal_eval(printed("check.py"))["MyVideoTransformer3DModel 0"]
    others = {name: verdict for name, verdict in verdicts.items() if verdict != "passed"}
    assert others.keys() <= {"signal", "padding", "refused"}, others


def test_without_a_tiny_model_nothing_would_be_checked():
    adapter = Adapter(name="any", transformers=("AnyTransformer",), self_attention=("blocks.*.attn",))
    with pytest.raises(AssertionError, match=r"TinyModel.*AnyTransformer"):
        check_adapter(adapter, only=["places"])


def test_the_methods_of_the_page_can_be_planned_and_pass_their_own_checks(reader):
    reader(METHOD)
    words = "plan --family wan2.1-1.3b --window --set window.frames=1 --json"
    assert 0 < json.loads(CliRunner().invoke(app, words.split()).stdout)["density"] < 0.2
    all_kinds = {"neutral", "active", "runs", "branches", "batch", "not a number", "gradients", "toml"}
    for line, kind in zip(printed("check.py").splitlines(), ("planned", "skips", "free"), strict=True):
        (kept,) = ast.literal_eval(line).values()
        assert {*kept} - {"beside guidance"} == {*all_kinds, kind}


PUBLIC = "dit_accel dit_accel.methods dit_accel.adapters dit_accel.testing dit_accel_kernels dit_accel_eval.metrics"


def test_the_api_pages_name_every_public_name_once():
    pages = sorted((ROOT / "docs" / "api").glob("*.md"))
    entries = [entry for page in pages for entry in re.findall(r"^::: ([\w.]+)\.(\w+)$", page.read_text(), re.M)]
    assert len(entries) == len(set(entries)) > 50
    listed = [getattr(importlib.import_module(module), name) for module, name in entries]
    for package in map(importlib.import_module, PUBLIC.split()):
        missing = {name for name in package.__all__ if not any(x is getattr(package, name) for x in listed)}
        assert missing <= {"__version__"}, package


def folders(base):
    """Names of a folder's folders that hold Python, or pages."""
    inner = (path for path in base.iterdir() if path.is_dir() and not path.name.startswith((".", "_")))
    return {path.name for path in inner if any(path.rglob("*.py")) or (path / "index.md").is_file()}


def test_every_room_stands_in_the_drawing():
    page = text_of("how-it-works.md")
    words = set(re.findall(r"[\w./]+", page[page.index("## The rooms") :].partition("```")[2].partition("```")[0]))
    words = {word.strip("/.") for word in words} | {word.partition("/")[2] for word in words}
    packages = ("", "dit_accel", "pipelines/dit_accel_pipelines", "eval/dit_accel_eval")
    rooms = {room for package in packages for room in folders(ROOT / package)}
    assert (rooms | {"studies"}) - {"build", "dist", "site"} <= words
