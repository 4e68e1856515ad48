"""SLG: guidance away from a forward that skips some blocks; on video models, spatio-temporal skip guidance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import ConfigError
from ..base import Model, Place
from ..site import Site
from .branch import PerturbedHandler, block_of
from .config import PerturbedConfig
from .heads import first_layer, read_heads, split_specs
from .softpag import stacks_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SLG(PerturbedConfig):
    """Guidance away from a forward in which chosen blocks hand on what they are given, stream by stream.

    Source: skip-layer guidance of Stable Diffusion 3.5's code; for video STG-R (arXiv 2411.18664), with its scale of 1
    over the whole run.

    Attributes:
        layers: the blocks, by their attention layers, such as ``L7-9``, or a stack's name. None: what is published for
            the model.
    """

    name: ClassVar[str] = "slg"
    defaults: ClassVar[Mapping[str, Any]] = {"scale": 2.8, "start": 0.01, "stop": 0.2, "layers": None}

    layers: str | tuple[str, ...] | None = None


class SLGHandler(PerturbedHandler):
    """SLG on one model."""

    config_type = SLG
    places = frozenset({Place.FORWARD, Place.BLOCKS})
    acts_on_blocks = True
    settings: SLG

    def __init__(self, config: SLG, model: Model) -> None:
        super().__init__(config, model)
        if self.settings.layers is None:
            known = model.family.name if model.family is not None else f"a {model.adapter.name} of these sizes"
            raise ConfigError(
                f"slg.layers is not set, and nothing is published for {known}; name some, such as "
                f"L{max(1, model.layers // 3)}"
            )

    @property
    def specs(self) -> tuple[str, ...]:
        """What the settings name."""
        return split_specs(self.settings.layers or ())

    @property
    def neutral(self) -> bool:
        """Whether the settings change nothing."""
        return self.settings.scale == 0 or not self.specs

    def perturbed_layers(self, site: Site) -> Sequence[int]:
        """Return the attention layers of the skipped blocks."""
        stacks = stacks_of(site, self.model)
        heads = read_heads(self.specs, stacks, "slg.layers")
        for layer, named in heads.items():
            if len(named) < stacks.heads:
                raise ConfigError(
                    f"slg.layers names heads {list(named)} of layer {layer}, and slg skips whole blocks; name layers, "
                    "or use SoftPAG"
                )
        return list(heads)

    def skipped_blocks(self, site: Site) -> frozenset[int]:
        """Return the blocks that a perturbed pass leaves out."""
        found = {layer: block_of(site, layer) for layer in self.perturbed_layers(site)}
        if beside := next((layer for layer, block in found.items() if block is None), None):
            raise ConfigError(
                f"slg.layers names {site.attention[beside]}, which lies in no block of the main path; name others"
            )
        return frozenset(block for block in found.values() if block is not None)

    def describe_perturbation(self) -> str:
        """Return in words what is perturbed."""
        return f"blocks of {', '.join(self.specs) or 'no layer'} skipped, scale {self.settings.scale}"

    def first_layer(self) -> int | None:
        """Return the first perturbed layer, without a model; None where that is not known."""
        return first_layer(self.specs, self.model.layers, max(1, self.model.heads))
