"""Private datasets of a Hub, and S3, against stand-ins on the loopback."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from ftlib.data.sources import files_of, read
from ftlib.errors import UserError
from ftlib.sections import Source

ROOT = Path(__file__).parents[2]
ROWS = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
COMMIT, TOKEN = "0123456789abcdef0123456789abcdef01234567", "hf_secret"
READ = f"""
import json, os
from ftlib.data.sources import files_of, read_all
from ftlib.errors import UserError
from ftlib.sections import Source
source = Source(path="org/rows@v2", split="train[1:]")
try:
    files_of(source)
except UserError as error:
    os.environ["HF_TOKEN"] = "{TOKEN}"
    print(json.dumps([str(error), [place.row.value for place in read_all(files_of(source), source.split)]]))
"""
STREAM = f"""
import json, os, pathlib
from ftlib.data import pieces, ranges
from ftlib.data.sources import read_all, streamed_files
from ftlib.errors import UserError
from ftlib.sections import Source
folder = pathlib.Path(os.environ["FTLIB_CACHE"]) / "pieces"
folder.mkdir(parents=True)
pieces.PIECE, held = 64, pieces.Pieces(folder, 1 << 10)
found = []
for path, split in (("org/rows@v2", "train"), ("hf://datasets/org/rows@v2/data/*.jsonl", None)):
    source = Source(path=path, split=split)
    try:
        streamed_files(source, held, "key")
    except UserError as error:
        found.append(str(error))
        os.environ["HF_TOKEN"] = "{TOKEN}"
    files = streamed_files(source, held, "key")
    found.append([[file.found.url for file in files], [place.row.value for place in read_all(files)]])
print(json.dumps(found))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def serve():
    """Starts a server of (method, path, query, headers, body) -> (status, headers, body); gives its address."""
    running = []

    def start(answer):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                found = answer(self.command, unquote(parts.path), parse_qs(parts.query), self.headers, body)
                status, headers, content = found
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_HEAD = do_POST = do_GET

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def dataset_hub(asked):
    """Answers for `org/rows`, which has a revision v2 and wants the token; `asked`: paths and ranges that came."""
    files = {"data/train.jsonl": LINES, "data/test.jsonl": LINES[: len(LINES) // 4]}

    def answer(method, path, query, headers, body):
        asked.append((path, headers.get("Range")))
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        as_json = {"Content-Type": "application/json"}
        entries = [{"type": "file", "path": p, "size": len(c), "oid": f"{len(c):040}"} for p, c in files.items()]
        if path.startswith("/api/datasets/org/rows"):
            rest = path.removeprefix("/api/datasets/org/rows").strip("/").split("/")
            if rest[0] in ("revision", "tree", "paths-info") and rest[1] not in ("v2", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            if rest[0] == "tree":
                inside = "/".join(rest[2:])
                listed = [e for e in entries if e["path"].startswith(inside)] if inside else [
                    {"type": "directory", "path": "data", "oid": "0" * 40, "size": 0}]  # fmt: skip
                listed = entries if "recursive" in query and query["recursive"] != ["False"] else listed
                return 200, as_json, json.dumps(listed).encode()
            if rest[0] == "paths-info":
                wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
                found = [e for e in entries if e["path"] in wanted]
                if "data" in wanted:
                    found.append({"type": "directory", "path": "data", "oid": "0" * 40, "size": 0})
                return 200, as_json, json.dumps(found).encode()
            siblings = [{"rfilename": path} for path in files]
            return 200, as_json, json.dumps({"id": "org/rows", "sha": COMMIT, "siblings": siblings}).encode()
        name = next((p for p in files if path.endswith(p) and "/resolve/" in path), None)
        if name is None:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if headers.get("Range"):
            first, last = (int(n) for n in headers["Range"].removeprefix("bytes=").split("-"))
            return 206, etag, files[name][first : last + 1]
        return 200, etag, files[name]

    return answer


def with_hub(code, address, folder):
    """What a process prints that has this Hub; HF_ENDPOINT is read when the library is imported."""
    env = {
        **os.environ, "HF_ENDPOINT": address, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0",
        "FTLIB_CACHE": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_private_dataset_at_a_revision(serve, cache, tmp_path):
    """`datasets` itself asks the Hub: with the token, for the revision, once."""
    asked = []
    refused, rows = with_hub(READ, serve(dataset_hub(asked)), tmp_path)
    assert "HF_TOKEN" in refused and rows == ROWS[1:] and any("v2" in path for path, _ in asked)
    count = len(asked)
    again = files_of(Source(path="org/rows@v2", split="train"))
    assert [row.value for row in read(again)] == ROWS and len(asked) == count  # fetched once, offline from then on


def test_a_private_dataset_is_streamed_at_its_commit(serve, tmp_path):
    """Its files by ranges of bytes, whatever becomes of the branch; of a split, and by an address."""
    asked = []
    refused, *found = with_hub(STREAM, serve(dataset_hub(asked)), tmp_path)
    assert "HF_TOKEN" in refused
    (urls, rows), (more, lines) = found
    assert urls == [f"hf://datasets/org/rows@{COMMIT}/data/train.jsonl"] and rows == ROWS
    assert [url.rsplit("/")[-1] for url in more] == ["test.jsonl", "train.jsonl"] and lines == [ROWS[0], *ROWS]
    assert all(COMMIT in url for url in more)
    read = [(path, where) for path, where in asked if "/resolve/" in path]
    assert read and all(COMMIT in path and where for path, where in read if path.endswith(".jsonl"))
    assert not list((tmp_path / "cache").glob("fetched/*")) and len(list((tmp_path / "cache" / "pieces").glob("*-*")))


def test_s3_through_a_driver(serve, cache, monkeypatch):
    """`s3://` goes to whatever fsspec has for it: here a driver of thirty lines and a bucket on the loopback."""
    import fsspec
    from fsspec.implementations.http import HTTPFileSystem

    keys = {"chat/a.jsonl": LINES, "chat/deep/b.jsonl": LINES, "other/c.jsonl": LINES}

    def answer(method, path, query, headers, body):
        prefix = query.get("prefix", [""])[0]
        if path == "/bucket":
            listed = [{"key": key, "size": len(keys[key])} for key in keys if key.startswith(prefix)]
            return 200, {}, json.dumps(listed).encode()
        key = path.removeprefix("/bucket/")
        return (200, {}, keys[key]) if key in keys else (404, {}, b"")

    address = serve(answer)

    class Bucket(fsspec.AbstractFileSystem):
        protocol = "s3"
        http = HTTPFileSystem()

        def ls(self, path, detail=True, **kwargs):
            bucket, _, prefix = self._strip_protocol(path).partition("/")
            listed = json.loads(self.http.cat_file(f"{address}/{bucket}?prefix={prefix}"))
            found = {}
            for entry in listed:
                rest = entry["key"][len(prefix) :].strip("/")
                head = f"{bucket}/{prefix}".rstrip("/")
                name = f"{head}/{rest.split('/')[0]}" if rest else head
                kind = "directory" if "/" in rest else "file"
                found[name] = {"name": name, "type": kind, "size": entry["size"]}
            return list(found.values()) if detail else list(found)

        def cat_file(self, path, start=None, end=None, **kwargs):
            return self.http.cat_file(f"{address}/{self._strip_protocol(path)}")

        def _open(self, path, mode="rb", **kwargs):
            import io

            return io.BytesIO(self.cat_file(path))

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", Bucket)
    for path, count in (("s3://bucket/chat/a.jsonl", 1), ("s3://bucket/chat", 2), ("s3://bucket/*/*.jsonl", 2)):
        files = files_of(Source(path=path))
        assert len(files) == count and [row.value for row in read(files[:1])] == ROWS
    with pytest.raises(UserError, match="no such file"):
        files_of(Source(path="s3://bucket/none"))
