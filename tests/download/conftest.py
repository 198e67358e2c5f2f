"""A local server that speaks HTTP ranges and the hub's protocol, and misbehaves on demand.

It listens on 127.0.0.1 alone; the clients under test are the real ones.
"""

import hashlib
import json
import threading
import time
from collections import defaultdict, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c" * 40


class Server:
    """What is served, how it is to fail, and what was asked for."""

    def __init__(self):
        self.files = {}  # path -> bytes
        self.repos = {}  # "models/owner/name" -> {file: bytes}
        self.gated = set()
        self.faults = defaultdict(deque)  # path -> faults of the next GETs
        self.requests = []  # (method, path, headers)
        self.etags = True
        self.ranges = True
        self.url = ""
        self.other_url = ""  # the same server by another name

    def gets(self, path):
        return [
            headers for method, asked, headers in self.requests if (method, asked) == ("GET", path)
        ]

    def add_repo(self, name, files, kind="models"):
        self.repos[f"{kind}/{name}"] = files


def _hub_hash(file, data):
    """What the hub calls a file's content: by Git's hash, or SHA-256 in large-file storage."""
    if file.endswith(".json"):
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return hashlib.sha256(data).hexdigest()


def _etag(data):
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((self.command, path, self.headers))
        if self.command == "GET" and self.state.faults[path]:
            fault = self.state.faults[path].popleft()
            if fault(self):
                return
        if path in self.state.files:
            self._file(self.state.files[path])
        elif path.startswith("/api/"):
            self._repo_info(path.removeprefix("/api/"))
        elif "/resolve/" in path:
            self._resolve(path)
        else:
            self.plain(404)

    def plain(self, status, headers=(), body=b""):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _file(self, data, extra=(), cut=None):
        etag = _etag(data)
        headers = {"Accept-Ranges": "bytes"}
        if self.state.etags:
            headers["ETag"] = etag
        headers.update(extra)
        start, status = 0, 200
        wanted = self.headers.get("Range", "")
        fits = self.headers.get("If-Range", etag) == etag
        if wanted.startswith("bytes=") and self.state.ranges and fits:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(data):
                return self.plain(416, {"Content-Range": f"bytes */{len(data)}"})
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[start:cut])
        return None

    def _repo_info(self, path):
        name = path.split("/revision/")[0].split("/tree/")[0]
        if name not in self.state.repos:
            return self.plain(404, {"X-Error-Code": "RepoNotFound"})
        if path.endswith("/revision/nowhere"):
            return self.plain(404, {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for file, data in self.state.repos[name].items():
            entry = {"rfilename": file, "size": len(data), "blobId": _hub_hash("x.json", data)}
            if not file.endswith(".json"):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        if "/tree/" in path:
            tree = [
                {
                    "type": "file",
                    "path": entry["rfilename"],
                    "size": entry["size"],
                    "oid": entry["blobId"],
                    "lfs": entry.get("lfs") and {"oid": entry["lfs"]["sha256"], **entry["lfs"]},
                }
                for entry in siblings
            ]
            return self.plain(200, {"Content-Type": "application/json"}, json.dumps(tree).encode())
        body = {"id": name.split("/", 1)[1], "sha": COMMIT, "siblings": siblings}
        text = json.dumps(body).encode()
        return self.plain(200, {"Content-Type": "application/json"}, text)

    def _resolve(self, path):
        head, _, rest = path.lstrip("/").partition("/resolve/")
        _, _, file = rest.partition("/")
        name = head if head.startswith("datasets/") else f"models/{head}"
        if name in self.state.gated:
            return self.plain(403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        if name not in self.state.repos:
            return self.plain(404, {"X-Error-Code": "RepoNotFound"})
        if file not in self.state.repos[name]:
            return self.plain(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data = self.state.repos[name][file]
        self.state.files[f"/content/{name}/{file}"] = data
        if self.command == "HEAD" and file.endswith(".json"):
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_hub_hash(file, data)}"'}
            return self._file(data, headers)
        # As the hub does it: large files lie on another host, which knows nothing of commits.
        return self.plain(
            302,
            {
                "Location": f"{self.state.other_url}/content/{name}/{file}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{_hub_hash(file, data)}"',
                "X-Linked-Size": str(len(data)),
            },
        )


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


@pytest.fixture
def hub_at(monkeypatch):
    """Tells the hub's library where the hub is; it reads HF_ENDPOINT when it is imported."""

    def tell(url):
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)

    return tell


@pytest.fixture
def server(hub_at):
    """A running server, which is the hub, too; see `Server`."""
    state = Server()
    handler = type("Handler", (_Handler,), {"state": state})
    with _Quiet(("127.0.0.1", 0), handler) as running:
        state.url = f"http://127.0.0.1:{running.server_address[1]}"
        hub_at(state.url)
        state.other_url = state.url.replace("127.0.0.1", "localhost")
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield state
        running.shutdown()
        thread.join()


@pytest.fixture
def fault():
    """Faults for `server.faults[path]`."""
    return _Faults


class _Faults:
    @staticmethod
    def status(code, **headers):
        def answer(handler):
            handler.plain(code, {key.replace("_", "-"): value for key, value in headers.items()})
            return True

        return answer

    @staticmethod
    def cut(sent):
        """Promises the whole file and hangs up after `sent` bytes of it."""

        def answer(handler):
            data = handler.state.files[unquote(urlsplit(handler.path).path)]
            handler._file(data, cut=sent)
            handler.wfile.flush()
            handler.close_connection = True
            return True

        return answer

    @staticmethod
    def drip(block, pause):
        """Sends everything, a block at a time."""

        def answer(handler):
            data = handler.state.files[unquote(urlsplit(handler.path).path)]
            handler.send_response(200)
            handler.send_header("ETag", _etag(data))
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            for start in range(0, len(data), block):
                handler.wfile.write(data[start : start + block])
                time.sleep(pause)
            return True

        return answer

    @staticmethod
    def stall(seconds):
        def answer(handler):
            time.sleep(seconds)
            handler.close_connection = True
            return True

        return answer


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Nobody waits for long in tests."""
    monkeypatch.setattr("chatbind_cli.download.web._TRIES_IN_VAIN", 3)
    monkeypatch.setattr("chatbind_cli.download.web._FIRST_WAIT_S", 0.001)
    monkeypatch.setattr("chatbind_cli.download.web._STALL_TIMEOUT_S", 0.3)
