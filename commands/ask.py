"""`chatbind ask`: ask a question about media."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from chatbind_cli.errors import UsageError
from chatbind_cli.inference.chat_input import check_utf8
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.media.medium import Medium, parse_attachment
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.options import MediaOptions

from . import _base
from ._base import in_group
from ._engine import check_engine, connected
from ._inference import ModelChoice, generation_options, model_options
from ._options import device_options, one_reader, stack
from ._preprocessing import media_changes, media_options

if TYPE_CHECKING:
    from chatbind_cli.inference.chat_commands import Repl

_media, _question, _output = in_group("Media"), in_group("Question"), in_group("Output")


def _attach(modality: str | None) -> Callable[..., None]:
    """A callback that keeps the order in which the options stand on the line."""

    def keep(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> None:
        kept: list[Medium] = ctx.meta.setdefault("chatbind.attachments", [])
        kept += [parse_attachment(value, modality) for value in values]

    return keep


def _named(modality: str) -> Callable[[Any], Any]:
    return _media(
        f"--{modality}",
        multiple=True,
        metavar="FILE",
        expose_value=False,
        callback=_attach(modality),
        help=f"As --attach, and it is {'an' if modality[0] in 'aeiou' else 'a'} {modality} file.",
    )


attachment_options = stack(
    _media(
        "-a",
        "--attach",
        "--input-file",
        "attach",
        multiple=True,
        metavar="FILE",
        expose_value=False,
        callback=_attach(None),
        help="What the question is about; repeat for several. A path, a URL, or - for standard "
        "input; its content tells what it is. FILE@0.5 multiplies its embedding, which has "
        "norm 1 before, by 0.5.",
    ),
    *map(_named, MODALITIES),
    _media(
        "--mix",
        is_flag=True,
        help="One embedding for all media: their weighted sum, brought to norm 1.",
    ),
)


@_base.command(
    "ask",
    examples=[
        "chatbind ask -m model -a media/image/heldout-0000.png 'Which digit is this?'",
        "echo 'Describe it.' | chatbind ask -m model --audio media/audio/heldout-0000.wav --json",
    ],
    elsewhere=[
        "chatbind ask -m checkpoints/chatbind-7b -a dog.jpg 'What is the dog doing?'",
    ],
)
@click.argument("question", required=False)
@model_options
@attachment_options
@media_options
@_question(
    "--query",
    advanced=True,
    metavar="TEXT",
    help="The question, if it is not an argument. Without either it is read from standard input.",
)
@_question(
    "--chat",
    is_flag=True,
    help="Go on asking: each line of standard input is a question, /attach FILE adds media to the "
    "next one, /help lists what else there is, /quit or Ctrl-D ends. Ctrl-C ends an answer.",
)
@_question(
    "--system",
    metavar="TEXT",
    help="Tell the model how to answer, in place of what its prompt style says.",
)
@_output(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a record when the answer is whole, with the media, tokens and seconds.",
)
@_output(
    "--plain",
    is_flag=True,
    help="Print answers as they are on a terminal too, where Markdown is rendered otherwise.",
)
@_output(
    "--verbose",
    is_flag=True,
    help="Tell on standard error how many tokens an answer took, and how long.",
)
@generation_options
@device_options
def command(
    question: str | None,
    choice: ModelChoice,
    mix: bool,
    media: MediaOptions,
    query: str | None,
    chat: bool,
    system: str | None,
    as_json: bool,
    plain: bool,
    verbose: bool,
    settings: GenerationSettings,
    device: str,
    dtype: str,
) -> None:
    """Ask a question about media, and read the answer while it is written.

    Placeholders such as <image> in the question say where media go; otherwise they follow it, in
    the order of the options. Unless the options say otherwise, media are read as the model's
    training read them.
    """
    attachments = tuple(click.get_current_context().meta.get("chatbind.attachments", ()))
    if question is not None and query is not None:
        raise UsageError("the question is given twice", hint="as an argument or with --query")
    if settings.logprobs and not as_json:
        raise UsageError("--logprobs says something in records alone", hint="add --json")
    check_engine(choice, settings)
    words = question if question is not None else query
    first = None if words == "-" else words
    reading = "-" if chat or first is None else None
    one_reader(
        *choice.words_on_line(),
        *(("a medium", attachment.ref) for attachment in attachments),
        ("the dialogue" if chat else "the question", reading),
    )
    if words is None and not chat and sys.stdin.isatty():
        raise UsageError("no question", hint="write it as an argument, or use --chat")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # in every locale alike: what is not text is told by `check_utf8`
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    choice = choice.resolved()
    if first is None and not chat:
        first = _piped_question()
    check_utf8(first or "")
    check_utf8(system or "", "the system text")
    # imported here: they bring torch
    from chatbind_cli.inference.answer_view import view_of  # noqa: PLC0415
    from chatbind_cli.inference.answerer import Answerer  # noqa: PLC0415
    from chatbind_cli.inference.chat import Chat  # noqa: PLC0415
    from chatbind_cli.inference.chat_commands import Repl  # noqa: PLC0415
    from chatbind_cli.inference.media_encoder import MediaEncoder  # noqa: PLC0415

    loaded = choice.load(device, dtype)
    media_encoder = MediaEncoder(loaded, options=loaded.media_options(**media_changes(media)))
    view = None if as_json else view_of(sys.stdout, plain=plain)
    with connected(choice, loaded) as engine:
        answerer = Answerer(loaded, media_encoder, style=choice.prompt_style, engine=engine)
        dialogue = Chat(
            answerer, settings, model_id=loaded.model_id, view=view, mix=mix, verbose=verbose
        )
        dialogue.system = system
        dialogue.attach(*attachments)
        if chat:
            repl = Repl(dialogue)
            repl.run(_lines(first, repl))
        elif first is not None:
            dialogue.ask(first)


def _piped_question() -> str:
    question = sys.stdin.read().strip()
    if not question:
        raise UsageError("standard input has no question", hint="write it as an argument")
    return question


def _lines(first: str | None, repl: Repl) -> Iterator[str]:
    """What the user says, line by line until the end of input; on a terminal with an editor."""
    if first is not None:
        yield first
    if sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty()):
        from chatbind_cli.inference.chat_commands import COMMANDS, ENDS  # noqa: PLC0415
        from chatbind_cli.inference.chat_terminal import terminal_lines  # noqa: PLC0415

        with_files = [word for word, command in COMMANDS.items() if "FILE" in command.takes]
        yield from terminal_lines(lambda: repl.prompt, [*COMMANDS, *ENDS], with_files)
    else:
        yield from sys.stdin
