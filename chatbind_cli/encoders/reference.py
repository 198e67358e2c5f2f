"""What `--encoder` may say: a path, or a name under a scheme, as `hf:owner/name`.

A package brings a scheme of its own by an entry point of the group `chatbind.encoders` whose object
is a subclass of `Encoder`. Nothing of it is imported before its name is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatbind_cli.errors import ChatBindError, UsageError, contained
from chatbind_cli.media.medium import is_there

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from chatbind_cli.encoders.encoder import Encoder

GROUP = "chatbind.encoders"
_OWN = ("hf", "timm")
_REFERENCE = re.compile(r"([A-Za-z][\w.-]*):(.*)", re.DOTALL)


def is_reference(word: str | Path) -> bool:
    """Whether a word names an encoder under a scheme; what exists as a path is a path.

    Raises:
        UsageError: nobody has brought the scheme.
    """
    scheme, _ = split_reference(word)
    if scheme and scheme not in _OWN:
        _entry_point(scheme)
    return bool(scheme)


def split_reference(word: str | Path) -> tuple[str, str]:
    """The scheme, and what follows it; of a path, the scheme is empty."""
    found = _REFERENCE.fullmatch(str(word))
    if found is None or is_there(str(word)):
        return "", str(word)
    return found[1], found[2]


def absolute(word: str) -> str:
    """What follows a scheme, in words that mean the same in any working folder."""
    return str(Path(word).resolve()) if word and is_there(word) else word


def open_installed(scheme: str, rest: str, **how: Any) -> Encoder:
    """Returns the encoder that another package has brought under a scheme.

    Args:
        scheme: the name of its entry point.
        rest: what follows it; the class gets this and `how`, as those here get a path.
        **how: see `Encoder`.

    Raises:
        UsageError: nobody has brought it.
        ChatBindError: it cannot be imported or made, or is no class of encoders.
    """
    from chatbind_cli.encoders.encoder import Encoder  # noqa: PLC0415

    point = _entry_point(scheme)
    where = f"{scheme}:{rest} (package {_package(point)})"
    try:
        kind = point.load()
        if not (isinstance(kind, type) and issubclass(kind, Encoder)):
            raise ChatBindError(f"{point.value} is no subclass of Encoder", where=where)
        make: Callable[..., Encoder] = kind
        made = make(rest, **how)
    except Exception as error:
        # whatever the code of others raises
        failure = contained(error, where=where)
        if failure is error:
            raise
        raise failure from error
    return made


def _entry_point(scheme: str) -> EntryPoint:
    from importlib.metadata import entry_points  # noqa: PLC0415  slow, and seldom needed

    installed = entry_points(group=GROUP)
    found = list(dict.fromkeys(point for point in installed if point.name == scheme))
    if not found:
        names = sorted({*_OWN, *installed.names})
        raise UsageError(
            f"there is no file {scheme}:..., and no kind of encoder of that name is installed",
            hint=f"a path, or one of {', '.join(f'{name}:' for name in names)}",
        )
    if len({point.value for point in found}) > 1:
        packages = " and ".join(_package(point) for point in found)
        raise UsageError(f"{packages} both bring an encoder {scheme!r}", hint="remove one of them")
    return found[0]


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.module
