"""SLG: guidance away from a forward that skips some blocks; on video models, spatio-temporal skip guidance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import ConfigError
from ..base import Place
from ..site import Site
from .branch import PerturbedHandler, block_of
from .guidance_config import PerturbedConfig
from .head_specs import Specs, read_heads
from .perturbed_heads import stacks_of


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

    layers: Specs | None = None


class SLGHandler(PerturbedHandler):
    """SLG on one model."""

    config_type = SLG
    places = frozenset({Place.FORWARD, Place.BLOCKS})
    acts_on_blocks = True
    settings: SLG

    def perturbed_layers(self, site: Site) -> Sequence[int]:
        stacks = stacks_of(site, self.model)
        heads = read_heads(self.specs or (), stacks, "slg.layers")
        for layer, named in heads.items():
            if len(named) < stacks.heads:
                raise ConfigError(
                    f"slg.layers names heads {list(named)} of layer {layer}, and slg skips whole blocks; name layers, "
                    "or use SoftPAG"
                )
        return list(heads)

    def skipped_blocks(self, site: Site) -> frozenset[int]:
        blocks = {layer: block_of(site, layer) for layer in self.perturbed_layers(site)}
        if (beside := next((layer for layer, block in blocks.items() if block is None), None)) is not None:
            raise ConfigError(
                f"slg.layers names {site.attention[beside]}, which lies in no block of the main path; name others"
            )
        return frozenset(block for block in blocks.values() if block is not None)

    def describe_perturbation(self) -> str:
        return f"blocks of {', '.join(self.specs or ()) or 'no layer'} skipped, scale {self.settings.scale}"
