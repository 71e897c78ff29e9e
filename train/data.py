"""Photographs for training, from a folder, a list, a `datasets` folder or the Hub, to batches of uint8 RGB.

Training data is one endless stream of crops: what is at a position of it depends on the seed and the position alone, not on
workers or processes. So the same seed gives the same run, and a resumed run goes on where it was.
"""

import atexit
import itertools
import math
import os
import random
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset, get_worker_info

from colorize.color import LIGHTNESS_SCALE, gray_to_lightness, lab_to_network, rgb_to_lab
from colorize.picture import SUFFIXES

SHUFFLED = 500  # rows of a streamed data set that a worker holds in memory to take the next one from


def open_dataset(dataset: str, streaming: bool = False, validation_pictures: int = 1024) -> tuple[Sequence, Sequence]:
    """-> (training rows, validation rows), each `{"image": {"bytes": ..., "path": ...}}`, not yet decoded.

    Args:
        dataset: a folder of pictures; a `.txt` list of them, a path a line, relative to the list, where a repeated line weighs
            more and one that begins with `#` says nothing; a `datasets` folder (parquet); or a Hub id. The splits, in folders
            the subfolders, are named `train` and `validation`. Without them every twentieth picture is held out for validation.
        streaming: read a `datasets` folder or Hub id while training, not before. The training rows are then an
            `IterableDataset` of `datasets`, for `PhotoStream`, and a split `validation` has to be there.
        validation_pictures: how many rows of that split to keep in memory.

    Raises:
        SystemExit: the data cannot be read, or there is nothing to train on. The message is one line with the remedy.
    """
    train, validation = _splits(dataset, streaming)
    if not train:
        raise SystemExit(
            f"{dataset} holds no pictures to train on: name a folder of pictures, or a data set with a split `train`"
        )
    if streaming:
        if validation is None:
            raise SystemExit(f"{dataset} has no split `validation`, which a streamed data set needs")
        return train, list(validation.take(validation_pictures))
    if validation is None:
        # What counts are distinct pictures, or a repeated line of a list could stand on both sides.
        names = [row["image"]["path"] for row in train] if isinstance(train, list) else range(len(train))
        first = dict(zip(reversed(names), reversed(range(len(names))), strict=True))
        held = {name: first[name] for name in list(dict.fromkeys(names))[::20]}
        kept = [i for i, name in enumerate(names) if name not in held]
        train, validation = Subset(train, kept), Subset(train, list(held.values()))
    return train, validation


def held_out(dataset: str) -> Sequence:
    """The rows to judge a model on: the split `validation` where there is one, else every picture, once."""
    train, validation = _splits(dataset, streaming=False)
    rows = train if validation is None else validation
    if not rows:
        raise SystemExit(f"{dataset} holds no pictures: name a folder of pictures, or a data set with a split `validation`")
    return list({row["image"]["path"]: row for row in rows}.values()) if isinstance(rows, list) else rows


def _splits(dataset: str, streaming: bool) -> tuple:
    """-> (training rows or None, validation rows or None)."""
    path = Path(dataset)
    listed, foldered = path.suffix == ".txt", path.is_dir() and not any(path.rglob("*.parquet"))
    if not listed and not foldered:
        return open_split(dataset, "train", streaming), open_split(dataset, "validation", streaming)
    if streaming:
        raise SystemExit(f"{dataset} is on disk as files: only a `datasets` folder or a Hub id can be streamed")
    if listed:
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise SystemExit(f"{dataset} cannot be read: {error.strerror}") from error
        return [_row(path.parent / line) for line in lines if line and not line.startswith("#")], None
    splits = [path / "train", path / "validation"]
    return tuple(map(_pictures, splits)) if all(map(Path.is_dir, splits)) else (_pictures(path), None)


def _pictures(folder: Path) -> list[dict]:
    return [_row(p) for p in sorted(folder.rglob("*")) if p.suffix.lower() in SUFFIXES]


def _row(path: Path) -> dict:
    return {"image": {"bytes": None, "path": str(path)}}


def open_split(dataset: str, split: str, streaming: bool = False):
    """The column `image`, not decoded, of one split of a `datasets` folder or Hub id; None if there is no such split."""
    try:
        import datasets  # here, since a folder of pictures does without
    except ImportError as error:
        raise SystemExit(f"{dataset} is read with `datasets`: python -m pip install -e '.[train]'") from error

    # Parquet files are opened split by split: the columns beside `image` may differ between them.
    shards = sorted(str(p) for p in Path(dataset).rglob(f"{split}*.parquet"))
    source = {"path": "parquet", "data_files": shards} if shards else {"path": str(dataset)}
    try:
        rows = datasets.load_dataset(**source, streaming=streaming).get("train" if shards else split)
    except (OSError, ValueError) as error:  # not there, no network, of no known kind
        reason = str(error).splitlines()[0]
        raise SystemExit(f"{dataset} is no folder or list of pictures, nor a data set that can be read: {reason}") from error
    return rows and rows.select_columns("image").cast_column("image", datasets.Image(decode=False))


def decode(image: dict) -> np.ndarray | None:
    """The picture of a row as (H, W, 3) uint8 RGB, turned upright; None if it is missing or damaged."""
    try:
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    except (OSError, cv2.error):
        return None


def _crop(rgb: np.ndarray, size: int, rng: random.Random | None) -> torch.Tensor:
    """A square of the picture as (size, size, 3): the largest in the middle or, with `rng`, any, and flipped by chance.

    The short side of the picture is then 1 to 1.4 times that of the square.
    """
    h, w = rgb.shape[:2]
    side = max(1, round(min(h, w) / (rng.uniform(1, 1.4) if rng else 1)))
    top, left = (rng.randint(0, h - side), rng.randint(0, w - side)) if rng else ((h - side) // 2, (w - side) // 2)
    rgb = rgb[top : top + side, left : left + side]
    rgb = cv2.resize(rgb, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
    if rng and rng.random() < 0.5:
        rgb = rgb[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(rgb))


def _name(damaged: Path | None, name: str) -> None:
    """A line in the file `damaged`, which many workers share, unless the name stands there."""
    if damaged is None:
        return
    name = name.replace("\n", " ")
    with open(damaged, "a+", encoding="utf-8") as file:
        file.seek(0)
        if name not in file.read().splitlines():
            file.write(name + "\n")


class Photos(Dataset):
    """Square (size, size, 3) uint8 RGB crops of the pictures in `rows`, as `open_dataset` gives them.

    For training (`augment`) the index is a position in the endless stream: each epoch has every picture once, in an order of
    its own, cropped and flipped by chance. Otherwise it is the picture's place in `rows`, and its middle is taken.

    The next picture takes the place of a damaged one, whose name becomes a line of the file `damaged`.
    """

    def __init__(self, rows: Sequence, size: int, augment: bool = False, seed: int = 0, damaged: Path | None = None):
        self.rows, self.size, self.augment, self.seed, self.damaged = rows, size, augment, seed, damaged
        self.epoch, self.order = -1, None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> torch.Tensor:
        """Raises ValueError when there is not one picture that can be decoded."""
        index = self._shuffled(*divmod(position, len(self))) if self.augment else position
        rng = random.Random(f"{self.seed} {position}") if self.augment else None
        for _ in range(len(self)):
            image = self.rows[index]["image"]
            rgb = decode(image)
            if rgb is not None:
                return _crop(rgb, self.size, rng)
            _name(self.damaged, image["path"] or f"picture {index}")
            index = (index + 1) % len(self)
        raise ValueError("not one picture of the data set can be decoded")

    def _shuffled(self, epoch: int, place: int) -> int:
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {epoch}").getrandbits(63))
            self.epoch, self.order = epoch, torch.randperm(len(self), generator=generator)
        return int(self.order[place])


class PhotoStream(IterableDataset):
    """An endless stream of the crops of `rows`, an `IterableDataset` of `datasets`, for process `rank` of `world`.

    Each worker of each process reads files of its own or, where there are too few, all of them, and decodes its share. They
    pass through the data each at its own pace, in a new order each time: of rows within reach of each other, and of files.
    So it takes the same number of workers to get the same crops. `start` is how many crops this process has had, whole batches
    of them: a resumed run reads their pictures again, but does not decode them.

    The next picture takes the place of a damaged one, whose name becomes a line of the file `damaged`.
    """

    def __init__(self, rows, size: int, seed=0, start=0, rank=0, world=1, damaged: Path | None = None):
        self.rows, self.size, self.seed, self.start = rows, size, seed, start
        self.rank, self.world, self.damaged = rank, world, damaged
        self.batch_size = 1  # `loader` knows it

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Raises ValueError when there is not one picture that can be decoded."""
        from datasets.distributed import split_dataset_by_node

        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # Workers are asked for a batch in turn. On a resume worker 0 is first again, and goes on for the one whose turn it was.
        done = self.start // self.batch_size
        part = (done + worker) % workers
        seen = len(range(part, done, workers)) * self.batch_size
        node, nodes = self.rank * workers + part, self.world * workers

        strategy = "shards" if self.rows.num_shards >= nodes else "examples"
        rows = split_dataset_by_node(self.rows, node, nodes, strategy=strategy)
        # More input shards at once make `datasets` wait for seconds at the end of a pass.
        rows = rows.shuffle(seed=self.seed, buffer_size=SHUFFLED, max_buffer_input_shards=1)
        position, owed = 0, []
        for epoch in itertools.count():
            first = position
            rows.set_epoch(epoch)
            for image in itertools.chain.from_iterable(batch["image"] for batch in rows.iter(8)):  # knows nothing of workers
                position += 1
                if position <= seen:
                    continue
                owed.append(position)
                rgb = decode(image)
                if rgb is None:
                    _name(self.damaged, image["path"] or f"row {position} of part {node + 1} of {nodes}")
                    continue
                for place in owed:
                    yield _crop(rgb, self.size, random.Random(f"{self.seed} {node} {place}"))
                owed = []
            if len(owed) >= 10 * (position - first):  # a small part may have but damaged pictures once, by chance
                raise ValueError("not one picture of the data set can be decoded")


class _Endless(Sampler):
    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _start_worker(worker: int, ending) -> None:
    cv2.setNumThreads(1)  # a spawned one does not inherit it
    # All of a process group get the signals that stop a run, but the program wants its batch yet: a worker goes at its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.is_set() else None)


def loader(photos: Photos | PhotoStream, batch_size: int, workers: int, start: int = 0) -> DataLoader:
    """Batches (B, size, size, 3) of uint8 RGB: for training endless and even, otherwise in order and complete.

    Of `Photos` it gives the batches of all processes, which `accelerator.prepare` deals out; of a `PhotoStream` those of its
    process, and is not to be prepared. `start` is the batch of `Photos` to begin with, counted over all processes.
    """
    if workers:
        cv2.setNumThreads(1)  # the workers are the parallelism; and a forked one would wait for ever for threads left behind
    how = {}
    if isinstance(photos, PhotoStream):
        photos.batch_size = batch_size
    elif photos.augment:
        how = {"sampler": _Endless(start * batch_size), "drop_last": True}
    ending = torch.multiprocessing.get_context("spawn").Event()  # forked workers can use it too
    atexit.register(ending.set)  # before multiprocessing, at its own exit, ends the workers with a signal
    return DataLoader(
        photos,
        batch_size=batch_size,
        num_workers=workers,
        worker_init_fn=partial(_start_worker, ending=ending),
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or each pass would draw from the global one, which a resumed run restores
        **how,
    )


def to_network(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, W, 3) uint8 RGB -> lightness (B, 1, H, W) and ab (B, 2, H, W), both in [-1, 1], on the batch's device."""
    return lab_to_network(rgb_to_lab(batch.permute(0, 3, 1, 2) / 255))


def varied(batch: torch.Tensor, mosaics: float) -> torch.Tensor:
    """(B, H, W, 3) uint8 RGB with more variety than a crop has.

    Each is turned by up to 15 degrees, enlarged or reduced by up to a quarter and stretched; beyond its edges it is mirrored.
    Then so large a share of them gives way to mosaics of four at half the size, of which no corner has a fixed place.
    """
    count, (height, width) = len(batch), batch.shape[1:3]

    def draw(most: float) -> torch.Tensor:
        return torch.empty(count, device=batch.device).uniform_(-most, most)

    angle, zoom, aspect = draw(math.pi / 12), draw(0.25).exp(), draw(0.15).exp()
    across, down = zoom * aspect, zoom / aspect
    rows = (across * angle.cos(), -down * angle.sin(), (1 - across) * draw(1))
    rows += (across * angle.sin(), down * angle.cos(), (1 - down) * draw(1))
    grid = affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), [count, 3, height, width], align_corners=False)
    rgb = grid_sample(batch.permute(0, 3, 1, 2).float(), grid, padding_mode="reflection", align_corners=False)
    half = avg_pool2d(rgb, 2, ceil_mode=True)
    top, bottom = (torch.cat([half[torch.randperm(count)] for _ in range(2)], dim=3) for _ in range(2))
    shift = (int(torch.randint(height, ())), int(torch.randint(width, ())))
    mosaic = torch.cat((top, bottom), dim=2)[..., :height, :width].roll(shift, dims=(2, 3))
    chosen = torch.rand(count, 1, 1, 1, device=batch.device) < mosaics
    return torch.where(chosen, mosaic, rgb).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def old_print(batch: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 RGB -> lightness (B, 1, H, W) in [-1, 1], each as an old photograph of the same scene has it.

    Plates before about 1920 hardly saw red and saw blue best: skies are blank in them, lips and brick dark. Then the print
    faded towards gray, and the scan has grain.
    """
    rgb = batch.permute(0, 3, 1, 2) / 255

    def draw(least: float, most: float) -> torch.Tensor:
        return torch.empty(len(rgb), 1, 1, 1, device=rgb.device).uniform_(least, most)

    red, green, blue = draw(0, 0.3), draw(0.2, 0.7), draw(0.1, 0.6)
    gray = (rgb * torch.cat((red, green, blue), dim=1)).sum(1, keepdim=True) / (red + green + blue)
    lightness = gray_to_lightness(gray) / (2 * LIGHTNESS_SCALE)
    black, white = draw(0, 0.35), draw(0.65, 1)
    lightness = black + (white - black) * lightness ** draw(-0.4, 0.4).exp()
    lightness = lightness + draw(0, 0.05) * torch.randn_like(lightness)
    return lightness.clamp(0, 1) * 2 - 1


def seen_as(batch: torch.Tensor, lightness: torch.Tensor, old_prints: float) -> torch.Tensor:
    """The pictures' own lightness (B, 1, H, W) but, by chance, that of an `old_print` in so large a share of them."""
    if not old_prints:
        return lightness
    aged = torch.rand(len(batch), 1, 1, 1, device=batch.device) < old_prints
    return torch.where(aged, old_print(batch), lightness)
