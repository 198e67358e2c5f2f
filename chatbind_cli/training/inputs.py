"""What a training run reads, looked at before any work begins.

Missing files, records that make no sense and media that are not there are named here, in the
process that the user started, so that the errors are one line. Imports nothing heavy, except to
look into an embedding store.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from chatbind_cli import launch
from chatbind_cli.data.conversations import Conversation, Conversations, parse_conversation
from chatbind_cli.errors import (
    CheckpointError,
    MediaError,
    RecordError,
    WeightsError,
    contained,
)
from chatbind_cli.files import (
    bears,
    refuse_foreign_file,
    refuse_overlap,
    replace_file,
    sha256_file,
)
from chatbind_cli.imagebind.config import ENCODER_PLACES, usual_encoder
from chatbind_cli.jsonl import Record, dumps, read_lines, read_records
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.training.rundir import PICTURE_MARK
from chatbind_cli.training.settings import TrainingSettings

_SHOWN = 3


class Rejected:
    """What a run leaves out, and why."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def __len__(self) -> int:
        """How many reasons there are."""
        return len(self.records)

    def add(self, where: str, error: str) -> None:
        """Notes a record that cannot be used, and why."""
        self.records.append({"record": where, "error": error})

    def add_media(self, bad: Mapping[Medium, str]) -> None:
        """Notes media that cannot be used, each with the reason."""
        for medium, error in bad.items():
            self.records.append({str(medium.modality): medium.name, "error": error})

    def media(self) -> dict[Medium, str]:
        """The media among them, each with the reason."""
        return {
            Medium(modality, record[modality]): record["error"]
            for record in self.records
            for modality in MODALITIES
            if modality in record
        }

    @classmethod
    def load(cls, path: Path) -> Rejected:
        """What an earlier run of the same command left out."""
        rejected = cls()
        if path.exists():
            rejected.records = [record for record, _ in read_records(path)]
        return rejected

    def stop(self, path: Path | None = None) -> None:
        """Ends the run if anything cannot be used.

        Args:
            path: where the whole list is, if it is anywhere.

        Raises:
            RecordError: it names the first few.
        """
        if not self.records:
            return
        first = "; ".join(str(record["error"]) for record in self.records[:_SHOWN])
        more = len(self.records) - _SHOWN
        rest = f"; and {more} more" if more > 0 else ""
        listed = f" (all of them: {path})" if path is not None else ""
        raise RecordError(
            f"{len(self.records)} record(s) or media cannot be used: {first}{rest}{listed}",
            hint="mend them, or leave them out with --on-error skip",
        )

    def save(self, path: Path) -> None:
        """Writes the list, or removes an older one where there is nothing to list."""
        if not self.records:
            path.unlink(missing_ok=True)
            return
        with replace_file(path) as temporary:
            lines = [dumps(record) + "\n" for record in self.records]
            temporary.write_text("".join(lines), encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads, checked.

    Attributes:
        conversations: those that can be used.
        media: their media, each once.
        held_out: conversations to measure the loss on.
        encoder: the encoder's weights; None where a store or the lack of media makes it needless.
        rejected: what was left out.
        hashes: SHA-256 of the files that decide the result.
    """

    conversations: Conversations
    media: list[Medium]
    held_out: Conversations
    encoder: Path | None
    rejected: Rejected
    hashes: dict[str, str]

    def leave_out(self, bad: Mapping[Medium, str]) -> Inputs:
        """The inputs without the conversations that name bad media.

        Raises:
            RecordError: nothing is left.
        """
        self.rejected.add_media(bad)
        kept = without(self.conversations, bad)
        if not len(kept):
            self.rejected.stop()
        return replace(
            self,
            conversations=kept,
            held_out=without(self.held_out, bad),
            media=[medium for medium in self.media if medium not in bad],
        )


def check_inputs(settings: TrainingSettings) -> Inputs:
    """Reads the records and looks for everything they and the settings name.

    Raises:
        CheckpointError: there is no language model or projector.
        WeightsError: there is no encoder.
        RecordError: the data cannot be read, or (unless they are to be skipped) records or media
            cannot be used.
    """
    given = (settings.data, settings.eval_data, settings.model, settings.projector)
    refuse_overlap(settings.output, [*given, settings.encoder, settings.store])
    if settings.plot is not None:
        is_ours = partial(bears, mark=PICTURE_MARK.encode())
        refuse_foreign_file(settings.plot, is_ours, what="a loss curve")
    _check_model(settings)
    conversations, rejected = read_checked(settings.data)
    held_out = Conversations()
    if settings.eval_data is not None:
        held_out, more = read_checked(settings.eval_data)
        rejected.records += more.records
    media = distinct_media(chain(conversations, held_out))
    hashes = {"data": sha256_file(settings.data)}
    if settings.projector is not None:
        hashes["projector"] = sha256_file(settings.projector)
    inputs = Inputs(
        conversations=conversations,
        media=media,
        held_out=held_out,
        encoder=_find_encoder(settings, media),
        rejected=rejected,
        hashes=hashes,
    )
    inputs = inputs.leave_out(_bad_media(settings, media))
    if settings.on_error == "fail":
        inputs.rejected.stop()
    return inputs


def _check_model(settings: TrainingSettings) -> None:
    if not (settings.model / "config.json").is_file():
        raise CheckpointError(
            "is no folder of a language model: it has no config.json",
            where=str(settings.model),
            hint="fetch a model of the Hugging Face hub with `chatbind download hf:OWNER/NAME`",
        )
    if settings.projector is not None and not settings.projector.is_file():
        raise CheckpointError(
            "no such projector file",
            where=str(settings.projector),
            hint="make one with `chatbind extract-projector`",
        )


def _find_encoder(settings: TrainingSettings, media: list[Medium]) -> Path | None:
    if settings.encoder is not None:
        if not settings.encoder.exists():
            raise WeightsError("no such encoder", where=str(settings.encoder))
        return settings.encoder
    if settings.store is not None or not media:
        return None
    usual = usual_encoder()
    if usual is not None:
        return usual
    raise WeightsError(
        f"no encoder at {' or '.join(map(str, ENCODER_PLACES))}",
        hint="name ImageBind's weights with --encoder, fetch them with "
        "`chatbind download imagebind-huge`, or give ready embeddings with --store",
    )


def _bad_media(settings: TrainingSettings, media: Iterable[Medium]) -> dict[Medium, str]:
    if settings.store is not None:
        return _missing_rows(settings, list(media))
    # the process that started the workers has looked; half a million look-ups take their time
    return {} if launch.is_worker() else _missing(settings, media)


def _missing(settings: TrainingSettings, media: Iterable[Medium]) -> dict[Medium, str]:
    """The media for which there is no file, each with the reason."""
    missing = {}
    for medium in media:
        try:
            settings.media_root.find(medium.name)
        except MediaError as error:
            missing[medium] = str(error)
    return missing


def _missing_rows(settings: TrainingSettings, media: list[Medium]) -> dict[Medium, str]:
    """The media of which the store has no embedding, each with the reason."""
    from chatbind_cli.training.embeddings import stored_embeddings  # noqa: PLC0415  heavy

    embeddings, _, _ = stored_embeddings(settings, media)
    return {
        medium: f"{medium.name}: the store has no embedding of this {medium.modality}"
        for medium in media
        if medium not in embeddings
    }


def read_checked(path: Path) -> tuple[Conversations, Rejected]:
    """The usable conversations of a file, and what is wrong with the others.

    Raises:
        RecordError: the file cannot be read as records at all, or holds no usable one.
    """
    conversations = Conversations()
    rejected = Rejected()
    for record, where, _, problem in read_lines(path):
        try:
            if problem is not None:
                raise problem
            conversations.append(parse_conversation(record, where))
        except Exception as error:
            rejected.add(where, str(contained(error, where=where)))
    if not len(conversations):
        rejected.stop()
        raise RecordError("has no conversations", where=str(path))
    return conversations, rejected


def distinct_media(conversations: Iterable[Conversation]) -> list[Medium]:
    """All media of conversations, each once, in the order in which they first occur."""
    return list(dict.fromkeys(m for c in conversations for m in c.media))


def without(conversations: Conversations, bad: Mapping[Medium, str]) -> Conversations:
    """The conversations that name none of these media."""
    if not bad:
        return conversations
    return Conversations([c for c in conversations if not any(m in bad for m in c.media)])
