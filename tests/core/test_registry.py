"""Registries: open to strangers by entry point, and clear about unknown and doubled names."""

from importlib.metadata import EntryPoint

import pytest

from dit_accel import ConfigError, UnsupportedModel
from dit_accel.adapters import registry
from dit_accel.adapters.adapter import Adapter
from dit_accel.cli import registry as command_registry
from dit_accel.methods import registry as method_registry
from dit_accel.methods.base import Handler, handles
from dit_accel.methods.config import MethodConfig
from dit_accel.plan.layout import TokenLayout


@pytest.fixture
def install(monkeypatch):
    """Return a function that puts adapters behind one more entry point."""

    def install(*adapters: Adapter, entry: object = None) -> None:
        real = registry.entry_points

        class Fake:
            value = "stranger:ADAPTERS"

            def load(self):
                return adapters

        monkeypatch.setattr(registry, "entry_points", lambda group: [*real(group=group), entry or Fake()])
        registry.adapters.cache_clear()

    yield install
    monkeypatch.undo()
    registry.adapters.cache_clear()


def test_a_stranger_adds_an_adapter(install):
    install(Adapter(name="mine", transformers=("MyTransformer",), self_attention=("blocks.*.attn",)))
    assert registry.adapter_for("MyTransformer").name == "mine"


def test_doubled_names_are_refused(install):
    install(Adapter(name="wan", transformers=(), self_attention=()))
    with pytest.raises(ConfigError, match="adapter 'wan' is registered twice"):
        registry.adapters()


def test_doubled_classes_are_refused(install):
    install(Adapter(name="mine", transformers=("WanTransformer3DModel",), self_attention=()))
    with pytest.raises(ConfigError, match="WanTransformer3DModel is claimed by the adapters 'wan' and 'mine'"):
        registry.adapters()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "dit_accel_pipelines.wan:WAN",
            r"the entry point 'dit_accel_pipelines.wan:WAN' of dit_accel.adapters must give a tuple of adapters, "
            r"got Adapter; name ADAPTERS = \(MY_ADAPTER,\) in it",
        ),
        ("dit_accel_pipelines.wan:__name__", "must give a tuple of adapters, got str"),
        (
            "dit_accel_pipelines.wan:NONE",
            "wan:NONE' .* can't be loaded: .* no attribute 'NONE'; name a tuple of adapters",
        ),
        ("dit_accel_nowhere:ADAPTERS", "can't be loaded: No module named 'dit_accel_nowhere'; .* install it again"),
    ],
)
def test_an_entry_point_that_gives_no_adapters_is_named(install, value, message):
    install(entry=EntryPoint("stranger", value, registry.ADAPTER_GROUP))
    with pytest.raises(ConfigError, match=message):
        registry.adapters()


def test_unknown_names_get_the_nearest():
    with pytest.raises(UnsupportedModel, match=r"WanTransformer3D; did you mean 'WanTransformer3DModel'\?"):
        registry.adapter_for("WanTransformer3D")
    with pytest.raises(UnsupportedModel, match=r"no model family is called 'wan2.1-14'; did you mean 'wan2.1-14b'\?"):
        registry.family("wan2.1-14")
    with pytest.raises(ConfigError, match=r"no method is called 'radail'; did you mean 'radial'\?"):
        method_registry.method("radail")


def test_methods_of_one_name_are_refused():
    class Radial2(MethodConfig):
        name = "radial"

    with pytest.raises(ConfigError, match="a method called 'radial' is registered already"):
        handles(Radial2)(Handler)


def test_entry_points_are_installed():
    assert isinstance(next(iter(registry.entry_points(group=registry.ADAPTER_GROUP))), EntryPoint)
    assert "generate" in command_registry.commands()


def test_layout_counts_and_refuses():
    layout = TokenLayout(frames=21, height=45, width=80, text_after=256)
    assert (layout.tokens_per_frame, layout.visual_tokens, layout.tokens) == (3600, 75600, 75856)
    with pytest.raises(ConfigError, match="a token layout needs frames >= 1, got 0"):
        TokenLayout(frames=0, height=1, width=1)
    with pytest.raises(ConfigError, match="needs text_after >= 0, got -1"):
        TokenLayout(frames=1, height=1, width=1, text_after=-1)
