"""The third branch: a perturbed forward beside the conditional one, folded into what the pipeline gets.

A pipeline mixes its predictions by weights that sum to 1, cond + (s - 1) (cond - unc). So w (cond - perturbed), added
to each prediction of a step alike, is added to the result: unc + s (cond - unc) + w (cond - perturbed), exactly,
whatever s is in that step, in two calls or one, with guidance embedded or off.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError, MissingOption, UnsupportedModel
from ...plan.layout import TokenLayout
from ...report.sections import Section
from ...rules.guidance import added
from ..base import Handler, Model, Place
from ..prompt_branches import Rows, part_of, rows_of_prompt, running_call
from ..saving import Saving
from ..site import ForwardContext, Site, sample_of, with_sample
from .guidance_config import PerturbedConfig
from .guiders import GUIDERS, guided_by, require_own
from .head_specs import first_layer, split_specs
from .log import PerturbedForward, WindowedHandler, distances_of, note_of, strips_of
from .perturbed_blocks import PerturbedBlocks
from .rows import Sample, joined, mapped, plus, require_sample, rows_of, shapes


class PerturbedHandler(WindowedHandler):
    """Guidance away from a perturbed prediction on one model.

    Who writes one says what is perturbed: attention, by `PerturbedHeadsHandler`, or the blocks that are skipped, by
    `skipped_blocks`. All else is here: which prompt a row holds, the third forward and where it may begin, the window
    of steps, pipelines that guide by a guider of their own, and the report.
    """

    places = frozenset({Place.FORWARD})
    exclusive = frozenset({"perturbed prediction"})
    acts_on_blocks: ClassVar[bool] = False
    settings: PerturbedConfig

    option: ClassVar[str] = "layers"
    """The option that names what is perturbed."""

    search: ClassVar[str] = ""
    """What an error says at its end about how to find some."""

    def __init__(self, config: PerturbedConfig, model: Model) -> None:
        super().__init__(config, model)
        self._others: Sequence[Handler] = ()
        self._passes: dict[str, PerturbedBlocks] = {}
        self._added: tuple[int, Sample] | None = None
        self._for_guider: tuple[Sample, Sample] | None = None
        self._compared = False
        self._passed: int | None = None
        self._guiders: tuple[Any, ...] = ()
        if self.specs is None:
            known = model.family.name if model.family is not None else f"a {model.adapter.name} of these sizes"
            raise MissingOption(
                f"{self.name}.{self.option} is not set, and nothing is published for {known}; name some, such as "
                f"L{max(1, model.layers // 3)}{self.search}",
                needs=self.option,
            )

    # What is perturbed.

    @property
    def specs(self) -> tuple[str, ...] | None:
        """What the settings name; None: nothing was set or published."""
        names = getattr(self.settings, self.option)
        return None if names is None else split_specs(names)

    @property
    def published(self) -> Mapping[str, Sequence[str]]:
        """The sets of heads that are published for the model."""
        return {} if self.model.family is None else self.model.family.head_sets

    @property
    def neutral(self) -> bool:
        return self.settings.scale == 0 or not self.specs

    @abstractmethod
    def perturbed_layers(self, site: Site) -> Sequence[int]:
        """Return the attention layers that are perturbed; raise `ConfigError` for those that can't be."""

    def skipped_blocks(self, site: Site) -> frozenset[int]:
        """Return the blocks that a perturbed pass leaves out."""
        return frozenset()

    def perturbed_output(
        self, site: Site, context: ForwardContext, run: Callable[..., Any], given: Mapping[str, Any]
    ) -> Any:
        """Return the perturbed forward's output, with ``given`` in place of its own inputs of these names."""
        return run(**given)

    def describe_perturbation(self) -> str:
        """Return in words what is perturbed."""
        return f"{', '.join(self.specs or ()) or 'nothing'}, scale {self.settings.scale}"

    # What all of them share.

    def check_with(self, others: Sequence[Handler]) -> None:
        """Refuse caches of blocks where blocks are skipped: they count on each block of the branch they follow."""
        self._others = tuple(others)
        if self.acts_on_blocks and (cache := self._block_cache()) is not None:
            raise ConfigError(
                f"{self.name} skips blocks in its branch, and {cache} carries over what blocks give: the branches "
                "would mix; attach a cache of whole forwards, such as EasyCache, or perturb heads with SoftPAG"
            )

    def install(self, site: Site) -> None:
        """Run around every forward of the transformer, and around the blocks that a perturbed pass leaves out."""
        layers = self.perturbed_layers(site)
        skip = self.skipped_blocks(site)
        passes = self._passes[site.name] = PerturbedBlocks(self._first_block(site, layers), skip)
        if self.settings.mode == "branch":
            self._guiders = self._guiders or guided_by(site, self._take_added)
        site.around_forward(lambda context, run: self._around(site, passes, context, run))
        if passes.first is not None or skip:
            site.around_blocks(passes.around, passes.blocks(site.blocks))

    def _block_cache(self) -> str | None:
        """Return the name of a cache of blocks among the other methods, or None; diffusers' own may be one."""
        caches = (other for other in self._others if "cache" in other.exclusive)
        return next((cache.name for cache in caches if Place.BLOCKS in cache.places or cache.objects), None)

    def _first_block(self, site: Site, layers: Sequence[int]) -> int | None:
        """Return the block at which a perturbed pass may begin, or None: it runs whole."""
        if not self.settings.share_prefix or self.settings.mode == "free" or self._block_cache() is not None:
            return None
        if site.compiled or not site.adapter.guidance.share_prefix or not layers:
            return None
        try:
            blocks = {block_of(site, layer) for layer in layers}
        except UnsupportedModel:
            return None
        # A layer beside the blocks may run before all of them; a pass that begins at block 0 saves nothing.
        return None if blocks & {None, 0} else min(filter(None, blocks))

    def _around(self, site: Site, passes: PerturbedBlocks, context: ForwardContext, run: Callable[..., Any]) -> Any:
        latents = context.inputs[site.adapter.latents]
        if not self.acts(context, latents):
            return run()
        part = part_of(self.name, site, context, latents)
        if self.settings.mode == "free":
            rows = rows_of_prompt(site, part, len(latents), "uncond")
            return run() if part in ("cond", "perturbed") else self._perturbed(passes, context, run, rows)
        if part in ("uncond", "perturbed"):
            return self._add_to_uncond(site, context, run)
        return self._perturbed_forward(site, passes, context, run, rows_of_prompt(site, part, len(latents), "cond"))

    def _take_added(self, given: Any) -> Sample | None:
        """Return what a guider adds to the step's result, once; ``given`` is the conditional prediction it gets."""
        if self._for_guider is None:
            return None
        (further, cond), self._for_guider = self._for_guider, None
        if not self._compared:  # once a run, since it waits for the device
            require_own(self.name, given, cond)
            self._compared = True
        return further

    def _left_to_guider(self, site: Site) -> bool:
        """Tell whether the pipeline's guider adds what guidance adds, to its result."""
        if not any(guider is getattr(site.running, name, None) for guider in self._guiders for name in GUIDERS):
            return False
        return not set(site.adapter.guidance.converted) & set(running_call(site.running).classes)

    def _perturbed_forward(
        self, site: Site, passes: PerturbedBlocks, context: ForwardContext, run: Callable[..., Any], rows: Rows
    ) -> Any:
        """Run a forward and the perturbed one of its conditional rows, and add to all rows what guidance adds."""
        left = self._left_to_guider(site)
        if not left:
            self._require_addable(site, context, rows)
        # The conditional pass comes first: it leaves the streams from which the perturbed one may begin.
        with passes.recording():
            output = run()
        sample = require_sample(sample_of(output), site.name)
        inputs, numbers, cond = {}, None, sample
        if rows is not None:
            inputs, cond = rows_of(context.inputs, *rows, site.adapter), sample[rows[0]]
            numbers = range(*rows[0].indices(rows[1]))
        with passes.perturbing(taken=rows) as shared, site.branch(self.name, numbers):
            perturbed = require_sample(sample_of(self.perturbed_output(site, context, run, inputs)), site.name)
        if shapes(cond) != shapes(perturbed):
            raise ConfigError(
                f"{self.name} guides away from a prediction of one shape: the perturbed one has {shapes(perturbed)}, "
                f"the conditional one {shapes(cond)}; take a model of the same latents"
            )
        further = mapped(
            lambda row, other: added(row, other, self.settings.scale or 0.0, self.settings.rescale), cond, perturbed
        )
        self._log.append(note_of(context, cond, perturbed, passes.first if shared else 0))
        if left:  # the pipeline's own guider weighs the predictions, and takes the addend when it mixes them
            self._for_guider = further, cond
            return output
        self._added = context.step_index, further
        return with_sample(output, plus(sample, further if rows is None else joined(further, further)))

    def _require_addable(self, site: Site, context: ForwardContext, rows: Rows) -> None:
        """Refuse a step whose predictions can't all get the same addend, on which the exactness of the sum rests."""
        if rows is not None:
            self._require_folded(site)
        if self._passed == context.step_index:
            raise ConfigError(
                f"{self.name} adds the same to each prediction of a step, and the unconditional forward of step "
                f"{context.step_index} came before the conditional one; run the conditional forward first, or use "
                f"{self.name}.mode = 'free'"
            )

    def _add_to_uncond(self, site: Site, context: ForwardContext, run: Callable[..., Any]) -> Any:
        """Run a forward that is not conditional, and add what the conditional one of the step got."""
        output = run()
        if self._left_to_guider(site):
            return output
        if self._added is None or self._added[0] != context.step_index:
            self._passed = context.step_index
            return output
        self._require_folded(site)
        sample, further = require_sample(sample_of(output), site.name), self._added[1]
        if site.adapter.guidance.uncond_tokens == "last" and isinstance(sample, Tensor) and isinstance(further, Tensor):
            further = F.pad(further, (0, 0, sample.shape[1] - further.shape[1], 0))  # below 0 it cuts
        if shapes(sample) != shapes(further):
            raise ConfigError(
                f"{self.name} can't be folded into {site.name}'s guidance: its branch {context.branch} gives "
                f"{shapes(sample)}, the conditional one {shapes(further)}; use mode = 'free'"
            )
        return with_sample(output, plus(sample, further))

    def _perturbed(self, passes: PerturbedBlocks, context: ForwardContext, run: Callable[..., Any], rows: Rows) -> Any:
        """Run a forward, its unconditional rows (None: all) perturbed."""
        with passes.perturbing(rows=rows):
            output = run()
        self._log.append(PerturbedForward(context.transformer, context.step_index, context.branch, extra=False))
        return output

    def _require_folded(self, site: Site) -> None:
        why = site.adapter.guidance.why_not_folded(running_call(site.running))
        if why is not None:
            raise ConfigError(
                f"{self.name} can't be folded into this pipeline's guidance: {why}, which {self.name} changes; switch "
                f"that off, guide without a negative prompt, or use {self.name}.mode = 'free'"
            )

    def reset(self) -> None:
        self._added = self._for_guider = self._passed = None
        for passes in self._passes.values():
            passes.forget()

    def begin_run(self) -> None:
        super().begin_run()
        self._compared = False

    def nothing_done(self) -> str | None:
        reason = super().nothing_done()
        if reason is None or self.settings.mode == "branch":
            return reason
        return (
            f"{self.name} perturbed nothing: mode = 'free' perturbs the unconditional forward, and none ran; guide by "
            "a negative prompt, or use mode = 'branch'"
        )

    def state_bytes(self) -> int:
        """Return the most memory that was held from the conditional to the perturbed pass since attach."""
        return sum(passes.held for passes in self._passes.values())

    def report(self) -> Section | None:
        self.warn_of_nothing()
        log: list[PerturbedForward] = self._log
        if not self._seen:
            return None
        what, extra = self.describe_perturbation(), sum(entry.extra for entry in log)
        entries = list(zip(log, distances_of(log), strict=True))
        distances = {entry.step_index: distance for entry, distance in entries if distance is not None}
        data: dict[str, Any] = {
            "perturbed": what,
            "steps": sorted({entry.step_index for entry in log}),
            "branches": sorted({entry.branch for entry in log}),
            "forwards_added": extra,
            "first_block": max((entry.first for entry in log), default=0),
            "distance": distances,
        }
        ran = f"{extra} forwards added" if extra or not log else "the unconditional forward was perturbed"
        title = f"{self.name}: {what}; {ran} in {len(data['steps'])} steps"
        strips = strips_of(
            "perturbed",
            [(entry.transformer, entry.step_index, entry.branch, distance) for entry, distance in entries],
            "|cond - perturbed| / |cond|",
        )
        lines = self._report_lines(extra, data["first_block"], [value for _, value in entries if value is not None])
        return Section(method=self.name, title=title, lines=lines, data=data, strips=strips)

    def _report_lines(self, extra: int, first_block: int, distances: list[float]) -> tuple[str, ...]:
        """Say what a reader of the report might not expect: a later start, no effect, or a doubled cost."""
        lines: list[str | None] = []
        if first_block:
            lines.append(f"each began at block {first_block}, from the conditional pass")
        if distances:
            lines.append(f"|cond - perturbed| / |cond|: {min(distances):.3g} to {max(distances):.3g}")
        if extra and self._distilled_into is not None:
            lines.append(
                f"guidance is distilled into {self._distilled_into}, so that each forward added doubles its step"
            )
        if distances and max(distances) == 0:
            lines.append(f"{self.name} changed nothing: the perturbed prediction is the conditional one")
        lines += self.nothing_done(), self.settings.too_short(self._steps)
        return tuple(filter(None, lines))

    @property
    def _distilled_into(self) -> str | None:
        """The name of a family that runs one forward a step, since it learned guidance; None for others."""
        family = self.model.family
        return family.name if family is not None and family.forwards_per_step == 1 else None

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        """Return the third forwards, less what begins at the first perturbed block."""
        window = self.settings.steps(steps)
        notes = (self.describe_perturbation(),)
        notices = (short,) if (short := self.settings.too_short(steps)) else ()
        if self.settings.mode == "free" or self.neutral:
            return Saving(notes=notes, warnings=notices)
        if self._distilled_into is not None:
            notes += (
                f"guidance is distilled into {self._distilled_into}: {self.name} doubles the forwards it acts in",
            )
        layers, shared = max(1, self.model.layers), self.model.adapter.guidance.share_prefix
        first = (self.first_layer() or 0) if self.settings.share_prefix and shared else 0
        part = 1 - first / layers
        if first:
            notes += (f"{self.name}'s third forward begins at block {first} of {layers}, saving {1 - part:.0%} of it",)
        return Saving(extra_forwards=len(window) * part, notes=notes, warnings=notices)

    def first_layer(self) -> int | None:
        """Return the first perturbed layer, without a model; None where that is not known."""
        specs = [name for spec in self.specs or () for name in self.published.get(spec, (spec,))]
        return first_layer(specs, self.model.layers, max(1, self.model.heads))


def block_of(site: Site, layer: int) -> int | None:
    """Return the main block that holds an attention layer; None: it lies beside them."""
    name = site.attention[layer]
    return next((block.index for block in site.blocks if name.startswith(f"{block.name}.")), None)
