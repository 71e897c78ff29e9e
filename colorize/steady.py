"""Colours that stay with what moves, from frame to frame, and never cross a cut."""

import cv2
import numpy as np

TILES = 4  # a cut is seen in the histograms of TILES x TILES parts of the frame
CUT = 20  # by so much of 255 they move at a cut: measured, 27 to 83 at cuts, at most 15 within shots that pan and flicker
SLACK = 6.0  # difference in 8-bit lightness, after motion, at which trust has fallen to 1 / e, in a film without grain
LONGEST_MEMORY = 0.95  # of a frame's colours, at most so much is of the past
MOST_GAIN = 1.25


class Steady:
    """A recursive filter over the network's a*, b*: what moved here from the last frame brings its colours along.

    `strength` is 0 (each frame by itself) to 1; at 0.5 the memory is three frames long, at 1 twenty. How far a pixel trusts
    the past is for its motion to say: see `motion`. Averages are duller than what they are of, so the colourfulness that is
    lost on the whole is made up for.

    Attributes:
        memory: what the next frame needs to know of the last, as arrays; another `Steady` goes on with it.
    """

    def __init__(self, strength: float, memory: dict[str, np.ndarray] | None = None):
        self.strength = strength
        self.memory = memory or {}

    def __call__(self, lightness: np.ndarray, ab: np.ndarray) -> np.ndarray:
        """L* (h, w) and the network's a*, b* (2, h, w) of the next frame, float32 -> its steady a*, b*."""
        if self.strength == 0:
            return ab
        gray = (lightness * 2.55).astype(np.uint8)
        mixed, chromas = ab, np.zeros(2)
        if self.memory and self.memory["gray"].shape == gray.shape and change(self.memory["gray"], gray) < CUT:
            weight = LONGEST_MEMORY * self.strength**0.5
            field, trust = motion(self.memory["gray"], gray)
            mixed = ab + weight * trust * (warp(self.memory["ab"], field) - ab)
            chromas = weight * self.memory["chromas"]
        chromas = chromas + [vividness(ab), vividness(mixed)]  # of late: the network's, and what is left of it
        self.memory = {"gray": gray, "ab": mixed, "chromas": chromas}
        gain = min(chromas[0] / chromas[1], MOST_GAIN) if chromas[1] else 1
        return mixed * np.float32(gain)


def vividness(ab: np.ndarray) -> float:
    """a*, b* (2, h, w) -> how colourful they are, in the manner of `metrics.colourfulness`."""
    axes = ab.reshape(2, -1)
    return float(np.linalg.norm(axes.std(1)) + 0.3 * np.linalg.norm(axes.mean(1)))


def change(last: np.ndarray, now: np.ndarray) -> float:
    """Two frames (h, w) uint8 -> how far gray values move from one to the other, 0 to 255, wherever in its part of the frame a
    pixel goes: the Wasserstein distance of the parts' histograms."""
    a, b = (_shares(frame) for frame in (last, now))
    return float(np.abs(a - b).sum()) / TILES**2


def _shares(gray: np.ndarray) -> np.ndarray:
    """(h, w) uint8 -> for each part of the frame, the share of its pixels up to each gray value, (TILES * TILES, 256)."""
    h, w = gray.shape
    tile = (np.arange(h) * TILES // h)[:, None] * TILES + np.arange(w) * TILES // w  # (h, w)
    counts = np.bincount((tile * 256 + gray).ravel(), minlength=TILES**2 * 256).reshape(-1, 256)
    return counts.cumsum(1) / np.maximum(counts.sum(1, keepdims=True), 1)


def motion(last: np.ndarray, now: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two frames (h, w) uint8 -> where each pixel was in the last, (h, w, 2) as x and y, and the trust in it, (h, w) in [0, 1].

    DIS optical flow (Kroeger et al. 2016), trusted where what is there looks the same and where the way back ends at its
    beginning (Sundaram et al. 2010, equation 5).
    """
    last, now = (cv2.GaussianBlur(frame, (5, 5), 0) for frame in (last, now))  # grain moves nowhere
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    back = flow.calc(now, last, None)  # (h, w, 2): now -> last
    forth = flow.calc(last, now, None)
    field = grid(*now.shape) + back
    there = cv2.remap(last, field, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).astype(np.float32)
    error = now - there
    error = np.abs(cv2.blur(error - error.mean(), (5, 5)))  # the light of old films flickers as a whole
    returned = cv2.remap(forth, field, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(1e3, 1e3))
    astray = square(back + returned)
    length = square(back) + square(returned)
    trust = np.exp(-np.square(error / (SLACK + np.median(error)))) * (astray < 0.01 * length + 0.5)
    return field, trust.astype(np.float32)


def warp(ab: np.ndarray, field: np.ndarray) -> np.ndarray:
    """(2, h, w) as it is at `field` (h, w, 2)."""
    return np.stack([cv2.remap(c, field, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for c in ab])


def square(flow: np.ndarray) -> np.ndarray:
    """(h, w, 2) -> the squared length of each vector, (h, w)."""
    return np.einsum("hwc,hwc->hw", flow, flow)


def grid(h: int, w: int) -> np.ndarray:
    """(h, w, 2): each pixel's x and y."""
    return np.dstack(np.meshgrid(np.arange(w), np.arange(h))).astype(np.float32)
