"""An engine on this machine that runs a tiny language model, and misbehaves on request.

It speaks what `--engine` needs of vLLM's API: `/v1/models` and `/v1/completions` with prompt
embeddings, over real sockets.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatbind_cli.model.pretrained import quiet_transformers


class Served:
    """The language model of a folder."""

    def __init__(self, folder: Path) -> None:
        with quiet_transformers():
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.lock = threading.Lock()


class EngineServer:
    """A server of a language model.

    `faults` are used up first, one a request for a completion: a status (500), (status, headers,
    body), "slow" and seconds, "reset", "cut", "garbage", "die", or a function that changes the
    reply; None stands for none. `key` is what it wants to see.
    """

    def __init__(self, served: Served, *, key: str = "", max_model_len: int | None = 512) -> None:
        self.served = served
        self.key = key
        self.max_model_len = max_model_len
        self.faults: deque[Any] = deque()
        self.poison: bytes | None = None
        self.requests: list[dict[str, Any]] = []
        self.most_at_a_time = 0
        self.cancelled = threading.Event()
        self.step_seconds = 0.0
        self._now = 0
        self.lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._http = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"engine": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        """Ends at once, as a process that is killed does."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def enter(self, connection: socket.socket) -> Any:
        with self.lock:
            self._open.add(connection)
            self._now += 1
            self.most_at_a_time = max(self.most_at_a_time, self._now)
            return self.faults.popleft() if self.faults else None

    def leave(self) -> None:
        with self.lock:
            self._now -= 1

    @torch.inference_mode()
    def tokens(self, request: dict[str, Any], sample: int) -> Any:
        """The tokens of one answer, with their log-probabilities."""
        data = base64.b64decode(request["prompt_embeds"], validate=True)
        embeddings = torch.load(io.BytesIO(data), weights_only=True)
        assert embeddings.dim() == 2 and request["prompt"] == []
        assert embeddings.shape[1] == self.served.model.get_input_embeddings().embedding_dim
        inputs = {"inputs_embeds": embeddings.float().unsqueeze(0)}
        draw = torch.Generator().manual_seed(request.get("seed", 0) + sample)
        cache, ids = None, []
        ends = [] if request.get("ignore_eos") else request["stop_token_ids"]
        for _ in range(request["max_tokens"]):
            with self.served.lock:
                out = self.served.model(**inputs, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logprobs = out.logits[0, -1].float().log_softmax(dim=-1)
            scores = out.logits[0, -1].float().clone()
            for index, bias in request["logit_bias"].items():
                scores[int(index)] += bias
            token = int(scores.argmax())
            if request["temperature"] > 0:
                odds = (scores / request["temperature"]).softmax(dim=-1)
                token = int(torch.multinomial(odds, 1, generator=draw))
            ids.append(token)
            stops = request["stop"]
            text = self.served.tokenizer.decode(ids, skip_special_tokens=True) if stops else ""
            ended = token in ends or any(stop in text for stop in stops)
            full = len(ids) == request["max_tokens"]
            yield token, float(logprobs[token]), "stop" if ended else "length" if full else None
            if ended:
                return
            time.sleep(self.step_seconds)
            inputs = {"input_ids": torch.tensor([[token]])}


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, OSError)):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    engine: EngineServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        model = {"id": "lm", "max_model_len": self.engine.max_model_len}
        if self.path != "/v1/models":
            self._send(404, '{"detail": "Not Found"}')
        elif self._welcome():
            self._send(200, json.dumps({"data": [model]}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._welcome():
            return
        request = json.loads(body)
        assert (self.path, request["model"]) == ("/v1/completions", "lm")
        fault = self.engine.enter(self.connection)
        self.engine.requests.append(request)
        try:
            self._reply(request, fault)
        except ConnectionError:
            self.engine.cancelled.set()
            self.close_connection = True
        finally:
            self.engine.leave()

    def _welcome(self) -> bool:
        said = self.headers.get("Authorization", "")
        if self.engine.key and said != f"Bearer {self.engine.key}":
            self._send(401, json.dumps({"error": {"message": f"{said} is not welcome"}}))
            return False
        return True

    def _reply(self, request: dict[str, Any], fault: Any) -> None:
        if request["prompt_embeds"] == self.engine.poison:
            fault = 500
        if isinstance(fault, tuple) and fault[0] == "slow":
            time.sleep(fault[1])
            fault = None
        if fault == "die":
            self.engine.close()
        elif isinstance(fault, int):
            self._send(fault, json.dumps({"error": {"message": f"status {fault}"}}))
        elif isinstance(fault, tuple):
            self._send(fault[0], fault[2], fault[1])
        elif fault == "reset":
            self.close_connection = True
        elif fault == "garbage":
            self._send(200, '{"choices": [{"tok')
        elif request.get("stream"):
            self._stream(request, fault)
        else:
            reply = {"choices": [self._choice(request, n) for n in range(request["n"])]}
            if callable(fault):
                fault(reply)
            text = json.dumps(reply)
            sent = text[: len(text) // 2] if fault == "cut" else text
            self._send(200, sent, {"Content-Length": str(len(text))})
            self.close_connection = fault == "cut"

    def _choice(self, request: dict[str, Any], sample: int) -> dict[str, Any]:
        ids, logprobs, reasons = zip(*self.engine.tokens(request, sample), strict=True)
        choice = {"index": sample, "token_ids": ids, "finish_reason": reasons[-1]}
        if "logprobs" in request:
            choice["logprobs"] = {"token_logprobs": logprobs}
        return choice

    def _stream(self, request: dict[str, Any], fault: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        for place, (token, logprob, reason) in enumerate(self.engine.tokens(request, 0)):
            if fault == "cut" and place == 3:
                return
            choice = {"index": 0, "token_ids": [token], "finish_reason": reason}
            if "logprobs" in request:
                choice["logprobs"] = {"token_logprobs": [logprob]}
            self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n')

    def _send(self, status: int, body: str, headers: dict[str, str] | None = None) -> None:
        data = body.encode()
        wanted = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        self.send_response(status)
        for name, value in (wanted | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
