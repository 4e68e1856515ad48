"""What a method is to the core: a handler, found by the type of its config, that acts at one place or several."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from ..adapters.adapter import Adapter, Family
from ..adapters.noise import Noise, noise_of
from ..errors import MissingOption
from ..plan.call import Call
from ..plan.context import CallContext, StepContext
from ..plan.layout import TokenLayout
from ..plan.plan import AttentionPlan, KernelResult
from ..plan.rests import Rests
from ..plan.tiling import Tiling
from ..report.sections import Section
from .config import MethodConfig
from .saving import Saving
from .site import Site


class Phase(enum.IntEnum):
    """When a method acts, in whatever order the user lists them.

    Attention plans are filled from the first phase to the last: transforms stand before what selects by logits, so that
    a selection may see them. Around forwards and blocks a later phase lies further out: guidance around caches around
    the model.
    """

    POSITIONS = enum.auto()
    LISTS = enum.auto()
    TRANSFORMS = enum.auto()
    PATTERNS = enum.auto()
    SELECTIONS = enum.auto()
    CORRECTIONS = enum.auto()
    SIZES = enum.auto()
    CACHES = enum.auto()
    GUIDANCE = enum.auto()


class Place(enum.Enum):
    """Where a method acts."""

    ATTENTION = "attention"
    FORWARD = "forward"
    BLOCKS = "blocks"
    POSITIONS = "positions"
    TEXT = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a handler may know of the model it is attached to.

    Attributes:
        adapter: the model's adapter.
        family: the released model it has the sizes of, or None.
        heads: attention heads, H.
        layers: attention modules that the adapter names in one transformer.
        tiling: how all methods of the attachment cut a sequence into tiles.
        config: the transformer's config; None: there is no transformer yet, only a family's sizes.
        scheduler: the pipeline's; None: it has none, or there is no pipeline.
    """

    adapter: Adapter
    family: Family | None
    heads: int
    layers: int
    tiling: Tiling = Tiling()  # noqa: RUF009 - frozen
    config: Mapping[str, Any] | None = None
    scheduler: Any = None

    @property
    def noises(self) -> tuple[Noise, ...]:
        """Which noise levels a run may tell: the scheduler's, else those of released pipelines; empty: not known."""
        if (noise := noise_of(self.scheduler)) is not None:
            return (noise,)
        return self.adapter.noise if self.config is None else ()  # loops around a transformer alone may state theirs

    @property
    def noise_source(self) -> str:
        """What tells the noise level."""
        if self.scheduler is not None:
            return type(self.scheduler).__name__
        return f"the scheduler that {self.adapter.name} is released with"

    @property
    def name(self) -> str:
        """How files of numbers measured on a model name it: the released family, or adapter and sizes."""
        if self.family is not None:
            return self.family.name
        return f"{self.adapter.name}, {self.layers} layers, {self.heads} heads"

    def trained_frames(self, config: Any) -> int:
        """Return the latent frames of training clips, by config or family; raise `ConfigError` if neither tells."""
        frames = config.trained_frames or (self.family.trained_frames if self.family else None)
        if frames is None:
            name = self.family.name if self.family else f"{self.adapter.name}, with sizes of no released model,"
            raise MissingOption(
                f"{config.name} needs the length that the model was trained on, which {name} does not tell; set "
                f"{config.name}.trained_frames to its latent frames",
                needs="trained_frames",
            )
        return frames


class Handler:
    """One attached method: its options on one model and, where the method needs any, its state.

    A handler belongs to one attachment. It raises `ConfigError` on creation if the method can't work on the model.

    Attributes:
        settings: the config, its unset options filled in for this model; what the report shows.
        model: the model.
    """

    config_type: ClassVar[type[MethodConfig]]
    """The config that asks for the method."""

    phase: ClassVar[Phase]
    """When it acts."""

    places: ClassVar[frozenset[Place]]
    """Where it acts; a model that has no such place refuses it."""

    exclusive: ClassVar[frozenset[str]] = frozenset()
    """Parts of a plan or forward that it sets alone; two methods that set the same one can't be attached together.

    ``cache`` stands for the outputs of earlier steps, of which one method alone makes later ones.
    """

    extends: ClassVar[frozenset[str]] = frozenset()
    """Axes (frames, height, width) along which it helps outputs that are longer than the model was trained on."""

    objects: ClassVar[tuple[str, ...]] = ()
    """Config types of another library that ask for it; it has no switch and no TOML table then."""

    _most_held = 0

    def __init__(self, config: Any, model: Model) -> None:
        # the config, its unset options filled in for this model; what the report shows
        self.settings: Any = config.filled(self.recipe(config, model))
        self.model = model  # the model

    @classmethod
    def recipe(cls, config: Any, model: Model) -> Mapping[str, Any]:
        """Return the values of the config's unset options on a model."""
        return model.adapter.recipe(config.name, model.family)

    @classmethod
    def config_for(cls, given: Any) -> MethodConfig | None:
        """Return the config that ``given`` asks for the method with: itself, or what wraps it; None: it does not."""
        return given if type(given) is cls.config_type else None

    @property
    def name(self) -> str:
        """The method's name."""
        return self.config_type.name

    def install(self, site: Site) -> None:
        """Put the method onto one transformer, through the site alone."""

    def check_with(self, others: Sequence["Handler"]) -> None:
        """Raise `ConfigError` if the other attached methods make this one impossible."""

    def require_given(self) -> None:
        """Raise `MissingOption` for what `attach` needs beside the usual options, and `plan` does not."""

    def check_layout(self, layout: TokenLayout) -> str | None:
        """Return a note on a layout for the report, or None; raise `ConfigError` to refuse the layout."""
        return None

    def needs_step(self, step: StepContext) -> bool:
        """Tell whether this branch's forward of a step must run, because the method learns or measures in it.

        Step caches ask before they skip one.
        """
        return False

    def reset(self) -> None:
        """Forget what is carried from step to step: a generation begins or has ended, or its shape changed."""

    def begin_run(self) -> None:
        """Forget what `report` says about the last generation: another one begins."""

    def state_bytes(self) -> int:
        """Return the most memory that was held from step to step since attach, in bytes."""
        return self._most_held

    def note_held(self, size: int) -> None:
        """Note how many bytes are held from step to step now, for `state_bytes`."""
        self._most_held = max(self._most_held, size)

    def report(self) -> Section | None:
        """Return what the method did in the last generation, besides what the core counts; None: nothing to tell."""
        return None

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        """Return what the method saves over a run of so many steps on a layout; `ConfigError` if that is not known."""
        return Saving(counted=False, notes=(f"what {self.name} saves is known only while it runs; it is not counted",))


class AttentionHandler(Handler):
    """A method that acts on attention calls, by their plan."""

    places = frozenset({Place.ATTENTION})

    votes: ClassVar[bool] = False
    """Whether its plans ask for votes, which not every kernel backend has.

    A call whose mask is not key padding runs dense then, as the report says, instead of being refused.
    """

    only_saves: ClassVar[bool] = False
    """Whether its tile lists leave out or pool tiles to save time and nothing else, so that dense attention may do."""

    by_place: bool = False
    """Whether its plans follow from places, heads and keys alone, so that a row can be computed without the others."""

    rests: Rests | None = None
    """The layers that are dense in turn, and what is kept of them; None where none are."""

    @property
    def precision(self) -> str | None:
        """Number format in which queries and keys are multiplied, ``int8`` or ``fp8``; None: the model's."""
        return None

    def is_active(self, step: StepContext, depth: int) -> bool:
        """Tell whether the method changes attention in this layer at this step; decided before the forward runs."""
        return True

    def applies(self, layout: TokenLayout) -> bool:
        """Tell whether the method changes attention over a layout; where no method does, calls stay dense.

        Asked before each forward, but not before the first one of a transformer that is compiled whole.
        """
        return True

    def is_active_somewhere(self, step: StepContext) -> bool:
        """Tell whether the method changes attention in any layer at this step."""
        return any(self.is_active(step, depth) for depth in range(max(1, self.model.layers)))

    def plan(self, plan: AttentionPlan, call: Call, context: CallContext) -> AttentionPlan:
        """Return ``plan`` with the method's part added by the plan's verbs.

        Args:
            plan: what the methods of earlier phases planned.
            call: q, k and v; the keys centred where the plan says so.
            context: where the denoising stands.
        """
        return plan


@runtime_checkable
class OutputStep(Protocol):
    """A method that reads or changes what planned calls give, before later phases do."""

    def after(self, plan: AttentionPlan, call: Call, context: CallContext, result: KernelResult) -> KernelResult:
        """Return the result of a planned call, changed or as it is; its output may be written to.

        Called after every planned call but those beside another, whether the method is active in it or not.
        """
        ...


class Correction(OutputStep, Protocol):
    """How a call was corrected, for calls that run as it did: it reads and keeps nothing of a method's."""

    def of_rows(self, rows: Sequence[int]) -> "Correction":
        """Return how some rows of the batch were corrected."""
        ...
