"""CFGCache: the unconditional forward is left out of some steps, and made of the conditional one and what is kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from ...errors import ConfigError
from ...plan.layout import TokenLayout
from ...report.sections import Section
from ..caches.cache_config import ALONE, ExpertSteps, StepCacheConfig
from ..caches.engine import StepCacheHandler, StepDecision
from ..options import Steps, gt
from ..prompt_branches import part_of, rows_of_prompt, running_call
from ..saving import Saving
from ..site import ForwardContext, Site
from ..steps import end_steps
from .rows import joined, rows_of


@dataclass(frozen=True, slots=True, kw_only=True)
class CFGCache(StepCacheConfig):
    """Leaves the unconditional forward out of some steps: in its place is cond less the last computed cond - uncond.

    Source: FasterCache's CFG-Cache (arXiv 2410.19355), without its bands, and the gate of Adaptive Guidance (arXiv
    2312.12487), with the difference behind it. ``stored`` and ``branches`` have one value each.

    Attributes:
        max_consecutive: most steps in a row without one; those that a step cache skips do not count.
        gate: the step behind the warm-up from which none is computed any more; below 1 a share of the run; unset: none.
    """

    name: ClassVar[str] = "cfgcache"
    defaults: ClassVar[Mapping[str, Any]] = {"warmup_steps": 0.2, "last_steps": 0, "max_consecutive": 1}
    gate: Annotated[Steps, gt(0)] | None = None
    stored: Literal["output"] = "output"
    branches: Literal["uncond"] = "uncond"

    def most_skipped(self, in_a_row: int, index: int, count: int | None, expert: ExpertSteps = ALONE) -> str | None:
        gate, _ = end_steps(self, "gate", "last_steps", count)
        if count is not None and gate >= count:
            raise ConfigError(f"cfgcache.gate = {self.gate} lies outside this run of {count} steps; set one of them")
        return None if gate and index >= gate else StepCacheConfig.most_skipped(self, in_a_row, index, count, expert)


class CFGCacheHandler(StepCacheHandler):
    """CFGCache on one model."""

    config_type = CFGCache
    exclusive = frozenset({"unconditional prediction"})

    def _around(self, context: ForwardContext, run: Callable[..., Any], site: Site) -> Any:
        guidance, latents = site.adapter.guidance, context.inputs[site.adapter.latents]
        if context.beside is not None or self.is_trained(context, latents):
            return run()
        if guidance.calls_of(running_call(site.running)) == "alone":
            raise ConfigError(f"cfgcache: no forward of {type(site.running).__name__} is unconditional; detach it")
        part, count = part_of(self.name, site, context, latents), context.num_inference_steps
        if part == "perturbed" or (count and not self.settings.skipped_steps(count)):
            return run()
        if part != "both":
            return self._of_prompt(part, context, run, site)
        outputs: dict[str, Any] = {}
        for prompt in ("cond", "uncond"):  # each in a branch of its own, as where a pipeline calls them in turn
            rows, batch = rows_of_prompt(site, part, len(latents), prompt) or (slice(None), 0)
            inputs = rows_of(context.inputs, rows, batch, site.adapter)
            half = replace(context, inputs={**context.inputs, **inputs})
            with site.branch(prompt, range(*rows.indices(batch))):
                outputs[prompt] = self._of_prompt(prompt, half, partial(run, **inputs), site)
        return joined(outputs.pop(guidance.first_rows), *outputs.values())

    def _of_prompt(self, prompt: str, context: ForwardContext, run: Callable[..., Any], site: Site) -> Any:
        """Run or make the forward of one prompt; the unconditional one is kept as what it is off the other by."""
        cond, beside = self._histories.get((site.name, "cond")), None if prompt == "cond" else "cond"
        known = (
            cond and cond.points and (cond.points[-1].step, cond.shapes) == (context.step_index, self._shapes(context))
        )
        if beside and not (known and site.adapter.guidance.uncond_tokens == "all"):
            raise ConfigError(f"cfgcache needs {site.name}'s conditional forward, of as many tokens, first; detach it")
        return super()._around(replace(context, branch=prompt, beside=beside), run, site)

    def _must_compute(self, context: ForwardContext, decision: StepDecision) -> str | None:
        caches = [other for other in self._others if isinstance(other, StepCacheHandler)]
        led = [cache._decisions.get((context.transformer, "")) for cache in caches]
        if self._stored(context) and any(one and one.reuse and one.step == context.step_index for one in led):
            decision.in_a_row -= 1  # a step that a cache skips does not count
            return None
        return super()._must_compute(context, decision)

    def report(self) -> Section | None:
        section = super().report()
        if section is None or any(entry.branch == "uncond" for entry in self._log):
            return section
        why = "no forward was unconditional: guide by a negative prompt (FLUX: true_cfg_scale above 1), or detach it"
        return replace(section, lines=(*section.lines, why))

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        return self.counted(self.settings.skipped_steps(steps))
