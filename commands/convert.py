"""`chatbind convert`: write a published ChatBind model in our layout."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from chatbind_cli.artifacts import resolve_artifact
from chatbind_cli.console import note
from chatbind_cli.errors import UsageError
from chatbind_cli.files import refuse_overlap

from . import _base, _checkpoints, _options
from ._base import in_group


@_base.command(
    "convert",
    examples=[
        "chatbind convert model -o converted --shard-size 0.001",
        "chatbind convert llama --projector stage1/projector.safetensors -o joined",
        "chatbind convert model --language-model lm",
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
    metavar="DIR",
    type=_options.NEW_FOLDER,
    help="The folder to make.",
)
@in_group("Output")(
    "--language-model",
    metavar="DIR",
    type=_options.NEW_FOLDER,
    help="Make this folder in place of --output: the language model by itself (adapters added), "
    "which vLLM and every other program for its kind opens. `--engine` of `ask` and `vqa` goes "
    "with it.",
)
@in_group("Output")(
    "--print-serve",
    is_flag=True,
    help="With --language-model: print the line that has vLLM serve it in place of the record.",
)
@_checkpoints.shard_size_option
@_options.overwrite_option
def command(
    model: str,
    projector: str | None,
    merge: bool,
    base: Path | None,
    output: Path | None,
    language_model: Path | None,
    print_serve: bool,
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
    MODEL holds adapters. --language-model writes what an engine serves, and notes in MODEL
    (engine.json) how it answers, by which the engine is known. In these three ways the language
    model is loaded whole.
    """
    if (output is None) == (language_model is None):
        raise UsageError("give either --output or --language-model")
    _check_way(projector, merge, base, language_model, print_serve)
    _options.one_reader(("the model", model), ("the projector", projector))
    source = resolve_artifact(model, {"target", "model"})
    target = output or language_model
    assert target is not None
    refuse_overlap(target, [source])

    from chatbind_cli.model import convert, whole  # noqa: PLC0415  load torch

    how: dict[str, Any] = {"shard_bytes": shard_size, "overwrite": overwrite}
    if language_model is not None:
        result = whole.language_model(source, target, base=base, **how)
        if print_serve:
            click.echo(serve_line(target))
            return
        note(f"to serve it: {serve_line(target)}")
    elif merge:
        result = whole.merge(source, target, base=base, **how)
    elif projector is None:
        result = convert.convert(source, target, **how)
    else:
        part = resolve_artifact(projector, {"projector"})
        refuse_overlap(target, [part])
        result = whole.join(source, part, target, **how)
    _checkpoints.emit_folder("model", result, made_by="convert")


def _check_way(
    projector: str | None, merge: bool, base: Path | None, language_model: Path | None, serve: bool
) -> None:
    """Refuses options that do not go together."""
    if merge and projector is not None:
        raise UsageError("--merge and --projector exclude each other")
    if language_model is not None and (merge or projector is not None):
        raise UsageError(
            "--language-model goes with neither --merge nor --projector",
            hint="adapters are added in any case; join a language model and a projector first",
        )
    if serve and language_model is None:
        raise UsageError("--print-serve goes with --language-model")
    if base is not None and not merge and language_model is None:
        raise UsageError("--base needs --merge or --language-model")


def serve_line(folder: Path) -> str:
    """The command line that has vLLM serve a folder for `--engine`."""
    return f"vllm serve {shlex.quote(str(folder))} --enable-prompt-embeds --enable-prefix-caching"
