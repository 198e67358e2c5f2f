"""`chatbind extract-projector`: take the projector out of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import click

from chatbind_cli.artifacts import artifact_record, emit_artifact, resolve_artifact
from chatbind_cli.console import note
from chatbind_cli.errors import UsageError
from chatbind_cli.files import refuse_overlap, sha256_file

from . import _base
from ._base import in_group
from ._options import NEW_FILE


@_base.command(
    "extract-projector",
    examples=[
        "chatbind extract-projector stage1 -o projector.safetensors",
        "chatbind extract-projector --model_name_or_path ./stage1 --output "
        "./mm_projector/pretrain.bin",
        "chatbind pretrain -m llama --encoder imagebind --data train/captions.json "
        "--media-root media -o piped --max-steps 20 | chatbind extract-projector - -o "
        "piped.safetensors",
    ],
)
@click.argument("checkpoint", required=False, metavar="[CHECKPOINT]")
@in_group("Input")(
    "-m",
    "--model",
    "--model-name-or-path",
    "model",
    metavar="CHECKPOINT",
    help="The same as CHECKPOINT, as the seed spells it.",
)
@in_group("Output")(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=NEW_FILE,
    help="The projector: .safetensors, or .bin for the published layout.",
)
def command(checkpoint: str | None, model: str | None, output: Path) -> None:
    """Take the projector out of a checkpoint, ours or a published one.

    CHECKPOINT is a model folder, a weights file, or - for the artefact record of the stage before
    on standard input. Only the projector and the media tokens' embeddings are read from it.
    """
    if (checkpoint is None) == (model is None):
        raise UsageError("name one checkpoint", hint="as the first word, or with --model")
    source = resolve_artifact(checkpoint or model or "", {"checkpoint", "model", "target"})

    refuse_overlap(output, [source, *(source.glob("*") if source.is_dir() else ())])
    from chatbind_cli.checkpoints.extract_projector import extract_projector  # noqa: PLC0415  loads torch

    projector, tensors = extract_projector(source, output)
    if not projector.token_embeddings:
        note(
            f"{source} does not tell the ids of <im_start> and <im_end>, so their embeddings "
            "are not in the file"
        )
    emit_artifact(
        artifact_record(
            "projector",
            output,
            made_by="extract-projector",
            sha256=sha256_file(output),
            tensors=tensors,
            token_embeddings=list(projector.token_embeddings),
        )
    )
