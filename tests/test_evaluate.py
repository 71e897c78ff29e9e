"""The table of train/evaluate.py against figures worked out by hand, on real photographs and shipped checkpoints."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from skimage.color import deltaE_ciede2000, gray2rgb, rgb2lab
from skimage.metrics import peak_signal_noise_ratio

from colorize import Colorizer
from colorize.color import lightness_to_gray, rgb_to_lightness
from conftest import PHOTOS, ROOT, TWICE

GAN = "unet-attention-gan@epoch-003"


def evaluate(*words, launcher=(sys.executable,)) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launcher, "train/evaluate.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A folder of photographs at a third of their size, one of them damaged."""
    folder = tmp_path_factory.mktemp("photographs")
    for photo in PHOTOS:
        small = cv2.resize(cv2.imread(str(photo)), None, fx=1 / 3, fy=1 / 3, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / f"{photo.stem}.png"), small)
    (folder / "kodak-04.png").write_bytes((folder / "kodak-03.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def evaluation(dataset) -> tuple[Path, dict]:
    """The folder of results, and what figures.json says."""
    output = dataset.with_name("evaluation")
    done = evaluate("unet-attention", GAN, "--dataset", dataset, "--output", output)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == (output / "figures.md").read_text().strip()
    assert "7/7" in done.stderr  # a bar
    return output, json.loads((output / "figures.json").read_text())


def colourfulness(rgb: np.ndarray) -> float:
    """Hasler and Suesstrunk (2003), equation 3."""
    r, g, b = np.moveaxis(rgb.astype(float), -1, 0)
    rg, yb = r - g, (r + g) / 2 - b
    return np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. (2004), equation 13, where the window of 11 x 11 lies inside the picture."""
    a, b = a / 255, b / 255
    blur = lambda x: cv2.GaussianBlur(x, (11, 11), 1.5)[5:-5, 5:-5]  # noqa: E731
    mean_a, mean_b = blur(a), blur(b)
    spread, together = blur(a * a + b * b) - mean_a**2 - mean_b**2, blur(a * b) - mean_a * mean_b
    structure = (2 * mean_a * mean_b + 0.01**2) * (2 * together + 0.03**2)
    return (structure / ((mean_a**2 + mean_b**2 + 0.01**2) * (spread + 0.03**2))).mean()


@pytest.mark.parametrize("name, revision", [("gray", None), ("unet-attention", None), tuple(GAN.split("@"))])
def test_figures_are_those_worked_out_by_hand(dataset, evaluation, name, revision):
    colorizer = None if name == "gray" else Colorizer.from_pretrained(name, revision, device="cpu")
    rows = []
    for photo in PHOTOS:
        truth = cv2.imread(str(dataset / f"{photo.stem}.png"))[..., ::-1].copy()
        lightness = rgb_to_lightness(torch.from_numpy(truth).permute(2, 0, 1)[None] / 255)
        gray = (lightness_to_gray(lightness)[0, 0].numpy() * 255).round().astype(np.uint8)
        rgb = colorizer(gray).pixels if colorizer else gray2rgb(gray)
        difference = deltaE_ciede2000(rgb2lab(truth), rgb2lab(rgb)).mean()
        psnr = peak_signal_noise_ratio(truth, rgb, data_range=255)
        rows.append((colourfulness(rgb), colourfulness(truth), difference, psnr, ssim(rgb, truth)))
    own, true, difference, psnr, likeness = np.transpose(rows)
    by_hand = {
        "colourfulness": own.mean(),
        "colourfulness_ratio": own.mean() / true.mean(),
        "dcf_of_means": abs(own.mean() - true.mean()),
        "dcf": abs(own - true).mean(),
        "ciede2000": difference.mean(),
        "psnr": psnr.mean(),
        "ssim": likeness.mean(),
    }
    figures = evaluation[1]["figures"][f"{name}@{revision}" if revision else name]
    assert {key: figures[key] for key in by_hand} == pytest.approx(by_hand, rel=1e-4)


def test_gray_comes_first_and_has_no_colour(evaluation):
    output, everything = evaluation
    assert list(everything["figures"]) == ["gray", "unet-attention", GAN]
    names = [line.split("|")[1].strip() for line in (output / "figures.md").read_text().splitlines() if line.startswith("| ")]
    assert names == ["", "gray", "unet-attention", GAN]
    gray = everything["figures"]["gray"]
    assert gray["colourfulness"] == gray["colourfulness_ratio"] == 0
    assert gray["dcf"] == gray["dcf_of_means"] == everything["truth_colourfulness"]


def test_a_damaged_picture_is_named_counted_and_left_out(evaluation):
    output, everything = evaluation
    assert everything["damaged"] == ["kodak-04.png"] and everything["pictures"] == len(PHOTOS)
    assert "Damaged and left out: 1 (kodak-04.png)." in (output / "figures.md").read_text()


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is here")
def test_a_line_says_what_is_missing_and_how_to_get_it(evaluation):
    output, everything = evaluation
    (line,) = [line for line in (output / "figures.md").read_text().splitlines() if line.startswith("Not measured")]
    assert "LPIPS" in line and "torchvision" in line and "pip install 'torchmetrics[image]'" in line
    assert "lpips" not in everything["figures"]["gray"]


def test_two_processes_write_the_same_files(dataset, evaluation):
    alone, _ = evaluation
    shared = dataset.with_name("shared")
    done = evaluate("unet-attention", GAN, "--dataset", dataset, "--output", shared, launcher=TWICE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8/8" in done.stderr and done.stdout.count("| gray |") == 1  # two processes, four pictures each; one speaks
    files = {"figures.md", "figures.json", "unet-attention-cases.png", f"{GAN}-cases.png"}
    assert files == {p.name for p in alone.iterdir()} == {p.name for p in shared.iterdir()}
    for file in files:
        assert (alone / file).read_bytes() == (shared / file).read_bytes(), file


def test_cases_show_gray_output_and_truth(dataset, evaluation):
    sheet = cv2.imread(str(evaluation[0] / "unet-attention-cases.png")).astype(int)
    assert sheet.shape == (3 * 180, 6 * 160 + 20, 3)  # six pictures are two of the best, two of the median, two of the worst
    chroma = np.ptp(sheet, axis=-1)
    for top in (0, 180, 360):
        gray, output, truth = (chroma[top : top + 160, left : left + 160].mean() for left in (0, 160, 320))
        assert gray == 0 < output < truth


def test_figures_go_into_the_card_and_nothing_else_does(dataset, tmp_path):
    folder = shutil.copytree(ROOT / "checkpoints" / "unet-attention", tmp_path / "checkpoint")
    card = folder / "README.md"
    before = card.read_text().replace("license: apache-2.0", 'license: "apache-2.0"  # a line that YAML would write otherwise')
    card.write_text(before)
    words = [folder, "--dataset", dataset, "--pictures", 3, "--output", tmp_path / "evaluation", "--write-card"]
    assert evaluate(*words).returncode == 0
    first = card.read_text()
    lines = iter(first.splitlines())
    assert all(line in lines for line in before.splitlines())  # in this order, with new ones between

    data = ModelCard(first).data
    figures = json.loads((tmp_path / "evaluation" / "figures.json").read_text())["figures"][str(folder)]
    new = {result.metric_type: result.metric_value for result in data.eval_results if result.dataset_name == str(dataset)}
    assert new == {key: round(value, 4) for key, value in figures.items()}
    old = ModelCard(before).data.eval_results
    assert data.eval_results[: len(old)] == old and data.model_name == "unet-attention"

    assert evaluate(*words).returncode == 0 and card.read_text() == first
    assert evaluate(*words[:4], 2, *words[5:]).returncode == 0
    assert len(ModelCard(card.read_text()).data.eval_results) == len(data.eval_results)  # others, not more


@pytest.mark.parametrize(
    "words, message",
    [
        (["user/repo", "--write-card"], "needs the folder of a checkpoint"),
        ([GAN, "--write-card"], "a snapshot has no card of its own"),
        (["unet-attention@epoch-099"], "has no snapshot 'epoch-099'"),
        (["checkpoints/typo"], "is neither a folder nor a Hub id"),
        (["unet-attention", "--size", "2"], "size must be between"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_done_is_said_in_a_line(dataset, tmp_path, words, message):
    done = evaluate(*words, "--dataset", dataset, "--output", tmp_path / "evaluation")
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "evaluation").exists()
