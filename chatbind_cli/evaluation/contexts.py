"""What whoever cannot see a medium is told of it: its captions and boxes, in the seed's words."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from chatbind_cli.evaluation.files import DOUBLED, UNUSABLE, Mismatches
from chatbind_cli.jsonl import Record, read_lines
from chatbind_cli.media.modality import MODALITIES

_COCO_PREFIXES = ("COCO_val2014_", "COCO_train2014_")
_MEDIA_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
        *(".mp4", ".mkv", ".mov", ".avi", ".webm", ".wav", ".mp3", ".flac", ".ogg", ".m4a"),
        *(".npy", ".csv", ".tsv", ".parquet"),
    )
)
_ANY = "any"


class Contexts:
    """The contexts of a file, by medium; those that name none by their own id.

    Args:
        path: JSONL of `{"image" | "audio" | ..., "captions", "instances"}`.
        mismatches: told of lines that are none, and of media that come twice.

    Raises:
        RecordError: the file cannot be read.
    """

    def __init__(self, path: Path, mismatches: Mismatches) -> None:
        self._found: dict[tuple[str, str], Record] = {}
        for record, _, number, problem in read_lines(path):
            keys = [(key, _media_key(record[key])) for key in MODALITIES if key in record]
            if not keys and "id" in record:
                keys = [(_ANY, _media_key(record["id"]))]
            what = "" if keys else "a context names no media"
            try:
                context_text(record)
            except (TypeError, AttributeError):
                what = "its captions or instances are no list of such"
            if problem is not None or what:
                what = what if problem is None else problem.what
                mismatches.add(str(path), UNUSABLE, f"{number}: {what}")
                continue
            for key in keys:
                if self._found.setdefault(key, record) != record:
                    mismatches.add(str(path), DOUBLED, key[1])

    def of(self, modality: str, medium: object) -> Record | None:
        """The context of a medium by its name; None: there is none."""
        key = _media_key(medium)
        return self._found.get((modality, key)) or self._found.get((_ANY, key))


def context_text(context: Record) -> str:
    """Captions one a line, then one line an object with its box, as the seed writes them."""
    captions = [str(caption) for caption in context.get("captions", [])]
    boxes = [
        f"{instance.get('category', 'object')}: {instance.get('bbox', [])}"
        for instance in context.get("instances", [])
    ]
    return "\n\n".join("\n".join(lines) for lines in (captions, boxes) if lines)


def _media_key(name: object) -> str:
    """One spelling for `000000296284`, `000000296284.jpg` and `COCO_val2014_000000296284.jpg`."""
    text = str(name)
    for prefix in _COCO_PREFIXES:
        text = text.removeprefix(prefix)
    path = PurePosixPath(text)
    return str(path.with_suffix("")) if path.suffix.lower() in _MEDIA_SUFFIXES else text
