"""ReferenceCache: keys and values of reference images are kept for some steps, in which their tokens are left out."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from ...plan.layout import TokenLayout
from ...report.sections import Section
from ..base import Handler, Model, Phase, Place
from ..config import MethodConfig, config
from ..options import Count
from ..saving import Saving
from ..site import ForwardContext, Site, sample_of, with_sample


@config
class ReferenceCache(MethodConfig):
    """Keeps the keys and values of reference images for some steps, in which their tokens are not computed.

    Attributes:
        refresh_every: one step in so many computes the reference tokens; 1: all do.
        warmup_steps: first steps that compute them.
    """

    name = "referencecache"
    defaults: ClassVar[Mapping[str, Any]] = {"refresh_every": 2, "warmup_steps": 1}

    refresh_every: Count | None = None
    warmup_steps: Count | None = None


class ReferenceHandler(Handler):
    """ReferenceCache on one model; step caches lie around it."""

    config_type = ReferenceCache
    phase = Phase.CORRECTIONS
    places = frozenset({Place.FORWARD})
    exclusive = frozenset({"tokens of blocks"})

    def __init__(self, config: ReferenceCache, model: Model) -> None:
        super().__init__(config, model)
        if not isinstance(model.adapter.references, tuple):
            raise ConfigError(
                f"{self.name} keeps keys of reference images, and {model.adapter.name} has none to keep: "
                f"{model.adapter.references or 'its adapter describes none'}; attach it to FLUX.1 Kontext, FLUX.2 or "
                "Qwen-Image-Edit"
            )
        # (transformer, branch) -> step, layout, batch, layer -> the reference tokens' keys and values, their prediction
        self._kept: dict[tuple[str, str], Any] = {}
        self._now: tuple[TokenLayout, dict[int, Any], Any] | None = None  # of the forward that runs, with its rows
        self.begin_run()

    def install(self, site: Site) -> None:
        for index, name in site.attention.items():
            module = site.transformer.get_submodule(name)
            site.around_module(module, lambda run, args, kwargs: run(*args, **kwargs))  # refuses compiled ones
            site.replace(module.processor, "_dit_accel_keys", partial(self._pass, index))
        site.around_forward(partial(self._around, site))

    def reset(self) -> None:
        self._kept, self._now = {}, None

    def begin_run(self) -> None:
        self._counts = {"tokens": 0, "left_out": 0, "computed": 0}

    def report(self) -> Section | None:
        title = "{tokens} reference tokens were left out of {left_out} forwards, and computed in {computed}"
        return Section(method=self.name, title=f"{self.name}: {title.format(**self._counts)}", data=self._counts)

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        family, tokens = self.model.family, layout.visual_tokens  # as one reference image of the output's size has
        width = family.heads * family.head_dim * family.layers * family.forwards_per_step if family else 0
        note = f"the time that {self.name} saves is not counted; its memory is that of {tokens} reference tokens"
        return Saving(counted=False, carried_bytes=4 * tokens * width, notes=(note,))

    def _pass(self, layer: int, k: Tensor, v: Tensor, mask: Any, axis: int) -> tuple[Tensor, Tensor, Any]:
        """Keep the reference tokens' keys and values where they are computed, else lay those behind the others."""
        if self._now is None:
            return k, v, mask
        layout, layers, rows = self._now
        count, others = layout.text_after, layout.tokens - layout.text_after
        if k.shape[axis] == layout.tokens:
            layers[layer] = k.narrow(axis, others, count).clone(), v.narrow(axis, others, count).clone()
        elif rows is not None and k.shape[axis] == others:  # an IP-Adapter has keys of its own
            k, v = (torch.cat([x, more[rows]], axis) for x, more in zip((k, v), layers[layer], strict=True))
            mask = mask if mask is None else F.pad(mask, (0, count), value=mask.dtype == torch.bool)
        return k, v, mask

    def _around(self, site: Site, context: ForwardContext, run: Callable[..., Any]) -> Any:
        layout, every, self._now = context.layout, self.settings.refresh_every, None
        if layout is None or not layout.text_after or every == 1 or torch.is_grad_enabled():
            return run()
        # a forward inside another reads what that one kept, and is whole where that one is
        step, key = context.step_index, (context.transformer, context.branch.partition("/")[0])
        since, of, batch, layers, sample = self._kept.get(key, (-every, None, None, {}, None))
        fits = of == layout and (batch == context.batch or context.rows is not None)
        self._counts["tokens"] = layout.text_after
        if fits and 0 < step - since < every and step >= self.settings.warmup_steps:
            rows = slice(None) if batch == context.batch or context.rows is None else [*context.rows]
            self._counts["left_out"] += 1
            self._now = layout, layers, rows
            out = self._run_without(site, context.inputs, run, layout)
            return with_sample(out, torch.cat([sample_of(out), sample[rows]], 1))
        layers = {}
        self._counts["computed"] += 1
        self._now = layout, layers, None
        out = run()
        if len(layers) == self.model.layers and since != step:  # guidance may skip some
            self._kept[key] = step, layout, context.batch, layers, sample_of(out)[:, layout.visual_tokens :].clone()
        self.note_held(sum(x.nbytes for kept in self._kept.values() for pair in kept[3].values() for x in pair))
        return out

    def _run_without(self, site: Site, inputs: Mapping[str, Any], run: Callable[..., Any], layout: TokenLayout) -> Any:
        adapter, count = cast(Any, site.adapter), layout.visual_tokens
        sizes = next((inputs[name] for name in adapter.references if isinstance(inputs[name], list)), [])
        cut: dict[str, Any] = {
            name: [row[: layout.frames] for row in sizes] if sizes is inputs[name] else inputs[name][..., :count, :]
            for name in adapter.references
        }

        def place(run: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            image, text = run(sizes, *args[1:], **kwargs)  # text stands where the largest image ends
            return image[:count], text

        rope = site.transformer.get_submodule(adapter.rope.owner)
        with site.stand_in(rope, place) if sizes else nullcontext():
            return run(whole=inputs, **cut)
