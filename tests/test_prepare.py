"""train/prepare.py on real photographs: what it keeps, what comes out, stops and processes."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import datasets
import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image, JpegImagePlugin

import prepare
import survey
from conftest import PHOTOS, ROOT, TWICE
from test_explore import contents, fill, launch

SIZE = 400
ORDINARY = 110


@pytest.fixture(scope="module")
def mess(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("mess")
    wrong = fill(folder, ORDINARY)
    return folder, wrong | {"tiny.png": "too small", "deep/er/half.webp": "too small"}


@pytest.fixture(scope="module")
def prepared(mess) -> Path:
    """By one process that nothing stops."""
    before, output = contents(mess[0]), mess[0].with_name("prepared")
    done = launch("prepare", mess[0], output, "--size", SIZE, launcher=[sys.executable])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "judging: 100%" in done.stderr and "writing: 100%" in done.stderr
    assert contents(mess[0]) == before
    return output


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, words)])
    prepare.main()


def dropped(output: Path) -> list[dict[str, str]]:
    with open(output / "dropped.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_dropped_and_why(mess, prepared):
    folder, wrong = mess
    rows = dropped(prepared)
    assert {row["picture"]: row["reason"] for row in rows if row["reason"] != "duplicate"} == {
        name: reason for name, reason in wrong.items() if reason != "duplicate"
    }
    pairs = {frozenset((row["picture"], row["of"])) for row in rows if row["reason"] == "duplicate"}
    assert {frozenset(("deep/turned.jpg", "photo-3.jpg")), frozenset(("deep/er/worse.jpg", "photo-2.jpg"))} <= pairs
    every = {p.relative_to(folder).as_posix() for p in folder.rglob("*.*") if p.name != "notes.txt"}
    left = every - {row["picture"] for row in rows}
    results = set(contents(prepared)) - {"dropped.csv", "prepared.json"}
    assert results == {name.rpartition(".")[0] + ".jpg" for name in left}
    counts = json.loads((prepared / "prepared.json").read_text())
    assert counts["kept"] == len(left) and counts["pictures"] == len(every) == len(left) + sum(counts["dropped"].values())


def test_the_middle_is_kept_upright(mess, prepared):
    for file in prepared.rglob("*.jpg"):
        with Image.open(file) as image:
            assert image.size == (SIZE, SIZE) and not image.getexif()
            assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4: colour is as fine as lightness
    photo, result = (cv2.imread(str(folder / "photo-0.jpg")).astype(float) for folder in (mess[0], prepared))
    h, w = photo.shape[:2]
    middle = photo[h // 2 - 200 : h // 2 + 200, w // 2 - 200 : w // 2 + 200]
    assert np.abs(middle - result).mean() < 1.5
    args = prepare.flags().parse_args(["in", "out", "--size", str(SIZE)])
    turned, upright = (
        cv2.imdecode(np.frombuffer(prepare.fit({"bytes": None, "path": path}, args), np.uint8), cv2.IMREAD_COLOR).astype(float)
        for path in (mess[0] / "deep" / "turned.jpg", PHOTOS[3])
    )
    assert np.abs(turned - upright).mean() < 3  # EXIF turns the first


def kill(command: list[str], output: Path) -> int:
    """Run until some results are there, and kill it -> how many there are."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not any(output.rglob("*.jpg")):
            time.sleep(0.002)
        victims = [process, *psutil.Process(process.pid).children(recursive=True)]
        for victim in victims:
            victim.kill()
    psutil.wait_procs(victims[1:])
    return len(list(output.rglob("*.jpg")))


def test_two_processes_go_on_after_a_kill_and_write_the_same(mess, prepared, tmp_path):
    every = len(list(prepared.rglob("*.jpg")))
    for output in (tmp_path / str(i) for i in range(5)):
        command = [*TWICE, "train/prepare.py", str(mess[0]), str(output), "--size", str(SIZE)]
        if kill(command, output) < every:  # it was not faster
            break
    assert len(list((output / ".unfinished").glob("*.npy"))) == 2  # of two chunks
    times = {p: p.stat().st_mtime_ns for p in output.rglob("*.jpg")}
    assert 0 < len(times) < every
    done = launch("prepare", mess[0], output, "--size", SIZE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(p.stat().st_mtime_ns == then for p, then in times.items())  # not written again
    assert contents(output) == contents(prepared)


def test_a_second_run_finds_it_done_and_another_is_refused(mess, prepared, monkeypatch, capsys):
    before = contents(prepared)
    run(monkeypatch, mess[0], prepared, "--size", SIZE)
    counts = json.loads((prepared / "prepared.json").read_text())
    out = capsys.readouterr().out
    assert f"{counts['kept']:,} kept" in out and "3 damaged" in out
    for words in ((mess[0], prepared), (mess[0], prepared, "--size", SIZE, "--resize"), (PHOTOS[0].parent, prepared)):
        with pytest.raises(SystemExit, match="not of a run with these pictures and flags: name another folder"):
            run(monkeypatch, *words)
    with pytest.raises(SystemExit, match="nothing is to be changed"):
        run(monkeypatch, mess[0], mess[0] / "out")
    assert contents(prepared) == before


def test_a_dry_run_only_counts(mess, prepared, tmp_path, monkeypatch, capsys):
    run(monkeypatch, mess[0], tmp_path / "out", "--size", SIZE, "--dry-run")
    counts = json.loads((prepared / "prepared.json").read_text())
    assert f"{counts['kept']:,} kept" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_parquet_is_what_datasets_reads(mess, prepared, tmp_path, monkeypatch):
    """In shards, with the same pictures as in the folder; and the folder itself."""
    monkeypatch.setattr(prepare, "SHARD", 40)
    monkeypatch.setattr(prepare, "ROWS", 16)
    run(monkeypatch, mess[0], tmp_path / "out", "--size", SIZE, "--parquet")
    results = {name: (prepared / name).read_bytes() for name in contents(prepared) if name.endswith(".jpg")}
    assert len(list((tmp_path / "out" / "data").iterdir())) == -(-len(results) // 40)
    rows = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert isinstance(rows.features["image"], datasets.Image) and rows[0]["image"].size == (SIZE, SIZE)
    images = rows.cast_column("image", datasets.Image(decode=False))["image"]
    assert {image["path"]: image["bytes"] for image in images} == results
    again = datasets.load_dataset(str(prepared), cache_dir=str(tmp_path / "cache"))["train"]
    assert len(again) == len(results) and again[0]["image"].size == (SIZE, SIZE)
    assert dropped(tmp_path / "out") == dropped(prepared)


def test_resized_pictures_are_whole(tmp_path, monkeypatch):
    run(monkeypatch, PHOTOS[0].parent, tmp_path / "out", "--size", 128, "--resize")
    for photo in PHOTOS:
        whole, small = cv2.imread(str(photo)), cv2.imread(str(tmp_path / "out" / photo.name))
        assert small.shape == (128, 192, 3)
        assert np.abs(cv2.resize(whole, (192, 128), interpolation=cv2.INTER_AREA).astype(float) - small).mean() < 3


# Names


class Named(survey.Pictures):
    def __init__(self, *names: str):
        self.names = pa.array(map(os.fsencode, names), pa.large_binary())


def test_results_stay_in_the_folder_and_never_meet():
    names = ["a.jpg", "a.png", "b/a.jpg", "../../up.jpg", "/root.jpg", "b/../a.webp", "a-1.jpg", "A.JPG", "dot.ted.tif"]
    names = prepare.result_names(Named(*names, "old\udce9.jpg"), np.arange(10)).to_pylist()
    assert names[:5] == ["a.jpg", "a-1.jpg", "b/a.jpg", "up.jpg", "root.jpg"] and names[8:] == ["dot.ted.jpg", "old?.jpg"]
    assert len({name.lower() for name in names}) == 10


def test_splits_stay_splits():
    names = pa.array([f"train/{i}.jpg" for i in range(2001)] + ["validation/1.jpg"], pa.large_string())
    shards = prepare.share_out(names)
    assert {name: len(places) for name, places in shards.items()} == {
        "data/train-00000-of-00003.parquet": 1000, "data/train-00001-of-00003.parquet": 1000,
        "data/train-00002-of-00003.parquet": 1, "data/validation-00000-of-00001.parquet": 1,
    }  # fmt: skip
    assert shards["data/validation-00000-of-00001.parquet"].tolist() == [2001]


def test_a_copy_of_what_is_dropped_is_kept():
    found = np.zeros(4, survey.FOUND)
    found["number"], found["height"], found["width"] = range(4), (100, 600, 600, 0), 600
    found["fingerprint"] = (7, 7, 7 ^ 3, 9)
    reasons, original = prepare.decide(found, 512)
    assert reasons.tolist() == ["too small", "", "duplicate", "damaged"] and original.tolist() == [0, 1, 1, 3]
