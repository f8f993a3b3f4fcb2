"""A model hub on loopback, as much of it as fetching one model's files asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "0"


class HubServer:
    """`with HubServer("owner/name", {"config.json": b"…"}) as hub:` answers on `hub.url`.

    Files that end in .safetensors are large ones, with a sha256; the others have their git hash. What is
    in `spoilt` is sent with other bytes than its hash says.
    """

    def __init__(self, model_id: str, files: dict[str, bytes], spoilt: frozenset[str] = frozenset()) -> None:
        self.model_id, self.files, self.spoilt = model_id, files, spoilt
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub._answer(self, with_body=False)

            def do_GET(self) -> None:
                hub._answer(self, with_body=True)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.block_on_close = False  # a client that keeps its connection is not waited for
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        resolve = f"/{self.model_id}/resolve/{COMMIT}/"
        if path.startswith(f"/api/models/{self.model_id}"):
            body, headers = json.dumps(self._model()).encode(), {"Content-Type": "application/json"}
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.files:
            name = path.removeprefix(resolve)
            body, headers = self._file(name)
            if with_body:
                self.fetched.append(name)
        else:
            request.send_response(404)
            request.send_header("X-Error-Code", "RepoNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if with_body:
            request.wfile.write(body)

    def _model(self) -> dict[str, object]:
        siblings = []
        for name, data in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {"id": self.model_id, "modelId": self.model_id, "sha": COMMIT, "siblings": siblings}

    def _file(self, name: str) -> tuple[bytes, dict[str, str]]:
        data = self.files[name]
        etag = hashlib.sha256(data).hexdigest() if name.endswith(".safetensors") else git_hash(data)
        sent = data[::-1] if name in self.spoilt else data
        return sent, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}


def git_hash(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
