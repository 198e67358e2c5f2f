"""The errors that a user can cause or meet, each with the exit code it ends the program with.

Anything else that escapes is a bug in ChatBind and says so. The tree:

    ChatBindError            1  the work failed
    ├── UsageError           2  the words of the call are off
    ├── MediaError           1  a picture, sound, ... that cannot be read
    ├── RecordError          1  a record that cannot be read or used
    ├── WeightsError         1  a weights file that is not what it should be
    ├── CheckpointError      1  a model or checkpoint folder that cannot be used
    ├── StoreError           1  an embedding store that cannot be used
    ├── DownloadError        1  a file that could not be fetched or verified
    ├── JudgeError           1  a judge that cannot be reached or understood
    ├── EngineError          1  an engine (`--engine`) that cannot be reached or used
    ├── LaunchError          1  worker processes that failed
    ├── SomeRecordsFailed    3  finished, but some records carry an error
    └── Interrupted         75  told to stop, and saved what there was: to be run again
"""

from __future__ import annotations

import os
import signal
import sys
import traceback

_MOST_REASON = 200  # characters of a library's own words


class ChatBindError(Exception):
    """One line that says what is wrong, where, and what to do about it.

    Args:
        what: what is wrong, without a final full stop.
        where: file and line number, or record id, that it is about.
        hint: what the user can do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where
        self.hint = hint
        text = f"{where}: {what}" if where else what
        if hint:
            text = f"{text}; {hint}"
        super().__init__(" ".join(text.split()))


class UsageError(ChatBindError):
    """The words of the call do not fit together."""

    exit_code = 2


class MediaError(ChatBindError):
    """A media file, URL or stream cannot be read as its modality."""


class RecordError(ChatBindError):
    """A record is not JSON, lacks a key, or contradicts itself."""


class WeightsError(ChatBindError):
    """A weights file is broken, or its tensors do not fit the model."""


class CheckpointError(ChatBindError):
    """A model folder or training checkpoint is incomplete or of another kind."""


class StoreError(ChatBindError):
    """An embedding store is broken, or was made by another encoder."""


class DownloadError(ChatBindError):
    """An artefact could not be fetched, or is not what the catalogue says."""


class JudgeError(ChatBindError):
    """A judge cannot be reached, or refuses to work."""


class EngineError(ChatBindError):
    """An engine cannot be reached, refuses to work, or serves another model."""


class LaunchError(ChatBindError):
    """Worker processes could not be started, or died without saying why."""


class SomeRecordsFailed(ChatBindError):
    """The run went through, but some of its output records carry an `error`."""

    exit_code = 3


class Interrupted(ChatBindError):
    """A signal ended the work, or others have it; nothing is lost: the same command goes on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h, on which batch scripts may requeue a job


class Terminated(BaseException):
    """This process was sent SIGTERM, and is to die of it when everything is tidied up."""

    exit_code = 128 + signal.SIGTERM


def debugging() -> bool:
    """Whether tracebacks are wanted (`--debug`, `CHATBIND_DEBUG=1`)."""
    return os.environ.get("CHATBIND_DEBUG", "") not in ("", "0")


def reason(error: BaseException) -> str:
    """A library's own words for what failed, as part of a line; its type where it has none."""
    return " ".join(str(error).split())[:_MOST_REASON] or type(error).__name__


def contained(error: Exception, *, where: str) -> ChatBindError:
    """The failure of one record, for whatever its input has raised; others go on.

    Libraries fail on broken input in more ways than they say. At the boundary around one record
    every `Exception` is caught, and this makes one line of it; the traceback is for `--debug`.

    Args:
        error: a `ChatBindError`, which is returned as it is, or anything else.
        where: the file, or the file and line, that the record is about.
    """
    if isinstance(error, ChatBindError):
        return error
    if debugging():
        sys.stderr.write("".join(traceback.format_exception(error)))
    kind, said = type(error).__name__, reason(error)
    said = said if said == kind else f"{kind}: {said}"
    return ChatBindError(f"cannot be used ({said})", where=where)
