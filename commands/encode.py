"""`chatbind encode`: media in, embeddings out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import click

from chatbind_cli import worker
from chatbind_cli.errors import SomeRecordsFailed, UsageError
from chatbind_cli.files import own_stream, refuse_overlap
from chatbind_cli.media.modality import MODALITIES
from chatbind_cli.media.options import MediaOptions
from chatbind_cli.plan import Dispatch

from . import _base
from ._base import in_group
from ._options import (
    FILE,
    NEW_FOLDER,
    STREAM,
    attention_option,
    device_options,
    encoder_option,
    media_root_options,
    on_error_option,
    output_option,
    overwrite_option,
    pool_options,
    shard_option,
    worker_pool,
)
from ._preprocessing import media_options

if TYPE_CHECKING:
    from collections import Counter

    from chatbind_cli.data.encode import RecordSink, StoreSink
    from chatbind_cli.data.media_items import MediaItem
    from chatbind_cli.encoders.encoder import Encoder
    from chatbind_cli.worker_pool import WorkerPool

_input, _encoder = in_group("Input"), in_group("Encoder")
_output, _compute = in_group("Output"), in_group("Compute")


@_base.command(
    "encode",
    examples=[
        "chatbind encode --encoder imagebind media/image/heldout-0000.png "
        "media/audio/heldout-0000.wav -o embeddings.jsonl",
        "ls media/depth/heldout-*.png | chatbind encode --encoder imagebind | tail -n 1",
        "chatbind encode --encoder imagebind --data train/captions.json --media-root media "
        "--store store",
    ],
    elsewhere=[
        "chatbind encode --encoder imagebind_huge.pth --zero-shot labels.txt dog.jpg bark.wav",
    ],
)
@click.argument("files", nargs=-1, metavar="[FILES]...")
@_input(
    "--inputs",
    metavar="FILE",
    type=STREAM,
    help="A list: one path, URL or data URI a line, or records that name media; `-`: stdin, which "
    "is read where no other input is given.",
)
@_input(
    "--data",
    "data",
    metavar="FILE",
    type=FILE,
    help="Conversations or questions: every medium they name, once.",
)
@_input(
    "--modality",
    type=click.Choice(MODALITIES),
    help="Of files whose record does not say; default: the content tells. Thermal pictures look "
    "like any others: name them.",
)
@shard_option(
    "Take every N-th input from the I-th on, I from 1 to N: for the N jobs of a batch array, "
    "which may share one --store."
)
@encoder_option("Encoder", "Makes the embeddings.", required=True)
@_encoder(
    "--normalize/--no-normalize",
    "normalize",
    default=None,
    help="Scale embeddings in records to length 1, so that the dot product is the cosine; or leave "
    "them as published (ImageBind: audio 20, depth and imu 5, thermal 10 times that). A store "
    "always holds them as published.  [default: normalize]",
)
@_encoder(
    "--zero-shot",
    metavar="LABELS",
    type=FILE,
    help="File of labels, one a line: write their probabilities instead of embeddings.",
)
@_encoder(
    "--label-prompt",
    advanced=True,
    default="a {label}",
    help="The text for a label; `{label}` alone takes the lines of LABELS as they are.",
)
@_encoder(
    "--top-k", advanced=True, type=click.IntRange(min=1), default=5, help="Labels in a record."
)
@media_options
@media_root_options
@output_option("Embedding records; continued if the file is there. `-`: stdout.")
@_output(
    "--store",
    metavar="DIR",
    type=NEW_FOLDER,
    help="Write an embedding store instead of records; continued if it is there.",
)
@_output(
    "--store-dtype",
    advanced=True,
    type=click.Choice(["float16", "float32"]),
    help="Numbers of a new store.  [default: float16]",
)
@overwrite_option
@on_error_option
@device_options
@_compute(
    "--batch-size",
    type=click.IntRange(min=1),
    default=16,
    help="Pictures or clips at a time on a GPU; a CPU takes one file at a time. Embeddings do not "
    "depend on what is in a batch.",
)
@_compute(
    "--num-workers",
    type=click.IntRange(min=0),
    help="Threads or processes that decode ahead; 0: none.  [default: one a core, at most 8]",
)
@_compute(
    "--decode-in",
    advanced=True,
    type=click.Choice(["auto", "threads", "processes"]),
    default="auto",
    help="Where media are decoded. Processes feed a GPU better, and a file that crashes one is a "
    "failed record; auto: processes on a GPU.",
)
@attention_option
@pool_options
def command(
    files: tuple[str, ...],
    media: MediaOptions,
    plan: Dispatch,
    **asked: Any,
) -> None:
    """Turn media into embeddings.

    Reads images, video, audio, depth maps, thermal pictures and motion recordings, given as
    FILES, as a list on stdin, or by a training file. Writes a record a file, `{"path",
    "modality", "embedding"}`, or a store that training reads. The same command again encodes only
    what is missing. Exit code 3: some files could not be encoded; their records have an `error`.
    """
    _check(files, asked)
    listed = _list_source(files, asked)
    inputs = [*files, listed, asked["data"], asked["zero_shot"], *asked["encoder"]]
    refuse_overlap(asked["store"] or asked["output"], inputs)
    pool = worker_pool(plan)
    if pool is None:
        return
    paths = [name for name in files if name != "-"]
    done = _encode(paths, listed, media, asked, pool)
    if done is not None and done["failed"] and asked["on_error"] != "skip":
        n = done["failed"] + done["encoded"]
        raise SomeRecordsFailed(f"{done['failed']} of {n} files could not be encoded")


def _encode(
    paths: list[str],
    listed: str | None,
    media: MediaOptions,
    asked: dict[str, Any],
    pool: WorkerPool,
) -> Counter[str] | None:
    """Does the work; who leads tells what was done."""
    # imported here: they bring torch
    from chatbind_cli.data.encode import encode, help_encode  # noqa: PLC0415
    from chatbind_cli.data.encoding import EncodingOptions, at_once  # noqa: PLC0415
    from chatbind_cli.device import resolve_device, resolve_dtype  # noqa: PLC0415
    from chatbind_cli.encoders.opening import open_encoders  # noqa: PLC0415

    device = resolve_device(asked["device"])
    dtype = resolve_dtype(asked["dtype"], device)
    workers = asked["num_workers"]
    encoder = open_encoders(
        asked["encoder"],
        device=device,
        dtype=dtype,
        batch_size=asked["batch_size"],
        attn_implementation=asked["attn_implementation"],
    )
    if not pool.follows:
        media = encoder.heeded(media)
    options = EncodingOptions(
        media=media,
        workers=min(worker.cpus(), 8) if workers is None else workers,
        batch_size=at_once(encoder),
        decode_in=asked["decode_in"],
    )
    if pool.follows:
        help_encode(encoder, options)
        return None
    number, count = asked["shard"]
    only_paths = listed is None and asked["data"] is None
    with _sink(encoder, media, asked) as sink:
        return encode(
            _items(paths, listed, asked),
            encoder,
            options,
            sink,
            on_error=asked["on_error"],
            total=len(range(number - 1, len(paths), count)) if only_paths else None,
            pool=pool,
        )


def _items(paths: list[str], listed: str | None, asked: dict[str, Any]) -> Iterator[MediaItem]:
    """What to encode: the paths, then the list, then the training file."""
    from chatbind_cli.data import media_items  # noqa: PLC0415

    root, modality = asked["media_root"], asked["modality"]
    items = [media_items.items_of_paths(paths, root, modality)]
    if listed is not None:
        stdin = own_stream(sys.stdin.buffer) if listed == "-" else None
        items.append(media_items.items_of_list(listed, root, modality, stdin=stdin))
    if asked["data"] is not None:
        items.append(media_items.items_of_training_file(asked["data"], root, modality))
    number, count = asked["shard"]
    return islice(chain(*items), number - 1, None, count)


def _sink(
    encoder: Encoder, media: MediaOptions, asked: dict[str, Any]
) -> AbstractContextManager[RecordSink | StoreSink]:
    from chatbind_cli.data.encode import embedding_sink, filled_store, label_sink  # noqa: PLC0415

    output, overwrite = asked["output"], asked["overwrite"]
    if asked["store"] is not None:
        dtype = asked["store_dtype"]
        number, count = asked["shard"]
        part = number - 1 if count > 1 else None
        return filled_store(
            asked["store"], encoder, media, part=part, dtype=dtype, overwrite=overwrite
        )
    if asked["zero_shot"] is None:
        normalize = asked["normalize"] is not False
        return closing(embedding_sink(output, encoder, normalize=normalize, overwrite=overwrite))
    prompt, top_k = asked["label_prompt"], asked["top_k"]
    labels = asked["zero_shot"]
    return closing(
        label_sink(output, encoder, labels, prompt=prompt, top_k=top_k, overwrite=overwrite)
    )


def _check(files: tuple[str, ...], asked: dict[str, Any]) -> None:
    store = asked["store"] is not None
    if store and asked["zero_shot"]:
        raise UsageError("--zero-shot writes records, and no store")
    if store and asked["normalize"]:
        raise UsageError("a store holds embeddings as published", hint="leave out --normalize")
    if store and asked["output"] != "-":
        raise UsageError("give either --output or --store")
    if not store and asked["store_dtype"]:
        raise UsageError("--store-dtype is for --store")
    if "{label}" not in asked["label_prompt"]:
        raise UsageError(f"--label-prompt has no {{label}} in it: {asked['label_prompt']!r}")


def _list_source(files: tuple[str, ...], asked: dict[str, Any]) -> str | None:
    """The list to read: `-` for stdin, a file, or None."""
    if asked["inputs"] is not None:
        return str(asked["inputs"])
    if "-" in files:
        return "-"
    if files or asked["data"] is not None:
        return None
    if sys.stdin.isatty():
        raise UsageError("there is nothing to encode", hint="name files, or pipe a list of them in")
    return "-"
