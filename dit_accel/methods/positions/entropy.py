"""How local each attention head is, by the entropy of its rows, and how much sharper it is made for that."""

import torch
from torch import Tensor

KEYS_AT_ONCE = 2048
"""Keys whose logits are held at a time."""


@torch.no_grad()
def token_entropy(
    q: Tensor, k: Tensor, *, scale: float | None = None, mask: Tensor | None = None, keys_at_once: int = KEYS_AT_ONCE
) -> Tensor:
    """Return the entropy of the attention over all keys, mean over some query rows, in natural units, [B, H].

    One pass: beside the largest logit m and the sum l = sum exp(S - m) it keeps a = sum exp(S - m) (S - m), so that the
    entropy is ln l - a / l. A uniform row has ln N, a row on one key 0.

    Args:
        k: all keys, [B, H or a divisor of it, S, D].
        mask: key validity, bool [B, S]; None: all are valid. Every row needs a valid key.
        keys_at_once: keys whose logits are held at a time; the result does not depend on it but for rounding.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
    shape = q.shape[:3]
    top = torch.full(shape, -torch.inf, dtype=wide, device=q.device)
    total, weighted = torch.zeros_like(top), torch.zeros_like(top)
    for start in range(0, k.shape[2], keys_at_once):
        part = k[:, :, start : start + keys_at_once].to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = q @ part.mT
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, start : start + keys_at_once], -torch.inf)
        higher = torch.maximum(top, logits.amax(-1))
        safe = higher.masked_fill(higher == -torch.inf, 0.0)  # no valid key yet
        fall = (top - safe).masked_fill(top == -torch.inf, 0.0)
        away = logits - safe[..., None]
        share = away.exp()
        weighted = fall.exp() * (weighted + fall * total) + (share * away.masked_fill(share == 0, 0.0)).sum(-1)
        total = fall.exp() * total + share.sum(-1)
        top = higher
    return (total.log() - weighted / total).mean(-1)


def focus(entropy: Tensor, lowest: Tensor, highest: Tensor, least: float, most: float, power: float) -> Tensor:
    """Return each head's factor on its logits: ``most`` at the lowest entropy, ``least`` at the highest.

    least + (most - least) z^power, z = (highest - entropy) / (highest - lowest), kept within [0, 1]; where all heads
    are alike every factor is ``least``. Source: UltraImage (arXiv 2512.04504), whose code does not bound z.
    """
    room = highest - lowest
    z = torch.where(room > 0, (highest - entropy) / room.masked_fill(room <= 0, 1.0), torch.zeros_like(entropy))
    return least + (most - least) * z.clamp(0.0, 1.0) ** power
