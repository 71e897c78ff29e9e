"""The app as its users meet it: in a real browser, and through its API."""

import csv
import os
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import cv2
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from colorize import hub
from conftest import PHOTOS
from test_film import chroma, decode, packets, pan, write

CHROMIUM = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
).split()
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def url(root, tmp_path_factory):
    """The app, started as the README says, with no network to lean on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("app")
    environment = {**OFFLINE, "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(folder / "cache")}
    with open(folder / "log", "w+") as log:
        app = subprocess.Popen([sys.executable, "app.py"], cwd=root, env=environment, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}/"
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    urlopen(url, timeout=5).close()
                    break
                except (URLError, TimeoutError):
                    alive = app.poll() is None and time.monotonic() < deadline
                    assert alive, f"the app did not start:\n{(folder / 'log').read_text()}"
                    time.sleep(0.2)
            yield url
        finally:
            app.terminate()
            app.wait(10)
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="module")
def page(url):
    """A page of the app; on leaving, no other host may have been asked for anything."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    hosts = set()
    with playwright.sync_playwright() as p, p.chromium.launch(executable_path=chromium, args=CHROMIUM) as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(30_000)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
        page.goto(url)
        yield page
    assert hosts - {None} == {"127.0.0.1"}  # None: data: and blob: addresses


@pytest.fixture(scope="module")
def client(url):
    return Client(url, verbose=False)


@pytest.fixture
def fake(tmp_path):
    path = tmp_path / "holiday.jpg"
    path.write_text("Dear diary, this is no picture.\n")
    return path


def in_colour(path) -> bool:
    return np.ptp(cv2.imread(str(path)), axis=2).max() > 8


def upload(page, path):
    page.locator("#photo input[type=file]").first.set_input_files(path)


def loaded(page, selector: str):
    """The source of the one picture there, once the browser can show it."""
    page.wait_for_function(
        "s => { const i = document.querySelector(s); return i?.complete && i.naturalWidth > 0 }", arg=selector
    )
    return page.locator(selector).first.get_attribute("src")


def tab(page, name: str):
    page.get_by_role("tab", name=name).click()


def test_a_photo_fills_three_tabs_and_comes_back_in_colour(page, root, tmp_path):
    photo = root / "examples" / "killarney-1910.jpg"
    upload(page, photo)

    page.locator("#download").wait_for(state="visible")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").click()
    assert download.value.suggested_filename == "killarney-1910-colorized.png"
    download.value.save_as(tmp_path / "colour.png")
    assert cv2.imread(str(tmp_path / "colour.png")).shape == cv2.imread(str(photo)).shape
    assert in_colour(tmp_path / "colour.png")
    assert page.locator("#result .image-container img").count() >= 2  # before and after

    tab(page, "Grayscale")
    assert loaded(page, "#result .tabitem:not([style*=none]) .image-frame img")

    tab(page, "Epoch by epoch")
    epochs = hub.snapshots(root / "checkpoints" / hub.DEFAULT)
    assert len(epochs) >= 4
    captions = page.locator("#result .album .caption-label")
    captions.nth(len(epochs) - 1).wait_for()
    assert captions.all_inner_texts() == [f"Epoch {int(epoch.removeprefix('epoch-'))}" for epoch in epochs]

    frame, slider = "#result .tabitem:not([style*=none]) .image-frame img", page.get_by_role("slider")
    seen = [page.locator("#result .album img").nth(i).get_attribute("src") for i in range(len(epochs))]
    assert len(set(seen)) == len(epochs)
    assert loaded(page, frame) == seen[-1]
    slider.press("Home")
    page.wait_for_function("([s, src]) => document.querySelector(s).src === src", arg=[frame, seen[0]])
    slider.press("ArrowRight")
    page.wait_for_function("([s, src]) => document.querySelector(s).src === src", arg=[frame, seen[1]])
    page.get_by_label("Thumbnail 3 of").first.click()
    page.wait_for_function("([s, src]) => document.querySelector(s).src === src", arg=[frame, seen[2]])


def test_an_example_colours_and_names_who_took_it(page, root):
    with open(root / "examples" / "SOURCES.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    credits = page.locator("#settings .caption-label").all_inner_texts()
    assert len(credits) == len(rows)
    assert all(row["title"] in credit for row, credit in zip(rows, credits, strict=True))

    tab(page, "Colorized")
    before = loaded(page, "#result .image-container img")
    page.locator("#settings .album button").nth(2).click()
    page.wait_for_function("src => document.querySelector('#result .image-container img')?.src !== src", arg=before)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").click()
    assert download.value.suggested_filename == rows[2]["file"].replace(".jpg", "-colorized.png")


def test_a_file_that_is_no_picture_gets_a_friendly_word(page, fake):
    upload(page, fake)
    message = page.locator(".toast-body").first
    message.wait_for()
    assert "holiday.jpg is not a picture" in message.inner_text()
    assert "/tmp" not in message.inner_text() and "cache" not in message.inner_text()
    tab(page, "Colorized")
    page.locator("#download").wait_for(state="hidden")  # nothing of the last picture is left


def test_api_returns_a_16_bit_png_of_a_16_bit_scan(client, root, tmp_path):
    gray = cv2.imread(str(root / "examples" / "migrant-mother-1936.jpg"), cv2.IMREAD_GRAYSCALE)
    scan = tmp_path / "deep scan.tif"
    cv2.imwrite(str(scan), gray.astype(np.uint16) * 257)
    result = client.predict(handle_file(scan), model="unet-attention", saturation=1.5, api_name="/colorize")
    pixels = cv2.imread(result, cv2.IMREAD_UNCHANGED)
    assert pixels.dtype == np.uint16 and pixels.shape == (*gray.shape, 3)
    assert in_colour(result)


def test_api_returns_the_epochs(client, root):
    photo = root / "examples" / "inuit-woman-1903.jpg"
    shots = client.predict(handle_file(photo), size=128, api_name="/epochs")
    assert [shot["caption"] for shot in shots][:2] == ["Epoch 1", "Epoch 2"]
    assert in_colour(shots[-1]["image"])


@pytest.mark.parametrize("model", ["nobody/nothing", "../runs", "/etc", ""])
def test_api_refuses_models_that_cannot_be_had(client, root, model):
    with pytest.raises(AppError, match="nobody/nothing|is no model") as error:
        client.predict(handle_file(root / "examples" / "dust-bowl-home.jpg"), model=model, api_name="/colorize")
    assert str(root) not in str(error.value)


def test_api_refuses_what_is_no_picture(client, fake):
    with pytest.raises(AppError, match="^holiday.jpg is not a picture"):
        client.predict(handle_file(fake), api_name="/colorize")


def test_api_shows_endpoints_with_plain_names(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    first = {"/colorize": "photo", "/epochs": "photo", "/batch": "photos", "/film": "film"}
    assert set(endpoints) == set(first)
    for name, endpoint in endpoints.items():
        last = ["steady"] if name == "/film" else []
        assert [p["parameter_name"] for p in endpoint["parameters"]] == [first[name], "model", "size", "saturation", *last]


def test_many_photos_fill_an_album_and_a_zip(page, root, fake, tmp_path):
    photos = [root / "examples" / "killarney-1910.jpg", fake, root / "examples" / "inuit-woman-1903.jpg"]
    tab(page, "Batch")
    page.locator("#photos input[type=file]").first.set_input_files(photos)
    page.get_by_text("inuit-woman-1903").first.wait_for()
    page.get_by_role("button", name="Colorize all").click()
    page.wait_for_function("document.querySelector('#report textarea').value.startsWith('2 of 3 are in colour')")
    assert "holiday.jpg is not a picture" in page.locator("#report textarea").input_value()
    names = ["killarney-1910-colorized.jpg", "inuit-woman-1903-colorized.jpg"]
    assert page.locator("#result .tabitem:not([style*=none]) .caption-label").all_inner_texts() == names
    with page.expect_download() as download:
        page.get_by_role("button", name="Download zip").click()
    download.value.save_as(tmp_path / "colour.zip")
    shutil.unpack_archive(tmp_path / "colour.zip", tmp_path / "colour")
    for photo, name in zip(photos[::2], names, strict=True):
        assert cv2.imread(str(tmp_path / "colour" / name)).shape == cv2.imread(str(photo)).shape
        assert in_colour(tmp_path / "colour" / name)


def test_api_colours_many_and_refuses_too_many(client, root, fake, tmp_path):
    photo = root / "examples" / "dust-bowl-home.jpg"
    shots, archive, report = client.predict([handle_file(photo), handle_file(photo)], saturation=0, api_name="/batch")
    assert len(shots) == 2 and report == "2 of 2 are in colour."
    shutil.unpack_archive(archive, tmp_path)
    both = [tmp_path / "dust-bowl-home-colorized.jpg", tmp_path / "2-dust-bowl-home-colorized.jpg"]
    assert not any(map(in_colour, both))

    assert client.predict([handle_file(fake)], api_name="/batch")[:2] == ([], None)
    with pytest.raises(AppError, match="more than 100 photographs"):
        client.predict([handle_file(fake)] * 101, api_name="/batch")


@pytest.fixture(scope="module")
def reel(tmp_path_factory):
    """Half a second of film, with sound."""
    return write(tmp_path_factory.mktemp("reel") / "reel.mp4", pan(PHOTOS[0], 12), sound="aac")


def test_a_film_comes_back_in_colour_with_its_sound(client, reel):
    result = client.predict(handle_file(reel), model="unet-attention", steady=0.8, api_name="/film")
    assert os.path.basename(result) == "reel-colorized.mp4"
    assert decode(result)[1] == decode(reel)[1] and packets(result, "audio") == packets(reel, "audio")
    assert chroma(result).mean() > 1 > chroma(reel).mean()


def test_the_film_tab(page, reel, tmp_path):
    tab(page, "Film")
    page.locator("#result .tabitem:not([style*=none]) input[type=file]").set_input_files(reel)
    page.locator("#result .tabitem:not([style*=none]) video").first.wait_for()
    page.get_by_role("button", name="Colour the film").click()
    page.locator("#result .tabitem:not([style*=none]) video").nth(1).wait_for()
    with page.expect_download() as download:
        page.locator("#result .tabitem:not([style*=none])").get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "colour.mp4")
    assert len(decode(tmp_path / "colour.mp4")[0]) == 12


def test_api_refuses_what_is_no_film(client, fake):
    with pytest.raises(AppError, match="^holiday.jpg .* film"):
        client.predict(handle_file(fake), api_name="/film")


def test_two_at_once_get_their_own_picture(client, root):
    photos = [root / "examples" / name for name in ("killarney-1910.jpg", "migrant-mother-1936.jpg")] * 2
    jobs = [client.submit(handle_file(photo), api_name="/colorize") for photo in photos]
    for photo, job in zip(photos, jobs, strict=True):
        result = job.result(timeout=60)
        assert os.path.basename(result) == f"{photo.stem}-colorized.png"
        gray, light = (cv2.cvtColor(cv2.imread(str(p)), cv2.COLOR_BGR2LAB)[..., 0] for p in (photo, result))
        assert np.abs(gray.astype(int) - light).mean() < 2


def test_importing_starts_and_loads_nothing(root):
    code = """
import socket, torch, safetensors.torch
def refuse(*_, **__): raise SystemExit("something happened on import")
socket.socket.bind = socket.socket.connect = safetensors.torch.load_file = torch.nn.Module.load_state_dict = refuse
import app
print(app.colorizer.cache_info().currsize)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=OFFLINE, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr
