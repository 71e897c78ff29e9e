"""How steady the colours of a film are: the film's own, frame by frame, and steadied.

python train/evaluate_film.py FILM [--model NAME] [--steady 0.5 1]

FILM is one in colour, of which the program sees the lightness only. Prints a Markdown table: CDC (in thousandths), the warped
difference of a*, b*, and the colourfulness, as a share of that frame by frame.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import torch

from colorize import Colorizer, colorize_film
from colorize.color import rgb_to_lab
from colorize.colorizer import seen_shape
from colorize.hub import DEFAULT
from colorize.metrics import colour_divergence, colour_histograms, colourfulness, warped_difference

SIZE = 128  # pixels on the short side at which films are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("film", type=Path)
    parser.add_argument("--model", default=DEFAULT, metavar="NAME")
    parser.add_argument("--device")
    parser.add_argument("--steady", type=float, nargs="+", default=[0.5, 1.0], metavar="X")
    args = parser.parse_args()
    colorizer = Colorizer.from_pretrained(args.model, device=args.device)
    print(f"{args.film.name}, {args.model}\n")
    print("| | CDC, thousandths | warped difference | colourfulness | share of frame by frame |\n|---|---|---|---|---|")
    show("truth", figures(args.film))
    base = None
    for steady in (0, *args.steady):
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "colour.mkv")
            colorize_film(args.film, result, colorizer, steady=steady)
            row = figures(result)
        base = base or row[2]
        show(f"steady {steady:g}" if steady else "frame by frame", row, f"{row[2] / base:.3f}")


def show(name: str, row: tuple[float, float, float], share: str = "") -> None:
    print(f"| {name} | {row[0] * 1000:.3f} | {row[1]:.3f} | {row[2]:.2f} | {share} |", flush=True)


def figures(film: Path) -> tuple[float, float, float]:
    """CDC, warped difference and colourfulness of a film."""
    histograms, jumps, colours, last = [], [], [], None
    for rgb in frames(film):
        lab = rgb_to_lab(rgb / 255)[0].numpy()  # (3, h, w)
        if last is not None:
            jumps.append(warped_difference(last, lab))
        histograms.append(colour_histograms(rgb))
        colours.append(colourfulness(rgb / 255))
        last = lab
    return colour_divergence(torch.cat(histograms)), float(np.nanmean(jumps)), float(torch.cat(colours).mean())


def frames(film: Path) -> Iterator[torch.Tensor]:
    """Each frame, `SIZE` pixels on its short side: (1, 3, h, w) uint8."""
    with av.open(str(film)) as container:
        for frame in container.decode(video=0):
            h, w = seen_shape(frame.height, frame.width, SIZE)
            rgb = cv2.resize(frame.to_ndarray(format="rgb24"), (w, h), interpolation=cv2.INTER_AREA)
            yield torch.from_numpy(rgb).permute(2, 0, 1)[None]


if __name__ == "__main__":
    main()
