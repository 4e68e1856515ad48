"""Tells a clip's pixels apart by colour: the background, and one soft mask for each of the world's object colours.

An object's pixels lie in RGB on the way from its colour to its light tint, a background's on the way from its colour to
a brighter one; a pixel on an edge lies between the two, and its share of the object is read off the two distances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dit_accel_assets import painter, world

_FIRM = 0.5
"""Share above which a pixel counts as the object's."""
_BRIGHTEST = 226.0
"""Brightest channel of an object's colour, about: 208 to 255."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a clip is made of; brightness is taken out of a dim clip before."""

    video: np.ndarray
    """Float32 [F, H, W, 3] in 0..255, brightened where the clip is dim."""
    dim: bool
    """Whether the clip came dim: its brightest pixels were nearer to a dim object's than to a bright one's."""
    ground: str
    ground_distance: float
    """Distance in RGB (0..255) between the background's pixels and the nearest named background's range."""
    masks: dict[str, np.ndarray]
    """Colour name -> soft mask float32 [F, H, W]."""
    free: np.ndarray
    """Bool [F, H, W]: pixels well away from any object."""

    def stretch(self, first: int, end: int | None) -> Parts:
        """Return the parts of some of the frames."""
        cut = slice(first, end)
        masks = {name: mask[cut] for name, mask in self.masks.items()}
        return replace(self, video=self.video[cut], masks=masks, free=self.free[cut])


def unmix(video: np.ndarray) -> Parts:
    """Take a clip [F, H, W, 3], uint8 or float in 0..1, apart."""
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"a clip is [frames, height, width, 3]; found {video.shape}")
    pixels = video.astype(np.float32) * (1.0 if video.dtype == np.uint8 else 255.0)
    brightest = np.sort(pixels.max(-1).reshape(len(pixels), -1), axis=1)
    few = max(4, brightest.shape[1] // 200)
    brightness = float(np.quantile(brightest[:, -few:].mean(1), 0.9))  # of frames that an object has not left
    dim = brightness < (1 + painter.DIM) / 2 * _BRIGHTEST
    if dim:
        pixels = np.minimum(pixels / painter.DIM, 255.0)
    ground, ground_distance, away = _ground(pixels)
    near = np.stack([_to_segment(pixels, np.asarray(c, np.float32), _tint(c)) for c in world.COLORS.values()])
    winner, closest = near.argmin(0), near.min(0)
    share = away / np.maximum(away + closest, 1e-3)
    share = np.where(away > 30, np.clip((share - 0.25) / 0.5, 0.0, 1.0), 0.0)
    masks = {name: _clean(share * (winner == index)) for index, name in enumerate(world.COLORS)}
    covered = np.max(list(masks.values()), axis=0) > 0.1
    free = ~_grow(_grow(covered | (share > 0.3)))
    distance = float(np.median(away[free])) if free.any() else ground_distance
    return Parts(video=pixels, dim=dim, ground=ground, ground_distance=distance, masks=masks, free=free)


def firm(mask: np.ndarray) -> np.ndarray:
    """Return which pixels of a soft mask count as the object's."""
    return mask > _FIRM


def components(mask: np.ndarray, least: int) -> list[np.ndarray]:
    """Return the connected parts (four neighbours) of a bool mask [H, W] of at least `least` pixels, largest first."""
    rest, parts = mask.copy(), []
    while rest.any():
        seed = np.zeros_like(rest)
        seed.flat[rest.argmax()] = True
        size = 0
        while (count := int(seed.sum())) > size:
            size, seed = count, _grow(seed) & rest
        rest &= ~seed
        if size >= least:
            parts.append(seed)
    return sorted(parts, key=lambda part: -int(part.sum()))


def _tint(color: tuple[int, int, int]) -> np.ndarray:
    base = np.asarray(color, dtype=np.float32)
    return base + painter.TINT * (255 - base)


def _ground(pixels: np.ndarray) -> tuple[str, float, np.ndarray]:
    """Return the background nearest to most pixels, its median distance, and every pixel's distance to it."""
    best = ("", np.inf, pixels[..., 0])
    for name, color in world.GROUNDS.items():
        base = np.asarray(color, dtype=np.float32)
        away = _to_segment(pixels, base, base + painter.GROUND_STEP)
        median = float(np.median(away))
        if median < best[1]:
            best = (name, median, away)
    return best


def _to_segment(pixels: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    axis = end - start
    along = np.clip((pixels - start) @ axis / float(axis @ axis), 0.0, 1.0)
    return np.sqrt(np.square(pixels - start - along[..., None] * axis).sum(-1))


def _grow(mask: np.ndarray) -> np.ndarray:
    out = mask.copy()
    out[..., 1:, :] |= mask[..., :-1, :]
    out[..., :-1, :] |= mask[..., 1:, :]
    out[..., :, 1:] |= mask[..., :, :-1]
    out[..., :, :-1] |= mask[..., :, 1:]
    return out


def _clean(mask: np.ndarray) -> np.ndarray:
    """Drop what has no firm pixel with at least five firm ones around it nearby: stray pixels, rims of other hues."""
    solid = (mask > _FIRM).astype(np.float32)
    padded = np.pad(solid, ((0, 0), (1, 1), (1, 1)))
    height, width = mask.shape[1:]
    around = sum(padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3))
    core = (around >= 6) & (solid > 0)
    return np.where(_grow(_grow(core)), mask, 0.0).astype(np.float32)
