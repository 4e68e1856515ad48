"""diffusers' own caches as a method: enabled and disabled exactly, state by branch, and reset at each run.

`attach` takes diffusers' config itself. What fails or goes wrong in diffusers is refused by `native_limits`.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...errors import ConfigError
from ...report.sections import Section
from ..base import Handler, Model, Phase, Place
from ..config import MethodConfig
from ..noise import NeedsNoise
from ..site import ForwardContext, Site
from .engine import require_no_cache
from .native_limits import CONFIGS, SEA, check_call, check_config, check_hooked, check_model


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersCache(MethodConfig):
    """One of diffusers' own caches; `attach` takes diffusers' config and wraps it in this.

    Attributes:
        config: diffusers' config, such as ``FirstBlockCacheConfig(threshold=0.08)``; it is not written to.
    """

    name = "diffusers-cache"
    config: object

    @property
    def requested_name(self) -> str:
        return type(self.config).__name__

    def noise_needed(self) -> NeedsNoise | None:
        instead = "use FirstBlockCacheConfig, or a flow-matching scheduler"
        return NeedsNoise(asks=SEA, instead=instead) if SEA in _names(self.config) else None

    def to_dict(self) -> dict[str, Any]:
        of: Any = self.config
        fields = {field.name: getattr(of, field.name) for field in dataclasses.fields(of)}
        return {
            "config": self.requested_name,
            **{key: _plain(value) for key, value in fields.items() if value is not None},
        }


class NativeHandler(Handler):
    """One of diffusers' caches on the transformers of one attachment.

    Departures from diffusers: branches are kept apart whatever the pipeline tells and whichever cache it is; state is
    dropped when a run begins, also after one that was stopped; `detach` leaves no hook, registry or attribute behind.
    """

    config_type = DiffusersCache
    phase = Phase.CACHES
    places = frozenset({Place.FORWARD})
    exclusive = frozenset({"cache", "tokens of blocks"})
    objects = CONFIGS

    def __init__(self, config: DiffusersCache, model: Model) -> None:
        super().__init__(config, model)
        self._kind = next(name for name in _names(config.config) if name in CONFIGS)
        self._enabled: dict[str, _Enabled] = {}
        self._ran: dict[tuple[str, str, int], int] = {}
        check_config(self._kind, config.config)

    @classmethod
    def config_for(cls, given: Any) -> MethodConfig | None:
        if any(name in CONFIGS for name in _names(given)):
            return DiffusersCache(config=given)
        return super().config_for(given)

    def install(self, site: Site) -> None:
        """Enable the cache on one transformer; raise `ConfigError` if another is active, or it can't work there."""
        name, config, transformer = site.name, self.settings.config, site.transformer
        check_model(self._kind, config, name, transformer, further=bool(self._enabled))
        require_no_cache(name, transformer, self._kind)
        enabled = _Enabled(transformer, copy.copy(config))
        try:
            enabled.enable(self._kind)
            check_hooked(self._kind, config, transformer, self.model.adapter, enabled.hooks)
        except BaseException:
            enabled.remove()
            raise
        self._enabled[name] = enabled

        def disable() -> None:
            self._enabled.pop(name, None)
            enabled.remove()

        site.on_detach(disable)
        site.around_forward(lambda context, run: self._around(site, enabled, context, run))

    def _around(self, site: Site, enabled: "_Enabled", context: ForwardContext, run: Callable[..., Any]) -> Any:
        """Run a forward in a context of diffusers that names its branch, and count what of it ran."""
        key = context.transformer, context.branch, context.step_index
        ran = [step for name, branch, step in self._ran if (name, branch) == key[:2]]
        check_call(self._kind, self.settings.config, context, enabled.transformer, self.model.adapter, ran)
        with enabled.entered(context):
            out = run()
        self._ran[key] = self._ran.get(key, 0) + site.reached()
        return out

    def reset(self) -> None:
        for enabled in self._enabled.values():
            enabled.reset()

    def begin_run(self) -> None:
        self._ran.clear()

    def report(self) -> Section:
        lines = [f"on {name}: {len(enabled.hooks)} modules hooked" for name, enabled in self._enabled.items()]
        whole = {name: max(ran for key, ran in self._ran.items() if key[0] == name) for name, _, _ in self._ran}
        for name, branch in dict.fromkeys(key[:2] for key in self._ran):
            steps = {key[2]: ran for key, ran in self._ran.items() if key[:2] == (name, branch)}
            if not whole[name]:
                lines.append(f"{name} {branch}: what ran in its compiled blocks can't be seen")
                continue
            reused = [step for step, ran in steps.items() if ran < whole[name]]
            lines.append(
                f"{name} {branch}: {len(steps) - len(reused)} of {len(steps)} steps computed; attention ran in "
                f"{sum(steps.values())} of {len(steps) * whole[name]} layers"
            )
        calls = [
            {"transformer": name, "branch": branch, "step_index": step, "layers_run": ran, "layers": whole[name]}
            for (name, branch, step), ran in self._ran.items()
        ]
        log = [
            {"transformer": name, "branch": branch, "step_index": step, "reused": ran < whole[name],
             "reason": "measured" if ran < whole[name] else "its own rule", "value": None}
            for (name, branch, step), ran in self._ran.items() if whole[name]
        ]  # fmt: skip
        data = {**self.settings.to_dict(), "calls": calls, "forwards": log}
        return Section(method=self.name, title=f"diffusers' {self._kind}", lines=tuple(lines), data=data)


class _Enabled:
    """A cache on one transformer, and what the transformer's modules held before, to leave nothing behind."""

    def __init__(self, transformer: Any, config: Any) -> None:
        self.transformer = transformer  # the transformer
        self.hooks: dict[str, list[Any]] = {}  # module name -> the cache's hooks there, but for the transformer's own
        self._config = config
        self._before = [
            (name, module, set(module.__dict__), set(_hooks(module))) for name, module in transformer.named_modules()
        ]
        self._shared: list[Any] = []  # hooks that keep one state for all branches
        self._states: dict[str, list[Any]] = {}  # branch -> theirs
        self._context: Callable[[], Any] | None = None
        self._open = contextlib.ExitStack()

    def enable(self, kind: str) -> None:
        """Enable the cache; raise `ConfigError` if diffusers can't."""
        try:
            self.transformer.enable_cache(self._config)
        except Exception as error:
            self.transformer._cache_config = self._config  # some of its hooks may be there
            raise ConfigError(
                f"diffusers can't enable {kind} on {type(self.transformer).__name__}: {error}; use another cache"
            ) from error
        for name, module, _, before in self._before:
            new = [hook for key, hook in _hooks(module).items() if key not in before]
            self._shared += [hook for hook in new if hasattr(hook, "state")]
            if new and name:
                self.hooks[name] = new

    def remove(self) -> None:
        """Disable the cache, unless the user has, and delete what diffusers leaves on modules without its hooks."""
        if self.transformer._cache_config is self._config:
            self.transformer.disable_cache()
        for _, module, names, _ in self._before:
            forward = module.__dict__.get("forward")
            if "forward" not in names and getattr(forward, "__func__", None) is type(module).forward:
                del module.__dict__["forward"]
            if "_diffusers_hook" not in names and not _hooks(module):
                module.__dict__.pop("_diffusers_hook", None)
            if "_cache_config" not in names and module.__dict__.get("_cache_config", module) is None:
                del module._cache_config

    @contextlib.contextmanager
    def entered(self, context: ForwardContext) -> Any:
        """Let diffusers' hooks see the branch, step and noise level of a forward, as far as the core knows them."""
        known = {"sigma": context.share_of_noise, "num_inference_steps": context.num_inference_steps}
        enter = type(self.transformer).cache_context
        states = self._states.setdefault(context.branch, [type(hook.state)() for hook in self._shared])
        for hook, state in zip(self._shared, states, strict=True):
            hook.state = state
        self._context = lambda: enter(self.transformer, context.branch, step_index=context.step_index, **known)
        try:
            with self._open:
                self._open.enter_context(self._context())
                yield
        finally:
            self._context = None

    def reset(self) -> None:
        """Have all hooks forget what they carry."""
        type(self.transformer)._reset_stateful_cache(self.transformer)
        for state in (state for states in self._states.values() for state in states):
            state.reset()
        if self._context is not None:  # a forward is under way, and diffusers forgets its context with the rest
            self._open.enter_context(self._context())


def _hooks(module: nn.Module) -> dict[str, Any]:
    return getattr(getattr(module, "_diffusers_hook", None), "hooks", {})


def _names(config: Any) -> list[str]:
    """Return the names of an object's types, as far as they are diffusers'."""
    return [cls.__name__ for cls in type(config).__mro__ if cls.__module__.startswith("diffusers.")]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", str(value))
