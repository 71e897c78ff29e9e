"""Seconds a picture takes, and in which of its steps; the memory it takes. `python tests/benchmark.py [CHECKPOINT]`"""

import re
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from colorize import Colorizer, read

SIZES = {"640 x 480": (480, 640), "12 megapixels": (3000, 4000), "100 megapixels": (10_000, 10_000)}
REPEATS = 3


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


def main(checkpoint: str = "unet-attention-gan") -> None:
    colorizer = Colorizer.from_pretrained(checkpoint)
    gray = cv2.imread(str(Path(__file__).parents[1] / "examples" / "killarney-1910.jpg"), cv2.IMREAD_GRAYSCALE)
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


if __name__ == "__main__":
    main(*sys.argv[1:])
