"""Attention masks as models pass them: the valid keys of each row."""

import torch
from dit_accel_kernels.cache import StorageCache
from torch import Tensor

from ..errors import ConfigError

HIDDEN = -1e4
"""An additive bias at or below this hides a key: its exponential is 0 in every dtype."""
_VALID: StorageCache[Tensor] = StorageCache()


def visible_row(mask: Tensor | None, query: int) -> Tensor | None:
    """Return the row of a boolean mask [B, H, Q, K] that belongs to ``query``, which no mask of the model hides.

    Where the mask is the outer product of valid queries and valid keys, that row is the keys' validity; nothing is read
    back from the device. Other masks are returned as they are.
    """
    if mask is None or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[2] == 1:
        return mask
    return mask[:, :, query : query + 1]


def key_validity(mask: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """Return key validity, bool [B, K], of a mask that hides keys: from all queries, or from all that it doesn't hide.

    A query that the mask hides altogether has no defined result (zero or NaN, depending on the dense backend); the
    kernels let it see the valid keys. The same mask gives the same memory until it is written to: what is derived from
    that is made once for all layers that a model hands the mask to.

    ``mask``: [B, K] or [B, H, Q, K], sizes of 1 broadcast: bool, True for a valid pair; or an additive bias of 0 and
    values of -1e4 and less.

    Raises:
        ConfigError: for any other mask. All but boolean key padding is read back from the device to be sure, once.
    """
    if mask.dtype == torch.bool and _is_padding(mask, batch, keys):
        return mask.reshape(-1, keys).expand(batch, keys)
    return _VALID.get((), (batch, queries, keys), lambda: _read(mask, batch, queries, keys), loose=[mask])


def _is_padding(mask: Tensor, batch: int, keys: int) -> bool:
    return mask.shape[-1] == keys and mask.numel() in (keys, batch * keys)


def _read(mask: Tensor, batch: int, queries: int, keys: int) -> Tensor:
    """`key_validity` of a mask that must be read to be sure."""
    expected = f"sparse attention follows masks that hide keys, [{batch}, 1, 1, {keys}] or the like"
    actual = f"the model passes {mask.dtype} {list(mask.shape)}"
    if not mask.dtype.is_floating_point and mask.dtype != torch.bool:
        raise ConfigError(f"{expected}, boolean or additive; {actual}; detach the sparse methods from this model")
    if mask.dtype.is_floating_point:
        if not bool(((mask == 0) | (mask <= HIDDEN)).all()):
            raise ConfigError(
                f"{expected}; {actual} with biases other than 0 and {HIDDEN:g} or less; pass the text's mask as "
                "booleans (prompt_attention_mask=mask.bool()) where the pipeline takes it, or detach the sparse methods"
            )
        mask = mask == 0
    if _is_padding(mask, batch, keys):
        return mask.reshape(-1, keys).expand(batch, keys)
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[2] not in (1, queries) or mask.shape[3] != keys:
        raise ConfigError(f"{expected}; {actual}; detach the sparse methods from this model")
    valid = mask[:, :1].any(2, keepdim=True)
    if not bool((mask == (mask[:, :1].any(3, keepdim=True) & valid)).all()):
        raise ConfigError(
            f"{expected}; {actual} that pairs queries with keys in another way (it is not an outer product of valid "
            "queries and valid keys); detach the sparse methods from this model"
        )
    return valid.reshape(-1, keys).expand(batch, keys)
