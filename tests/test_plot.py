"""The curves of a run, drawn from the lines that the training programs log."""

import json
import math
import random
import subprocess
import sys

import cv2
import numpy as np
import pytest

import plot
from conftest import ROOT

BLUE, ORANGE, GREEN, PURPLE = (31, 119, 180), (255, 127, 14), (44, 160, 44), (148, 103, 189)  # training ... critic


def write(run, *rows):
    run.mkdir(exist_ok=True)
    (run / "figures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def steps(loss="train/l1", **more) -> list[dict]:
    """Training lines of 1000 steps, a noisy loss on its way from 0.3 to 0.08."""
    noise = random.Random(0)
    return [
        {"step": s, loss: 0.08 + 0.2 * math.exp(-s / 100) + noise.gauss(0, 0.01), "learning_rate": 7e-4, **more}
        for s in range(20, 1001, 20)
    ]


def validations() -> list[dict]:
    return [
        {"step": s, "validation/l1": 0.09, "validation/gray_l1": 0.101, "validation/psnr": 22.0,
         "validation/colourfulness_ratio": s / 2000}
        for s in (500, 1000)
    ]  # fmt: skip


def area(path, colour) -> int:
    """How many pixels of the picture have this very colour."""
    return int((cv2.imread(str(path))[..., ::-1] == colour).all(-1).sum())


def test_a_resumed_run_reads_as_one_that_was_not_stopped(tmp_path):
    run = write(tmp_path, {"step": 20, "train/l1": 0.3}, {"step": 40, "train/l1": 0.2}, {"step": 40, "validation/l1": 0.5})
    with open(run / "figures.jsonl", "a") as file:
        file.write('{"step": 60, "train/l1": 0.1')  # killed while writing; the resumed run goes on from step 20
        file.write('{"step": 40, "train/l1": 0.9}\n{"step": 40, "train/l1": 0.25}\n{"step": 60, "train/l1": 0.15}\n{"st')
    assert plot.read_figures(run) == {"train/l1": {20: 0.3, 40: 0.25, 60: 0.15}, "validation/l1": {40: 0.5}}


def test_the_programs_draw_all_runs_and_name_what_they_cannot(tmp_path):
    unet = write(tmp_path / "unet", *steps(), *validations())
    gan = write(tmp_path / "gan", *steps(**{"train/generator": 0.9, "train/critic": 0.6}), *validations())
    empty = write(tmp_path / "empty")
    words = [sys.executable, "-W", "error", "train/plot.py", tmp_path / "nowhere", empty, unet, gan]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    missing, nothing = done.stderr.splitlines()
    assert f"{tmp_path / 'nowhere' / 'figures.jsonl'} is missing" in missing
    assert f"{empty / 'figures.jsonl'} has nothing to draw" in nothing
    assert done.stdout.split() == [str(unet / "curves.png"), str(gan / "curves.png")]
    for run, adversaries in ((unet, False), (gan, True)):
        assert {p.name for p in run.iterdir()} == {"figures.jsonl", "curves.png"}
        assert cv2.imread(str(run / "curves.png")).shape[1] == 1600
        assert area(run / "curves.png", BLUE) > 5000 and area(run / "curves.png", ORANGE) > 1000
        assert (area(run / "curves.png", GREEN) > 1000) == (area(run / "curves.png", PURPLE) > 1000) == adversaries


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        steps()[:1],
        steps("train/huber"),
        validations(),
        [*steps()[:-1], {"step": 1000, "train/l1": math.nan}, {"step": 1020, "train/l1": math.inf}],
    ],
    ids=["one step", "huber", "validation alone", "collapse"],
)
def test_draws_what_there_is(tmp_path, rows):
    path = plot.plot(write(tmp_path, *rows))
    assert area(path, BLUE) + area(path, ORANGE) > 100


def test_the_smoothed_line_does_not_lag():
    line = np.linspace(3, 1, 400)
    noise = np.random.default_rng(0).normal(0, 0.3, 400)
    smooth = plot._smooth(line + noise)
    assert np.abs(plot._smooth(line) - line)[10:-10].max() < 1e-9
    assert (smooth - line).std() < 0.3 * noise.std()
    assert plot._smooth(np.array([5.0])) == 5
