"""Which encoder a path means. Imports nothing heavy until one is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.encoders.languagebind.config import is_languagebind
from chatbind_cli.encoders.reference import absolute, open_installed, split_reference
from chatbind_cli.errors import ChatBindError, CheckpointError, UsageError

if TYPE_CHECKING:
    import torch

    from chatbind_cli.encoders.encoder import Encoder, Read

# Where an encoder is looked for that nobody named: where `chatbind download` puts it, and where
# the original scripts keep it. From the working folder.
ENCODER_PLACES = (Path("checkpoints/imagebind"), Path(".checkpoints/imagebind_huge.pth"))

DEFAULT_BATCH_SIZE = 16

_MODEL_TYPES = {
    "pe_audio_video": ("pe_audio_video", "PeAudioVideoEncoder"),
    "embedding_gemma2": ("embedding_gemma2", "EmbeddingGemma2Encoder"),
    "timm": ("timm_towers", "TimmTowers"),
}
"""Files and classes of the Hugging Face kinds beside transformers' image towers, by model_type."""


def usual_encoder() -> Path | None:
    """Returns the first of the usual places where something is."""
    return next((place for place in ENCODER_PLACES if place.exists()), None)


def usual_reader() -> Read:
    """How ImageBind, which the usual encoder is, reads media."""
    from chatbind_cli.encoders.imagebind.preprocess import read  # noqa: PLC0415

    return read


def open_encoder(
    reference: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    attn_implementation: str = "auto",
    fetch: bool = True,
) -> Encoder:
    """Returns the encoder of a reference; its towers are read when they are needed.

    Args:
        reference: ImageBind's weights (`.pth` or `.safetensors`; Huge unless a config.json of an
            encoder lies beside them), or a folder with weights and config.json; or a repository of
            LanguageBind, or a folder with several of them, one a modality; `hf:OWNER/NAME[@REV]`: a
            hub repository, see `encoder_folder`; `timm:NAME`: a model that timm knows; `NAME:REST`:
            an encoder of another package, see `open_installed`.
        device: where to run.
        dtype: what to convert the weights to; None: float32.
        batch_size: clips that go through a tower at once; a CPU takes one recording at a time.
        attn_implementation: `auto` and `sdpa` let PyTorch choose among its kernels; `eager` is
            plain arithmetic; `flash_attention_2` and `flash_attention_3` mean PyTorch's own flash
            kernel (an NVIDIA GPU, float16 or bfloat16), since encoders use no other library.
        fetch: whether a repository may be fetched that is not on this machine.

    Raises:
        WeightsError: the weights are not there, are broken, or do not fit the config.
        CheckpointError: config.json cannot be read.
        UsageError: there is no such attention here, or the reference is none.
        DownloadError: a repository cannot be had.
        ChatBindError: the other package's code cannot be used.
    """
    import torch  # noqa: PLC0415

    kind, place, lasting = _find(reference, fetch)
    encoder = kind(
        place,
        reference=lasting,
        device=torch.device(device),
        dtype=dtype or torch.float32,
        batch_size=batch_size,
        attn_implementation=attn_implementation,
    )
    if lasting.startswith("hf:"):
        encoder.name = lasting.removeprefix("hf:")  # its folder is named by a commit
    return encoder


def open_encoders(references: Sequence[str | Path], **how: Any) -> Encoder:
    """Returns the encoder of a reference, or the several of more as one: see `SeveralEncoders`.

    Raises:
        UsageError: there are too many, or one comes twice.
        ChatBindError: see `open_encoder`, which says what `how` may be.
    """
    from chatbind_cli.encoders.several import SeveralEncoders  # noqa: PLC0415
    from chatbind_cli.model.config import MOST_ENCODERS  # noqa: PLC0415

    if len(references) > MOST_ENCODERS:
        raise UsageError(f"{len(references)} encoders are more than {MOST_ENCODERS}")
    opened = [open_encoder(reference, **how) for reference in references]
    for number, one in enumerate(opened):
        if one.reference in (other.reference for other in opened[:number]):
            raise UsageError(f"the encoder {one.reference} is named twice")
    return opened[0] if len(opened) == 1 else SeveralEncoders(opened)


def _find(reference: str | Path, fetch: bool) -> tuple[Callable[..., Encoder], Path | str, str]:
    """What opens a reference, what it is given, and the reference for any working folder."""
    scheme, rest = split_reference(reference)
    if not scheme:
        path = Path(rest)
        return _kind(path), path, str(path.resolve())
    if scheme == "hf":
        from chatbind_cli.download.encoder_folder import encoder_folder  # noqa: PLC0415

        path = encoder_folder(str(reference), fetch=fetch)
        return _kind(path), path, str(reference)
    if scheme == "timm":
        from chatbind_cli.download.encoder_folder import encoder_folder  # noqa: PLC0415
        from chatbind_cli.encoders.huggingface.timm_towers import (  # noqa: PLC0415
            TimmTowers,
            find_model,
        )

        name, repository = find_model(rest)
        folder = encoder_folder(f"hf:{repository}", fetch=fetch)
        return TimmTowers, folder, f"timm:{name}"
    rest = absolute(rest)
    return partial(open_installed, scheme), rest, f"{scheme}:{rest}"


def _kind(path: Path) -> Callable[..., Encoder]:
    """What opens a path; ImageBind's also says what is wrong with one that is none."""
    if is_languagebind(path):
        from chatbind_cli.encoders.languagebind.encoder import LanguageBindEncoder  # noqa: PLC0415

        return LanguageBindEncoder
    kind = _model_type(path)
    if kind is not None:
        file, name = _MODEL_TYPES.get(kind, ("image_towers", "ImageTowers"))
        module = import_module(f"chatbind_cli.encoders.huggingface.{file}")
        found: Callable[..., Encoder] = getattr(module, name)
        return found
    from chatbind_cli.encoders.imagebind.encoder import ImageBindEncoder  # noqa: PLC0415

    return ImageBindEncoder


def _model_type(path: Path) -> str | None:
    """What the config.json of a path's folder calls a model of the hub; None: it has none.

    Raises:
        CheckpointError: it is broken, and none of ImageBind's beside which it does not count.
    """
    folder = path if path.is_dir() else path.parent
    try:
        config = read_json(folder / "config.json", missing_ok=True)
    except CheckpointError:
        if _holds_imagebind(path):
            return None
        raise
    kind = config.get("model_type", "timm" if "architecture" in config else None)
    if not isinstance(kind, str) or _holds_imagebind(path):
        return None
    return kind


def _holds_imagebind(path: Path) -> bool:
    """Whether weights are ImageBind's: mirrors of them have other libraries' configs beside."""
    from chatbind_cli.checkpoints.checkpoint import open_checkpoint  # noqa: PLC0415

    try:
        return any(name.startswith("modality_") for name in open_checkpoint(path).tensors)
    except ChatBindError:
        return False  # whoever reads them says what is wrong
