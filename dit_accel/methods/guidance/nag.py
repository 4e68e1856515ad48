"""NAG: cross-attention led away from what a negative text gives, within the one conditional forward."""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, cat, nn

from ...adapters.cross_attention import CrossAttention
from ...errors import ConfigError
from ...plan.layout import TokenLayout
from ...report.sections import Section
from ...rules.guidance import normalized
from ..base import Handler, Model, Phase, Place
from ..caches.engine import is_recorded
from ..config import MethodConfig
from ..saving import Saving
from ..site import ForwardContext, Site
from .config import WindowedConfig
from .log import UnperturbedRun
from .negative_text import NegativeText, encoded
from .parts import Parts, rows_in
from .passes import Rows
from .rows import rows_of


@dataclass(frozen=True, slots=True, kw_only=True)
class NAG(WindowedConfig):
    """Leads cross-attention away from what a negative text gives, without a forward of its own; also at guidance 1.

    Z+ is the output of a cross-attention, before its output projection, with the prompt and Z- with the negative text.
    G = s Z+ - (s - 1) Z- is cut down to at most tau times Z+'s length in L1, token by token; Z+ becomes
    alpha G + (1 - alpha) Z+.

    Source: NAG (arXiv 2505.21179). Where we depart from it: in image-to-video models, whose cross-attention adds what
    it takes from pictures, that part is in Z+ and Z- alike, and in their lengths.

    Attributes:
        scale: s >= 1; 1 changes nothing.
        tau: longest G, in lengths of Z+, >= 1.
        alpha: weight of G, in [0, 1]; 0 changes nothing.
        negative_prompt: the text; the pipeline's own encoder encodes it when the method is attached.
        negative_embeds: in place of it, what that encoder gives, [1, tokens, C], unpadded where the model masks padded
            text. Two configs are compared without it, and it is in no TOML table.

    Raises:
        ConfigError: for an option out of range, or both of the texts.
    """

    name: ClassVar[str] = "nag"
    defaults: ClassVar[Mapping[str, Any]] = {"scale": 5.0, "tau": 2.5, "alpha": 0.25, "start": 0.0, "stop": 1.0}

    scale: float | None = None
    tau: float | None = None
    alpha: float | None = None
    negative_prompt: str | None = None
    negative_embeds: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        WindowedConfig.__post_init__(self)
        if self.scale is not None and self.scale < 1:
            raise ConfigError(f"nag.scale must be >= 1, got {self.scale}; 3 to 11 is usual, 1 changes nothing")
        if self.tau is not None and self.tau < 1:
            raise ConfigError(f"nag.tau must be >= 1, got {self.tau}; 2.5 is usual, below 1 all tokens would shrink")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"nag.alpha must be from 0 to 1, got {self.alpha}; 0.25 is usual, 0 changes nothing")
        if self.negative_embeds is None:
            return
        if self.negative_prompt is not None:
            raise ConfigError("nag takes negative_prompt or negative_embeds, and got both; give one of them")
        shape = tuple(self.negative_embeds.shape)
        if len(shape) != 3 or shape[0] != 1 or 0 in shape:
            raise ConfigError(f"nag.negative_embeds must be [1, tokens, C], got {list(shape)}; give one text's")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as plain values; embeddings are none."""
        values = MethodConfig.to_dict(self)
        values.pop("negative_embeds", None)
        return values


class _Guided:
    """What one transformer's cross-attention is led away from while a forward runs.

    Attributes:
        text: the negative text.
        on: a guided forward runs.
        rows: its conditional rows; None: all.
        tokens: tokens of its prompt.
        calls: guided calls of cross-attention since the run began.
    """

    def __init__(self, text: NegativeText) -> None:
        self.text = text
        self.on = False
        self.rows: Rows = None
        self.tokens = 0
        self.calls = 0

    @contextlib.contextmanager
    def guiding(self, rows: Rows, tokens: int) -> Iterator[None]:
        """Lead what runs inside away from the negative text."""
        self.on, self.rows, self.tokens = True, rows, tokens
        try:
            yield
        finally:
            self.on = False
            self.text.forget()


class NAGHandler(Handler):
    """NAG on one model."""

    config_type = NAG
    phase = Phase.GUIDANCE
    places = frozenset({Place.FORWARD, Place.CROSS_ATTENTION})
    settings: NAG

    def __init__(self, config: NAG, model: Model) -> None:
        super().__init__(config.filled(model.adapter.recipe(config.name, model.family)), model)
        self._parts = Parts()
        self._embeds: Tensor | None = self.settings.negative_embeds
        self._guided: list[_Guided] = []
        self._log: list[tuple[int, str]] = []
        self._seen = 0
        self._steps: int | None = None
        self._warned = self._warned_of_window = False

    @property
    def neutral(self) -> bool:
        """Whether the settings change nothing."""
        return self.settings.scale == 1 or self.settings.alpha == 0

    def install(self, site: Site) -> None:
        """Run around every forward, around what projects the text, and around the cross-attention.

        Raises:
            ConfigError: without a negative text, or if something is compiled around the cross-attention.
        """
        if self._embeds is None:
            if self.settings.negative_prompt is None:
                raise ConfigError(
                    "nag leads away from a text, and none is set; set nag.negative_prompt, such as 'blurry, low "
                    "quality', or nag.negative_embeds"
                )
            self._embeds = encoded(site, self.settings.negative_prompt)
        where = site.adapter.cross_attention
        assert isinstance(where, CrossAttention)
        projection = where.projecting(site.transformer)
        guided = _Guided(NegativeText(self._embeds, projection is not None, site.name))
        self._guided.append(guided)
        if projection is not None:
            site.around_module(
                projection,
                lambda run, args, kwargs: guided.text.project(run, args, kwargs) if guided.on else run(*args, **kwargs),
            )
        for name, module in where.found(site.transformer).items():
            site.around_module(module, self._around_attention(site, guided, name, module))
        site.around_forward(lambda context, run: self._around(site, where, guided, context, run))

    def _around(
        self, site: Site, where: CrossAttention, guided: _Guided, context: ForwardContext, run: Callable[..., Any]
    ) -> Any:
        """Run a forward; guided, if it is conditional."""
        latents = context.inputs[site.adapter.latents]
        if self.neutral or context.training or is_recorded(latents):
            return run()
        self._seen, self._steps = self._seen + 1, context.num_inference_steps
        if not self._warned_of_window and (short := self.settings.too_short(self._steps)):
            self._warned_of_window = True
            warnings.warn(short, UserWarning, stacklevel=2)
        if not self.settings.acts(context.step_index, context.num_inference_steps):
            return run()
        # a perturbed branch runs inside the conditional one, and has its rows alone
        part = "cond" if "/" in context.branch else self._parts.of(site, context, latents)
        if part == "uncond":
            return run()
        prompt = guided.text.require_like(context.inputs.get(where.text))
        calls = guided.calls
        with guided.guiding(rows_in(site, part, len(latents), "cond"), prompt.shape[1]):
            out = run()
        if guided.calls > calls:  # else a cache skipped it
            self._log.append((context.step_index, context.branch))
        return out

    def _around_attention(self, site: Site, guided: _Guided, name: str, module: Any) -> Callable[..., Any]:
        """Return what runs in place of a cross-attention: itself with the negative text, then with the prompt."""
        names = list(inspect.signature(type(module).forward).parameters)[1:]

        def around(run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            if not guided.on:
                return run(*args, **kwargs)
            _require_uncached(name, module)
            given, rows = {**dict(zip(names, args, strict=False)), **kwargs}, guided.rows
            if rows is not None:
                given = rows_of(given, *rows)
            given["encoder_hidden_states"] = guided.text.beside(given["encoder_hidden_states"], guided.tokens)
            if "attention_mask" in given:  # it is the prompt's; the negative text has no padding
                given["attention_mask"] = None
            queries: list[Any] = []
            outputs: list[Tensor] = []

            def keep(run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                queries.append(run(*args, **kwargs))
                return queries[0]

            def reuse(run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                return queries[0] if rows is None and queries else run(*args, **kwargs)

            def catch(run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                outputs.append(args[0])
                return args[0]

            def lead(run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                return run(self._led(args[0], outputs[0], rows), *args[1:], **kwargs)

            with site.stand_in(module.to_q, keep), site.stand_in(module.to_out[0], catch):
                run(**given)
            if len(outputs) != 1:
                raise ConfigError(
                    f"{name} ran its output projection {len(outputs)} times in one call, so that nag can't tell its "
                    "output; detach it, or take the model's own attention processor"
                )
            guided.calls += 1
            with site.stand_in(module.to_q, reuse), site.stand_in(module.to_out[0], lead):
                return run(*args, **kwargs)

        return around

    def _led(self, positive: Tensor, negative: Tensor, rows: Rows) -> Tensor:
        """Return the output of a cross-attention, its conditional rows led away from the negative one."""
        own = positive if rows is None else positive[rows[0]]
        settings = self.settings
        led = normalized(own, negative, settings.scale or 1.0, settings.tau or 1.0, settings.alpha or 0.0)
        led = led.to(positive.dtype)
        if rows is None:
            return led
        return cat([positive[: rows[0].start], led, positive[rows[0].stop :]])

    def begin_run(self) -> None:
        """Say once if nothing was guided in the run that ended, and forget it."""
        self._warn()
        self._log, self._seen = [], 0
        for guided in self._guided:
            guided.calls = 0
        self._parts.forget()

    def report(self) -> Section | None:
        """Return which forwards were guided."""
        self._warn()
        if not self._seen:
            return None
        steps, calls = sorted({step for step, _ in self._log}), sum(guided.calls for guided in self._guided)
        settings = self.settings
        title = (
            f"nag: scale {settings.scale:g}, tau {settings.tau:g}, alpha {settings.alpha:g}; {len(self._log)} forwards "
            f"guided in {len(steps)} steps, {calls} calls of cross-attention"
        )
        lines = [line for line in (self._nothing(), settings.too_short(self._steps)) if line]
        data = {
            "steps": steps,
            "branches": sorted({branch for _, branch in self._log}),
            "forwards": len(self._log),
            "calls": calls,
        }
        return Section(method=self.name, title=title, lines=tuple(lines), data=data)

    def _nothing(self) -> str | None:
        """Tell why nothing was guided in a run, or None."""
        if not self._seen or self._log:
            return None
        return (
            f"nag guided nothing in {self._seen} forwards: no step from start = {self.settings.start} to stop = "
            f"{self.settings.stop} of the run was conditional; widen the window"
        )

    def _warn(self) -> None:
        if not self._warned and (reason := self._nothing()):
            self._warned = True
            warnings.warn(reason, UnperturbedRun, stacklevel=3)

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        """Return what it costs, in words: cross-attention is no part of what is counted."""
        told = (short,) if (short := self.settings.too_short(steps)) else ()
        if self.neutral:
            return Saving(warnings=told)
        acts = len(self.settings.steps(steps))
        note = f"nag computes the cross-attention of the conditional forward twice in {acts} steps; no forward is added"
        return Saving(notes=(note,), warnings=told)


def _require_uncached(name: str, module: nn.Module) -> None:
    """Refuse a cross-attention whose output one of diffusers' caches carries on: it would mix up both texts."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    if cache := next((hook for hook in hooks if "cache" in hook or "broadcast" in hook), None):
        raise ConfigError(
            f"nag runs {name} twice in a forward, and diffusers' {cache} carries over what it gives: the texts would "
            "mix; take a cache of whole forwards or blocks, or leave cross-attention out of it"
        )
