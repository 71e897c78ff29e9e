"""Films that pan over real photographs, made on the spot with sound and subtitles, and a tiny untrained checkpoint."""

import io
import os
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from av.codec.context import Flags

from colorize import Colorizer, FilmError, cli, colorize_film, hub
from colorize.color import fit_gamut, lightness_to_gray, rgb_to_lab, rgb_to_lightness
from colorize.colorizer import stretch_rows
from colorize.film import SEGMENT
from colorize.metrics import colour_divergence, colour_histograms, colourfulness, warped_difference
from colorize.models import UNet, UNetConfig
from colorize.steady import Steady
from colorize.yuv import Coding
from conftest import PHOTOS, ROOT

SUBTITLES = b"1\n00:00:00,100 --> 00:00:00,300\nKillarney\n\n2\n00:00:00,400 --> 00:00:00,700\n1910\n\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    network = UNet(UNetConfig(num_filters=4, num_downs=5, image_size=64))
    return str(hub.save(network, tmp_path_factory.mktemp("hub") / "tiny"))


@pytest.fixture(scope="module")
def colorizer(model) -> Colorizer:
    return Colorizer.from_pretrained(model, device="cpu")


def pan(photo: Path, count: int, width: int = 96, height: int = 64, speed: float = 1.0) -> list[np.ndarray]:
    """A camera that moves to the right over a photograph: RGB frames (height, width, 3)."""
    picture = cv2.cvtColor(cv2.imread(str(photo)), cv2.COLOR_BGR2RGB)
    picture = cv2.resize(picture, (4 * width, 4 * height), interpolation=cv2.INTER_AREA)
    shifts = [np.float32([[1, 0, -min(speed * i, 3 * width)], [0, 1, -height]]) for i in range(count)]
    return [cv2.warpAffine(picture, m, (width, height), flags=cv2.INTER_LINEAR) for m in shifts]


def write(
    path: Path, frames, *, rate=25, times=None, base=None, gray=True, kind="yuv420p", codec="libx264", options=None, flags=0,
    full=False, aspect=None, sound=None, subtitles=False,
) -> Path:  # fmt: skip
    """A film of RGB frames. `times` are in units of `base`."""
    with av.open(str(path), "w") as film:
        video = film.add_stream(codec, rate=rate, options=options or {})
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt, video.codec_context.flags = kind, video.codec_context.flags | flags
        video.codec_context.time_base = base or Fraction(1, rate)
        video.codec_context.color_range = 2 if full else 1
        if aspect:
            video.codec_context.sample_aspect_ratio = aspect
        film.metadata["title"] = "A reel"
        tone = film.add_stream(sound, rate=8000, layout="mono") if sound else None
        text = av.open(io.BytesIO(SUBTITLES), format="srt") if subtitles else None
        words = film.add_stream_from_template(text.streams[0], opaque=True) if text else None
        if words:
            words.metadata["language"] = "gle"
        for i, rgb in enumerate(frames):
            if gray:
                rgb = cv2.cvtColor(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            frame = av.VideoFrame.from_ndarray(rgb, "rgb24")
            frame = frame.reformat(format=kind, dst_color_range="JPEG" if full else "MPEG")
            frame.pts, frame.time_base = times[i] if times else i, base or Fraction(1, rate)
            film.mux(video.encode(frame))
        film.mux(video.encode(None))
        if tone:
            wave = (np.sin(np.arange(8000 * len(frames) // rate) / 5) * 9000).astype(np.int16)[None]
            for start in range(0, wave.shape[1], 1000):
                chunk = av.AudioFrame.from_ndarray(wave[:, start : start + 1000].copy(), "s16", "mono")
                chunk.sample_rate, chunk.pts, chunk.time_base = 8000, start, Fraction(1, 8000)
                film.mux(tone.encode(chunk))
            film.mux(tone.encode(None))
        if words:
            for packet in text.demux():
                if packet.size:
                    packet.stream = words
                    film.mux(packet)
    return path


def decode(path: Path) -> tuple[list[av.VideoFrame], list[Fraction]]:
    with av.open(str(path)) as film:
        frames = list(film.decode(video=0))
    return frames, [frame.pts * frame.time_base for frame in frames]


def packets(path: Path, kind: str) -> list[tuple]:
    with av.open(str(path)) as film:
        stream = getattr(film.streams, kind)[0]
        found = [(bytes(p), p.pts * p.time_base, p.duration * p.time_base) for p in film.demux(stream) if p.size]
    assert found
    return found


def chroma(path: Path) -> np.ndarray:
    """How far the colours of each frame are from gray, 8 bits."""
    return np.array([np.abs(f.to_ndarray(format="yuv444p")[1:].astype(int) - 128).mean() for f in decode(path)[0]])


def luma(frame: av.VideoFrame) -> np.ndarray:
    plane = frame.planes[0]
    return np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : plane.width].astype(int)


@pytest.fixture
def reel(tmp_path) -> Path:
    return write(tmp_path / "reel.mkv", pan(PHOTOS[0], 20), sound="aac", subtitles=True)


def test_frames_times_sound_subtitles_and_tags(reel, tmp_path, colorizer):
    seen = []
    out = tmp_path / "out.mkv"
    assert colorize_film(reel, out, colorizer, progress=lambda *step: seen.append(step)) == 20
    assert seen == [(0, 20), (8, 20), (16, 20), (20, 20)]
    assert decode(out)[1] == decode(reel)[1]
    for kind in ("audio", "subtitles"):
        assert packets(out, kind) == packets(reel, kind)
    with av.open(str(out)) as film, av.open(str(reel)) as before:
        video = film.streams.video[0]
        assert (video.codec.name, video.pix_fmt, video.width, video.height) == ("h264", "yuv420p", 96, 64)
        assert [s.type for s in film.streams] == [s.type for s in before.streams]
        assert film.streams.subtitles[0].metadata["language"] == "gle"
        assert film.metadata["title"] == "A reel"
        assert "Colorize (tiny)" in film.metadata["COMMENT"] and "compositeWithTrained" in film.metadata["COMMENT"]
    assert chroma(out).mean() > 2 > chroma(reel).mean()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mkv", "reel.mkv"]


def test_lightness_stays(reel, tmp_path, colorizer):
    colorize_film(reel, tmp_path / "out.mp4", colorizer, warn=str)
    before, after = (
        cv2.cvtColor(decode(file)[0][10].to_ndarray(format="rgb24").astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[..., 0]
        for file in (reel, tmp_path / "out.mp4")
    )
    assert np.abs(before - after).mean() < 1 and abs((before - after).mean()) < 0.5  # L*; most of it is the encoder's


@pytest.mark.parametrize("depth, full, matrix", [(8, False, 1), (8, True, 6), (10, False, 9)])
@pytest.mark.parametrize("half", [False, True])
def test_colours_are_those_that_a_picture_would_get(photo, depth, full, matrix, half):
    coding = Coding(matrix, full, depth)
    rgb = torch.from_numpy(cv2.imread(str(photo))[:300, :400, ::-1] / np.float32(255)).permute(2, 0, 1)[None]
    lab = rgb_to_lab(rgb)
    ab = cv2.resize(lab[0, 1:].permute(1, 2, 0).numpy(), (40, 30), interpolation=cv2.INTER_AREA).transpose(2, 0, 1)
    yuv = coding.from_rgb(lightness_to_gray(lab[:, :1]).repeat(1, 3, 1, 1))[0].round().numpy()
    y, u, v = yuv.astype(np.uint8 if depth == 8 else np.uint16)
    truth = coding.lightness(y, u, v)
    if half:
        u, v = u[::2, ::2].copy(), v[::2, ::2].copy()
    coding.paint(y, u, v, ab)
    u, v = (cv2.resize(plane, (400, 300)) for plane in (u, v))
    result = rgb_to_lab(coding.to_rgb(torch.from_numpy(np.stack((y, u, v)).astype(np.float32))[None]))[0]
    stretched = torch.from_numpy(stretch_rows(ab.transpose(1, 2, 0), 300, 400, 0, 300)).permute(2, 0, 1)  # (2, 300, 400)
    wanted = fit_gamut(torch.cat((truth[None], stretched))[None])[0]
    assert (result[0] - truth).abs().mean() < 0.3 and (result[1:] - wanted[1:]).norm(dim=0).mean() < 1.5


def test_no_saturation_is_gray(reel, tmp_path, colorizer):
    colorize_film(reel, tmp_path / "out.mkv", colorizer, saturation=0)
    assert chroma(tmp_path / "out.mkv").max() < 0.5


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_variable_rate(tmp_path, colorizer, suffix):
    times = np.cumsum([0, 40, 17, 400, 3, 40, 90, 33, 33, 1000, 12, 40]).tolist()
    source = write(tmp_path / f"in{suffix}", pan(PHOTOS[1], 12), times=times, base=Fraction(1, 1000))
    colorize_film(source, tmp_path / f"out{suffix}", colorizer)
    assert decode(tmp_path / f"out{suffix}")[1] == decode(source)[1] == [Fraction(t, 1000) for t in times]


def test_thousandths_of_television(tmp_path, colorizer):
    base = Fraction(1001, 30000)
    source = write(tmp_path / "in.mp4", pan(PHOTOS[1], 9), base=base, sound="aac")
    colorize_film(source, tmp_path / "out.mp4", colorizer)
    assert decode(tmp_path / "out.mp4")[1] == decode(source)[1] == [i * base for i in range(9)]
    assert packets(tmp_path / "out.mp4", "audio") == packets(source, "audio")


@pytest.mark.parametrize("angle, matrix", [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (0, (-1, 0, 0, 1))])
def test_turned_and_mirrored_films_come_out_upright(tmp_path, colorizer, angle, matrix):
    source = write(tmp_path / "in.mp4", pan(PHOTOS[2], 3), aspect=Fraction(4, 3))
    data = bytearray(source.read_bytes())
    place = data.index(b"tkhd") + 44
    a, b, c, d = (65536 * x for x in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    source.write_bytes(data)
    colorize_film(source, tmp_path / "out.mp4", colorizer)
    before, after = luma(decode(source)[0][1]), decode(tmp_path / "out.mp4")[0][1]
    expected = np.rot90(before, -angle // 90) if angle else before[:, ::-1]
    assert after.rotation == 0 and np.abs(luma(after) - expected).mean() < 8
    with av.open(str(tmp_path / "out.mp4")) as film:
        assert film.streams.video[0].sample_aspect_ratio == (Fraction(3, 4) if angle == 90 else Fraction(4, 3))


@pytest.mark.parametrize("width, height", [(97, 65), (96, 65), (97, 64)])
def test_odd_sizes(tmp_path, colorizer, width, height):
    source = write(tmp_path / "in.mkv", pan(PHOTOS[3], 3, width, height), kind="yuv444p")
    colorize_film(source, tmp_path / "out.mkv", colorizer)
    frame = decode(tmp_path / "out.mkv")[0][0]
    assert (frame.width, frame.height, frame.format.name) == (width, height, "yuv444p")
    assert chroma(tmp_path / "out.mkv").mean() > 2


@pytest.mark.parametrize(
    "kind, codec, result",
    [
        ("yuv420p10le", "libx264", "yuv420p10le"),
        ("yuv422p", "libx264", "yuv420p"),
        ("gray", "ffv1", "yuv420p"),
        ("gray", "libx264", "yuv420p"),
        ("gray16le", "ffv1", "yuv420p10le"),
        ("bgr0", "ffv1", "yuv420p"),
        ("yuvj420p", "mjpeg", "yuv420p"),
    ],
)
def test_kinds_of_samples(tmp_path, colorizer, kind, codec, result):
    full = kind in ("yuvj420p", "gray", "gray16le") and codec != "libx264"
    source = write(tmp_path / "in.mkv", pan(PHOTOS[4], 3), kind=kind, codec=codec, full=full)
    colorize_film(source, tmp_path / "out.mkv", colorizer)
    frame = decode(tmp_path / "out.mkv")[0][0]
    assert frame.format.name.replace("yuvj", "yuv") == result and (frame.color_range == 2) == full
    assert chroma(tmp_path / "out.mkv").mean() > 2
    before = decode(source)[0][0].to_ndarray(format="gray" if full else "rgb24").astype(float).mean()
    assert abs(frame.to_ndarray(format="rgb24").mean() - before) < 8


def test_colour_and_sepia_are_coloured_anew(tmp_path, colorizer):
    frames = pan(PHOTOS[5], 3)
    colour = write(tmp_path / "colour.mkv", frames, gray=False)
    colorize_film(colour, tmp_path / "out.mkv", colorizer, saturation=0)
    assert chroma(tmp_path / "out.mkv").max() < 0.5 < chroma(colour).min()
    truth = cv2.cvtColor(frames[1], cv2.COLOR_RGB2LAB)[..., 0].astype(float)
    result = decode(tmp_path / "out.mkv")[0][1].to_ndarray(format="rgb24")
    assert np.abs(cv2.cvtColor(result, cv2.COLOR_RGB2LAB)[..., 0] - truth).mean() < 4


def test_interlaced_stays_interlaced(tmp_path, colorizer):
    source = write(tmp_path / "in.mkv", pan(PHOTOS[0], 4), flags=Flags.interlaced_dct | Flags.interlaced_me)
    assert decode(source)[0][0].interlaced_frame
    colorize_film(source, tmp_path / "out.mkv", colorizer)
    assert all(frame.interlaced_frame for frame in decode(tmp_path / "out.mkv")[0])


def test_what_a_container_cannot_hold_is_said_before_the_work(reel, tmp_path, colorizer):
    said = []
    colorize_film(reel, tmp_path / "out.mp4", colorizer, warn=said.append)
    assert len(said) == 1 and "subtitle stream" in said[0] and ".mkv" in said[0]
    assert packets(tmp_path / "out.mp4", "audio")[3][0] == packets(reel, "audio")[3][0]
    speech = write(tmp_path / "speech.mkv", pan(PHOTOS[0], 9), sound="wavpack")
    with pytest.raises(FilmError, match="cannot hold the sound of .*wavpack.*name a .mkv"):
        colorize_film(speech, tmp_path / "speech.mp4", colorizer)
    assert not (tmp_path / "speech.mp4").exists()


def test_no_films(tmp_path, colorizer):
    (tmp_path / "text.mp4").write_text("no film")
    with av.open(str(tmp_path / "sound.mp4"), "w") as film:
        tone = film.add_stream("aac", rate=8000, layout="mono")
        chunk = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), "s16", "mono")
        chunk.sample_rate = 8000
        film.mux([*tone.encode(chunk), *tone.encode(None)])
    whole = write(tmp_path / "whole.mp4", pan(PHOTOS[0], 9))
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:2000])  # its index is at the end
    for name, message in {
        "text.mp4": "is no film, or damaged .*: copy it again",
        "sound.mp4": "has no moving pictures, only audio",
        "missing.mp4": "cannot be opened",
        "cut.mp4": "is no film, or damaged",
    }.items():
        with pytest.raises(FilmError, match=f"{name} {message}") as caught:
            colorize_film(tmp_path / name, tmp_path / "out.mp4", colorizer)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(FilmError, match="out.avi has no suffix of a film that can be written: use one of .mp4"):
        colorize_film(whole, tmp_path / "out.avi", colorizer)
    for wrong in ({"steady": 2}, {"size": 3}, {"saturation": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            colorize_film(whole, tmp_path / "out.mp4", colorizer, **wrong)
    assert {p.name for p in tmp_path.iterdir()} == {"text.mp4", "sound.mp4", "whole.mp4", "cut.mp4"}


def test_of_a_damaged_or_truncated_film_the_rest_is_kept(tmp_path, colorizer):
    source = write(tmp_path / "in.mkv", pan(PHOTOS[1], 100, speed=2), sound="aac", options={"g": "10"})
    data = source.read_bytes()
    for name, fault, broken in (
        ("cut.mkv", "cut short", data[: len(data) * 6 // 10]),
        ("holed.mkv", "damaged", data[: len(data) // 2] + bytes(900) + data[len(data) // 2 + 900 :]),
    ):
        (tmp_path / name).write_bytes(broken)
        said = []
        count = colorize_film(tmp_path / name, tmp_path / f"out-{name}", colorizer, warn=said.append)
        frames, times = decode(tmp_path / f"out-{name}")
        assert len(frames) == count and 30 < count <= 100 and times == sorted(set(times))
        assert len(said) == 1 and f"{name} is {fault}" in said[0]


def test_kill_and_resume_give_what_an_undisturbed_run_gives(tmp_path, model, colorizer):
    frames = [f for photo in PHOTOS[:3] for f in pan(photo, SEGMENT // 4 * 3, 48, 32, speed=0.6)]
    source = write(tmp_path / "in.mp4", frames, sound="aac", options={"preset": "ultrafast"})
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-m", "colorize", str(source), "--model", model, "--device", "cpu", "-o"]
    target, parts = tmp_path / "out.mp4", tmp_path / ".out.mp4.parts"

    def stop(how: signal.Signals, segment: str, *flags: str) -> int:
        process = subprocess.Popen([*run, str(target), *flags], env=environment)
        while not (parts / segment).exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(how)
        return process.wait()

    assert stop(signal.SIGKILL, "000000.mp4") == -signal.SIGKILL and not target.exists()
    assert len(decode(parts / "000000.mp4")[0]) == SEGMENT
    stamp = (parts / "000000.mp4").stat().st_mtime_ns

    assert stop(signal.SIGINT, "000001.mp4", "--resume") == 130 and not target.exists()
    assert (parts / "000000.mp4").stat().st_mtime_ns == stamp  # it was not made again
    assert not [p for p in tmp_path.iterdir() if p not in (source, parts)]
    assert colorize_film(source, target, colorizer, resume=True) == len(frames)
    assert colorize_film(source, tmp_path / "whole.mp4", colorizer) == len(frames)
    assert packets(target, "video") == packets(tmp_path / "whole.mp4", "video")
    assert decode(target)[1] == decode(source)[1]
    assert packets(target, "audio") == packets(source, "audio")
    assert not parts.exists()


def test_other_settings_start_anew(tmp_path, colorizer, reel):
    parts = tmp_path / ".out.mkv.parts"
    parts.mkdir()
    (parts / "settings.json").write_text("{}")
    (parts / "000000.mp4").write_bytes(b"of another film")
    said = []
    assert colorize_film(reel, tmp_path / "out.mkv", colorizer, resume=True, warn=said.append) == 20
    assert len(said) == 1 and "other settings" in said[0]


def test_steady_films_flicker_less_and_are_no_duller(tmp_path):
    colorizer = Colorizer.from_pretrained(ROOT / "checkpoints" / hub.DEFAULT, device="cpu")
    noise = np.random.default_rng(0)
    frames = [np.clip(f + noise.normal(0, 6, f.shape[:2])[..., None], 0, 255).astype(np.uint8) for f in pan(PHOTOS[2], 30)]
    source = write(tmp_path / "in.mkv", frames, kind="yuv444p", options={"crf": "0"})
    figures = {}
    for steady in (0, 0.5, 1):
        colorize_film(source, tmp_path / f"{steady}.mkv", colorizer, steady=steady, size=64)
        rgb = [
            torch.from_numpy(f.to_ndarray(format="rgb24")).permute(2, 0, 1)[None] for f in decode(tmp_path / f"{steady}.mkv")[0]
        ]
        lab = [rgb_to_lab(f / 255)[0].numpy() for f in rgb]
        jumps = np.mean([warped_difference(a, b) for a, b in zip(lab, lab[1:], strict=False)])
        figures[steady] = jumps, float(colourfulness(torch.cat(rgb) / 255).mean())
    jumps, colours = zip(*figures.values(), strict=True)
    assert jumps[1] < 0.75 * jumps[0] and jumps[2] < 0.5 * jumps[0]
    assert min(colours) > 0.95 * colours[0]


def test_steady_zero_is_frame_by_frame_and_nothing_crosses_a_cut(tmp_path, colorizer):
    shots = [torch.from_numpy(np.stack(pan(p, 12))).permute(0, 3, 1, 2) / 255 for p in (PHOTOS[0], PHOTOS[3])]
    lightness = rgb_to_lightness(torch.cat(shots))[:, 0]  # (24, 64, 96)
    own = torch.cat([colorizer.paint(x[None, None] / 50 - 1) for x in lightness]).numpy()

    def filtered(frames: slice, steady: Steady) -> np.ndarray:
        return np.stack([steady(x, ab) for x, ab in zip(lightness.numpy()[frames], own[frames], strict=True)])

    assert np.array_equal(filtered(slice(24), Steady(0)), own)
    both, halved = filtered(slice(24), Steady(1)), Steady(1)
    assert np.array_equal(both[12:], filtered(slice(12, 24), Steady(1))) and np.array_equal(both[12], own[12])
    assert not np.array_equal(both[13], own[13])
    first = filtered(slice(7), halved)
    assert np.array_equal(both, np.concatenate([first, filtered(slice(7, 24), Steady(1, halved.memory))]))


def test_metrics_of_films():
    still = torch.randint(0, 256, (1, 3, 40, 60), dtype=torch.uint8).repeat(6, 1, 1, 1)
    assert colour_divergence(colour_histograms(still)) == pytest.approx(0, abs=1e-6)
    black_and_white = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    black_and_white[1::2] = 255
    assert colour_divergence(colour_histograms(black_and_white), gaps=(1,)) == pytest.approx(np.log(2))
    assert colour_divergence(colour_histograms(black_and_white), gaps=(2,)) == pytest.approx(0)
    picture = cv2.cvtColor(cv2.imread(str(PHOTOS[0])).astype(np.float32) / 255, cv2.COLOR_BGR2LAB)
    lab = [picture[100:300, 100 + x : 400 + x].transpose(2, 0, 1) for x in (0, 3)]
    assert warped_difference(lab[0], lab[1]) < 1.5 < np.linalg.norm(lab[1] - lab[0], axis=0).mean()
    assert warped_difference(lab[0], lab[1] * np.float32([[[1]], [[2]], [[2]]])) > 5
    assert np.isnan(warped_difference(lab[0], 100 - lab[1]))


def test_command(tmp_path, model, reel, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reels").mkdir()
    reel.rename(tmp_path / "reels" / "a.mkv")
    write(tmp_path / "reels" / "b.avi", pan(PHOTOS[2], 5), codec="mpeg4")
    (tmp_path / "reels" / "c.mp4").write_text("no film")
    run = ["reels", "-o", "out", "--model", model, "--device", "cpu", "--steady", "0.8"]
    assert cli.main(run) == 1
    out, err = capfd.readouterr()
    assert out == "2 coloured, 0 skipped, 1 failed\n" and "c.mp4 is no film" in err
    assert len(decode(tmp_path / "out" / "a.mkv")[0]) == 20 and len(decode(tmp_path / "out" / "b.mkv")[0]) == 5
    assert cli.main(run) == 1
    assert capfd.readouterr()[0] == "0 coloured, 2 skipped, 1 failed\n"
    assert cli.main(["reels/a.mkv", "-o", "a.jpg", "--model", model]) == 2
    assert "use one of .mp4" in capfd.readouterr()[1]
