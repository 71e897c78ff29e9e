"""The `colorize` command: files and folders in, coloured files out."""

import argparse
import os
import signal
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path

import torch
from tqdm import tqdm

from . import film, hub
from .archive import colorize_files
from .colorizer import Colorizer
from .encode import WRITERS
from .memory import keep_memory
from .picture import SUFFIXES, PictureError

SCREEN = 20  # failures shown on the terminal

EPILOG = """\
examples:
  colorize grandmother.jpg                      writes grandmother-color.jpg beside it
  colorize grandmother.jpg -o colour.png        that file
  colorize scans/ letters/photo.tif -o colour/  a folder, in which the tree of scans/ is kept
  colorize scans/ -o colour/ --model user/name  with a checkpoint from the Hugging Face Hub
  colorize reel.mp4 -o colour.mp4 --resume      a film; goes on if it was interrupted
  accelerate launch -m colorize scans/ -o colour/  on several GPUs or machines, each its share

Results keep the format of the picture if it is JPEG, PNG, TIFF or WebP, and are PNG otherwise; those of films that are
not MP4, MOV or Matroska are Matroska. Those that exist are skipped without --force: after a stop, the same command goes on.
What failed, and why, is in failed.txt in the folder of the results. Started by `accelerate launch` or torchrun, each
process reports on its own share, and ends with 0 though pictures failed: with another code the launcher would stop the rest.
Exit code: 0 if all went well, 1 if some pictures failed, 2 for wrong usage or a model that cannot be used, 130 after Ctrl-C.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code; wrong flags end in argparse's `SystemExit(2)`."""
    keep_memory()
    parser = argument_parser()
    args = parser.parse_intermixed_args(argv)  # flags between the pictures, too
    if not args.list and not args.inputs:
        parser.error("name a picture or a folder, or --list")
    try:
        return show_checkpoints() if args.list else colorize_all(args)
    except KeyboardInterrupt:
        return _say("interrupted", code=130)
    except ValueError as error:  # a flag or a checkpoint; what is wrong with a picture stops no other picture
        return _say(error, code=2)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="colorize",
        description="Colour black-and-white photographs.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="*", type=Path, metavar="PICTURE", help="files, and folders to search for them")
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help="a file, for one picture or film, or a folder")
    parser.add_argument("--force", action="store_true", help="colour again what has a result already")

    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help="a checkpoint: its name in --list, its folder or its id on the Hub")
    model.add_argument("--revision", metavar="NAME", help="one of its snapshots, such as epoch-003")
    model.add_argument("--device", help="cpu, cuda, mps... (default: the GPU where there is one)")
    model.add_argument("--list", action="store_true", help="show the checkpoints at hand with their snapshots, and stop")

    look = parser.add_argument_group("look")
    look.add_argument("--size", type=int, metavar="PIXELS", help="what the model sees of the short side (default: its own)")
    look.add_argument("--saturation", type=float, default=1.0, metavar="X", help="times the chroma (default: 1; 0 is gray)")

    films = parser.add_argument_group("films")
    films.add_argument("--steady", type=float, default=0.5, metavar="X", help="0: each frame by itself, to 1 (default: 0.5)")
    films.add_argument("--resume", action="store_true", help="go on where an interrupted film stopped")
    return parser


def show_checkpoints() -> int:
    for name, folder in hub.checkpoints().items():
        print(name, *hub.snapshots(folder), sep="\n    ")
    return 0


def colorize_all(args: argparse.Namespace) -> int:
    """Colour what `args` names, or this process's share of it; 0, or 1 if a picture failed."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    jobs, failures = plan(args.inputs, args.output)
    if processes > 1:  # by name alone: each must come to the same shares, whatever there is when it looks
        jobs = [job for job in jobs if zlib.crc32(os.fsencode(job[1])) % processes == rank]
        failures = failures if rank == 0 else []
    todo = [job for job in jobs if args.force or not job[1].exists()]
    colorizer = load(args) if todo else None
    if todo:
        film.check_settings(args.size or colorizer.image_size, args.saturation, args.steady)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a launcher's or a cluster's Ctrl-C
    coloured = 0
    try:
        with closing(colorize_each(todo, colorizer, args)) as outcomes:
            hidden = True if int(os.environ.get("LOCAL_RANK", 0)) else None  # None: no bar where nobody looks
            for _, reason in (bar := tqdm(outcomes, total=len(todo), unit="picture", smoothing=0.1, disable=hidden)):
                if reason is None:
                    coloured += 1
                else:
                    failures.append(reason)
                    bar.set_postfix(failed=len(failures))
    finally:
        show(failures, list_failures(failures, args.output, rank, processes))
        share = f"process {rank} of {processes}: " if processes > 1 else ""
        print(f"{share}{coloured} coloured, {len(jobs) - len(todo)} skipped, {len(failures)} failed", flush=True)
    return 1 if failures and processes == 1 else 0


def colorize_each(
    jobs: list[tuple[Path, Path]], colorizer: Colorizer | None, args: argparse.Namespace
) -> Iterator[tuple[Path, str | None]]:
    """Pictures side by side, then films one after the other; yields each with what went wrong or None."""
    yield from colorize_files([job for job in jobs if not is_film(job[0])], colorizer, args.size, args.saturation)
    for source, target in filter(lambda job: is_film(job[0]), jobs):
        try:
            colorize_film(source, target, colorizer, args)
            yield source, None
        except PictureError as error:
            yield source, str(error)
        except (OSError, MemoryError, RuntimeError) as error:  # RuntimeError: torch, out of memory
            yield source, f"{source}: {error or 'out of memory'}"


def colorize_film(source: Path, target: Path, colorizer: Colorizer, args: argparse.Namespace) -> None:
    """One film, with a bar of its own."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(unit="frame", desc=source.name, leave=False, disable=None) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            if not bar.n:
                bar.initial = done  # frames of an earlier run tell nothing of this one's speed
            bar.update(done - bar.n)

        settings = {"size": args.size, "saturation": args.saturation, "steady": args.steady, "resume": args.resume}
        try:
            film.colorize_film(source, target, colorizer, **settings, progress=progress, warn=_say)
        except KeyboardInterrupt:
            _say(f"{source} is not finished: with --resume it goes on")
            raise


def show(failures: list[str], file: Path | None) -> None:
    """A screenful of them, or all where no file has the rest."""
    shown = failures[: SCREEN if file else None]
    for failure in shown:
        _say(failure)
    if len(shown) < len(failures):
        _say(f"and {len(failures) - len(shown)} more: {file} names all")


def list_failures(failures: list[str], output: Path | None, rank: int, processes: int) -> Path | None:
    """Write them into a file of the folder of results, in place of those of an earlier run; None if there is no such folder."""
    if output is None or is_file(output):
        return None
    for old in output.glob("failed-*.txt") if rank == 0 else ():  # of more processes than now
        if old.stem[7:].isdecimal() and int(old.stem[7:]) >= processes:
            old.unlink(missing_ok=True)
    file = output / (f"failed-{rank}.txt" if rank else "failed.txt")
    if not failures:
        file.unlink(missing_ok=True)
        return None
    try:
        output.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{failure}\n" for failure in failures), encoding="utf-8", errors="replace")
    except OSError:  # a full disk, say: then the terminal gets them all
        return None
    return file


def load(args: argparse.Namespace) -> Colorizer:
    """The `Colorizer` that the flags ask for; by default on the GPU that is this process's among those of the machine.

    Raises:
        ValueError: no such checkpoint or device; size or saturation out of range.
    """
    device = args.device
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    try:
        colorizer = Colorizer.from_pretrained(args.model or hub.DEFAULT, args.revision, device)
    except (RuntimeError, AssertionError) as error:  # torch on a device that is not there
        raise ValueError(f"{args.device} cannot be used: {str(error).splitlines()[0]}") from error
    colorizer([], args.size, args.saturation)  # before anything begins
    return colorizer


def plan(inputs: list[Path], output: Path | None) -> tuple[list[tuple[Path, Path]], list[str]]:
    """What becomes what: (picture, result) pairs, and what is wrong with the other pictures.

    No result replaces a picture of `inputs`, nor another's result.

    Raises:
        ValueError: `output` does not fit the inputs.
    """
    one_file = output is not None and is_file(output)
    if one_file and (len(inputs) > 1 or inputs[0].is_dir()):
        raise ValueError(f"{output} is one file, and there may be several pictures: name a folder")
    if one_file and output.suffix.lower() not in (writable := _writable(is_film(inputs[0]))):
        raise ValueError(f"{output} is of a kind that cannot be written: use one of {', '.join(writable)}")
    if output is not None and output.exists() and not (one_file or output.is_dir()):
        raise ValueError(f"{output} is there and no folder: name another")

    folder_of = cache(Path.resolve)  # one look at the disk a folder, not a picture
    found: dict[Path, tuple[Path, Path]] = {}
    problems = []
    for path in inputs:
        pictures = list(find(path, output))
        if not pictures:
            problems.append(f"{path} holds no pictures")
        for source, name in pictures:
            found.setdefault(folder_of(source.parent) / source.name, (source, name))  # what is named twice is done once
    jobs: list[tuple[Path, Path]] = []
    taken: dict[Path, Path] = {}
    for source, name in found.values():
        suffix = name.suffix if name.suffix.lower() in _writable(is_film(name)) else ".mkv" if is_film(name) else ".png"
        if output is None:
            target = source.with_name(f"{source.stem}-color{suffix}")
        else:
            target = output if one_file else output / name.with_suffix(suffix)
        place = folder_of(target.parent) / target.name
        if place in found:
            problems.append(f"{source}: its result would overwrite the picture {target}: choose another -o")
        elif place in taken:
            problems.append(f"{source}: its result would overwrite that of {taken[place]}, {target}: colour it apart")
        else:
            taken[place] = source
            jobs.append((source, target))
    return jobs, problems


def is_file(output: Path) -> bool:
    """Whether -o means a file, not a folder."""
    return not output.is_dir() and output.suffix.lower() in SUFFIXES + film.SUFFIXES


def is_film(path: Path) -> bool:
    return path.suffix.lower() in film.SUFFIXES


def _writable(moving: bool) -> Iterable[str]:
    """The suffixes of films or of pictures that can be written."""
    return film.CONTAINERS if moving else WRITERS


def find(path: Path, output: Path | None) -> Iterator[tuple[Path, Path]]:
    """Each picture in a folder, with its name in a folder of results; hidden files, and results in the folder, are none."""
    if not path.is_dir():
        yield path, Path(path.name)
        return
    results = output.resolve() if output and path.resolve() in output.resolve().parents else None
    for place, folders, files in os.walk(path):
        here, inside = Path(place), Path(place).relative_to(path)
        folders[:] = sorted(
            f for f in folders if not f.startswith(".") and (results is None or (here / f).resolve() != results)
        )
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            result = output is None and stem.endswith("-color")
            wanted = suffix.lower() in SUFFIXES + film.SUFFIXES and not result and not file.startswith(".")
            if wanted and (here / file).is_file():
                yield here / file, inside / file


def _say(message: object, code: int = 1) -> int:
    tqdm.write(f"colorize: {message}", file=sys.stderr)  # above the bar
    return code
