"""NAG where text comes in by cross-attention: it runs on the negative text as well, and is guided away from that."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, cat, nn

from ...adapters.cross_attention import CrossAttention
from ...errors import ConfigError
from ...rules.guidance import normalized
from ..prompt_branches import Rows
from ..site import ForwardContext, Site
from .negative_text import require_width
from .rows import rows_of


class CrossAttentionNAG:
    """One transformer whose cross-attention is guided away from a negative text while a guided forward runs.

    ``embeds``: the negative text, [1, tokens, C].
    """

    kind = "cross-attention"

    def __init__(self, site: Site, where: CrossAttention, embeds: Tensor, settings: Any) -> None:
        projection = where.projecting(site.transformer)
        self._site, self._where, self._embeds, self._settings = site, where, embeds, settings
        self._on = False
        self._rows: Rows = None
        self._tokens = 0
        self._ready: Tensor | None = None if projection is not None else embeds
        self.calls = 0  # guided calls of cross-attention since the run began
        if projection is not None:
            site.around_module(projection, self._project)
        for name, module in where.found(site.transformer).items():
            site.around_module(module, self._around(name, module))

    def guided(self, context: ForwardContext, rows: Rows, run: Callable[..., Any]) -> Any:
        """Run a forward whose conditional rows (None: all) are guided away from the negative text."""
        prompt = require_width(context.inputs.get(self._where.text), self._embeds, self._site.name)
        ready, self._on, self._rows, self._tokens = self._ready, True, rows, prompt.shape[1:-1].numel()
        try:
            return run()
        finally:
            self._on, self._ready = False, ready

    def _project(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the transformer's projection on the prompt and, in a guided forward, on the negative text as well."""
        if self._on:
            prompt = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            embeds = self._embeds.to(device=prompt.device, dtype=prompt.dtype)
            self._ready = run(embeds, *args[1:], **kwargs) if args else run(**{**kwargs, next(iter(kwargs)): embeds})
        return run(*args, **kwargs)

    def _beside(self, context: Tensor) -> Tensor:
        """Return the text of a cross-attention, [B, tokens, C], with the negative text in place of the prompt."""
        text = self._ready
        if text is None:
            raise ConfigError(
                f"{self._site.name} did not project its text in this forward, so that nag has no negative one; detach "
                "it"
            )
        text = text.to(device=context.device, dtype=context.dtype).expand(len(context), -1, -1)
        front = context.shape[1] - self._tokens
        if front <= 0:
            return text
        if text.shape[1] != self._tokens:
            raise ConfigError(
                f"nag's negative text has {text.shape[1]} tokens and the prompt {self._tokens}; beside pictures they "
                "must be as long: leave max_sequence_length unset, or pad negative_embeds as the prompt"
            )
        return cat([context[:, :front], text], dim=1)

    def _around(self, name: str, module: Any) -> Callable[..., Any]:
        """Return the function in place of a cross-attention: itself with the negative text, then with the prompt."""
        names = list(inspect.signature(type(module).forward).parameters)[1:]

        def around(run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            if not self._on:
                return run(*args, **kwargs)
            _require_uncached(name, module)
            inputs, rows = {**dict(zip(names, args, strict=False)), **kwargs}, self._rows
            if rows is not None:
                inputs = rows_of(inputs, *rows)
            inputs["encoder_hidden_states"] = self._beside(inputs["encoder_hidden_states"])
            if "attention_mask" in inputs:  # it is the prompt's; the negative text has no padding
                inputs["attention_mask"] = None
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

            def guide(run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                return run(self._guided(args[0], outputs[0], rows), *args[1:], **kwargs)

            site = self._site
            with site.stand_in(module.to_q, keep), site.stand_in(module.to_out[0], catch):
                run(**inputs)
            if len(outputs) != 1:
                raise ConfigError(
                    f"{name} ran its output projection {len(outputs)} times in one call, so that nag can't tell its "
                    "output; detach it, or take the model's own attention processor"
                )
            self.calls += 1
            with site.stand_in(module.to_q, reuse), site.stand_in(module.to_out[0], guide):
                return run(*args, **kwargs)

        return around

    def _guided(self, positive: Tensor, negative: Tensor, rows: Rows) -> Tensor:
        prompt = positive if rows is None else positive[rows[0]]
        settings = self._settings
        guided = normalized(prompt, negative, settings.scale, settings.tau, settings.alpha).to(positive.dtype)
        if rows is None:
            return guided
        return cat([positive[: rows[0].start], guided, positive[rows[0].stop :]])


def _require_uncached(name: str, module: nn.Module) -> None:
    """Refuse a cross-attention whose output one of diffusers' caches carries on: it would mix up both texts."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    if cache := next((hook for hook in hooks if "cache" in hook or "broadcast" in hook), None):
        raise ConfigError(
            f"nag runs {name} twice in a forward, and diffusers' {cache} carries over what it gives: the texts would "
            "mix; take a cache of whole forwards or blocks, or leave cross-attention out of it"
        )
