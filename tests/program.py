"""The program in the test's own process: files, pipes and exit codes as in one of its own."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from chatbind_cli import cli


class Pipe(io.TextIOWrapper):
    """What a process reads or writes, in memory."""


def chatbind(
    *words: object, cwd: Path, stdin: str | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the program in this process: in its folder, with pipes of its own."""
    given = Pipe(io.BytesIO((stdin or "").encode()), encoding="utf-8")
    out, err = (Pipe(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with (
        contextlib.chdir(cwd),
        mock.patch.dict(os.environ, env or {}),
        mock.patch.multiple(sys, stdin=given, stdout=out, stderr=err),
    ):
        code, line = cli.run([str(word) for word in words])
    out.flush()
    err.flush()
    said = (err.buffer.getvalue().decode() + line).rstrip("\n")
    return subprocess.CompletedProcess(words, code, out.buffer.getvalue().decode(), said + "\n")
