"""The toy language model: a byte-level BPE tokenizer and a small LLaMA, trained on text alone.

It learns the prompt styles that the commands use, with the digit named in words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chatbind_cli.data.conversations import Conversation
from chatbind_cli.data.tokens import PromptEncoder
from chatbind_cli.folders import replace_folder
from chatbind_cli.model.config import ChatBindConfig
from chatbind_cli.model.pretrained import quiet_transformers
from chatbind_cli.model.prompts import get_style
from chatbind_cli.toy.fit import Report, fit, repeatable
from chatbind_cli.toy.texts import conversations, passages
from chatbind_cli.training.samples import Collator

STYLES = ("v0", "vicuna_v1_1", "multimodal", "llava_v1")
"""Prompt styles that the model knows; the first two are far more frequent in its training."""

_STYLE_WEIGHTS = (3, 7, 3, 7, 0.5, 0, 0.5, 0)
_PASSAGE_SHARE = 0.1
_VOCABULARY = 1024
_CORPUS_FOR_TOKENIZER = 4000
_UNKNOWN, _BEGIN, _END = "<unk>", "<s>", "</s>"

_BATCH = 32
_LEARNING_RATE = 5e-3


def make_language_model(folder: Path, steps: int, seed: int, report: Report) -> None:
    """Trains the model, and writes a folder that `AutoModelForCausalLM` loads."""
    tokenizer = train_tokenizer(seed)
    model = train_language_model(tokenizer, steps=steps, seed=seed, report=report)
    with replace_folder(folder, made_by="toy") as temporary, quiet_transformers():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A BPE tokenizer for the toy world's talk that can write down any other text too."""
    rng = Random(seed)  # noqa: S311 - wordings, not secrets
    texts = [
        "".join(piece.text for piece in get_style(style).pieces(turns))
        for style in STYLES
        for turns in islice(conversations(rng), _CORPUS_FOR_TOKENIZER // len(STYLES))
    ]
    tokenizer = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_UNKNOWN, _BEGIN, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id(_BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BEGIN} $A", pair=f"{_BEGIN} $A {_BEGIN} $B", special_tokens=[(_BEGIN, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=_UNKNOWN,
        bos_token=_BEGIN,
        eos_token=_END,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def train_language_model(
    tokenizer: PreTrainedTokenizerFast, *, steps: int, seed: int, report: Report
) -> LlamaForCausalLM:
    """A LLaMA of 0.6 million weights that answers questions about digits named in words."""
    with repeatable(seed):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=336,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=2048,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                initializer_range=0.07,
                tie_word_embeddings=False,
            )
        )
        batches = _batches(tokenizer, Random(seed))  # noqa: S311 - texts, not secrets

        def loss() -> torch.Tensor:
            return model(**next(batches), use_cache=False).loss

        fit(
            model.parameters(),
            loss,
            steps=steps,
            learning_rate=_LEARNING_RATE,
            weight_decay=0.01,
            report=report,
        )
    return model.eval()


def samples(tokenizer: PreTrainedTokenizerFast, rng: Random) -> Iterator[dict[str, list[int]]]:
    """Conversations in changing styles, and now and then a passage of prose, without end.

    Of conversations the answers are learned; of prose everything.
    """
    # Its texts hold no media; the id that would stand for one is never used.
    config = ChatBindConfig(use_start_end=False, im_patch_id=tokenizer.unk_token_id)
    encoders = [
        PromptEncoder(tokenizer, config, style)
        for published in map(get_style, STYLES)
        for style in (published, replace(published, system_open="", system="", system_close=""))
    ]
    talk, prose = conversations(rng), passages(rng)
    while True:
        if rng.random() < _PASSAGE_SHARE:
            ids = [*tokenizer(next(prose))["input_ids"], tokenizer.eos_token_id]
            yield {"input_ids": ids, "labels": ids}
        else:
            (encoder,) = rng.choices(encoders, _STYLE_WEIGHTS)
            sample = encoder.conversation(Conversation("", next(talk), ""))
            yield {"input_ids": sample.input_ids, "labels": sample.labels}


def _batches(tokenizer: PreTrainedTokenizerFast, rng: Random) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches; samples of like length go together, which saves a third of the work."""
    source = samples(tokenizer, rng)
    collate = Collator(pad_token_id=0)
    while True:
        pool = sorted(islice(source, 16 * _BATCH), key=lambda sample: len(sample["input_ids"]))
        parts = [pool[start : start + _BATCH] for start in range(0, len(pool), _BATCH)]
        rng.shuffle(parts)
        yield from map(collate, parts)
