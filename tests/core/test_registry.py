"""Registries: open to strangers by entry point, and clear about unknown and doubled names."""

from decimal import Decimal
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch

from dit_accel import ConfigError, UnsupportedModel
from dit_accel.adapters import installed
from dit_accel.adapters.adapter import Adapter
from dit_accel.cli import installed_commands
from dit_accel.methods import registry as method_registry
from dit_accel.methods.base import Handler, Phase
from dit_accel.methods.config import MethodConfig
from dit_accel.plan.layout import TokenLayout


@pytest.fixture
def install(monkeypatch):
    """Return a function that puts adapters behind one more entry point."""

    def install(*adapters: Adapter, entry: object = None) -> None:
        real = installed.entry_points

        class Fake:
            name, value, group = "us", "stranger:ADAPTERS", installed.ADAPTER_GROUP

            def load(self):
                return adapters

        added = entry or Fake()
        monkeypatch.setattr(
            installed, "entry_points", lambda group: [*real(group=group), *[added] * (added.group == group)]
        )
        installed.adapters.cache_clear()
        installed.not_supported.cache_clear()

    yield install
    monkeypatch.undo()
    installed.adapters.cache_clear()
    installed.not_supported.cache_clear()


def test_a_stranger_adds_an_adapter(install):
    install(Adapter(name="mine", transformers=("MyTransformer",), self_attention=("blocks.*.attn",)))
    assert installed.adapter_for("MyTransformer").name == "mine"


def test_doubled_names_are_refused(install):
    install(Adapter(name="wan", transformers=(), self_attention=()))
    with pytest.raises(ConfigError, match=r"adapter 'wan'.*twice"):
        installed.adapters()


@pytest.fixture
def register_adapter():
    """Give `register`, and forget what it was given."""
    yield installed.register
    installed._registered.clear()
    installed.adapters.cache_clear()


def test_an_adapter_of_a_script_is_known_to_its_process(register_adapter):
    mine = Adapter(name="mine", transformers=("MyTransformer",), self_attention=())
    assert register_adapter(mine) is installed.adapter_for("MyTransformer") is mine
    again = Adapter(name="mine", transformers=("MyTransformer",), self_attention=("blocks.*.attn",))
    assert register_adapter(again) is installed.adapter_for("MyTransformer")


@pytest.mark.parametrize(("name", "cls"), [("mine", "WanTransformer3DModel"), ("wan", "MyTransformer")])
def test_an_adapter_stands_in_the_place_of_an_installed_one_where_that_is_said(register_adapter, name, cls):
    mine = Adapter(name=name, transformers=(cls,), self_attention=())
    with pytest.raises(ConfigError, match=rf"({cls}|{name}) is.*'wan'.*'{name}'.*override=True"):
        register_adapter(mine)
    register_adapter(mine, override=True)
    assert installed.adapter_for(cls) is installed.adapters()[name] is mine


def test_what_is_no_adapter_is_not_registered(register_adapter):
    with pytest.raises(ConfigError, match=r"register.*Adapter, got 3"):
        register_adapter(3)


def test_doubled_classes_are_refused(install):
    install(Adapter(name="mine", transformers=("WanTransformer3DModel",), self_attention=()))
    with pytest.raises(ConfigError, match=r"WanTransformer3DModel.*'wan' and 'mine'"):
        installed.adapters()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "dit_accel_pipelines.families.wan:WAN",
            r"'dit_accel_pipelines\.families\.wan:WAN'.*dit_accel\.adapters.*got Adapter.*ADAPTERS = \(MY_ADAPTER,\)",
        ),
        ("dit_accel_pipelines.families.wan:__name__", "adapters, got str"),
        (
            "dit_accel_pipelines.families.wan:NONE",
            r"wan:NONE'.*'NONE'",
        ),
        ("dit_accel_nowhere:ADAPTERS", r"module named 'dit_accel_nowhere'.*adapters"),
    ],
)
def test_an_entry_point_that_gives_no_adapters_is_named(install, value, message):
    install(entry=EntryPoint("stranger", value, installed.ADAPTER_GROUP))
    with pytest.raises(ConfigError, match=message):
        installed.adapters()


def test_a_class_without_an_adapter_is_not_guessed_at():
    with pytest.raises(UnsupportedModel, match=r"WanTransformer3D; `dit-accel models`"):
        installed.adapter_for("WanTransformer3D")


def test_a_stranger_says_why_a_class_is_not_supported(install):
    reasons = {"MyTransformer": "no attention"}
    install(
        entry=SimpleNamespace(name="us", value="stranger:REASONS", group=installed.REASON_GROUP, load=lambda: reasons)
    )
    with pytest.raises(UnsupportedModel, match=r"MyTransformer is.*: no attention$"):
        installed.adapter_for("MyTransformer")
    reasons["MyTransformer"] = 3
    installed.not_supported.cache_clear()
    with pytest.raises(ConfigError, match=r"'stranger:REASONS' of dit_accel\.not_supported.*reasons, got dict"):
        installed.not_supported()


def test_unknown_names_get_the_nearest():
    rest = r" or '\S+' or '\S+'\? \d+ are known, `dit-accel models`"  # too many to name each
    with pytest.raises(UnsupportedModel, match=rf"family.*'wan2\.1-14'.*'wan2\.1-14b'{rest}"):
        installed.family("wan2.1-14")
    with pytest.raises(ConfigError, match=r"method.*'radail'.*'radial'\?"):
        method_registry.method("radail")


class Mine(MethodConfig):
    """A stranger's config."""

    name = "mine"


class MyHandler(Handler):
    """A stranger's method."""

    config_type = Mine
    phase = Phase.LISTS


@pytest.fixture
def install_methods(monkeypatch):
    """Return a function that adds entry points of methods, name -> value or what it gives."""

    def install(**entries: object) -> None:
        class Fake:
            group = method_registry.METHOD_GROUP

            def __init__(self, name, given):
                self.name, self.value, self.given = name, f"stranger:{given!r}", given

            def load(self):
                return self.given

        real, group = method_registry.entry_points, method_registry.METHOD_GROUP
        added = [EntryPoint(n, v, group) if isinstance(v, str) else Fake(n, v) for n, v in entries.items()]
        monkeypatch.setattr(method_registry, "entry_points", lambda group: [*real(group=group), *added])
        method_registry.handlers.cache_clear()

    yield install
    monkeypatch.undo()
    method_registry.handlers.cache_clear()


def test_a_stranger_adds_a_method(install_methods):
    install_methods(mine=MyHandler)
    assert method_registry.method("mine") is Mine
    assert method_registry.handler_of(Mine()) is MyHandler
    names = list(method_registry.handlers())
    assert names.index("mine") < names.index("sparsed")  # by phase, then by name
    phases = [handler.phase for handler in method_registry.handlers().values()]
    assert phases == sorted(phases)


def test_methods_of_one_name_are_refused(install_methods):
    install_methods(radial="dit_accel.methods.attention.radial:RadialHandler")
    with pytest.raises(
        ConfigError,
        match=r"method 'radial'.*twice.*dit_accel\.methods.*:RadialHandler",
    ):
        method_registry.handlers()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "dit_accel.methods.attention.radial:Nothing",
            r"mine = '.*' of dit_accel\.methods.*'Nothing'",
        ),
        ("dit_accel_nowhere:Mine", r"module named 'dit_accel_nowhere'.*handler"),
        (Mine, r"mine = .*handler type, got <class .*Mine'>.*dit_accel\.methods\.Handler"),
        (Handler, r"gives Handler.*config_type.*name = 'mine'"),
        (
            "dit_accel.methods.attention.radial:RadialHandler",
            r"gives RadialHandler.*config_type.*name = 'mine'",
        ),
    ],
)
def test_an_entry_point_that_gives_no_method_is_named(install_methods, given, message):
    install_methods(mine=given)
    with pytest.raises(ConfigError, match=message):
        method_registry.handlers()


def test_a_config_that_no_package_registers_says_so():
    with pytest.raises(ConfigError, match=r"Mine.*entry point.*dit_accel\.m"):
        method_registry.handler_of(Mine())


def test_entry_points_are_installed():
    assert isinstance(next(iter(installed.entry_points(group=installed.ADAPTER_GROUP))), EntryPoint)
    assert "generate" in installed_commands.commands()


def test_layout_counts_and_refuses():
    layout = TokenLayout(frames=21, height=45, width=80, text_after=256)
    assert (layout.tokens_per_frame, layout.visual_tokens, layout.tokens) == (3600, 75600, 75856)
    with pytest.raises(ConfigError, match=r"layout.*frames.*>= 1, got 0"):
        TokenLayout(frames=0, height=1, width=1)
    with pytest.raises(ConfigError, match=r"text_after.*>= 0, got -1"):
        TokenLayout(frames=1, height=1, width=1, text_after=-1)


def test_sizes_of_a_layout_are_whole_numbers():
    for name in ("frames", "height", "width", "text_before", "text_after"):
        for value in (0.5, 1.0, Decimal(2), torch.tensor(2), True, "2", None):
            with pytest.raises(ConfigError, match=rf"layout.*{name}.*>= \d, got"):
                TokenLayout(**{"frames": 1, "height": 1, "width": 1, name: value})


@pytest.fixture
def registering():
    """Give `register`, and forget what it was given."""
    yield method_registry.register
    method_registry._registered.clear()
    method_registry.handlers.cache_clear()


class Own(MethodConfig):
    name = "own"


class OwnHandler(Handler):
    config_type, phase = Own, Phase.LISTS


def test_a_method_of_a_script_is_known_to_its_process(registering):
    assert registering(OwnHandler) is OwnHandler
    assert method_registry.handler_of(Own()) is OwnHandler
    assert method_registry.method("own") is Own


def test_a_cell_that_runs_again_replaces_its_method(registering):
    again = type("Again", (MethodConfig,), {"name": "own"})
    registering(OwnHandler)
    registering(second := type("SecondHandler", (OwnHandler,), {"config_type": again}))
    assert method_registry.handler_of(again()) is second
    with pytest.raises(ConfigError, match=r"Own\(\).*dit_accel\.methods"):
        method_registry.handler_of(Own())


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (type("Bare", (Handler,), {}), "Bare"),
        (type("Nameless", (Handler,), {"config_type": MethodConfig}), "Nameless"),
        (
            type("Mine", (Handler,), {"config_type": type("Radial", (MethodConfig,), {"name": "radial"})}),
            "'radial'.*Mine",
        ),
        (type("Stranger", (), {"config_type": Own}), "register.*Stranger"),
    ],
)
def test_what_can_t_be_registered_is_told(registering, handler, message):
    with pytest.raises(ConfigError, match=message):
        registering(handler)
    assert "own" not in method_registry.handlers()
