"""A few real steps of each program on real photographs, as a researcher would start it; then the export is used."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from colorize import Colorizer, hub
from colorize.models import ConvNet, ConvNetConfig
from conftest import PHOTOS, ROOT

SMALL = ["--image-size", "64", "--batch-size", "2", "--epochs", "2", "--epoch-steps", "2", "--workers", "0"]
CACHE = tempfile.TemporaryDirectory()  # what `datasets` makes of the folder
LAUNCH = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "1", "--num_machines", "1"]


def train(*words, launcher=(sys.executable,), path="") -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": CACHE.name, "PYTHONPATH": str(path)}
    done = subprocess.run([*launcher, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A folder of photographs, one of them damaged."""
    folder = tmp_path_factory.mktemp("photographs")
    for photo in PHOTOS:
        shutil.copy(photo, folder)
    (folder / "kodak-07.jpg").write_bytes(PHOTOS[0].read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def unet(dataset) -> Path:
    run = dataset.with_name("unet-run")
    words = ["--num-filters", 4, "--num-downs", 5, "--warmup-steps", 1, "--validate-every", 2, "--mixed-precision", "bf16"]
    (dataset.parent / "bare" / "datasets").mkdir(parents=True)  # as after `pip install -r requirements.txt`
    (dataset.parent / "bare" / "datasets" / "__init__.py").write_text("raise ImportError")
    log = train("train/unet.py", "--dataset", dataset, "--run", run, *SMALL, *words, path=dataset.parent / "bare")
    assert "4/4" in log and "l1=" in log  # a bar, with figures
    return run


@pytest.fixture(scope="module")
def parquet(dataset) -> Path:
    """The same photographs as a `datasets` folder, its splits with different columns."""
    import datasets

    folder = dataset.with_name("parquet")
    rows = [{"image": {"bytes": p.read_bytes(), "path": p.name}, "author": "Eastman Kodak"} for p in sorted(dataset.iterdir())]
    features = datasets.Features({"image": datasets.Image(decode=False), "author": datasets.Value("string")})
    everything = datasets.Dataset.from_list(rows, features=features)
    everything.to_parquet(folder / "train-00000-of-00001.parquet")
    everything.select([0, 2]).remove_columns("author").to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def gan(parquet, unet) -> Path:
    run = unet.with_name("gan-run")
    words = ["--start", unet / "checkpoint", "--critic-filters", 4, "--critic-layers", 2]
    launcher = [*LAUNCH, "--mixed_precision", "no", "--dynamo_backend", "no"]
    train("train/gan.py", "--dataset", parquet, "--run", run, *SMALL, *words, launcher=launcher)
    return run


def test_unet_exports_a_checkpoint_that_colours(unet):
    result = Colorizer.from_pretrained(unet / "checkpoint", device="cpu")(PHOTOS[0])
    assert np.asarray(result).shape == cv2.imread(str(PHOTOS[0])).shape
    assert json.loads((unet / "settings.json").read_text())["num_filters"] == 4


def test_gan_goes_on_from_it_and_keeps_every_epoch(unet, gan):
    checkpoint = gan / "checkpoint"
    assert hub.snapshots(checkpoint) == ["epoch-001", "epoch-002"]
    start, first, second, last = (
        hub.load(*where).state_dict()["down.weight"]
        for where in ((unet / "checkpoint",), (checkpoint, "epoch-001"), (checkpoint, "epoch-002"), (checkpoint,))
    )
    assert (second == last).all() and (first != second).any() and (start != first).any()
    assert (start - last).abs().max() < 0.01  # a few steps away, not started anew


@pytest.mark.parametrize("run", ["unet", "gan"])
def test_samples_show_gray_output_and_truth(request, run):
    folder = request.getfixturevalue(run)
    sheet = cv2.imread(str(sorted((folder / "samples").glob("*.png"))[-1]))
    gray, _, truth = sheet.reshape(3, 64, -1, 3).astype(int)
    assert np.ptp(gray, axis=-1).max() <= 1 < np.ptp(truth, axis=-1).mean()


@pytest.mark.parametrize("run", ["unet", "gan"])
def test_the_card_says_how_it_was_made(request, run):
    card = (request.getfixturevalue(run) / "checkpoint" / "README.md").read_text()
    for words in (
        f"accelerate launch train/{run}.py --dataset",
        "## Where it fails",
        "| gray | ",
        "pipeline_tag: image-to-image",
    ):
        assert words in card


def test_a_damaged_picture_is_named_and_skipped(unet, gan):
    assert "kodak-07.jpg: it cannot be decoded" in (unet / "train.log").read_text() + (gan / "train.log").read_text()


def test_too_few_pictures_for_a_batch_are_said(dataset, tmp_path):
    words = ["train/unet.py", "--dataset", dataset, "--run", tmp_path / "run", "--batch-size", "64"]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "lower --batch-size" in done.stderr


def test_a_generator_that_paints_rgb_is_refused(dataset, tmp_path):
    hub.save(ConvNet(ConvNetConfig(width=4)), tmp_path / "convnet")
    words = ["train/gan.py", "--dataset", dataset, "--start", tmp_path / "convnet", "--run", tmp_path / "run"]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "start from a U-Net" in done.stderr and not (tmp_path / "run").exists()
