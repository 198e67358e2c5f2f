"""Checkpoint folders, and a hub that serves one."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from tests.checkpoints.checkpoints import Maker, bits


@pytest.fixture
def make(tmp_path):
    """`make(name, tensors, layout, shards)` writes a checkpoint folder and returns it."""
    return Maker(tmp_path / "made")


@pytest.fixture
def same_bits():
    """Whether two tensors have the same dtype, shape and bits."""

    def compare(a, b):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))

    return compare


@pytest.fixture
def server_script():
    """`with server_script(folder) as url` serves a folder as the hub repository owner/name."""

    @contextmanager
    def serve(folder):
        files = {path.name: path.read_bytes() for path in folder.iterdir()}

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_GET(self):
                path = self.path.partition("?")[0]
                body, extra = files.get(path.rpartition("/")[2]), {}
                if "/tree/" in path:
                    sizes = [(name, len(data)) for name, data in files.items()]
                    tree = [{"type": "file", "path": n, "size": s, "oid": "b"} for n, s in sizes]
                    body = json.dumps(tree).encode()
                elif path.startswith("/api/"):
                    siblings = [{"rfilename": name, "size": len(d)} for name, d in files.items()]
                    info = {"id": "owner/name", "sha": "c" * 40, "siblings": siblings}
                    body = json.dumps(info).encode()
                else:
                    extra = {"ETag": f'"{path[-20:]}"', "X-Repo-Commit": "c" * 40}
                self.send_response(200)
                for key, value in {"Content-Length": str(len(body)), **extra}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
            thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            yield f"http://127.0.0.1:{running.server_address[1]}"
            running.shutdown()
            thread.join()

    return serve
