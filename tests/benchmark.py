"""How long a picture takes, and in which of its steps; the memory it takes; a folder's rate next to the bare network's.

`python tests/benchmark.py [CHECKPOINT]`
"""

import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import torch

from colorize import Colorizer, hub, read
from colorize.archive import colorize_files
from colorize.colorizer import BATCH
from colorize.memory import keep_memory

SIZES = {"640 x 480": (480, 640), "12 megapixels": (3000, 4000), "100 megapixels": (10_000, 10_000)}
REPEATS = 3
FOLDER = 96  # pictures


def seconds(function, *arguments):
    """-> the shortest of `REPEATS` times, and the result."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        result = function(*arguments)
        times.append(time.perf_counter() - began)
    return min(times), result


def peak() -> float:
    """Most memory that this process has held so far, MB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def main(checkpoint: str = hub.DEFAULT) -> None:
    keep_memory()
    colorizer = Colorizer.from_pretrained(checkpoint)
    gray = cv2.imread(str(Path(__file__).parents[1] / "examples" / "killarney-1910.jpg"), cv2.IMREAD_GRAYSCALE)
    folder_rate(colorizer, gray)
    colorizer(gray)
    print(f"{checkpoint} on {colorizer.device}, {torch.get_num_threads()} threads; {peak():.0f} MB before the first picture")
    print("| picture | read JPEG | network | join | write PNG | all, s | network's share | peak memory, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (height, width) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder, "in.jpg"), Path(folder, "out.png")
            cv2.imwrite(str(source), cv2.resize(gray, (width, height), interpolation=cv2.INTER_CUBIC))
            reading, picture = seconds(read, source)
            network, ab = seconds(colorizer._paint, [picture], colorizer.image_size)
            joining, result = seconds(colorizer._join, picture, ab[0], 1.0)
            writing, _ = seconds(result.save, target)
            steps = np.array([reading, network, joining, writing])
            figures = " | ".join(f"{s:.3f}" for s in steps)
            print(f"| {name} | {figures} | {steps.sum():.2f} | {network / steps.sum():.0%} | {peak():.0f} |", flush=True)


def folder_rate(colorizer: Colorizer, gray: np.ndarray) -> None:
    """JPEGs in, JPEGs out, against the network alone, in turns; the best of each counts, as the machine may have more to do."""
    threads, height, width = torch.get_num_threads(), *SIZES["640 x 480"]
    small = colorizer.image_size
    batches = [torch.rand(BATCH, 1, small, round(width * small / height)) * 2 - 1] * (FOLDER // BATCH)

    def bare():
        for batch in batches:
            colorizer.paint(batch)

    def one_a_thread():
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(colorizer.paint, batches))

    with tempfile.TemporaryDirectory() as place:
        jobs = [(Path(place, f"{i}.jpg"), Path(place, "out", f"{i}.jpg")) for i in range(FOLDER)]
        cv2.imwrite(str(jobs[0][0]), cv2.resize(gray, (width, height), interpolation=cv2.INTER_CUBIC))
        for source, _ in jobs[1:]:
            shutil.copy(jobs[0][0], source)

        def whole():
            assert not any(reason for _, reason in colorize_files(jobs, colorizer))

        rows = {"the network alone": bare, "one such a thread": one_a_thread, "the folder": whole}
        wall, work = {name: [] for name in rows}, {name: [] for name in rows}
        colorizer.paint(batches[0])
        for _ in range(REPEATS):
            for name, row in rows.items():
                began, worked = time.perf_counter(), time.process_time()
                row()
                wall[name].append((time.perf_counter() - began) / FOLDER)
                work[name].append((time.process_time() - worked) / FOLDER)
    print(f"{FOLDER} JPEGs of 640 x 480, {threads} threads")
    print("| | pictures a second | share | CPU time a picture, ms | share |\n|---|---|---|---|---|")
    for name in rows:
        shares = [min(times["the network alone"]) / min(times[name]) for times in (wall, work)]
        figures = f"{1 / min(wall[name]):.1f} | {shares[0]:.2f} | {1000 * min(work[name]):.1f} | {shares[1]:.2f}"
        print(f"| {name} | {figures} |", flush=True)
    torch.set_num_threads(threads)


if __name__ == "__main__":
    main(*sys.argv[1:])
