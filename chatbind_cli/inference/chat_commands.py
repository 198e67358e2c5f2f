"""A dialogue line by line: what begins with `/` is done, everything else is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from chatbind_cli.console import note, show
from chatbind_cli.errors import MediaError, UsageError, contained
from chatbind_cli.inference.chat import Chat
from chatbind_cli.inference.chat_input import check_utf8, command_of, file_words, whole_text
from chatbind_cli.inference.chat_record import read_dialogue, write_dialogue
from chatbind_cli.media.medium import Medium, is_there, parse_attachment
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.root import ADDRESSES
from chatbind_cli.media.source import shown

_OWN_SYSTEM = "-"
_LONGEST_PROMPT = 40


@dataclass(frozen=True)
class Command:
    """What `/word` does: with which words behind it, and in which words `/help` tells."""

    does: Callable[[Repl, str], None]
    takes: str
    help: str


class Repl:
    """What a person writes to a `Chat`, read line by line."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat

    @property
    def prompt(self) -> str:
        """What stands before the next line on a terminal: what waits, and a mark."""
        waiting = ", ".join(_told(medium) for medium in self.chat.waiting)
        if len(waiting) > _LONGEST_PROMPT:
            waiting = f"{len(self.chat.waiting)} media"
        return f"[{waiting}] > " if waiting else "> "

    def run(self, lines: Iterable[str]) -> None:
        """Answers the lines of a dialogue until it ends.

        A line that fails leaves a note, and the dialogue goes on. An interrupt ends the answer at
        hand.

        Raises:
            KeyboardInterrupt: an interrupt while no answer is at hand.
        """
        for line in lines:
            try:
                if not self._take(line):
                    return
            except KeyboardInterrupt:
                note("the answer was interrupted")
            except BrokenPipeError:
                raise
            except Exception as error:
                # a dialogue is worth more than one line of it, whatever that has met
                note(str(contained(error, where="this line")))

    def _take(self, line: str) -> bool:
        """Does what a line says, and tells whether the dialogue goes on."""
        check_utf8(line)
        word, rest = command_of(line)
        if word in ENDS:
            return False
        if word in COMMANDS:
            COMMANDS[word].does(self, rest)
        elif word:
            near = get_close_matches(word, [*COMMANDS, *ENDS], n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists what there is"
            raise UsageError(f"{word} is no command", hint=hint)
        elif rest:
            self.chat.ask(whole_text(rest))
        return True

    def attach(self, rest: str, modality: str | None = None) -> None:
        """Adds files to the next question, all of them or none."""
        media = []
        for word in file_words(rest):
            if word.startswith("--"):
                modality = word.removeprefix("--")
                if modality not in MODALITIES:
                    known = ", ".join(f"--{name}" for name in MODALITIES)
                    raise UsageError(f"there is no {word}", hint=f"there are {known}")
            else:
                media.append(_present(parse_attachment(word, modality)))
        if not media:
            raise UsageError("no file to attach", hint="write /attach FILE or /attach FILE@0.5")
        self.chat.attach(*media)

    def media(self, rest: str) -> None:
        """Shows what is attached to what."""
        exchanges = self.chat.exchanges
        for number, said in enumerate(exchanges, start=1):
            if said.question.media:
                told = ", ".join(_told(medium) for medium in said.question.media)
                gone = " (no longer read)" if number <= self.chat.left_out else ""
                show(f"{number}. {told}{gone}: {_line(said.question.text)}")
        if self.chat.waiting:
            show(f"waiting: {', '.join(_told(medium) for medium in self.chat.waiting)}")
        if not self.chat.waiting and not any(said.question.media for said in exchanges):
            show("nothing is attached")

    def drop(self, rest: str) -> None:
        """Lets go of what waits."""
        if not self.chat.waiting:
            raise UsageError("nothing waits for a question")
        self.chat.waiting.clear()

    def system(self, rest: str) -> None:
        """Sets the system text, or shows it."""
        if rest:
            self.chat.system = None if rest == _OWN_SYSTEM else whole_text(rest)
        else:
            show(self.chat.system or "the model's own")

    def undo(self, rest: str) -> None:
        """Forgets the last question and answer."""
        note(f"forgotten: {_line(self.chat.undo().question.text)}")

    def retry(self, rest: str) -> None:
        """Asks the last question again."""
        self.chat.retry()

    def reset(self, rest: str) -> None:
        """Forgets all."""
        self.chat.reset()

    def save(self, rest: str) -> None:
        """Writes the dialogue down."""
        path = _one_file(rest, "/save")
        write_dialogue(self.chat, path)
        note(f"{path}: {len(self.chat.exchanges)} questions and answers")

    def load(self, rest: str) -> None:
        """Takes up a dialogue that was written down."""
        read_dialogue(self.chat, _one_file(rest, "/load"))
        note(f"goes on after {len(self.chat.exchanges)} questions and answers")

    def help(self, rest: str) -> None:
        """Shows the commands."""
        told = [(f"{word} {its.takes}", its.help) for word, its in COMMANDS.items() if its.help]
        named = [f"/{modality}" for modality in MODALITIES]
        told.insert(1, (f"{', '.join(named[:3])}, ...", "the same, and say what they are"))
        told.append(("/quit", "end; so does Ctrl-D. Ctrl-C ends an answer"))
        width = max(len(words) for words, _ in told) + 2
        for words, text in told:
            show(f"{words:{width}}{text}")


def _named(modality: str) -> Callable[[Repl, str], None]:
    return lambda repl, rest: repl.attach(rest, modality)


COMMANDS = {
    "/attach": Command(
        Repl.attach,
        "[--thermal] FILE[@0.5]...",
        "add files to the next question",
    ),
    **{f"/{name}": Command(_named(name), "FILE[@0.5]...", "") for name in MODALITIES},
    "/media": Command(Repl.media, "", "show what is attached to which question"),
    "/drop": Command(Repl.drop, "", "let go of what waits for the next question"),
    "/system": Command(
        Repl.system, "[TEXT]", f"tell the model how to answer; {_OWN_SYSTEM}: as it was made"
    ),
    "/undo": Command(Repl.undo, "", "forget the last question and its answer"),
    "/retry": Command(Repl.retry, "", "ask the last question again, with another seed"),
    "/save": Command(Repl.save, "FILE.jsonl", "write the dialogue down"),
    "/load": Command(Repl.load, "FILE.jsonl", "go on with a dialogue that was written down"),
    "/reset": Command(Repl.reset, "", "forget all that was said"),
    "/help": Command(Repl.help, "", "this"),
}
"""All commands but those that end the dialogue, in the order of `/help`."""

ENDS = ("/quit", "/exit", "/bye")


def _present(attachment: Medium) -> Medium:
    """The attachment; now is the time to say that there is no such file, not at the question.

    Raises:
        MediaError: there is none.
    """
    ref = str(attachment.ref)
    if ref == "-" or not (ref.startswith(ADDRESSES) or is_there(ref)):
        raise MediaError("no such file", where=shown(ref))
    return attachment


def _one_file(rest: str, word: str) -> Path:
    names = file_words(rest)
    if len(names) != 1:
        raise UsageError(f"{word} takes one file name", hint=f"write {word} FILE.jsonl")
    return Path(names[0])


def _told(medium: Medium) -> str:
    """A medium in few words."""
    name = shown(medium.name)
    name = name if "://" in name else name.rpartition("/")[2]
    weight = "" if medium.weight == 1.0 else f"@{medium.weight:g}"
    return f"{name}{weight}"


def _line(text: str) -> str:
    """The beginning of a text."""
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
