"""A tiny ChatBind model with its encoder, media and questions, made in a second or two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, LlamaConfig

from chatbind_cli.checkpoints.projector_file import write_projector
from chatbind_cli.encoders.imagebind.config import ImageBindConfig
from chatbind_cli.encoders.imagebind.model import ImageBind
from chatbind_cli.encoders.imagebind.weights import WEIGHTS_NAME, save_encoder
from chatbind_cli.files import sha256_file
from chatbind_cli.inbox import Inbox
from chatbind_cli.inference.questions import Question
from chatbind_cli.model.assemble import build_chatbind
from chatbind_cli.model.config import EncoderInfo
from chatbind_cli.model.loading import projector_of
from tests.model.tiny import save_chatbind, word_tokenizer

DIM = 8
TOWERS = ("vision", "text", "audio", "depth", "thermal", "imu")
SIZES: dict[str, Any] = {"out_embed_dim": DIM}
for _tower in TOWERS:
    SIZES |= {f"{_tower}_embed_dim": 16, f"{_tower}_num_blocks": 1, f"{_tower}_num_heads": 2}
COLOURS = ("black", "white", "red", "green", "blue", "yellow")


def inbox_of(asked: Sequence[Question]) -> Inbox[Question]:
    """Questions, and then the end."""
    inbox: Inbox[Question] = Inbox(len(asked))
    for question in asked:
        inbox.put(question)
    inbox.close()
    return inbox


@dataclass(frozen=True)
class World:
    """Where everything is."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def encoder(self) -> Path:
        return self.folder / "encoder"

    @property
    def media(self) -> Path:
        return self.folder / "media"

    @property
    def llama(self) -> Path:
        return self.folder / "llama"

    @property
    def projector(self) -> Path:
        return self.folder / "projector.safetensors"


def make_world(folder: Path, *, max_positions: int = 512, head_dim: int = 8) -> World:
    """Writes encoder, model and media into a folder."""
    world = World(folder)
    save_tiny_encoder(world.encoder, seed=0)
    save_media(world.media)
    save_language_model(world.llama, max_positions, head_dim)
    encoder = EncoderInfo(
        name="tiny",
        sha256=sha256_file(world.encoder / WEIGHTS_NAME),
        embedding_dim=DIM,
        path=str(world.encoder),
    )
    bundle = build_chatbind(world.llama, encoder=encoder, prompt_style="vicuna_v1_1")
    # as large as the words, so that what an answer says depends on the media
    torch.manual_seed(5)
    torch.nn.init.normal_(bundle.model.projector.layers[0].weight, std=3.0)
    write_projector(world.projector, projector_of(bundle.model))
    save_chatbind(bundle, world.model)
    return world


def save_tiny_encoder(folder: Path, *, seed: int, texts: bool = False) -> None:
    torch.manual_seed(seed)
    config = ImageBindConfig(**SIZES)
    senses = ["image", "audio", "depth", "thermal", "imu"]
    model = ImageBind(config, [*senses, "text"] if texts else senses)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    save_encoder(model, config, folder)


def save_language_model(folder: Path, max_positions: int, head_dim: int = 8) -> None:
    """A LLaMA whose random words are far apart, so that its answers vary."""
    tokenizer = word_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=max_positions,
        initializer_range=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_media(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(0)
    for index, colour in enumerate(COLOURS):
        Image.new("RGB", (64, 48), colour).save(folder / f"{index}.png")
    Image.fromarray(drawn.integers(0, 65535, (24, 24), dtype=np.uint16)).save(folder / "depth.png")
    with wave.open(str(folder / "tone.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        time_s = np.arange(32000) / 16000
        sound = 8000 * np.sin(2 * np.pi * 700 * time_s) + drawn.normal(0, 300, 32000)
        file.writeframes(sound.astype("<i2").tobytes())


def questions(count: int) -> list[dict[str, Any]]:
    """Questions of different lengths about an image, a sound, or nothing."""
    records = []
    for index in range(count):
        words = " ".join(["brown", "dog", "car", "bird", "red"][: 1 + index % 5])
        record: dict[str, Any] = {
            "question_id": index,
            "text": f"What about the {words} {index}?",
            "category": ["conv", "detail", "complex"][index % 3],
        }
        if index % 4 == 3:
            record["audio"] = "tone.wav"
        elif index % 7 != 5:
            record["image"] = f"{index % len(COLOURS)}.png"
        records.append(record)
    return records


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(*args: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """The real program in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "chatbind_cli", *map(str, args)],
        stdout=options.pop("stdout", subprocess.PIPE),
        stderr=options.pop("stderr", subprocess.PIPE),
        env=environment | options.pop("env", {}),
        **options,
    )
