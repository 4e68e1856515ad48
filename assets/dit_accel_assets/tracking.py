"""Measures the objects of an unmixed clip: where they are, how large, what shape, how they move; and the camera."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dit_accel_assets import painter, world
from dit_accel_assets.unmix import Parts, components, firm
from dit_accel_assets.world import Thing

LEAST = 10
"""Firm pixels below which there is no object."""
_FILL: dict[str, float] = {"circle": 0.785, "square": 1.0, "triangle": 0.5, "cross": 0.556, "ring": 0.705}
"""Share of its box that a shape fills."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """One colour over time; frames without it hold NaN."""

    centers: np.ndarray
    """[F, 2] (x, y): the middle of all that has this colour."""
    areas: np.ndarray
    """[F] soft area in pixels."""
    counts: np.ndarray
    """[F] number of separate parts."""
    whole: np.ndarray
    """Bool [F]: present and nowhere at the picture's edge."""


def track(mask: np.ndarray) -> Track:
    """Follow one colour's soft mask [F, H, W]."""
    frames, height, width = mask.shape
    solid = firm(mask)
    present = solid.sum((1, 2)) >= LEAST
    areas = np.where(present, mask.sum((1, 2)), np.nan)
    y, x = np.arange(height) + 0.5, np.arange(width) + 0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        centers = np.stack([mask.sum(1) @ x / areas, mask.sum(2) @ y / areas], axis=1)
    counts = np.array([len(components(solid[f], LEAST)) if present[f] else 0 for f in range(frames)])
    rim = solid[:, 0].any(1) | solid[:, -1].any(1) | solid[:, :, 0].any(1) | solid[:, :, -1].any(1)
    return Track(centers=centers, areas=areas, counts=counts, whole=present & ~rim)


def path_error(track: Track, paces: tuple[float, float], direction: np.ndarray, drift: np.ndarray) -> float:
    """Return the root mean square distance in pixels from the nearest straight path that the words allow.

    The start is free; the velocity is `direction` (unit) times a pace in the range, plus `drift`, pixels a frame; drift
    may also be [F, 2], what the object's centre does besides. Infinite where it shows in fewer than two frames.
    """
    use = track.whole if track.whole.sum() >= 3 else ~np.isnan(track.areas)
    if use.sum() < 2:
        return float("inf")
    time = np.nonzero(use)[0].astype(np.float64)[:, None]
    points = track.centers[use] - drift[use]
    errors = []
    for pace in np.linspace(*paces, 5):
        rest = points - time * direction * pace
        errors.append(np.sqrt(np.square(rest - rest.mean(0)).sum(1).mean()))
    return float(min(errors))


def drift(thing: Thing, track: Track, camera: np.ndarray, first: int = 0) -> np.ndarray:
    """Return what moves a thing's centroid besides its own velocity, [F, 2]: the camera, and turning off its centre.

    `first` is the frame of a longer clip that the track begins at.
    """
    time = np.arange(len(track.areas))
    moved = -time[:, None] * camera
    if thing.motion == "turning" and thing.shape == "triangle":
        area = track.areas[track.whole] if track.whole.any() else track.areas
        reach = np.sqrt(np.nanmedian(area) / _FILL["triangle"]) / 6 if not np.isnan(area).all() else 0.0
        angle = (first + time) * world.TURN
        moved = moved + reach * np.stack([-np.sin(angle), np.cos(angle)], axis=1)
    return moved


def growth_error(track: Track, growth: float, count: int, shape: str) -> float:
    """Return the root mean square error in pixels of the object's side over time, its first size free.

    It grows by `growth` pixels a frame, negative if it shrinks, but never below the world's smallest side.
    """
    use = track.whole if track.whole.sum() >= 3 else ~np.isnan(track.areas)
    if use.sum() < 2:
        return float("inf")
    change = np.nonzero(use)[0] * growth
    side = np.sqrt(track.areas[use] / (_FILL[shape] * count))
    first = np.linspace(side.min() - abs(change).max(), side.max() + abs(change).max(), 81)[:, None]
    errors = side - np.maximum(first + change, world.SMALLEST if growth < 0 else 0.0)
    return float(np.sqrt(np.square(errors).mean(1)).min())


def overlaps(mask: np.ndarray, parts: list[np.ndarray], turns: tuple[float, ...]) -> dict[str, float]:
    """Return for each shape the soft IoU of its best fitting template, mean over the parts of one frame.

    mask [H, W] soft, parts bool [H, W]; templates are tried in three sizes at each of the rotations `turns` (radians).
    """
    scores: dict[str, list[float]] = {shape: [] for shape in world.SHAPES}
    for part in parts:
        rows, columns = np.nonzero(part)
        top, left = max(0, rows.min() - 3), max(0, columns.min() - 3)
        box = (slice(top, rows.max() + 4), slice(left, columns.max() + 4))
        soft = np.where(part | (_around(part) & (mask > 0)), mask, 0.0)[box]
        y, x = np.mgrid[: soft.shape[0], : soft.shape[1]].astype(np.float32) + 0.5
        area = float(soft.sum())
        for shape in world.SHAPES:
            side = np.sqrt(area / _FILL[shape])
            scores[shape].append(max(_fit(shape, soft, x, y, side, turn) for turn in turns))
    return {shape: float(np.mean(values)) if values else 0.0 for shape, values in scores.items()}


def _fit(shape: str, soft: np.ndarray, x: np.ndarray, y: np.ndarray, side: float, turn: float) -> float:
    """Return the best soft IoU of a rotated template laid so that its centroid meets the mask's."""
    total, best = soft.sum(), 0.0
    middle = np.array([(soft * x).sum(), (soft * y).sum()]) / total
    low = side / 6 if shape == "triangle" else 0.0  # a triangle's centroid lies below the middle of its box
    cos, sin = np.cos(turn), np.sin(turn)
    middle = middle - np.array([-sin * low, cos * low])
    for factor in (0.93, 1.0, 1.07):
        u, v = cos * (x - middle[0]) + sin * (y - middle[1]), cos * (y - middle[1]) - sin * (x - middle[0])
        template = np.clip(0.5 - painter.distance(shape, u, v, side * factor), 0.0, 1.0)
        best = max(best, float(np.minimum(template, soft).sum() / np.maximum(template, soft).sum()))
    return best


def _blur(video: np.ndarray) -> np.ndarray:
    for axis in (1, 2):
        video = (np.roll(video, 1, axis) + 2 * video + np.roll(video, -1, axis)) / 4
    return video


def _around(part: np.ndarray) -> np.ndarray:
    padded = np.pad(part, 2)
    height, width = part.shape
    return np.max([padded[y : y + height, x : x + width] for y in range(5) for x in range(5)], axis=0)


def camera_error(parts: Parts, velocity: np.ndarray) -> float:
    """Return by how many pixels a frame the background's velocity (x, y) differs from the one given.

    Least squares over Lucas and Kanade's equation at every pixel that is free of objects in two following frames; where
    the background varies in one direction alone (stripes), that component alone. Infinite where it does not vary.
    """
    gray = _blur(parts.video.mean(-1))  # noise would make every motion look slower
    gray = gray - (gray * parts.free).sum() / max(1, parts.free.sum())
    between = (gray[1:] + gray[:-1]) / 2
    dx, dy = (np.gradient(between, axis=axis) for axis in (2, 1))
    dt = gray[1:] - gray[:-1]
    use = parts.free[1:] & parts.free[:-1]
    use[:, [0, -1]] = use[:, :, [0, -1]] = False  # blurred across the picture's edge
    dx, dy, dt = dx[use], dy[use], dt[use]
    system = np.array([[dx @ dx, dx @ dy], [dx @ dy, dy @ dy]]) / max(1, use.sum())
    strengths, axes = np.linalg.eigh(system)
    pull = -np.array([dx @ dt, dy @ dt]) / max(1, use.sum())
    seen = strengths > max(2.0, 0.1 * float(strengths.max()))
    if not seen.any():
        return float("inf")
    moved = (axes.T @ pull)[seen] / strengths[seen]
    return float(np.linalg.norm(moved - (axes.T @ velocity)[seen]))
