"""Pictures a second that each program trains on, from a real data set and on one cached batch of it: whether decoding keeps up.

    python tests/benchmark_training.py DATASET [more flags of the programs]

Both run in turn, at a reduced size unless flags say otherwise; the ratio is what counts.
"""

import itertools
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import convnet
import gan
import unet
from run import Run

STEPS, TURNS = 20, 3
SMALL = [
    "--image-size",
    "128",
    "--batch-size",
    "16",
    "--workers",
    "1",
    "--mixed-precision",
    "bf16",
    "--validation-pictures",
    "16",
]
UNET = ["--num-filters", "24", "--num-downs", "7"]
CRITIC = ["--critic-filters", "16", "--critic-layers", "4"]
PROGRAMS = {
    "convnet": (convnet, ["--width", "8"]),
    "unet": (unet, ["--no-attention", *UNET]),
    "unet, attention": (unet, UNET),
    "gan": (gan, ["--start", "unet-attention", *CRITIC]),
}


class Timed(Run):
    """A run that takes the time of its steps, on cached data or not, and stops before it validates."""

    cached, rates = False, None

    def begin(self, *objects, **more):
        batches, *prepared = super().begin(*objects, **more)
        return [itertools.repeat(next(batches)) if self.cached else batches, *prepared]

    def __iter__(self):
        for step in super().__iter__():
            if step == 6:  # after the first ones, which set up memory and workers
                began = time.perf_counter()
            if step == 6 + STEPS:
                Timed.rates[self.cached].append(STEPS * self.pictures_a_step / (time.perf_counter() - began))
                return
            yield step


def main(dataset: str, *flags: str) -> None:
    print(f"{torch.get_num_threads()} threads")
    print("| program | real data, pictures/s | cached batch, pictures/s | ratio |\n|---|---|---|---|")
    for name, (program, special) in PROGRAMS.items():
        program.Run, Timed.rates = Timed, {False: [], True: []}
        for Timed.cached in [False, True] * TURNS:
            with tempfile.TemporaryDirectory() as folder:
                sys.argv = [name, "--dataset", dataset, "--run", f"{folder}/run", *SMALL, *special, *flags]
                program.main()
        real, cached = (sorted(Timed.rates[kind])[TURNS // 2] for kind in (False, True))
        print(f"| {name} | {real:.1f} | {cached:.1f} | {real / cached:.2f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
