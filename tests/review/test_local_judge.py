"""A language model in this process as a judge: a tiny one, made on the spot."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from chatbind_cli.errors import CheckpointError
from chatbind_cli.review.cases import Case
from chatbind_cli.review.judges import Stopped, Verdict
from chatbind_cli.review.local_judge import LocalJudge, LocalJudgeOptions
from chatbind_cli.review.rules import Rules

TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}"
)


def save_tiny_model(folder: Path, template: str | None = None) -> Path:
    """A LLaMA of two layers and width 16 that always says "8 6"."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<eos>", "8", "6", "the", "a", "dog", "cat", "Question"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    )
    tokenizer.chat_template = template
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=2,
        pad_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # The layers add nothing and the embeddings are one-hot, so the head is a table of which
        # word follows which: anything -> 8, 8 -> 6, 6 -> end.
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        table = torch.zeros(len(words), 16)
        table[torch.arange(len(words)), torch.arange(len(words))] = 1
        model.model.embed_tokens.weight.copy_(table)
        model.lm_head.weight.zero_()
        model.lm_head.weight[3, : len(words)] = 1
        model.lm_head.weight[4, 3], model.lm_head.weight[2, 4] = 2, 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("judge") / "tiny")


def _case(number: int, text: str = "a dog") -> Case:
    question = {"question_id": number, "text": "the", "category": "conv"}
    return Case(question=question, answers=({"text": text}, {"text": "a cat"}))


def _judged(folder: Path, cases: list[Case], **options: Any) -> list[Verdict]:
    async def go() -> list[Verdict]:
        judge = LocalJudge(Rules(), LocalJudgeOptions(model=str(folder), **options))
        work = [judge.judge(case, swapped=False, sample=0) for case in cases]
        try:
            return list(await asyncio.gather(*work))
        finally:
            await judge.close()

    return asyncio.run(go())


def test_a_model_in_the_process_gives_scores_and_counts_tokens(folder: Path) -> None:
    (verdict,) = _judged(folder, [_case(1)], max_tokens=8)
    assert verdict.scores == (8, 6)
    assert verdict.content == "8 6"
    assert verdict.metadata["completion_tokens"] == 3
    assert verdict.metadata["prompt_tokens"] > 100


def test_what_waits_together_goes_through_the_model_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chatbind_cli.review import local_judge

    sizes: list[int] = []
    replies = local_judge._Generator.replies
    monkeypatch.setattr(
        local_judge._Generator,
        "replies",
        lambda self, chats: sizes.append(len(chats)) or replies(self, chats),
    )
    cases = [_case(i, "a dog " * i) for i in range(5)]
    verdicts = _judged(folder, cases, max_tokens=8, batch_size=4)
    assert [verdict.scores for verdict in verdicts] == [(8, 6)] * 5
    assert sizes == [4, 1]


def test_a_template_without_a_system_message_gets_its_words_in_the_first_one(
    tmp_path: Path,
) -> None:
    folder = save_tiny_model(tmp_path / "strict", TEMPLATE)
    assert _judged(folder, [_case(1)], max_tokens=8)[0].scores == (8, 6)


def test_a_prompt_that_does_not_fit_fails_alone_and_says_why(folder: Path) -> None:
    cases = [_case(0), _case(1, "a dog " * 2000), _case(2)]
    first, long, third = _judged(folder, cases, max_tokens=8)
    assert first.scores == third.scores == (8, 6)
    assert long.scores is None
    assert long.error is not None
    assert "tokens is too long for its 2048" in long.error
    assert first.metadata["created"] > 1_700_000_000


def test_a_stop_gives_up_what_waits(folder: Path) -> None:
    async def go() -> None:
        judge = LocalJudge(Rules(), LocalJudgeOptions(model=str(folder)))
        judge.stop()
        with pytest.raises(Stopped):
            await judge.judge(_case(1), swapped=False, sample=0)
        await judge.close()

    asyncio.run(go())


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        LocalJudge(Rules(), LocalJudgeOptions(model=str(tmp_path)))


def test_a_judge_is_its_weights_and_not_its_path(tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    def judge(folder: Path) -> LocalJudge:
        return LocalJudge(Rules(), LocalJudgeOptions(model=str(folder)))

    case = _case(1)
    first = save_tiny_model(tmp_path / "a/judge", TEMPLATE)
    moved = shutil.copytree(first, tmp_path / "b/judge")
    assert judge(first).name.startswith("judge@")
    assert judge(moved).name == judge(first).name
    assert judge(moved).fingerprint(case) == judge(first).fingerprint(case)
    tensors = load_file(moved / "model.safetensors")
    tensors["lm_head.weight"] += torch.ones(())
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    assert judge(moved).name != judge(first).name
    assert judge(moved).fingerprint(case) != judge(first).fingerprint(case)
