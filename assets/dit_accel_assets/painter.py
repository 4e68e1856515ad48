"""Draws scenes of `world` at any length: frames, and what is visible of every thing; vectorised over time."""

from __future__ import annotations

import numpy as np

from dit_accel_assets import clips, world
from dit_accel_assets.world import Scene

TINT = 0.6
"""How far an object's second colour lies from its colour on the way to white."""
GROUND_STEP = 42.0
"""How much brighter, in all channels, the light places of a textured background are."""
DIM = 0.6
_LATTICE = np.random.default_rng(0).random((64, 64)).astype(np.float32)


def draw(scene: Scene, frames: int = world.FRAMES) -> np.ndarray:
    """Draw a clip, uint8 [F, H, W, 3]; `frames` must be of the form 4k+1 (ValueError otherwise)."""
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"frames={frames}: a clip has 4k+1 frames; use {max(1, frames // 4 * 4 + 1)}")
    picture = _ground(scene, frames)
    for index in reversed(range(len(scene.things))):
        cover, u, v, size = _cover(scene, index, frames)
        thing = scene.things[index]
        color = np.asarray(world.COLORS[thing.color], dtype=np.float32)
        light = TINT * texture(thing.texture, u, v, size / 3.2, thing.phase, size)[..., None]
        color = color + light * (255.0 - color)
        if scene.style == "outlined":
            color = color * _edge(scene, index, frames)[..., None]
        picture += cover[..., None] * (color - picture)
    if scene.style == "dim":
        picture *= DIM
    return np.rint(picture).astype(np.uint8)


def masks(scene: Scene, frames: int) -> np.ndarray:
    """Return what is visible of every thing, float32 [N, F, H, W] in 0..1; things in front cover those behind."""
    free = np.ones((frames, scene.height, scene.width), dtype=np.float32)
    seen = []
    for index in range(len(scene.things)):
        cover = _cover(scene, index, frames)[0]
        seen.append(cover * free)
        free = free * (1 - cover)
    return np.stack(seen)


def _local(scene: Scene, index: int, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a thing's own coordinates (u, v) of every pixel [F, H, W] and its side [F, 1, 1]."""
    center = world.centers(scene, frames)[index].astype(np.float32)
    angle = world.angles(scene, frames)[index].astype(np.float32)[:, None, None]
    size = world.object_sizes(scene, frames)[index].astype(np.float32)[:, None, None]
    x = (np.arange(scene.width, dtype=np.float32) + 0.5)[None, None, :] - center[:, 0, None, None]
    y = (np.arange(scene.height, dtype=np.float32) + 0.5)[None, :, None] - center[:, 1, None, None]
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x, size


def _cover(scene: Scene, index: int, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    u, v, size = _local(scene, index, frames)
    depth = (0.6 if scene.style == "outlined" else 0.0) - distance(scene.things[index].shape, u, v, size)
    cover = np.clip(0.5 + depth / (5.0 if scene.style == "soft" else 1.0), 0.0, 1.0)
    return cover, u, v, size


def _edge(scene: Scene, index: int, frames: int) -> np.ndarray:
    """Return how much of a thing's colour its black outline leaves, [F, H, W]."""
    u, v, size = _local(scene, index, frames)
    return np.clip(-distance(scene.things[index].shape, u, v, size) - 0.6, 0.0, 1.0)


def distance(shape: str, u: np.ndarray, v: np.ndarray, size: np.ndarray | float) -> np.ndarray:
    """Return the distance to a shape's edge in pixels, negative inside; `size` is the side of its box."""
    if shape == "ring":
        return np.abs(np.hypot(u, v) - size * 0.33) - size * 0.17
    return clips.signed_distance(shape, u, v, size)


def texture(
    kind: str,
    u: np.ndarray,
    v: np.ndarray,
    period: np.ndarray | float,
    phase: tuple[float, float],
    extent: np.ndarray | float,
) -> np.ndarray:
    """Return a texture's lightness in 0..1 at pixel coordinates (u, v); `extent` is the length of a gradient."""
    turn = 2 * np.pi / period
    if kind == "plain":
        return np.zeros(np.broadcast_shapes(u.shape, v.shape), dtype=np.float32)
    if kind == "striped":
        return _steep(np.sin(turn * v + phase[0]) + 0 * u)
    if kind == "checked":
        return _steep(2 * np.sin(turn / 1.5 * u + phase[0]) * np.sin(turn / 1.5 * v + phase[1]))
    if kind == "dotted":
        return _steep(1.2 * (np.cos(turn * u + phase[0]) + np.cos(turn * v + phase[1]) - 0.55))
    if kind == "shaded":
        return np.clip(0.5 + u / extent, 0.0, 1.0) + 0 * v
    if kind == "grainy":
        return _noise(u * (1.6 / period) + phase[0], v * (1.6 / period) + phase[1])
    raise ValueError(f"texture {kind!r} is not known; use one of {', '.join(world.TEXTURES)}")


def _steep(wave: np.ndarray) -> np.ndarray:
    return np.clip(0.5 + 1.2 * wave, 0.0, 1.0)


def _noise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return value noise on a lattice of whole numbers, wrapped after 64, with its contrast raised."""
    x, y = np.broadcast_arrays(x, y)
    column, row = np.floor(x).astype(np.int32), np.floor(y).astype(np.int32)
    right, low = x - column, y - row
    right, low = right * right * (3 - 2 * right), low * low * (3 - 2 * low)
    column, row = column % 64, row % 64
    top = _LATTICE[row, column] * (1 - right) + _LATTICE[row, (column + 1) % 64] * right
    bottom = _LATTICE[(row + 1) % 64, column] * (1 - right) + _LATTICE[(row + 1) % 64, (column + 1) % 64] * right
    return np.clip(1.4 * (top * (1 - low) + bottom * low) - 0.2, 0.0, 1.0)


def _ground(scene: Scene, frames: int) -> np.ndarray:
    """Return the background, float32 [F, H, W, 3]; it moves against the camera."""
    count = frames if scene.pan else 1
    time = np.arange(count, dtype=np.float32)[:, None, None]
    pan = scene.pan_velocity
    x = (np.arange(scene.width, dtype=np.float32) + 0.5)[None, None, :] + float(pan[0]) * time
    y = (np.arange(scene.height, dtype=np.float32) + 0.5)[None, :, None] + float(pan[1]) * time
    half = scene.width / 2
    light = texture(scene.ground_texture, x - half, y, 12.0, scene.ground_phase, float(scene.width))
    color = np.asarray(world.GROUNDS[scene.ground], dtype=np.float32)
    picture = color + GROUND_STEP * light[..., None].astype(np.float32)
    return np.broadcast_to(picture, (frames, scene.height, scene.width, 3)).copy()
