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
    real = installed.entry_points

    def install(*adapters: Adapter, entry: object = None) -> None:
        group = installed.ADAPTER_GROUP
        added = entry or SimpleNamespace(name="us", value="stranger:ADAPTERS", group=group, load=lambda: adapters)
        monkeypatch.setattr(
            installed, "entry_points", lambda group: [*real(group=group), *[added] * (added.group == group)]
        )
        installed.adapters.cache_clear()
        installed.not_supported.cache_clear()

    yield install
    monkeypatch.undo()
    installed.adapters.cache_clear()
    installed.not_supported.cache_clear()


def test_a_stranger_adds_an_adapter_of_another_name_for_another_class(install):
    install(Adapter(name="mine", transformers=("MyTransformer",), self_attention=("blocks.*.attn",)))
    assert installed.adapter_for("MyTransformer").name == "mine"
    for name, cls, message in (
        ("wan", (), r"adapter 'wan'.*twice"),
        ("mine", ("WanTransformer3DModel",), r"WanTransformer3DModel.*'wan' and 'mine'"),
    ):
        install(Adapter(name=name, transformers=cls, self_attention=()))
        with pytest.raises(ConfigError, match=message):
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
    with pytest.raises(ConfigError, match=r"register.*Adapter, got 3"):
        register_adapter(3)


@pytest.mark.parametrize(("name", "cls"), [("mine", "WanTransformer3DModel"), ("wan", "MyTransformer")])
def test_an_adapter_stands_in_the_place_of_an_installed_one_where_that_is_said(register_adapter, name, cls):
    mine = Adapter(name=name, transformers=(cls,), self_attention=())
    with pytest.raises(ConfigError, match=rf"({cls}|{name}) is.*'wan'.*'{name}'.*override=True"):
        register_adapter(mine)
    register_adapter(mine, override=True)
    assert installed.adapter_for(cls) is installed.adapters()[name] is mine


def test_an_entry_point_that_gives_no_adapters_is_named(install):
    wan = "dit_accel_pipelines.families.wan"
    for value, message in (
        (f"{wan}:WAN", rf"'{wan}:WAN'.*dit_accel\.adapters.*got Adapter.*ADAPTERS = \(MY_ADAPTER,\)"),
        (f"{wan}:__name__", "adapters, got str"),
        (f"{wan}:NONE", r"wan:NONE'.*'NONE'"),
        ("dit_accel_nowhere:ADAPTERS", r"module named 'dit_accel_nowhere'.*adapters"),
    ):
        install(entry=EntryPoint("stranger", value, installed.ADAPTER_GROUP))
        with pytest.raises(ConfigError, match=message):
            installed.adapters()


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


def test_unknown_names_get_the_nearest_and_a_class_is_not_guessed_at():
    with pytest.raises(UnsupportedModel, match=r"WanTransformer3D; `dit-accel models`"):
        installed.adapter_for("WanTransformer3D")
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
    real, group = method_registry.entry_points, method_registry.METHOD_GROUP

    def entry(name: str, given: object) -> object:
        if isinstance(given, str):
            return EntryPoint(name, given, group)
        return SimpleNamespace(name=name, group=group, value=f"stranger:{given!r}", load=lambda: given)

    def install(**entries: object) -> None:
        added = [entry(name, given) for name, given in entries.items()]
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


def test_an_entry_point_that_gives_no_method_or_a_doubled_one_is_named(install_methods):
    radial = "dit_accel.methods.attention.radial"
    for name, given, message in (
        ("radial", f"{radial}:RadialHandler", r"method 'radial'.*twice.*dit_accel\.methods.*:RadialHandler"),
        ("mine", f"{radial}:Nothing", r"mine = '.*' of dit_accel\.methods.*'Nothing'"),
        ("mine", "dit_accel_nowhere:Mine", r"module named 'dit_accel_nowhere'.*handler"),
        ("mine", Mine, r"mine = .*handler type, got <class .*Mine'>.*dit_accel\.methods\.Handler"),
        ("mine", Handler, r"gives Handler.*config_type.*name = 'mine'"),
        ("mine", f"{radial}:RadialHandler", r"gives RadialHandler.*config_type.*name = 'mine'"),
    ):
        install_methods(**{name: given})
        with pytest.raises(ConfigError, match=message):
            method_registry.handlers()


def test_entry_points_are_installed():
    assert isinstance(next(iter(installed.entry_points(group=installed.ADAPTER_GROUP))), EntryPoint)
    assert "generate" in installed_commands.commands()


def test_layout_counts_and_refuses():
    layout = TokenLayout(frames=21, height=45, width=80, text_after=256)
    assert (layout.tokens_per_frame, layout.visual_tokens, layout.tokens) == (3600, 75600, 75856)
    for name in ("frames", "height", "width", "text_before", "text_after"):
        least = 0 if name.startswith("text") else 1
        for value in (least - 1, 0.5, 1.0, Decimal(2), torch.tensor(2), True, "2", None):
            with pytest.raises(ConfigError, match=rf"layout.*{name}.*>= {least}, got"):
                TokenLayout(**{"frames": 1, "height": 1, "width": 1, name: value})


@pytest.fixture
def registering():
    """Give `register`, and forget what it was given."""
    yield method_registry.register
    method_registry._registered.clear()
    method_registry.handlers.cache_clear()


def test_a_method_of_a_script_is_known_to_its_process_until_a_cell_runs_again(registering):
    with pytest.raises(ConfigError, match=r"Mine.*entry point.*dit_accel\.m"):
        method_registry.handler_of(Mine())
    assert registering(MyHandler) is MyHandler
    assert method_registry.handler_of(Mine()) is MyHandler
    assert method_registry.method("mine") is Mine
    again = type("Again", (MethodConfig,), {"name": "mine"})
    registering(second := type("SecondHandler", (MyHandler,), {"config_type": again}))
    assert method_registry.handler_of(again()) is second
    with pytest.raises(ConfigError, match=r"Mine\(\).*dit_accel\.methods"):
        method_registry.handler_of(Mine())


def test_what_can_t_be_registered_is_told(registering):
    radial = type("Radial", (MethodConfig,), {"name": "radial"})
    for handler, message in (
        (type("Bare", (Handler,), {}), "Bare"),
        (type("Nameless", (Handler,), {"config_type": MethodConfig}), "Nameless"),
        (type("Mine", (Handler,), {"config_type": radial}), "'radial'.*Mine"),
        (type("Stranger", (), {"config_type": Mine}), "register.*Stranger"),
    ):
        with pytest.raises(ConfigError, match=message):
            registering(handler)
    assert "mine" not in method_registry.handlers()
