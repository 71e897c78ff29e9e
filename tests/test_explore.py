"""train/explore.py on real photographs: against the report's table and method, against brute force, as a program."""

import csv
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import explore
import survey
from conftest import OLD, PHOTOS, ROOT, TWICE
from data import decode


def fill(folder: Path, ordinary: int = 0) -> dict[str, str]:
    """Photographs with all that can be wrong with them -> what is wrong, by name. `ordinary` more have nothing."""
    photos = [cv2.imread(str(p)) for p in PHOTOS]
    (folder / "deep" / "er").mkdir(parents=True)
    for i, photo in enumerate(photos):
        cv2.imwrite(str(folder / f"photo-{i}.jpg"), photo)
    for i in range(ordinary):
        cv2.imwrite(str(folder / "deep" / f"ordinary-{i:03}.jpg"), np.roll(photos[i % 6], 37 * (i // 6 + 1), axis=1))
    jpeg = (folder / "photo-0.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.png").touch()
    (folder / "words.jpg").write_text("not a picture")
    (folder / "notes.txt").write_text("nor this, but nobody said so")
    cv2.imwrite(str(folder / "tiny.png"), photos[4][200:260, 300:400])
    cv2.imwrite(str(folder / "deep" / "gray.png"), cv2.imread(str(OLD[2]), cv2.IMREAD_GRAYSCALE))
    cv2.imwrite(str(folder / "deep" / "gray.jpg"), cv2.imread(str(OLD[3])))
    light = cv2.cvtColor(photos[0][::-1], cv2.COLOR_BGR2GRAY)[..., None] / 255
    cv2.imwrite(str(folder / "deep" / "sepia.jpg"), ((1 - light) * (20, 30, 45) + light * (190, 225, 245)).astype(np.uint8))
    half = cv2.resize(photos[1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(folder / "deep" / "er" / "half.webp"), half)
    cv2.imwrite(str(folder / "deep" / "er" / "worse.jpg"), photos[2], [cv2.IMWRITE_JPEG_QUALITY, 40])
    photo = Image.open(PHOTOS[3])
    exif = photo.getexif()
    exif[0x0112] = 6  # upright again when turned to the right
    photo.rotate(90, expand=True).save(folder / "deep" / "turned.jpg", exif=exif, quality=95)
    return {
        "cut.jpg": "damaged", "empty.png": "damaged", "words.jpg": "damaged", "tiny.png": "tiny",
        "deep/gray.png": "gray", "deep/gray.jpg": "gray", "deep/sepia.jpg": "tinted",
        "deep/er/half.webp": "duplicate", "deep/er/worse.jpg": "duplicate", "deep/turned.jpg": "duplicate",
    }  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def launch(program: str, *words, launcher=TWICE) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launcher, f"train/{program}.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def mess(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("mess")
    return folder, fill(folder)


@pytest.fixture(scope="module")
def explored(mess) -> Path:
    before, output = contents(mess[0]), mess[0].with_name("explored")
    done = launch("explore", mess[0], "--output", output, launcher=[sys.executable])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "16/16" in done.stderr and "pictures/s" in done.stderr  # a bar with a rate
    assert contents(mess[0]) == before
    return output


def frequencies(rgbs) -> np.ndarray:
    """(6, 256) of R, G, B, L, a, b, as the report counts them."""
    total = np.zeros((6, 256), np.int64)
    for rgb in rgbs:
        both = np.append(rgb, cv2.cvtColor(rgb, cv2.COLOR_RGB2Lab), axis=2)
        total += [np.bincount(both[..., i].ravel(), minlength=256) for i in range(6)]
    return total


def test_the_table_of_the_report_digit_for_digit():
    counts = np.loadtxt(ROOT / "tests" / "report_RGB_frequencies.csv", delimiter=",")
    assert explore.markdown(explore.channel_table(dict(zip("RGB", counts, strict=True)))).splitlines()[2:] == [
        "| R | 5.000036e+11 | 128.549689 | 78.269088 | 0 | 56 | 129 | 199 | 255 |",
        "| G | 5.000036e+11 | 118.101712 | 76.194890 | 0 | 48 | 113 | 184 | 255 |",
        "| B | 5.000036e+11 | 111.279365 | 76.903435 | 0 | 43 | 98 | 176 | 255 |",
    ]


def test_statistics_are_those_of_the_values_themselves():
    values = np.random.default_rng(0).integers(3, 250, 10_001)
    total, mean, std, low, *quartiles, high = explore.statistics(np.bincount(values, minlength=256))
    assert (total, low, high) == (10_001, values.min(), values.max())
    assert np.allclose((mean, std), (values.mean(), values.std()), rtol=1e-12)
    assert quartiles == list(np.quantile(values, (0.25, 0.5, 0.75), method="inverted_cdf"))


def test_the_table_of_sizes_is_that_of_pandas():
    sizes = np.random.default_rng(0).integers(100, 2000, (501, 2))
    described = pd.DataFrame(sizes).describe()
    rows = explore.size_table(sizes)
    assert [row[0] for row in rows[1:]] == list(described.index)
    assert [row[1:] for row in rows[1:]] == [[f"{x:.6e}" for x in row] for row in described.to_numpy()]


def test_colours_are_counted_as_the_report_counts_them(monkeypatch):
    """On photographs, all 2^24 colours once, and where the table has to be emptied on the way."""
    rgbs = [cv2.imread(str(p), cv2.IMREAD_COLOR_RGB) for p in (*PHOTOS, *OLD)]
    rgbs += [np.arange(2**24, dtype="<u4").view(np.uint8).reshape(4096, 4096, 4)[..., :3].copy()]
    rgbs += [np.zeros((1, 3000, 3), np.uint8), np.full((7, 1, 3), 255, np.uint8)]
    count = explore.ColourCount()
    for i, rgb in enumerate(rgbs):
        count.pixels += 2**31 * (i == 4)  # as if so many had come before
        count.pixels += 2**31 * (i == 5)
        monkeypatch.setattr(explore, "BAND", (2**22, 10_000, 1)[i % 3] if rgb.shape[0] < 4096 else 2**22)
        count.add(rgb)
    count.settle()
    expected = frequencies(rgbs)
    assert (count.counts == expected[:4]).all()
    assert (count.ab.sum(1) == expected[4]).all() and (count.ab.sum(0) == expected[5]).all()
    lab = np.concatenate([cv2.cvtColor(rgb, cv2.COLOR_RGB2Lab).reshape(-1, 3) for rgb in rgbs])
    pairs = np.bincount(lab[:, 1].astype(int) * 256 + lab[:, 2], minlength=65536)
    assert (count.ab.ravel() == pairs).all()


def test_what_is_wrong_is_named(mess, explored):
    folder, wrong = mess
    with open(explored / "warnings.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    originals = {"deep/er/half.webp": 1, "deep/er/worse.jpg": 2, "deep/turned.jpg": 3}
    named = {row["picture"]: row["warning"] for row in rows if row["warning"] != "duplicate"}
    assert named == {name: kind for name, kind in wrong.items() if kind != "duplicate"}
    pairs = {frozenset((row["picture"], row["of"])) for row in rows if row["warning"] == "duplicate"}
    assert pairs == {frozenset((name, f"photo-{i}.jpg")) for name, i in originals.items()}


def test_the_files(mess, explored):
    folder, wrong = mess
    damaged = [folder / name for name, kind in wrong.items() if kind == "damaged"]
    sound = {p for p in folder.rglob("*.*") if p.name != "notes.txt"} - set(damaged)
    rgbs = [cv2.imread(str(p), cv2.IMREAD_COLOR_RGB) for p in sound]
    counts = frequencies(rgbs)
    assert (np.loadtxt(explored / "RGB_frequencies.csv", delimiter=",", dtype=np.int64) == counts[:3]).all()
    assert (np.loadtxt(explored / "Lab_frequencies.csv", delimiter=",", dtype=np.int64) == counts[3:]).all()
    sizes = np.loadtxt(explored / "image_sizes.csv", delimiter=",", dtype=np.int64)
    assert sorted(map(tuple, sizes)) == sorted(rgb.shape[:2] for rgb in rgbs)
    statistics = (explored / "statistics.md").read_text()
    assert explore.markdown(explore.channel_table(dict(zip("Lab", counts[3:], strict=True)))) in statistics
    page = (explored / "report.html").read_text()
    figures = {p.stem for p in explored.glob("*.png")}
    assert figures == {
        "channels_RGB", "channels_Lab", "frequency_RGB", "frequency_Lab", "frequency_height", "frequency_width", "gamut",
        "colourfulness", "tiny", "gray", "tinted", "duplicate",
    }  # fmt: skip
    assert page.count("data:image/png") == len(figures) and "cut.jpg, empty.png, words.jpg" in page
    assert "Damaged: 3 (18.75%)" in page
    for figure in figures:
        assert cv2.imread(str(explored / f"{figure}.png")).std() > 5  # something is on it


def test_two_processes_write_the_same(mess, explored, tmp_path):
    done = launch("explore", mess[0], "--output", tmp_path / "both")
    assert done.returncode == 0, done.stderr[-3000:]
    assert contents(tmp_path / "both") == contents(explored)


# Reading


def listed(pictures: survey.Pictures) -> list[str]:
    return [pictures.name(n) for n in range(len(pictures))]


def test_a_zip_and_parquet_read_as_the_folder_does(mess, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = survey.Pictures(str(mess[0]))
    names = listed(folder)
    with zipfile.ZipFile(tmp_path / "mess.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(mess[0].rglob("*")):
            archive.write(path, path.relative_to(mess[0]))
        archive.writestr("__MACOSX/._photo-0.jpg", b"of no interest")
    with open(tmp_path / "mess.zip", "r+b") as file:  # a few bytes of photo-5.jpg go bad
        at = zipfile.ZipFile(file).getinfo("photo-5.jpg").header_offset + 5000
        file.seek(at)
        file.write(b"\0" * 100)
    zipped = survey.Pictures(str(tmp_path / "mess.zip"))
    assert sorted(listed(zipped)) == sorted(names)

    def rows(numbers) -> datasets.Dataset:
        images = [{"bytes": (mess[0] / names[n]).read_bytes(), "path": names[n]} for n in numbers] + [None]
        features = datasets.Features({"image": datasets.Image(decode=False)})
        return datasets.Dataset.from_dict({"image": images}, features=features)

    (tmp_path / "shards").mkdir()
    rows(range(5)).to_parquet(tmp_path / "shards" / "validation-0.parquet")
    rows(range(5, 16)).to_parquet(tmp_path / "shards" / "train-0.parquet")
    parquet = survey.Pictures(str(tmp_path / "shards"))
    assert listed(parquet) == [
        *(f"train/{name}" for name in names[5:]), "train/00000011", *(f"validation/{name}" for name in names[:5]),
        "validation/00000005",
    ]  # fmt: skip
    for other in (zipped, parquet):
        images = dict(zip(listed(other), other.read(range(len(other))), strict=True))
        for n, name in enumerate(names):
            own = images.get(name) or images.get(f"train/{name}") or images[f"validation/{name}"]
            if other is zipped and name == "photo-5.jpg":
                assert decode(own) is None
            else:
                rgb = decode(folder.read([n])[0])
                assert (decode(own) == rgb).all() if rgb is not None else decode(own) is None
    assert decode(parquet.read([11])[0]) is None  # an empty row


def test_refusals_name_the_remedy(mess, tmp_path):
    with pytest.raises(SystemExit, match="nothing is to be changed: name another folder"):
        survey.keep_apart(str(mess[0]), mess[0] / "results")
    with pytest.raises(SystemExit, match="holds no pictures"):
        survey.Pictures(str(tmp_path))
    (tmp_path / "no.zip").write_text("no")
    for name in ("no.zip", "missing.zip"):
        with pytest.raises(SystemExit, match=f"{name} cannot be read"):
            survey.Pictures(str(tmp_path / name))


# Judging


def samples(rgbs) -> torch.Tensor:
    small = [cv2.resize(rgb, (32, 32), interpolation=cv2.INTER_AREA) for rgb in rgbs]
    return torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) / 255


def test_tints_are_told_from_colours():
    rgbs = [cv2.imread(str(p), cv2.IMREAD_COLOR_RGB) for p in PHOTOS]
    gray = [cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[..., None] / 255 for rgb in rgbs]
    tones = [((45, 30, 20), (245, 225, 190)), ((10, 40, 90), (235, 245, 250)), ((60, 0, 60), (255, 255, 200))]
    tinted = [((1 - g) * dark + g * light).astype(np.uint8) for g in gray for dark, light in np.array(tones)]
    assert (survey.tint(samples(rgbs)) > 2 * survey.TINTED).all()
    assert (survey.tint(samples(tinted)) < survey.TINTED).all()
    assert (survey.tint(samples([cv2.imread(str(p), cv2.IMREAD_COLOR_RGB) for p in OLD])) < survey.TINTED).all()
    assert survey.tint(torch.full((1, 3, 32, 32), 0.3)) < 1e-3  # one colour, for which there are many curves


def test_originals_are_those_of_comparing_all_with_all():
    rng = np.random.default_rng(0)
    prints = rng.integers(0, 2**64, 40, np.uint64)
    flips = np.packbits(rng.random((400, 64)) < 0.06, axis=1).view(np.uint64)[:, 0]  # about 4 bits each
    found = np.zeros(400, survey.FOUND)
    found["number"], found["fingerprint"] = np.arange(400) * 3, prints[rng.integers(0, 40, 400)] ^ flips
    kept, expected = [], []
    for number, print_ in zip(found["number"], found["fingerprint"], strict=True):
        original = next((n for n, other in kept if (int(print_) ^ int(other)).bit_count() <= survey.NEAR), None)
        if original is None:
            kept.append((number, print_))
        expected.append(number if original is None else original)
    assert 40 < len(kept) < 390
    assert survey.originals(found).tolist() == expected


def test_nothing_that_can_be_read_is_said(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty.jpg").touch()
    monkeypatch.setattr(sys, "argv", ["explore.py", str(tmp_path / "in"), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="not one of its 1 pictures can be read"):
        explore.main()
