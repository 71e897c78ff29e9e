"""A stand-in for the Hugging Face Hub on the loopback interface: enough for the real client to download from it and push to it.

It serves a folder: `ROOT/user/repo/REVISION/file`. The revision `main` is a branch, every other one a tag; equal files make
equal commits. A repository that holds a file named `gated` is a gated one. Everybody may read; to write takes `TOKEN`.
Weights and pictures arrive by git-lfs, as on the Hub; Xet is not spoken here, so a client that pushes sets HF_HUB_DISABLE_XET.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_writer"
LFS = {".safetensors", ".png"}


def commit(revision: Path) -> str:
    """40 hexadecimal digits that follow from the files of a revision."""
    files = sorted(path for path in revision.rglob("*") if path.is_file())
    return hashlib.sha1(b"".join(str(f.relative_to(revision)).encode() + f.read_bytes() for f in files)).hexdigest()


def oid(file: Path) -> str:
    """What git-lfs or git calls the content of a file."""
    body = file.read_bytes()
    return (hashlib.sha256(body) if file.suffix in LFS else hashlib.sha1(b"blob %d\0" % len(body) + body)).hexdigest()


def find(repo: Path, revision: str) -> Path | None:
    """The folder of a branch, tag or commit."""
    return next((folder for folder in repo.glob("*/") if revision in (folder.name, commit(folder))), None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(path)
        command = self.command.replace("HEAD", "GET")
        if self.server.busy and self.server.busy in path:
            return self.answer(503)
        if command in ("POST", "DELETE") and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.json({"error": "This token may not write here"}, 403)
        for (wanted, pattern), method in ROUTES.items():
            if wanted == command and (match := re.fullmatch(pattern.replace("REPO", "([^/]+/[^/]+)"), path)):
                repo, *rest = match.groups() or [""]
                return method(self, self.server.root / repo, *rest)
        self.answer(404)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # To read

    def refs(self, repo: Path):
        refs = [{"name": r.name, "ref": r.name, "targetCommit": commit(r)} for r in repo.glob("*/")]
        branches = [r for r in refs if r["name"] == "main"]
        tags = [r for r in refs if r["name"] != "main"]
        self.json({"branches": branches, "tags": tags, "converts": []})

    def resolve(self, repo: Path, revision: str, file: str):
        if not repo.is_dir():
            return self.answer(404, error="RepoNotFound")
        if (repo / "gated").exists():
            return self.answer(403, error="GatedRepo")
        folder = find(repo, revision)
        if folder is None:
            return self.answer(404, error="RevisionNotFound")
        path = folder / file
        if not path.is_file():
            return self.answer(404, error="EntryNotFound")
        self.answer(200, path.read_bytes(), ETag=f'"{oid(path)}"', **{"X-Repo-Commit": commit(folder)})

    def info(self, repo: Path, revision: str | None):
        if not repo.is_dir():
            return self.answer(404, error="RepoNotFound")
        self.json({"id": f"{repo.parent.name}/{repo.name}", "sha": commit(repo / (revision or "main"))})

    def paths_info(self, repo: Path, revision: str):
        paths = [path for name in parse_qs(self.body.decode())["paths"] if (path := repo / revision / name).is_file()]
        files = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid(path)} for path in paths]
        self.json([{**f, "lfs": {**f, "pointerSize": 130}} if Path(f["path"]).suffix in LFS else f for f in files])

    # To write

    def create(self, _):
        repo = "{organization}/{name}".format(**json.loads(self.body))
        status = 409 if (self.server.root / repo).exists() else 200
        (self.server.root / repo / "main").mkdir(parents=True, exist_ok=True)
        self.json({"url": f"{self.server.url}/{repo}"}, status)

    def validate_card(self, _):
        bad = "license: mine" in json.loads(self.body)["content"]
        self.json({"errors": [{"message": '"license" must be one of apache-2.0, mit'}] if bad else []}, 400 if bad else 200)

    def preupload(self, repo: Path, revision: str):
        paths = [repo / revision / file["path"] for file in json.loads(self.body)["files"]]
        modes = ["lfs" if path.suffix in LFS else "regular" for path in paths]
        files = [
            {"path": path.name, "uploadMode": mode, "shouldIgnore": False, "oid": oid(path) if path.is_file() else None}
            for path, mode in zip(paths, modes, strict=True)
        ]
        self.json({"files": files})

    def lfs_batch(self, _):
        objects = json.loads(self.body)["objects"]
        self.json({"objects": [{**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}} for o in objects]})

    def lfs_upload(self, _, name: str):
        self.server.blobs[name] = self.body
        self.answer(200)

    def add_commit(self, repo: Path, revision: str):
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        for value in (operation["value"] for operation in operations):
            content = base64.b64decode(value["content"]) if "content" in value else self.server.blobs[value["oid"]]
            (repo / revision / value["path"]).write_bytes(content)
        self.server.commits.append((header["value"]["summary"], sorted(o["value"]["path"] for o in operations)))
        head = commit(repo / revision)
        self.json({"commitUrl": f"{self.server.url}/{repo.parent.name}/{repo.name}/commit/{head}", "commitOid": head})

    def tag(self, repo: Path, revision: str):
        shutil.copytree(find(repo, revision), repo / json.loads(self.body)["tag"])
        self.json({})

    def untag(self, repo: Path, name: str):
        shutil.rmtree(repo / name)
        self.json({})

    # Answers

    def json(self, content, status: int = 200):
        self.answer(status, json.dumps(content).encode())

    def answer(self, status: int, body: bytes = b"", error: str | None = None, **headers: str):
        self.send_response(status)
        for name, value in {**headers, **({"X-Error-Code": error} if error else {}), "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


ROUTES = {
    ("GET", "/api/models/REPO/refs"): Handler.refs,
    ("GET", "/REPO/resolve/([^/]+)/(.+)"): Handler.resolve,
    ("GET", "/api/models/REPO(?:/revision/([^/]+))?"): Handler.info,
    ("POST", "/api/models/REPO/paths-info/([^/]+)"): Handler.paths_info,
    ("POST", "/api/repos/create"): Handler.create,
    ("POST", "/api/validate-yaml"): Handler.validate_card,
    ("POST", "/api/models/REPO/preupload/([^/]+)"): Handler.preupload,
    ("POST", "/REPO.git/info/lfs/objects/batch"): Handler.lfs_batch,
    ("PUT", "/(lfs)/([0-9a-f]+)"): Handler.lfs_upload,
    ("POST", "/api/models/REPO/commit/([^/]+)"): Handler.add_commit,
    ("POST", "/api/models/REPO/tag/([^/]+)"): Handler.tag,
    ("DELETE", "/api/models/REPO/tag/([^/]+)"): Handler.untag,
}


@contextmanager
def serve(root: Path) -> Iterator[ThreadingHTTPServer]:
    """A running server: `.url`, `.asked` (the paths, in order), `.commits` (title and files, in order), and `.busy`: it answers
    503 where the path has this in it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.asked, server.commits, server.blobs, server.busy = root, [], [], {}, ""
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
