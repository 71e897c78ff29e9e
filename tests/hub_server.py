"""A read-only stand-in for the Hugging Face Hub on the loopback interface: enough for the real client to download from it.

It serves a folder: `ROOT/user/repo/REVISION/file`. The revision `main` is a branch, every other one a tag; equal files make
equal commits. A repository that holds a file named `gated` is a gated one.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


def commit(revision: Path) -> str:
    """40 hexadecimal digits that follow from the files of a revision."""
    files = sorted(path for path in revision.rglob("*") if path.is_file())
    return hashlib.sha1(b"".join(str(f.relative_to(revision)).encode() + f.read_bytes() for f in files)).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if self.server.busy:
            self.answer(503)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/refs", path):
            self.refs(self.server.root / match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(self.server.root / match[1], match[2], match[3])
        else:
            self.answer(404)

    do_HEAD = do_GET

    def refs(self, repo: Path):
        refs = [{"name": r.name, "ref": r.name, "targetCommit": commit(r)} for r in repo.glob("*/")]
        branches = [r for r in refs if r["name"] == "main"]
        tags = [r for r in refs if r["name"] != "main"]
        self.answer(200, json.dumps({"branches": branches, "tags": tags, "converts": []}).encode())

    def resolve(self, repo: Path, revision: str, file: str):
        if not repo.is_dir():
            return self.answer(404, error="RepoNotFound")
        if (repo / "gated").exists():
            return self.answer(403, error="GatedRepo")
        folder = next((r for r in repo.glob("*/") if revision in (r.name, commit(r))), None)
        if folder is None:
            return self.answer(404, error="RevisionNotFound")
        if not (folder / file).is_file():
            return self.answer(404, error="EntryNotFound")
        body = (folder / file).read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()  # as git names it
        self.answer(200, body, ETag=f'"{blob}"', **{"X-Repo-Commit": commit(folder)})

    def answer(self, status: int, body: bytes = b"", error: str | None = None, **headers: str):
        self.send_response(status)
        for name, value in {**headers, **({"X-Error-Code": error} if error else {}), "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serve(root: Path) -> Iterator[ThreadingHTTPServer]:
    """A running server: `.url`, `.asked` (the paths, in order), and `.busy`, which makes it answer 503 to everything."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root, server.asked, server.busy = root, [], False
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
