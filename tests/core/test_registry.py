"""Registries: open to strangers by entry point or a call, and clear about unknown and doubled names."""

from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from dit_accel import ConfigError, UnsupportedModel
from dit_accel.adapters import installed
from dit_accel.adapters.adapter import Adapter
from dit_accel.methods import registry
from dit_accel.methods.base import Handler, Phase
from dit_accel.methods.config import MethodConfig

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
