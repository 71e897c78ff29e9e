"""The `colorize` command: files and folders in, coloured files out."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from . import film, hub
from .colorizer import Colorizer
from .encode import WRITERS
from .picture import SUFFIXES, PictureError, read

EPILOG = """\
examples:
  colorize grandmother.jpg                      writes grandmother-color.jpg beside it
  colorize grandmother.jpg -o colour.png        that file
  colorize scans/ letters/photo.tif -o colour/  a folder, in which the tree of scans/ is kept
  colorize scans/ -o colour/ --model user/name  with a checkpoint from the Hugging Face Hub
  colorize reel.mp4 -o colour.mp4 --resume      a film; goes on if it was interrupted

Results keep the format of the picture if it is JPEG, PNG, TIFF or WebP, and are PNG otherwise; those of films that are
not MP4, MOV or Matroska are Matroska. Those that exist are skipped without --force.
Exit code: 0 if all went well, 1 if some pictures failed, 2 for wrong usage or a model that cannot be used, 130 after Ctrl-C.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code; wrong flags end in argparse's `SystemExit(2)`."""
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
    """Colour what `args` names, each picture for itself; 0, or 1 if one failed."""
    jobs, problems = plan(args.inputs, args.output)
    for problem in problems:
        _say(problem)
    todo = [job for job in jobs if args.force or not job[1].exists()]
    failed = len(problems)
    colorizer = None
    for source, target in tqdm(todo, unit="picture", disable=None):  # no bar where nobody looks
        try:
            if source.suffix.lower() in film.SUFFIXES:
                colorizer = colorizer or load(args)
                colorize_film(source, target, colorizer, args)
                continue
            picture = read(source)
            colorizer = colorizer or load(args)  # not before there is a picture for it
            target.parent.mkdir(parents=True, exist_ok=True)
            colorizer(picture, size=args.size, saturation=args.saturation).save(target)
        except (PictureError, OSError, MemoryError, RuntimeError) as error:  # RuntimeError: torch, out of memory
            failed += 1
            _say(error if isinstance(error, PictureError) else f"{source}: {error or 'out of memory'}")
    print(f"{len(todo) + len(problems) - failed} coloured, {len(jobs) - len(todo)} skipped, {failed} failed")
    return 1 if failed else 0


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


def load(args: argparse.Namespace) -> Colorizer:
    """The `Colorizer` that the flags ask for.

    Raises:
        ValueError: no such checkpoint or device.
    """
    try:
        return Colorizer.from_pretrained(args.model or hub.DEFAULT, args.revision, args.device)
    except (RuntimeError, AssertionError) as error:  # torch on a device that is not there
        raise ValueError(f"{args.device} cannot be used: {str(error).splitlines()[0]}") from error


def plan(inputs: list[Path], output: Path | None) -> tuple[list[tuple[Path, Path]], list[str]]:
    """What becomes what: (picture, result) pairs, and what is wrong with the other pictures.

    No result replaces a picture of `inputs`, nor another's result.

    Raises:
        ValueError: `output` does not fit the inputs.
    """
    one_file = output is not None and not output.is_dir() and output.suffix.lower() in SUFFIXES + film.SUFFIXES
    if one_file and (len(inputs) > 1 or inputs[0].is_dir()):
        raise ValueError(f"{output} is one file, and there may be several pictures: name a folder")
    moving = one_file and inputs[0].suffix.lower() in film.SUFFIXES
    if one_file and output.suffix.lower() not in _writable(moving):
        raise ValueError(f"{output} is of a kind that cannot be written: use one of {', '.join(_writable(moving))}")
    if output is not None and output.exists() and not (one_file or output.is_dir()):
        raise ValueError(f"{output} is there and no folder: name another")

    found = {source.resolve(): (source, name) for source, name in find(inputs, output)}  # what is named twice is done once
    jobs: list[tuple[Path, Path]] = []
    problems = [f"{folder} holds no pictures" for folder in inputs if folder.is_dir() and not any(find([folder], output))]
    taken: dict[Path, Path] = {}
    for source, name in found.values():
        moving = name.suffix.lower() in film.SUFFIXES
        suffix = name.suffix if name.suffix.lower() in _writable(moving) else ".mkv" if moving else ".png"
        if output is None:
            target = source.with_name(f"{source.stem}-color{suffix}")
        else:
            target = output if one_file else output / name.with_suffix(suffix)
        place = target.resolve()
        if place in found:
            problems.append(f"{source}: its result would overwrite the picture {target}: choose another -o")
        elif place in taken:
            problems.append(f"{source}: its result would overwrite that of {taken[place]}, {target}: colour it apart")
        else:
            taken[place] = source
            jobs.append((source, target))
    return jobs, problems


def find(inputs: list[Path], output: Path | None) -> Iterator[tuple[Path, Path]]:
    """Each picture in `inputs`, with its name in a folder of results; hidden files, and results in a folder, are none."""
    for path in inputs:
        if not path.is_dir():
            yield path, Path(path.name)
            continue
        results = output.resolve() if output and path.resolve() in output.resolve().parents else None
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            hidden = any(part.startswith(".") for part in name.parts)
            result = file.stem.endswith("-color") if output is None else results in file.resolve().parents
            if file.suffix.lower() in SUFFIXES + film.SUFFIXES and not hidden and not result and file.is_file():
                yield file, name


def _writable(moving: bool) -> Iterable[str]:
    """The suffixes of films or of pictures that can be written."""
    return film.CONTAINERS if moving else WRITERS


def _say(message: object, code: int = 1) -> int:
    tqdm.write(f"colorize: {message}", file=sys.stderr)  # above the bar
    return code
