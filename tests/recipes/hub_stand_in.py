"""A Hub on the loopback: the few addresses that downloading a repository asks for."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Repos = dict[str, Path | str]  # org/name -> its files, or the Hub's code for why it does not give them


@contextmanager
def hub(repos: Repos) -> Iterator[tuple[str, list[str]]]:
    """`with hub({"org/name": folder, "org/closed": "GatedRepo"}) as (address, requests):`; `main` and `v1` exist."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            asked.append(f"{self.command} {path}")
            status, headers, content = respond(repos, path, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def respond(repos: Repos, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request."""
    parts = path.strip("/").split("/")
    api = parts[:2] == ["api", "models"]
    parts = parts[2:] if api else parts
    name, action = "/".join(parts[:2]), parts[2:]
    found = repos.get(name)
    if found is None:
        return error(401 if token is None else 404, "RepoNotFound")
    if isinstance(found, str):
        return error(403, found)
    revision = action[1] if len(action) > 1 else "main"
    if revision not in ("main", "v1", COMMIT):
        return error(404, "RevisionNotFound")
    files = {file.name: file for file in found.iterdir()}
    if api and action[:1] == ["tree"]:
        entries = [entry(file) for file in files.values()]
        return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
    if api:
        info = {"_id": "1", "id": name, "sha": COMMIT, "private": False, "siblings": [{"rfilename": f} for f in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
    if action[:1] == ["resolve"] and action[-1] in files:
        content = files[action[-1]].read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return 200, headers, content
    return error(404, "EntryNotFound")


def entry(file: Path) -> dict[str, object]:
    """A file as the Hub lists it."""
    content = file.read_bytes()
    return {"type": "file", "path": file.name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def error(status: int, code: str) -> tuple[int, dict[str, str], bytes]:
    """What the Hub says when it gives nothing."""
    return status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}"
