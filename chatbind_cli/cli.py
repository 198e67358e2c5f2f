"""The `chatbind` program: a table of lazy commands, and the one place where errors become exits.

Knows the commands' names and one-line helps; a command's module is imported when it is chosen.
"""

from __future__ import annotations

import errno
import gc
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from chatbind_cli import __version__, worker
from chatbind_cli.console import printable
from chatbind_cli.errors import ChatBindError, Interrupted, Terminated, debugging

# name -> one-line help
COMMANDS: dict[str, str] = {
    "download": "Fetch weights and data, verified and resumable.",
    "apply-delta": "Add published delta weights to a base model.",
    "make-delta": "Subtract a base model from a target model.",
    "convert": "Write a ChatBind model in this program's layout.",
    "doctor": "Tell what this machine can do, and what is missing.",
    "encode": "Turn media into embeddings.",
    "inspect": "Show training data as a model will see them.",
    "pretrain": "Stage 1: fit the projector on captions.",
    "extract-projector": "Take the projector out of a checkpoint.",
    "finetune": "Stage 2: fit projector and language model on instructions.",
    "ask": "Ask a question about media.",
    "vqa": "Answer question records with answer records.",
    "review": "Let a judge score two sets of answers.",
    "summarize": "Tabulate review records.",
    "serve": "Answer whoever speaks OpenAI's API.",
    "toy": "Make a small world to try everything in.",
}


CONFIG = "chatbind.config"
"""In a context's `meta`: the file of `chatbind --config FILE COMMAND`, for the command to read."""


def kebab(token: str) -> str:
    """The seed writes `--data_path`; both spellings name the same option."""
    return token.replace("_", "-")


class LazyCommand(click.Command):
    """A command's name and one-line help; its module is imported when it is chosen."""

    def load(self) -> click.Command:
        """The command itself."""
        name = str(self.name).replace("-", "_")
        loaded: click.Command = importlib.import_module(f"chatbind_cli.commands.{name}").command
        return loaded

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """The context of the command itself, so that parsing, help and running are its own."""
        return self.load().make_context(info_name, args, parent, **extra)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """The command's own completions."""
        return self.load().shell_complete(ctx, incomplete)


class InOrder(click.Group):
    """A group that lists its commands in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the table's order."""
        return list(self.commands)


@click.group(
    cls=InOrder,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "CHATBIND",
        "token_normalize_func": kebab,
        "max_content_width": 100,
    },
    epilog="`chatbind COMMAND --help` shows a command's options and examples.",
)
@click.version_option(__version__, message="%(prog)s %(version)s")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with a table of option values a command.",
)
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
@click.option("--quiet", is_flag=True, help="No notes and no progress on stderr.")
@click.pass_context
def app(ctx: click.Context, config: Path | None, debug: bool, quiet: bool) -> None:
    """Talk with a language model about images, video, audio, depth, thermal and motion."""
    ctx.meta[CONFIG] = config
    if debug:
        os.environ["CHATBIND_DEBUG"] = "1"
    if quiet:
        os.environ["CHATBIND_QUIET"] = "1"


for _name, _help in COMMANDS.items():
    app.add_command(LazyCommand(_name, short_help=_help))


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the program on `args` (`sys.argv[1:]`) and exits with its code."""
    words = list(sys.argv[1:] if args is None else args)
    _open_streams()
    if worker.has_parent():
        worker.work_in_child()
        worker.watch_parent()
    code, message = run(words)
    if worker.has_parent():
        worker.report_outcome(code, message)
        # The parent ends the other workers where need be; the launcher would only add a traceback.
        code = 0
    elif message:
        sys.stderr.write(printable(message) + "\n")
    if code != 0:
        # The interpreter flushes stdout once more at its end, which may have failed for good; let
        # that go nowhere.
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # else the interpreter's last walk through all that lives takes a second, of the libraries
    gc.freeze()
    sys.exit(code)


def _open_streams() -> None:
    """Puts something in the place of standard streams that the caller has closed.

    Otherwise the next file to be opened would become standard output. What is put there cannot be
    used: a read-only standard output fails when it is written, as a closed one should.
    """
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            useless = os.O_WRONLY if number == 0 else os.O_RDONLY
            handle = os.open(os.devnull, os.O_WRONLY if number == 2 else useless)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        # records are UTF-8 in every locale
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


_CLOSED_PIPE = 141
_INTERRUPTED = 130


def run(args: list[str]) -> tuple[int, str]:
    """Runs the program and turns every way to end into an exit code and a line for stderr."""
    try:
        _complete_shell()
        with app.make_context("chatbind", list(args), obj=list(args)) as ctx:
            app.invoke(ctx)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        return error.exit_code, ""
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED, "chatbind: interrupted"
    except Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)  # as the sender expects
    except click.ClickException as error:
        return error.exit_code, _click_text(error)
    except BrokenPipeError:
        return _CLOSED_PIPE, ""
    except ChatBindError as error:
        kind = "" if error.exit_code == Interrupted.exit_code else "error: "
        return error.exit_code, _text(error, f"chatbind: {kind}{error}", args)
    except OSError as error:
        return 1, _text(error, f"chatbind: error: {_one_line(error)}", args)
    except Exception as error:  # a bug of ours, or of a library: the user gets a line for that too
        return 1, _text(error, _unexpected(error), args)
    return 0, ""


def _complete_shell() -> None:
    instruction = os.environ.get("_CHATBIND_COMPLETE")
    if instruction:
        from click.shell_completion import shell_complete  # noqa: PLC0415  only for TAB

        code = shell_complete(app, {}, "chatbind", "_CHATBIND_COMPLETE", instruction)
        raise click.exceptions.Exit(code)


def _click_text(error: click.ClickException) -> str:
    """A usage error as click words it: the usage line, where to find help, what is wrong."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error.format_message()  # the whole help, usage line and all
    context = getattr(error, "ctx", None)
    lines = []
    if context is not None:
        lines = [context.get_usage(), f"Try '{context.command_path} --help' for help.", ""]
    return "\n".join([*lines, f"Error: {error.format_message()}"])


def _text(error: BaseException, line: str, args: Sequence[str]) -> str:
    if debugging() or "--debug" in args:
        return "".join(traceback.format_exception(error)) + line
    return line


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno == errno.EBADF:
        return "standard input or output is needed, and closed"
    if isinstance(error, OSError) and error.strerror:
        files = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([*(" -> ".join(files),) * bool(files), error.strerror])
    return " ".join(str(error).split()) or type(error).__name__


def _unexpected(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "chatbind: error: out of memory; try a smaller --batch-size or --dtype bfloat16"
    return (
        f"chatbind: internal error: {type(error).__name__}: {_one_line(error)}; "
        "run again with --debug and report the traceback"
    )
