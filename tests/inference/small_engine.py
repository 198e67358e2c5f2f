"""Tiny models of many kinds with an engine, and questions of many lengths for them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen3Config,
)

from chatbind_cli.data.tokens import TokenizedSample
from chatbind_cli.inference.decoding import Generated, Outcome
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.local_engine import LocalEngine
from chatbind_cli.inference.questions import Question
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.chatbind import ChatBindConfig, ChatBindForConditionalGeneration
from tests.inference.world import inbox_of
from tests.model.tiny import SIZES, language_model

PATCH, START, END_OF_MEDIUM, EOS = 97, 98, 99, 2
SYSTEM = [1, *range(5, 25), *range(40, 50)]

LENGTHS: dict[str, Any] = {
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 50,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [8.0] * 4,
}
WITHOUT = {k: SIZES[k] for k in SIZES if k != "head_dim"}
FALCON = {k: SIZES[k] for k in SIZES if k not in ("head_dim", "num_key_value_heads")}
KINDS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZES, max_position_embeddings=256),
    "qwen3": lambda: Qwen3Config(**SIZES, max_position_embeddings=256),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, max_position_embeddings=256),
    # they look back over four tokens only, in all layers or in every other one
    "mistral": lambda: MistralConfig(**SIZES, max_position_embeddings=256, sliding_window=4),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=4, tie_word_embeddings=False),
    # rotations that change for all rows when one becomes longer than 50
    "phi3": lambda: Phi3Config(**WITHOUT, **LENGTHS, rope_parameters=LONG),
    # positions from the mask
    "falcon": lambda: FalconConfig(**FALCON, alibi=True),
    # keeps states of convolutions, too
    "lfm2": lambda: Lfm2Config(**WITHOUT, layer_types=["conv", "full_attention"]),
    **{kind: None for kind in ("bloom", "opt", "gpt2", "mixtral")},
}


class Words:
    """A tokenizer whose tokens are numbers."""

    pad_token_id = 0
    bos_token_id = 1

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))


def chatbind(kind: str = "llama") -> Any:
    """Random weights that say much, so that each token depends on those before."""
    torch.manual_seed(0)
    made = KINDS[kind]
    base = language_model(kind) if made is None else AutoModelForCausalLM.from_config(made())
    for parameter in base.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    config = ChatBindConfig(
        text_config=base.config,
        embedding_dim=8,
        tokens_per_embedding=2,
        use_start_end=True,
        im_patch_id=PATCH,
        im_start_id=START,
        im_end_id=END_OF_MEDIUM,
    )
    return ChatBindForConditionalGeneration(config, base).eval()


def engine(model: Any, batch_size: int = 4) -> LocalEngine:
    return LocalEngine(model, Words(), stop_ids=[EOS], batch_size=batch_size)


def question(identity: int, **settings: Any) -> Question:
    """Of 33 to 53 tokens, with up to two media, and an answer of up to 14."""
    drawn = torch.Generator().manual_seed(identity)
    text = torch.randint(30, 90, (1 + identity * 5 % 13,), generator=drawn).tolist()
    media = tuple(
        Medium("image", "", embedding=torch.randn(8, generator=drawn) * 3, weight=0.5 + n)
        for n in range(identity % 3)
    )
    soft = [START, PATCH, PATCH, END_OF_MEDIUM] * len(media)
    prompt = TokenizedSample([*SYSTEM, *soft, *text, 25], [], media)
    length = settings.pop("max_new_tokens", 3 + identity * 7 % 12)
    return Question(
        id=identity,
        prompt=prompt,
        settings=GenerationSettings(max_new_tokens=length, **settings),
    )


def run(one: LocalEngine, questions: Sequence[Question]) -> dict[int, Outcome]:
    outcomes = one.run(inbox_of(questions), GenerationSettings())
    found = {asked.id: outcome for asked, outcome in outcomes}
    assert len(found) == len(questions)
    return found  # type: ignore[return-value]


@torch.inference_mode()
def alone(model: Any, asked: Question) -> str:
    """The library's own greedy answer to one prompt."""
    prompt, settings = asked.prompt, asked.settings
    assert prompt is not None
    assert settings is not None
    media = [medium.embedding for medium in prompt.media if medium.embedding is not None]
    ids = torch.tensor([prompt.input_ids])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        media_embeddings=torch.stack(media) if media else None,
        media_weights=torch.tensor([m.weight for m in prompt.media]) if media else None,
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        pad_token_id=0,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
    )
    new = output[0, ids.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    return Words().decode([*takewhile(lambda token: token not in ends, new)])


def texts(outcomes: dict[int, Outcome]) -> dict[int, str]:
    assert all(isinstance(outcome, Generated) for outcome in outcomes.values()), outcomes
    return {key: one.text for key, one in outcomes.items() if isinstance(one, Generated)}


def prompts_of(reads: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(rows, tokens) for rows, tokens in reads if tokens > 1]
