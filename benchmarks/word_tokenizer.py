"""A tokenizer without training, for models of random weights."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token a word: `<unk>`, `<s>` and `</s>`, which have the ids 0 to 2, then these in order."""
    ids = {word: n for n, word in enumerate(dict.fromkeys(("<unk>", "<s>", "</s>", *words)))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
