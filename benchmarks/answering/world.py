"""A model of random weights, questions about pictures, and what is noted of their answers."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from word_tokenizer import word_tokenizer

from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import LoadedModel, load_model
from chatbind_cli.inference.media_encoder import StoredEmbeddings
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.config import EncoderInfo
from chatbind_cli.model.pretrained import blank_model, quiet_transformers

# tokens of LLaMA's vocabulary: 30 answers to each of conversation, detail and complex questions
ANSWER_TOKENS = (
    *(8, 10, 10, 10, 11, 11, 12, 13, 13, 15, 15, 16, 17, 18, 20, 21, 22, 23, 24, 24, 25, 27, 29),
    *(29, 30, 30, 35, 42, 49, 57),
    *(54, 71, 72, 73, 76, 76, 82, 82, 90, 90, 91, 95, 97, 97, 104, 107, 111, 112, 115, 116, 117),
    *(117, 118, 124, 126, 128, 130, 135, 147, 166),
    *(91, 100, 106, 106, 119, 121, 129, 130, 132, 138, 140, 140, 140, 140, 147, 147, 148, 150, 151),
    *(153, 153, 161, 173, 174, 176, 177, 179, 224, 234, 253),
)  # fmt: skip
QUESTION_TOKENS = (12.3, 3.8)  # mean and deviation of the 90 questions
DIM, PICTURES = 1024, 64
ENCODER = {"name": "random", "sha256": "ab" * 32}
HERE = ("batches of 16", "one by one", "rows 16", "rows 16, beginning not shared", "rows 4")
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12},
        "heads": 12,
        "words": 31_990,
        "dtype": "float32",
        "half": "bfloat16",
        "questions": 200,
        "shorter": 1,
        "ways": (*HERE, "chat"),
    },
    "7b": {
        "model": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32},
        "heads": 32,
        "words": 31_990,
        "dtype": "bfloat16",
        "half": None,
        "questions": 200,
        "shorter": 1,
        "ways": (*HERE, "rows 64", "chat"),
    },
    # to see that it runs: a few questions, with answers a sixteenth as long
    "smoke": {
        "model": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
        "heads": 2,
        "words": 200,
        "dtype": "float32",
        "half": None,
        "questions": 20,
        "shorter": 16,
        "ways": (*HERE, "chat"),
    },
}


def make_world(folder: Path, preset: dict[str, Any], count: int) -> None:
    """A ChatBind model of random weights, embeddings of pictures, and questions about them."""
    tokenizer = word_tokenizer(f"w{n}" for n in range(preset["words"]))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        num_attention_heads=preset["heads"],
        tie_word_embeddings=False,
        # so that what is said depends on what was read
        initializer_range=preset["model"]["hidden_size"] ** -0.5,
        **preset["model"],
    )
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, preset["dtype"]))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = blank_model(config)
        model.lm_head.weight.data[2] = 0  # others are always likelier
    torch.set_default_dtype(torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    encoder = EncoderInfo(**ENCODER, embedding_dim=DIM)
    with quiet_transformers():
        model.save_pretrained(folder / "llama")
        tokenizer.save_pretrained(folder / "llama")
        del model
        bundle = build_chatbind(folder / "llama", encoder=encoder, prompt_style="vicuna_v1_1")
        bundle.model.projector.to(bundle.model.language_model.dtype)
        bundle.model.save_pretrained(folder / "model")
        bundle.tokenizer.save_pretrained(folder / "model")
    shutil.rmtree(folder / "llama")
    with EmbeddingStore.open(
        folder / "store", "a", dim=DIM, encoder_name="random", encoder_sha256=ENCODER["sha256"]
    ) as store:
        for n in range(PICTURES):
            store.add(f"{n}.jpg", "image", f"{n:064x}", "image/v1", torch.randn(DIM))
    draw = random.Random(0)
    records = []
    for n in range(count):
        length = max(4, round(draw.gauss(*QUESTION_TOKENS)))
        text = " ".join(f"w{draw.randrange(preset['words'])}" for _ in range(length))
        # the kinds alternate, as in the file
        tokens = draw.choice(ANSWER_TOKENS[30 * (n % 3) : 30 * (n % 3 + 1)]) // preset["shorter"]
        record = {"id": n, "text": text, "image": f"{n % PICTURES}.jpg", "tokens": max(2, tokens)}
        records.append(record)
    (folder / "questions.json").write_text(json.dumps(records))


class World:
    """What a way works with.

    Args:
        folder: what `make_world` has made.
        dtype: of the model.
        every: a question in how many is answered.
        url: of an engine.
    """

    def __init__(self, folder: Path, dtype: str, every: int, url: str | None) -> None:
        self.folder, self.dtype, self.url = folder, dtype, url
        records = json.loads((folder / "questions.json").read_text())
        self.questions = [
            Question(
                record["text"],
                (Medium("image", record["image"]),),
                id=record["id"],
                settings=GenerationSettings(max_new_tokens=record["tokens"]),
            )
            for record in records[::every]
        ]
        self.began = time.perf_counter()
        self.first_token: float | None = None
        self.first_answer: float | None = None
        self.answers: dict[int, str] = {}
        self.tokens = 0
        self.turns: list[float] = []
        self.again = 0.0
        self.context = 0

    def load(self) -> LoadedModel:
        """The whole model."""
        return load_model(self.folder / "model", dtype=self.dtype)

    def answerer(self, loaded: LoadedModel | None = None, **options: Any) -> Answerer:
        """The model, which has the embeddings of a store."""
        loaded = loaded or self.load()
        media = StoredEmbeddings([self.folder / "store"], loaded, loaded.media_options())
        return Answerer(loaded, media, **options)

    def begin(self) -> None:
        """What comes now counts."""
        self.began = time.perf_counter()

    def since(self) -> float:
        """Seconds since then."""
        return time.perf_counter() - self.began

    def took(self, question: Question, text: str, tokens: int) -> None:
        """Notes an answer, and checks that it is as long as it is to be."""
        assert question.settings is not None
        assert tokens == question.settings.max_new_tokens, (question.id, tokens)
        self.first_answer = self.first_answer or self.since()
        self.answers[int(question.id or 0)] = text
        self.tokens += tokens
