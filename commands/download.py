"""`chatbind download`: fetch weights and data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from chatbind_cli.artifacts import emit_record
from chatbind_cli.console import printable
from chatbind_cli.download import catalogue
from chatbind_cli.download.manifest import Manifest
from chatbind_cli.download.presence import is_present
from chatbind_cli.download.requests import Request, entry_requests, requests_for
from chatbind_cli.errors import DownloadError, SomeRecordsFailed, UsageError
from chatbind_cli.files import size_in_words
from chatbind_cli.jsonl import Record

from . import _base
from ._base import in_group
from ._options import NEW_FOLDER

_what = in_group("What")
_how = in_group("How")
_output = in_group("Output")


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [
        CompletionItem(entry.name, help=entry.title)
        for entry in catalogue.entries().values()
        if entry.name.startswith(incomplete)
    ]


@_base.command(
    "download",
    examples=[
        "chatbind download --list",
        "chatbind download --plan finetune --dry-run",
        "chatbind download imagebind-huge llava-eval-90 --dry-run",
    ],
    elsewhere=[
        "chatbind download imagebind-huge",
        "chatbind download languagebind",
        "chatbind download hf:dreamerlin/chatbind-7b-delta@main/config.json -o weights",
        "chatbind download https://dl.fbaipublicfiles.com/imagebind/imagebind_huge.pth",
    ],
)
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=_complete)
@_what("--list", "list_all", is_flag=True, help="List the catalogue, and what of it is here.")
@_what(
    "--plan",
    "stages",
    multiple=True,
    type=click.Choice(catalogue.STAGES),
    help="Everything that a stage needs.",
)
@_what(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Of hf: repositories, only the files that match, as *.safetensors; may be repeated.  "
    "[default: all but copies for other programs]",
)
@_how("--max-workers", type=click.IntRange(1, 64), default=4, help="Files at a time.")
@_how(
    "--unpack",
    is_flag=True,
    help="Unpack zip and tar archives that are named by URL or hf:, too, where they land.",
)
@_how("--keep-archive", is_flag=True, help="Keep archives after unpacking them.")
@_how("--verify", is_flag=True, help="Fetch nothing: read what is here anew, and compare.")
@_how(
    "--overwrite",
    is_flag=True,
    help="Fetch what came before, too; what did not come by this command is never replaced.",
)
@_how("--dry-run", is_flag=True, help="Say what would be fetched, and stop.")
@_output(
    "-o",
    "--output",
    "--local-dir",
    "output",
    default=".",
    metavar="DIR",
    type=NEW_FOLDER,
    help="Folder that everything lands below (catalogue: checkpoints/... and data/...).",
)
@_output("--json", "as_json", is_flag=True, help="Records, on a terminal too.")
def command(
    names: tuple[str, ...],
    list_all: bool,
    stages: tuple[str, ...],
    include: tuple[str, ...],
    max_workers: int,
    unpack: bool,
    keep_archive: bool,
    verify: bool,
    overwrite: bool,
    dry_run: bool,
    output: Path,
    as_json: bool,
) -> None:
    """Fetch weights and data, verified and resumable.

    NAME is a name of the catalogue, hf:OWNER/NAME[@REVISION][/FILE] (hf:datasets/... for data
    sets), or a URL (with #sha256=... it is held to that). A record a file says where it is:
    downloaded, present or failed. The same command again goes on where it was stopped; what is
    here and is not what it should be is fetched again. --verify compares every byte with the
    catalogue, with what the hub said, or with what came out of the archive (`compared` says
    which). Exit 3: some files failed.
    """
    as_records = as_json or not sys.stdout.isatty()
    if list_all:
        _list(_entries(names, stages) or list(catalogue.entries().values()), output, as_records)
        return
    if verify and overwrite:
        raise UsageError("--verify fetches nothing, so there is nothing to overwrite")
    requests = requests_for(_words(names, stages), output, unpack=unpack, include=include)
    if dry_run:
        manifest = Manifest()
        for request in requests:
            _tell(_planned(request, manifest, overwrite), as_records)
        return
    from chatbind_cli.download.fetch import Downloader  # noqa: PLC0415  heavy

    downloader = Downloader(
        max_workers=max_workers, keep_archive=keep_archive, verify=verify, overwrite=overwrite
    )
    failed = []
    count = 0
    for record in downloader.fetch_all(requests):
        _tell(record, as_records)
        count += 1
        if record["status"] == "failed":
            failed.append(record["error"])
    if failed and len(failed) == count:
        raise DownloadError(failed[0])
    if failed:
        raise SomeRecordsFailed(f"{len(failed)} of {count} failed, the first: {failed[0]}")


def _entries(names: Sequence[str], stages: Sequence[str]) -> list[catalogue.Entry]:
    chosen = [catalogue.look_up(name) for name in names]
    for stage in stages:
        chosen += [entry for entry in catalogue.for_stage(stage) if entry not in chosen]
    return chosen


def _words(names: Sequence[str], stages: Sequence[str]) -> list[str]:
    """What is to be fetched, each once."""
    planned = [entry.name for entry in _entries((), stages)]
    words = list(dict.fromkeys([*names, *planned]))
    if not words:
        raise UsageError(
            "nothing to fetch", hint="name something; `chatbind download --list` shows what"
        )
    return words


def _tell(record: Record, as_records: bool) -> None:
    if as_records:
        emit_record(record)
        return
    size = record.get("bytes")
    told = size_in_words(size) if size is not None else str(record.get("about", "size unknown"))
    reason = f": {record['error']}" if "error" in record else f" ({told})"
    # Not through click, which would write past the bar.
    sys.stdout.write(printable(f"{record['status']:<10} {record['path']}{reason}") + "\n")
    sys.stdout.flush()


def _planned(request: Request, manifest: Manifest, overwrite: bool) -> Record:
    """What `--dry-run` says of a request; asks the disk, and not the network."""
    here = is_present(request, manifest) and not overwrite
    return {
        "name": request.name,
        "path": str(request.unpack or request.path),
        "source": request.source,
        "status": "present" if here else "planned",
        **_size(request),
    }


def _size(of: Request | catalogue.Entry) -> Record:
    if of.bytes is not None:
        return {"bytes": of.bytes}
    return {} if of.about is None else {"about": of.about}


_TOLD = ("name", "title", "purpose", "source", "licence", "gated", "stages", "commands")


def _listed(entry: catalogue.Entry, output: Path, manifest: Manifest) -> Record:
    """What `--list` says of an entry, and how much of it is below a folder."""
    requests = entry_requests(entry, output)
    here = sum(is_present(request, manifest) for request in requests)
    record: Record = {key: getattr(entry, key) for key in _TOLD}
    record |= {
        "path": str(output / entry.folder),
        "present": here == len(requests),
        "files_present": here,
        "files_wanted": len(requests),
    }
    if entry.files:
        record["files"] = [
            {"source": file.get("path") or file.get("url") or f"hf:{file['hub']}"}
            | {key: file[key] for key in ("bytes", "sha256", "md5", "about") if key in file}
            for file in entry.files
        ]
    return {**record, **_size(entry)}


def _list(entries: Sequence[catalogue.Entry], output: Path, as_records: bool) -> None:
    manifest = Manifest()
    records = [_listed(entry, output, manifest) for entry in entries]
    if not as_records:
        _print_table(records)
        return
    for record in records:
        emit_record(record)


def _print_table(records: Sequence[Record]) -> None:
    """The catalogue for a person, as wide as the terminal."""
    import rich.box
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=rich.box.SIMPLE, pad_edge=False)
    table.add_column("name, size, here", max_width=30)
    table.add_column("what, for what, licence", ratio=1)
    for record in records:
        size = size_in_words(record["bytes"]) if "bytes" in record else record.get("about", "")
        here = f"{record['files_present']} of {record['files_wanted']} here"
        here = "here" if record["present"] else here if record["files_present"] else ""
        stages = " ".join(f"--plan {stage}" for stage in record["stages"]) or "no plan"
        table.add_row(
            Group(
                Text(record["name"], style="bold"),
                Text(f"  {', '.join(filter(None, (size, here)))}", style="dim"),
            ),
            Group(
                Text(f"{record['title']}: {record['purpose']}"),
                Text(f"{stages}; {record['licence']}", style="dim"),
            ),
        )
    Console(file=sys.stdout).print(table)
