"""Trains the judge's classifiers of texture and style on drawn clips: `python assets/training/train_checker.py`.

Most clips are blurred and noisy, about what decoding latents does. Two minutes on one core; prints held-out accuracy.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from dit_accel_assets import painter, recognise, unmix, world
from torch import nn


def degrade(video: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a uint8 clip [F, H, W, 3], as it is or blurred by a cross of five pixels and made noisy, in 0..1."""
    clip = video.astype(np.float32) / 255
    if rng.random() < 0.3:
        return clip
    around = sum(np.roll(clip, step, axis) for axis in (1, 2) for step in (1, -1))
    keep = rng.uniform(0.2, 1.0)
    clip = keep * clip + (1 - keep) / 4 * around
    return np.clip(clip + rng.normal(0, rng.uniform(0, 0.05), clip.shape), 0, 1).astype(np.float32)


def collect(seed: int, count: int, held_out: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return features [N, D] and classes [N] of every classifier from `count` drawn clips."""
    rng = np.random.default_rng(seed)
    samples: dict[str, tuple[list[np.ndarray], list[int]]] = {kind: ([], []) for kind in recognise.KINDS}
    for index in range(count):
        side = int(rng.choice([40, 48, 64, 96]))
        scene = world.scene_of(seed, index, height=side, width=side, held_out=held_out)
        first = int(rng.integers(0, world.FRAMES))
        parts = unmix.unmix(degrade(painter.draw(scene)[first : first + 1], rng))
        for features in recognise.ground_features(parts, 0):
            samples["ground"][0].append(features)
            samples["ground"][1].append(world.TEXTURES.index(scene.ground_texture))
        for thing in scene.things[:1]:
            mask = parts.masks[thing.color][0]
            for part in unmix.components(unmix.firm(mask), 12)[:1]:
                near = np.where(part, mask, 0)
                features = recognise.object_features(parts.video[0], near, thing.color)
                if features is not None:
                    samples["texture"][0].append(features)
                    samples["texture"][1].append(world.TEXTURES.index(thing.texture))
                features = recognise.style_features(parts.video[0], near, thing.color)
                if features is not None and scene.style != "dim":
                    samples["style"][0].append(features)
                    samples["style"][1].append(recognise.KINDS["style"].index(scene.style))
    return {kind: (np.stack(x), np.asarray(y)) for kind, (x, y) in samples.items()}


def fit(x: np.ndarray, y: np.ndarray, classes: int, epochs: int, width: int = 64) -> dict[str, np.ndarray]:
    """Train one two-layer net; returns its weights and the features' statistics."""
    mean, std = x.mean(0), x.std(0) + 1e-3
    net = nn.Sequential(nn.Linear(x.shape[1], width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, classes))
    inputs, labels = torch.from_numpy((x - mean) / std).float(), torch.from_numpy(y)
    balance = 1 / np.sqrt(np.bincount(y, minlength=classes))
    loss_of = nn.CrossEntropyLoss(weight=torch.from_numpy(balance / balance.mean()).float())
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for picks in torch.randperm(len(inputs)).split(256):
            loss_of(net(inputs[picks]), labels[picks]).backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    names = {"w1": net[0].weight.T, "b1": net[0].bias, "w2": net[3].weight.T, "b2": net[3].bias}
    weights = {name: value.detach().numpy().astype(np.float16) for name, value in names.items()}
    return weights | {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}


def main() -> None:
    """Draw, train, save, and print the accuracy on held-out combinations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=8000, help="clips to train on (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = collect(11, args.count, held_out=False)
    weights = {
        f"{kind}.{name}": value
        for kind, (x, y) in data.items()
        for name, value in fit(x, y, len(recognise.KINDS[kind]), args.epochs).items()
    }
    recognise.WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(recognise.WEIGHTS, **weights)
    for kind, (x, y) in collect(12, 1500, held_out=True).items():
        guess = recognise.classify(kind, x).argmax(1)
        by_class = {n: round(float((guess[y == i] == i).mean()), 3) for i, n in enumerate(recognise.KINDS[kind])}
        print(kind, len(y), f"accuracy {(guess == y).mean():.3f}", by_class, flush=True)


if __name__ == "__main__":
    main()
