"""A `chatbind` that has its libraries loaded: the real program, forked from a process that waits.

Loading PyTorch and transformers takes most of the time of a short command, and the tests of the
examples run a hundred of those. What only the real start can show, its kills, keys and closed
pipes, the tests of the commands start as users do.

    python warm.py SOCKET       waits for calls; says "ready" once it does
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as call:
    call.connect({path!r})
    words = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(call, [len(words).to_bytes(8)], [0, 1, 2])
    call.sendall(words)
    program = int.from_bytes(call.recv(8, socket.MSG_WAITALL))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(program, number))
    sys.exit(int.from_bytes(call.recv(1)))
"""


def serve(path: str) -> None:
    """Runs every call in a process of its own, until this one is ended."""
    import chatbind_cli

    # of this checkout, whatever else is installed; as `__main__` does
    chatbind_cli.__path__.append(str(Path(__file__).parents[2]))
    import chatbind_cli.commands

    from chatbind_cli.data import encode  # noqa: F401
    from chatbind_cli.inference import answerer, chat, loaded_model, vqa  # noqa: F401
    from chatbind_cli.training import run  # noqa: F401

    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen(64)
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        gc.freeze()  # a collector that walks through the libraries copies them for every call
        while True:
            call, _ = door.accept()
            if os.fork() == 0:
                door.close()
                break
            call.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(call, 8, 3)
    words = b""
    while len(words) < int.from_bytes(length):
        words += call.recv(1 << 20)
    program = os.fork()
    if program == 0:
        call.close()
        _become(*json.loads(words), streams)
        return
    for stream in streams:
        os.close(stream)
    os.close(0), os.close(1), os.close(2)
    call.sendall(program.to_bytes(8))
    _, status = os.waitpid(program, 0)
    call.sendall(bytes([os.waitstatus_to_exitcode(status) % 256]))
    os._exit(0)


def _become(words: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["chatbind", *words]
    from chatbind_cli.cli import main

    try:
        main(words)
    except SystemExit as end:
        _end(int(end.code or 0))


def _end(code: int) -> None:
    """Ends as the interpreter does, but leaves the libraries whole: that takes a fork a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
