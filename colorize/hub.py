"""Checkpoints: a folder, or a repository of the Hugging Face Hub, with `config.json`, `model.safetensors` and `README.md`.

A checkpoint may keep generator snapshots of earlier epochs: in `snapshots/epoch-NNN/` of a folder, as tags `epoch-NNN` on the
Hub. Weights are stored in float16 and loaded in float32. Only JSON and safetensors are ever fetched or opened.
"""

import hashlib
import json
import os
import re
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    get_hf_file_metadata,
    get_token,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, whichever this version of huggingface_hub talks through
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import nn

from .atomic import atomic
from .models import MODELS

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
DEFAULT = "efficient-unet-gan"
SHIPPED = Path(__file__).parents[1] / "checkpoints"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
EPOCH = re.compile(r"epoch-(\d+)", re.ASCII)


class CheckpointError(ValueError):
    """A checkpoint cannot be used: one line that names the file and the remedy."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # what it quotes (a name, another library) may have more lines


def load(name: str | Path, revision: str | None = None) -> nn.Module:
    """The network of a checkpoint: float32, on the CPU, in eval mode, its parameters frozen.

    `name` is a folder, the bare name of one of `checkpoints()`, or a Hub id (`user/repo`). `revision` is a snapshot
    (`epoch-003`); on the Hub it may be any tag, branch or commit. What the Hub once gave also loads without a network.

    Raises:
        CheckpointError: anything is missing, damaged, unknown to this version, or out of reach, or does not fit to the last
            key and shape. It comes within seconds, and for a misspelt path without asking the network.
    """
    folder = _local(name)
    if folder is None:
        remedy = f"fetch it again with `hf download {name} --revision {revision or 'main'} --force-download`"
        return _read(_fetch(name, revision), remedy)
    if revision is not None:
        if revision not in (epochs := snapshots(folder)):
            raise CheckpointError(f"{folder} has no snapshot {revision!r}: it has {', '.join(epochs) or 'none'}")
        folder = folder / "snapshots" / revision
    return _read(folder, "copy or download it again (from git: after `git lfs pull`)")


def snapshots(name: str | Path) -> list[str]:
    """The snapshots of a checkpoint, `["epoch-001", "epoch-002", ...]`, in the order of their epochs; `[]` if it has none.

    Of a Hub id these are the tags; without a network, those in the cache.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    folder = _local(name)
    names = _tags(name) if folder is None else [config.parent.name for config in folder.glob(f"snapshots/*/{CONFIG}")]
    return sorted(filter(EPOCH.fullmatch, names), key=lambda epoch: int(EPOCH.fullmatch(epoch)[1]))


def checkpoints(*roots: str | Path) -> dict[str, Path]:
    """Name and folder of every checkpoint directly under `roots`, by name.

    Without `roots`: those that come with this project, and those in the working directory's `checkpoints/`, which go first.
    """
    folders = [config.parent for root in roots or (SHIPPED, "checkpoints") for config in Path(root).glob(f"*/{CONFIG}")]
    return dict(sorted({folder.name: folder for folder in folders}.items()))


def save(model: nn.Module, folder: str | Path, card: str | None = None) -> Path:
    """Write a network as a checkpoint folder, weights in float16. Each file appears whole or not at all.

    `card` is the text of the model card; without it an existing README.md is left as it is. Stopped halfway, the folder holds
    the old checkpoint or the new one, or, where their configs differ, possibly none: weights without a config.json.

    Raises:
        CheckpointError: a weight is not a number, or too large for float16. Nothing is written.
    """
    folder = Path(folder)
    config = json.dumps(asdict(model.config), indent=2) + "\n"
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    if bad := [k for k, v in weights.items() if not v.isfinite().all()]:
        raise CheckpointError(f"{folder} was not written, as {bad[0]} is not finite in float16: has the training diverged?")

    folder.mkdir(parents=True, exist_ok=True)
    old = folder / CONFIG
    with atomic(old) as config_path, atomic(folder / WEIGHTS) as weights_path:  # the inner one, the weights, is renamed first
        config_path.write_text(config)
        weights_path.write_bytes(to_safetensors(weights, metadata={"format": "pt"}))  # save_file makes it unreadable for others
        if old.is_file() and old.read_bytes() != config.encode():
            old.unlink()  # a config never stands beside another model's weights
    if card is not None:
        with atomic(folder / CARD) as path:
            path.write_text(card)
    return folder


def push(folder: str | Path, repo: str, private: bool = False, token: str | None = None) -> str:
    """Send a checkpoint folder to the Hub as `repo` (`user/name`) -> the address of its page.

    A repository that is not there is made, and `private` counts for that one only. Each snapshot becomes a commit with a tag of
    its name, in the order of their epochs, and the checkpoint itself the last commit, so that `load(repo)` gives this one and
    `load(repo, "epoch-003")` that one. README.md goes along, and so do the pictures beside it, `*.png` and `*.jpg`.

    What the Hub has is not sent again: the same push does nothing after a success, and after a failure it goes on. A tag with
    other weights than the folder's is moved, and the old weights stay in the history; what only the Hub has stays as it is.

    Raises:
        CheckpointError: the checkpoint or a snapshot does not load, or there is no token: nothing was sent. Or the Hub refused,
            or is out of reach: what had arrived stays.
    """
    source = _local(folder)
    if source is None:
        raise CheckpointError(f"{folder} is no folder on this machine: give the folder of a checkpoint")
    epochs = snapshots(source)
    for revision in (None, *epochs):
        load(source, revision)
    if not (token or get_token()):
        raise CheckpointError(f"{source} was not pushed, as there is no token: log in with `hf auth login`, or set HF_TOKEN")

    api = HfApi(token=token)
    pictures = [path for path in sorted(source.glob("[!.]*")) if path.suffix in (".png", ".jpg")]
    extras = [path for path in (source / CARD, *pictures) if path.is_file()]

    def commit(weights_of: Path, message: str) -> str:
        files = [weights_of / CONFIG, weights_of / WEIGHTS, *extras]  # with the first commit the Hub judges the card too
        return api.create_commit(repo, [CommitOperationAdd(file.name, file) for file in files], commit_message=message).oid

    try:
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        tags = {tag.name for tag in api.list_repo_refs(repo).tags}
        for epoch in epochs:
            snapshot = source / "snapshots" / epoch
            if epoch in tags and _is_at(api, repo, epoch, snapshot):
                continue
            oid = commit(snapshot, f"Snapshot {epoch}")
            if epoch in tags:
                api.delete_tag(repo, tag=epoch)
            api.create_tag(repo, tag=epoch, revision=oid)
        commit(source, "The checkpoint")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: an upload through hf_xet failed
        reason = " ".join((getattr(error, "server_message", None) or str(error) or type(error).__name__).split())
        remedy = "put that right and push again; what has arrived is not sent twice"
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            remedy = f"log in with `hf auth login`, with a token that may write to {repo}"
        raise CheckpointError(f"{source} was not pushed to {repo} ({reason}): {remedy}") from error
    return url


# Where a name leads: this machine or the Hub


def _local(name: str | Path) -> Path | None:
    """The folder that `name` means, or None for a Hub id. The file system alone decides, so that a typo waits for no network.

    Raises:
        CheckpointError: it can be neither. `checkpoints/typo` looks like a Hub id, but begins with a folder that is here.
    """
    path = os.path.expanduser(name)
    if name and os.path.isdir(path):
        return Path(path)
    if folder := checkpoints().get(str(name)):
        return folder
    if isinstance(name, str) and HUB_ID.fullmatch(name) and not os.path.isdir(name.partition("/")[0]):
        return None
    if os.path.isfile(path):
        raise CheckpointError(f"{name} is a file: give the folder that holds it")
    parent = os.path.dirname(path)
    there = (checkpoints(parent) if os.path.isdir(parent) else {}) or checkpoints()
    raise CheckpointError(f"{str(name)!r} is neither a folder nor a Hub id (user/repo): here are {', '.join(there) or 'none'}")


def _missing(where: str | Path, file: str) -> CheckpointError:
    return CheckpointError(
        f"{where} has no {file}: a checkpoint is {CONFIG} and {WEIGHTS}, and pickles (pytorch_model.bin, .pt, .ckpt) are never "
        "opened; convert those with safetensors.torch.save_file"
    )


# The Hub


def _fetch(repo: str, revision: str | None) -> Path:
    """Download both files of one commit, or find them in the cache -> the folder they are in.

    Raises:
        CheckpointError: the Hub does not have them, or cannot be reached and the cache does not have them.
    """
    silence = _ask(repo, revision)
    try:
        config = Path(hf_hub_download(repo, CONFIG, revision=revision, local_files_only=silence is not None))
        commit = config.parent.name  # a push that comes between the two downloads must not mix them
        hf_hub_download(repo, WEIGHTS, revision=commit, local_files_only=silence is not None)
    except RemoteEntryNotFoundError as error:
        raise _missing(repo, WEIGHTS) from error
    except (HTTPError, OSError) as error:
        at = f" at {revision}" if revision else ""
        raise CheckpointError(
            f"{repo}{at} is not in the cache and could not be fetched ({silence or _first_line(error)}): "
            "connect to the network and try again, or give the folder of a checkpoint"
        ) from error
    return config.parent


def _ask(repo: str, revision: str | None = None) -> str | None:
    """Ask the Hub for a checkpoint -> None if it is there, or the reason why no answer came.

    Asks once and waits 3 seconds (or HF_HUB_ETAG_TIMEOUT): `hf_hub_download` would retry for half a minute with no network.

    Raises:
        CheckpointError: the answer is no.
    """
    try:
        timeout = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or 3)
        get_hf_file_metadata(hf_hub_url(repo, CONFIG, revision=revision), timeout=timeout)
    except HFValidationError as error:
        raise CheckpointError(f"{repo!r} is no Hub id: {error}") from error
    except GatedRepoError as error:  # is a RepositoryNotFoundError too
        raise CheckpointError(f"{repo} is gated: accept its terms on its page, then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"The Hub has no {repo}, or hides it: check the name, or log in with `hf auth login`") from error
    except RevisionNotFoundError as error:
        epochs = ", ".join(snapshots(repo)) or "none"
        raise CheckpointError(f"{repo} has no revision {revision!r}: its snapshots are {epochs}") from error
    except RemoteEntryNotFoundError as error:
        raise _missing(repo, CONFIG) from error
    except (HTTPError, OSError) as error:  # no network, an offline mode, a Hub that is down
        return _first_line(error)
    return None


def _tags(repo: str) -> list[str]:
    """The tags of a repository; without a network, those whose weights are in the cache."""
    if _ask(repo) is None:
        with suppress(HTTPError, OSError):
            return [tag.name for tag in HfApi().list_repo_refs(repo).tags]
    refs = Path(HF_HUB_CACHE, f"models--{repo.replace('/', '--')}", "refs")
    return [ref.name for ref in refs.glob("*") if isinstance(try_to_load_from_cache(repo, WEIGHTS, revision=ref.name), str)]


def _is_at(api: HfApi, repo: str, revision: str, folder: Path) -> bool:
    """Whether the Hub has the folder's config and weights at a revision, by the names that git and git-lfs give to contents."""

    def names(content: bytes) -> tuple[str, str]:
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()

    found = api.get_paths_info(repo, [CONFIG, WEIGHTS], revision=revision)
    return len(found) == 2 and all(
        (file.lfs.sha256 if file.lfs else file.blob_id) in names((folder / file.path).read_bytes()) for file in found
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Two files -> a network


def _read(folder: Path, remedy: str) -> nn.Module:
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise _missing(folder, file)
    model = _read_config(folder / CONFIG, remedy)
    model.load_state_dict(_read_weights(folder / WEIGHTS, model.state_dict(), remedy), strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _read_config(path: Path, remedy: str) -> nn.Module:
    """-> the network that a config.json describes, on the meta device: shapes alone, no memory.

    A setting that is missing has its default: the file is older than the setting. One that is unknown is an error: the file
    is newer, and a network that left it out might load and paint something else.
    """
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): {remedy}") from error
    if not isinstance(settings, dict) or settings.get("architecture") not in list(MODELS):
        raise CheckpointError(f"{path} names no architecture of {', '.join(MODELS)}: update colorize, or {remedy}")
    network, config_class = MODELS[settings["architecture"]]
    types = {field.name: field.type for field in fields(config_class)}
    for key, value in settings.items():
        if key not in types:
            raise CheckpointError(f"{path} has a setting {key!r:.40} that this version does not know: update colorize")
        if type(value) is not types[key]:  # not isinstance: to Python, true is an int
            raise CheckpointError(f"{path}: {key} must be of type {types[key].__name__}, not {value!r:.40}: {remedy}")
    try:
        with torch.device("meta"):
            return network(config_class(**settings))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}: {remedy}") from error


def _read_weights(path: Path, wanted: dict[str, torch.Tensor], remedy: str) -> dict[str, torch.Tensor]:
    """-> the tensors of a safetensors file, with the keys, shapes and types of `wanted`, which may be on the meta device.

    Keys and shapes are compared in the file's header, so a config with absurd sizes is found out before memory is taken.
    """
    weights = {}
    try:
        with safe_open(path, "pt") as file:
            found = {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}
            shapes = {key: tensor.shape for key, tensor in wanted.items()}
            if wrong := sorted(key for key in found.keys() | shapes.keys() if found.get(key) != shapes.get(key)):
                raise CheckpointError(
                    f"{path} does not fit its {CONFIG} in {len(wrong)} tensors: {wrong[0]!r:.80} is {_shape(found, wrong[0])}, "
                    f"not {_shape(shapes, wrong[0])}: take both files from one checkpoint, or {remedy}"
                )
            for key, like in wanted.items():
                tensor = file.get_tensor(key)
                weights[key] = tensor.to(like.dtype)
                if tensor.is_floating_point() != like.is_floating_point() or not weights[key].isfinite().all():
                    raise CheckpointError(f"{path}: {key} holds integers, infinities or not-a-numbers, no weights: {remedy}")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): {remedy}") from error
    return weights


def _shape(shapes: dict[str, torch.Size], key: str) -> str:
    return " x ".join(map(str, shapes[key])) or "one number" if key in shapes else "missing"
