"""The files beside a model's weights that belong to it, by their names; only these are copied.

Configuration, tokenizer, licence and model card. Neither code (`*.py`) nor what else lies in a
folder goes along, and no link that leads out of it. Of a tokenizer no other files are opened.
"""

from __future__ import annotations

import hashlib
import re
import shutil
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
_TIKTOKEN = re.compile(r"\w[\w.-]*\.tiktoken", re.ASCII)
_NAMED = re.compile(
    r"README\.md"
    r"|(?i:(LICEN[CS]E|NOTICE|USE_POLICY)([-_][-\w]*)?(\.\d+)*(\.(txt|md|pdf))?)",
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
    for name in _names(source):
        if is_side_file(folder, name):
            target = destination / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target)
        elif (folder / name).is_symlink():
            note(f"{folder / name} is not copied: it is a link out of its folder")


def side_files_sha256(source: Path) -> str:
    """A hash over names and contents of what `copy_side_files` copies."""
    digest = hashlib.sha256()
    folder = _folder_of(source)
    for name in _names(source):
        if is_side_file(folder, name):
            digest.update(f"{name} {sha256_file(folder / name)}\n".encode())
    return digest.hexdigest()


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name is a tokenizer's, so far as transformers reads them."""
    return name in _TOKENIZER or _TIKTOKEN.fullmatch(name) is not None


def is_side_file(folder: Path, name: str) -> bool:
    """Whether a name that belongs to a model stands for a file of its folder, of a likely size."""
    file = folder / name
    if not file.is_file() or file.stat().st_size > _LARGEST_BYTES:
        return False
    inside = folder.resolve()
    places = {inside}
    if inside.parent.name == "snapshots":
        places.add(inside.parents[1] / "blobs")  # the hub's cache keeps its contents there
    return not places.isdisjoint(file.resolve().parents)


def _folder_of(source: Path) -> Path:
    return source if source.is_dir() else source.parent


def _names(source: Path) -> list[str]:
    folder = _folder_of(source)
    if source != folder and not (folder / _CONFIG).is_file():
        return []  # a weights file among things that need not be its own
    found = sorted(path.name for path in folder.iterdir())
    templates = sorted(path.name for path in (folder / _TEMPLATES).glob("[!.]*.jinja"))
    return [
        *(n for n in found if n in _CONFIGS or is_tokenizer_file(n) or _NAMED.fullmatch(n)),
        *(f"{_TEMPLATES}/{name}" for name in templates),
    ]
