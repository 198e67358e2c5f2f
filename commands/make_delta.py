"""`chatbind make-delta`: subtract a base model from a target model."""

from __future__ import annotations

from pathlib import Path

from chatbind_cli.files import refuse_overlap

from . import _base, _checkpoints, _options
from ._base import in_group

_input = in_group("Input")
_output = in_group("Output")


@_base.command(
    "make-delta",
    examples=[
        "chatbind make-delta --base llama --target model --delta my-delta",
        "chatbind make-delta --base llama --target model --delta small-delta --no-exact",
    ],
)
@_checkpoints.base_option(required=True)
@_input(
    "--target",
    "--target-model-path",
    "target",
    required=True,
    metavar=_checkpoints.CHECKPOINT,
    help="The finished model: a folder, a weights file, or a hub repository.",
)
@_output(
    "--delta",
    "--delta-path",
    "delta",
    required=True,
    metavar="DIR",
    type=_options.NEW_FOLDER,
    help="The folder to make.",
)
@_output(
    "--exact/--no-exact",
    default=True,
    help="Keep beside the delta what rounding would lose, so that the target comes back bit for "
    "bit; other programs ignore it.",
)
@_checkpoints.shard_size_option
@_options.overwrite_option
@_options.without_effect(
    "--hub-repo-id", because="publish the folder with `hf upload`, once you have looked at it"
)
def command(
    base: str, target: str, delta: Path, exact: bool, shard_size: int, overwrite: bool
) -> None:
    """Subtract a base model from a target model, so that the difference may be published.

    The delta has the published layout (safetensors, the target's config and tokenizer) and
    carries the hash of its base. `apply-delta` gives the target back bit for bit.
    """
    from chatbind_cli.checkpoints.make_delta import make_delta  # noqa: PLC0415  loads torch

    base_path, target_path = _checkpoints.checkpoint_paths(base, target)
    refuse_overlap(delta, [base_path, target_path])
    result = make_delta(
        base_path,
        target_path,
        delta,
        exact=exact,
        shard_bytes=shard_size,
        overwrite=overwrite,
    )
    _checkpoints.emit_folder("delta", result, made_by="make-delta")
