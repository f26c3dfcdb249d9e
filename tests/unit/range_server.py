"""Files over HTTP on the loopback, by ranges of bytes: counted, slow, or broken off."""

import threading
import time
from contextlib import contextmanager, suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import urlsplit


@contextmanager
def serving(folder):
    """Files over HTTP with ranges. `.asked`: (name, first byte) of each answer; `.drop(number of the answer)`: whether
    its connection breaks off; `.slow`: seconds an answer takes; `.fault`: `wrong` bytes, `no` ranges
    but the whole, or that `unsized`, a `shorter` file."""
    state = SimpleNamespace(asked=[], drop=lambda number: False, slow=0.0, lock=threading.Lock(), sent=0, fault="")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            file = folder / urlsplit(self.path).path.strip("/")
            if not file.is_file():
                self.send_error(404)
                return
            content, stat = file.read_bytes(), file.stat()
            whole = state.fault in ("no", "unsized")
            wanted = f"0-{len(content)}" if whole else self.headers["Range"].removeprefix("bytes=")
            first, last = map(int, wanted.split("-"))
            if state.fault == "shorter":
                self.send_error(416)
                return
            if state.fault == "wrong":
                first, last = 0, last - first
            part = content[first : last + 1]
            with state.lock:
                number = len(state.asked)
                state.asked.append((file.name, first))
                state.sent += len(part)
            time.sleep(state.slow)
            self.send_response(200 if whole else 206)
            if not whole:
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
            if state.fault != "unsized":
                self.send_header("Content-Length", str(len(part)))
            self.send_header("ETag", f'"{stat.st_mtime_ns}"')
            self.send_header("Last-Modified", formatdate(stat.st_mtime))
            self.end_headers()
            with suppress(BrokenPipeError):  # of a process that was killed
                self.wfile.write(part[: len(part) // 2] if state.drop(number) else part)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown(), server.server_close()
