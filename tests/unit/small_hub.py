"""A Hub on the loopback for downloads that break off and for uploads: sizes, ranges, gates, commits."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(files, gated=(), allowed=()):
    """`files`: org/name -> {file: bytes}. Yields `.address`, `.asked`, `.uploaded`, and `.break_after` (bytes)."""
    state = SimpleNamespace(files=files, asked=[], uploaded={}, created=[], break_after=None, sizes={})

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status, content=b"", headers=None, length=None):
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def refuse(self, status, code):
            self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def json(self, value):
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def do_GET(self):
            path = unquote(urlsplit(self.path).path)
            state.asked.append((self.command, path, self.headers.get("Range")))
            parts = path.strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            name = "/".join(parts[2:4] if api else parts[:2])
            rest = parts[4:] if api else parts[2:]
            if self.headers.get("Authorization") == "Bearer hf_wrong":
                self.refuse(401, "")
            elif name not in state.files:
                self.refuse(401, "RepoNotFound")
            elif len(rest) > 1 and rest[1] not in ("main", "v1", COMMIT):
                self.refuse(404, "RevisionNotFound")
            elif name in gated and (not api or rest[:1] == ["auth-check"]):
                self.refuse(403, "GatedRepo")
            elif api and rest[:1] == ["auth-check"]:
                self.json({})
            elif api:
                held = state.files[name]
                siblings = [{"rfilename": f, "size": state.sizes.get(f, len(held[f]))} for f in held]
                more = {"gated": "manual" if name in gated else False}
                tree = [{"type": "file", "path": f, "size": len(c), "oid": "0"} for f, c in held.items()]
                self.json(tree if rest[:1] == ["tree"] else {"id": name, "sha": COMMIT, "siblings": siblings, **more})
            elif rest[-1] in state.files[name]:
                self.file(state.files[name][rest[-1]])
            else:
                self.refuse(404, "EntryNotFound")

        do_HEAD = do_GET

        def file(self, content):
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            wanted = self.headers.get("Range")
            start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
            part = content[start:]
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if state.break_after is not None and self.command == "GET" and len(part) > state.break_after:
                self.answer(206 if start else 200, part[: state.break_after], headers, len(part))
                self.close_connection = True
            else:
                self.answer(206 if start else 200, part, headers)

        def do_POST(self):
            path = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state.asked.append((self.command, path, None))
            if path == "/api/repos/create":
                state.created.append(json.loads(body))
                name = f"{json.loads(body).get('organization') or 'me'}/{json.loads(body)['name']}"
                self.json({"url": f"{state.address}/{name}", "name": name, "id": name})
            elif "/preupload/" in path:
                listed = json.loads(body)["files"]
                self.json(
                    {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in listed]}
                )
            elif "/commit/" in path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        state.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.json(
                    {"success": True, "commitOid": COMMIT, "commitUrl": f"{state.address}/org/new/commit/{COMMIT}"}
                )
            else:
                self.json({})

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
