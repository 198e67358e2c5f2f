"""`chatbind apply-delta`: add published delta weights to a base model."""

from __future__ import annotations

from pathlib import Path

from chatbind_cli.artifacts import artifact_record, emit_artifact
from chatbind_cli.errors import UsageError
from chatbind_cli.files import refuse_overlap

from . import _base, _checkpoints, _options
from ._base import in_group

_input = in_group("Input")
_output = in_group("Output")


@_base.command(
    "apply-delta",
    examples=[
        "chatbind apply-delta --base llama --delta delta --target restored",
        "chatbind apply-delta --verify delta",
    ],
    elsewhere=[
        "chatbind apply-delta --base checkpoints/llama-7b --delta "
        "dreamerlin/chatbind-7b-delta --target checkpoints/chatbind-7b",
    ],
)
@_checkpoints.base_option()
@_input(
    "--delta",
    "--delta-path",
    "delta",
    metavar=_checkpoints.CHECKPOINT,
    help="The delta: a folder, a file, or a hub repository (also hf:OWNER/NAME@REVISION).",
)
@_output(
    "--target",
    "--target-model-path",
    "target",
    metavar="DIR",
    type=_options.NEW_FOLDER,
    help="The folder to make.",
)
@_checkpoints.shard_size_option
@_options.overwrite_option
@in_group("Check")(
    "--verify",
    metavar="DIR",
    type=_options.FOLDER,
    help="Make nothing: hash a target anew and compare with what was written about it.",
)
def command(
    base: str | None,
    delta: str | None,
    target: Path | None,
    shard_size: int,
    overwrite: bool,
    verify: Path | None,
) -> None:
    """Add published delta weights to a base model, tensor by tensor, in little memory.

    The target is safetensors with the delta's config and tokenizer, and a record of the hashes of
    base and delta. A delta of `make-delta` is refused over any base but its own. The same command
    again goes on where it was stopped.
    """
    if verify is not None:
        from chatbind_cli.checkpoints.manifest import verify as verify_target  # noqa: PLC0415  loads torch

        manifest = verify_target(verify)
        emit_artifact(
            artifact_record(
                manifest["kind"], verify, made_by="apply-delta --verify", sha256=manifest["sha256"]
            )
        )
        return
    if base is None or delta is None or target is None:
        raise UsageError("--base, --delta and --target are wanted", hint="see --help")

    from chatbind_cli.checkpoints.apply_delta import apply_delta  # noqa: PLC0415  loads torch

    base_path, delta_path = _checkpoints.checkpoint_paths(base, delta)
    refuse_overlap(target, [base_path, delta_path])
    result = apply_delta(
        base_path,
        delta_path,
        target,
        base_name=None if Path(base).exists() else base,
        delta_name=delta,
        shard_bytes=shard_size,
        overwrite=overwrite,
    )
    _checkpoints.emit_folder("target", result, made_by="apply-delta")
