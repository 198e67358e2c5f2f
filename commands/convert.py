"""`chatbind convert`: write a published ChatBind model in our layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from chatbind_cli.artifacts import resolve_artifact
from chatbind_cli.errors import UsageError
from chatbind_cli.files import refuse_overlap

from . import _base, _checkpoints, _options
from ._base import in_group


@_base.command(
    "convert",
    examples=[
        "chatbind convert model -o converted --shard-size 0.001",
        "chatbind convert llama --projector stage1/projector.safetensors -o joined",
        "chatbind apply-delta --base llama --delta delta --target applied | chatbind convert "
        "- -o whole",
    ],
)
@click.argument("model", metavar="MODEL")
@in_group("Input")(
    "--projector",
    metavar="FILE",
    help="MODEL is a bare language model, and this the projector that goes with it; "
    "`-`: the artefact record on stdin.",
)
@in_group("Input")(
    "--merge",
    is_flag=True,
    help="MODEL holds adapters (of `finetune --lora-r`): add them to the matrices of the language "
    "model that they belong to, and write the whole.",
)
@_options.base_option
@in_group("Output")(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    type=_options.NEW_FOLDER,
    help="The folder to make.",
)
@_checkpoints.shard_size_option
@_options.overwrite_option
def command(
    model: str,
    projector: str | None,
    merge: bool,
    base: Path | None,
    output: Path,
    shard_size: int,
    overwrite: bool,
) -> None:
    """Write a ChatBind model in this program's layout, tensor by tensor.

    MODEL is a folder in the published layout (model_type llava_image_bind_select,
    llava_image_bind_select_all, or llava), one of ours (to cut it into other shards), or - for the
    artefact record of the stage before on standard input. The weights keep their bits; token ids,
    prompt style, the scale of audio embeddings and the projector are written down as `ask` would
    have understood them. `ask`, `vqa`, `finetune` and `extract-projector` open published folders
    as they are, too. The same command again goes on where it was stopped.

    With --projector, MODEL is any bare language model; the two become one folder. With --merge,
    MODEL holds adapters. Either way the language model is loaded whole, and takes as much memory
    as it has weights.
    """
    if merge and projector is not None:
        raise UsageError("--merge and --projector exclude each other")
    if base is not None and not merge:
        raise UsageError("--base needs --merge")
    _options.one_reader(("the model", model), ("the projector", projector))
    source = resolve_artifact(model, {"target", "model"})
    refuse_overlap(output, [source])

    from chatbind_cli.model import convert as work  # noqa: PLC0415  loads torch

    how: dict[str, Any] = {"shard_bytes": shard_size, "overwrite": overwrite}
    if merge:
        result = work.merge(source, output, base=base, **how)
    elif projector is None:
        result = work.convert(source, output, **how)
    else:
        part = resolve_artifact(projector, {"projector"})
        refuse_overlap(output, [part])
        result = work.join(source, part, output, **how)
    _checkpoints.emit_folder("model", result, made_by="convert")
