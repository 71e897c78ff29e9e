"""The app: a photograph in, its colours out, and how the network learned them, epoch by epoch. `python app.py` starts it."""

import csv
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read by Gradio on import: without it the page asks other hosts

try:
    from spaces import GPU  # a Space on ZeroGPU lends its GPU to what this decorates; comes before torch
except ImportError:

    def GPU(function):
        return function


import cv2
import gradio as gr

from colorize import CheckpointError, Colorizer, Picture, PictureError, colorize_film, hub, read
from colorize.colorizer import grayscale
from colorize.encode import WRITERS
from colorize.film import CONTAINERS
from colorize.hub import DEFAULT
from colorize.memory import keep_memory
from colorize.picture import weigh

HERE = Path(__file__).resolve().parent
SIZES = [("The model's own", 0), *((f"{size} px", size) for size in (128, 192, 256, 384, 512, 768, 1024))]
BAR = gr.Progress()  # Gradio finds it among the defaults of what it runs
PREVIEW = 1600  # pixels on the long side of what the page shows; the download has them all
THUMBNAIL = 400  # and of each picture of a batch
MOST, MOST_PIXELS = 100, 1_000_000_000  # photographs of a batch, and their pixels together

ABOUT = """# Colorize
Drop a black-and-white photograph and see it in colour. The colours are a model's guess, not a record: it has learned what
things usually look like, and cannot know what this dress or that door was. Downloads carry a mark that says so.
"""
EPOCHS = f"""Your photograph through the network as it was after each epoch against the critic: which colours it dares, and
where. Models that kept no snapshots show those of {DEFAULT}."""

CSS = """
.gradio-container { max-width: 1280px !important }
#desk { display: grid; grid: "photo result" auto "settings result" 1fr / minmax(0, 2fr) minmax(0, 3fr) }
#photo { grid-area: photo } #result { grid-area: result } #settings { grid-area: settings }
@media (max-width: 720px) { #desk { grid: "photo" auto "result" auto "settings" auto / minmax(0, 1fr) } }
#result .image-frame img { max-height: 540px; object-fit: contain }
#result .tabitem:has(.empty) :is(#download, #zip) { visibility: hidden }
#result .tab-container button { padding-inline: 8px }
.album .grid-wrap { min-height: 0; height: auto; max-height: none }
.album .grid-container { grid: auto / repeat(var(--grid-cols), minmax(0, 1fr)); align-items: start; padding-top: 28px }
.album .thumbnail-item { aspect-ratio: auto; height: auto; display: flex; flex-direction: column }
.album .thumbnail-item img { aspect-ratio: 1; height: auto }
.album .caption-label { position: static; max-width: none; width: 100%; white-space: normal; font-size: 12px; line-height: 1.3 }
"""
SHOW_FRAME = "(epoch, shots) => shots?.length ? shots[Math.min(epoch, shots.length) - 1].image : null"
FIT_SLIDER = """shots => {
    const n = Math.max(shots?.length ?? 0, 1);
    return [{__type__: "update", maximum: n, value: n}, shots?.length ? shots[n - 1].image : null];
}"""


def locate(model: str) -> str:
    """The folder of one of our own checkpoints, or a Hub id: no visitor picks a folder of this machine."""
    if folder := hub.checkpoints(HERE / "checkpoints").get(model):
        return str(folder)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model or "") or Path(model).exists():
        raise CheckpointError(f"{model} is no model: choose one of the list, or type the id of one on the Hub (user/model)")
    return model


@lru_cache(maxsize=8)
def colorizer(name: str, revision: str | None) -> Colorizer:
    return Colorizer.from_pretrained(name, revision)


@GPU
def paint(picture: Picture, name: str, revision: str | None, size: int, saturation: float) -> Picture:
    return colorizer(name, revision)(picture, size or None, saturation)


@contextmanager
def workroom(photo: str) -> Iterator[Path]:
    """A folder for the files of one request, which Gradio copies when they are yielded; and errors in a visitor's words."""
    try:
        with TemporaryDirectory() as folder:
            yield Path(folder)
    except (PictureError, CheckpointError) as error:
        message = str(error).replace(str(photo), Path(photo or "").name).replace(f"{HERE}{os.sep}", "")
        raise gr.Error(message, print_exception=False) from error


def shrink(picture: Picture, side: int = PREVIEW) -> Picture:
    scale = side / max(picture.height, picture.width)
    if scale >= 1:
        return picture
    shape = max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)
    small = [a if a is None else cv2.resize(a, shape, interpolation=cv2.INTER_AREA) for a in (picture.pixels, picture.alpha)]
    return replace(picture, pixels=small[0], alpha=small[1])


def preview(picture: Picture, path: Path, side: int = PREVIEW) -> str:
    shrink(picture, side).save(path)
    return str(path)


def take(photo: str):
    """A new photograph -> the file itself, which is kept, and what the page shows of it, since no browser shows a TIFF."""
    with workroom(photo) as folder:
        yield photo, preview(read(photo), folder / f"{Path(photo).stem}.jpg")


def take_example(event: gr.SelectData):
    yield from take(str(HERE / "examples" / examples()[event.index]["file"]))


def colorize(photo: str, model: str = DEFAULT, size: int = 0, saturation: float = 1):
    """Colour a photograph.

    Args:
        photo: JPEG, PNG, TIFF, WebP or the like; gray, sepia or colour, which is made gray first.
        model: one of the app's own models, or the id of a checkpoint on the Hugging Face Hub (user/model).
        size: pixels on the short side that the network sees; 0 for what it was trained at.
        saturation: multiplies the chroma; 0 is gray.

    Returns:
        A PNG of the photograph's own size and bit depth, marked as AI-colorized.
    """
    with workroom(photo) as folder:
        path = folder / f"{Path(photo).stem}-colorized.png"
        paint(read(photo), locate(model), None, size, saturation).save(path)
        yield str(path)


def show(photo: str, model: str, size: int, saturation: float):
    """What the first two tabs show: the gray, the gray and the colour, the file to download."""
    if photo is None:  # it was cleared
        yield None, None, None
        return
    with workroom(photo) as folder:
        picture = read(photo)
        result = paint(picture, locate(model), None, size, saturation)
        path = folder / f"{Path(photo).stem}-colorized.png"
        result.save(path)
        gray = preview(grayscale(shrink(picture)), folder / "gray.jpg")
        yield gray, (gray, preview(result, folder / "colour.jpg")), str(path)


def epochs(photo: str, model: str = DEFAULT, size: int = 0, saturation: float = 1):
    """Colour a photograph with the network as it was after each epoch of its training.

    Args:
        photo: JPEG, PNG, TIFF, WebP or the like; gray, sepia or colour, which is made gray first.
        model: one of the app's own models, or the id of a checkpoint on the Hub; without epochs, those of the first.
        size: pixels on the short side that the network sees; 0 for what it was trained at.
        saturation: multiplies the chroma; 0 is gray.

    Returns:
        Pictures of at most 1600 pixels on the long side, each with its epoch's name, in order.
    """
    if photo is None:
        yield []
        return
    with workroom(photo) as folder:
        small, name = shrink(read(photo)), locate(model)
        if not hub.snapshots(name):
            name = locate(DEFAULT)
        shots = []
        for label in hub.snapshots(name):
            path = preview(paint(small, name, label, size, saturation), folder / f"{label}.jpg")
            shots.append((path, f"Epoch {int(label.removeprefix('epoch-'))}"))
            yield shots


def batch(photos: list[str], model: str = DEFAULT, size: int = 0, saturation: float = 1, progress: gr.Progress = BAR):
    """Colour many photographs, each for itself.

    Args:
        photos: up to 100 files, of 1000 megapixels together; what cannot be coloured is named in the report.
        model: one of the app's own models, or the id of a checkpoint on the Hugging Face Hub (user/model).
        size: pixels on the short side that the network sees; 0 for what it was trained at.
        saturation: multiplies the chroma; 0 is gray.

    Returns:
        Small pictures with their names; a zip of the results, in the format of the photographs, or PNG; a report.
    """
    photos = photos or []
    if len(photos) > MOST or sum(map(weigh, photos)) > 8 * MOST_PIXELS:
        message = f"That is more than {MOST} photographs or {MOST_PIXELS // 10**6} megapixels at once: take fewer"
        raise gr.Error(message, print_exception=False)
    with workroom("") as folder:
        name, shots, failures = locate(model), [], []
        with ZipFile(folder / "colorized.zip", "w") as results:  # not compressed: the pictures are
            for n, photo in enumerate(progress.tqdm(photos, unit="photographs")):
                stem, suffix = Path(photo).stem, Path(photo).suffix.lower()
                path = folder / f"{n}{suffix if suffix in WRITERS else '.png'}"
                try:
                    result = paint(read(photo), name, None, size, saturation)
                    result.save(path)
                    title = f"{stem}-colorized{path.suffix}"
                    results.write(path, f"{n + 1}-{title}" if title in results.namelist() else title)
                    shots.append((preview(result, folder / f"{n}-small.jpg", THUMBNAIL), title))
                except PictureError as error:
                    failures.append(str(error).replace(str(photo), Path(photo).name))
                except (MemoryError, RuntimeError):  # torch's is a RuntimeError
                    failures.append(f"{Path(photo).name} does not fit into memory: scale it down")
                path.unlink(missing_ok=True)  # it is in the zip
        report = "\n".join([f"{len(shots)} of {len(photos)} are in colour.", *failures])
        yield shots, str(folder / "colorized.zip") if shots else None, report


@GPU
def film(
    film: str, model: str = DEFAULT, size: int = 0, saturation: float = 1, steady: float = 0.5, progress: gr.Progress = BAR
):
    """Colour a film, with its sound.

    Args:
        film: MP4, MOV, Matroska, WebM, AVI or the like; gray or colour, of which only the lightness is kept.
        model: one of the app's own models, or the id of a checkpoint on the Hugging Face Hub (user/model).
        size: pixels on the short side that the network sees; 0 for what it was trained at.
        saturation: multiplies the chroma; 0 is gray.
        steady: how much of a frame's colours comes from those before it, 0 to 1; 0 colours each frame by itself.

    Returns:
        The film in H.264, marked as AI-colorized.
    """
    with workroom(film) as folder:
        if film is None:
            raise gr.Error("Choose a film first", print_exception=False)
        suffix = Path(film).suffix.lower()
        path = folder / f"{Path(film).stem}-colorized{suffix if suffix in CONTAINERS else '.mkv'}"
        colorize_film(
            film, path, colorizer(locate(model), None), size=size or None, saturation=saturation, steady=steady,
            progress=lambda done, total: progress((done, total), unit="frames"), warn=gr.Warning,
        )  # fmt: skip
        yield str(path)


def examples() -> list[dict[str, str]]:
    """The photographs in examples/: file, title, author, licence."""
    with open(HERE / "examples" / "SOURCES.csv", newline="") as file:
        return list(csv.DictReader(file))


def credit(row: dict[str, str]) -> str:
    return row["title"] if row["author"] == "unknown" else f"{row['title']}. {row['author']}"


def point(event: gr.SelectData) -> int:
    return event.index + 1


def build() -> gr.Blocks:
    picture = {"type": "filepath", "interactive": False, "buttons": ["fullscreen"]}
    album = {"allow_preview": False, "interactive": False, "buttons": [], "height": "auto", "elem_classes": "album"}
    rows = examples()
    with gr.Blocks(title="Colorize", delete_cache=(3600, 86400)) as demo:
        gr.Markdown(ABOUT)
        original = gr.State()  # the file as it came: its depth and size are what the download has
        with gr.Row(elem_id="desk"):
            with gr.Column(elem_id="photo"):
                photo = gr.Image(label="Photograph", height=320, sources=["upload", "clipboard"], buttons=[])
                # The file untouched: Gradio's own way clips 16 bits, and fails on a damaged one before we can say why.
                photo.preprocess = lambda payload: payload and payload.path
            with gr.Column(elem_id="result"), gr.Tabs(selected="colorized"):
                with gr.Tab("Grayscale", id="grayscale"):
                    gray = gr.Image(label="What the network sees", **picture)
                with gr.Tab("Colorized", id="colorized"):
                    pair = gr.ImageSlider(label="Before and after", max_height=540, **picture)
                    download = gr.DownloadButton("Download PNG, full resolution", variant="primary", elem_id="download")
                with gr.Tab("Epoch by epoch", id="epochs"):
                    gr.Markdown(EPOCHS)
                    frame = gr.Image(show_label=False, **picture)
                    epoch = gr.Slider(1, 2, 1, step=1, label="Epoch", buttons=[])
                    shots = gr.Gallery(label="All epochs", columns=4, **album)
                with gr.Tab("Batch", id="batch"):
                    photos = gr.File(label="Photographs", file_count="multiple", height=160, elem_id="photos")
                    colour_all = gr.Button("Colorize all", variant="primary")
                    album_of_all = gr.Gallery(label="In colour", columns=4, **album)
                    report = gr.Textbox(label="Report", interactive=False, elem_id="report")
                    everything_zipped = gr.DownloadButton("Download zip", elem_id="zip")
                with gr.Tab("Film", id="film"):
                    reel = gr.Video(label="Film", sources=["upload"], height=320, buttons=[])
                    steady = gr.Slider(0, 1, 0.5, step=0.05, label="Steady colours", buttons=["reset"])
                    start = gr.Button("Colour the film", variant="primary")
                    coloured_reel = gr.Video(label="In colour", height=320, interactive=False, buttons=["download"])
            with gr.Column(elem_id="settings"):
                with gr.Accordion("Model, size, saturation", open=False):
                    names = sorted(hub.checkpoints(HERE / "checkpoints"), key=lambda name: name != DEFAULT)
                    hint = "The first colours best; the README compares them. Or type a Hub id: user/model"
                    model = gr.Dropdown(names, value=DEFAULT, label="Model", info=hint, allow_custom_value=True)
                    size = gr.Dropdown(SIZES, value=0, label="Size", info="Pixels on the short side that the network sees")
                    saturation = gr.Slider(0, 2, 1, step=0.05, label="Saturation", buttons=["reset"])
                credited = [(HERE / "examples" / row["file"], credit(row)) for row in rows]
                samples = gr.Gallery(credited, label="Or pick an old one", columns=3, **album)
                licences = "; ".join(dict.fromkeys(row["licence"] for row in rows))
                gr.Markdown(f"<small>{licences[:1].upper()}{licences[1:]}.</small>")

        settings = [model, size, saturation]
        everything = [original, photo, gray, pair, download, shots]
        private = {"api_visibility": "private"}
        device = {"concurrency_id": "device", "concurrency_limit": 2}  # a small picture need not wait for a big scan

        gr.on([], colorize, [photo, *settings], download, api_name="colorize", **device)
        gr.on([], epochs, [photo, *settings], shots, api_name="epochs", **device)

        all_coloured = colour_all.click(
            batch, [photos, *settings], [album_of_all, everything_zipped, report], api_name="batch", **device
        )
        start.click(film, [reel, *settings, steady], coloured_reel, api_name="film", **device)

        def clear(trigger, outputs):
            trigger(lambda: [None] * len(outputs), None, outputs, queue=False, **private)

        uploaded = photo.upload(take, photo, [original, photo], **private)
        picked = samples.select(take_example, None, [original, photo], **private)
        coloured = gr.on(
            [original.change, model.input, size.input, saturation.release],
            show, [original, *settings], [gray, pair, download], trigger_mode="always_last", **device, **private,
        )  # fmt: skip
        learned = coloured.success(epochs, [original, *settings], shots, trigger_mode="always_last", **device, **private)
        for trigger in (uploaded.failure, picked.failure, photo.clear):
            clear(trigger, everything)
        clear(coloured.failure, [gray, pair, download, shots])
        clear(learned.failure, [shots])
        clear(all_coloured.failure, [album_of_all, everything_zipped, report])

        # In the browser alone: every picture is there already.
        shots.change(None, shots, [epoch, frame], js=FIT_SLIDER)
        shots.select(point, None, epoch, queue=False, **private)
        epoch.change(None, [epoch, shots], frame, js=SHOW_FRAME)
    return demo


if __name__ == "__main__":
    keep_memory()
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to fetch
    build().queue(max_size=16).launch(
        theme=gr.themes.Default(primary_hue="indigo", neutral_hue="stone", **fonts),
        css=CSS,
        max_file_size="250mb",
        footer_links=["api"],
        ssr_mode=False,
    )
