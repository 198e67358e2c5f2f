"""The files beside a model's weights that belong to it, by their names; only these are copied.

Configuration, tokenizer, licence and model card. Neither code (`*.py`) nor what else lies in a
folder goes along, and no link that leads out of it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from chatbind_cli.console import note
from chatbind_cli.files import sha256_file

GENERATION: Final = "generation_config.json"
_CONFIG = "config.json"
_CONFIGS = {
    _CONFIG,
    GENERATION,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "quantization_config.json",
}
# What the tokenizers of transformers, sentencepiece, tiktoken and mistral-common are saved as.
_TOKENIZER = {
    "added_tokens.json",
    "bpe.codes",
    "byte_maps.json",
    "chat_template.jinja",
    "chat_template.json",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "merges.txt",
    "normalizer.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "target.spm",
    "target_vocab.json",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tokenizer_config.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "vocab.bpe",
    "vocab.json",
    "vocab.txt",
    "word_pronunciation.json",
    "word_shape.json",
}
_NAMED = re.compile(
    r"[\w.-]+\.tiktoken|README\.md|(LICEN[CS]E|NOTICE|USE_POLICY)([-_.]\w+)*?(\.(txt|md|pdf))?",
    re.ASCII,
)
_TEMPLATES = "additional_chat_templates"
_LARGEST_BYTES = 64 << 20


def copy_side_files(source: Path, destination: Path) -> None:
    """Copies what belongs to a model.

    Args:
        source: the model's folder or weights file.
        destination: an existing folder.
    """
    folder = _folder_of(source)
    for file in _side_files(source):
        target = destination / file.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def side_files_sha256(source: Path) -> str:
    """A hash over names and contents of what `copy_side_files` copies."""
    digest = hashlib.sha256()
    for file in _side_files(source):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def is_side_file(folder: Path, name: str) -> bool:
    """Whether a model's folder has a file of that name that belongs to it."""
    file = folder / name
    if not file.is_file() or file.stat().st_size > _LARGEST_BYTES:
        return False
    inside = folder.resolve()
    allowed = [inside]
    if inside.parent.name == "snapshots":
        allowed.append(inside.parents[1] / "blobs")  # the hub's cache keeps its contents there
    if any(place in file.resolve().parents for place in allowed):
        return True
    note(f"{file} is a link out of its folder: it is not copied")
    return False


def _folder_of(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _side_files(source: Path) -> Iterator[Path]:
    folder = _folder_of(source)
    if source != folder and not (folder / _CONFIG).is_file():
        return  # a weights file among things that need not be its own
    names = [path.name for path in sorted(folder.iterdir())]
    names = [n for n in names if n in _CONFIGS | _TOKENIZER or _NAMED.fullmatch(n)]
    templates = sorted((folder / _TEMPLATES).glob("[!.]*.jinja"))
    for name in (*names, *(f"{_TEMPLATES}/{path.name}" for path in templates)):
        if is_side_file(folder, name):
            yield folder / name
