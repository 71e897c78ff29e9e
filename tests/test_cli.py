"""The `colorize` command, on real photographs, with a tiny checkpoint that was never trained."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from colorize import Colorizer, archive, cli, hub, read
from colorize.encode import SOURCE_TYPE
from colorize.models import UNet, UNetConfig
from colorize.picture import weigh
from conftest import OLD, ROOT

COMMAND = [sys.executable, "-m", "colorize"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The folder of a checkpoint, with two snapshots."""
    torch.manual_seed(0)
    network = UNet(UNetConfig(num_filters=4, num_downs=5, image_size=64))
    folder = hub.save(network, tmp_path_factory.mktemp("hub") / "checkpoints" / "tiny")
    for epoch in ("epoch-001", "epoch-002"):
        hub.save(network, folder / "snapshots" / epoch)
    return str(folder)


@pytest.fixture
def scans(tmp_path) -> Path:
    """A folder of pictures, one of them in a folder in it, beside things that are no pictures."""
    folder = tmp_path / "scans"
    (folder / "1899").mkdir(parents=True)
    shutil.copy(OLD[0], folder / "a.jpg")
    Image.open(OLD[1]).convert("L").resize((90, 61)).save(folder / "B.PNG")
    Image.open(OLD[2]).resize((70, 80)).save(folder / "1899" / "c.bmp")
    (folder / "notes.txt").write_text("a, B and c")
    (folder / "._a.jpg").write_bytes(b"what macOS leaves behind")
    return folder


@pytest.fixture
def colorize(model, capfd, monkeypatch, tmp_path):
    """Runs the command in a temporary folder -> (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["--device", "cpu", "--model", model, *map(str, arguments)])
        return code, *capfd.readouterr()

    return run


def tree(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_one_picture_lands_beside_itself(colorize, tmp_path, scans):
    assert colorize(scans / "a.jpg")[:2] == (0, "1 coloured, 0 skipped, 0 failed\n")
    before, after = read(scans / "a.jpg"), read(scans / "a-color.jpg")
    assert after.pixels.shape == before.pixels.shape
    assert np.ptp(after.pixels.astype(int), axis=2).mean() > 2  # it has colours
    assert SOURCE_TYPE.encode() in after.xmp and b"Colorize (tiny)" in after.xmp


def test_output_file(colorize, tmp_path, scans):
    assert colorize(scans / "a.jpg", "-o", tmp_path / "new" / "out.TIFF")[0] == 0
    assert Image.open(tmp_path / "new" / "out.TIFF").format == "TIFF"


def test_a_folder_keeps_its_tree(colorize, tmp_path, scans):
    assert colorize(scans, "-o", "out")[:2] == (0, "3 coloured, 0 skipped, 0 failed\n")
    assert tree(tmp_path / "out") == {"a.jpg", "B.PNG", "1899/c.png"}
    assert Image.open(tmp_path / "out" / "B.PNG").size == (90, 61)
    assert tree(scans) == {"a.jpg", "B.PNG", "1899/c.bmp", "notes.txt", "._a.jpg"}


def test_results_are_not_coloured_again(colorize, scans):
    for output in ((), ("-o", scans / "out")):
        assert colorize(scans, *output)[1] == "3 coloured, 0 skipped, 0 failed\n"
        assert colorize(scans, *output)[1] == "0 coloured, 3 skipped, 0 failed\n"
        for file in scans.rglob("*-color.*"):
            file.unlink()


def test_skips_without_loading_and_force_replaces(colorize, scans):
    result = scans / "a-color.jpg"
    result.write_bytes(b"old")
    assert colorize(scans / "a.jpg", "--model", "no/such")[:2] == (0, "0 coloured, 1 skipped, 0 failed\n")
    assert result.read_bytes() == b"old"
    assert colorize(scans / "a.jpg", "--force")[:2] == (0, "1 coloured, 0 skipped, 0 failed\n")
    assert read(result).pixels.ndim == 3


def test_one_bad_file_does_not_stop_the_others(colorize, tmp_path, scans):
    (scans / "1899" / "b.jpg").write_bytes(OLD[0].read_bytes()[:5000])
    code, out, err = colorize(scans, "missing.jpg", "-o", "out")
    assert (code, out) == (1, "3 coloured, 0 skipped, 2 failed\n")
    assert "b.jpg is damaged" in err and "missing.jpg cannot be opened" in err and len(err.splitlines()) == 2
    assert tree(tmp_path / "out") == {"a.jpg", "B.PNG", "1899/c.png", "failed.txt"}
    assert (tmp_path / "out" / "failed.txt").read_text() == err.replace("colorize: ", "")

    shutil.copy(OLD[0], scans / "1899" / "b.jpg")
    assert colorize(scans, "-o", "out") == (0, "1 coloured, 3 skipped, 0 failed\n", "")
    assert tree(tmp_path / "out") == {"a.jpg", "B.PNG", "1899/c.png", "1899/b.jpg"}


def test_no_input_and_no_other_result_is_overwritten(colorize, tmp_path, scans):
    (scans / "a.bmp").write_bytes((scans / "1899" / "c.bmp").read_bytes())
    Image.open(OLD[3]).resize((50, 40)).save(scans / "a.png")
    before = {file: file.read_bytes() for file in scans.rglob("*") if file.is_file()}
    code, out, err = colorize(scans, "-o", scans, "--force")
    assert (code, out) == (1, "1 coloured, 0 skipped, 4 failed\n")  # 1899/c.png
    assert err.count("would overwrite the picture") == 4
    assert {file: file.read_bytes() for file in before} == before

    code, out, err = colorize(scans / "a.png", scans / "a.bmp", scans / "a.png", "-o", "out")
    assert (code, out) == (1, "1 coloured, 0 skipped, 1 failed\n")
    assert "a.bmp: its result would overwrite that of" in err
    assert read(tmp_path / "out" / "a.png").pixels.shape == (40, 50, 3)


def test_a_folder_without_pictures_is_a_failure(colorize, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = colorize("empty")
    assert code == 1 and err == "colorize: empty holds no pictures\n"


def test_saturation_size_and_revision(colorize, scans):
    def color(*flags) -> np.ndarray:
        assert colorize(scans / "B.PNG", "--force", "-o", "out.png", *flags)[0] == 0
        return read("out.png").pixels.astype(int)

    assert np.ptp(color("--saturation", 0), axis=2).max() == 0
    assert np.ptp(color("--saturation", 2), axis=2).mean() > np.ptp(color(), axis=2).mean() > 1
    assert not np.array_equal(color("--size", 32), color())
    color("--revision", "epoch-002")
    assert b"epoch-002" in read("out.png").xmp


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size", "3"], "size must be"),
        (["--saturation", "-1"], "saturation must be"),
        (["--revision", "epoch-9"], "no snapshot"),
        (["--model", "checkpoints/typo"], "typo"),
        (["--device", "toaster"], "toaster cannot be used"),
        (["-o", "out.gif"], "out.gif is of a kind that cannot be written: use one of .png"),
        (["-o", "file"], "file is there and no folder"),
        (["-o", "out.png", "other.jpg"], "out.png is one file"),
    ],
)
def test_wrong_usage_ends_with_2(colorize, tmp_path, scans, flags, message):
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    code, out, err = colorize(scans / "a.jpg", *flags)
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1
    assert tree(tmp_path) == before


def test_without_pictures_there_is_nothing_to_do(colorize, capfd):
    with pytest.raises(SystemExit, match="2"):
        colorize()
    assert "name a picture or a folder" in capfd.readouterr().err


def test_list(colorize, model, monkeypatch):
    monkeypatch.chdir(Path(model).parents[1])
    code, out, _ = colorize("--list")
    assert code == 0 and "tiny\n    epoch-001\n    epoch-002\n" in out


def test_the_shipped_model_is_the_default(tmp_path, model, monkeypatch, capfd):
    shutil.copytree(model, tmp_path / "checkpoints" / hub.DEFAULT)  # the working directory's come first
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(OLD[0]), "-o", "out.jpg", "--device", "cpu"]) == 0
    assert f"Colorize ({hub.DEFAULT})".encode() in read("out.jpg").xmp


def test_help_shows_the_command():
    helped = subprocess.run([*COMMAND, "--help"], env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    assert helped.startswith("usage: colorize ") and "colorize grandmother.jpg -o colour.png" in helped


def test_only_a_screenful_of_failures_is_shown(colorize, tmp_path, scans):
    for i in range(cli.SCREEN + 5):
        (scans / f"bad {i:02}.jpg").write_text("no picture")
    code, out, err = colorize(scans, "-o", "out")
    assert (code, out) == (1, f"3 coloured, 0 skipped, {cli.SCREEN + 5} failed\n")
    listed = (tmp_path / "out" / "failed.txt").read_text().splitlines()
    assert len(listed) == cli.SCREEN + 5 and all("is not a picture" in line for line in listed)
    assert len(err.splitlines()) == cli.SCREEN + 1 and err.endswith("and 5 more: out/failed.txt names all\n")
    assert len(colorize(scans)[2].splitlines()) == cli.SCREEN + 5  # there is no folder of results for a list


def test_what_fails_together_is_tried_alone(colorize, tmp_path, scans, monkeypatch):
    for i in range(6):
        shutil.copy(OLD[0], scans / f"{i}.jpg")
    paint, batches = Colorizer._paint, []

    def small_memory(self, pictures, size):
        batches.append([Path(p.name).name for p in pictures])
        if len(pictures) > 1 or batches[-1] == ["B.PNG"]:
            raise torch.OutOfMemoryError("out of memory:\n3 GB wanted")
        return paint(self, pictures, size)

    monkeypatch.setattr(Colorizer, "_paint", small_memory)
    monkeypatch.setattr(archive, "_cores", lambda: 1)
    code, out, err = colorize(scans, "-o", "out")
    assert (code, out) == (1, "8 coloured, 0 skipped, 1 failed\n")
    assert "B.PNG: out of memory: 3 GB wanted" in err and len(err.splitlines()) == 1
    assert max(map(len, batches)) > 1  # of one shape


def test_the_memory_of_pictures_in_work_is_bounded(tmp_path, monkeypatch):
    """By bytes, not by their number; one that is too large for that goes alone."""
    rng = np.random.default_rng(0)
    jobs = []
    for i, side in enumerate([*rng.integers(20, 60, 40), 300, *rng.integers(20, 60, 40)]):
        Image.new("L", (side, side)).save(tmp_path / f"{i}.png")
        jobs.append((tmp_path / f"{i}.png", tmp_path / "out" / f"{i}.png"))
    in_work, most, large_with = [], 0, None

    def colorize(taken, *_):
        nonlocal most, large_with
        in_work.extend(map(weigh, [source for source, _ in taken]))
        most = max(most, sum(w for w in in_work if w < 10**5))
        time.sleep(0.003)
        for source, _ in taken:
            large_with = len(in_work) if weigh(source) > 10**5 else large_with
            in_work.remove(weigh(source))
            yield source, None

    monkeypatch.setattr(archive, "_colorize", colorize)
    monkeypatch.setattr(archive, "_cores", lambda: 4)
    monkeypatch.setattr(archive, "MEMORY", 20_000)
    monkeypatch.setattr(archive, "LOAD", 30_000)
    assert sorted(source for source, _ in archive.colorize_files(jobs, None)) == sorted(source for source, _ in jobs)
    assert 40_000 < most <= 80_000 and large_with == 1


def test_weight_is_that_of_the_pixels(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "8.jpg")
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(tmp_path / "16.png")
    (tmp_path / "no.png").write_text("no picture")
    assert [weigh(tmp_path / name) for name in ("8.jpg", "16.png", "no.png", "none")] == [4800, 9600, 0, 0]


def test_a_process_of_a_launch_takes_the_gpu_that_is_its_own(monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(
        Colorizer, "from_pretrained", lambda name, revision, device: devices.append(device) or (lambda *_: None)
    )
    for rank, flags in (("2", []), ("5", ["--device", "cuda"]), ("2", ["--device", "cpu"])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        cli.load(cli.argument_parser().parse_args(["a.jpg", *flags]))
    assert devices == ["cuda:2", "cuda:1", "cpu"]


def launch(arguments: list[str], processes: int) -> list[subprocess.Popen]:
    """What `accelerate launch` and torchrun do."""
    numbers = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(processes)} for i in range(processes)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*COMMAND, *arguments], env=ENVIRONMENT | number, **pipes) for number in numbers]


def test_two_processes_share_a_folder_and_one_of_them_dies(tmp_path, model):
    for i in range(40):
        shutil.copy(OLD[i % len(OLD)], tmp_path / f"{i:02}.jpg")
    (tmp_path / "bad.jpg").write_text("no picture")
    arguments = [str(tmp_path), "-o", str(tmp_path / "out"), "--model", model, "--device", "cpu"]
    first, second = launch(arguments, 2)
    while not list((tmp_path / "out").glob("[!.]*.jpg")) and first.poll() is None:
        time.sleep(0.01)
    first.kill()
    output = second.communicate(timeout=60)[0]
    assert second.returncode == 0 and output.startswith("process 1 of 2: ") and first.wait() == -signal.SIGKILL
    first.communicate()

    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("[!.]*.jpg")}
    assert len(before) < 40
    outputs = [process.communicate(timeout=60)[0] for process in launch(arguments, 2)]
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("[!.]*.jpg")}
    assert len(after) == 40 and before.items() <= after.items()
    counts = [[int(word) for word in output.split(": ")[1].split() if word.isdigit()] for output in outputs]
    assert np.sum(counts, axis=0).tolist() == [40 - len(before), len(before), 1]  # none twice
    assert len(list((tmp_path / "out").glob("failed*.txt"))) == 1


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "the launcher"])
def test_a_stop_leaves_whole_files_only(tmp_path, model, stop):
    for i in range(60):
        shutil.copy(OLD[i % len(OLD)], tmp_path / f"{i:02}.jpg")
    arguments = [str(tmp_path), "-o", str(tmp_path / "out"), "--model", model, "--device", "cpu"]
    process = subprocess.Popen([*COMMAND, *arguments], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "out").glob("[!.]*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(stop)
    assert process.communicate(timeout=60)[1].endswith("colorize: interrupted\n")
    assert process.returncode == 130
    assert 0 < len(tree(tmp_path / "out")) < 60
    for file in tree(tmp_path / "out"):
        assert not file.startswith(".") and read(tmp_path / "out" / file).pixels.ndim == 3
