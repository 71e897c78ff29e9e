"""A film in, a film out: every frame in colour, sound and all else untouched."""

import gc
import heapq
import io
import json
import os
import re
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import av
import cv2
import numpy as np
import torch
from av.codec.context import Flags
from av.stream import Disposition

from .atomic import atomic
from .color import LIGHTNESS_SCALE
from .colorizer import BATCH, Colorizer, seen_shape
from .encode import SOURCE_TYPE
from .picture import PictureError
from .steady import Steady
from .yuv import BT601, BT709, MATRICES, Coding

# What a film comes as, and what H.264 can be written into with every frame's own time
SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".vob", ".wmv", ".flv", ".ogv",
    ".3gp", ".mxf", ".dv",
)  # fmt: skip
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
SEGMENT = 15 * BATCH  # frames between two points at which an interrupted film goes on
# Frames in order (bf=0) have no decoding times of their own: segments can be joined whatever the frame rate does.
X264 = {"preset": "superfast", "crf": "18", "bf": "0"}
PLANAR = {8: ("yuv420p", "yuv444p"), 10: ("yuv420p10le", "yuv444p10le")}
LIMITED, FULL = 1, 2  # ranges of luma and chroma (ffmpeg's AVCOL_RANGE)
FORMAT_TAGS = ("major_brand", "minor_version", "compatible_brands", "encoder")  # on the old file, not on the film


class FilmError(PictureError):
    """A film that cannot be read or written; the message is one line that names it and the remedy."""


def colorize_film(
    source: str | os.PathLike,
    target: str | os.PathLike,
    colorizer: Colorizer,
    *,
    size: int | None = None,
    saturation: float = 1.0,
    steady: float = 0.5,
    resume: bool = False,
    progress: Callable[[int, int | None], object] = lambda done, total: None,
    warn: Callable[[str], object] = warnings.warn,
) -> int:
    """Colour a film, frame by frame, into H.264 of the same size, times, bit depth, range and pixel aspect, upright.

    Sound, subtitles, chapters and tags are copied. What is finished is kept, in segments, in a hidden folder beside `target`;
    they are joined at the end, so that `target` is a whole film or not there.

    Args:
        target: .mp4, .m4v, .mov or .mkv; one that exists is replaced at the end. Matroska rounds times to
            milliseconds, and moves all streams alike so that none begins before 0.
        size, saturation: as for a picture, see `Colorizer.__call__`.
        steady: how much of a frame's colours comes from the frames before it, 0 to 1; 0 colours each frame by itself.
        resume: go on where an interrupted run with the same settings stopped; the result is the same.
        progress: called with the frames done and their number (as the file says; None if it does not) after every batch.
        warn: called with what the result will lack: a stream that `target` cannot hold, frames that are damaged.

    Returns:
        The number of frames written.

    Raises:
        FilmError: no film, nothing in it that can be decoded, or `target` cannot be written.
        ValueError: `size`, `saturation` or `steady` is out of range.
    """
    source, target = Path(source), Path(target)
    size = colorizer.image_size if size is None else size
    check_settings(size, saturation, steady)
    if target.suffix.lower() not in CONTAINERS:
        raise FilmError(f"{target} has no suffix of a film that can be written: use one of {', '.join(CONTAINERS)}")
    with _reading(source) as film:
        video = _moving(film, source)
        kept = _fitting(film, video, source, target, warn)
        settings = {
            "source": [str(source.resolve()), source.stat().st_size, source.stat().st_mtime_ns],
            "look": [colorizer.name, size, saturation, steady],
            "versions": [av.__version__, torch.__version__],  # which may encode and round differently
        }
        try:
            parts = Parts(target.with_name(f".{target.name}.parts"), settings, resume, warn)
            total = _count(film, video)
            progress(parts.frames, total)
            frames = islice(_frames(film, video, source, warn), parts.frames, None)
            with (
                closing(ahead(_batches(Seen.of(frame, video, size) for frame in frames))) as batches,
                closing(ahead(_painted(batches, colorizer, Steady(steady, parts.memory)))) as painted,
            ):
                while parts.write(islice(painted, SEGMENT // BATCH), video, saturation, lambda done: progress(done, total)):
                    pass
            if parts.frames:
                with atomic(target) as temporary:
                    _join(parts, source, kept, temporary, CONTAINERS[target.suffix.lower()], colorizer.name)
        except (av.FFmpegError, OSError) as error:
            raise FilmError(f"{target} cannot be written: {_reason(error)}") from error
    parts.remove()
    if not parts.frames:
        raise FilmError(f"{source} holds no frame that can be decoded: copy it again")
    return parts.frames


def check_settings(size: int, saturation: float, steady: float) -> None:
    if not 16 <= size <= 4096:
        raise ValueError(f"size must be between 16 and 4096 pixels, not {size}")
    if not 0 <= saturation <= 10:
        raise ValueError(f"saturation must be between 0 and 10, not {saturation}")
    if not 0 <= steady <= 1:
        raise ValueError(f"steady must be between 0 and 1, not {steady}")


def ahead(items: Iterable) -> Iterator:
    """The same items, each made in a thread while the one before it is in use."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, items, end)
        while (item := pending.result()) is not end:
            pending = pool.submit(next, items, end)
            yield item


# Reading: a film -> upright frames, and what the network sees of them


@contextmanager
def _reading(source: Path) -> Iterator[av.container.InputContainer]:
    try:
        container = av.open(str(source))
    except (av.FFmpegError, OSError) as error:
        if not source.is_file() or isinstance(error, PermissionError):
            raise FilmError(f"{source} cannot be opened: {_reason(error)}") from error
        raise FilmError(f"{source} is no film, or damaged ({_reason(error)}): copy it again") from error
    with container:
        yield container


def _moving(film: av.container.InputContainer, source: Path) -> av.VideoStream:
    """The stream to colour: the first that is no cover."""
    for stream in film.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None or not stream.width:
                raise FilmError(f"{source} cannot be decoded as a film: copy it again, or convert it to H.264")
            stream.thread_type = "AUTO"
            return stream
    found = ", ".join(stream.type for stream in film.streams) or "nothing"
    raise FilmError(f"{source} has no moving pictures, only {found}: name a film")


def _count(film: av.container.InputContainer, video: av.VideoStream) -> int | None:
    """Frames, as the file says or as its length has it."""
    if video.frames or not (film.duration and video.average_rate):
        return video.frames or None
    return round((_length(video) or film.duration / av.time_base) * video.average_rate)


def _step(video: av.VideoStream) -> int:
    """The usual time between frames, in units of the stream's time base."""
    return max(round(1 / (video.average_rate * video.time_base)), 1) if video.average_rate else 1


def _frames(
    film: av.container.InputContainer, video: av.VideoStream, source: Path, warn: Callable[[str], object]
) -> Iterator[av.VideoFrame]:
    """Every frame that can be decoded, in one size and with times that rise."""
    last, faults = None, 0
    for packet in _packets(film, [video]):
        try:
            frames = packet.decode()  # of the last packet, an empty one: what the decoder held back
        except av.FFmpegError:
            frames, faults = [], faults + 1
        faults += sum(frame.is_corrupt for frame in frames)
        for frame in frames:
            if (frame.width, frame.height) != (video.width, video.height):
                frame = frame.reformat(width=video.width, height=video.height)
            if frame.pts is None:
                frame.pts = frame.dts
            if frame.pts is None or last is not None and frame.pts <= last:
                frame.pts = 0 if last is None else last + (frame.duration or _step(video))
            last = frame.pts
            yield frame
    if last is None:
        return
    end = float((last + _step(video) - (video.start_time or 0)) * video.time_base)
    length = _length(video)
    if length and length - end > 1:
        warn(f"{source} is cut short: its pictures end after {end:.1f} of {length:.1f} seconds")
    elif faults:
        warn(f"{source} is damaged in {faults} places: what could be decoded is in colour, the rest is left out")


def _length(video: av.VideoStream) -> float | None:
    """Seconds, as the file says of this stream; in Matroska, in a tag such as 00:00:04.000000000."""
    if video.duration:
        return float(video.duration * video.time_base)
    parts = re.fullmatch(r"(\d+):(\d+):([\d.]+)", video.metadata.get("DURATION", ""))
    return float(parts[1]) * 3600 + float(parts[2]) * 60 + float(parts[3]) if parts else None


def _packets(film: av.container.InputContainer, streams: list) -> Iterator[av.Packet]:
    """Those of some streams, and an empty one for each at the end; a file that is cut short just ends."""
    packets = film.demux(streams)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            for stream in streams:
                packet = av.Packet()
                packet.stream = stream
                yield packet
            return
        if packet is None:
            return
        yield packet


@dataclass(frozen=True, eq=False)
class Seen:
    """A frame, and what the network sees of it.

    Attributes:
        frame: upright, planar, of 8 or 10 bits.
        aspect: of a pixel, width to height.
        lightness: L* (h, w).
    """

    frame: av.VideoFrame
    aspect: Fraction
    coding: Coding
    lightness: torch.Tensor

    @classmethod
    def of(cls, frame: av.VideoFrame, video: av.VideoStream, size: int) -> "Seen":
        aspect = video.sample_aspect_ratio or Fraction(1)
        matrix = _display_matrix(frame)
        frame = _workable(frame, video)
        if matrix is not None:
            frame = _turned(frame, matrix)
            aspect = aspect if matrix[0] else 1 / aspect
        h, w = seen_shape(frame.height, max(round(frame.width * aspect), 1), size)
        coding = _coding(frame)
        return cls(frame, aspect, coding, coding.lightness(*(_shrunk(plane, h, w) for plane in planes(frame))))


def planes(frame: av.VideoFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Y, Cb and Cr of a frame, uint8 or uint16, to read and to write."""
    dtype = np.dtype(np.uint8 if frame.format.name in PLANAR[8] else np.uint16)
    rows = (np.frombuffer(p, dtype).reshape(-1, p.line_size // dtype.itemsize)[: p.height, : p.width] for p in frame.planes)
    return tuple(rows)


def _shrunk(plane: np.ndarray, h: int, w: int) -> np.ndarray:
    """(H, W) -> (h, w), each the mean of what it covers; by halves as far as they go, which is ten times as fast."""
    height, width = plane.shape
    while height % 2 == width % 2 == 0 and height >= 2 * h and width >= 2 * w:
        height, width = height // 2, width // 2
        plane = cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.resize(plane, (w, h), interpolation=cv2.INTER_AREA)


def _workable(frame: av.VideoFrame, video: av.VideoStream) -> av.VideoFrame:
    """Planar, and ours to write into: 4:2:0, or 4:4:4 where a side is odd, as H.264 has no odd sizes in 4:2:0."""
    kind = frame.format
    depth = 10 if max(c.bits for c in kind.components) > 8 else 8
    wanted = PLANAR[depth][frame.width % 2 or frame.height % 2]
    if kind.name == wanted:
        frame.make_writable()  # the decoder may still need what is in it
    elif kind.is_rgb or kind.has_palette:
        frame = frame.reformat(format=wanted, dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.colorspace, frame.color_range = BT709, LIMITED
    else:
        matrix, span = frame.colorspace, frame.color_range
        still = len(kind.components) == 1 and video.codec.name not in ("h264", "hevc")  # gray that never was for television
        if not span and (still or kind.name.startswith("yuvj")):
            span = FULL
        frame = frame.reformat(format=wanted, src_color_range="JPEG", dst_color_range="JPEG")  # the values stay
        frame.colorspace, frame.color_range = matrix, span
    frame.pict_type = 0  # or the encoder would make whole frames of those that the decoder found whole
    return frame


def _coding(frame: av.VideoFrame) -> Coding:
    large = max(frame.width, frame.height) >= 1280 or min(frame.width, frame.height) > 576
    unsaid = BT709 if large else BT601  # as players do
    matrix = frame.colorspace if frame.colorspace in MATRICES else unsaid
    return Coding(matrix, frame.color_range == FULL, 8 if frame.format.name in PLANAR[8] else 10)


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int] | None:
    """(a, b, c, d) if the picture is to be shown turned or mirrored: what is at x, y is shown at a x + c y, b x + d y."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d = np.frombuffer(data, np.int32)[:5].tolist()
    if abs(a) >= abs(b):
        matrix = (1 if a >= 0 else -1, 0, 0, 1 if d >= 0 else -1)
    else:
        matrix = (0, 1 if b > 0 else -1, 1 if c > 0 else -1, 0)
    return None if matrix == (1, 0, 0, 1) else matrix


def _turned(frame: av.VideoFrame, matrix: tuple[int, int, int, int]) -> av.VideoFrame:
    a, b, c, d = matrix
    upright = av.VideoFrame(*((frame.width, frame.height) if a else (frame.height, frame.width)), frame.format.name)
    for old, new in zip(planes(frame), planes(upright), strict=True):
        new[:] = (old if a else old.T)[:: d or b, :: a or c]
    upright.pts, upright.time_base, upright.duration = frame.pts, frame.time_base, frame.duration
    for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
        setattr(upright, name, getattr(frame, name))
    return upright


# Colouring


def _batches(seen: Iterable[Seen]) -> Iterator[list[Seen]]:
    seen = iter(seen)
    while batch := list(islice(seen, BATCH)):
        yield batch


def _painted(batches: Iterable[list[Seen]], colorizer: Colorizer, steady: Steady) -> Iterator[tuple]:
    """Each batch, its a*, b* (B, 2, h, w) and what `steady` remembers after it.

    On a CPU every core has a network of one thread, as in `archive`: threads that share one wait for each other all the time.
    """
    threads = torch.get_num_threads()
    cores = threads if colorizer.device.type == "cpu" else 1

    def paint(batch: list[Seen]) -> tuple[list[Seen], torch.Tensor, torch.Tensor]:
        lightness = torch.stack([seen.lightness for seen in batch])  # (B, h, w)
        return batch, lightness, colorizer.paint(lightness[:, None] / LIGHTNESS_SCALE - 1)

    batches = iter(batches)
    try:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            pending = deque(pool.submit(paint, batch) for batch in islice(batches, cores))
            while pending:
                batch, lightness, ab = pending.popleft().result()
                pending.extend(pool.submit(paint, following) for following in islice(batches, 1))
                yield batch, [steady(*frame) for frame in zip(lightness.numpy(), ab.numpy(), strict=True)], steady.memory
    finally:
        torch.set_num_threads(threads)  # or threads to come would have one as well


# Writing: finished segments, then all of them as one film


class Parts:
    """The hidden folder of a film in work: segments of `SEGMENT` frames, each an .mp4 and beside it an .npz.

    The .npz has the frames' times and durations, and what the next frame needs to know of the last. A segment counts once
    its .mp4 is there, which is written last and appears whole.

    Attributes:
        frames: how many are finished.
        memory: what `Steady` remembered after them.
    """

    def __init__(self, folder: Path, settings: dict, resume: bool, warn: Callable[[str], object]):
        self.folder, self.segments, self.frames, self.memory = folder, [], 0, None
        note = folder / "settings.json"
        if resume and folder.exists() and not (note.exists() and json.loads(note.read_text()) == settings):
            warn(f"{folder} was begun with other settings: the film starts anew")
            resume = False
        if not resume:
            self.remove()
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(note) as temporary:
            temporary.write_text(json.dumps(settings))
        while (segment := self._next()).exists():
            with np.load(segment.with_suffix(".npz")) as notes:
                self.frames += len(notes["times"])
                self.memory = {name: notes[name] for name in notes.files if name not in ("times", "durations")}
            self.segments.append(segment)

    def _next(self) -> Path:
        return self.folder / f"{len(self.segments):06}.mp4"

    def remove(self) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def write(
        self, painted: Iterable[tuple], video: av.VideoStream, saturation: float, progress: Callable[[int], object]
    ) -> bool:
        """One more segment, from batches as `_painted` gives them; False if there are none."""
        painted = iter(painted)
        if (first := next(painted, None)) is None:
            return False
        times, durations, memory = [], [], {}
        segment = self._next()
        with atomic(segment) as temporary:
            with av.open(str(temporary), "w", format="mp4") as output:
                stream = _encoder(output, first[0][0], video)
                for batch, colours, memory in chain([first], painted):  # noqa: B007
                    for seen, ab in zip(batch, colours, strict=True):
                        seen.coding.paint(*planes(seen.frame), ab * saturation)
                        times.append(seen.frame.pts)
                        durations.append(seen.frame.duration)
                        seen.frame.pts, seen.frame.time_base = len(times) - 1, stream.codec_context.time_base
                        output.mux(stream.encode(seen.frame))
                    progress(self.frames + len(times))
                output.mux(stream.encode(None))
            with atomic(segment.with_suffix(".npz")) as notes:
                np.savez(notes, times=times, durations=durations, **memory)
        self.segments.append(segment)
        self.frames += len(times)
        del output, stream
        gc.collect()  # a container and its streams refer to each other, and hold an encoder with all its frames
        return True


def _encoder(output: av.container.OutputContainer, seen: Seen, video: av.VideoStream) -> av.VideoStream:
    frame = seen.frame
    stream = output.add_stream("libx264", rate=video.average_rate or 25)
    codec = stream.codec_context
    codec.options = X264
    codec.width, codec.height, codec.pix_fmt = frame.width, frame.height, frame.format.name
    codec.time_base = 1 / codec.framerate
    codec.sample_aspect_ratio = seen.aspect
    for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
        setattr(codec, name, getattr(frame, name))
    if frame.interlaced_frame:
        codec.flags |= Flags.interlaced_dct | Flags.interlaced_me
    return stream


def _fitting(
    film: av.container.InputContainer, video: av.VideoStream, source: Path, target: Path, warn: Callable[[str], object]
) -> list[int]:
    """The numbers of the other streams that `target` can hold.

    Raises:
        FilmError: it cannot hold the sound.
    """
    kept = []
    for stream in film.streams:
        if stream is video:
            continue
        try:
            with av.open(io.BytesIO(), "w", format=CONTAINERS[target.suffix.lower()]) as trial:
                _copy_of(stream, trial)
                trial.start_encoding()
            kept.append(stream.index)
        except (ValueError, av.FFmpegError) as error:
            codec = stream.codec_context.name if stream.codec_context else "unknown"
            if stream.type == "audio":
                remedy = "convert the sound to AAC first" if target.suffix.lower() == ".mkv" else "name a .mkv file"
                raise FilmError(f"{target} cannot hold the sound of {source} ({codec}): {remedy}") from error
            if not (stream.type == "data" and film.chapters()):  # in an .mp4, chapters are such a stream as well
                hint = "" if target.suffix.lower() == ".mkv" else ": a .mkv file may keep it"
                warn(f"{target} cannot hold the {stream.type} stream {stream.index} of {source} ({codec}){hint}")
    return kept


def _copy_of(stream: av.stream.Stream, output: av.container.OutputContainer) -> av.stream.Stream:
    """A new stream for the packets of another."""
    copy = output.add_stream_from_template(stream, opaque=True)
    copy.metadata.update(stream.metadata)
    copy.disposition = stream.disposition
    return copy


def _join(parts: Parts, source: Path, kept: list[int], target: Path, container: str, name: str) -> None:
    """All segments and the other streams of `source` -> a film."""
    options = {"movflags": "faststart"} if container in ("mp4", "mov") else {}
    with (
        _reading(source) as film,
        av.open(str(parts.segments[0])) as first,
        av.open(str(target), "w", format=container, options=options) as output,
    ):
        old = _moving(film, source)
        streams = {}
        for stream in film.streams:  # in their order
            if stream is old:
                new = streams[stream.index] = output.add_stream_from_template(first.streams.video[0], opaque=True)
                new.time_base = old.time_base
                new.metadata.update(old.metadata)
                new.disposition = old.disposition
            elif stream.index in kept:
                streams[stream.index] = _copy_of(stream, output)
        output.metadata.update({key: value for key, value in film.metadata.items() if key not in FORMAT_TAGS})
        mark = f"Colorize ({name}) {SOURCE_TYPE}"
        output.metadata["comment"] = "; ".join(filter(None, (film.metadata.get("comment"), mark)))
        output.set_chapters(film.chapters())
        output.start_encoding()
        copied = _packets(film, [film.streams[i] for i in kept if film.streams[i].type != "attachment"]) if kept else ()
        both = ((p for p in packets if p.size) for packets in (_coloured(parts, old), copied))
        for packet in heapq.merge(*both, key=_when):
            packet.stream = streams[packet.stream.index]
            output.mux(packet)


def _coloured(parts: Parts, video: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of all segments, with the times that their frames had in the film."""
    for segment in parts.segments:
        with av.open(str(segment)) as part, np.load(segment.with_suffix(".npz")) as notes:
            frames = zip(notes["times"].tolist(), notes["durations"].tolist(), strict=True)
            for packet in _packets(part, [part.streams.video[0]]):
                if packet.size:
                    packet.pts, packet.duration = next(frames)
                    packet.dts, packet.time_base, packet.stream = packet.pts, video.time_base, video
                    yield packet


def _when(packet: av.Packet) -> float:
    """Seconds."""
    time = packet.pts if packet.dts is None else packet.dts
    return 0.0 if time is None else float(time * packet.time_base)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
