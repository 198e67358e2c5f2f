"""What a training run reads, looked at before any work begins.

Missing files, records that make no sense and media that are not there are named in the process that
the user started, so that the errors are one line; workers are told what it found, and do not look
again. Imports nothing heavier than Arrow, except to look into an embedding store.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from chatbind_cli.console import note
from chatbind_cli.data.checked import checked_file
from chatbind_cli.data.conversations import Conversations, Media
from chatbind_cli.encoders.opening import ENCODER_PLACES, usual_encoder
from chatbind_cli.encoders.reference import is_reference
from chatbind_cli.errors import (
    CheckpointError,
    RecordError,
    WeightsError,
)
from chatbind_cli.files import refuse_overlap, replace_file, replace_text
from chatbind_cli.jsonl import Record, dumps, read_records
from chatbind_cli.media.medium import Medium
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.plots import check_plot
from chatbind_cli.training.data_files import DataFile
from chatbind_cli.training.settings import TrainingSettings
from chatbind_cli.worker import STATUS_FOLDER

_SHOWN = 3
_TOLD = "CHATBIND_TRAINING_INPUTS"  # in a worker's environment: the file of what its parent finds
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads, checked.

    Attributes:
        conversations: those that can be used.
        media: their media, each once.
        held_out: conversations to measure the loss on.
        encoders: what opens them: as the user says it, else those that are needed and were found.
        bad_records: what was left out, as in `{"record": place, "error": ...}`.
        bad_media: likewise, each with the reason.
    """

    conversations: Conversations
    media: Media
    held_out: Conversations
    encoders: tuple[str, ...]
    bad_records: list[Record]
    bad_media: dict[Medium, str] = field(default_factory=dict)

    @property
    def rejected(self) -> list[Record]:
        """All that was left out; a medium is named as records do, `{"image": name, ...}`."""
        media = [{str(m.modality): m.name, "error": why} for m, why in self.bad_media.items()]
        return self.bad_records + media

    def seen_with(self, names: Sequence[str], known: Sequence[Collection[str]]) -> Inputs:
        """The inputs with every conversation once with each encoder that knows its media.

        Notes say what there is.

        Args:
            names: of the encoders.
            known: the modalities that each knows.
        """
        left_out = f", {len(self.rejected)} input(s) left out" if self.rejected else ""
        note(
            f"{len(self.conversations):,} conversations with {len(self.media):,} "
            f"different media{left_out}"
        )
        if len(known) == 1:
            return self
        seen = replace(
            self,
            conversations=self.conversations.viewed(known),
            held_out=self.held_out.viewed(known),
        )
        note(
            f"every conversation is seen once with each of {len(known)} encoders that knows its "
            f"media: an epoch has {len(seen.conversations):,} samples"
        )
        there = Media(self.conversations).modalities()
        for name, own in zip(names, known, strict=True):
            if not set(own).intersection(there):
                note(f"no conversation has media that {name} knows: its projector learns nothing")
        return seen

    def leave_out(self, bad: Mapping[Medium, str]) -> Inputs:
        """The inputs without the conversations that name bad media, each with its reason.

        Raises:
            RecordError: nothing is left.
        """
        if not bad:
            return self
        conversations, held_out = self.conversations.without(bad), self.held_out.without(bad)
        left = replace(
            self,
            conversations=conversations,
            held_out=held_out,
            media=Media(conversations, held_out),
            bad_media={**self.bad_media, **bad},
        )
        if not len(left.conversations):
            refuse_rejected(left.rejected)
        return left


def check_inputs(settings: TrainingSettings) -> Inputs:
    """Reads the records and looks for everything they and the settings name.

    Raises:
        CheckpointError: there is no language model or projector.
        WeightsError: there is no encoder.
        RecordError: the data cannot be read, or (unless they are to be skipped) records or media
            cannot be used.
    """
    _check_files(settings)
    conversations, rejected = read_conversations(settings.data, settings.seed)
    held_out = Conversations()
    if settings.eval_data is not None:
        held_out, more = read_conversations([DataFile(settings.eval_data)])
        rejected += more
    media = Media(conversations, held_out)
    if settings.stores:
        bad = _missing_rows(settings, media)
        _tell_of_encoders(settings.encoders)
    else:
        bad = missing_media(settings.media_root, media)
    inputs = Inputs(
        conversations=conversations,
        media=media,
        held_out=held_out,
        encoders=_find_encoders(settings, media),
        bad_records=rejected,
    ).leave_out(bad)
    if settings.on_error == "fail":
        refuse_rejected(inputs.rejected)
    return inputs


@contextmanager
def telling_workers() -> Iterator[Callable[[Inputs, Path], None]]:
    """Has workers that are started meanwhile wait for what their parent finds.

    Yields:
        tells it to them, in their status folder.
    """
    name = "inputs.pickle"

    def tell(inputs: Inputs, folder: Path) -> None:
        with replace_file(folder / name) as temporary:
            temporary.write_bytes(pickle.dumps(inputs))

    os.environ[_TOLD] = name
    try:
        yield tell
    finally:
        del os.environ[_TOLD]


def parent_tells() -> bool:
    """Whether this process is a worker whose parent looks at the inputs."""
    return _TOLD in os.environ


def told_by_parent() -> Inputs:
    """What the parent has found, as soon as it is told."""
    path = Path(os.environ[STATUS_FOLDER], os.environ[_TOLD])
    while not path.exists():  # where the parent fails it ends this process
        time.sleep(_POLL_S)
    found: Inputs = pickle.loads(path.read_bytes())  # noqa: S301  our parent's own
    return found


def refuse_rejected(rejected: Sequence[Record], path: Path | None = None) -> None:
    """Ends the run if anything cannot be used; the path is where the whole list is.

    Raises:
        RecordError: it names the first few.
    """
    if not rejected:
        return
    first = "; ".join(str(record["error"]) for record in rejected[:_SHOWN])
    more = len(rejected) - _SHOWN
    rest = f"; and {more} more" if more > 0 else ""
    listed = f" (all of them: {path})" if path is not None else ""
    raise RecordError(
        f"{len(rejected)} record(s) or media cannot be used: {first}{rest}{listed}",
        hint="mend them, or leave them out with --on-error skip",
    )


def read_rejected(path: Path) -> dict[Medium, str]:
    """The media that were left out when a file was written, each with the reason."""
    records = [record for record, _ in read_records(path)] if path.exists() else []
    return {
        Medium(modality, record[modality]): record["error"]
        for record in records
        for modality in MODALITIES
        if modality in record
    }


def save_rejected(rejected: Sequence[Record], path: Path) -> None:
    """Writes what was left out, or removes an older list where there is nothing to list."""
    if not rejected:
        path.unlink(missing_ok=True)
        return
    replace_text(path, "".join(dumps(record) + "\n" for record in rejected))


def _check_files(settings: TrainingSettings) -> None:
    paths = [file.path for file in settings.data]
    given = (*paths, settings.eval_data, settings.model, settings.projector)
    encoders = [Path(one) for one in settings.encoders if not is_reference(one)]
    refuse_overlap(settings.output, [*given, *encoders, *settings.stores])
    if settings.plot is not None:
        check_plot(settings.plot)
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


def _find_encoders(settings: TrainingSettings, media: Media) -> tuple[str, ...]:
    if settings.encoders or settings.stores or not media:
        return settings.encoders
    from chatbind_cli.training.encoders import Before  # noqa: PLC0415  heavy

    before = Before.of(settings)
    if before.references and not before.gone:
        return before.references
    usual = usual_encoder()
    if usual is not None:
        return (str(usual),)
    if before.gone:
        several = len(before.references) > 1
        raise WeightsError(
            f"was trained with an encoder that is not at {' and '.join(before.gone)} any more",
            where=before.where,
            hint=f"name {'all of them, in their order,' if several else 'it'} with --encoder, or "
            "give ready embeddings with --store",
        )
    names = [one.name for one in before.encoder.each] if before.encoder is not None else []
    if any(not name.startswith("imagebind") for name in names):  # as one made from stores
        words = " ".join(f"--encoder {name}" for name in names)
        raise WeightsError(
            f"was trained with {' and '.join(names)}, and does not say where that is",
            where=before.where,
            hint=f"name it, {words}, or give ready embeddings with --store",
        )
    raise WeightsError(
        f"no encoder at {' or '.join(map(str, ENCODER_PLACES))}",
        hint="name one with --encoder, fetch ImageBind's weights with "
        "`chatbind download imagebind-huge`, or give ready embeddings with --store",
    )


def missing_media(root: MediaRoot, media: Media) -> dict[Medium, str]:
    """The media for which there is no file, each with the reason."""
    return {
        Medium(modality, name): why
        for modality in media.modalities()
        for name, why in root.missing(media.names(modality)).items()
    }


def _tell_of_encoders(references: Sequence[str]) -> None:
    """Notes what there is to know of encoders that are named beside their stores."""
    from chatbind_cli.encoders.opening import open_encoder  # noqa: PLC0415  heavy
    from chatbind_cli.training.encoders import tell_of  # noqa: PLC0415  heavy

    for reference in references:
        tell_of(open_encoder(reference))


def _missing_rows(settings: TrainingSettings, media: Media) -> dict[Medium, str]:
    """The media of which a store has no embedding, each with the reason."""
    from chatbind_cli.training.encoders import stored_embeddings  # noqa: PLC0415  heavy

    found = stored_embeddings(settings, media)[0]
    bad = {
        medium: f"{medium.name}: the store has no embedding of this {medium.modality}"
        for medium in found.missing(media)
    }
    for modality in media.modalities():
        if modality not in found.known:
            bad |= {
                Medium(modality, name): f"{name}: no store has embeddings of {modality}"
                for name in media.names(modality)
            }
    return bad


def read_conversations(
    files: Sequence[DataFile], seed: int = 0
) -> tuple[Conversations, list[Record]]:
    """The conversations of an epoch, and what is wrong with those that cannot be used.

    Args:
        files: where they are, and how often each is seen.
        seed: draws those that are seen once more than others of their file.

    Raises:
        RecordError: a file cannot be read as records at all, or holds no usable one.
    """
    rejected: list[Record] = []
    checked = []
    for file in files:
        checked.append(checked_file(file.path))
        errors = checked[-1].errors()
        rejected += errors
        if not len(checked[-1].good):
            refuse_rejected(errors)
            raise RecordError("has no conversations", where=str(file.path))
    conversations = Conversations.of_files(checked).seen([file.weight for file in files], seed)
    if not len(conversations):
        raise RecordError("no conversation is drawn", hint="raise the weights of --data")
    return conversations, rejected
