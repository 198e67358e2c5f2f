"""What transformers sees of a model folder: a folder of our making, which leads nowhere else.

Configs are written anew without the keys that name code, kernels or other files; of the rest there
are links to the weights that were checked and to the tokenizer's files. Adapters, modules, and
whatever else transformers looks for in a folder are not there.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.tokenization_auto import (
    TOKENIZER_MAPPING_NAMES,
    tokenizer_class_from_name,
)

from chatbind_cli.checkpoints.checkpoint import INDEX_NAMES, Checkpoint
from chatbind_cli.checkpoints.json_file import MOST_BYTES, read_json
from chatbind_cli.checkpoints.side_files import is_tokenizer_file
from chatbind_cli.errors import CheckpointError
from chatbind_cli.worker import temporary_folder

_CONFIG, _TOKENIZER = "config.json", "tokenizer_config.json"
# Keys that name code, kernels, or other files; what begins with one underline is as private.
_LEADING_ELSEWHERE = frozenset(
    {"auto_map", "custom_pipelines", "attn_implementation", "experts_implementation"}
    | {"fusion_config", "kernel_config", "distributed_config", "transformers_weights"}
    | {"configuration_files", "fast_tokenizer_files", "init_inputs", "gguf_file"}
)
# Others fetch kernels, or need packages that this program does not bring.
_QUANTIZED_BY = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")

# Numbers of things that are made one by one, before any weight could bear them out.
_COUNTS = re.compile(r"(^|_)(n|num)(_|$)|layer|block|depth|expert|stage|label")
_NO_COUNTS = re.compile(r"position|token|vocab|embd|size|param|ctx|inner|dim")
_MOST_OF_A_COUNT = 20_000
MOST_CONFIG = 1 << 20  # bytes; lists in it become tensors

_MOST_IDS = 4 << 20  # token ids; the tokenizers library makes room for the highest
_MOST_GROWTH = 4096  # characters that a normaliser may make of one


@contextmanager
def staged_tokenizer(folder: Path) -> Iterator[Path]:
    """A folder with what was checked of a tokenizer, for as long as it is read.

    Raises:
        CheckpointError: it needs code, or a file of it would fill memory.
    """
    config = read_json(folder / _CONFIG, missing_ok=True, most_bytes=MOST_CONFIG)
    check_config(config, folder / _CONFIG)
    tokenizer = read_json(folder / _TOKENIZER, missing_ok=True)
    _refuse_tokenizer_code(tokenizer, config, folder / _TOKENIZER)
    _refuse_ids(tokenizer, folder / _TOKENIZER)
    with temporary_folder() as made:
        stage = Path(made)
        for name, fields in ((_CONFIG, config), (_TOKENIZER, tokenizer)):
            if fields:
                (stage / name).write_text(json.dumps(cleaned(fields)), encoding="utf-8")
        for file in sorted(folder.iterdir()):
            if _is_data(file) and file.name not in (_CONFIG, _TOKENIZER):
                (stage / file.name).symlink_to(file.absolute())
        yield stage


@contextmanager
def staged_weights(checkpoint: Checkpoint) -> Iterator[Path]:
    """A folder with a checkpoint's weights and nothing else, for as long as they are read."""
    with temporary_folder() as made:
        index = [checkpoint.folder / name for name in INDEX_NAMES]
        for path in [*(file.path for file in checkpoint.files), *filter(Path.is_file, index)]:
            (Path(made) / path.name).symlink_to(path.absolute())
        yield Path(made)


def _is_data(file: Path) -> bool:
    """Whether a file is a tokenizer's, and not larger than any.

    Raises:
        CheckpointError: it is one of a tokenizer's that nobody must read.
    """
    if not is_tokenizer_file(file.name) or not file.is_file():
        return False
    if file.suffix != ".json":
        return file.stat().st_size <= MOST_BYTES
    fields = read_json(file)
    _refuse_ids(fields, file)
    _refuse_growth(fields.get("normalizer"), file)
    return True


def _refuse_ids(fields: Mapping[str, Any], file: Path) -> None:
    """Refuses token ids for which the tokenizers library would fill memory, and end the process.

    Raises:
        CheckpointError: there is one beyond any.
    """
    ids: list[Any] = []
    if file.name in ("vocab.json", "added_tokens.json"):
        ids += fields.values()
    elif file.name == "tokenizer.json":
        vocabulary = fields.get("model", {}).get("vocab")
        ids += vocabulary.values() if isinstance(vocabulary, dict) else ()
        ids += (token["id"] for token in fields.get("added_tokens") or ())
    for key in fields.get("added_tokens_decoder") or ():
        ids.append(int(key) if key.isdecimal() and len(key) < 20 else key)
    for index in ids:
        if not isinstance(index, int) or not 0 <= index < _MOST_IDS:
            raise CheckpointError(f"has a token id that none has: {index!r:.30}", where=str(file))


def _refuse_growth(normalizer: Any, file: Path) -> None:
    """Refuses normalisers that make much of little, or read beyond their tables.

    Raises:
        CheckpointError: it is one.
    """
    growth = 1
    for part in _parts(normalizer):
        growth *= max(len(str(part.get("content", ""))), 1)
        if growth > _MOST_GROWTH:
            raise CheckpointError("its normalizer makes texts grow without end", where=str(file))
        charsmap = part.get("precompiled_charsmap")
        if charsmap is not None:
            data = base64.b64decode(charsmap)
            if len(data) < 4 + int.from_bytes(data[:4], "little"):
                raise CheckpointError("its table of characters is cut short", where=str(file))


def _parts(normalizer: Any) -> Iterator[dict[str, Any]]:
    if isinstance(normalizer, dict):
        yield normalizer
        for inner in normalizer.get("normalizers") or ():
            yield from _parts(inner)


def check_config(fields: Mapping[str, Any], where: Path) -> None:
    """Refuses settings that must not reach transformers.

    Raises:
        CheckpointError: they need kernels, or ask for what no model has.
    """
    for part, kind in _configs(fields):
        _refuse_counts(part, kind, where)
        quantized = part.get("quantization_config")
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        if quantized and method not in _QUANTIZED_BY:
            raise CheckpointError(
                f"its weights are quantised by {str(method)[:60]!r}",
                where=str(where),
                hint="get them as plain numbers, or quantised by bitsandbytes",
            )


def check_kind(fields: Mapping[str, Any], where: Path) -> None:
    """Refuses a model that is of no kind that transformers, or this program, has a class for.

    Raises:
        CheckpointError: it is of none.
    """
    if _is_known(fields):
        return
    if fields.get("auto_map"):
        raise _needs_code(where)
    raise CheckpointError(
        f"has the model_type {str(fields.get('model_type'))[:60]!r}, which transformers "
        f"{transformers.__version__} does not know",
        where=str(where),
    )


def _is_known(fields: Mapping[str, Any]) -> bool:
    kind = fields.get("model_type")
    return isinstance(kind, str) and kind in CONFIG_MAPPING


def _configs(
    fields: Mapping[str, Any], kind: type[Any] | None = None
) -> Iterator[tuple[Mapping[str, Any], type[Any] | None]]:
    """The settings of a model and of its parts, each with the class that will read them."""
    kind = CONFIG_MAPPING[fields["model_type"]] if _is_known(fields) else kind
    yield fields, kind
    for name, inner in getattr(kind, "sub_configs", {"text_config": None}).items():
        part = fields.get(name)
        if isinstance(part, dict):
            yield from _configs(part, inner)


def _refuse_counts(fields: Mapping[str, Any], kind: type[Any] | None, where: Path) -> None:
    """Refuses numbers of layers and the like that would fill memory while a config is read."""
    known = {"num_labels", *getattr(kind, "attribute_map", {})}
    if is_dataclass(kind):
        known |= {field.name for field in dataclass_fields(kind)}
    for key in known & fields.keys():
        value = fields[key]
        counts = _COUNTS.search(key) and not _NO_COUNTS.search(key)
        if counts and isinstance(value, (int, float)) and not 0 <= value <= _MOST_OF_A_COUNT:
            raise CheckpointError(f"asks for {key} = {value:.6g}", where=str(where))


def _refuse_tokenizer_code(
    fields: Mapping[str, Any], config: Mapping[str, Any], where: Path
) -> None:
    own = fields.get("auto_map")
    if not (own.get("AutoTokenizer") if isinstance(own, dict) else own):
        return
    name = str(fields.get("tokenizer_class") or "").removesuffix("Fast")
    known = config.get("model_type") in TOKENIZER_MAPPING_NAMES
    if name:
        known = any(map(tokenizer_class_from_name, (name, f"{name}Fast")))
    if not known:
        raise _needs_code(where)


def _needs_code(where: Path) -> CheckpointError:
    return CheckpointError(
        "needs code of its own (auto_map), and no code of a model folder is run",
        where=str(where),
        hint="use a model whose kind transformers knows",
    )


def cleaned(value: Any) -> Any:
    """JSON without the keys that lead elsewhere."""
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: cleaned(item)
        for key, item in value.items()
        if key not in _LEADING_ELSEWHERE and not re.match("_[^_]", key)
    }
