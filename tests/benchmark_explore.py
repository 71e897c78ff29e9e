"""Pictures a second of train/explore.py, the report's own method, and bare decoding, on all cores, in turn.

    python tests/benchmark_explore.py [PICTURES]

on JPEGs of 640 x 640 pixels, cut from the photographs of the tests.
"""

import multiprocessing
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import explore
from survey import Pictures, accelerate, chunks, parallel

SIDE, TURNS = 640, 3


def make(folder: Path, count: int) -> None:
    rng = random.Random(0)
    photos = [cv2.imread(str(p)) for p in sorted((Path(__file__).parent / "photos").glob("*.jpg"))]
    for i in range(count):
        photo = photos[i % len(photos)]
        scale = rng.uniform(1.3, 1.6)  # of 512 pixels
        photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        top, left = (rng.randint(0, side - SIDE) for side in photo.shape[:2])
        cv2.imwrite(str(folder / f"{i:06}.jpg"), photo[top : top + SIDE, left : left + SIDE], [cv2.IMWRITE_JPEG_QUALITY, 90])


def bare(file: str) -> None:
    cv2.imread(file)


def process_image(file: str) -> tuple[np.ndarray, np.ndarray]:
    """As the report has it."""
    bgr = cv2.imread(file)
    image = np.append(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), cv2.cvtColor(bgr, cv2.COLOR_BGR2Lab), axis=2)
    counts = np.zeros((6, 256), np.int64)
    for channel in range(6):
        counts[channel] = np.bincount(image[:, :, channel].flatten(), minlength=256)
    return counts, np.array(image.shape[:2])


def pooled(function, files: list[str]) -> np.ndarray:
    """A process pool with a callback, as in the report."""
    total = np.zeros((6, 256), np.int64)

    def update(result) -> None:
        nonlocal total
        if result is not None:
            total += result[0]

    with multiprocessing.Pool() as pool:
        for file in files:
            pool.apply_async(function, (file,), callback=update)
        pool.close()
        pool.join()
    return total


def ours(folder: Path) -> np.ndarray:
    pictures = Pictures(str(folder))
    counts, ab = 0, 0
    for result in parallel(partial(explore.count, pictures), chunks(range(len(pictures))), accelerate(), "ours"):
        if isinstance(result, explore.ColourCount):
            counts, ab = counts + result.counts, ab + result.ab
    return np.stack([*counts, ab.sum(1), ab.sum(0)])


def main(count: str = "5000") -> None:
    cv2.setNumThreads(1)  # or forked processes wait for ever for the threads of this one
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, int(count))
        files = sorted(map(str, folder.iterdir()))
        ways = {"bare decoding": partial(pooled, bare, files), "the report's method": partial(pooled, process_image, files)}
        ways["train/explore.py"] = partial(ours, folder)
        seconds, work, found = {way: [] for way in ways}, {way: [] for way in ways}, {}
        for _ in range(TURNS):
            for way, run in ways.items():
                began, worked = time.perf_counter(), sum(os.times()[:4])
                found[way] = run()
                seconds[way].append(time.perf_counter() - began)
                work[way].append(sum(os.times()[:4]) - worked)
        assert (found["train/explore.py"] == found["the report's method"]).all()
        rates = {way: len(files) / sorted(times)[TURNS // 2] for way, times in seconds.items()}
        print(f"{multiprocessing.cpu_count()} cores, {len(files)} pictures, median of {TURNS}")
        print("| | pictures/s | of bare decoding | of the report's method | CPU time a picture, ms |\n|---|---|---|---|---|")
        for way, rate in rates.items():
            others = " | ".join(f"{rate / rates[other]:.2f}" for other in ("bare decoding", "the report's method"))
            print(f"| {way} | {rate:.0f} | {others} | {sorted(work[way])[TURNS // 2] / len(files) * 1000:.2f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
