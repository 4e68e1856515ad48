"""NAG where text joins the self-attention: a row more for each conditional one, which holds the negative text."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...adapters.joined_text import JoinedText
from ...errors import ConfigError
from ...plan.context import CallContext
from ...plan.normalized_guidance import NormalizedGuidance
from ...plan.plan import AttentionPlan
from ..prompt_branches import Rows
from ..site import ForwardContext, Site, sample_of, with_sample
from .negative_text import require_width
from .rows import require_sample, with_rows_again


class JointNAG:
    """One transformer that gets a negative text beside the prompt while a guided forward runs.

    The rows that hold it come last. What is no text stands the same in both rows of a pair, as each attention call
    leads it; so the negative row differs in its text alone, and its prediction is the prompt's.

    Args:
        embeds: the negative text, [1, tokens, C], without padding where the model masks padded text.
        encode: makes the negative text of another length; None: it is as it was given.
    """

    kind = "joined attention"

    def __init__(
        self, site: Site, where: JoinedText, embeds: Tensor, settings: Any, encode: Callable[[int], Tensor] | None
    ) -> None:
        self._site, self._where, self._embeds, self._settings = site, where, embeds, settings
        self._encode = encode
        self._pairs: tuple[slice, slice] = slice(0, 0), slice(0, 0)
        self._tokens = 0
        self.on = False  # a guided forward runs
        self.calls = 0  # attention calls that were guided since the run began

    def guided(self, context: ForwardContext, rows: Rows, run: Callable[..., Any]) -> Any:
        """Run a forward whose conditional rows (None: all) are guided away from the negative text."""
        batch = len(context.inputs[self._site.adapter.latents])
        cond = slice(0, batch) if rows is None else rows[0]
        inputs = with_rows_again(context.inputs, cond, batch, self._site.adapter)
        inputs.update(self._texts(context.inputs, cond, batch))
        self._pairs = cond, slice(batch, batch + cond.stop - cond.start)
        self._tokens = inputs[self._where.text].shape[1]
        self.on = True
        try:
            with self._site.branch("nag", [*range(batch), *range(cond.start, cond.stop)]):
                output = run(**inputs)
        finally:
            self.on = False
        return with_sample(output, require_sample(sample_of(output), self._site.name)[:batch])

    def plan(self, plan: AttentionPlan, context: CallContext) -> AttentionPlan:
        """Return a call's plan with the prompt's rows guided away from those of the negative text."""
        positive, negative = self._pairs
        layout = context.layout
        text = layout.text_before if self._where.place == "before" else layout.text_after
        if not text:
            return plan  # an attention over the picture alone, which is the same in both rows
        if context.batch != negative.stop:
            raise ConfigError(
                f"nag compares the rows of {context.transformer}'s attention, {negative.stop} in this forward, and "
                f"layer {context.layer} attends over {context.batch}; detach it"
            )
        if text < self._tokens + self._where.registers:
            raise ConfigError(
                f"nag gave {context.transformer} a text of {self._tokens} tokens, and layer {context.layer} attends "
                f"over {text}; correct the adapter's joined_text, or detach nag"
            )
        self.calls += 1
        settings = self._settings
        return plan.guide(
            NormalizedGuidance(
                positive=positive,
                negative=negative,
                tokens=self._where.others(self._tokens, layout.tokens),
                scale=settings.scale,
                tau=settings.tau,
                alpha=settings.alpha,
                heads=context.heads,
            )
        )

    def _texts(self, inputs: Any, cond: slice, batch: int) -> dict[str, Tensor]:
        """Return the forward's text with the negative one in further rows, and the mask of both where there is one.

        One row of text may serve all of the batch: the model broadcasts it.
        """
        where, name = self._where, self._site.name
        if held := next((extra for extra in where.alone if inputs.get(extra) is not None), None):
            raise ConfigError(
                f"{name} is given {held}, which holds the prompt's rows alone, so that nag can't lay a negative text "
                "beside them; generate without it, or detach nag"
            )
        prompt = require_width(inputs.get(where.text), self._embeds, name)
        prompt = prompt.expand(batch, -1, -1) if len(prompt) == 1 else prompt
        if where.mask is None and self._encode is not None and self._embeds.shape[1] != prompt.shape[1]:
            self._embeds = self._encode(prompt.shape[1])
        text = self._embeds.to(device=prompt.device, dtype=prompt.dtype).expand(cond.stop - cond.start, -1, -1)
        mask = None if where.mask is None else inputs.get(where.mask)
        if mask is None and prompt.shape[1] == text.shape[1]:
            return {where.text: torch.cat([prompt, text])}
        if where.mask is None:
            raise ConfigError(
                f"nag's negative text has {text.shape[1]} tokens and {name} gets a prompt of {prompt.shape[1]}; "
                "without a mask they must be as long; make negative_embeds as the prompt's embeddings are made"
            )
        if mask is None:
            mask = torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
        mask = mask.expand(batch, -1) if len(mask) == 1 else mask
        valid = torch.ones(text.shape[:2], dtype=mask.dtype, device=mask.device)
        return {where.text: _joined(prompt, text), where.mask: _joined(mask, valid)}


def _joined(prompt: Tensor, text: Tensor) -> Tensor:
    """Return the rows of both, [B, T, ...], with zeros behind the shorter ones."""
    tokens = max(prompt.shape[1], text.shape[1])
    return torch.cat([pad(x, (*(0, 0) * (x.ndim - 2), 0, tokens - x.shape[1])) for x in (prompt, text)])
