"""RoPE: rotary frequencies for videos longer and pictures larger than the model was trained on.

Sources: RIFLEx (arXiv 2502.15894), UltraImage's correction (2512.04504), NTK and YaRN (2309.00071), position
interpolation (2306.15595). Where we depart from them: each axis by its own length, never text; any size, model and
number of sizes in a row; the frequency that repeats is found by rule (`dit_accel.rules.rotary_frequencies`); no
temperature.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from ...adapters.rotary import VISUAL_AXES
from ...errors import ConfigError
from ...plan.layout import TokenLayout
from ...rules.rotary_frequencies import check_kind, edited
from ..base import Handler, Model, Phase, Place
from ..config import MethodConfig
from ..options import NO_FILE, Count, Rule, ge
from ..saving import Saving
from ..site import Site
from .rope_switcher import RopeSwitcher, require_kind, trained_lengths

Kind = Literal["none", "pi", "ntk", "yarn", "riflex", "ultraimage"]


Axes = Annotated[
    tuple[str, ...],
    Rule(f"a list of one or more of {', '.join(VISUAL_AXES)}", lambda axes: axes and {*axes} <= {*VISUAL_AXES}),
    NO_FILE,
    "leave it unset for all that the model has",
]
"""Axes of the patch grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoPE(MethodConfig):
    """Lower rotary frequencies for sizes beyond the trained one (RIFLEx, NTK, YaRN, PI, UltraImage's correction).

    Attributes:
        kind: ``riflex`` slows down the one frequency that makes a clip repeat itself; ``ultraimage`` one after the
            other; ``ntk`` falls from none at the fastest to s at the slowest, s = wanted / trained length; ``yarn`` by
            how often each turns, without its temperature on the logits; ``pi`` all by s; ``none`` leaves all as they
            are.
        axes: of frames, height and width; unset: all whose trained length is known. What is no longer than trained
            stays as it is.
        factor: s, for fine-tuned models that want one whatever the length; unset: the output's own.
        period: of ``riflex``: the period, in tokens, after which the model repeats; unset: the smallest that is at
            least 0.9 times the trained length.
        turn: of ``riflex`` and ``ultraimage``: turns that a changed frequency makes over the wanted length, in (0, 1];
            unset: 0.9, as RIFLEx' code, and 1.
        indices: of ``ultraimage``: the frequencies that change, 0 the fastest; unset: found by their periods.
        trained_frames: token frames that the model was trained on; unset: the released model's.
        trained_height: the same of token rows.
        trained_width: the same of token columns.
    """

    name: ClassVar[str] = "rope"

    kind: Kind = "riflex"
    axes: Axes | None = None
    factor: Annotated[float, ge(1), "2 is twice the trained length"] | None = None
    period: float | None = None
    turn: float | None = None
    indices: tuple[int, ...] | None = None
    trained_frames: Count | None = None
    trained_height: Count | None = None
    trained_width: Count | None = None

    def __post_init__(self) -> None:
        MethodConfig.__post_init__(self)
        check_frequencies(self, self.kind, period=self.period, turn=self.turn, indices=self.indices)


def check_frequencies(config: MethodConfig, kind: str, **options: Any) -> None:
    """Raise `ConfigError`, which names the method, for options that `check_kind` refuses."""
    try:
        check_kind(kind, **options)
    except ConfigError as error:
        raise ConfigError(f"{config.name}: {error}") from None


class RoPEHandler(Handler):
    """RoPE on one model: its frequencies, as the size of each forward wants them."""

    config_type = RoPE
    phase = Phase.POSITIONS
    places = frozenset({Place.POSITIONS, Place.FORWARD})
    exclusive = frozenset({"rotary frequencies"})
    extends = frozenset(VISUAL_AXES)
    settings: RoPE

    def __init__(self, config: RoPE, model: Model) -> None:
        super().__init__(config, model)
        require_kind(model, config.kind, config.axes or (), option="kind")
        options = {axis: getattr(config, f"trained_{axis}") for axis in VISUAL_AXES}
        self._trained = trained_lengths(config.name, options, model.family)

    def install(self, site: Site) -> None:
        RopeSwitcher(site, self.settings.axes or (), self._trained, self._edit, self.settings.factor)

    def _edit(self, freqs: Any, trained: float, length: float) -> Any:
        config = self.settings
        return edited(
            config.kind, freqs, trained=trained, length=length, period=config.period, turn=config.turn,
            indices=config.indices,
        )  # fmt: skip

    def check_layout(self, layout: TokenLayout) -> str | None:
        config = self.settings
        parts = [
            f"{tokens} tokens along {axis}, trained on {self._trained[axis]}"
            for axis, tokens in layout.lengths.items()
            if axis in self._trained and (config.axes is None or axis in config.axes)
        ]
        fixed = "" if config.factor is None else f" for {config.factor:g} times the trained length"
        return f"rope, kind {config.kind}{fixed}: {', '.join(parts)}"

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        return Saving(notes=(f"{self.check_layout(layout)}; positions save no work and are counted as none",))
