"""The catalogue as records, and as a table for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from chatbind_cli.download.catalogue import CatalogueFile, Entry
from chatbind_cli.download.presence import is_present
from chatbind_cli.download.verify import in_words
from chatbind_cli.download.wanted import Request
from chatbind_cli.jsonl import Record


def entry_record(entry: Entry, requests: Sequence[Request]) -> Record:
    """What `--list` says of an entry.

    Args:
        entry: the entry.
        requests: its files as they would be fetched, for a look at what is there.
    """
    here = [request for request in requests if is_present(request)]
    record: Record = {
        "name": entry.name,
        "title": entry.title,
        "purpose": entry.purpose,
        "source": entry.source,
        "licence": entry.licence,
        "gated": entry.gated,
        "stages": list(entry.stages),
        "commands": list(entry.commands),
        "path": str(requests[0].path if requests[0].is_repository else requests[0].path.parent),
        "present": len(here) == len(requests),
        "files_present": len(here),
        "files_wanted": len(requests),
    }
    known = [_known(file) for file in entry.files]
    if known:
        record["files"] = known
    if entry.bytes is not None:
        record["bytes"] = entry.bytes
    elif entry.about is not None:
        record["about"] = entry.about
    return record


def _known(file: CatalogueFile) -> Record:
    """Source, size and digest of a file, as far as they are published."""
    facts = {
        "source": file.path or file.url,
        "bytes": file.bytes,
        "sha256": file.sha256,
        "md5": file.md5,
    }
    return {key: value for key, value in facts.items() if value is not None}


def print_entries(records: Sequence[Record], stream: TextIO) -> None:
    """Prints the catalogue as a table as wide as the terminal."""
    import rich.box
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("name, size, here", max_width=30)
    table.add_column("what, for what, licence", ratio=1)
    for record in records:
        size = in_words(record["bytes"]) if "bytes" in record else record.get("about", "")
        facts = ", ".join(filter(None, (size, _here(record))))
        stages = "".join(f" --plan {stage}" for stage in record["stages"])
        table.add_row(
            Group(Text(record["name"], style="bold"), Text(f"  {facts}", style="dim")),
            Group(
                Text(f"{record['title']}: {record['purpose']}"),
                Text(f"{stages.strip() or 'no plan'}; {record['licence']}", style="dim"),
            ),
        )
    Console(file=stream).print(table)


def _here(record: Record) -> str:
    if record["present"]:
        return "here"
    some = record["files_present"]
    return f"{some} of {record['files_wanted']} files here" if some else ""
