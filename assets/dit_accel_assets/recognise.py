"""Tells textures and styles by small trained classifiers: features and a two-layer net in numpy, weights as data.

`assets/training/train_checker.py` trains them on drawn clips, sharp and degraded; the weights lie in `models/checker`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from dit_accel_assets import world
from dit_accel_assets.unmix import Parts, firm

WEIGHTS = Path(__file__).parent / "models" / "checker" / "weights.npz"
SIDE = 16
"""Side of an object's resampled crop, and of a background patch taken at every second pixel."""
KINDS: dict[str, tuple[str, ...]] = {
    "texture": world.TEXTURES,
    "ground": world.TEXTURES,
    "style": tuple(style for style in world.STYLES if style != "dim"),
}
"""What each classifier tells; a dim clip is told by its brightness alone."""


def object_features(frame: np.ndarray, mask: np.ndarray, color: str) -> np.ndarray | None:
    """Return the features of an object's texture: spectrum, mean and slope of its lightness, free of phase and size.

    frame [H, W, 3] in 0..255, mask [H, W] of this one object; None where fewer than 20 pixels are firmly its own.
    """
    solid = firm(mask)
    rows, columns = np.nonzero(solid)
    if len(rows) < 20:
        return None
    base = np.asarray(world.COLORS[color], dtype=np.float32)
    light = np.clip((frame - base) @ (255 - base) / float((255 - base) @ (255 - base)), -0.3, 1.0)
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    steps = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    y = (rows.min() + rows.max()) / 2 + steps * side
    x = (columns.min() + columns.max()) / 2 + steps * side
    return _features(_sample(light, y, x), _sample(np.where(solid, mask, 0), y, x))


def ground_features(parts: Parts, frame: int) -> list[np.ndarray]:
    """Return the features of a frame's background, one set for each 32-pixel corner patch that is mostly free."""
    pixels, free = parts.video[frame].mean(-1), parts.free[frame]
    height, width = free.shape
    slope = _slope(pixels, free)
    out = []
    for top in sorted({0, height - 32}):
        for left in sorted({0, width - 32}):
            patch = (slice(top, top + 32, 2), slice(left, left + 32, 2))
            if free[patch].mean() > 0.4:
                features = _features(pixels[patch] / 42.0, free[patch].astype(np.float32))
                out.append(np.append(features, 4 * slope))
    return out


def style_features(frame: np.ndarray, mask: np.ndarray, color: str) -> np.ndarray | None:
    """Return brightness and share of the object's colour at eight depths around its edge, outside to inside."""
    solid = firm(mask)
    if solid.sum() < 20:
        return None
    luminance = frame.max(-1) / 255
    base = np.asarray(world.COLORS[color], dtype=np.float32)
    axis = base - base.mean()
    share = np.clip(((frame - frame.mean(-1, keepdims=True)) @ axis) / float(axis @ axis), -0.2, 1.2)
    ring, inner, outer = [], solid, ~solid
    for _ in range(4):
        shrunk = ~_dilate(~inner)
        ring.append(inner & ~shrunk)
        inner = shrunk
    for _ in range(4):
        shrunk = ~_dilate(~outer)
        ring.insert(0, outer & ~shrunk)
        outer = shrunk
    values = [(luminance[r].mean(), share[r].mean()) if r.any() else (0.0, 0.0) for r in ring]
    far = luminance[outer].mean() if outer.any() else 0.0
    return np.append(np.asarray(values, dtype=np.float32).ravel(), far)


def classify(kind: str, features: np.ndarray) -> np.ndarray:
    """Return the probabilities [N, classes] of `KINDS[kind]` for features [N, D]."""
    weights = _weights(kind)
    x = (features - weights["mean"]) / weights["std"]
    hidden = np.maximum(x @ weights["w1"] + weights["b1"], 0)
    logits = hidden @ weights["w2"] + weights["b2"]
    logits = logits - logits.max(1, keepdims=True)
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


@lru_cache
def _weights(kind: str) -> dict[str, np.ndarray]:
    with np.load(WEIGHTS) as data:
        return {name.partition(".")[2]: data[name].astype(np.float32) for name in data if name.startswith(f"{kind}.")}


def _features(light: np.ndarray, mask: np.ndarray) -> np.ndarray:
    weight = mask / max(1.0, float(mask.sum()))
    mean = float((light * weight).sum())
    centred = (light - mean) * mask
    grid = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    slopes = [(centred * g).sum() / max(1.0, (mask * g * g).sum()) for g in (grid[None, :], grid[:, None])]
    # what a straight slope explains is taken out of the spectrum
    centred = centred - mask * (slopes[0] * grid[None, :] + slopes[1] * grid[:, None])
    centred = centred - mask * (centred * weight).sum()
    spectrum = np.abs(np.fft.rfft2(centred))[:, : SIDE // 2 + 1] / max(1.0, float(mask.sum()))
    deviation = float(np.sqrt((np.square(centred) * weight).sum()))
    extra = [mean, deviation, abs(slopes[0]), abs(slopes[1]), float(mask.mean())]
    return np.concatenate([np.sqrt(spectrum).ravel(), extra]).astype(np.float32)


def _slope(pixels: np.ndarray, free: np.ndarray) -> float:
    x = np.broadcast_to(np.linspace(-0.5, 0.5, pixels.shape[1]), pixels.shape)[free]
    if x.size < 50:
        return 0.0
    return float(np.abs(((x - x.mean()) * pixels[free]).mean() / max(1e-6, x.var()) / 42.0))


def _sample(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Sample an image on the grid of rows y and columns x, bilinearly, with its edge repeated."""
    y, x = np.clip(y, 0, image.shape[0] - 1), np.clip(x, 0, image.shape[1] - 1)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    low, right = np.minimum(top + 1, image.shape[0] - 1), np.minimum(left + 1, image.shape[1] - 1)
    wy, wx = (y - top)[:, None], (x - left)[None, :]
    upper = image[np.ix_(top, left)] * (1 - wx) + image[np.ix_(top, right)] * wx
    lower = image[np.ix_(low, left)] * (1 - wx) + image[np.ix_(low, right)] * wx
    return upper * (1 - wy) + lower * wy


def _dilate(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
