"""`chatbind download` in the process of the tests, and archives for it."""

import io
import zipfile
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from types import SimpleNamespace
from unittest import mock

from chatbind_cli.cli import run


def chatbind(*words, offline=False, cache=None):
    """What `chatbind download` with some words prints and returns.

    Args:
        words: of the call.
        offline: as with HF_HUB_OFFLINE.
        cache: the hub's cache.
    """
    with ExitStack() as stack:
        out = stack.enter_context(redirect_stdout(io.StringIO()))
        errors = stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", offline))
        if cache is not None:
            stack.enter_context(mock.patch("huggingface_hub.constants.HF_HUB_CACHE", str(cache)))
        code, message = run(["download", *words])
    lines = errors.getvalue() + (f"{message}\n" if message else "")
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=lines)


def zipped(**files):
    """A zip archive of files by name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()
