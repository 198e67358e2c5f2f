"""Renders one chat template, in a process of its own: a template is a program of somebody else's.

Run as a script with the template and its variables as JSON on stdin; writes JSON to stdout, with
`text` or `error`. The sandbox of jinja2 keeps a template from reaching out, and bounds neither time
nor memory: that is done by limits on this process.
No module of this program is imported here.
"""

from __future__ import annotations

import json
import resource
import sys
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

_CPU_SECONDS = 2
_MEMORY_BYTES = 512 << 20
_LONGEST_TEXT = 4 << 20
# some templates tell the date: a sample and a question are to have the same tokens on every day
_DAY = datetime(2024, 7, 26)


def main() -> None:
    """Reads the task, renders, and writes the outcome."""
    _limit(resource.RLIMIT_CPU, _CPU_SECONDS)
    _limit(resource.RLIMIT_AS, _MEMORY_BYTES)
    task = json.load(sys.stdin)
    try:
        outcome = {"text": _render(task["template"], task["variables"])}
    except MemoryError:
        outcome = {"error": "it takes more memory than a prompt may"}
    except Exception as error:
        outcome = {"error": str(error) or type(error).__name__}
    json.dump(outcome, sys.stdout)


def _limit(kind: int, most: int) -> None:
    """Lowers a limit; on a system that knows it not (memory, on macOS) time alone is bounded."""
    hard = resource.getrlimit(kind)[1]
    value = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, value))


def _render(template: str, variables: dict[str, Any]) -> str:
    pieces: list[str] = []
    left = _LONGEST_TEXT
    for piece in _environment().from_string(template).generate(**variables):
        left -= max(len(piece), 1)
        if left < 0:
            raise ValueError("a prompt of more than 4 MiB")
        pieces.append(piece)
    return "".join(pieces)


def _environment() -> ImmutableSandboxedEnvironment:
    """jinja2 as transformers sets it up for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _DAY.strftime,
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(Extension):
    """`{% generation %}` marks what an assistant says; the text is as it is without it."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 has it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """`dict` without the class behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """`namespace` without the attributes that Python keeps to itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        names = dict(*args[1:], **kwargs)
        for name in names:
            _refuse_private(name)
        Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"the namespace has no {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


if __name__ == "__main__":
    main()
