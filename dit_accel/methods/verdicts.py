"""Which methods a model takes, which once an option is set, and which it refuses: one rule for all that lists them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..adapters.adapter import ONE_FRAME, Adapter
from ..errors import ConfigError, MissingOption
from .base import Handler, Model
from .compose import make_handlers
from .config import MethodConfig
from .registry import methods


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What `attach` says to a method with its usual options."""

    # ``taken``; ``needs``: taken once something is given that has no usual value on the model; ``refused``
    word: Literal["taken", "needs", "refused"]
    why: str = ""  # the error's sentence, where it is not taken
    needs: str = ""  # what must be given
    handler: Handler | None = None  # the method on the model, where it is taken


def verdict_of(config: MethodConfig, model: Model) -> Verdict:
    """Return whether `attach` would accept a method on a model, as far as that is known without its weights."""
    if (why := model.adapter.refused.get(config.name)) is not None:
        return Verdict(word="refused", why=why)
    try:
        (handler,) = make_handlers([config], model, alone=False)
        handler.require_given()
    except MissingOption as error:
        return Verdict(word="needs", why=str(error), needs=error.needs)
    except ConfigError as error:
        return Verdict(word="refused", why=str(error))
    return Verdict(word="taken", handler=handler)


def refused_by(adapter: Adapter) -> Mapping[str, str]:
    """Return method -> why no released model of a family takes it, with the scheduler that it is released with."""
    sizes: list[dict[str, Any]] = [
        dict(family=family, heads=family.heads, layers=family.layers) for family in adapter.families
    ]
    models = [Model(adapter=adapter, **size) for size in sizes or [dict(family=None, heads=1, layers=1)]]
    reasons = {}
    for name, config_type in methods().items():
        config = config_type()
        verdict = verdict_of(config, models[0])
        if verdict.word == "refused" and all(verdict_of(config, model).word == "refused" for model in models[1:]):
            reasons[name] = verdict.why
    return reasons


def spell_refusal(why: str, adapter: Adapter) -> str:
    """Return a reason as families that share it read it; ``degenerate`` is what would change nothing."""
    pattern = re.compile(rf"(?<![\w.-]){re.escape(adapter.name)}(?![\w.-])")
    return f"{'degenerate' if why == ONE_FRAME else 'refused'}: {pattern.sub('the model', why)}"
