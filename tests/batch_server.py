"""A server that speaks OpenAI's Batch API, on this machine, and dies where a test says."""

from __future__ import annotations

import json
import re
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.chat_server import Handler, JudgeServer


class BatchServer(JudgeServer):
    """A chat endpoint that also takes files and batches.

    A batch is over when it was looked at `looks` times; then each of its requests has what
    `one` gives for it: a reply's text, or a status and a body. `ends` is how it ends. `on` is
    called with each step ("POST /v1/files", ...) before (True) and after (False) it is done; what
    it returns, a status, is sent in place of the answer.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.steps: list[str] = []
        self.looks = 2
        self.ends = "completed"
        self.errors: Any = None
        self.forgotten: set[str] = set()
        self.one: Any = lambda body: self.answer(body)
        self.on: Any = lambda step, before: None
        super().__init__(BatchHandler)

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The bodies of all requests of all batches."""
        return [
            json.loads(line)["body"]
            for batch in self.batches.values()
            for line in self.files[batch["input_file_id"]].splitlines()
        ]

    def done(self, step: str, parts: Any, body: bytes, headers: Any) -> Any:
        name = parts.path.split("/")[3] if parts.path.count("/") > 2 else ""
        if step == "POST /v1/files":
            kind = headers["Content-Type"]
            mail = BytesParser(policy=HTTP).parsebytes(
                b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body
            )
            fields = {
                part.get_param("name", header="content-disposition"): part
                for part in mail.iter_parts()
            }
            assert fields["purpose"].get_content().strip() == "batch"
            data = fields["file"].get_payload(decode=True)
            return {"id": self.put(data), "object": "file", "bytes": len(data)}
        if step == "POST /v1/batches":
            return self.create(json.loads(body))
        if step == "GET /v1/batches":
            query = parse_qs(parts.query)
            names = list(self.batches)[::-1]
            if "after" in query:
                names = names[names.index(query["after"][0]) + 1 :]
            shown = names[:2]  # small pages
            found = [self.batches[name] for name in shown]
            return {"object": "list", "data": found, "has_more": len(shown) < len(names)}
        if step == "GET /v1/batches/batch_N":
            return self.look(name)
        assert step == "GET /v1/files/file-N/content"
        return self.files[name]

    def put(self, data: bytes) -> str:
        name = f"file-{len(self.files)}"
        self.files[name] = data
        return name

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        assert body["endpoint"] == "/v1/chat/completions"
        assert body["completion_window"] == "24h"
        batch = {"id": f"batch_{len(self.batches)}", "object": "batch", "status": "validating"}
        batch |= {"input_file_id": body["input_file_id"], "looks": 0}
        total = self.files[body["input_file_id"]].count(b"\n")
        batch["request_counts"] = {"total": total, "completed": 0, "failed": 0}
        self.batches[batch["id"]] = batch
        return batch

    def look(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        batch["looks"] += 1
        if batch["looks"] < self.looks:
            batch["status"] = "in_progress"
        elif batch["status"] not in ("completed", "failed", "expired", "cancelled"):
            batch["status"] = self.ends
            batch["errors"] = self.errors
            if self.ends != "failed":
                self._answer(batch)
        return batch

    def _answer(self, batch: dict[str, Any]) -> None:
        good, bad = [], []
        for line in reversed(self.files[batch["input_file_id"]].splitlines()):
            request = json.loads(line)
            assert request["method"] == "POST"
            assert len(request["custom_id"]) <= 64
            if request["custom_id"] in self.forgotten:
                continue
            said = self.one(request["body"])
            record = {"id": "r", "custom_id": request["custom_id"], "error": None}
            if isinstance(said, str):
                body = self.completion(request["body"], said)
                record["response"] = {"status_code": 200, "request_id": "q", "body": body}
                good.append(record)
            elif said is None:
                record["response"] = None
                record["error"] = {"code": "batch_expired", "message": "late"}
                bad.append(record)
            else:
                record["response"] = {"status_code": said[0], "request_id": "q", "body": said[1]}
                bad.append(record)
        for key, records in (("output_file_id", good), ("error_file_id", bad)):
            text = "".join(json.dumps(record) + "\n" for record in records)
            batch[key] = self.put(text.encode()) if records else None


class BatchHandler(Handler):
    """Files and batches beside chats."""

    judge: BatchServer

    def do_GET(self) -> None:
        self._step("GET", b"")

    def do_POST(self) -> None:
        if self.path == "/v1/chat/completions":
            super().do_POST()
            return
        self._step("POST", self.rfile.read(int(self.headers["Content-Length"])))

    def _step(self, method: str, body: bytes) -> None:
        parts = urlsplit(self.path)
        step = re.sub(r"(batch_|file-)\d+", r"\1N", f"{method} {parts.path}")
        with self.judge.lock:
            self.judge.steps.append(step)
            status = self.judge.on(step, True)
            if (
                parts.path.startswith("/v1/files/")
                and parts.path.split("/")[3] not in self.judge.files
            ):
                status = 404
            answer = None if status else self.judge.done(step, parts, body, self.headers)
            status = status or self.judge.on(step, False)
        if status == "reset":
            self.close_connection = True
        elif status:
            self.send(status, json.dumps({"error": {"message": f"status {status}"}}))
        elif isinstance(answer, bytes):
            self.send(200, answer, {"Content-Type": "application/octet-stream"})
        else:
            self.send(200, json.dumps(answer))
