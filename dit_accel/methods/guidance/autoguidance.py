"""AutoGuidance: guidance away from what a weaker model of the same kind predicts for the same prompt."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from ...errors import ConfigError, MissingOption
from ...plan.layout import TokenLayout
from ..saving import Saving
from ..site import ForwardContext, Site
from .branch import PerturbedHandler
from .guidance_config import PerturbedConfig
from .weaker import fits, parallel_to_share, share, weights_of


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoGuidance(PerturbedConfig):
    """Guidance away from a weaker model's conditional prediction: unc + s (cond - unc) + w (cond - weak).

    The weaker model takes the same latents and the same encoded prompt: an earlier checkpoint, the model before it was
    fine-tuned, or a smaller sibling, such as Wan 2.1's 1.3B beside its 14B. It runs as a third forward of its own size.
    One that differs in its weights alone runs in the model's own modules, where every attached method acts on it as on
    the model. Another one runs plain and in every step: what methods leave out of the model it has, and is led away
    from that as well. Processes that share the model share it too, where diffusers can split it; else each runs it
    whole.

    Source: AutoGuidance (arXiv 2406.02507), whose D = D_bad + g (D_good - D_bad) is this without a negative prompt, g
    being 1 + w. Where we depart from it: it stands beside guidance by a negative prompt, whose scale stays what it is.

    Attributes:
        weak: folder or hub id of the weaker model, a pipeline's or a transformer's; loaded when the method is attached.
        weak_transformer: in place of it, a loaded transformer. Two configs are compared without it, and it is in no
            TOML table.
    """

    name: ClassVar[str] = "autoguidance"
    defaults: ClassVar[Mapping[str, Any]] = {"scale": 1.0, "start": 0.0, "stop": 1.0}

    weak: str | None = None
    weak_transformer: nn.Module | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        PerturbedConfig.__post_init__(self)
        if self.weak is not None and self.weak_transformer is not None:
            raise ConfigError("autoguidance takes weak or weak_transformer, and got both; give one of them")
        if self.mode == "free":
            raise ConfigError(
                "autoguidance.mode = 'free' perturbs the unconditional forward, and the weaker model is another one; "
                "leave mode out"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as plain values; a loaded transformer is none."""
        values = PerturbedConfig.to_dict(self)
        values.pop("weak_transformer", None)
        return values


class AutoGuidanceHandler(PerturbedHandler):
    """AutoGuidance on one model."""

    config_type = AutoGuidance
    settings: AutoGuidance
    option = "weak"
    _weak: nn.Module | None = None
    _parallel: Any = None
    _unshare: Callable[[], None] | None = None

    @property
    def specs(self) -> tuple[str, ...]:
        return ("weak",)

    def require_given(self) -> None:
        if self.settings.weak is None and self.settings.weak_transformer is None:
            raise MissingOption(
                "autoguidance guides away from a weaker model, and none is set; set autoguidance.weak to a folder or a "
                "hub id, or autoguidance.weak_transformer",
                needs="weak or weak_transformer",
            )

    def perturbed_layers(self, site: Site) -> Sequence[int]:
        return ()

    def install(self, site: Site) -> None:
        """Load the weaker model, unless it was given, and run around every forward of the transformer."""
        self._weak = self._weak or self.settings.weak_transformer or self._loaded(site.transformer)
        if self._weak is site.transformer:
            raise ConfigError(
                "autoguidance.weak_transformer is the model itself, away from which nothing is guided; give a weaker "
                "one"
            )
        site.on_detach(lambda: self._share(None))
        super().install(site)

    def perturbed_output(
        self, site: Site, context: ForwardContext, run: Callable[..., Any], given: Mapping[str, Any]
    ) -> Any:
        weak, inputs = self._weak, {**context.inputs, **given}
        assert weak is not None
        if fits(site.transformer, weak):
            with weights_of(weak, site.transformer):
                return run(**given)
        if self._parallel is not None or getattr(weak, "_parallel_config", None) is None:
            self._share(parallel_to_share(site.transformer, weak, inputs))
        return weak(**inputs)

    def _share(self, parallel: Any) -> None:
        if parallel is self._parallel:
            return
        if self._unshare is not None:
            self._unshare()
        self._parallel, self._unshare = parallel, None if parallel is None else share(self._weak, parallel)

    def describe_perturbation(self) -> str:
        loaded = self._weak or self.settings.weak_transformer
        weak = self.settings.weak or ("(none set)" if loaded is None else type(loaded).__name__)
        return f"the weaker model {weak}, scale {self.settings.scale}"

    def estimate(self, layout: TokenLayout, steps: int) -> Saving:
        """Return the third forwards, as if the weaker model were as large as the model."""
        saving = super().estimate(layout, steps)
        note = "autoguidance: a forward of the weaker model is counted as one of the model; a smaller one costs less"
        return replace(saving, notes=(*saving.notes, note))

    def _loaded(self, transformer: Any) -> nn.Module:
        """Return the weaker model, beside the transformer and in its type."""
        self.require_given()
        name = self.settings.weak
        assert name is not None
        options, error = {"torch_dtype": transformer.dtype, "use_safetensors": True}, None
        for folder in ({"subfolder": "transformer"}, {}):
            try:
                return type(transformer).from_pretrained(name, **folder, **options).to(transformer.device).eval()
            except (OSError, ValueError) as found:
                error = error or found
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"autoguidance.weak = {name!r} has no {type(transformer).__name__} that can be loaded: {reason}; give a "
            "folder or a hub id of one"
        )
