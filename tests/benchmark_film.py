"""Frames a second of a film against the bare network's, step by step. `python tests/benchmark_film.py [FILM [CHECKPOINT]]`

All rounds alternate, so that whatever else the machine does falls on each alike. Without FILM: a pan over a photograph at 720p.
"""

import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import torch

from colorize import Colorizer, colorize_film
from colorize.colorizer import BATCH, seen_shape
from colorize.film import X264
from colorize.hub import DEFAULT
from colorize.memory import keep_memory

ROUNDS, FRAMES, SHAPE = 3, 120, (720, 1280)


def pan(path: Path) -> None:
    """A camera that moves over an old photograph."""
    height, width = SHAPE
    gray = cv2.imread(str(Path(__file__).parents[1] / "examples" / "killarney-1910.jpg"), cv2.IMREAD_GRAYSCALE)
    gray = cv2.resize(gray, (width * 5 // 4, height * 5 // 4), interpolation=cv2.INTER_CUBIC)
    encode(path, (gray[i : i + height, 2 * i : 2 * i + width] for i in range(FRAMES)))


def encode(path: Path, frames) -> None:
    """Gray arrays (H, W) or frames, with the settings that films get."""
    with av.open(str(path), "w") as film:
        video = film.add_stream("libx264", rate=25, options=X264)
        for i, frame in enumerate(frames):
            if isinstance(frame, np.ndarray):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "gray").reformat(format="yuv420p")
            if i == 0:
                video.width, video.height = frame.width, frame.height
            frame.pts, frame.time_base, frame.pict_type = i, Fraction(1, 25), 0
            film.mux(video.encode(frame))
        film.mux(video.encode(None))


def decode(film: Path) -> list[av.VideoFrame]:
    with av.open(str(film)) as container:
        container.streams.video[0].thread_type = "AUTO"
        return list(container.decode(video=0))


def main(film: str | None = None, checkpoint: str = DEFAULT) -> None:
    keep_memory()
    colorizer = Colorizer.from_pretrained(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(film or Path(folder, "in.mp4")), Path(folder, "out.mp4")
        if film is None:
            pan(source)
        frames = decode(source)
        shape = seen_shape(frames[0].height, frames[0].width, colorizer.image_size)
        lightness = torch.rand(BATCH, 1, *shape) * 2 - 1
        steps = {
            "the bare network": lambda: [colorizer.paint(lightness) for _ in range(0, len(frames), BATCH)],
            "decoding": lambda: decode(source),
            "encoding": lambda: encode(target, decode(source)),
            "frame by frame": lambda: colorize_film(source, target, colorizer, steady=0),
            "steady": lambda: colorize_film(source, target, colorizer),
        }
        colorize_film(source, target, colorizer)  # tables and buffers are made
        times = {name: [] for name in steps}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                before = time.perf_counter(), time.process_time()
                step()
                times[name].append((time.perf_counter() - before[0], time.process_time() - before[1]))
    print(f"{len(frames)} frames of {frames[0].width} x {frames[0].height}, best of {ROUNDS} rounds")
    print(f"{checkpoint} on {colorizer.device}, {torch.get_num_threads()} threads\n")
    print("| | frames a second | of the bare network's | ms of all cores a frame |\n|---|---|---|---|")
    bare = min(wall for wall, _ in times["the bare network"])
    for name, rounds in times.items():
        wall, cores = (min(column) for column in zip(*rounds, strict=True))
        name = "decoding and encoding" if name == "encoding" else name
        print(f"| {name} | {len(frames) / wall:.1f} | {bare / wall:.2f} | {cores / len(frames) * 1000:.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
