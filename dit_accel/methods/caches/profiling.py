"""ProfilingCache: listed blocks are cached over listed steps, the others always run.

Source: ProfilingDiT (arXiv 2504.03140), which lists the blocks that attend to the background. Where we depart from it:
a run of cached blocks may begin at block 0, which its code stores at a wrong place; any predictor in place of holding;
schedules are rescaled to the run's steps; what a model adds between two blocks is always this step's own.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Self

import torch

from ...adapters.blocks import Streams
from ...adapters.installed import families
from ...errors import ConfigError, MissingOption
from ...plan.layout import TokenLayout
from ...report.sections import Section
from ...rules import block_schedule
from ..base import Model
from ..options import JSON_FILE, NO_FILE, Count, Rule
from ..saving import Saving
from ..site import Block, Site
from ..steps import unknown_steps
from .block_numbers import kinds_of, read_numbers, require_there, spell_numbers
from .cache_config import StepCacheConfig
from .db import takes_skips
from .history import History
from .log import extended
from .profile_file import cached_in, read_profile, require_weights
from .spans import Pass, Span, SpanHandler

BLOCKS = ("blocks", "blocks_2", "refresh_2")
SCHEDULE = ("every", "refresh", "refresh_2", "measured_steps")
Rising = Annotated[
    tuple[int, ...], Rule("a list of steps from 0 on, rising", lambda at: at and at[0] >= 0 and [*at] == sorted({*at}))
]
"""Steps of a run."""
USUAL = {"every": 6, "measured_steps": 50}
"""The schedule where neither sets any: what the paper runs Wan 2.1 14B with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilingCache(StepCacheConfig):
    """Runs some blocks at every step and forecasts what the others add (ProfilingDiT, arXiv 2504.03140).

    Blocks are numbered from 0 over all lists of the model, in running order. Consecutive cached blocks share one stored
    tensor a stream. What is skipped is known before the run: nothing is measured, the device is never waited for.

    Attributes:
        blocks: the blocks that are cached, such as ``"0, 2-7"``; or the ``.json`` file of ``dit-accel tune profile``.
            Unset: those published for the model.
        every: the cached blocks run at every n-th step after the first ones.
        refresh: the steps at which they run, instead of ``every``.
        blocks_2: further cached blocks, which run at the steps ``refresh_2``.
        refresh_2: those steps.
        measured_steps: ``every`` and both lists are those of a run of so many steps, and are rescaled to others;
            unset: they are taken as they are.
        offload: where what is stored waits between the steps: ``cpu`` frees the accelerator's memory and copies it
            there and back.
    """

    name: ClassVar[str] = "profilingcache"
    defaults: ClassVar[Mapping[str, Any]] = {
        "warmup_steps": 0.12, "last_steps": 0, **dict.fromkeys((*BLOCKS, *SCHEDULE)),
    }  # fmt: skip

    blocks: Annotated[str, JSON_FILE] | tuple[int, ...] | None = None
    every: Count | None = None
    refresh: Rising | None = None
    blocks_2: Annotated[str, NO_FILE] | tuple[int, ...] | None = None
    refresh_2: Rising | None = None
    measured_steps: Count | None = None
    offload: Literal["none", "cpu"] = "none"

    def __post_init__(self) -> None:
        StepCacheConfig.__post_init__(self)
        self.require_one_of("every", "refresh", of="when the cached blocks run")
        for option in ("refresh", "refresh_2"):
            if (step := self._step_beyond(option, self.measured_steps)) is not None:
                raise ConfigError(
                    f"profilingcache.{option} lists step {step}, and the run that it was measured in has "
                    f"profilingcache.measured_steps = {self.measured_steps}, numbered from 0; correct one of them"
                )
        if (self.blocks_2 is None) != (self.refresh_2 is None) or (self.blocks_2 and self.blocks is None):
            raise ConfigError(
                "profilingcache.blocks_2 and profilingcache.refresh_2 are a second list of blocks and its steps, "
                "beside profilingcache.blocks; give all of them, or neither"
            )
        if self._file is not None:  # which is read when it meets a model, and not here
            if self.blocks_2 is not None:
                raise ConfigError("profilingcache.blocks_2 can't be given beside a profile, which names all blocks")
            return
        counts = Counter(itertools.chain(*self.groups()))
        if both := sorted(block for block, count in counts.items() if count > 1):
            raise ConfigError(f"profilingcache.blocks and blocks_2 both name block {both[0]}; name it once")

    def _step_beyond(self, option: str, count: int | None) -> int | None:
        """Return the last step of a list if it lies beyond a run of ``count`` steps, which may be unknown."""
        listed = getattr(self, option)
        return listed[-1] if listed and count is not None and listed[-1] >= count else None

    def _sets(self, options: Sequence[str]) -> bool:
        return any(getattr(self, option) is not None for option in options)

    @property
    def _file(self) -> str | None:
        return self.blocks if isinstance(self.blocks, str) and self.blocks.endswith(".json") else None

    def filled(self, recipe: Mapping[str, Any] | None = None) -> Self:
        """Return the config with every unset option filled in; a recipe's blocks or schedule go together."""
        left = dict(recipe or {})
        for part in (BLOCKS, SCHEDULE):
            if self._sets(part):
                left = {option: value for option, value in left.items() if option not in part}
        if "refresh_2" not in left and "blocks_2" in left:  # one schedule for all the blocks of the recipe
            numbers = [read_numbers(left.pop(option), f"profilingcache.{option}") for option in ("blocks", "blocks_2")]
            left["blocks"] = spell_numbers([*numbers[0], *numbers[1]])
        if not self._sets(("every", "refresh")) and left.keys().isdisjoint(("every", "refresh")):
            left |= {"every": USUAL["every"]} if self._sets(SCHEDULE) else USUAL
        full: Any = StepCacheConfig.filled(self, left)
        return full

    def groups(self, transformer: str = "transformer") -> tuple[tuple[int, ...], ...]:
        """Return a transformer's cached blocks by schedule; raise `ConfigError` for numbers that can't be read."""
        option = "profilingcache.blocks"
        if (file := self._file) is not None:
            return (cached_in(read_profile(file, option), file, option, transformer),)
        lists = {option: self.blocks, "profilingcache.blocks_2": self.blocks_2}
        return tuple(read_numbers(blocks, name) for name, blocks in lists.items() if blocks is not None)

    def transformers(self) -> tuple[str, ...]:
        """Return the transformers that have lists of their own; any one where all have the same."""
        file = self._file
        return ("transformer",) if file is None else tuple(read_profile(file, "profilingcache.blocks")["transformers"])

    def refreshes(self, group: int, index: int, count: int | None) -> bool:
        """Tell whether the blocks of a group run at step ``index`` of a run of ``count`` steps; None: not known."""
        option, measured = "refresh_2" if group else "refresh", self.measured_steps
        if count is None and measured is not None:
            raise unknown_steps(self, "measured_steps", "set profilingcache.every alone")
        listed = getattr(self, option)
        if listed is None:
            first, every = self.first_steps(measured or count), self.every
            assert every is not None
            if measured is None:
                return index >= first and (index - first) % every == 0
            listed = tuple(range(first, measured, every))
        if measured is None and (step := self._step_beyond(option, count)) is not None:
            raise ConfigError(
                f"profilingcache.{option} lists step {step}, and this run has {count} steps, numbered from 0; "
                f"list steps of this run, or set profilingcache.measured_steps to rescale them"
            )
        return index in _steps_at(listed, measured, count)


@lru_cache(maxsize=64)
def _steps_at(listed: tuple[int, ...], measured: int | None, count: int | None) -> frozenset[int]:
    if measured is None:
        return frozenset(listed)
    assert count is not None
    return frozenset(block_schedule.rescaled_steps(listed, measured, count))


class ProfilingHandler(SpanHandler):
    """ProfilingCache on one model."""

    config_type = ProfilingCache
    settings: ProfilingCache

    def __init__(self, config: ProfilingCache, model: Model) -> None:
        super().__init__(config, model)
        self._groups: dict[str, dict[int, int]] = {}  # transformer -> cached block -> its group

    @classmethod
    def recipe(cls, config: Any, model: Model) -> Mapping[str, Any]:
        recipe = super().recipe(config, model)
        if config.blocks is None and "blocks" not in recipe:
            known = sorted(name for name, family in families().items() if config.name in family.recipes)
            raise MissingOption(
                f"profilingcache has no blocks for {model.name!r}, only for {', '.join(known)}; measure them with "
                "dit-accel tune profile and set profilingcache.blocks to its file, or name them, such as '0, 2-7'",
                needs="blocks",
            )
        return recipe

    def install(self, site: Site) -> None:
        """Run around the forward and its cached blocks; raise `ConfigError` if lists or profile are not the model's."""
        settings, option = self.settings, "profilingcache.blocks"
        groups = settings.groups(site.name)
        if (file := settings._file) is not None:
            require_weights(read_profile(file, option), file, option, site.name, site.transformer)
        for name, blocks in zip((option, f"{option}_2"), groups, strict=False):
            require_there(blocks, name, site.name, len(site.blocks), kinds_of(site.blocks))
        self._groups[site.name] = {block: number for number, blocks in enumerate(groups) for block in blocks}
        chosen = tuple(block for block in site.blocks if block.index in self._groups[site.name])
        alone = [block for block in site.blocks if block not in chosen or len(groups) > 1]
        if stuck := [block.name for block in alone if takes_skips(block)]:
            raise ConfigError(
                f"{option} may let {stuck[0]} of {site.name} run where earlier blocks, whose results it takes besides "
                "its streams, are skipped; cache all such blocks together, or use a cache of whole forwards, such as "
                "EasyCache"
            )
        self.cover_blocks(site, chosen)

    def skips(self, now: Pass, block: Block, streams: Streams) -> bool:
        return self._reused(now, self._groups[now.context.transformer][block.index])

    def joins(self, now: Pass, block: Block) -> bool:
        groups = self._groups[now.context.transformer]
        return groups[block.index] == groups[now.called]

    def due(self, now: Pass) -> list[Span]:
        """Return the stored spans of groups that don't run at this step."""
        groups = self._groups[now.context.transformer]
        return [span for span in super().due(now) if self._reused(now, groups[span[0]])]

    def _reused(self, now: Pass, group: int) -> bool:
        groups, step = self._groups[now.context.transformer], now.context
        stored = any(groups[last] == group for last in now.stored)
        return stored and not self.settings.refreshes(group, step.step_index, step.num_inference_steps)

    def _must_compute(self, context: Any, decision: Any) -> str | None:
        groups = {*self._groups[context.transformer].values()}
        refreshed = [  # read first, so that a list that is too long is refused at the first step
            self.settings.refreshes(group, context.step_index, context.num_inference_steps) for group in groups
        ]
        why = super()._must_compute(context, decision)
        return "refreshed" if why is None and all(refreshed) else why

    def _new_history(self, shapes: Any, beside: bool) -> History:
        assert self._start is not None
        held_on = torch.device("cpu") if self.settings.offload == "cpu" else None
        return History(self.settings, shapes, self._start, self._reach, beside, held_on)

    def report(self) -> Section | None:
        cached = {name: spell_numbers(groups) for name, groups in self._groups.items()}
        lines = [f"{name}: blocks {blocks} of {self._counts[name]} are cached" for name, blocks in cached.items()]
        return extended(super().report(), lines, cached=cached)

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        settings, family = self.settings, self.model.family
        lists = [settings.groups(name) for name in settings.transformers()]
        rows, width = self.forwards_cached(), 0
        if family is not None:
            width = family.heads * family.head_dim
            for blocks in itertools.chain(*lists):
                require_there(blocks, "profilingcache.blocks", family.name, family.layers)
        spans = max(sum(len(block_schedule.runs_of(blocks)) for blocks in groups) for groups in lists)
        held = 2 * rows * spans * settings.kept_points * layout.tokens * width  # bytes of bfloat16
        note = f"profilingcache.blocks has {len(lists)} lists; how long each runs is not known: their mean is counted"
        return Saving(
            blocks=rows * sum(self._skipped(groups, steps) for groups in lists) / len(lists),
            carried_bytes=0 if settings.offload == "cpu" else held,
            notes=(note,) if len(lists) > 1 else (),
        )

    def _skipped(self, groups: tuple[tuple[int, ...], ...], steps: int) -> int:
        """Count the blocks that the lists of one transformer skip over a run."""
        settings = self.settings
        skipped: list[int] = []

        def skips(index: int, in_a_row: int) -> bool:
            skipped.append(
                sum(len(blocks) for at, blocks in enumerate(groups) if not settings.refreshes(at, index, steps))
            )
            return skipped[-1] > 0

        settings.skipped_steps(steps, skips)
        return sum(skipped)
