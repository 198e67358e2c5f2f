"""What a ChatBind model is made of, and where it comes from: the `config.json` of its folder.

The folder carries its whole identity (encoder, base language model, prompt style, stage, token
counts, the command that made it), so that nothing is ever guessed from a path's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.errors import CheckpointError

if TYPE_CHECKING:
    from chatbind_cli.checkpoints.projector_file import ProjectorInfo

MODEL_TYPE = "chatbind"
PROJECTOR_TYPES = ("linear", "mlp2x_gelu")
PROJECTOR_LAYOUTS = ("split", "repeat")
STAGES = ("pretrain", "finetune", "published")

MOST_ENCODERS = 8
"""Side by side in one model: what says more is broken."""

# What a config.json may say; all of it reaches arithmetic, slices or calls.
_KINDS: dict[tuple[type, ...], tuple[str, ...]] = {
    (int,): ("embedding_dim", "tokens_per_embedding"),
    (bool,): ("use_start_end", "normalize_embeddings"),
    (str,): ("projector_type", "projector_layout", "prompt_style", "stage"),
    (int, type(None)): ("im_patch_id", "im_start_id", "im_end_id"),
    (dict, type(None)): ("encoder", "media_options", "provenance", "base_model"),
}


class ChatBindConfig(PreTrainedConfig):
    """Sizes, token ids and provenance of a ChatBind model.

    Args:
        text_config: the language model's own configuration (object or dictionary).
        embedding_dim: width of the encoder's embeddings.
        projector_type: `linear` (as published) or `mlp2x_gelu` (two layers).
        tokens_per_embedding: soft tokens that one embedding becomes.
        projector_layout: `split`: the projector makes all soft tokens, each its own; `repeat`: it
            makes one, which is repeated (`repeat_feature_dim` of published models).
        use_start_end: whether `<im_start>` and `<im_end>` stand around the soft tokens.
        normalize_embeddings: whether embeddings are brought to norm 1 before the projector. True
            for models trained here; False for published ones, which saw the scaled embeddings.
        prompt_style: name of the prompt style that the model was trained with.
        stage: `pretrain`, `finetune` or `published`.
        im_patch_id: token id of `<im_patch>`, whose position a soft token takes.
        im_start_id: token id of `<im_start>`.
        im_end_id: token id of `<im_end>`.
        encoder: the encoder's identity: `name`, `sha256`, `path`, and what else it tells.
        media_options: how media became tensors in training (`clip_sampler`, ...).
        provenance: `command`, `versions`, `language_model`, and what else the maker notes.
        base_model: of a folder that holds adapters only: `path` and `fingerprint` of the model
            whose matrices they stand beside.

    Raises:
        CheckpointError: a value that no version of ChatBind writes.
    """

    model_type = MODEL_TYPE
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    has_no_defaults_at_init = True

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    embedding_dim: int = 1024
    projector_type: str = "linear"
    tokens_per_embedding: int = 1
    projector_layout: str = "split"
    use_start_end: bool = True
    normalize_embeddings: bool = True
    prompt_style: str = "v0"
    stage: str = "pretrain"
    im_patch_id: int | None = None
    im_start_id: int | None = None
    im_end_id: int | None = None
    encoder: dict[str, Any] | None = None
    media_options: dict[str, Any] | None = None
    provenance: dict[str, Any] | None = None
    base_model: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for kinds, names in _KINDS.items():
            for name in names:
                if type(getattr(self, name)) not in kinds:
                    raise CheckpointError(f"{name} is {getattr(self, name)!r:.60}")
        encoder_of(self)
        self.text_config = _text_config(self.text_config)
        self.encoder = dict(self.encoder or {})
        self.media_options = dict(self.media_options or {})
        self.provenance = dict(self.provenance or {})
        # transformers overwrites the inner configuration's choice of kernels with the outer one's,
        # which is none yet; a language model that is loaded already would run without a mask
        kernels = ("_attn_implementation", "_experts_implementation")
        chosen = {name: getattr(self.text_config, name, None) for name in kernels}
        super().__post_init__(**kwargs)
        for name, value in chosen.items():
            if value is not None and getattr(self, name, None) is None:
                setattr(self.text_config, name, value)
        # the flag that transformers reads is the outer one, the language model's own one decides
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        _check_choice("projector_type", self.projector_type, PROJECTOR_TYPES)
        _check_choice("projector_layout", self.projector_layout, PROJECTOR_LAYOUTS)
        _check_choice("stage", self.stage, STAGES)
        if self.tokens_per_embedding < 1:
            raise CheckpointError(f"tokens_per_embedding is {self.tokens_per_embedding}")

    def medium_ids(self) -> list[int]:
        """The token ids that stand for one medium in a prompt.

        Raises:
            CheckpointError: the configuration has no ids for them.
        """
        if self.im_patch_id is None:
            raise CheckpointError("the model's config.json has no im_patch_id")
        ids = [self.im_patch_id] * self.tokens_per_embedding
        if not self.use_start_end:
            return ids
        if self.im_start_id is None or self.im_end_id is None:
            raise CheckpointError("the model's config.json has no im_start_id and im_end_id")
        return [self.im_start_id, *ids, self.im_end_id]

    def generation(self, end_ids: Sequence[int]) -> GenerationConfig:
        """What `generate` does unless told otherwise: it ends at these tokens.

        It writes no media tokens either: a model that did would ask for media that nobody gave.
        """
        media = [i for i in (self.im_patch_id, self.im_start_id, self.im_end_id) if i is not None]
        return GenerationConfig(eos_token_id=list(end_ids) or None, suppress_tokens=media or None)


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """Which encoder a model belongs to, as far as it is known.

    Args:
        name: for people.
        sha256: of its weights file.
        embedding_dim: width of its embeddings.
        path: what opened it when the model was made, see `Encoder.reference`.
        dtype: the numbers in which it worked.
        licence: of its weights.
        parts: the encoders that it consists of, where they are several side by side; empty: one.
        sha256_before: of the same encoder with fewer towers, see there; no file says it.
    """

    name: str
    sha256: str | None
    embedding_dim: int
    path: str | None = None
    dtype: str | None = None
    licence: str | None = None
    parts: tuple[EncoderInfo, ...] = ()
    sha256_before: frozenset[str] = frozenset()

    @property
    def widths(self) -> list[int]:
        """Of the embeddings of each encoder; a projector has a part for each."""
        return [one.embedding_dim for one in self.each]

    @property
    def each(self) -> tuple[EncoderInfo, ...]:
        """The several, or itself."""
        return self.parts or (self,)

    def as_record(self) -> dict[str, Any]:
        """The same for a configuration, which says nothing of what is not known or not there."""
        said = asdict(self)
        said["parts"] = [part.as_record() for part in self.parts]
        unsaid = {"sha256_before", *(k for k in ("dtype", "licence", "parts") if not said[k])}
        return {k: v for k, v in said.items() if k not in unsaid}


def encoder_of(trained: ProjectorInfo | ChatBindConfig) -> EncoderInfo:
    """The encoder that a projector or model was trained with, as far as its file tells.

    Raises:
        CheckpointError: a name or hash is none, or there are several whose widths do not add up.
    """
    known = trained.encoder or {}
    whole = _read_encoder(known, trained.embedding_dim)
    said = known.get("parts")
    if said is None:
        return whole
    if not isinstance(said, list) or not 2 <= len(said) <= MOST_ENCODERS:
        raise CheckpointError(f"the encoder's parts are no list of 2 to {MOST_ENCODERS}")
    parts = [
        _read_encoder(part, part.get("embedding_dim")) for part in said if isinstance(part, dict)
    ]
    widths = [part.embedding_dim for part in parts]
    if len(parts) < len(said) or sum(widths) != trained.embedding_dim:
        raise CheckpointError(
            f"the encoder's parts have widths {widths}, which do not make the embedding_dim of "
            f"{trained.embedding_dim}"
        )
    return replace(whole, parts=tuple(parts))


def _read_encoder(known: dict[str, Any], width: Any) -> EncoderInfo:
    if type(width) is not int or width < 1:
        raise CheckpointError(f"the encoder's embedding_dim is {width!r:.60}")
    names = ("name", "sha256", "path", "dtype", "licence")
    said: dict[str, Any] = {name: known.get(name) for name in names}
    for name, value in said.items():
        if not isinstance(value, (str, type(None))):
            raise CheckpointError(f"the encoder's {name} is no text")
    said["name"] = said["name"] or "imagebind"
    return EncoderInfo(**said, embedding_dim=width)


def check_encoder(
    trained: ProjectorInfo | ChatBindConfig,
    encoder: EncoderInfo,
    *,
    where: str | None = None,
    same_dtype: bool = True,
) -> None:
    """Refuses an encoder that is not the one that a model or projector was trained with.

    Several are compared one by one.

    Raises:
        CheckpointError: their number or a width differs, or both hashes of one, or with
            `same_dtype` both dtypes, are known and differ.
    """
    own = encoder_of(trained)
    what = "model" if isinstance(trained, ChatBindConfig) else "projector"
    problem = _difference(own, encoder)
    if problem is not None:
        hint = f"name the encoder that the {what} was trained with (--encoder)"
        if own.parts:
            hint = f"name those that the {what} was trained with, in order: --encoder "
            hint += " --encoder ".join(one.name for one in own.each)
        raise CheckpointError(f"the {what} {problem}", where=where, hint=hint)
    for mine, other in zip(own.each, encoder.each, strict=True):
        if same_dtype and mine.dtype and other.dtype and mine.dtype != other.dtype:
            raise CheckpointError(
                f"was trained on embeddings that were computed in {mine.dtype}, and these were in "
                f"{other.dtype}",
                where=where,
                hint=f"encode the media with --dtype {mine.dtype}",
            )


def _difference(own: EncoderInfo, encoder: EncoderInfo) -> str | None:
    """What is to be said of a model of one encoder, or of several, that gets another."""
    hashes = [[one.sha256 or "" for one in info.each] for info in (own, encoder)]
    names = [" and ".join(one.name for one in info.each) for info in (own, encoder)]
    if len(own.each) != len(encoder.each):
        return f"was trained with {names[0]}, not with {names[1]}"
    if hashes[0] != hashes[1] and sorted(hashes[0]) == sorted(hashes[1]):
        return f"was trained with the encoders in another order: {names[0]}"
    for mine, other in zip(own.each, encoder.each, strict=True):
        if mine.embedding_dim != other.embedding_dim:
            return (
                f"reads embeddings of width {mine.embedding_dim}, the encoder {other.name} gives "
                f"{other.embedding_dim}"
            )
        known = (other.sha256, *other.sha256_before)
        if mine.sha256 and other.sha256 and mine.sha256 not in known:
            return (
                f"was trained with the encoder {mine.name} ({mine.sha256[:12]}), not with "
                f"{other.name} ({other.sha256[:12]})"
            )
    return None


def end_ids(named: Any) -> list[int]:
    """The token ids that `eos_token_id` of a configuration names: one, several or none.

    Raises:
        CheckpointError: they are no token ids.
    """
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(index) is int and index >= 0 for index in ids):
        raise CheckpointError(f"eos_token_id is {named!r}, which names no token")
    return ids


def saved_end_ids(folder: Path) -> list[int]:
    """The tokens that end an answer by the files of a model folder.

    They are all that is taken of `generation_config.json`: how answers are made is the user's
    choice, and not that of the weights' maker.

    Raises:
        CheckpointError: a file is no JSON object, or names what is no token.
    """
    config = read_json(folder / "config.json", missing_ok=True)
    text_config = config.get("text_config")
    parts = [read_json(folder / "generation_config.json", missing_ok=True), config]
    parts += [text_config] if isinstance(text_config, dict) else []
    try:
        return sorted({index for part in parts for index in end_ids(part.get("eos_token_id"))})
    except CheckpointError as error:
        raise CheckpointError(error.what, where=str(folder)) from error


def _text_config(value: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(value, PreTrainedConfig):
        return value
    if not isinstance(value or {}, dict):
        raise CheckpointError("text_config is not a JSON object")
    fields = dict(value or {})
    kind = fields.pop("model_type", "llama")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"the language model is of the kind {kind!r}, which this version of transformers "
            "does not know"
        )
    return CONFIG_MAPPING[kind](**fields)


def _check_choice(name: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise CheckpointError(f"{name} is {value!r}", hint=f"it must be one of {', '.join(names)}")


AutoConfig.register(MODEL_TYPE, ChatBindConfig, exist_ok=True)
