"""Clips drawn by program: moving blobs whose masks, and the background behind them, are known exactly."""

from dataclasses import dataclass

import numpy as np


@dataclass
class Clip:
    """
    A video with its truth.

    Args:
        frames (`np.ndarray` of shape `(frames, height, width, 3)`): In uint8.
        masks (`dict[int, np.ndarray]` of shape `(frames, height, width)`): By object, the part of it in sight.
        background (`np.ndarray` of shape `(height, width, 3)`): What all frames show behind the objects, without the
            camera's noise, in uint8.
    """

    frames: np.ndarray
    masks: dict[int, np.ndarray]
    background: np.ndarray


def procedural_clip(seed: int, hard: bool = False, frames: int = 8, size: int = 128, shifted: bool = False) -> Clip:
    """
    Draws objects that move, turn and grow before a static background. A plain clip has two blobs of distinct colours;
    a hard one has three on a textured background, which cross and leave the frame, and the third may have the colour
    of the first.

    Args:
        seed (`int`):
            The same seed draws the same clip.
        hard (`bool`, *optional*, defaults to `False`):
            Whether to draw a hard one.
        frames (`int`, *optional*, defaults to 8):
            How many.
        size (`int`, *optional*, defaults to 128):
            Height and width in pixels.
        shifted (`bool`, *optional*, defaults to `False`):
            Another look, to adapt to: striped bars in shades of gray, under strong noise.

    Returns:
        [`Clip`]
    """
    rng = np.random.default_rng(seed)
    count = 3 if hard else 2
    colours = _colours(rng, 1 + count, gray=shifted)
    if hard and rng.random() < 0.3:
        colours[3] = np.clip(colours[1] + rng.normal(0, 0.03, 3), 0, 1)
    background = _background(rng, colours[0], size, texture=0.10 if hard else 0.03)
    if shifted:
        background[:] = background.mean(-1, keepdims=True)
    video = np.repeat(background[None], frames, axis=0)
    labels = np.zeros((frames, size, size), np.uint8)
    for obj in rng.permutation(count) + 1:
        centres = _path(rng, frames, size, beyond=0.1 * size if hard else 0.0)
        steps = np.arange(frames)
        radii = rng.uniform(0.086, 0.19) * size * (0.85 if hard else 1) * np.exp(0.03 * rng.normal() * steps)
        angles = rng.uniform(0, 2 * np.pi) + 0.12 * rng.normal() * steps
        turns = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
        bumps = (np.clip(rng.normal(size=3), -1.25, 1.25) * (0.28, 0.16, 0.10)).astype(np.float32)
        shade = rng.normal(0, 0.10, 2).astype(np.float32)
        for number, ((x, y), radius, (cos, sin)) in enumerate(
            zip(centres, radii.astype(np.float32), turns, strict=True)
        ):
            reach = int(1.7 * radius) + 1
            top, left = max(int(y) - reach, 0), max(int(x) - reach, 0)
            place = (number, slice(top, max(int(y) + reach, 0)), slice(left, max(int(x) + reach, 0)))
            rows, columns = labels[place].shape
            right = (np.arange(left, left + columns, dtype=np.float32) + 0.5 - x)[None] / radius
            down = (np.arange(top, top + rows, dtype=np.float32) + 0.5 - y)[:, None] / radius
            along, across = right * cos + down * sin, down * cos - right * sin
            inside = _bar(along, across, bumps) if shifted else _blob(along, across, bumps)
            light = (shade[0] * right + shade[1] * down)[inside]
            if shifted:
                light += 0.15 * np.sign(np.sin(9 * along[inside]))
            video[place][inside] = colours[obj] + light[:, None]
            labels[place][inside] = obj
    noise = (rng.random((frames, size, size, 1), dtype=np.float32) - 0.5) * (0.28 if shifted else 0.07)
    masks = {obj: labels == obj for obj in range(1, count + 1)}
    video += noise
    return Clip(_to_bytes(video), masks, _to_bytes(background))


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _colours(rng: np.random.Generator, count: int, gray: bool) -> np.ndarray:
    """Each far from those before it, `(count, 3)`."""
    chosen = [rng.random(3)]
    candidates = rng.random((12, 3))
    if gray:
        chosen[0], candidates = np.full(3, rng.random()), np.repeat(rng.random((12, 1)), 3, axis=1)
    for _ in range(count - 1):
        nearest = np.min([np.linalg.norm(candidates - colour, axis=1) for colour in chosen], axis=0)
        chosen.append(candidates[np.argmax(nearest + 0.35 * rng.random(12))])
    return np.array(chosen, np.float32)


def _background(rng: np.random.Generator, colour: np.ndarray, size: int, texture: float) -> np.ndarray:
    """A slope of colour under a coarse texture, `(size, size, 3)`."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)[:, None]
    slopes = rng.normal(0, 0.06, (2, 3)).astype(np.float32)
    coarse = rng.normal(0, texture, (12, 12, 3)).astype(np.float32)
    weights = 1 - np.abs(np.linspace(0, 11, size, dtype=np.float32)[:, None] - np.arange(12, dtype=np.float32))
    weights = weights.clip(0)  # linear interpolation, `(size, 12)`
    fine = np.tensordot(weights, np.tensordot(weights, coarse, (1, 1)), (1, 1))
    return colour + axis[:, None] * slopes[0] + axis[None] * slopes[1] + fine


def _path(rng: np.random.Generator, frames: int, size: int, beyond: float) -> np.ndarray:
    """Centres `(frames, 2)` that are thrown back at the frame's border, or `beyond` pixels behind it."""
    steps = np.arange(frames)[:, None]
    speed = np.clip(rng.normal(0, 3, 2), -7, 7) * size / 128
    ways = rng.uniform(0.19, 0.81, 2) * size + speed * steps + rng.normal(0, 0.075, 2) * size / 128 * steps**2
    low = 0.11 * size - 2 * beyond
    width = size - 2 * low
    ways = (ways - low) % (2 * width)
    return (low + np.where(ways > width, 2 * width - ways, ways)).astype(np.float32)


def _blob(along: np.ndarray, across: np.ndarray, bumps: np.ndarray) -> np.ndarray:
    """Inside a circle of radius 1 with two, three and four bumps of the given heights."""
    distance = np.hypot(along, across) + 1e-4
    cos, sin = along / distance, across / distance
    cos2, sin2 = cos * cos - sin * sin, 2 * sin * cos
    cos3, cos4 = cos2 * cos - sin2 * sin, cos2 * cos2 - sin2 * sin2
    return distance < 1 + bumps[0] * cos2 + bumps[1] * cos3 + bumps[2] * cos4


def _bar(along: np.ndarray, across: np.ndarray, bumps: np.ndarray) -> np.ndarray:
    """Inside a bar with square ends, between 1.3 and 2.9 times as long as wide."""
    long = 1.25 + 0.5 * bumps[0]
    return (np.abs(along) < long) & (np.abs(across) < 0.7 - 0.5 * bumps[1])
