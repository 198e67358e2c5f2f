"""A model of lmms-eval: `lmms-eval --model chatbind --model_args pretrained=DIR`.

Source of what is called how, and when: lmms-eval 0.7.3, `api/model.py`, `evaluator.py` and
`models/chat/async_openai.py`.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import transformers
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from loguru import logger

from chatbind_cli.console import Progress
from chatbind_cli.data.work_queue import Worker, work_queue
from chatbind_cli.errors import ChatBindError, UsageError, contained
from chatbind_cli.harness.messages import as_chat, settings_of
from chatbind_cli.inference.answerer import Answerer
from chatbind_cli.inference.decoding import Generated
from chatbind_cli.inference.front import load_front
from chatbind_cli.inference.generation_settings import GenerationSettings
from chatbind_cli.inference.loaded_model import load_model
from chatbind_cli.inference.media_encoder import MediaEncoder
from chatbind_cli.inference.openai_chat import read_chat_request
from chatbind_cli.inference.questions import Question
from chatbind_cli.inference.remote_engine import RemoteEngine
from chatbind_cli.media.root import MediaRoot
from chatbind_cli.worker_pool import WorkerPool

_READERS = 2
"""Threads that read media, as of `vqa`."""

_FAILED = "[LMMS_EVAL_REQUEST_FAILED]"
"""How its own models begin the text of an answer that there is none of."""


class ChatBind(lmms):
    """A ChatBind model that answers the questions of tasks.

    Args:
        pretrained: its folder, or that of a language model that `projector` goes with.
        projector: a projector file.
        base: the language model that a folder of adapters belongs to, where it has moved.
        encoder: where the encoder is, if not where the model says.
        engine: as `--engine` of `vqa`, where a vLLM server has the language model.
        dtype: as `--dtype` of `vqa`.
        device: as `--device` of lmms-eval; of several processes each takes the GPU of its rank.
        batch_size: questions that are answered together; `auto`: 16, or 64 with an engine.

    Raises:
        ChatBindError: the model, or the engine, cannot be used.
        TypeError: there is no such argument.
    """

    is_simple = False  # gets messages, in which media stand between the words

    def __init__(
        self,
        pretrained: str,
        *,
        projector: str | None = None,
        base: str | None = None,
        encoder: str | None = None,
        engine: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int | str = "auto",
    ) -> None:
        super().__init__()
        transformers.utils.logging.disable_progress_bar()
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        how |= {"base": Path(base) if base else None, "encoders": [encoder] if encoder else []}
        size = (16 if engine is None else 64) if batch_size == "auto" else int(batch_size)
        self._open = ExitStack()
        remote: RemoteEngine | None = None
        if engine is None:
            joined = None if projector is None else Path(projector)
            loaded = load_model(Path(pretrained), projector=joined, **how)
        elif projector is not None:
            raise UsageError("engine goes with a ChatBind folder, and not with projector")
        else:
            loaded = load_front(Path(pretrained), **how)
            remote = RemoteEngine(loaded, [engine], in_flight=size)
            self._open.enter_context(remote)
        # a task's data may lie anywhere, but `-` is no medium
        media = MediaEncoder(loaded, open_media=MediaRoot(allow_outside=True).open)
        how = {"engine": remote, "batch_size": size, "readers": _READERS}
        self._answerer = Answerer(loaded, media, **how)
        self.device = loaded.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers, in the order of the requests; one that fails says so in its place."""
        begin = partial(Worker, partial(self._answerer.run, settings=GenerationSettings()), room=0)
        progress = Progress(len(requests), "answering", "questions")
        results, seen = [], Counter[str]()
        with work_queue(WorkerPool(), begin, attrgetter("id")) as queue, progress:
            asked = (self._question(request, seen) for request in requests)
            for question, outcome in queue.results(asked, in_order=True):
                results.append(_result(question, outcome))
                progress.advance()
        failed = sum(result.text.startswith(_FAILED) for result in results)
        if failed:
            logger.error(f"{failed} of {len(results)} questions failed, and count as wrong")
        return results

    def _question(self, asked: Instance, seen: Counter[str]) -> Question:
        _, doc_to_messages, wanted, number, task, split = asked.args
        identity = f"{task}/{split}/{number}"
        seen[identity] += 1
        if seen[identity] > 1:  # --repeats: another answer, as draws depend on this
            identity += f"#{seen[identity]}"
        try:
            settings = settings_of(wanted or {})
            messages = as_chat(doc_to_messages(self.task_dict[task][split][number]))
            request = read_chat_request(
                {"messages": messages}, settings=settings, model_id=None, request_id=identity
            )
            return replace(request.question, where=identity, settings=settings)
        except Exception as error:  # tasks bring code and data of their own
            problem = contained(error, where=identity)
            return Question(id=identity, where=identity, problem=problem)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """lmms-eval has no such requests with messages: a task of that kind ends before."""
        raise NotImplementedError("chatbind generates: see `vqa --choices` for likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: each round would depend on the answer to the one before."""
        raise NotImplementedError("chatbind takes no tasks of several rounds")

    def clean(self) -> None:
        """Lets go of the model, and the engine: a judge of a task may need the memory."""
        self._open.close()
        del self._answerer
        super().clean()


def _result(question: Question, outcome: Generated | ChatBindError) -> GenerationResult:
    if isinstance(outcome, Generated):
        return GenerationResult(outcome.text, TokenCounts(outcome.n_prompt, outcome.n_tokens))
    logger.error(
        str(outcome) if outcome.where == question.where else f"{question.where}: {outcome}"
    )
    return GenerationResult(f"{_FAILED} {outcome}")
