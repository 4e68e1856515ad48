"""Makes the handlers of several configs on one model: what fits together, in which tiles, and in which order."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from ..adapters.cross_attention import CrossAttention
from ..adapters.joined_text import JoinedText
from ..adapters.rotary import Rope
from ..errors import ConfigError
from ..plan.tiling import TILE, Tiling
from .base import Handler, Model, Place
from .config import MethodConfig
from .noise import require_noise
from .registry import handler_of


def make_handlers(configs: Sequence[MethodConfig], model: Model, alone: bool = True) -> list[Handler]:
    """Return the handlers of some methods on a model in the order in which they act, however they were given.

    Args:
        model: the model; its tiling is replaced by the one that the methods agree on.
        alone: these are all the methods; False: others may follow, so that one which needs a partner is not refused.

    Raises:
        ConfigError: for anything but a config, for two of one method, for a method that the model or its
            scheduler can't take, or for methods that can't be attached together.
    """
    types = [handler_of(config) for config in configs]
    configs = [handler.config_for(config) or config for handler, config in zip(types, configs, strict=True)]
    paired = sorted(zip(types, configs, strict=True), key=lambda pair: (*_place(pair[0]), pair[1].name))
    _require_one_cache(paired)
    for handler_type, config in paired:
        _refuse_on(model, handler_type, config)
    model = replace(model, tiling=agreed_tiling([config for _, config in paired], model))
    handlers = [handler_type(config, model) for handler_type, config in paired]
    _require_apart(handlers)
    require_noise(handlers, model.noises, model.noise_source)
    for handler in handlers if alone else ():
        handler.check_with([other for other in handlers if other is not handler])
    return handlers


def _require_one_cache(paired: Sequence[tuple[type[Handler], MethodConfig]]) -> None:
    """Refuse two caches or two of one kind, before a handler of either is made: some can't be made beside another."""
    for (kind, first), (other_kind, second) in combinations(paired, 2):
        if "cache" in kind.exclusive & other_kind.exclusive:
            raise ConfigError(
                f"{first.requested_name} and {second.requested_name} both cache, and a transformer takes one cache; "
                "attach one of them"
            )
        if kind is other_kind:
            raise ConfigError(f"two {kind.config_type.__name__} configs were given; attach one of each method")


def _require_apart(handlers: Sequence[Handler]) -> None:
    """Refuse two methods that set the same; what a handler sets depends on its settings, so it is asked once made."""
    for first, second in combinations(handlers, 2):
        if shared := first.exclusive & second.exclusive:
            of = "an attention call" if Place.ATTENTION in first.places else "a forward"
            raise ConfigError(
                f"{first.name} and {second.name} both set the {' and '.join(sorted(shared))} of {of}, which takes only "
                "one; attach one of them"
            )


def agreed_tiling(configs: Sequence[MethodConfig], model: Model) -> Tiling:
    """Return the tiles of an attachment: as a user set them, else as the first method does; refuse two that differ."""
    requested: dict[str, int] = {}
    usual: list[int] = []
    orders: dict[str, str] = {}
    precisions: dict[str, str] = {}
    turns: dict[str, int] = {}
    for config in configs:
        size, otherwise = config.tile_size(model.adapter.recipe(config.name, model.family))
        if size is not None:
            requested[config.name] = size
        elif otherwise is not None:
            usual.append(otherwise)
        if (order := config.tile_order()) is not None:
            orders[config.name] = order
        if (precision := getattr(config, "precision", None)) is not None:
            precisions[config.name] = precision
        if (turn := getattr(config, "refresh", None)) is not None:
            turns[config.name] = turn
    for what, values, action in (
        ("block_size", requested, "cut it into the same tiles"),
        ("order", orders, "cut it into the same tiles"),
        ("precision", precisions, "let it multiply in one precision"),
        ("refresh", turns, "let a layer be dense at one time"),
    ):
        if len(set(values.values())) > 1:
            parts = " and ".join(f"{name}.{what} = {value!r}" for name, value in values.items())
            raise ConfigError(
                f"{parts} can't be attached together: all methods of an attention call {action}; set them alike, or "
                "leave all but one unset"
            )
    size = next(iter(requested.values()), None) or next(iter(usual), TILE)
    return Tiling(size, next(iter(orders.values()), "raster"))  # type: ignore[arg-type] - configs check their order


def _refuse_on(model: Model, handler_type: type[Handler], config: MethodConfig) -> None:
    """Raise `ConfigError` for a method that the model has no place for, or that its adapter refuses."""
    adapter, name = model.adapter, config.name
    if name in adapter.refused:
        raise ConfigError(f"{name} makes no sense on {adapter.name}: {adapter.refused[name]}")
    if Place.BLOCKS in handler_type.places and adapter.blocks == ():
        raise ConfigError(
            f"{name} acts on transformer blocks, and the adapter {adapter.name!r} describes none; attach it to another "
            "model, or describe the blocks in the adapter (docs/adding-a-model.md)"
        )
    if Place.POSITIONS in handler_type.places and not isinstance(adapter.rope, Rope):
        why = adapter.rope or "its adapter describes none"
        raise ConfigError(
            f"{name} changes rotary positions, and {adapter.name} has none to change: {why}; attach it to a model with "
            "rotary positions"
        )
    cross, joined = adapter.cross_attention, adapter.joined_text
    if Place.TEXT in handler_type.places and not (isinstance(cross, CrossAttention) or isinstance(joined, JoinedText)):
        why = joined or cross or "its adapter describes neither"
        raise ConfigError(
            f"{name} lays a negative text beside the prompt, in cross-attention or in joined attention, and on "
            f"{adapter.name} it can't: {why}; attach it to another model, such as Wan or FLUX.1"
        )


def _place(handler: type[Handler]) -> tuple[bool, int, bool]:
    """Return where a method acts among others: what runs a forward again, or in parts, lies around what changes it."""
    return "unconditional prediction" in handler.exclusive, handler.phase, "perturbed prediction" in handler.exclusive
