"""Inception v3 as FID asks it: torchvision's, changed to the form of 2015-12-05, filled from pytorch-fid's file.

Szegedy et al., arXiv 1512.00567, in the form that FID's first code downloaded (Heusel et al. 2017): averages next to an
edge leave the padding out, and the last block takes the maximum there.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 299
"""Pixels to which frames are brought."""

AVERAGED = tuple(f"Mixed_{one}" for one in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"))
"""Blocks with a branch behind a mean of neighbours."""


def network(held: Mapping[str, Tensor]) -> Any:
    """Return Inception with all its weights but the classes'; raises `RuntimeError` for those of another network."""
    from torchvision.models import inception_v3

    made = inception_v3(weights=None, aux_logits=False, init_weights=False)
    made.fc = nn.Identity()  # type: ignore[assignment]
    made.load_state_dict({name: value for name, value in held.items() if not name.startswith("fc.")})
    for name in AVERAGED:
        _pool(getattr(made, name), average)
    _pool(made.Mixed_7c, lambda x: F.max_pool2d(x, 3, 1, 1))
    return made


def average(x: Tensor) -> Tensor:
    """Return the mean of each place's 3 x 3 neighbours, those within the frame."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _pool(block: nn.Module, pool: Callable[[Tensor], Tensor]) -> None:
    """Let the branch behind a block's pool get what another pool makes of what the block gets."""
    given: list[Tensor] = []
    block.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    block.branch_pool.register_forward_pre_hook(lambda module, inputs: (pool(given.pop()),))  # type: ignore[union-attr]


def inception(made: Any, frames: Tensor) -> Tensor:
    """Return the features [F, 2048] of frames [F, 3, height, width] in [0, 1], of any size: means over places."""
    return made(2 * F.interpolate(frames, size=(SIDE, SIDE), mode="bilinear", align_corners=False) - 1)
