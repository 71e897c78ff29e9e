"""Every picture of a data set, looked at once, on all cores and machines. What explore.py and prepare.py share."""

import itertools
import os
import signal
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path, PurePath

import cv2
import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from colorize.color import rgb_to_lab
from colorize.metrics import colourfulness
from colorize.picture import SUFFIXES
from data import decode, open_split

CHUNK = 64  # pictures that a worker takes on at once
SAMPLE = 32  # pixels a side: the thousand samples that the report judged a picture by, only always the same ones
TINTED = 5.0  # units of Lab; of 28,588 photographs in colour 1 in 250 has less, most of them of fog and ice
NEAR = 4  # bits of 64: 19 in 20 copies at half the size or at JPEG quality 50 differ in no more

# What is found out about a picture; `height` is 0 if it is damaged. Colourfulness is that of its samples.
FOUND = np.dtype(
    [
        ("number", np.int64), ("height", np.int32), ("width", np.int32), ("colourfulness", np.float32),
        ("gray", np.bool_), ("tinted", np.bool_), ("fingerprint", np.uint64),
    ]
)  # fmt: skip


class Pictures:
    """All pictures of a data set, by number, those of the split `validation` after the others.

    Of a picture only its name stays in memory, in `names`. It begins with `train/` or `validation/` where there are both.
    """

    def __init__(self, dataset: str):
        """Args:
            dataset: a folder or a zip of pictures, a `datasets` folder (parquet), or a Hub id.

        Raises:
            SystemExit: it cannot be read, or holds no pictures.
        """
        path = Path(dataset)
        self.folder, self.zip, self.archive, self.splits = None, None, None, []
        if path.suffix == ".zip":
            self.zip, names = path, _zipped(path)
        elif path.is_dir() and not any(path.rglob("*.parquet")):
            self.folder, names = path, _files(path)
        else:
            opened = {split + "/": open_split(dataset, split) for split in ("train", "validation")}
            self.splits, both = [rows for rows in opened.values() if rows], all(opened.values())
            names = _named({prefix if both else "": rows for prefix, rows in opened.items() if rows})
        # A tenth of what a list takes, and forked workers share it. Bytes, as names may be in any old encoding.
        self.names = pa.array(map(os.fsencode, names), pa.large_binary())
        if not len(self.names):
            raise SystemExit(f"{dataset} holds no pictures")

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> str:
        return os.fsdecode(self.names[int(number)].as_py())

    def read(self, numbers: Sequence[int]) -> list[dict]:
        """-> `{"bytes": ..., "path": ...}` of each, for `decode`."""
        if self.folder:
            return [{"bytes": None, "path": self.folder / self.name(i)} for i in numbers]
        if self.zip:
            return [{"bytes": self._unzip(self.name(i)), "path": None} for i in numbers]
        images, start = [], 0
        for rows in self.splits:  # numbers ascend, so that those of a split are together
            images += rows[[int(i) - start for i in numbers if 0 <= i - start < len(rows)]]["image"]
            start += len(rows)
        return [image if image and any(image.values()) else {"bytes": b"", "path": None} for image in images]

    def _unzip(self, name: str) -> bytes:
        """b"" if it is damaged, or in a way that Python cannot unpack."""
        self.archive = self.archive or zipfile.ZipFile(self.zip)  # here: workers must not share a place in the file
        try:
            return self.archive.read(name)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
            return b""


def _is_picture(name: str) -> bool:
    path = PurePath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")  # as macOS names what it adds


def _files(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders.sort()
        here = Path(place).relative_to(folder)
        yield from ((here / name).as_posix() for name in sorted(files) if _is_picture(name))


def _zipped(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return sorted(filter(_is_picture, archive.namelist()))
    except (OSError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path} cannot be read: {error}") from error


def _named(splits: dict) -> Iterator[str]:
    for prefix, rows in splits.items():
        paths = (path for chunk in rows.data.column("image").chunks for path in chunk.field("path").to_pylist())
        yield from (prefix + (path or f"{number:08}") for number, path in enumerate(paths))


def parallel(job: Callable, chunks: Sequence[Sequence[int]], accelerator: Accelerator, title: str) -> Iterator:
    """What the generator `job(chunks)` yields, on all cores: each worker of each process has a share of the chunks.

    `job` yields pairs, how many pictures are done and a result; the results come in no order.
    """
    mine = chunks[accelerator.process_index :: accelerator.num_processes]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)  # processes on this machine
    cv2.setNumThreads(1)  # the workers are the parallelism; and a forked one would wait for ever for threads left behind
    loader = DataLoader(
        _Shares(job, mine), batch_size=None, num_workers=min(workers, len(mine)), collate_fn=_as_it_is, in_order=False
    )
    total, scale = sum(map(len, chunks)), accelerator.num_processes  # the bar shows the pace of all
    with tqdm(total=total, desc=title, unit=" pictures", smoothing=0.1, disable=not accelerator.is_main_process) as bar:
        for done, result in loader:
            bar.update(min(done * scale, total - bar.n))
            yield result
        bar.update(total - bar.n)


class _Shares(IterableDataset):
    def __init__(self, job: Callable, chunks: Sequence[Sequence[int]]):
        self.job, self.chunks = job, chunks

    def __iter__(self) -> Iterator:
        worker = get_worker_info()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
        cv2.setNumThreads(1)  # a spawned one does not inherit it
        return self.job(self.chunks[worker.id :: worker.num_workers]) if worker else iter(())  # no worker, no chunks


def _as_it_is(result):
    return result


def chunks(numbers: Sequence[int], size: int = CHUNK) -> list[Sequence[int]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def accelerate() -> Accelerator:
    """A process may be done hours before the others, and waits."""
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=4))])


def keep_apart(dataset: str, output: Path) -> None:
    """Raises SystemExit if results would land between the pictures: nothing is ever changed there."""
    if output.resolve().is_relative_to(Path(dataset).resolve()):
        raise SystemExit(f"{output} is in {dataset}, where nothing is to be changed: name another folder")


# Judging


def look(pictures: Pictures, numbers: Sequence[int], each: Callable[[np.ndarray], None] = lambda rgb: None) -> np.ndarray:
    """-> (N,) of `FOUND`. `each` gets every picture that can be decoded, (H, W, 3) uint8 RGB, turned upright."""
    found = np.zeros(len(numbers), FOUND)
    found["number"] = numbers
    samples = np.zeros((len(numbers), SAMPLE, SAMPLE, 3), np.uint8)
    for row, sample, image in zip(found, samples, pictures.read(numbers), strict=True):
        rgb = decode(image)
        if rgb is not None:
            row["height"], row["width"] = rgb.shape[:2]
            # A sample is the mean of 16 pixels: the mean of all would take a third of the time that decoding does.
            twice = cv2.resize(rgb, (2 * SAMPLE, 2 * SAMPLE), interpolation=cv2.INTER_LINEAR)
            cv2.resize(twice, (SAMPLE, SAMPLE), dst=sample, interpolation=cv2.INTER_AREA)
            each(rgb)
    found["gray"] = (samples == samples[..., :1]).all((1, 2, 3))  # as in the report, where R, G and B differ by less than 0.1
    found["fingerprint"] = [fingerprint(sample) for sample in samples]
    rgb = torch.from_numpy(samples).permute(0, 3, 1, 2) / 255
    found["colourfulness"] = colourfulness(rgb)
    found["tinted"] = (tint(rgb) < TINTED) & ~found["gray"]
    return found


def tint(rgb: torch.Tensor) -> np.ndarray:
    """(B, 3, H, W) sRGB in [0, 1] -> (B,) how far, in units of Lab, its colours are from those of a tinted gray picture.

    In sepia, a cyanotype or a yellowed print the lightness of a pixel says which colour it has: a* and b* lie on a curve over
    L*, here the parabola that fits best. 99 of 100 pixels are no farther from it than what is returned.
    """
    lab = rgb_to_lab(rgb).flatten(2).double()  # (B, 3, H * W)
    lightness, ab = lab[:, :1] / 100, lab[:, 1:]
    powers = torch.cat((lightness**0, lightness, lightness**2), dim=1)  # (B, 3, H * W)
    # Least squares by the normal equations; `pinv`, as there is no inverse where all lightness is the same.
    curve = ab @ powers.mT @ torch.linalg.pinv(powers @ powers.mT, hermitian=True)  # (B, 2, 3)
    distance = (ab - curve @ powers).square().sum(1).sqrt()  # (B, H * W)
    return np.quantile(distance.numpy(), 0.99, axis=1)


def fingerprint(sample: np.ndarray) -> np.uint64:
    """(32, 32, 3) uint8 RGB -> 64 bits, most of which stay in a copy of another size or quality.

    The perceptual hash of Zauner (2010): which of the 8 x 8 lowest frequencies of the cosine transform are above their median.
    """
    frequencies = cv2.dct(cv2.cvtColor(sample, cv2.COLOR_RGB2GRAY).astype(np.float32))[:8, :8].ravel()
    return np.packbits(frequencies > np.median(frequencies)).view(np.uint64)[0]


def originals(found: np.ndarray) -> np.ndarray:
    """(N,) of `FOUND` -> (N,) the number of the earlier picture that each repeats, or its own.

    Pictures are alike if their fingerprints differ in at most `NEAR` bits. Then at least one of five groups of bits is equal:
    only pictures equal in a group are compared. An original is not itself the copy of another.
    """
    unique, first, inverse = np.unique(found["fingerprint"], return_index=True, return_inverse=True)
    alike = {}  # places in `unique`: of a later one, those of the earlier ones
    for shift in range(0, 64, 13):
        group = unique >> np.uint64(shift) & np.uint64(2**13 - 1)
        order = np.argsort(group)
        group, places = group[order], np.arange(len(order))
        for step in itertools.count(1):
            places = places[places + step < len(order)]
            places = places[group[places] == group[places + step]]
            if not len(places):
                break
            a, b = order[places], order[places + step]
            near = np.bitwise_count(unique[a] ^ unique[b]) <= NEAR
            for pair in zip(a[near], b[near], strict=True):
                earlier, later = sorted(pair, key=first.__getitem__)
                alike.setdefault(later, set()).add(earlier)
    original = np.arange(len(unique))
    for later in sorted(alike, key=first.__getitem__):
        original[later] = min((x for x in alike[later] if original[x] == x), key=first.__getitem__, default=later)
    return found["number"][first[original[inverse]]]


def gather(found: list[np.ndarray]) -> np.ndarray:
    """Arrays of `FOUND`, on each process its own -> (N,), all of them in the order of the pictures, on each process."""
    found = np.concatenate(gather_object([np.concatenate([np.zeros(0, FOUND), *found])]))
    return found[np.argsort(found["number"])]
