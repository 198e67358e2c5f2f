"""A judge that runs in this process: any causal language model in a folder, no server.

Judgements that wait at the same time go through the model together, so that a GPU is kept busy.
Knows nothing of files or of scores.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatbind_cli.errors import ChatBindError, CheckpointError
from chatbind_cli.review.asking import NoReplyError, ask_for_scores, find_rule
from chatbind_cli.review.cases import Case, digest
from chatbind_cli.review.judges import Stopped, Verdict
from chatbind_cli.review.prompts import VERSION, Message, build_messages
from chatbind_cli.review.rules import Rules

_SHORTEST_REVIEW = 8
"""Tokens of two scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalJudgeOptions:
    """Which model judges, and how it is run.

    Attributes:
        model: a Hugging Face folder or name.
        device: `auto` (a GPU where there is one), `cpu`, `cuda`, ...
        dtype: `auto` (bfloat16 on a GPU, float32 on a CPU), `float32`, `float16`, `bfloat16`.
        temperature: 0 for the most likely words.
        max_tokens: most tokens of one review.
        batch_size: most judgements that go through the model together.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    temperature: float = 0.0
    max_tokens: int = 1024
    batch_size: int = 8


@dataclass(slots=True)
class _Waiting:
    """A chat that waits for its reply."""

    messages: list[Message]
    metadata: dict[str, Any]
    reply: asyncio.Future[str] = field(default_factory=asyncio.Future)


class LocalJudge:
    """Lets a causal language model judge.

    Args:
        rules: what the judge is asked to do.
        options: which model.

    Raises:
        CheckpointError: there is no such model.
    """

    def __init__(self, rules: Rules, options: LocalJudgeOptions) -> None:
        self._weights = _weights_hash(options.model)
        # Two folders of one name are two judges, and a folder is another once it is trained on.
        self.name = options.model.rstrip("/").rpartition("/")[2]
        if self._weights:
            self.name += f"@{self._weights[:8]}"
        self._rules = rules
        self._options = options
        self._generator = _Generator(options)
        self._queue: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None
        self._stopped = False

    def fingerprint(self, case: Case) -> str:
        """Changes with the rule, the context, the model's weights and how it is asked."""
        options = self._options
        model = self._weights or options.model
        asked = [model, options.temperature, options.max_tokens]
        rule = find_rule(self._rules, case)
        return digest(f"local-{VERSION}", rule.fingerprint, case.context, asked)

    async def judge(self, case: Case, *, swapped: bool, sample: int) -> Verdict:
        """Asks for the scores, and once more if they cannot be read."""
        rule = find_rule(self._rules, case)
        return await ask_for_scores(self._ask, case, rule, swapped=swapped)

    def expected_tokens(self, case: Case) -> tuple[int, int]:
        """Tokens of the prompt for a case, and the most that the reply may have."""
        messages = build_messages(case, find_rule(self._rules, case))
        return self._generator.count(messages), self._options.max_tokens

    def stop(self) -> None:
        """Starts no further batch."""
        self._stopped = True

    async def close(self) -> None:
        """Waits for the batch that is in the model: a thread cannot be interrupted."""
        self._stopped = True
        if self._worker is not None:
            await asyncio.gather(self._worker, return_exceptions=True)

    async def _ask(self, messages: list[Message], metadata: dict[str, Any], again: bool) -> str:
        waiting = _Waiting(messages, metadata)
        self._queue.append(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await waiting.reply

    async def _work(self) -> None:
        """Runs batches until nobody waits."""
        await asyncio.sleep(0)  # let the others who start now line up
        while self._queue:
            batch = self._queue[: self._options.batch_size]
            del self._queue[: len(batch)]
            if self._stopped:
                outcome: list[Any] = [Stopped() for _ in batch]
            else:
                outcome = await self._run(batch)
            for waiting, result in zip(batch, outcome, strict=True):
                if waiting.reply.done():
                    continue
                if isinstance(result, BaseException):
                    waiting.reply.set_exception(result)
                else:
                    waiting.reply.set_result(result)

    async def _run(self, batch: list[_Waiting]) -> list[Any]:
        """A reply, or the reason why there is none, for each that waits."""
        try:
            replies = await asyncio.to_thread(
                self._generator.replies, [waiting.messages for waiting in batch]
            )
        # Out of memory, a prompt that is too long, a template that refuses.
        except (RuntimeError, ValueError, IndexError) as error:
            if len(batch) == 1:
                return [NoReplyError(f"the model cannot answer this ({_first_line(error)})")]
            # It may be the matter of one of them only.
            return [outcome for waiting in batch for outcome in await self._run([waiting])]
        for waiting, (_, prompt, completion) in zip(batch, replies, strict=True):
            metadata = waiting.metadata
            metadata["created"] = int(time.time())
            metadata["prompt_tokens"] = metadata.get("prompt_tokens", 0) + prompt
            metadata["completion_tokens"] = metadata.get("completion_tokens", 0) + completion
        return [text for text, _, _ in replies]


def _weights_hash(model: str) -> str:
    """A hash of a sample of a folder's weights; empty for a model of the hub or of another form."""
    from chatbind_cli.weights.checkpoint import open_checkpoint  # noqa: PLC0415  brings torch
    from chatbind_cli.weights.manifest import sample  # noqa: PLC0415

    if not Path(model).is_dir():
        return ""
    try:
        with open_checkpoint(model) as checkpoint:
            return sample(checkpoint)
    except ChatBindError:
        return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class _Generator:
    """The tokenizer, and the model once it is needed."""

    def __init__(self, options: LocalJudgeOptions) -> None:
        from chatbind_cli.model.pretrained import open_tokenizer  # noqa: PLC0415  brings torch

        self._options = options
        self._model: Any = None
        self._tokenizer: Any = open_tokenizer(options.model)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token

    def load(self) -> None:
        """Loads the model.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        import torch

        from chatbind_cli.model.pretrained import open_model  # noqa: PLC0415  brings transformers

        options = self._options
        on_gpu = torch.cuda.is_available()
        device = options.device if options.device != "auto" else "cuda" if on_gpu else "cpu"
        dtype = options.dtype
        if dtype == "auto":
            dtype = "float32" if device == "cpu" else "bfloat16"
        model: Any = open_model(options.model, dtype=getattr(torch, dtype))
        self._model = model.to(device).eval()

    def count(self, messages: list[Message]) -> int:
        """The tokens of a chat."""
        return len(self._tokenizer(self._text(messages))["input_ids"])

    def replies(self, chats: list[list[Message]]) -> list[tuple[str, int, int]]:
        """A reply a chat, with the tokens of prompt and reply."""
        import torch

        if self._model is None:
            self.load()
        texts = [self._text(messages) for messages in chats]
        plain = self._tokenizer.chat_template is None
        batch = self._tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            add_special_tokens=plain,
            return_token_type_ids=False,
        )
        room = self._room(batch["input_ids"].shape[1])
        batch = batch.to(self._model.device)
        sampling = {"do_sample": False}
        if self._options.temperature > 0:
            sampling = {"do_sample": True, "temperature": self._options.temperature}  # type: ignore[dict-item]
        with torch.inference_mode():
            output = self._model.generate(
                **batch,
                max_new_tokens=min(self._options.max_tokens, room),
                pad_token_id=self._tokenizer.pad_token_id,
                **sampling,
            )
        found = []
        for row, mask in zip(output, batch["attention_mask"], strict=True):
            new = row[batch["input_ids"].shape[1] :]
            kept = new[new != self._tokenizer.pad_token_id]
            text = self._tokenizer.decode(new, skip_special_tokens=True).strip()
            found.append((text, int(mask.sum()), len(kept)))
        return found

    def _room(self, prompt: int) -> int:
        """The tokens that a reply may have: beyond its positions a model answers nonsense.

        Raises:
            ValueError: not even two scores have room.
        """
        longest = getattr(self._model.config, "max_position_embeddings", None)
        if not longest:
            return self._options.max_tokens
        if prompt + _SHORTEST_REVIEW > longest:
            raise ValueError(f"the prompt of {prompt} tokens is too long for its {longest}")
        return int(longest) - prompt

    def _text(self, messages: list[Message]) -> str:
        """The chat in the model's own form; without one, as paragraphs."""
        if self._tokenizer.chat_template is None:
            parts = [message["content"] for message in messages]
            return "\n\n".join([*parts, "Scores:\n"])
        from chatbind_cli.model.chat_template import render  # noqa: PLC0415  for its users only

        try:
            return render(self._tokenizer, messages, asks=True)
        except CheckpointError:
            # Some templates know no system message; what it says can open the user's just as well.
            first: Message = {
                "role": "user",
                "content": f"{messages[0]['content']}\n\n{messages[1]['content']}",
            }
            return render(self._tokenizer, [first, *messages[2:]], asks=True)
