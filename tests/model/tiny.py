"""Models and tokenizers that are made in milliseconds: two layers, a few hundred tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from chatbind_cli.model.loading import ChatBind
from chatbind_cli.model.pretrained import quiet_transformers

CORPUS = [
    "USER: What is this? ASSISTANT: It is a brown dog, with a white chest.",
    "### Human: Describe the picture briefly.\n### Assistant: A red car drives past.\n### ",
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "<|im_start|>user\nWhat about this?<|im_end|>\n<|im_start|>assistant\nA bird.<|im_end|>\n",
] * 4

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# of any model whose configuration says head_dim
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

LANGUAGE_MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "qwen2_tied": (Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mixtral": (MixtralConfig, {"num_key_value_heads": 2, "num_local_experts": 4}),
    "gpt_neox": (GPTNeoXConfig, {}),
    # word embeddings narrower than the model: soft tokens must have their width
    "opt": (OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    "bloom": (BloomConfig, {}),
    "gpt2": (GPT2Config, {"n_positions": 256}),
}


def language_model(kind: str = "llama", vocab_size: int = 100) -> Any:
    """A language model with random weights that are the same in every test."""
    config_class, more = LANGUAGE_MODELS[kind]
    torch.manual_seed(0)
    config = config_class(vocab_size=vocab_size, **{**_SIZES, **more})
    return AutoModelForCausalLM.from_config(config).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE like GPT-2's and Qwen's, with ChatML's control tokens and template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHATML
    return fast


def word_tokenizer() -> PreTrainedTokenizerFast:
    """BPE that marks words like SentencePiece, with `<s>` before a text: a small LLaMA's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)],
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def save_language_model(folder: Path, kind: str = "llama", tokenizer: Any = None) -> Path:
    """A folder with a language model and its tokenizer, as `--model_name_or_path` names it."""
    tokenizer = tokenizer or byte_tokenizer()
    language_model(kind, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_chatbind(bundle: ChatBind, folder: Path) -> None:
    """A ChatBind model folder, as training leaves it."""
    with quiet_transformers():
        bundle.model.save_pretrained(folder)
        bundle.tokenizer.save_pretrained(folder)
