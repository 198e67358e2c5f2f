"""The projector on its own in one file: what stage 1 hands to stage 2.

Ours is a `.safetensors` file with the projector's tensors, the trained embeddings of the media
tokens, and the identity of what they fit to. The published layout is a `.bin` with
`model.mm_projector.*` (and the embeddings' rows); a published folder is a LLaMA's with these among
its tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from chatbind_cli.checkpoints.checkpoint import open_checkpoint
from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.errors import CheckpointError
from chatbind_cli.files import replace_file

# What published folders say that they are, as `llava` ones of LLaVA v0 and v1 do.
_PUBLISHED_KINDS = ("llava_image_bind_select", "llava_image_bind_select_all", "llava")
MEDIA_TOKENS = ("im_patch", "im_start", "im_end")
"""`<im_patch>` in the tokenizer, `im_patch_id` in config.json; in the order of published ids."""

_METADATA_KEY = "chatbind"
_OURS = re.compile(r"(?:.*\.)?(projector\.(?:parts\.[0-9]{1,2}\.)?layers\.[02]\.(?:weight|bias))")
_AXES = {"bias": 1, "weight": 2}
_WORDS = ("model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight")


@dataclass(frozen=True, kw_only=True)
class ProjectorInfo:
    """What a projector fits to. None where the file does not say (published files say nothing).

    Args:
        projector_type: `linear` or `mlp2x_gelu`.
        embedding_dim: width of the encoder's embeddings.
        hidden_size: width of the language model's word embeddings.
        tokens_per_embedding: soft tokens that one embedding becomes.
        projector_layout: `split` or `repeat`, see `ChatBindConfig`.
        use_start_end: whether `<im_start>` and `<im_end>` stood around them.
        normalize_embeddings: whether embeddings were brought to norm 1 before.
        prompt_style: the style that it was trained with.
        stage: the stage of the model that it comes from.
        encoder: identity of the encoder (`name`, `sha256`, ...).
        media_options: how media became tensors.
        provenance: who made it, with what.
    """

    projector_type: str
    embedding_dim: int
    hidden_size: int
    tokens_per_embedding: int | None = None
    projector_layout: str | None = None
    use_start_end: bool | None = None
    normalize_embeddings: bool | None = None
    prompt_style: str | None = None
    stage: str | None = None
    encoder: dict[str, Any] = field(default_factory=dict)
    media_options: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProjectorFile:
    """A projector's weights with what they fit to.

    Args:
        info: what it fits to.
        tensors: `projector.layers.*`, or `projector.parts.0.layers.*` and so on where it has a part
            for each of several encoders -> weights, as `ChatBindForConditionalGeneration` has them.
        token_embeddings: `im_start`, `im_patch`, `im_end` -> word embedding [hidden_size]; those
            that are known.
    """

    info: ProjectorInfo
    tensors: dict[str, torch.Tensor]
    token_embeddings: dict[str, torch.Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, torch.Tensor]:
        """All tensors by the names that they have in a file."""
        words = {f"token_embeddings.{name}": row for name, row in self.token_embeddings.items()}
        return {**self.tensors, **words}


def projector_key(name: str) -> str | None:
    """Our name for a projector's tensor in any known spelling; None for any other tensor.

    Known: ours (`projector.layers.0.weight`, `projector.parts.1.layers.0.weight`), the published
    one (`model.mm_projector.weight`, `mm_projector.bias`), LLaVA's two-layer one
    (`model.mm_projector.2.weight`), and bare `weight` and `bias`.
    """
    ours = _OURS.fullmatch(name)
    if ours is not None:
        return ours[1]
    parts = name.split(".")
    if parts[-1] not in ("weight", "bias"):
        return None
    owner = parts[:-1]
    if not owner or owner[-1] == "mm_projector":
        return f"projector.layers.0.{parts[-1]}"
    if owner[-2:-1] == ["mm_projector"] and owner[-1] in ("0", "2"):
        return f"projector.layers.{owner[-1]}.{parts[-1]}"
    return None


def is_published(folder: Path) -> bool:
    """Whether the folder's config.json names a published kind of model."""
    fields = read_json(folder / "config.json", missing_ok=True)
    # transformers has a `llava` of its own, with a vision tower inside and a nested config
    return fields.get("model_type") in _PUBLISHED_KINDS and "text_config" not in fields


def projector_facts(fields: Mapping[str, Any], where: str | Path) -> dict[str, Any]:
    """What a published config.json says of its projector, as fields of `ProjectorInfo`.

    Published scripts feed embeddings as they come from the encoder, audio with its scale of 20
    still on, and place clips as pytorchvideo 0.1.5 does.

    Raises:
        CheckpointError: `repeat_feature_dim` is no whole number.
    """
    repeat = fields.get("repeat_feature_dim") or 1
    if not isinstance(repeat, int):
        raise CheckpointError(f"repeat_feature_dim is {repeat!r:.40}", where=str(where))
    return {
        "tokens_per_embedding": max(repeat, 1),
        "projector_layout": "repeat",
        "use_start_end": bool(fields.get("mm_use_im_start_end")),
        "normalize_embeddings": False,
        "stage": "published",
        "encoder": {"name": "imagebind_huge"},
        "media_options": {"clip_sampler": "chatbind"},
    }


def projector_from_tensors(
    tensors: Mapping[str, torch.Tensor],
    *,
    where: str,
    info: Mapping[str, Any] | None = None,
) -> ProjectorFile:
    """Puts a projector together from tensors in any known spelling.

    Args:
        tensors: name -> tensor. Names of other tensors are ignored, but for word embeddings
            (`model.embed_tokens.weight`): their last rows are taken for `<im_start>` and
            `<im_end>`, as in the published layout.
        where: the file or folder that they come from, for errors.
        info: what is known of the fields of `ProjectorInfo`, among other things; sizes are read
            off the tensors.

    Raises:
        CheckpointError: there is no projector, or it is incomplete.
    """
    found = {ours: t for name, t in tensors.items() if (ours := projector_key(name)) is not None}
    known = _known(info or {}, where)
    known.update(_shape(found, known, where))
    rows = next((tensors[name] for name in _WORDS if name in tensors), None)
    words = {}
    if rows is not None and rows.dim() == 2 and len(rows) > 1:
        words = {"im_start": rows[-2], "im_end": rows[-1]}
    words |= {
        name: tensors[f"token_embeddings.{name}"]
        for name in MEDIA_TOKENS
        if f"token_embeddings.{name}" in tensors
    }
    for name, row in words.items():
        if row.shape != (known["hidden_size"],):
            raise CheckpointError(f"<{name}> has shape {list(row.shape)}", where=where)
    return ProjectorFile(
        ProjectorInfo(**known),
        {name: tensor.detach().clone().contiguous() for name, tensor in found.items()},
        {name: row.detach().clone().contiguous() for name, row in words.items()},
    )


def _shape(
    found: Mapping[str, torch.Tensor], known: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The form and sizes of a projector, of whose parts all have the same form.

    Raises:
        CheckpointError: it is incomplete, or its parts do not go together.
    """
    if not found:
        raise CheckpointError("no projector in it", where=where)
    names = [name.rsplit(".", 3) for name in found]  # whose, "layers", which, what
    owners = {name[0] for name in names}
    ours = [f"projector.parts.{number}" for number in range(len(owners))]
    if "projector" in owners:
        ours = ["projector"]
    layers = sorted({"0", *(name[2] for name in names)})
    wanted = {f"{own}.layers.{n}.{kind}" for own in ours for n in layers for kind in _AXES}
    for name in sorted(wanted ^ found.keys()):
        problem = f"its projector has {'no' if name in wanted else 'also'} {name}"
        raise CheckpointError(problem, where=where)
    for name, tensor in found.items():
        if tensor.dim() != _AXES[name.rpartition(".")[2]] or not tensor.numel():
            raise CheckpointError(f"{name} has shape {list(tensor.shape)}", where=where)
    last = found[f"{ours[0]}.layers.{layers[-1]}.weight"].shape
    hidden = last[-1] if len(layers) > 1 else last[0]
    if len(layers) == 1 and known.get("projector_layout") == "split":
        hidden //= known.get("tokens_per_embedding") or 1
    return {
        "projector_type": "mlp2x_gelu" if len(layers) > 1 else "linear",
        "embedding_dim": sum(found[f"{own}.layers.0.weight"].shape[1] for own in ours),
        "hidden_size": hidden,
    }


def _known(info: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a file or config says of its projector, in the types of `ProjectorInfo`.

    Raises:
        CheckpointError: a value is of another type, or no number of tokens.
    """
    known = {f.name: info[f.name] for f in fields(ProjectorInfo) if info.get(f.name) is not None}
    for f in fields(ProjectorInfo):
        found = type(known.get(f.name)).__name__
        wanted = re.split(r"[ \[]", str(f.type))[0]
        if f.name in known and found != wanted:
            raise CheckpointError(f"the projector's {f.name} is {found}, not {wanted}", where=where)
    if (known.get("tokens_per_embedding") or 1) < 1:
        raise CheckpointError("the projector's tokens_per_embedding is below 1", where=where)
    return known


def read_projector(path: str | Path) -> ProjectorFile:
    """Reads a projector file, ours or a published one.

    Args:
        path: `.safetensors` (ours), or a file of PyTorch's (any of the spellings of
            `projector_key`).

    Raises:
        CheckpointError: there is no such file, or it holds no projector.
        WeightsError: it is no weights file, or a broken one.
    """
    path = Path(path)
    if not path.is_file():
        hint = "extract-projector makes one file from a folder" if path.is_dir() else None
        raise CheckpointError("no such projector file", where=str(path), hint=hint)
    ours = path.suffix == ".safetensors"
    with open_checkpoint(path) as source:
        # the file may be a whole model's; only what belongs to a projector is read
        tensors = {
            name: source.read(name)
            for name in source.tensors
            if projector_key(name)
            or name.startswith("token_embeddings.")
            or (name in _WORDS and not ours)
        }
        said = source.files[0].metadata.get(_METADATA_KEY, "{}")
    try:
        info = json.loads(said)
    except (ValueError, RecursionError):
        info = None
    if not isinstance(info, dict):
        raise CheckpointError("its metadata are no JSON object", where=str(path))
    broken = [n for n, t in tensors.items() if projector_key(n) and not t.float().isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{broken[0]} holds numbers that are not finite",
            where=str(path),
            hint="its training went astray; try a smaller --learning-rate",
        )
    return projector_from_tensors(tensors, where=str(path), info=info)


def write_projector(path: str | Path, projector: ProjectorFile) -> None:
    """Writes a projector file, whole or not at all.

    Args:
        path: `.safetensors` for ours; `.bin` for the published layout, which carries no identity.
        projector: what to write.

    Raises:
        CheckpointError: the name ends in something else, or the published layout has no room for
            this projector (several tokens of its own per embedding).
    """
    path = Path(path)
    check_projector_name(path)
    with replace_file(path) as temporary:
        if path.suffix == ".bin":
            torch.save(_published_layout(projector, path), temporary)
            return
        tensors = projector.named()
        known = {key: value for key, value in asdict(projector.info).items() if value is not None}
        # one key only: safetensors writes several in any order, and the file would have any hash
        metadata = {_METADATA_KEY: json.dumps(known, sort_keys=True)}
        save_file({n: t.contiguous() for n, t in tensors.items()}, temporary, metadata=metadata)


def check_projector_name(path: Path) -> None:
    """Refuses a name that ends in neither form of a projector file.

    Raises:
        CheckpointError: it does.
    """
    if path.suffix not in (".safetensors", ".bin"):
        raise CheckpointError(
            "a projector file is .safetensors or .bin", where=str(path), hint="rename the output"
        )


def _published_layout(projector: ProjectorFile, path: Path) -> dict[str, torch.Tensor]:
    info, what = projector.info, None
    if any(name.startswith("projector.parts.") for name in projector.tensors):
        what = "the projectors of several encoders"
    elif info.projector_layout == "split" and (info.tokens_per_embedding or 1) > 1:
        what = f"{info.tokens_per_embedding} tokens of their own"
    if what is not None:
        problem, hint = f"the published layout has no room for {what}", "write a .safetensors file"
        raise CheckpointError(problem, where=str(path), hint=hint)
    linear = info.projector_type == "linear"
    layout = {}
    for name, tensor in projector.tensors.items():
        _, _, index, kind = name.split(".")
        key = f"model.mm_projector.{kind}" if linear else f"model.mm_projector.{index}.{kind}"
        layout[key] = tensor.clone()
    words = projector.token_embeddings
    if "im_start" in words and "im_end" in words:
        layout["model.embed_tokens.weight"] = torch.stack([words["im_start"], words["im_end"]])
    return layout
