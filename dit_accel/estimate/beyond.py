"""Outputs beyond the size that a model was trained on: which axes are, and which methods help there."""

from collections.abc import Sequence

from ..adapters.adapter import Adapter, Family
from ..errors import ConfigError
from ..methods.base import Model
from ..methods.compose import make_handlers
from ..methods.config import MethodConfig
from ..methods.registry import handler_of, methods
from ..plan.layout import TokenLayout

WHAT_HAPPENS = {"frames": "clips repeat themselves or fall apart", "height": "pictures repeat themselves"}
WHAT_HAPPENS["width"] = WHAT_HAPPENS["height"]


def beyond_trained(family: Family, layout: TokenLayout) -> dict[str, tuple[int, int]]:
    """Return axis -> (tokens, trained tokens) of the axes along which a layout is longer than trained, as is known."""
    lengths = layout.lengths
    return {axis: (lengths[axis], most) for axis, most in family.trained.items() if lengths[axis] > most}


def methods_for_axis(adapter: Adapter, family: Family, axis: str) -> list[str]:
    """Return the methods that help along an axis and work on a model with nothing but their defaults.

    Those that change attention stand before those that change positions.
    """
    model = Model(adapter=adapter, family=family, heads=family.heads, layers=family.layers)
    names = []
    for name, config_type in methods().items():
        config = config_type()
        if name in family.not_advised or axis not in handler_of(config).extends:
            continue
        try:
            make_handlers([config], model, alone=False)
        except ConfigError:
            continue
        names.append(name)
    return names[::-1]  # the registry has those of the first phase, positions, first


def advice(adapter: Adapter, family: Family, layout: TokenLayout, attached: Sequence[MethodConfig]) -> list[str]:
    """Return what a user should know who makes more than the model was trained on without a method for that."""
    served = {axis for config in attached for axis in handler_of(config).extends}
    texts = []
    for axis, (tokens, trained) in beyond_trained(family, layout).items():
        if axis in served or (axis == "width" and texts and "height" in beyond_trained(family, layout)):
            continue
        unit = {"frames": "latent frames", "height": "rows of tokens", "width": "columns of tokens"}[axis]
        flags = [f"--{name}" for name in methods_for_axis(adapter, family, axis)]
        hint = f"; attach {' or '.join(flags)}" if flags else "; no method for that works on it with its defaults"
        texts.append(
            f"{tokens} {unit} are {tokens / trained:.2f} times the {trained} that {family.name} was trained on, beyond "
            f"which {WHAT_HAPPENS[axis]}{hint}"
        )
    return texts
