"""OpenAI's HTTP interface to one model: a thread a connection, all feeding one engine."""

import json
import secrets
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ftlib.errors import UserError
from ftlib.serving.answers import Answer
from ftlib.serving.requests import ApiError, read
from ftlib.serving.service import Service
from ftlib.tokenizers import Tokenizer

MOST_BYTES = 16 << 20  # of a request
ANSWERED = ("/v1/completions", "/v1/chat/completions")


class Server(ThreadingHTTPServer):
    """Serves `service` under the model name `name`; `context`: most tokens of prompt and answer together; `api_key`:
    what clients must show, if not None."""

    daemon_threads = True
    request_queue_size = 256  # connections that may arrive at once

    def __init__(
        self,
        address: tuple[str, int],
        service: Service,
        tokenizer: Tokenizer,
        name: str,
        context: int,
        api_key: str | None = None,
    ) -> None:
        self.service, self.tokenizer, self.name = service, tokenizer, name
        self.context, self.api_key = context, api_key
        super().__init__(address, Handler)


class Handler(BaseHTTPRequestHandler):
    """GET /health, /v1/models; POST /v1/completions, /v1/chat/completions."""

    protocol_version = "HTTP/1.1"
    timeout = 600  # s without a byte either way
    server: Server

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: prompts and addresses are nobody's business."""

    def _answer(self, work: Callable[[], None]) -> None:
        self.begun = False  # whether a status has been sent
        try:
            work()
        except ApiError as error:
            self._fail(error)
        except UserError as error:
            self._fail(ApiError(str(error)))
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True
        except Exception as error:
            self._fail(ApiError(f"{type(error).__name__}: {error}", status=500))

    def _fail(self, error: ApiError) -> None:
        self.close_connection = True  # what is left of the request is not read
        if not self.begun:
            self._json(error.body, error.status)
        else:
            self._event(error.body)
            self._chunk(b"")

    def _get(self) -> None:
        path = self.path.split("?")[0].rstrip("/")
        if path == "/health":
            return self._json({"status": "ok"})
        self._allowed()
        model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "ftlib"}
        if path == "/v1/models":
            return self._json({"object": "list", "data": [model]})
        if path == f"/v1/models/{self.server.name}":
            return self._json(model)
        if path in ANSWERED:
            raise ApiError(f"{path} answers POST requests", status=405)
        raise ApiError(f"there is nothing at {path}", status=404)

    def _post(self) -> None:
        path = self.path.split("?")[0].rstrip("/")
        if path not in ANSWERED:
            raise ApiError(f"there is nothing at {path}", status=404)
        self._allowed()
        server = self.server
        job = read(self._body(), path.endswith("chat/completions"), server.tokenizer, server.name, server.context)
        answer = Answer(job, server.service, server.tokenizer, server.name)
        try:
            if not job.stream:
                return self._json(answer.whole())
            for chunk in answer.chunks():
                self._event(chunk)
            self._event("[DONE]")
            self._chunk(b"")
        finally:
            answer.close()

    def _allowed(self) -> None:
        key = self.server.api_key
        if key is not None and not secrets.compare_digest(self.headers.get("Authorization", ""), f"Bearer {key}"):
            raise ApiError("wrong or missing API key", status=401)

    def _body(self) -> object:
        # A page in a browser cannot send this type to another origin without asking first.
        if self.headers.get_content_type() != "application/json":
            raise ApiError("the body must be sent with Content-Type: application/json", status=415)
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            raise ApiError("a Content-Length is needed", status=411)
        if int(length) > MOST_BYTES:
            raise ApiError(f"a request has at most {MOST_BYTES} bytes", status=413)
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise ApiError(f"the body is no JSON: {error}") from None

    def _json(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body, ensure_ascii=False).encode()
        self.begun = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _event(self, body: dict | str) -> None:
        if not self.begun:
            self.begun = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
        self._chunk(f"data: {text}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()
