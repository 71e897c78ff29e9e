"""Training data: real photographs, and pictures of one colour each where a test has to know a picture by its crop."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader

import data
from conftest import PHOTOS, ROOT

COLOURS = 23  # pictures, some of which a batch of 3 leaves over


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("colours")
    for i in range(COLOURS):
        cv2.imwrite(str(folder / f"{i:02}.png"), np.full((20, 30, 3), 10 * i, np.uint8))
    return folder


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> Path:
    """The photographs, one of them damaged, in three parquet files of two, and two more for validation."""
    import datasets

    folder = tmp_path_factory.mktemp("stream")
    rows = [{"image": {"bytes": p.read_bytes(), "path": p.name}} for p in PHOTOS]
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:5000]
    everything = datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image(decode=False)}))
    for i in range(3):
        everything.select([2 * i, 2 * i + 1]).to_parquet(folder / f"train-{i:05}-of-00003.parquet")
    everything.select([0, 5]).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where `datasets` keeps what it makes of the parquet files."""
    import datasets

    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def first(batches, count: int) -> torch.Tensor:
    return torch.cat(list(itertools.islice(batches, count)))


def names(crops: torch.Tensor) -> list[int]:
    return [int(crop.max()) // 10 for crop in crops]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_each_picture_once_an_epoch(colours, processes, workers):
    rows = data._pictures(colours)
    shards = [
        prepare_data_loader(
            data.loader(data.Photos(rows, 16, augment=True), 3, workers), num_processes=processes, process_index=i
        )
        for i in range(processes)
    ]  # as `accelerator.prepare` shares them out
    steps = COLOURS * 6 // processes  # several epochs, and the batches straddle them
    dealt = itertools.islice(zip(*shards, strict=True), steps)
    seen = names(torch.cat([batch for step in dealt for batch in step]))
    epochs = [seen[i : i + COLOURS] for i in range(0, len(seen) - COLOURS, COLOURS)]
    assert len(epochs) >= 5
    assert all(sorted(epoch) == list(range(COLOURS)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == len(epochs)  # each in an order of its own


def test_a_position_decides_the_crop_whatever_the_workers_and_the_start():
    rows = data._pictures(PHOTOS[0].parent)
    photos = data.Photos(rows, 64, augment=True, seed=7)
    whole = first(data.loader(photos, 2, 0), 8)
    assert (first(data.loader(photos, 2, 2), 8) == whole).all()
    assert (first(data.loader(photos, 2, 2, start=5), 3) == whole[10:]).all()
    assert (whole[:6] != whole[6:12]).any()  # the second epoch
    assert (first(data.loader(data.Photos(rows, 64, augment=True, seed=8), 2, 0), 3) != whole[:6]).any()
    assert whole.shape == (16, 64, 64, 3) and whole.dtype == torch.uint8


def test_the_global_generator_is_left_alone(colours):
    state = torch.get_rng_state()
    first(data.loader(data.Photos(data._pictures(colours), 16, augment=True), 3, 0), 2)
    assert (torch.get_rng_state() == state).all()


def test_validation_is_in_order_complete_and_the_middle():
    rows = data._pictures(PHOTOS[0].parent)
    batches = list(data.loader(data.Photos(rows, 64), 4, 0))
    assert [len(batch) for batch in batches] == [4, 2]
    photo = cv2.imread(str(PHOTOS[0]), cv2.IMREAD_COLOR_RGB)
    h, w = photo.shape[:2]
    side = min(h, w)
    middle = photo[(h - side) // 2 :, (w - side) // 2 :][:side, :side]
    assert (batches[0][0].numpy() == cv2.resize(middle, (64, 64), interpolation=cv2.INTER_AREA)).all()


def test_crops_are_inside_and_of_every_size_flipped_half_of_the_time(tmp_path):
    """On a picture whose colour tells the place."""
    x, y = np.meshgrid(np.arange(200), np.arange(100))
    cv2.imwrite(str(tmp_path / "ramp.png"), np.dstack([np.zeros_like(x), y, x]).astype(np.uint8))  # blue, green, red
    photos = data.Photos(data._pictures(tmp_path), 50, augment=True)
    crops = torch.stack([photos[i] for i in range(400)]).int()
    across, down = crops[:, 25, :, 0].diff(dim=1).float().mean(1), crops[:, :, 25, 1].diff(dim=1).float().mean(1)
    assert 0.4 < (across > 0).float().mean() < 0.6  # half of them run to the right
    sides = down * 50
    assert sides.min() < 74 and sides.max() > 98 and sides.max() < 102  # 100 / 1.4 to 100
    assert (across.abs() - down).abs().max() < 0.06  # still squares
    assert crops[..., 0].amin() < 5 and crops[..., 0].amax() > 194 and crops[..., 1].amin() < 3 and crops[..., 1].amax() > 96


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_damaged_and_missing_pictures_are_named_once_and_replaced(colours, tmp_path, start):
    (tmp_path / "cut.jpg").write_bytes(PHOTOS[0].read_bytes()[:50_000])
    (tmp_path / "empty.jpg").touch()
    lines = ["cut.jpg", "missing.jpg", colours / "05.png", "empty.jpg", colours / "06.png", colours / "07.png"]
    (tmp_path / "list.txt").write_text("\n".join(map(str, lines)))
    photos = data.Photos(data.held_out(str(tmp_path / "list.txt")), 16, True, damaged=tmp_path / "damaged.txt")
    batches = data.loader(photos, 2, 2)
    batches.multiprocessing_context = start
    seen = names(first(batches, 9))  # three epochs
    assert all(sorted(seen[i : i + 6]) == [5, 5, 5, 6, 6, 7] for i in range(0, 18, 6))
    named = (tmp_path / "damaged.txt").read_text().splitlines()
    assert sorted(named) == sorted(str(tmp_path / f"{x}.jpg") for x in ("cut", "missing", "empty"))


def test_workers_start_after_opencv_has_used_its_threads():
    cv2.setNumThreads(2)
    cv2.resize(np.zeros((4000, 4000, 3), np.uint8), (2000, 2000), interpolation=cv2.INTER_LINEAR)
    batches = data.loader(data.Photos(data._pictures(PHOTOS[0].parent), 64, augment=True), 2, 2)
    batches.timeout = 60
    assert len(first(batches, 2)) == 4


def test_no_picture_that_can_be_decoded_is_said(tmp_path):
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(ValueError, match="not one picture"):
        data.Photos(data._pictures(tmp_path), 16)[0]


@pytest.mark.parametrize("shape", [(1, 3000), (3, 2), (2000, 7)])
def test_odd_shapes(tmp_path, shape):
    cv2.imwrite(str(tmp_path / "odd.png"), np.zeros((*shape, 3), np.uint8))
    for augment in (False, True):
        assert data.Photos(data._pictures(tmp_path), 512, augment)[0].shape == (512, 512, 3)


def test_a_list_with_repeats_weighs_them_and_nothing_leaks(colours, tmp_path):
    (tmp_path / "pictures").symlink_to(colours)
    lines = [f"pictures/{i:02}.png" for i in (*range(COLOURS), *range(COLOURS), 1, 1, 0)]
    (tmp_path / "list.txt").write_text("# the colours\n\n" + "\n".join(lines) + "\n  \n")
    train, validation = data.open_dataset(str(tmp_path / "list.txt"))
    assert names(torch.stack([*data.Photos(validation, 16)])) == [0, 20]
    places = [i for i in range(1, COLOURS) if i != 20]
    assert names(torch.stack([*data.Photos(train, 16)])) == [*places, *places, 1, 1]
    assert len(data.held_out(str(tmp_path / "list.txt"))) == COLOURS


def test_a_folder_with_and_without_splits(colours, tmp_path):
    train, validation = data.open_dataset(str(colours))
    assert len(train) == COLOURS - 2 and len(validation) == 2 and len(data.held_out(str(colours))) == COLOURS
    for split, i in (("train", 3), ("validation", 4)):
        (tmp_path / split / "deeper").mkdir(parents=True)
        shutil.copy(colours / f"{i:02}.png", tmp_path / split / "deeper")
    train, validation = data.open_dataset(str(tmp_path))
    assert (names(data.Photos(train, 16)), names(data.Photos(validation, 16))) == ([3], [4])
    assert names(data.Photos(data.held_out(str(tmp_path)), 16)) == [4]


def test_parquet(stream):
    train, validation = data.open_dataset(str(stream))
    assert [row["image"]["path"] for row in train] == [p.name for p in PHOTOS]
    assert [row["image"]["path"] for row in data.held_out(str(stream))] == [PHOTOS[0].name, PHOTOS[5].name]
    crop, same = data.Photos(validation, 64)[1], data.Photos(data._pictures(PHOTOS[0].parent), 64)[5]
    assert (crop == same).all()


@pytest.mark.parametrize("workers", [0, 2, 5])  # five are more than there are files
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than there are cores
def test_a_stream_goes_on_in_the_middle(stream, workers):
    rows, validation = data.open_dataset(str(stream), streaming=True, validation_pictures=1)
    assert [row["image"]["path"] for row in validation] == [PHOTOS[0].name]

    def batches(start):
        return data.loader(data.PhotoStream(rows, 32, seed=3, start=2 * start), 2, workers)

    whole = first(batches(0), 14)
    assert whole.shape == (28, 32, 32, 3) and (whole[:14] != whole[14:]).any()
    for start in (3, 8):
        assert (first(batches(start), 14 - start) == whole[2 * start :]).all()


@pytest.fixture(scope="module")
def colour_stream(colours, tmp_path_factory) -> Path:
    """Six files: of seven colours and one damaged picture, and five files of three colours."""
    import datasets

    folder = tmp_path_factory.mktemp("colour-stream")
    files = [p.read_bytes() for p in sorted(colours.iterdir())][:22]
    files.insert(7, b"damaged")
    rows = [{"image": {"bytes": x, "path": f"{i}.png"}} for i, x in enumerate(files)]
    everything = datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image(decode=False)}))
    for i, part in enumerate((range(8), *(range(s, s + 3) for s in range(8, 23, 3)))):
        everything.select(part).to_parquet(folder / f"train-{i}.parquet")
    everything.select([0]).to_parquet(folder / "validation-0.parquet")
    return folder


@pytest.mark.parametrize("world", [1, 8])
def test_processes_share_a_stream_of_too_few_files_by_rows(colour_stream, world):
    rows, _ = data.open_dataset(str(colour_stream), streaming=True)
    parts = [len(range(rank, 23, world)) for rank in range(world)]  # rows of a pass
    streams = [data.PhotoStream(rows, 16, rank=rank, world=world) for rank in range(world)]
    seen = [names(first(data.loader(s, 1, 0), 5 * n)) for s, n in zip(streams, parts, strict=True)]
    for i in range(5):
        dealt = [name for s, n in zip(seen, parts, strict=True) for name in s[i * n : (i + 1) * n]]
        assert set(dealt) == set(range(22)) and len(dealt) == 23  # the damaged one's neighbour twice


@pytest.mark.parametrize("world", [2, 4])  # three of the six files each, and one or two
def test_processes_share_a_stream_by_files(colour_stream, tmp_path, world):
    rows, _ = data.open_dataset(str(colour_stream), streaming=True)
    streams = [data.PhotoStream(rows, 16, rank=i, world=world, damaged=tmp_path / "damaged.txt") for i in range(world)]
    seen = [names(first(data.loader(s, 1, 0), 500)) for s in streams]
    turns = np.bincount(np.concatenate(seen))
    assert len(turns) == 22 and turns.max() < 2 * np.median(turns) and turns.min() > 0.7 * np.median(turns)
    assert all(len(set(s)) == 22 for s in seen)  # other files on each pass
    assert (tmp_path / "damaged.txt").read_text() == "7.png\n"


def refused(*words) -> str:
    with pytest.raises(SystemExit) as refusal:
        data.open_dataset(*map(str, words))
    return str(refusal.value)


def test_refusals_name_the_remedy(colours, colour_stream, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("# nothing\n")
    assert "holds no pictures to train on: name a folder" in refused(tmp_path / "empty")
    assert "holds no pictures to train on" in refused(tmp_path / "blank.txt")
    assert "missing.txt cannot be read: No such file" in refused(tmp_path / "missing.txt")
    assert "can be streamed" in refused(colours, True)
    (tmp_path / "only").mkdir()
    shutil.copy(colour_stream / "train-1.parquet", tmp_path / "only")
    assert "no split `validation`" in refused(tmp_path / "only", True)
    code = f"import data; data.open_dataset({str(tmp_path / 'nowhere')!r})"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "train")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "is no folder or list of pictures" in done.stderr and "Traceback" not in done.stderr


def test_an_old_print_is_paler_darker_in_red_and_still_the_same_scene():
    crops = data.Photos(data._pictures(PHOTOS[0].parent), 64)
    batch = torch.stack([crops[i % len(crops)] for i in range(60)])
    torch.manual_seed(0)
    old, (now, _) = data.old_print(batch), data.to_network(batch)
    assert old.shape == now.shape and old.min() >= -1 and old.max() <= 1
    for before, after in zip(now.flatten(1), old.flatten(1), strict=True):
        assert torch.corrcoef(torch.stack((before, after)))[0, 1] > 0.6
    assert old.flatten(1).std(1).mean() < 0.8 * now.flatten(1).std(1).mean()
    assert (old[0] != old[len(crops)]).any()  # the same photograph, another print

    red, blue = torch.tensor([200, 60, 60]), torch.tensor([90, 90, 225])  # about as light
    halves = torch.stack((red, blue)).to(torch.uint8).repeat_interleave(8, 0).expand(50, 16, 16, 3)
    dark, light = data.old_print(halves).chunk(2, dim=3)
    assert (dark.mean((1, 2, 3)) < light.mean((1, 2, 3))).float().mean() > 0.8


def test_a_gray_patch_of_an_old_print_has_grain_and_no_more():
    torch.manual_seed(0)
    spread = data.old_print(torch.full((50, 16, 16, 3), 128, dtype=torch.uint8)).flatten(1).std(1)
    assert spread.max() < 0.11 and spread.mean() > 0.02


def test_varied_pictures_are_other_views_of_the_same_scene():
    crops = data.Photos(data._pictures(PHOTOS[0].parent), 64)
    batch = torch.stack([crops[0]] * 20)
    torch.manual_seed(0)
    views = data.varied(batch, mosaics=0)
    assert views.shape == batch.shape and views.dtype == torch.uint8
    assert len({tuple(view.flatten().tolist()) for view in views}) == 20
    assert (views.float().mean((1, 2)) - batch.float().mean((1, 2))).abs().max() < 25  # its colours, no black corners
    flat = torch.full((20, 31, 33, 3), 77, dtype=torch.uint8)
    assert (data.varied(flat, mosaics=0.5) == 77).all()


def test_a_mosaic_is_made_of_four_pictures():
    batch = torch.arange(8, dtype=torch.uint8).mul(30).view(8, 1, 1, 1).repeat(1, 32, 32, 3)
    torch.manual_seed(0)
    mosaics = data.varied(batch, mosaics=1)
    values, counts = mosaics[..., 0].unique(return_counts=True)
    assert values.tolist() == batch[:, 0, 0, 0].tolist() and (counts == 8 * 32 * 32 // 8).all()  # nothing else, all as much
    assert max(len(mosaic.unique()) for mosaic in mosaics) in (3, 4)
    torch.manual_seed(0)
    some = data.varied(batch.repeat(50, 1, 1, 1), mosaics=0.3)
    assert 0.2 < sum(len(picture.unique()) > 1 for picture in some) / 400 < 0.4
