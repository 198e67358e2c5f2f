"""A ChatBind model without its language model, which an engine has: `--engine`.

Of the weights only the projector and the table of word embeddings are read. The rest of the
language model is there in shape, and takes no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from chatbind_cli.checkpoints.checkpoint import Checkpoint, open_checkpoint
from chatbind_cli.checkpoints.delta import OWN_PREFIX, refuse_unapplied
from chatbind_cli.checkpoints.extract_projector import find_projector
from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.device import resolve_device, resolve_dtype
from chatbind_cli.errors import CheckpointError
from chatbind_cli.inference.loaded_model import LoadedModel
from chatbind_cli.model.assemble import read_without_weights
from chatbind_cli.model.base import weights_folder
from chatbind_cli.model.chatbind import (
    ChatBindForConditionalGeneration,
    media_inputs,
    word_embeddings,
)
from chatbind_cli.model.config import saved_end_ids
from chatbind_cli.model.loading import (
    ChatBind,
    check_tokens,
    load_into,
    refuse_bare,
    refuse_missing,
)
from chatbind_cli.model.pretrained import model_without_memory, one_line, quiet_transformers
from chatbind_cli.model.tokenizer import load_tokenizer


def load_front(
    path: Path,
    *,
    base: Path | None = None,
    encoders: Sequence[str | Path] = (),
    allow_encoder_mismatch: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> LoadedModel:
    """What answering needs of a ChatBind folder beside the language model.

    The arguments are those of `load_model`. The projector works on the CPU, in the numbers
    `dtype`; the table of words stays in those of its file.

    Raises:
        CheckpointError: the folder cannot be used.
        UsageError: there is no such device or dtype.
    """
    place = resolve_device(device)
    numbers = resolve_dtype(dtype, place)
    refuse_missing(path)
    refuse_unapplied(path)
    refuse_bare(path)
    weights = weights_folder(path, base)
    with quiet_transformers(), open_checkpoint(weights) as checkpoint:
        tokenizer, config = read_without_weights(path)
        with one_line("its config.json makes no model", path):
            model: Any = model_without_memory(config, checkpoint, ChatBindForConditionalGeneration)
        check_tokens(model, tokenizer, str(path))
        known = None if weights == path else len(load_tokenizer(weights))
        _read_words(model, checkpoint, known, numbers)
        model.projector.to_empty(device="cpu").to(numbers)
        load_into(model, find_projector(path)[0], str(path))
    model.generation_config = config.generation(saved_end_ids(weights))
    return LoadedModel(
        ChatBind(model.eval().requires_grad_(False), tokenizer, config),
        path,
        None,
        place,
        numbers,
        encoders,
        allow_encoder_mismatch,
    )


def _read_words(
    model: ChatBindForConditionalGeneration,
    checkpoint: Checkpoint,
    known: int | None,
    numbers: torch.dtype,
) -> None:
    """Reads the table of word embeddings, and nothing beside it.

    Where the checkpoint is a base model whose tokenizer had `known` tokens, the rows behind them
    are as `grow_embeddings` makes them.

    Raises:
        CheckpointError: it is not there, or of another size.
        WeightsError: a weights file is broken.
    """
    table = word_embeddings(model)
    name = _table_name(model, checkpoint)
    rows, width = checkpoint.info(name).shape
    wanted = table.num_embeddings
    weight = checkpoint.read(name)
    if known is not None:
        weight = torch.cat([weight, weight.new_zeros(max(wanted - rows, 0), width)])
        weight[known:] = weight[:known].mean(dim=0, dtype=torch.float32).to(weight.dtype)
    if weight.shape != table.weight.shape:
        raise CheckpointError(
            f"tensor {name} has shape {list(weight.shape)}, and the config says "
            f"{list(table.weight.shape)}",
            where=str(checkpoint.path),
        )
    if any(True for _ in table.buffers()):  # a scale, which is no weight: it is made anew
        table.to_empty(device="cpu")
        model.language_model._init_weights(table)
        weight = weight.to(numbers)
    table.weight = torch.nn.Parameter(weight, requires_grad=False)


def _table_name(model: ChatBindForConditionalGeneration, checkpoint: Checkpoint) -> str:
    """What a checkpoint calls the word embeddings: ours, published, or a bare language model.

    Raises:
        CheckpointError: it does not have them under a name that is known.
    """
    table = word_embeddings(model).weight
    ours = next(name for name, tensor in model.named_parameters() if tensor is table)
    plain = ours.removeprefix(OWN_PREFIX)
    prefix = f"{model.language_model.base_model_prefix}."
    for name in (ours, plain, plain.removeprefix(prefix)):
        if name in checkpoint.tensors and len(checkpoint.info(name).shape) == 2:
            return name
    raise CheckpointError(
        f"has no word embeddings under the name {plain}",
        where=str(checkpoint.path),
        hint="`chatbind convert` writes it in this program's layout",
    )


def prompt_embeddings(loaded: LoadedModel, prompt: TokenizedSample) -> torch.Tensor:
    """A prompt as the language model reads it: [length, width], in the front's numbers.

    Raises:
        RecordError: it has placeholders without media.
    """
    ids = torch.tensor([prompt.input_ids])
    with torch.inference_mode():
        return loaded.bundle.model.prompt_embeddings(ids, **media_inputs(prompt.media))[0]
