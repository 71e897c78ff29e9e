"""Draw how a run went: losses, colourfulness and learning rate over its steps, as a picture for the model card.

    python train/plot.py runs/unet runs/gan

reads RUN/figures.jsonl and writes RUN/curves.png. The training programs do so themselves at the end of a run.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from colorize.atomic import atomic

COLOURFULNESS, LEARNING_RATE = "Colourfulness, share of the truth's", "Learning rate"
# A panel's title, and the series in it with their names; what a run has not logged is left out.
PANELS = {
    "Huber loss of RGB": {"train/huber": "training"},
    "L1 of ab (1 = 110 units of Lab)": {
        "train/l1": "training", "validation/l1": "validation", "validation/gray_l1": "plain gray",
    },
    "Adversarial losses": {"train/generator": "generator", "train/critic": "critic"},
    COLOURFULNESS: {"validation/colourfulness_ratio": "validation"},
    LEARNING_RATE: {"learning_rate": "learning rate"},
}  # fmt: skip
COLOURS = {
    "training": "tab:blue", "validation": "tab:orange", "plain gray": "0.4", "generator": "tab:green", "critic": "tab:purple",
    "learning rate": "tab:blue",
}  # fmt: skip
STYLE = {
    "font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titlepad": 22,
    "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.use_mathtext": True, "axes.formatter.limits": (-3, 6),
    "legend.frameon": False, "legend.borderaxespad": 0, "legend.borderpad": 0.2,
    "legend.handlelength": 1.5, "legend.columnspacing": 1.2, "lines.linewidth": 1.6, "lines.markersize": 4,
}  # fmt: skip


def read_figures(run: str | Path) -> dict[str, dict[int, float]]:
    """RUN/figures.jsonl -> {"train/l1": {20: 0.09, ...}, ...}: the values of each series by step, in the order of the steps.

    A resumed run writes some steps again: the last line wins. A line that a kill tore off is skipped.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(run) / "figures.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the folder of a run")
    series = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # not always the last: a resumed run writes on behind it
        step = row.pop("step")
        for key, value in row.items():
            series.setdefault(key, {})[step] = value
    return {key: dict(sorted(values.items())) for key, values in series.items()}


def plot(run: str | Path) -> Path:
    """Draw RUN/curves.png, 1600 pixels wide: sharp, and legible, at the 800 of a model card. -> its path.

    Raises:
        ValueError: RUN/figures.jsonl is missing, or has nothing to draw.
        OSError: the picture cannot be written.
    """
    series = read_figures(run)
    panels = {title: names for title, names in PANELS.items() if names.keys() & series.keys()}
    if not panels:
        raise ValueError(f"{Path(run) / 'figures.jsonl'} has nothing to draw yet: let the run make some steps")
    odd = len(panels) % 2  # then the first is as wide as two
    rows = (len(panels) + odd) // 2
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 2.7 * rows), dpi=200, layout="constrained")
        grid = figure.add_gridspec(rows, 2)
        for place, (title, names) in enumerate(panels.items(), start=odd):
            cell = grid[0, :] if place == odd == 1 else grid[divmod(place, 2)]
            axes = figure.add_subplot(cell, sharex=figure.axes[0] if figure.axes else None)
            _draw(axes, title, {name: series[key] for key, name in names.items() if key in series})
            axes.set_xlim(left=0)
        path = Path(run) / "curves.png"
        with atomic(path) as part:
            figure.savefig(part)
    return path


def _draw(axes: Axes, title: str, curves: dict[str, dict[int, float]]) -> None:
    axes.set(title=title, xlabel="step")
    for name, curve in curves.items():
        steps, values = np.array(list(curve)), np.array(list(curve.values()), dtype=float)
        values[~np.isfinite(values)] = np.nan  # a gap
        line = {"color": COLOURS[name], "label": name, "marker": "o" if name == "validation" or len(steps) == 1 else None}
        if name == "plain gray":  # learns nothing: the same at every step
            axes.axhline(values[-1], color=COLOURS[name], linestyle="--", label=name)
        elif name in ("validation", "learning rate"):
            axes.plot(steps, values, **line)
        else:
            raw = LineCollection([np.column_stack((steps, values))], color=COLOURS[name], alpha=0.3, linewidth=0.8)
            axes.add_collection(raw, autolim=False)  # or the first few losses would flatten all that comes after
            axes.update_datalim([(steps[0], y) for y in np.nanquantile(values, (0.01, 0.99))])
            axes.plot(steps, _smooth(values), **line)
    if title == COLOURFULNESS:
        axes.axhline(1, color=COLOURS["plain gray"], linestyle="--", label="truth")
    if title in (COLOURFULNESS, LEARNING_RATE):
        axes.set_ylim(bottom=0)
    if title != LEARNING_RATE:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # above the curves, in their way nowhere


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a twentieth of the run around each value (less at its ends), which unlike a running mean does not lag."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    failed = False
    for run in flags.parse_args().runs:
        try:
            print(plot(run))
        except (ValueError, OSError) as error:
            failed = True
            print(error, file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
