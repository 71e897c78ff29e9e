"""Photographs for training: from a folder of pictures, or from a `datasets` folder or Hub id, to batches of uint8 RGB."""

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from colorize.color import lab_to_network, rgb_to_lab
from colorize.picture import SUFFIXES

log = logging.getLogger(__name__)


def open_dataset(dataset: str) -> tuple[Sequence, Sequence]:
    """A folder of pictures, a `datasets` folder (parquet) or a Hub id -> (training rows, validation rows).

    A row is `{"image": {"bytes": ..., "path": ...}}`, not yet decoded. The splits are named `train` and `validation`; without
    them, every twentieth picture is held out for validation.
    """
    folder = Path(dataset)
    if folder.is_dir() and not any(folder.rglob("*.parquet")):
        splits = [folder / "train", folder / "validation"]
        train, validation = map(_pictures, splits) if all(map(Path.is_dir, splits)) else (_pictures(folder), None)
    else:
        train, validation = _split(dataset, "train"), _split(dataset, "validation")
    if not train:
        raise SystemExit(
            f"{dataset} holds no pictures to train on: name a folder of pictures, or a data set with a split `train`"
        )
    if validation is None:
        held_out = range(0, len(train), 20)
        kept = [i for i in range(len(train)) if i % 20]
        train, validation = Subset(train, kept), Subset(train, held_out)
    return train, validation


def _pictures(folder: Path) -> list[dict]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    return [{"image": {"bytes": None, "path": str(p)}} for p in files]


def _split(dataset: str, split: str) -> Sequence | None:
    try:
        import datasets  # here, since a folder of pictures does without
    except ImportError as error:
        raise SystemExit(f"{dataset} is read with `datasets`: python -m pip install -e '.[train]'") from error

    # Parquet files are opened split by split: the columns beside `image` may differ between them.
    shards = sorted(str(p) for p in Path(dataset).rglob(f"{split}*.parquet"))
    rows = datasets.load_dataset("parquet", data_files=shards) if shards else datasets.load_dataset(str(dataset))
    rows = rows.get("train" if shards else split)
    return rows and rows.select_columns("image").cast_column("image", datasets.Image(decode=False))


class Photos(Dataset):
    """Square (size, size, 3) uint8 RGB crops of the pictures in `rows`, as `open_dataset` gives them.

    For training (`augment`) the short side becomes `size` to 1.4 * `size`, then a random crop is taken and flipped by chance;
    otherwise the short side becomes `size` and the centre is taken. A damaged picture is named in the log, and the next one
    takes its place.
    """

    def __init__(self, rows: Sequence, size: int, augment: bool):
        self.rows, self.size, self.augment = rows, size, augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        for _ in range(len(self)):
            image = self.rows[index]["image"]
            data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
            rgb = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
            if rgb is not None:
                return torch.from_numpy(self._crop(rgb))
            log.warning("skipped %s: it cannot be decoded", image["path"] or f"picture {index}")
            index = (index + 1) % len(self)
        raise ValueError("not one picture of the data set can be decoded")

    def _crop(self, rgb: np.ndarray) -> np.ndarray:
        h, w = rgb.shape[:2]
        scale = self.size / min(h, w) * (random.uniform(1, 1.4) if self.augment else 1)
        h, w = max(round(h * scale), self.size), max(round(w * scale), self.size)
        rgb = cv2.resize(rgb, (w, h), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
        top, left = (h - self.size) // 2, (w - self.size) // 2
        if self.augment:
            top, left = random.randint(0, h - self.size), random.randint(0, w - self.size)
        rgb = rgb[top : top + self.size, left : left + self.size]
        if self.augment and random.random() < 0.5:
            rgb = rgb[:, ::-1]
        return np.ascontiguousarray(rgb)


def _start_worker(index: int) -> None:
    cv2.setNumThreads(1)  # the workers are the parallelism
    random.seed(torch.initial_seed())


def loader(photos: Photos, batch_size: int, workers: int) -> DataLoader:
    """Batches (B, size, size, 3) of uint8 RGB: shuffled and even for training, in order and complete otherwise."""
    return DataLoader(
        photos,
        batch_size=batch_size,
        shuffle=photos.augment,
        drop_last=photos.augment,
        num_workers=workers,
        worker_init_fn=_start_worker,
        persistent_workers=workers > 0,
    )


def to_network(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, H, W, 3) uint8 RGB -> lightness (B, 1, H, W) and ab (B, 2, H, W), both in [-1, 1], on the batch's device."""
    return lab_to_network(rgb_to_lab(batch.permute(0, 3, 1, 2) / 255))
