"""Checkpoints in folders, and on a Hub: the real client, in processes of its own, against the stand-in of hub_server.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch
from safetensors.torch import load_file, save_file

from colorize import atomic, hub
from colorize.hub import CARD, CONFIG, WEIGHTS, CheckpointError
from colorize.models import ConvNet, ConvNetConfig, UNet, UNetConfig
from conftest import PHOTOS
from hub_server import TOKEN, serve

TINY = UNetConfig(num_filters=4, num_downs=5, image_size=64)


def network(mark: float = 0, config: UNetConfig = TINY) -> UNet:
    """A tiny network that can be told from others by its last bias."""
    model = UNet(config).eval()
    torch.nn.init.constant_(model.up[1].bias, mark)
    return model


def mark(model: UNet) -> float:
    return model.up[1].bias[0].item()


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A checkpoint with snapshots; tests that change it take `checkpoint`."""
    folder = hub.save(network(99), tmp_path_factory.mktemp("shared") / "tiny", card="# Tiny\n")
    for epoch in ("epoch-9", "epoch-10", "epoch-002"):
        hub.save(network(int(epoch[6:])), folder / "snapshots" / epoch)
    (folder / "snapshots" / "epoch-011").mkdir()  # without files it is none
    hub.save(network(), folder / "snapshots" / "best")  # neither is this
    return folder


@pytest.fixture
def checkpoint(shared, tmp_path) -> Path:
    return shutil.copytree(shared, tmp_path / "checkpoints" / "tiny")


def refused(call, *words: str) -> None:
    """`call` ends in a CheckpointError of one line that holds all `words`."""
    with pytest.raises(CheckpointError) as caught:
        call()
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert [word for word in words if word not in line] == [], line


# Folders


@pytest.mark.parametrize("model", [network(1), ConvNet(ConvNetConfig(width=4))], ids=["unet", "convnet"])
def test_saved_and_loaded_it_is_the_same_but_for_half_precision(model, tmp_path):
    loaded = hub.load(hub.save(model, tmp_path / "new" / "folder"))
    assert loaded.config == model.config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for (key, before), after in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert after.dtype == (torch.float32 if before.is_floating_point() else before.dtype)
        torch.testing.assert_close(
            after, before.half().to(after.dtype) if before.is_floating_point() else before, rtol=0, atol=0
        )
        assert after.device.type == "cpu", key


def test_a_card_stays_until_another_is_given(checkpoint):
    hub.save(network(), checkpoint)
    assert (checkpoint / CARD).read_text() == "# Tiny\n"
    hub.save(network(), checkpoint, card="# Other\n")
    assert (checkpoint / CARD).read_text() == "# Other\n"


@pytest.mark.parametrize("value", [float("nan"), 70_000.0])
def test_weights_that_float16_cannot_hold_are_not_written(checkpoint, value):
    refused(lambda: hub.save(network(value), checkpoint), "up.1.bias", "not finite")
    assert mark(hub.load(checkpoint)) == 99


@pytest.mark.parametrize("renames", [0, 1])
@pytest.mark.parametrize("config", [TINY, replace(TINY, image_size=32)], ids=["same config", "other config"])
def test_stopped_halfway_two_models_are_never_mixed(checkpoint, monkeypatch, renames, config):
    done = []

    def stop(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(os.rename(source, target))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic.os, "replace", stop)
        hub.save(network(1, config), checkpoint)
    if config == TINY:
        assert mark(hub.load(checkpoint)) == (99 if renames == 0 else 1)
    else:
        refused(lambda: hub.load(checkpoint), "has no config.json")
    assert not [path for path in checkpoint.iterdir() if path.name.startswith(".")]


def test_snapshots_in_the_order_of_their_epochs(shared):
    assert hub.snapshots(shared) == ["epoch-002", "epoch-9", "epoch-10"]
    assert [mark(hub.load(str(shared), epoch)) for epoch in hub.snapshots(shared)] == [2, 9, 10]
    assert hub.snapshots(shared / "snapshots" / "epoch-9") == []


@pytest.mark.parametrize("revision", ["epoch-003", "epoch-011", "..", "", "main"])
def test_no_such_snapshot(shared, revision):
    refused(lambda: hub.load(shared, revision), str(shared), repr(revision), "it has epoch-002, epoch-9, epoch-10")


def test_a_bare_name_is_one_of_the_checkpoints(checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "shipped")
    hub.save(network(5), tmp_path / "shipped" / "other")
    hub.save(network(6), tmp_path / "shipped" / "tiny")  # stands behind the one in the working directory
    assert hub.checkpoints() == {"other": tmp_path / "shipped" / "other", "tiny": Path("checkpoints/tiny")}
    assert [mark(hub.load(name)) for name in hub.checkpoints()] == [5, 99]
    assert mark(hub.load("tiny", "epoch-10")) == 10


@pytest.mark.parametrize(
    "name",
    [
        "typo", "checkpoints/typo", "./user/repo", "../user/repo", "~/typo", "/typo", "a/b/c", r"user\repo", "", "user/",
        "a b/c", "https://the-hub.example/user/repo", "two\nlines", "nul\0", "x" * 5000, Path("user/repo"),
    ],
)  # fmt: skip
def test_a_misspelt_path_is_refused_by_name(checkpoint, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_ask", lambda *_: pytest.fail("it went to the network"))
    monkeypatch.setattr(hub, "SHIPPED", tmp_path / "none")
    for function in (hub.load, hub.snapshots):
        refused(lambda function=function: function(name), repr(str(name)), "neither a folder nor a Hub id", "here are tiny")


def test_a_file_is_no_folder(shared):
    refused(lambda: hub.load(shared / WEIGHTS), str(shared / WEIGHTS), "give the folder")


def settings(**changes):
    """A fault: these settings in config.json."""
    return lambda folder: (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))


def text(content: bytes):
    return lambda folder: (folder / CONFIG).write_bytes(content)


def tensors(change):
    """A fault: `change` is done to the dict of tensors in model.safetensors."""

    def spoil(folder: Path):
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)

    return spoil


def only_a_pickle(folder: Path):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def cut(folder: Path, size: int = -1):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:size])


CONFIG_FAULTS = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no config.json"),
    "a folder in its place": (lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).mkdir()), "has no config.json"),
    "empty config": (text(b""), "damaged"),
    "half a config": (text(b'{"architecture": "un'), "damaged"),
    "binary config": (text(bytes(range(128, 256))), "damaged"),
    "deep config": (text(b"[" * 100_000), "damaged"),
    "a list": (text(b"[1]"), "names no architecture of convnet, unet"),
    "no architecture": (text(b"{}"), "names no architecture of convnet, unet"),
    "unknown architecture": (settings(architecture="transformer"), "names no architecture of convnet, unet"),
    "architecture of a wrong type": (settings(architecture=["unet"]), "names no architecture of convnet, unet"),
    "unknown setting": (settings(depth=3), "'depth' that this version does not know: update colorize"),
    "text for a number": (settings(num_filters="many"), "num_filters must be of type int, not 'many'"),
    "true for a number": (settings(num_filters=True), "num_filters must be of type int, not True"),
    "float for a number": (settings(num_downs=1e9), "num_downs must be of type int, not 1000000000.0"),
    "not a number": (settings(image_size=float("nan")), "image_size must be of type int, not nan"),
    "null": (settings(image_size=None), "image_size must be of type int, not None"),
    "number for a switch": (settings(attention=1), "attention must be of type bool, not 1"),
    "absurd size": (settings(num_filters=10**9), "num_filters must be between 1 and 256, not 1000000000"),
    "negative size": (settings(image_size=-1), "image_size must be between 16 and 4096, not -1"),
}  # fmt: skip
WEIGHTS_FAULTS = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no model.safetensors"),
    "only a pickle": (only_a_pickle, "pickles (pytorch_model.bin, .pt, .ckpt) are never opened; convert"),
    "empty weights": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "damaged"),
    "cut off by a byte": (cut, "damaged"),
    "cut off in its header": (lambda folder: cut(folder, 50), "damaged"),
    "a git-lfs pointer": (lambda folder: (folder / WEIGHTS).write_text("version of git-lfs"), "from git: after `git lfs pull`"),
    "absurd header": (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 4096), "damaged"),
    "settings of another": (settings(num_filters=8), "in 53 tensors: 'blocks.attention.project.bias' is 4, not 8"),
    "absurd together": (settings(num_filters=256, num_downs=10), "does not fit its config.json in"),
    "renamed": (tensors(lambda t: t.update(top=t.pop("up.1.bias"))), "in 2 tensors: 'top' is 2, not missing"),
    "left out": (tensors(lambda t: t.pop("up.1.bias")), "in 1 tensors: 'up.1.bias' is missing, not 2"),
    "too many": (tensors(lambda t: t.update({"a\nb": torch.zeros(())})), r"in 1 tensors: 'a\nb' is one number, not missing"),
    "wrong shape": (tensors(lambda t: t.update({"up.1.bias": torch.zeros(1, 2)})), "'up.1.bias' is 1 x 2, not 2"),
    "integers": (tensors(lambda t: t.update({"up.1.bias": torch.zeros(2, dtype=int)})), "up.1.bias holds integers"),
    "not a number": (tensors(lambda t: t["up.1.bias"].fill_(torch.nan)), "up.1.bias holds integers, infinities or not-a"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "words"), CONFIG_FAULTS.values(), ids=CONFIG_FAULTS)
def test_faults_of_a_config(checkpoint, spoil, words):
    spoil(checkpoint)
    refused(lambda: hub.load(checkpoint), str(checkpoint), CONFIG, words)


@pytest.mark.parametrize(("spoil", "words"), WEIGHTS_FAULTS.values(), ids=WEIGHTS_FAULTS)
def test_faults_of_weights(checkpoint, spoil, words):
    spoil(checkpoint)
    refused(lambda: hub.load(checkpoint), str(checkpoint), WEIGHTS, words)


def test_a_setting_that_is_missing_has_its_default(checkpoint):
    old = json.loads((checkpoint / CONFIG).read_text())
    del old["dropout"], old["image_size"]
    (checkpoint / CONFIG).write_text(json.dumps(old))
    assert hub.load(checkpoint).config == replace(TINY, image_size=UNetConfig.image_size)


# The Hub

CLIENT = """
import json, sys, time
from colorize import hub

for function, *arguments in json.loads(sys.argv[1]):
    begun = time.perf_counter()
    try:
        answer = getattr(hub, function)(*arguments)
        answer = answer if isinstance(answer, (list, str)) else answer.up[1].bias[0].item()
    except hub.CheckpointError as error:
        answer = f"refused: {error}"
    print(json.dumps([answer, time.perf_counter() - begun]))
"""


@pytest.fixture(scope="module")
def repos(shared, tmp_path_factory) -> Path:
    """What the Hub serves."""
    root = tmp_path_factory.mktemp("hub")
    good = root / "user" / "good"
    for revision, number in {"main": 99, "epoch-10": 10, "epoch-9": 9, "v1": 1}.items():
        hub.save(network(number), good / revision, card=f"# {revision}\n")

    def spoilt(name: str, spoil) -> None:
        spoil(shutil.copytree(good / "main", root / "user" / name / "main"))

    spoilt("gated", lambda folder: (folder.parent / "gated").touch())
    spoilt("pickle", only_a_pickle)
    spoilt("data", lambda folder: (folder / CONFIG).unlink())
    spoilt("renamed", WEIGHTS_FAULTS["renamed"][0])
    spoilt("shapes", WEIGHTS_FAULTS["wrong shape"][0])
    spoilt("cut", cut)
    return root


def run(program: str, *arguments: str, url: str, home: Path, root: Path, **env: str) -> str:
    """What a fresh Python prints. huggingface_hub reads its environment when it is imported."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env = {"HF_ENDPOINT": url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(root), **env}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=inherited | env, cwd=home, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def calls(*calls: tuple, **where) -> list:
    """The answers of `colorize.hub` to the calls (function, argument, ...), all in one process; none may take 5 seconds."""
    lines = [json.loads(line) for line in run(CLIENT, json.dumps(calls), **where).splitlines()]
    slow = [(call, seconds) for call, (_, seconds) in zip(calls, lines, strict=True) if seconds > 5]
    assert not slow
    return [answer for answer, _ in lines]


def test_from_the_hub_and_then_without_it(repos, root, tmp_path):
    use = {"home": tmp_path, "root": root}
    fetch = [("load", "user/good"), ("load", "user/good", "epoch-9"), ("load", "user/good", "v1")]
    with serve(repos) as server:
        use["url"] = server.url
        assert calls(*fetch, ("snapshots", "user/good"), ("snapshots", "user/cut"), **use) == [
            99,
            9,
            1,
            ["epoch-9", "epoch-10"],
            [],
        ]
        files = {path.rsplit("/", 1)[1] for path in server.asked if "/resolve/" in path}
        assert files == {CONFIG, WEIGHTS}

        server.busy = "/"
        *known, refusal = calls(*fetch, ("load", "user/good", "epoch-10"), **use)
        assert known == [99, 9, 1]
        assert "user/good at epoch-10 is not in the cache" in refusal and "503" in refusal

        server.busy, server.asked[:] = "", []
        offline = calls(*fetch, ("snapshots", "user/good"), ("load", "user/new"), HF_HUB_OFFLINE="1", **use)
        assert offline[:4] == [99, 9, 1, ["epoch-9"]]
        assert "user/new is not in the cache" in offline[4] and "HF_HUB_OFFLINE" in offline[4]
        assert server.asked == []

    gone = calls(*fetch, ("snapshots", "user/good"), ("load", "user/new"), ("snapshots", "user/new"), **use)
    assert gone[:4] == offline[:4] and gone[5] == []
    assert "user/new is not in the cache" in gone[4] and "Connection refused" in gone[4] and "connect to the network" in gone[4]


def test_what_the_hub_refuses(repos, root, tmp_path):
    expected = {
        ("load", "user/none"): "The Hub has no user/none, or hides it: check the name, or log in",
        ("snapshots", "user/none"): "The Hub has no user/none, or hides it: check the name, or log in",
        ("load", "user/good", "epoch-1"): "has no revision 'epoch-1': its snapshots are epoch-9, epoch-10",
        ("load", "user/gated"): "user/gated is gated: accept its terms",
        ("load", "user/pickle"): "user/pickle has no model.safetensors: a checkpoint is config.json and model.safetensors, and",
        ("load", "user/data"): "user/data has no config.json",
        ("load", "user/renamed"): "does not fit its config.json in 2 tensors: 'top' is 2, not missing",
        ("load", "user/shapes"): "'up.1.bias' is 1 x 2, not 2",
        ("load", "user/cut"): "fetch it again with `hf download user/cut --revision main --force-download`",
        ("load", "user/good--bad"): "'user/good--bad' is no Hub id",
    }  # fmt: skip
    with serve(repos) as server:
        answers = calls(*expected, url=server.url, home=tmp_path, root=root)
    for answer, words in zip(answers, expected.values(), strict=True):
        assert answer.startswith("refused: ") and words in answer
        assert len(answer.splitlines()) == 1
    assert not [path for path in server.asked if path.endswith(".bin")]


def test_use_in_another_project(repos, root, tmp_path):
    """As the README says it."""
    readme = (root / "README.md").read_text()
    snippets = [b for b in re.findall(r"```python\n(.*?)```", readme, flags=re.S) if "user/repo" in b]
    assert len(snippets) == 2 and max(len(snippet.splitlines()) for snippet in snippets) <= 12
    assert "hf_hub_download" in snippets[1]
    show = "\nprint(model.up[1].bias[0].item(), next(model.parameters()).dtype)\n"
    program = "".join(snippet + show for snippet in snippets).replace("user/repo", "user/good").replace("epoch-010", "epoch-10")
    with serve(repos) as server:
        printed = run(program, url=server.url, home=tmp_path, root=root)
    assert printed.split() == ["10.0", "torch.float32", "99.0", "torch.float32"]


# To the Hub

READ_BACK = """
import sys
from pathlib import Path
from huggingface_hub import hf_hub_download
from colorize import Colorizer, hub

folder, photo = map(Path, sys.argv[1:])
for revision in (None, *hub.snapshots("user/new")):
    here, there = hub.load(folder, revision), hub.load("user/new", revision)
    assert there.config == here.config
    assert all(there.state_dict()[key].equal(tensor) for key, tensor in here.state_dict().items())
    picture = Colorizer(there)(photo).pixels
    assert (picture == Colorizer(here)(photo).pixels).all() and (picture != picture[..., :1]).any()
    print(revision)
for name in ("config.json", "model.safetensors", "README.md", "curves.png", "photographs.jpg"):
    assert Path(hf_hub_download("user/new", name)).read_bytes() == (folder / name).read_bytes()
"""


@pytest.fixture
def finished(checkpoint) -> Path:
    """A checkpoint whose card shows pictures."""
    picture = cv2.imread(str(PHOTOS[0]))[:64, :64]
    cv2.imwrite(str(checkpoint / "curves.png"), picture)
    cv2.imwrite(str(checkpoint / "photographs.jpg"), picture)
    cv2.imwrite(str(checkpoint / ".left-over.png"), picture)
    return checkpoint


@pytest.fixture
def server(tmp_path):
    (tmp_path / "hub").mkdir()
    with serve(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def push(server, root, tmp_path):
    """`push(folder, repo, ...)` -> the answer of `hub.push` in a process of its own; keywords are of its environment."""

    def push(folder: Path, repo: str = "user/new", *options, **env) -> str:
        env = {"url": server.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", **env}
        return calls(("push", str(folder), repo, *options), home=tmp_path, root=root, **env)[0]

    return push


def titles(server) -> list[str]:
    return [title for title, _ in server.commits]


def test_pushed_it_is_read_back(finished, server, push, root, tmp_path):
    assert push(finished) == f"{server.url}/user/new"
    assert titles(server) == ["Snapshot epoch-002", "Snapshot epoch-9", "Snapshot epoch-10", "The checkpoint"]
    assert server.commits[0][1] == [CARD, CONFIG, "curves.png", WEIGHTS, "photographs.jpg"]
    home = tmp_path / "another machine"
    home.mkdir()
    printed = run(READ_BACK, str(finished), str(PHOTOS[-1]), url=server.url, home=home, root=root)
    assert printed.split() == ["None", "epoch-002", "epoch-9", "epoch-10"]


def test_pushed_again_only_what_is_new_is_sent(finished, server, push, tmp_path):
    page = push(finished)
    server.commits.clear()
    assert push(finished) == page and server.commits == []

    (finished / CARD).write_text("# Another card\n")
    assert push(finished) == page and titles(server) == ["The checkpoint"]

    server.commits.clear()
    hub.save(network(3), finished / "snapshots" / "epoch-9")
    shutil.rmtree(finished / "snapshots" / "epoch-002")
    assert push(finished) == page and titles(server) == ["Snapshot epoch-9", "The checkpoint"]
    there = tmp_path / "hub" / "user" / "new"
    assert {r.name: mark(hub.load(r)) for r in there.iterdir()} == {"main": 99, "epoch-002": 2, "epoch-9": 3, "epoch-10": 10}


def test_broken_off_it_goes_on(finished, server, push, tmp_path):
    server.busy = "/tag/"
    answer = push(finished)
    assert answer.startswith(f"refused: {finished} was not pushed to user/new (Server error '503") and "push again" in answer
    assert titles(server) == ["Snapshot epoch-002"]

    server.busy = ""
    assert push(finished) == f"{server.url}/user/new"
    assert titles(server) == ["Snapshot epoch-002", "Snapshot epoch-9", "Snapshot epoch-10", "The checkpoint"]
    assert mark(hub.load(tmp_path / "hub" / "user" / "new" / "epoch-002")) == 2


REFUSED_PUSHES = {
    "no token": ((), {"HF_TOKEN": ""}, "as there is no token: log in with `hf auth login`, or set HF_TOKEN"),
    "a token to read with": ((), {"HF_TOKEN": "hf_reader"}, "This token may not write here): log in with `hf auth login`"),
    "somebody else's repository": (("user/old", False, "hf_reader"), {}, "with a token that may write to user/old"),
    "no network": ((), {"url": "http://127.0.0.1:9"}, "Connection refused): put that right and push again"),
    "offline": ((), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE"),
    "no name": (("user/new--er",), {}, "Cannot have -- or .. in repo_id: 'user/new--er'"),
}


@pytest.mark.parametrize(("arguments", "env", "words"), REFUSED_PUSHES.values(), ids=REFUSED_PUSHES)
def test_pushes_that_are_refused(finished, server, push, tmp_path, arguments, env, words):
    hub.save(network(), tmp_path / "hub" / "user" / "old" / "main")
    answer = push(finished, *arguments, **env)
    assert answer.startswith(f"refused: {finished} was not pushed") and words in answer and len(answer.splitlines()) == 1
    assert server.commits == [] and server.blobs == {}


def test_a_card_that_the_hub_refuses(finished, server, push):
    (finished / CARD).write_text("---\nlicense: mine\n---\n")
    assert 'Invalid metadata in README.md. - "license" must be one of' in push(finished)
    assert server.commits == [] and server.blobs == {}


def test_before_a_push_all_of_it_is_checked(finished, server, push):
    cut(finished / "snapshots" / "epoch-9")
    assert "epoch-9/model.safetensors is damaged" in push(finished)
    assert "user/repo is no folder on this machine" in push("user/repo")
    assert "neither a folder nor a Hub id" in push(finished / "none")
    assert server.asked == []
