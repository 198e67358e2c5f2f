"""A model's projector taken out of it, as a projector file has it, and put into another."""

from __future__ import annotations

from dataclasses import fields

import torch

from chatbind_cli.errors import CheckpointError
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration, word_embeddings
from chatbind_cli.model.tokenizer import media_rows
from chatbind_cli.weights.projector_file import (
    ProjectorFile,
    ProjectorInfo,
    projector_from_tensors,
)


def projector_of(model: ChatBindForConditionalGeneration) -> ProjectorFile:
    """The projector of a model in memory, with the embeddings of its media tokens."""
    config = model.config
    weight = word_embeddings(model).weight
    names = {f.name for f in fields(ProjectorInfo)} & set(vars(config))
    info = {name: getattr(config, name) for name in names}
    words = {name: weight[index] for name, index in media_rows(config).items()}
    tensors = {f"projector.{name}": t for name, t in model.projector.state_dict().items()}
    tensors |= {f"token_embeddings.{name}": row for name, row in words.items()}
    return projector_from_tensors(
        {name: t.cpu() for name, t in tensors.items()}, where="the model", info=info
    )


def load_into(
    model: ChatBindForConditionalGeneration, projector: ProjectorFile, where: str
) -> None:
    """Copies a projector's weights and token embeddings into a model.

    Raises:
        CheckpointError: the shapes differ.
    """
    state = model.projector.state_dict()
    with torch.no_grad():
        for name, target in state.items():
            source = projector.tensors.get(f"projector.{name}")
            if source is None or source.shape != target.shape:
                shape = None if source is None else list(source.shape)
                raise CheckpointError(
                    f"the projector's {name} is {shape}, the model wants {list(target.shape)}",
                    where=where,
                )
            target.copy_(source)
        weight = word_embeddings(model).weight
        for name, index in media_rows(model.config).items():
            if name in projector.token_embeddings:
                weight[index] = projector.token_embeddings[name].to(weight)
