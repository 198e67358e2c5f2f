"""`--load-in`: a language model's matrices in few bits, which bitsandbytes packs on a GPU."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from chatbind_cli.errors import UsageError


def quantization(bits: int, compute: torch.dtype, device: str, option: str) -> BitsAndBytesConfig:
    """How transformers is to pack a language model.

    Args:
        bits: 8 (LLM.int8(), Dettmers et al., 2022) or 4 (NF4, as QLoRA has it).
        compute: the numbers that 4 bits become before they are multiplied.
        device: the word of `--device`.
        option: the user's word for it, for errors.

    Raises:
        UsageError: this machine cannot.
    """
    hint = "leave it out: a language model in bfloat16 takes 2 bytes a number"
    if device == "cpu" or not torch.cuda.is_available():
        raise UsageError(f"{option} needs an NVIDIA GPU", hint=hint)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"{option} needs bitsandbytes", hint="pip install 'chatbind[gpu]' brings it"
        )
    if bits == 8:
        # it says of every product that its inputs are cast
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def keep_whole(config: Any, model: PreTrainedModel) -> None:
    """Has the output layer and the projector left as they are: few numbers, which decide much."""
    output = model.get_output_embeddings()
    last = [name for name, module in model.named_modules() if module is output]
    config.llm_int8_skip_modules = ["projector", *last]
