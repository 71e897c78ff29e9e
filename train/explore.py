"""Look at a data set: how often its colours and sizes occur, and what is gray, tinted, damaged, tiny or there twice.

    accelerate launch train/explore.py PHOTOS   # a folder or a zip of pictures, a `datasets` folder or a Hub id

In the folder `--output` are then report.html, all of it on one page, and its figures as PNG; statistics.md; warnings.csv; and,
for programs, RGB_frequencies.csv and Lab_frequencies.csv (256 counts for each channel) and image_sizes.csv (height, width).
Lab is OpenCV's in 8 bits: L* / 100 * 255, a* + 128, b* + 128. Several processes share the pictures out and write the same
files, byte for byte.
"""

import argparse
import base64
import csv
import html
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from colorize.atomic import atomic
from colorize.color import lab_to_rgb, rgb_to_lab
from data import decode
from survey import Pictures, accelerate, chunks, gather, keep_apart, look, originals, parallel

COLOURS = 2**24
BAND = 2**22  # pixels counted at once
TINY = 128  # pixels of the short side
SIDES = (128, 256, 512, 1024)  # pixels
SHOWN = 24  # pictures of a kind
CELL = 128  # pixels: side of one of them

CHANNELS = {"R": "tab:red", "G": "tab:green", "B": "tab:blue", "L": "0.3", "a": "tab:pink", "b": "tab:olive"}
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.formatter.use_mathtext": True, "axes.formatter.limits": (-3, 4), "legend.frameon": False, "lines.linewidth": 1.4,
}  # fmt: skip


def flags() -> argparse.ArgumentParser:
    f = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    f.add_argument("dataset", metavar="DATASET", help="a folder or a zip of pictures, a `datasets` folder or a Hub id")
    f.add_argument("--output", type=Path, default=Path("runs/exploration"), metavar="FOLDER", help="default: runs/exploration")
    return f


def main() -> None:
    args = flags().parse_args()
    keep_apart(args.dataset, args.output)
    accelerator = accelerate()
    pictures = Pictures(args.dataset)
    found, counts, ab = [], np.zeros((4, 256), np.int64), np.zeros((256, 256), np.int64)
    for result in parallel(partial(count, pictures), chunks(range(len(pictures))), accelerator, "looking"):
        if isinstance(result, ColourCount):
            counts, ab = counts + result.counts, ab + result.ab
        else:
            found.append(result)
    found = gather(found)
    counts, ab = (accelerator.reduce(torch.from_numpy(x).to(accelerator.device)).cpu().numpy() for x in (counts, ab))
    if accelerator.is_main_process:
        with matplotlib.rc_context(STYLE):
            report(args, pictures, found, np.stack([*counts, ab.sum(1), ab.sum(0)]), ab)
    accelerator.end_training()


# Counting


def count(pictures: Pictures, share: Sequence[Sequence[int]]) -> Iterator[tuple]:
    """What was found in each chunk and, at the end, the colours of all."""
    colours = ColourCount()
    for numbers in share:
        yield len(numbers), look(pictures, numbers, colours.add)
    colours.settle()
    yield 0, colours


class ColourCount:
    """How often each of the 2^24 colours occurs, and so each value of R, G, B, L, a and b.

    This takes half the time of six histograms and a conversion to Lab of each single pixel: a colour is converted once. Its
    place in the table is its number (B, G, R from the highest byte) times -255, mod 2^24: the bytes B - G, G - R, R. So similar
    colours are near each other, and most of a photograph's in the processor's cache.

    Attributes:
        counts: (4, 256) of R, G, B, L.
        ab: (256, 256) of pairs (a, b).
    """

    def __init__(self):
        self.table, self.pixels = np.zeros(COLOURS, np.uint32), 0
        self.counts, self.ab = np.zeros((4, 256), np.int64), np.zeros((256, 256), np.int64)

    def add(self, rgb: np.ndarray) -> None:
        """(H, W, 3) uint8."""
        height, width = rgb.shape[:2]
        if self.pixels + height * width >= 2**32:
            self.settle()
            self.table, self.pixels = np.zeros(COLOURS, np.uint32), 0
        self.pixels += height * width
        rows = max(BAND // width, 1)
        for top in range(0, height, rows):
            places = cv2.cvtColor(rgb[top : top + rows], cv2.COLOR_RGB2RGBA).view("<i4").ravel()
            places *= -255
            places &= COLOURS - 1
            np.add.at(self.table, places.astype(np.intp), np.uint32(1))  # 1 alone, of another type, is twenty times as slow

    def settle(self) -> None:
        """Table to counts; the table is gone."""
        back = pow(-255, -1, COLOURS)
        for start in range(0, COLOURS, 2**20):
            places = np.flatnonzero(self.table[start : start + 2**20]) + start
            if len(places):
                times = self.table[places].astype(float)  # exact: `bincount` adds in float64
                rgb = (places * back % COLOURS).astype("<u4").view(np.uint8).reshape(1, -1, 4)[..., :3].copy()  # (1, N, 3)
                lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2Lab)
                for counts, values in zip(self.counts, (*rgb[0].T, lab[0, :, 0]), strict=True):
                    counts += np.bincount(values, times, 256).astype(np.int64)
                pairs = lab[0, :, 1] * np.intp(256) + lab[0, :, 2]
                self.ab += np.bincount(pairs, times, 65536).astype(np.int64).reshape(256, 256)
        self.table = None


# Statistics


def statistics(frequencies: np.ndarray) -> list:
    """(256,) counts -> count, mean, standard deviation, min, lower quartile, median, upper quartile, max of the values.

    As in the report a quartile is the first value up to which that share of all is counted.
    """
    values, total = np.arange(len(frequencies)), frequencies.sum()
    mean = (values * frequencies).sum() / total
    std = np.sqrt(((values - mean) ** 2 * frequencies).sum() / total)
    low, median, high = np.searchsorted(np.cumsum(frequencies), total * np.array([0.25, 0.5, 0.75]))
    least, most = np.flatnonzero(frequencies)[[0, -1]]
    return [total, mean, std, least, low, median, high, most]


def channel_table(channels: dict[str, np.ndarray]) -> list[list[str]]:
    """(256,) counts by name -> rows of cells, the head first, with the digits of the report."""
    rows = [["channel", "count", "mean", "std", "min", "lower quartile", "median", "upper quartile", "max"]]
    for name, frequencies in channels.items():
        total, mean, std, *rest = statistics(frequencies)
        rows.append([name, f"{total:.6e}", f"{mean:.6f}", f"{std:.6f}", *map(str, rest)])
    return rows


def size_table(sizes: np.ndarray) -> list[list[str]]:
    """(N, 2) heights and widths -> rows of cells: what pandas says of them, as in the report."""
    std = sizes.std(0, ddof=1) if len(sizes) > 1 else sizes.std(0)
    rows = {"count": [len(sizes)] * 2, "mean": sizes.mean(0), "std": std}
    rows |= zip(("min", "25%", "50%", "75%", "max"), np.quantile(sizes, (0, 0.25, 0.5, 0.75, 1), axis=0), strict=True)
    return [["", "height", "width"]] + [[name, *(f"{x:.6e}" for x in row)] for name, row in rows.items()]


def short_side_table(sizes: np.ndarray) -> list[list[str]]:
    """How many pictures a crop of some sizes leaves."""
    rows = [["short side, pixels", "pictures", "share"]]
    for side in SIDES:
        enough = (sizes.min(1) >= side).sum()
        rows.append([f"{side} or more", f"{enough:,}", f"{enough / len(sizes):.1%}"])
    return rows


def markdown(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body]) + "\n"


# Figures


def plot_channels(channels: dict[str, np.ndarray], scale: str) -> Figure:
    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="value", ylabel="pixels", yscale=scale)
    for name, frequencies in channels.items():
        axes.plot(np.where(frequencies, frequencies, np.nan), color=CHANNELS[name], label=name)
    axes.legend(ncols=3)
    return figure


def plot_sizes(sizes: np.ndarray, name: str) -> Figure:
    """(N,) pixels."""
    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel=f"{name}, pixels", ylabel="pictures", yscale="log")
    values, counts = np.unique(sizes, return_counts=True)
    axes.vlines(values, 0.5, counts, color="tab:blue")  # not 0, which a logarithm has no place for
    axes.set_ylim(bottom=0.5)
    return figure


def plot_colourfulness(values: np.ndarray) -> Figure:
    figure = Figure(figsize=(8, 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="colourfulness", ylabel="pictures")
    axes.hist(values, bins=np.arange(0, max(values.max(), 1) + 2, 2), color="tab:blue")
    axes.axvline(values.mean(), color="0.3", linestyle="--", label=f"mean {values.mean():.1f}")
    axes.legend()
    return figure


def draw_gamut(ab: np.ndarray) -> Figure:
    """(256, 256) counts of pairs (a, b) -> each in its own colour, the stronger the more often it occurs."""
    grid = torch.arange(-128, 128, dtype=torch.float32)
    b, a = torch.meshgrid(grid, grid, indexing="ij")  # rows are b: up is yellow
    own = lab_to_rgb(torch.stack([torch.full_like(a, 70), a, b])[None])[0].permute(1, 2, 0).numpy()  # (256, 256, 3)
    often = np.log1p(ab.T) / np.log1p(ab.max())
    # The edges of the RGB cube between its six pure colours are the outline of what sRGB can show.
    corners = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]], dtype=torch.float32)
    edges = torch.cat([torch.lerp(p, q, torch.linspace(0, 1, 50)[:, None]) for p, q in itertools.pairwise(corners)])
    outline = rgb_to_lab(edges.T[None, :, :, None])[0, 1:, :, 0]

    figure = Figure(figsize=(6, 6), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="a*: green to red", ylabel="b*: blue to yellow", facecolor="0.12", aspect="equal")
    axes.imshow(np.dstack([own, often]), origin="lower", extent=(-128.5, 127.5, -128.5, 127.5))
    axes.plot(*outline, color="white", linewidth=0.8, linestyle=":", label="all that sRGB can show")
    smooth = cv2.GaussianBlur(ab.T.astype(float), (0, 0), 1)
    counts = np.sort(smooth.ravel())[::-1]
    shares = np.cumsum(counts) / counts.sum()
    for share, style in ((0.5, "-"), (0.9, "--"), (0.99, "-.")):
        level = counts[np.searchsorted(shares, share)]
        axes.contour(grid, grid, smooth, [level], colors="white", linestyles=style, linewidths=0.8)
        axes.plot([], [], color="white", linewidth=0.8, linestyle=style, label=f"{share:.0%} of the pixels")
    axes.legend(loc="lower left", labelcolor="white", fontsize=9)  # sRGB has nothing there
    axes.set(xlim=(-110, 110), ylim=(-110, 110))
    return figure


def draw_channels(photos: list[np.ndarray], space: str) -> Figure:
    """Photographs (H, W, 3) RGB, a row each: whole, then its channels, or its lightness alone and with a and with b."""
    titles = {"RGB": ("RGB", "R", "G", "B"), "Lab": ("Lab", "L", "L and a", "L and b")}[space]
    figure = Figure(figsize=(10, 2.6 * len(photos)), dpi=110, layout="constrained")
    grid = figure.subplots(len(photos), 4, squeeze=False)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title)
    for row, photo in zip(grid, photos, strict=True):
        if space == "RGB":
            parts = [photo, *(photo * np.eye(3, dtype=np.uint8)[i] for i in range(3))]
        else:
            lab = cv2.cvtColor(photo, cv2.COLOR_RGB2Lab)
            kept = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
            parts = [cv2.cvtColor(np.where(k, lab, np.uint8(128)), cv2.COLOR_Lab2RGB) for k in kept]  # 128: neither a nor b
        for axes, part in zip(row, parts, strict=True):
            axes.imshow(part)
            axes.set_axis_off()
    return figure


def contact_sheet(pictures: Pictures, numbers: Sequence[int]) -> Image.Image:
    """Small, twelve a line."""
    sheet = Image.new("RGB", (12 * CELL, -(-len(numbers) // 12) * CELL), "white")
    for place, number in enumerate(numbers):
        cell = ImageOps.contain(Image.fromarray(load(pictures, number)), (CELL - 6, CELL - 6))
        sheet.paste(cell, (place % 12 * CELL, place // 12 * CELL))
    return sheet


def load(pictures: Pictures, number: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB, no side longer than 480 pixels."""
    rgb = decode(pictures.read([number])[0])
    scale = 480 / max(rgb.shape[:2])
    size = [max(round(side * scale), 1) for side in rgb.shape[1::-1]]
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA) if scale < 1 else rgb


# The report

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: 14px; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }}
h2 {{ margin-top: 2.5rem; border-bottom: 2px solid #eee }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def spread(numbers: np.ndarray, count: int) -> np.ndarray:
    """At most so many of them, from everywhere."""
    return numbers[np.linspace(0, len(numbers) - 1, min(count, len(numbers))).astype(int)]


def report(args: argparse.Namespace, pictures: Pictures, found: np.ndarray, frequencies: np.ndarray, ab: np.ndarray) -> None:
    """Write everything. `found` has a row of `survey.FOUND` a picture, `frequencies` (6, 256) are of R, G, B, L, a, b."""
    damaged, found = found["number"][found["height"] == 0], found[found["height"] > 0]
    if not len(found):
        raise SystemExit(f"{args.dataset}: not one of its {len(damaged)} pictures can be read")
    numbers, sizes, original = found["number"], np.stack([found["height"], found["width"]], axis=1), originals(found)
    warnings = {
        "damaged": damaged,
        "tiny": numbers[sizes.min(1) < TINY],
        "gray": numbers[found["gray"]],
        "tinted": numbers[found["tinted"]],
        "duplicate": numbers[original != numbers],
    }
    repeats = dict(zip(warnings["duplicate"], original[original != numbers], strict=True))
    coloured = numbers[~found["gray"] & ~found["tinted"]]
    photos = [load(pictures, n) for n in spread(coloured if len(coloured) else numbers, 4)]
    rgb, lab = (dict(zip(names, frequencies[part], strict=True)) for names, part in (("RGB", slice(3)), ("Lab", slice(3, 6))))

    args.output.mkdir(parents=True, exist_ok=True)
    for name, counts in (("RGB_frequencies", frequencies[:3]), ("Lab_frequencies", frequencies[3:]), ("image_sizes", sizes)):
        with atomic(args.output / f"{name}.csv") as path:
            np.savetxt(path, counts, "%d", delimiter=",")
    with atomic(args.output / "warnings.csv") as path, open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
        lines = csv.writer(file)
        lines.writerow(["picture", "warning", "of"])
        for kind, those in warnings.items():
            lines.writerows([pictures.name(n), kind, pictures.name(repeats[n]) if kind == "duplicate" else ""] for n in those)
    with atomic(args.output / "statistics.md") as path:
        path.write_text("\n".join(map(markdown, (channel_table(rgb), channel_table(lab), size_table(sizes)))))

    figures = {
        "channels_RGB": draw_channels(photos, "RGB"),
        "channels_Lab": draw_channels(photos, "Lab"),
        "frequency_RGB": plot_channels(rgb, "linear"),
        "frequency_Lab": plot_channels(lab, "log"),
        "frequency_height": plot_sizes(sizes[:, 0], "height"),
        "frequency_width": plot_sizes(sizes[:, 1], "width"),
        "gamut": draw_gamut(ab),
        "colourfulness": plot_colourfulness(found["colourfulness"]),
    }
    for kind in ("tiny", "gray", "tinted", "duplicate"):
        if len(warnings[kind]):
            those = spread(warnings[kind], SHOWN)
            if kind == "duplicate":  # each beside its original
                those = [m for n in those[::2] for m in (repeats[n], n)]
            figures[kind] = contact_sheet(pictures, those)
    for name, figure in figures.items():
        with atomic(args.output / f"{name}.png") as path:
            figure.savefig(path) if isinstance(figure, Figure) else figure.save(path)

    shares = {kind: f"{len(those):,} ({len(those) / len(pictures):.2%})" for kind, those in warnings.items()}
    colourfulness = found["colourfulness"]
    summary = [
        ["", ""],
        ["pictures", f"{len(pictures):,}"],
        ["pixels", f"{sizes.prod(1, dtype=np.int64).sum():,}"],
        ["mean colourfulness", f"{colourfulness.mean():.1f}"],
        ["gray", shares["gray"]],
        ["tinted: sepia, say, or fog", shares["tinted"]],
        ["duplicates, by perceptual hash", shares["duplicate"]],
        [f"tiny: a side below {TINY} pixels", shares["tiny"]],
        ["damaged", shares["damaged"]],
    ]
    title = f"{args.dataset}: {len(pictures):,} pictures"

    def image(name: str) -> str:  # in the page itself, which can then be sent to anyone
        data = base64.b64encode((args.output / f"{name}.png").read_bytes()).decode()
        return f'<img alt="{name.replace("_", ", ")}" src="data:image/png;base64,{data}">\n'

    body = f"""
{cells(summary)}
<p>warnings.csv names them all. Colourfulness is that of Hasler and S&uuml;sstrunk: 0 for gray, about 40 for a usual
photograph.</p>
<h2>Photographs and their channels</h2>
{image("channels_RGB")}
<p>L is the lightness, which the models see; a (green to red) and b (blue to yellow) are what they have to add.</p>
{image("channels_Lab")}
<h2>Colours</h2>
{cells(channel_table(rgb))}
{image("frequency_RGB")}
<p>Lab in 8 bits: L* / 100 * 255, a* + 128, b* + 128. Colours are rare: most a and b are close to 128, which is gray. Mind the
logarithm.</p>
{cells(channel_table(lab))}
{image("frequency_Lab")}
<p>The colours that the models must learn, each drawn in itself, brighter where there is more of it (a logarithm again).</p>
{image("gamut")}
{image("colourfulness")}
<h2>Sizes</h2>
{cells(size_table(sizes))}
{image("frequency_height")}
{image("frequency_width")}
<p>What a crop leaves (<code>train/prepare.py --size</code>):</p>
{cells(short_side_table(sizes))}
<h2>Worth a look</h2>
"""
    for kind, those in warnings.items():
        if len(those):
            body += f"<h3>{kind.capitalize()}: {shares[kind]}</h3>\n"
            names = html.escape(", ".join(pictures.name(n) for n in those[:SHOWN]))
            body += image(kind) if kind in figures else f"<p>{names}</p>\n"
    with atomic(args.output / "report.html") as path:
        path.write_text(PAGE.format(title=html.escape(title), body=body), encoding="utf-8", errors="replace")
    print(markdown(summary), f"{args.output / 'report.html'} has the rest", sep="\n")


def cells(rows: list[list[str]]) -> str:
    tags = itertools.chain(["th"], itertools.repeat("td"))
    lines = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in zip(tags, rows, strict=False)]
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


if __name__ == "__main__":
    main()
