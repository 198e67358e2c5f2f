"""How an engine shows that it has a model's language model: one fixed prompt, and its answer.

`convert --language-model` asks the model itself, and notes the answer beside it. Who sends prompts
to an engine sends that one first, made of the same words, projector and invented medium, and
compares.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedTokenizerBase

from chatbind_cli.checkpoints.json_file import read_json
from chatbind_cli.errors import CheckpointError
from chatbind_cli.files import replace_file
from chatbind_cli.folders import RECORD, note_made
from chatbind_cli.model.base import quick_fingerprint
from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.loading import ChatBind
from chatbind_cli.model.tokenizer import TextCodec

PROBE_NAME: Final = "engine.json"
PROBE_TOKENS: Final = 16
TOLERANCE: Final = 0.1
"""Mean difference of log-probabilities, in nats, that other numbers may make: bfloat16 makes 0.007
in a small trained model, another stage of its training 1.1."""
MOST_OF_ONE: Final = 0.5
"""The same of one token."""

_FORMAT = 1
_BEFORE, _AFTER = "Say what this is: ", " Then count from one to ten."


@dataclass(frozen=True, slots=True)
class Step:
    """One token of the answer.

    Attributes:
        token: the likeliest, which was taken.
        logprob: its log-probability.
        second: the next likeliest token.
        margin: by how much the log-probability of that is below.
    """

    token: int
    logprob: float
    second: int
    margin: float


def probe_embeddings(
    model: ChatBindForConditionalGeneration, tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor:
    """The fixed prompt as the language model reads it, [length, width].

    Of the language model only the word embeddings are needed.
    """
    codec = TextCodec(tokenizer)
    ids = [
        *codec.bos,
        *codec.plain(_BEFORE, at_start=True),
        *model.config.medium_ids(),
        *codec.plain(_AFTER, at_start=True),
    ]
    # an embedding of norm 1 that no medium has
    medium = torch.nn.functional.normalize(torch.arange(model.config.embedding_dim).cos(), dim=0)
    return model.prompt_embeddings(torch.tensor([ids]), medium.unsqueeze(0))[0]


@torch.inference_mode()
def answer_probe(bundle: ChatBind) -> list[Step]:
    """What a whole model in memory says to the prompt."""
    embeddings = probe_embeddings(bundle.model, bundle.tokenizer).unsqueeze(0)
    never = bundle.model.generation_config.suppress_tokens or []
    words, steps = bundle.model.get_input_embeddings(), []
    for _ in range(PROBE_TOKENS):
        # without keys and values: not all kinds of models keep them in the same way
        logits = bundle.model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
        logprobs = logits.float().log_softmax(dim=-1)
        allowed = logprobs.clone()
        allowed[never] = -torch.inf
        values, tokens = allowed.topk(2)
        (first, second), best = tokens.tolist(), values[0].item()
        steps.append(Step(first, best, second, (values[0] - values[1]).item()))
        embeddings = torch.cat([embeddings, words(tokens[None, :1])], dim=1)
    return steps


def difference(
    expected: Sequence[Step], tokens: Sequence[int], logprobs: Sequence[float]
) -> str | None:
    """In which way an engine's answer to the probe is another model's; None: it is the model's.

    Where two tokens are about equally likely, other numbers may take the second. From there on the
    answers go on differently, and what came before decides.
    """
    if not tokens or len(tokens) != len(logprobs):
        return "it gave no answer"
    found = []
    for place, (step, token, logprob) in enumerate(zip(expected, tokens, logprobs, strict=False)):
        taken = {step.token: step.logprob}
        if step.margin <= MOST_OF_ONE:
            taken[step.second] = step.logprob - step.margin
        if token not in taken:
            return f"its token {place + 1} is {token}, and the model's {step.token}"
        found.append(abs(logprob - taken[token]))
        if token != step.token:
            break
    # asked in this way, should a number be none
    if not (max(found) <= MOST_OF_ONE and sum(found) / len(found) <= TOLERANCE):
        said = ", ".join(f"{off:.2f}" for off in found)
        return f"the log-probabilities of its tokens are off by {said}"
    return None


def note_probe(bundle: ChatBind, source: Path, folder: Path) -> None:
    """Writes a model's answer to the probe into the folder of its language model."""
    told = {
        "format": _FORMAT,
        "weights": quick_fingerprint(source),
        "steps": [asdict(step) for step in answer_probe(bundle)],
    }
    (folder / PROBE_NAME).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def place_probe(folder: Path, source: Path) -> str | None:
    """Puts what is noted in a language model's folder beside the model that it was made of.

    Returns:
        What the user has to do, where it cannot be written there.
    """
    text = (folder / PROBE_NAME).read_bytes()
    target = source / PROBE_NAME
    try:
        if target.is_file() and target.read_bytes() == text:
            return None
        if (source / RECORD).is_file():
            note_made(source, [PROBE_NAME], made_by="")
        with replace_file(target) as temporary:
            temporary.write_bytes(text)
    except OSError as error:
        return (
            f"{source} cannot be written ({error.strerror}): copy {folder / PROBE_NAME} there, or "
            "into the copy of the model that will ask"
        )
    return None


def read_probe(folder: Path) -> list[Step]:
    """What is noted beside a model.

    Raises:
        CheckpointError: nothing is, or it is of other weights.
    """
    path = folder / PROBE_NAME
    hint = f"`chatbind convert {folder} --language-model DIR` makes it, and what engines serve"
    if not path.is_file():
        raise CheckpointError(
            f"has no {PROBE_NAME}, by which an engine is known", where=str(folder), hint=hint
        )
    told: dict[str, Any] = read_json(path, most_bytes=1 << 20)
    try:
        steps = [Step(**step) for step in told["steps"]]
        known = told["format"] == _FORMAT and len(steps) > 0
    except (LookupError, TypeError) as error:
        raise CheckpointError("is not what it should be", where=str(path), hint=hint) from error
    if not known or told["weights"] != quick_fingerprint(folder):
        raise CheckpointError("is of other weights than are here", where=str(path), hint=hint)
    return steps
