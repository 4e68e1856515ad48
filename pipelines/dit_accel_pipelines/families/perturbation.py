"""What is published on guidance by perturbed predictions: heads, layers and scales by model.

They are facts about weights: heads of a fine-tune may do something else, `dit-accel tune heads` looks for them.
"""

from collections.abc import Mapping
from typing import Any

Recipe = Mapping[str, Any]

# HeadHunter, arXiv 2506.10978: heads that are found to hold a trait, which guidance away from them amplifies. Flux
# counts its double blocks first: layers 19 to 56 are single blocks.
HEAD_SETS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sd3-medium": {
        "shearing": ("L11H15",),
        "dark-lighting": ("L1H10",),
        "dark": ("L1H2", "L1H10"),
        "white": ("L0H15", "L1H19"),
        "red": ("L0H3",),
        "horizontal-banding": ("L16H3",),
        "golden-hour": ("L18H11", "L0H17", "L2H3"),
        "spring-bloom": ("L0H2", "L13H19", "L5H12"),
    },
    "flux.1-dev": {
        "vintage-film": ("L51H23",),
        "warm-red": ("L52H22",),
        "smooth-bokeh": ("L34H0",),
        "cool-tone": ("L52H6",),
        "golden-hour": ("L38H18",),
        "green-filter": ("L52H12",),
        "glossy-plastic": ("L43H17",),
    },
}

# PAG: the layer of the SD3 port by PAG's authors (13), and diffusers' own defaults elsewhere. SoftPAG's figures perturb
# layer 9 of SD3-medium.
PAG: Mapping[str, Recipe] = {"sd3-medium": {"layers": ("L13",)}, "pixart-sigma": {"layers": ("L1",)}}
SOFTPAG: Mapping[str, Recipe] = {"sd3-medium": {"heads": ("L9",), "scale": 5.0}}


def _stg(*layers: str) -> Recipe:
    """Return spatio-temporal skip guidance, arXiv 2411.18664: scale 1 over the whole run."""
    return {"layers": layers, "scale": 1.0, "start": 0.0, "stop": 1.0}


# SLG: Stability's code for SD3.5 medium; STG's blocks for video models. Wan 2.1 14B's is what its users settled on.
SLG: Mapping[str, Recipe] = {
    "sd3-medium": {"layers": ("L7-9",)},
    "wan2.1-1.3b": _stg("L8"),
    "wan2.1-14b": _stg("L9"),
    "mochi-1": _stg("L34"),
    "hunyuan-video": _stg("L2"),
    "cogvideox-2b": _stg("L11"),
    "cogvideox-5b": _stg("L11"),
    "ltx-video-2b": _stg("L19"),
    "ltx-2-19b": _stg("L28"),
}
