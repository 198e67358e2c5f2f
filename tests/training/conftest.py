"""A world of a few kilobytes: a random LLaMA, a random ImageBind, eight pictures, captions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chatbind_cli.data.store import EmbeddingStore
from chatbind_cli.encoders.imagebind.config import ImageBindConfig
from chatbind_cli.encoders.imagebind.encoder import ImageBindEncoder
from chatbind_cli.encoders.imagebind.model import ImageBind
from chatbind_cli.encoders.imagebind.weights import save_encoder
from tests.inference.world import SIZES

ROOT = Path(__file__).resolve().parents[2]
COLOURS = ["red", "green", "blue", "white", "black", "yellow", "pink", "grey"]
SENTENCES = [
    "A chat between a curious human and an artificial intelligence assistant.",
    "### Human: What colour is this? ### Assistant: It is " + " ".join(COLOURS),
    "The assistant gives helpful, detailed, and polite answers to the human's questions.",
]
DIM = 16


@dataclass(frozen=True)
class World:
    """Where everything lies."""

    root: Path
    llama: Path
    llama_without_dropout: Path
    imagebind: Path
    media: Path
    captions: Path
    instructions: Path
    store: Path

    def args(self, output: Path, *more: str, source: str = "store") -> list[str]:
        """The words of a small run; embeddings come from the store or from the media."""
        media = ["--store", str(self.store)]
        if source == "media":
            media = ["--encoder", str(self.imagebind), "--media-root", str(self.media)]
        return [
            "-m",
            str(self.llama),
            "--data",
            str(self.captions),
            *media,
            "-o",
            str(output),
            "--device",
            "cpu",
            "--per-device-train-batch-size",
            "2",
            "--gradient-accumulation-steps",
            "1",
            *more,
        ]


def language_model(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        attention_dropout=0.1,  # so that a resumed run has random states to restore
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


class Counting(ImageBindEncoder):
    """Counts what it encodes."""

    n_encoded = 0

    def embed(self, media, *, normalize):  # type: ignore[no-untyped-def]
        self.n_encoded += len(media)
        return super().embed(media, normalize=normalize)


def encoder(folder: Path) -> None:
    config = ImageBindConfig(**{**SIZES, "out_embed_dim": DIM})
    torch.manual_seed(1)
    save_encoder(ImageBind(config, modalities=["image", "audio"]), config, folder)


def caption(index: int) -> dict[str, Any]:
    colour = COLOURS[index % len(COLOURS)]
    record: dict[str, Any] = {
        "id": f"c{index}",
        "conversations": [
            {"from": "human", "value": "What colour is this?\n<image>"},
            {"from": "gpt", "value": f"It is {colour}."},
        ],
    }
    if index % 5 == 4:  # some samples are text only
        record["conversations"][0]["value"] = f"Say {colour}."
        return record
    return {**record, "image": f"p{index % len(COLOURS)}.png"}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    made = World(
        root,
        root / "llama",
        root / "llama-without-dropout",
        root / "imagebind",
        root / "media",
        root / "captions.json",
        root / "instructions.jsonl",
        root / "store",
    )
    language_model(made.llama)
    shutil.copytree(made.llama, made.llama_without_dropout)
    config = made.llama_without_dropout / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.0}))
    encoder(made.imagebind)
    made.media.mkdir()
    random = np.random.default_rng(0)
    for index in range(len(COLOURS)):
        pixels = random.integers(0, 256, (32, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made.media / f"p{index}.png")
    records = [caption(index) for index in range(16)]
    made.captions.write_text(json.dumps(records))
    made.instructions.write_text("".join(json.dumps(r) + "\n" for r in records))
    with EmbeddingStore.open(
        made.store, "a", encoder_sha256="ab" * 32, encoder_name="tiny", dim=DIM
    ) as store:
        torch.manual_seed(2)
        for index in range(len(COLOURS)):
            store.add(f"p{index}.png", "image", f"{index:064x}", "image/v1", torch.randn(DIM))
    return made


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that the tests start: sums are rounded in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Outcome:
    code: int
    stdout: str
    stderr: str

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stdout.splitlines()]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def chatbind(*words: str, cwd: Path | None = None, **variables: str) -> Outcome:
    """The program in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "chatbind_cli", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment(), **variables},
        timeout=300,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The program in this process."""
    from chatbind_cli.cli import run

    def call(*words: str) -> Outcome:
        capsys.readouterr()
        code, message = run(list(words))
        out, err = capsys.readouterr()
        return Outcome(code, out, err + message)

    return call


@pytest.fixture(scope="session")
def program() -> Callable[..., Outcome]:
    return chatbind
