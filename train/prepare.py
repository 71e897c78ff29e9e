"""Make a data set fit for training: pictures of one size, in colour, each there once.

    accelerate launch train/prepare.py PHOTOS OUT   # a folder or a zip of pictures, a `datasets` folder or a Hub id

OUT becomes a folder of JPEGs named as the pictures are or, with --parquet, a `datasets` folder, as the Hub reads it. Not in it
are pictures that are damaged or too small, gray or tinted gray (sepia, say), and copies of earlier ones, whatever their size or
quality: dropped.csv says which and why. PHOTOS stays as it is. After a stop the same command goes on. Several processes share
the work out and write the same files, byte for byte; OUT is then on a disk that all of them see.
"""

import argparse
import csv
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

import cv2
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator

from colorize.atomic import atomic
from data import decode
from survey import Pictures, accelerate, chunks, gather, keep_apart, look, originals, parallel

REASONS = ("damaged", "too small", "gray", "tinted", "duplicate")
JPEG = (cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
SHARD, ROWS = 1000, 100  # pictures of a parquet file, and how many of them are in memory at once


def flags() -> argparse.ArgumentParser:
    f = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    f.add_argument("dataset", metavar="DATASET", help="a folder or a zip of pictures, a `datasets` folder or a Hub id")
    f.add_argument("output", metavar="OUT", type=Path, help="a new folder, or that of a run to go on with")
    f.add_argument("--size", type=int, default=512, help="side of the square cut from the middle, pixels (default: 512)")
    f.add_argument("--resize", action="store_true", help="scale the short side to --size instead, and cut nothing off")
    f.add_argument("--parquet", action="store_true", help="write parquet files, not pictures")
    f.add_argument("--dry-run", action="store_true", help="only count what would be kept")
    return f


def main() -> None:
    args = flags().parse_args()
    keep_apart(args.dataset, args.output)
    accelerator = accelerate()
    pictures = Pictures(args.dataset)
    settings = {
        "size": args.size, "resize": args.resize, "parquet": args.parquet,
        "pictures": len(pictures), "names": digest(pictures),
    }  # fmt: skip
    finished = None if args.dry_run else finished_before(args.output, settings)
    accelerator.wait_for_everyone()
    if finished is None:
        finished = prepare(args, accelerator, pictures, settings)
    if accelerator.is_main_process:
        counts = {"pictures": finished["pictures"], **finished["dropped"], "kept": finished["kept"]}
        print("\n".join(f"{count:>12,} {name}" for name, count in counts.items()))
    accelerator.end_training()


def prepare(args: argparse.Namespace, accelerator: Accelerator, pictures: Pictures, settings: dict) -> dict:
    """-> `settings` with the counts "kept" and "dropped", which is what prepared.json has in the end."""
    unfinished = args.output / ".unfinished"  # what was found so far, and files that are being written
    if accelerator.is_main_process and not args.dry_run:
        unfinished.mkdir(parents=True, exist_ok=True)
        write_json(args.output / "prepared.json", settings)
    accelerator.wait_for_everyone()

    job = partial(judge, pictures, None if args.dry_run else unfinished)
    found = gather(list(parallel(job, chunks(range(len(pictures))), accelerator, "judging")))
    reasons, original = decide(found, args.size)
    kept = np.flatnonzero(reasons == "")
    counts = {"kept": len(kept), "dropped": {reason: int((reasons == reason).sum()) for reason in REASONS}}
    if args.dry_run:
        return settings | counts

    names = result_names(pictures, kept)
    if args.parquet:
        shards = share_out(names)
        files = {int(places[0]): name for name, places in shards.items()}
        job, work = partial(write_shards, args, pictures, kept, names, files), list(shards.values())
    else:
        job, work = partial(write_pictures, args, pictures, kept, names), chunks(range(len(kept)))
    for _ in parallel(job, work, accelerator, "writing"):
        pass
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        csv_as = {"newline": "", "encoding": "utf-8", "errors": "replace"}
        with atomic(args.output / "dropped.csv") as path, open(path, "w", **csv_as) as file:
            lines = csv.writer(file)
            lines.writerow(["picture", "reason", "of"])
            for n in np.flatnonzero(reasons != ""):
                lines.writerow([pictures.name(n), reasons[n], pictures.name(original[n]) if reasons[n] == "duplicate" else ""])
        write_json(args.output / "prepared.json", settings | counts)
        shutil.rmtree(unfinished)
    return settings | counts


def finished_before(output: Path, settings: dict) -> dict | None:
    """prepared.json of a run with these settings that came to its end.

    Raises:
        SystemExit: something else is in the folder.
    """
    file = output / "prepared.json"
    before = json.loads(file.read_text()) if file.is_file() else {}
    if output.exists() and any(output.iterdir()) and any(before.get(key) != value for key, value in settings.items()):
        raise SystemExit(f"{output} is not empty, and not of a run with these pictures and flags: name another folder")
    return before if "kept" in before else None


def digest(pictures: Pictures) -> str:
    """Of their names: it tells whether a folder still has the same ones."""
    sha = hashlib.sha256()
    for numbers in chunks(range(len(pictures)), 10_000):
        sha.update(b"".join(os.fsencode(pictures.name(n)) + b"\n" for n in numbers))
    return sha.hexdigest()


def write_json(path: Path, content: dict) -> None:
    with atomic(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n")


# What is kept


def judge(pictures: Pictures, unfinished: Path | None, share: Sequence[Sequence[int]]) -> Iterator[tuple]:
    """What was found in each chunk, now or before a stop."""
    for numbers in share:
        file = unfinished and unfinished / f"{numbers[0]:09}.npy"
        if file and file.is_file():
            found = np.load(file)
        else:
            found = look(pictures, numbers)
            if file:
                with atomic(file) as part:
                    np.save(part, found)
        yield len(numbers), found


def decide(found: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) of `survey.FOUND` -> (N,) why each is dropped, "" if it is kept, and (N,) the number of the one that it repeats."""
    short = np.minimum(found["height"], found["width"])
    reasons = np.select([short == 0, short < size, found["gray"], found["tinted"]], REASONS[:4], "")
    original, left = found["number"].copy(), reasons == ""
    original[left] = originals(found[left])
    reasons[original != found["number"]] = "duplicate"
    return reasons, original


def result_names(pictures: Pictures, kept: np.ndarray) -> pa.Array:
    """Where each result goes in OUT: its own name and folder, and its number where two would be the same file."""
    taken, names = set(), []
    for n in kept:
        # A name may be anything: not UTF-8 on a disk, "../../photo.jpg" in a zip or parquet file.
        readable = pictures.name(n).encode(errors="replace").decode()
        parts = [part for part in PurePosixPath(readable).parts if part not in ("/", "..")]
        name = str(PurePosixPath(*parts).with_suffix(""))
        while name.lower() in taken:
            name += f"-{n}"
        taken.add(name.lower())
        names.append(name + ".jpg")
    return pa.array(names, pa.large_string())


def share_out(names: pa.Array) -> dict[str, np.ndarray]:
    """-> parquet files by their names, as `datasets` and the Hub expect them, with the places in `names` of their pictures."""
    held_out = np.array([name.as_py().startswith("validation/") for name in names], bool)
    shards = {}
    for split, places in (("train", np.flatnonzero(~held_out)), ("validation", np.flatnonzero(held_out))):
        parts = chunks(places, SHARD)
        shards |= {f"data/{split}-{i:05}-of-{len(parts):05}.parquet": part for i, part in enumerate(parts)}
    return shards


# Writing


def fit(image: dict, args: argparse.Namespace) -> bytes:
    """A picture's file -> the JPEG of its middle, or of all of it, scaled."""
    rgb = decode(image)  # (H, W, 3)
    if rgb is None:
        raise OSError(f"{image['path'] or 'a picture'} can no longer be read: is the disk still there?")
    size, (height, width) = args.size, rgb.shape[:2]
    if args.resize:
        scale = size / min(height, width)
        rgb = cv2.resize(rgb, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    else:
        top, left = height // 2 - size // 2, width // 2 - size // 2
        rgb = rgb[top : top + size, left : left + size]
    return cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), JPEG)[1].tobytes()


def write_pictures(args, pictures: Pictures, kept: np.ndarray, names: pa.Array, share: Sequence[range]) -> Iterator[tuple]:
    for places in share:
        files = {i: args.output / names[i].as_py() for i in places}
        left = [i for i, file in files.items() if not file.is_file() or not file.stat().st_size]  # as a power cut leaves it
        for i, image in zip(left, pictures.read(kept[left]), strict=True):
            files[i].parent.mkdir(parents=True, exist_ok=True)
            part = args.output / ".unfinished" / uuid.uuid4().hex
            part.write_bytes(fit(image, args))
            os.replace(part, files[i])  # not `atomic`, which waits for the disk each time and takes twice as long
        yield len(places), None


def write_shards(args, pictures: Pictures, kept, names: pa.Array, files: dict, share: Sequence[np.ndarray]) -> Iterator[tuple]:
    """`files` has the name of a shard by the place of its first picture."""
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    for places in share:
        file = args.output / files[places[0]]
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            part = args.output / ".unfinished" / uuid.uuid4().hex
            with pq.ParquetWriter(part, schema) as writer:
                for batch in chunks(places, ROWS):
                    images = [fit(image, args) for image in pictures.read(kept[batch])]
                    rows = [{"image": {"bytes": x, "path": names[int(i)].as_py()}} for i, x in zip(batch, images, strict=True)]
                    writer.write_table(pa.Table.from_pylist(rows, schema))
            os.replace(part, file)
        yield len(places), None


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on") from None
