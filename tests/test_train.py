"""A few real steps of each program on real photographs, as a researcher would start it; then the export is used."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from colorize import Colorizer, hub
from conftest import LAUNCH, PHOTOS, ROOT, TWICE
from gan import KNOWS, collapse, verdict_loss
from hub_server import TOKEN, serve
from supervised import rate

SMALL = ["--image-size", 64, "--batch-size", 2, "--epochs", 2, "--epoch-steps", 2, "--workers", 0, "--validation-pictures", 4]
UNET = ["--num-filters", 4, "--num-downs", 5, "--warmup-steps", 1, "--validate-every", 2]
CRITIC = ["--critic-filters", 4, "--critic-layers", 2, "--ema", 0.9]
CACHE = tempfile.TemporaryDirectory()  # what `datasets` makes of a folder


def start(*words, launcher=(sys.executable,), env=None, **how) -> subprocess.Popen:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": CACHE.name, "OMP_NUM_THREADS": "1", **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launcher, *map(str, words)], cwd=ROOT, env=env, **pipes, **how)


def train(*words, fails: bool = False, **how) -> str:
    """What the program printed."""
    process = start(*words, **how)
    out, err = process.communicate()
    assert (process.returncode == 1) if fails else (process.returncode == 0), err[-3000:]
    return out + err


def figures(run: Path, key: str) -> list[float]:
    lines = map(json.loads, (run / "figures.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def interrupt(number: int, run: Path, *words) -> tuple[int, str]:
    """Start a program, and send it a signal when it has saved its state for the second time -> return code, stderr.

    As from a terminal, the signal goes to its workers too.
    """
    process = start(*words, "--run", run, start_new_session=True)
    seen = set()
    while process.poll() is None and len(seen) < 2:
        seen |= {p.name for p in run.glob("state/*") if p.name.isdigit()}
        time.sleep(0.005)
    os.killpg(process.pid, number)
    return process.wait(), process.stderr.read()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """A folder of photographs, one of them damaged."""
    folder = tmp_path_factory.mktemp("photographs")
    for photo in PHOTOS:
        shutil.copy(photo, folder)
    (folder / "kodak-07.jpg").write_bytes(PHOTOS[0].read_bytes()[:200])
    return folder


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
def convnet(parquet) -> Path:
    run = parquet.with_name("convnet-run")
    train("train/convnet.py", "--dataset", parquet, "--streaming", "--run", run, *SMALL, "--width", 4, "--validate-every", 2)
    return run


@pytest.fixture(scope="module")
def unet(dataset) -> Path:
    run = dataset.with_name("unet-run")
    bare = dataset.parent / "bare"  # as after `pip install -r requirements.txt`
    for package in ("datasets", "tensorboard", "matplotlib"):
        (bare / package).mkdir(parents=True)
        (bare / package / "__init__.py").write_text("raise ImportError")
    words = ["--dataset", dataset, "--run", run, *SMALL, *UNET, "--mixed-precision", "bf16", "--trackers"]
    log = train("train/unet.py", *words, env={"PYTHONPATH": str(bare)})
    assert "8/8" in log and "pictures/s" in log and "l1=" in log  # a bar, with figures
    return run


@pytest.fixture(scope="module")
def gan(parquet, unet) -> Path:
    run = unet.with_name("gan-run")
    words = ["--dataset", parquet, "--start", unet / "checkpoint", "--run", run, *SMALL, *CRITIC]
    train("train/gan.py", *words, launcher=[*LAUNCH, "--num_processes", "1"])
    return run


@pytest.mark.parametrize("run", ["convnet", "unet", "gan"])
def test_the_export_colours(request, run):
    folder = request.getfixturevalue(run)
    result = Colorizer.from_pretrained(folder / "checkpoint", device="cpu")(PHOTOS[0])
    assert np.asarray(result).shape == cv2.imread(str(PHOTOS[0])).shape
    assert np.ptp(np.asarray(result).astype(int), axis=-1).max() > 0
    assert json.loads((folder / "settings.json").read_text())["image_size"] == 64


@pytest.mark.parametrize("run", ["convnet", "unet", "gan"])
def test_samples_show_gray_output_and_truth(request, run):
    folder = request.getfixturevalue(run)
    sheet = cv2.imread(str(sorted((folder / "samples").glob("*.png"))[-1]))
    gray, _, truth = sheet.reshape(3, 64, -1, 3).astype(int)
    assert np.ptp(gray, axis=-1).max() <= 1 < np.ptp(truth, axis=-1).mean()


@pytest.mark.parametrize("run", ["convnet", "unet", "gan"])
def test_the_card_says_how_it_was_made(request, run):
    card = (request.getfixturevalue(run) / "checkpoint" / "README.md").read_text()
    for words in (f"accelerate launch train/{run}.py --dataset", "## Where it fails", "| gray | ", "image-to-image"):
        assert words in card


def test_curves_and_tensorboard_where_they_are_installed(convnet, unet, gan):
    for run in (convnet, gan):
        assert (run / "curves.png").is_file() and list(run.glob("logs/colorize/events*"))
        assert "](curves.png)" in (run / "checkpoint" / "README.md").read_text()
        assert (run / "checkpoint" / "curves.png").is_file()
    assert not (unet / "logs").exists() and "curves.png" not in (unet / "checkpoint" / "README.md").read_text()


def test_a_damaged_picture_is_named_and_counted(dataset, unet):
    assert (unet / "damaged.txt").read_text().splitlines() == [str(dataset / "kodak-07.jpg")]
    assert "1 damaged pictures were skipped" in (unet / "train.log").read_text()


def test_the_gan_goes_on_from_the_unet_and_keeps_every_epoch(unet, gan):
    checkpoint = gan / "checkpoint"
    assert hub.snapshots(checkpoint) == ["epoch-001", "epoch-002"]
    assert sorted(p.stem for p in (gan / "samples").iterdir()) == ["epoch-001", "epoch-002"]
    begun, first, second, last = (
        hub.load(*where).state_dict()["down.weight"]
        for where in ((unet / "checkpoint",), (checkpoint, "epoch-001"), (checkpoint, "epoch-002"), (checkpoint,))
    )
    assert (second == last).all() and (first != second).any() and (begun != first).any()
    assert (begun - last).abs().max() < 0.01  # a few steps away, not started anew


def test_an_epoch_is_released(gan, tmp_path):
    run = shutil.copytree(gan, tmp_path / "run")
    train("train/gan.py", "--release", run, "--epoch", 1)
    for file in (hub.WEIGHTS, hub.CARD):
        chosen = (run / "checkpoint" / "snapshots" / "epoch-001" / file).read_bytes()
        assert (run / "checkpoint" / file).read_bytes() == chosen != (gan / "checkpoint" / file).read_bytes()
    assert "one of epoch-001, epoch-002" in train("train/gan.py", "--release", run, "--epoch", 3, fails=True)


def test_a_dry_run_says_the_recipe_and_writes_nothing(dataset, unet, tmp_path):
    for program, words, known in (
        ("convnet", [], ["9,783,459", '"batch_size": 10', '"learning_rate": 0.0007']),
        ("unet", [], ["54,980,593", '"batch_size": 64', "4 epochs", '"patience": 5']),
        ("unet", ["--no-attention"], ["54,409,858", "1 epochs"]),
        ("gan", ["--start", unet / "checkpoint"], ["20,874,435", '"batch_size": 32', "30,974 steps", '"l1_weight": 100.0']),
    ):
        printed = train(f"train/{program}.py", "--dataset", dataset, "--run", tmp_path / "run", "--dry-run", *words)
        assert [k for k in known if k not in printed] == [] and not (tmp_path / "run").exists()


def test_the_readme_starts_each_of_them(dataset, unet, tmp_path):
    lines = re.findall(r"^accelerate launch (train/.*PHOTOS.*--run.*|train/convnet.*)$", (ROOT / "README.md").read_text(), re.M)
    assert len(lines) == 5
    for line in lines:
        words = [unet / "checkpoint" if w.endswith("/checkpoint") else dataset if w == "PHOTOS" else w for w in line.split()]
        assert "steps: " in train(*words, "--dry-run")


# Stop and go on

LONG = ["--image-size", 64, "--batch-size", 2, "--epoch-steps", 20, "--epochs", 2, "--save-every", 4]
LONG += ["--validation-pictures", 2]


@pytest.fixture(scope="module")
def long_gan(dataset, unet) -> tuple[list, Path]:
    """40 steps of a GAN that nobody disturbed: two optimizers, spectral norms, a mean of the weights, workers."""
    words = ["train/gan.py", "--dataset", dataset, "--start", unet / "checkpoint", *LONG, *CRITIC, "--workers", 1]
    run = unet.with_name("long-gan-run")
    train(*words, "--run", run)
    return words, run


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_resumes_bit_for_bit(long_gan, tmp_path, number):
    words, whole = long_gan
    run = tmp_path / "run"
    code, log = interrupt(number, run, *words)
    assert code == (-number if number == signal.SIGKILL else 0), log[-3000:]
    reached = max(int(p.name) for p in run.glob("state/*") if p.name.isdigit())
    assert 8 <= reached < 40
    if number != signal.SIGKILL:
        assert f"stopped after step {reached}; --resume {run}" in log
    train("train/gan.py", "--resume", run)
    for file in ("model.safetensors", "model_1.safetensors"):  # generator and critic, with their buffers
        ours, theirs = (load_file(r / "state" / "00000040" / file) for r in (run, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    for file in ("checkpoint/model.safetensors", "checkpoint/snapshots/epoch-001/model.safetensors", "samples/epoch-002.png"):
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    assert figures(run, "validation/l1") == figures(whole, "validation/l1")


def test_a_run_is_not_started_over_nor_resumed_from_nothing(long_gan, tmp_path):
    words, run = long_gan
    assert f"--resume {run}" in train(*words, "--run", run, fails=True)
    assert "holds no run" in train("train/gan.py", "--resume", tmp_path, fails=True)


def test_a_full_disk_leaves_the_last_state(dataset, tmp_path):
    run = tmp_path / "run"
    words = ["train/convnet.py", "--dataset", dataset, "--run", run, *SMALL, "--width", 8, "--save-every", 2]
    small_files = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))}
    code, log = interrupt(signal.SIGKILL, run, *words, "--epoch-steps", 1000)
    assert code == -signal.SIGKILL, log
    before = {p: p.read_bytes() for p in sorted(run.glob("state/*/*")) if p.parent.name.isdigit()}
    log = train("train/convnet.py", "--resume", run, fails=True, **small_files)
    assert "Is the disk full?" in log and f"--resume {run} goes on from {run}/state" in log
    assert {p: p.read_bytes() for p in sorted(run.glob("state/*/*"))} == before


def test_weights_that_are_no_numbers_overwrite_nothing(long_gan, tmp_path):
    words, _ = long_gan
    run = tmp_path / "run"
    log = train(*words, "--run", run, "--learning-rate", 1e30, "--epoch-steps", 1, fails=True)
    assert "no number" in log
    assert all(map(math.isfinite, figures(run, "train/l1")))
    for snapshot in hub.snapshots(run / "checkpoint") if (run / "checkpoint").exists() else []:
        hub.load(run / "checkpoint", snapshot)  # strict: it refuses what is not finite


# Many processes

EVEN = ["--image-size", 64, "--epochs", 1, "--epoch-steps", 10, "--workers", 0, "--validation-pictures", 3, "--warmup-steps", 1]


def test_two_processes_and_accumulation_give_the_losses_of_a_larger_batch(dataset, tmp_path):
    words = ["train/convnet.py", "--dataset", dataset, *EVEN, "--width", 4, "--trackers"]
    train(*words, "--run", tmp_path / "one", "--batch-size", 4)
    train(*words, "--run", tmp_path / "two", "--batch-size", 2, launcher=TWICE, env={"ACCELERATE_USE_CPU": "true"})
    train(*words, "--run", tmp_path / "accumulated", "--batch-size", 2, "--accumulate", 2)
    for key in ("train/huber", "validation/l1", "validation/psnr"):
        one, two, accumulated = (figures(tmp_path / run, key) for run in ("one", "two", "accumulated"))
        assert len(one) and two == pytest.approx(one, rel=1e-4) and accumulated == pytest.approx(one, rel=1e-4)


RANKS = """
import runpy, sys, torch
from accelerate import Accelerator
end = Accelerator.end_training
def keep(self):
    weights = [p.detach() for m in self._models for p in m.parameters()]
    torch.save(weights, f"{sys.argv[-1]}/rank-{self.process_index}.pt")
    end(self)
Accelerator.end_training = keep
sys.path.insert(0, "train")
program, folder = sys.argv[1], sys.argv[-1]
sys.argv = sys.argv[1:-1] + [folder]
runpy.run_path(program, run_name="__main__")
"""


@pytest.mark.parametrize("program", ["unet", "gan"])
def test_processes_end_with_the_same_weights(program, dataset, unet, tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    special = {"unet": UNET, "gan": ["--start", unet / "checkpoint", *CRITIC]}[program]
    words = [f"train/{program}.py", "--dataset", dataset, *SMALL, "--trackers", *special, "--run", tmp_path]
    train(tmp_path / "ranks.py", *words, launcher=TWICE, env={"ACCELERATE_USE_CPU": "true"})
    first, second = (torch.load(tmp_path / f"rank-{i}.pt") for i in (0, 1))
    assert len(first) > 10 and all(map(torch.equal, first, second))
    assert len(figures(tmp_path, "validation/l1")) == 2  # one process alone writes


# Parts


def test_the_rate_warms_up_and_comes_back():
    assert [rate(s, 1000, 5000) for s in (0, 500, 1000, 3000, 5000)] == pytest.approx([0.1, 0.55, 1, 0.55, 0.1])


def test_verdicts():
    real, fake = torch.full((2, 1, 3, 3), 3.0), torch.full((2, 1, 3, 3), -3.0)
    for loss, (known, ignorance) in KNOWS.items():
        right = (verdict_loss([real], True, loss) + verdict_loss([fake], False, loss)) / 2
        wrong = (verdict_loss([fake], True, loss) + verdict_loss([real], False, loss)) / 2
        nothing = (verdict_loss([0 * real], True, loss) + verdict_loss([0 * real], False, loss)) / 2
        assert right < wrong and (loss == "lsgan" or nothing == pytest.approx(ignorance)) and right >= known
        fooled, caught = (verdict_loss([x], True, loss, critic=False) for x in (real, fake))
        assert fooled < caught
    assert collapse(0.326, 0.5, "vanilla").startswith("the critic") and collapse(0.6, 0.01, "vanilla").startswith("the gen")
    assert collapse(0.6, 0.5, "vanilla") is None and collapse(0.01, 0.5, "hinge")


# Publishing, refusals


def test_the_finished_run_is_published(dataset, unet, tmp_path):
    (tmp_path / "hub").mkdir()
    with serve(tmp_path / "hub") as server:
        env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        env["HF_HUB_DISABLE_XET"] = "1"
        words = ["--dataset", dataset, "--start", unet / "checkpoint", *SMALL, *CRITIC, "--push-to-hub", "ansel/run"]
        log = train("train/gan.py", *words, "--run", tmp_path / "run", env=env)
        assert "published: " in log
        back = "from colorize.hub import load, snapshots; load('ansel/run', 'epoch-001'); print(snapshots('ansel/run'))"
        assert "['epoch-001', 'epoch-002']" in train("-c", back, env=env)


def test_a_generator_that_paints_rgb_is_refused(dataset, convnet, tmp_path):
    words = ["train/gan.py", "--dataset", dataset, "--start", convnet / "checkpoint", "--run", tmp_path / "run"]
    assert "start from a U-Net" in train(*words, fails=True) and not (tmp_path / "run").exists()


def test_what_is_missing_is_said(dataset, tmp_path):
    assert "--dataset is missing" in "".join(start("train/unet.py").communicate())
    for words, said in (
        (["--start", tmp_path / "nothing"], "nothing"),
        (["--trackers", "mlflow"], "python -m pip install mlflow"),
        (["--streaming"], "can be streamed"),
    ):
        log = train("train/unet.py", "--dataset", dataset, "--run", tmp_path / "run", *words, fails=True)
        assert said in log and "Traceback" not in log and not (tmp_path / "run").exists()
