"""One self-attention call at a released model's real size: its layout, and what is timed of it: dense, presets, flex.

Nothing is downloaded and no layer is made. Heads do not depend on each other, so a few stand for all. Queries, keys and
values are standard normal, since no trained model of these sizes is here. Sol decides by the data which tiles stay
exact: those whose pooled score exceeds its row's mean by beta deviations. Of normal data these are the share that beta
stands for, 1 - Phi(beta), and the tiles that are always exact; a trained model's calls keep another share. So the
density is in effect set by the config here, and a time holds for the density that stands beside it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dit_accel.adapters import installed
from dit_accel.adapters.adapter import Adapter, Family
from dit_accel.adapters.joined_text import JoinedText
from dit_accel.errors import ConfigError, did_you_mean
from dit_accel.estimate.estimate import Estimate, estimate
from dit_accel.methods.attention.sparse import SparseConfig, SparseHandler
from dit_accel.methods.base import Model
from dit_accel.methods.compose import make_handlers
from dit_accel.methods.presets import LEVELS, PRESETS, Choice, Level, choices
from dit_accel.plan.layout import TokenLayout

DENSE = "dense SDPA"
SPARSE = "sparse"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The self-attention of one model at one size of its output.

    Attributes:
        name: what users type.
        family: the released model's name.
        height: in pixels.
        width: in pixels.
        num_frames: of the output.

    Raises:
        ConfigError: for an unknown family, or sizes that it can't make.
    """

    name: str
    family: str
    height: int
    width: int
    num_frames: int = 1

    @property
    def sizes(self) -> dict[str, Any]:
        """Height, width and frames, by the names that estimates give them."""
        return {"height": self.height, "width": self.width, "num_frames": self.num_frames}

    @cached_property
    def of(self) -> tuple[Adapter, Family]:
        """The family with its adapter."""
        family = installed.family(self.family)
        return next(one for one in installed.adapters().values() if family in one.families), family

    @cached_property
    def planned(self) -> Estimate:
        """What `dit-accel plan` says of a dense run, with the number of frames that the pipeline makes."""
        return estimate(*self.of, **self.sizes)

    @property
    def layout(self) -> TokenLayout:
        """The sequence, text on the side where the model has it."""
        layout, text = self.planned.layout, self.of[0].joined_text
        if isinstance(text, JoinedText) and text.place == "before":
            return replace(layout, text_before=layout.text_after, text_after=0)
        return layout

    def model(self, heads: int) -> Model:
        """Return what methods may know of the model, with so many heads."""
        adapter, family = self.of
        return Model(adapter=adapter, family=family, heads=heads, layers=family.layers)


SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(name="flux-1mp", family="flux.1-dev", height=1024, width=1024),
        Shape(name="flux-4mp", family="flux.1-dev", height=2048, width=2048),
        Shape(name="wan-480p", family="wan2.1-1.3b", height=480, width=832, num_frames=81),
        Shape(name="wan-720p", family="wan2.1-14b", height=720, width=1280, num_frames=81),
        Shape(name="hunyuan-720p", family="hunyuan-video", height=720, width=1280, num_frames=129),
    )
}
"""Those with a name, from the shortest sequence to the longest."""

_SIZES = re.compile(r"(?P<family>[^:]+):(?P<height>\d+)x(?P<width>\d+)(?:x(?P<frames>\d+))?")


def shapes_of(text: str) -> list[Shape]:
    """Return the shapes that a user names: ``all``, or a comma list of names and of FAMILY:HEIGHTxWIDTHxFRAMES.

    Raises:
        ConfigError: for an unknown name or family, or sizes that it can't make.
    """
    if text.strip() == "all":
        return list(SHAPES.values())
    shapes = [_shape_of(name.strip()) for name in text.split(",") if name.strip()]
    if not shapes:
        raise ConfigError(f"--shapes names none; say all, or some of {', '.join(SHAPES)}")
    for shape in shapes:
        assert shape.planned  # refuses what the model can't make, before anything is timed
    return list(dict.fromkeys(shapes))


def _shape_of(name: str) -> Shape:
    if name in SHAPES:
        return SHAPES[name]
    if found := _SIZES.fullmatch(name):
        frames = int(found["frames"] or 1)
        return Shape(
            name=name, family=found["family"], height=int(found["height"]), width=int(found["width"]), num_frames=frames
        )
    raise ConfigError(
        f"no shape is called {name!r}; {did_you_mean(name, [*SHAPES, 'all'])}, or give one as "
        "FAMILY:HEIGHTxWIDTHxFRAMES, such as wan2.1-1.3b:480x832x81"
    )


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to compute a call.

    Attributes:
        name: what the table says.
        choice: what presets attach; None: dense attention.
        backend: the kernel backend; None: SDPA.
        presets: level -> `SPARSE`, or why a preset computes such a call densely.
    """

    name: str
    choice: Choice | None = None
    backend: str | None = None
    presets: Mapping[str, str] = field(compare=False)

    @property
    def config(self) -> SparseConfig | None:
        """The method, acting in every step and layer at any size; None: dense attention."""
        if self.choice is None:
            return None
        assert isinstance(self.choice.config, SparseConfig)
        always = dict(dense_steps=0, dense_last_steps=0, dense_layers=0, dense_above_sigma=None, min_tokens=None)
        return replace(self.choice.config, **always)


def arms_of(shape: Shape) -> list[Arm]:
    """Return the arms of a shape: dense, the sparse part of each preset, FlexAttention by the first one's tiles.

    What no preset computes sparsely at this shape is an arm all the same, so that it can be seen what the rule costs.
    """
    rules = {level: rule_on(shape, level) for level in LEVELS}
    arms = [Arm(name=DENSE, presets={level: rule for level, (choice, rule) in rules.items() if choice is None})]
    sparse: dict[Choice, dict[str, str]] = {}
    for level, (choice, rule) in rules.items():
        if choice is not None:
            sparse.setdefault(choice, {})[level] = rule
    for choice, presets in sparse.items():
        arms.append(Arm(name=spelled(choice), choice=choice, backend="auto", presets=presets))
    if sparse:
        first = next(iter(sparse))
        arms.append(Arm(name=f"{spelled(first)}, flex", choice=first, backend="flex", presets={}))
    return arms


def rule_on(shape: Shape, level: Level) -> tuple[Choice | None, str]:
    """Return a preset's sparse method, None if it has none, and `SPARSE` or why it computes this shape densely."""
    choice = next((one for one in PRESETS[level] if isinstance(one.config, SparseConfig)), None)
    if choice is None:
        return None, "no sparse part"
    model = shape.model(shape.of[1].heads)
    if choice not in choices(level, model):
        alone = f"{choice.models} models alone" if choice.models != "all" else "not on this model"
        return choice, f"dense by rule: {alone}"
    (handler,) = make_handlers([choice.config], model)
    assert isinstance(handler, SparseHandler)
    if not handler.applies(shape.layout):
        return choice, f"dense by rule: below {handler.settings.min_tokens:,} visual tokens"
    return choice, SPARSE


def spelled(choice: Choice) -> str:
    """Return a method's name with what it sets: ``sol, beta 1``; ``min_tokens`` stands with the presets' rule."""
    options = choice.config.to_dict()
    said = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in options.items()
        if value is not None and name != "min_tokens" and value != getattr(type(choice.config)(), name)
    ]
    return ", ".join([choice.config.name, *said])
