"""Says what a clip shows, by rules alone: colour, shape, direction, background; judges drawn and generated clips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dit_accel_assets import clips


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What the checker saw; a field is None where the clip shows no such thing (no object, no motion)."""

    color: str | None
    shape: str | None
    direction: str | None
    background: str | None
    travel: float
    """Distance between the object's first and last centre, in pixels."""


def check_clip(video: np.ndarray) -> Finding:
    """Judge a clip [F, H, W, 3], uint8 or float in 0..1; tolerates soft edges and slight noise."""
    if video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"a clip is [frames, height, width, 3]; found {video.shape}")
    frames = video.astype(np.float64) if video.dtype == np.uint8 else video.astype(np.float64) * 255.0
    ground = _background(frames)
    background = _nearest(ground, clips.BACKGROUNDS)
    cover = _cover(frames, ground)
    indices = [index for index, frame in enumerate(cover) if frame.sum() >= 40.0]
    if not indices:
        return Finding(color=None, shape=None, direction=None, background=background, travel=0.0)
    solid = cover > 0.8
    color = _nearest(np.median(frames[solid], axis=0), clips.COLORS) if solid.any() else None
    shapes = [_shape(cover[index]) for index in indices[:: max(1, len(indices) // 8)]]
    shape = max(clips.SHAPES, key=shapes.count)
    direction, travel = _direction(cover, indices)
    return Finding(color=color, shape=shape, direction=direction, background=background, travel=travel)


def closeness(video: np.ndarray, scene: clips.PlainScene) -> dict[str, float]:
    """Say how near a clip comes to each of a scene's words, 0 to 1, where `check_clip` says yes or no.

    Colour and background by RGB distance (0 at 128), the shape by its template's overlap, the direction by the cosine
    of the fitted path, less under 5 pixels; 0 where no object is found.
    """
    frames = video.astype(np.float64) if video.dtype == np.uint8 else video.astype(np.float64) * 255.0
    ground = _background(frames)
    near = {"background": _nearness(ground, clips.BACKGROUNDS[scene.background])}
    cover = _cover(frames, ground)
    indices = [index for index, frame in enumerate(cover) if frame.sum() >= 40.0]
    solid = cover > 0.8
    if not indices or not solid.any():
        return {**near, "color": 0.0, "shape": 0.0, "direction": 0.0}
    overlaps = [_overlaps(cover[index]).get(scene.shape, 0.0) for index in indices[:: max(1, len(indices) // 8)]]
    return {
        **near,
        "color": _nearness(np.median(frames[solid], axis=0), clips.COLORS[scene.color]),
        "shape": float(np.mean(overlaps)),
        "direction": max(0.0, _along(cover, indices, scene.direction)),
    }


def path_distance(video: np.ndarray) -> float:
    """Return how far the object of a clip [F, H, W, 3] strays from a straight path of constant speed, RMS in pixels.

    Of all such paths the nearest one: drawn clips of any length follow one. NaN where fewer than two frames show an
    object.
    """
    frames = video.astype(np.float64) if video.dtype == np.uint8 else video.astype(np.float64) * 255.0
    cover = _cover(frames, _background(frames))
    indices = [index for index, frame in enumerate(cover) if frame.sum() >= 40.0]
    if len(indices) < 2:
        return float("nan")
    track, time = np.stack([_centroid(cover[index]) for index in indices]), np.asarray(indices, dtype=np.float64)
    slope, start = np.polyfit(time, track, 1)
    return float(np.sqrt(np.square(track - (np.outer(time, slope) + start)).sum(1).mean()))


def _nearness(color: np.ndarray, named: tuple[int, int, int]) -> float:
    return max(0.0, 1.0 - float(np.linalg.norm(color - np.asarray(named))) / 128.0)


def _along(cover: np.ndarray, indices: list[int], direction: str) -> float:
    """Return the cosine of the fitted path with a direction, times its length up to 5 pixels."""
    shift = _shift(cover, indices)
    length, step = float(np.hypot(*shift)), clips.DIRECTIONS[direction]
    cosine = float(np.dot(shift, step)) / max(length * float(np.hypot(*step)), 1e-9)
    return cosine * min(1.0, length / 5.0)


def _background(frames: np.ndarray) -> np.ndarray:
    """Return the colour [3] of the background: the median over time of every pixel, then over the frame."""
    return np.median(np.median(frames, axis=0).reshape(-1, 3), axis=0)


def _nearest(color: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.square(np.asarray(names[name]) - color).sum()))


def _cover(frames: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Return the share [F, H, W] of every pixel that the object covers, with stray pixels dropped.

    The object's colour is the median of the pixels farthest from the background; a share is the projection on the
    way there.
    """
    away = frames - ground
    distance = np.sqrt(np.square(away).sum(-1))
    strong = distance >= max(45.0, 0.75 * np.quantile(distance, 0.99))
    if not strong.any():
        return np.zeros(distance.shape)
    axis = np.median(away[strong], axis=0)
    cover = np.clip(away @ axis / max(1.0, float(axis @ axis)), 0.0, 1.0)
    cover[cover < 0.2] = 0.0
    neighbours = np.zeros_like(cover)
    padded = np.pad(cover > 0.5, ((0, 0), (1, 1), (1, 1)))
    for dy in (0, 1, 2):
        for dx in (0, 1, 2):
            neighbours += padded[:, dy : dy + cover.shape[1], dx : dx + cover.shape[2]]
    return np.where(neighbours >= 3, cover, 0.0)


def _centroid(cover: np.ndarray) -> np.ndarray:
    grid_y, grid_x = np.mgrid[: cover.shape[0], : cover.shape[1]] + 0.5
    weight = cover.sum()
    return np.array([(cover * grid_x).sum() / weight, (cover * grid_y).sum() / weight])


def _direction(cover: np.ndarray, indices: list[int]) -> tuple[str | None, float]:
    """Return the direction of the straight line fitted to the tracked centroid, and its length; None under 5 pixels."""
    if len(indices) < 2:
        return None, 0.0
    shift = _shift(cover, indices)
    travel = float(np.hypot(*shift))
    if travel < 5.0:
        return None, travel
    cosines = {name: float(np.dot(shift, step) / np.hypot(*step)) for name, step in clips.DIRECTIONS.items()}
    return max(cosines, key=lambda name: cosines[name]), travel


def _shift(cover: np.ndarray, indices: list[int]) -> np.ndarray:
    """Return from where to where the straight line goes that is fitted to the tracked centroid, (x, y) pixels."""
    if len(indices) < 2:
        return np.zeros(2)
    track = np.stack([_centroid(cover[index]) for index in indices])
    time = np.asarray(indices, dtype=np.float64)
    return np.polyfit(time, track, 1)[0] * (time[-1] - time[0])


def _shape(cover: np.ndarray) -> str:
    """Return the shape whose drawn template, moved and sized to fit, overlaps the covered pixels best (soft IoU)."""
    overlaps = _overlaps(cover)
    return max(clips.SHAPES, key=lambda shape: overlaps.get(shape, 0.0))


def _overlaps(cover: np.ndarray) -> dict[str, float]:
    """Return the soft IoU of each shape's drawn template, moved and sized to fit the covered pixels; {} without any."""
    rows, columns = np.nonzero(cover.max(1) > 0.5)[0], np.nonzero(cover.max(0) > 0.5)[0]
    if not rows.size or not columns.size:
        return {}
    box = (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2
    extent = (rows[-1] - rows[0] + columns[-1] - columns[0]) / 2 + 1
    y, x = np.mgrid[: cover.shape[0], : cover.shape[1]] + 0.5
    best: dict[str, float] = {}
    for shape in clips.SHAPES:
        for size in (extent - 1.5, extent, extent + 1.5):
            template = np.clip(0.5 - clips.signed_distance(shape, x - box[1], y - box[0], size), 0.0, 1.0)
            overlap = np.minimum(template, cover).sum() / np.maximum(template, cover).sum()
            best[shape] = max(best.get(shape, -1.0), float(overlap))
    return best
