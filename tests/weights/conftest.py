"""Small LLaMA-shaped checkpoints in every layout."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file

HIDDEN, VOCABULARY, HEADS = 8, 20, 2


def llama(seed, *, vocabulary=VOCABULARY, dtype=torch.float16, scale=1.0, projector=False):
    """Random tensors under LLaMA's names; norm weights are near one, as in real models."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    tensors = {"model.embed_tokens.weight": normal(vocabulary, HIDDEN)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "self_attn.q_proj.weight"] = normal(HIDDEN, HIDDEN)
        tensors[prefix + "mlp.up_proj.weight"] = normal(3 * HIDDEN, HIDDEN)
        tensors[prefix + "input_layernorm.weight"] = (1 + normal(HIDDEN)).to(dtype)
    tensors["model.norm.weight"] = (1 + normal(HIDDEN)).to(dtype)
    tensors["lm_head.weight"] = normal(vocabulary, HIDDEN)
    if projector:
        tensors["model.mm_projector.weight"] = normal(HIDDEN, 16)
        tensors["model.mm_projector.bias"] = normal(HIDDEN)
    return tensors


def bits(tensor):
    """The tensor's bits as integers, so that comparing is bit for bit."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(-1).view(kinds[tensor.dtype.itemsize])


class Maker:
    """Writes checkpoint folders."""

    llama = staticmethod(llama)

    def __init__(self, root):
        self.root = root

    def __call__(self, name, tensors, layout="safetensors", shards=1, config=None):
        folder = self.root / name
        folder.mkdir(parents=True)
        settings = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, **(config or {})}
        (folder / "config.json").write_text(json.dumps(settings))
        names = list(tensors)
        groups = [names[i::shards] for i in range(shards)]
        stem = "model" if layout == "safetensors" else "pytorch_model"
        suffix = "safetensors" if layout == "safetensors" else "bin"
        weight_map = {}
        for number, group in enumerate(groups, 1):
            file = f"{stem}-{number:05d}-of-{shards:05d}.{suffix}"
            if shards == 1:
                file = f"{stem}.{suffix}"
            part = {key: tensors[key] for key in group}
            weight_map |= dict.fromkeys(group, file)
            if layout == "safetensors":
                save_file({key: t.contiguous() for key, t in part.items()}, folder / file)
            else:
                torch.save(part, folder / file, _use_new_zipfile_serialization=layout == "bin")
        if shards > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        return folder


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
