"""How a chat model is brought to say two scores, wherever it runs.

One question, and one more with the form repeated if the scores cannot be read; after that it is a
failed verdict with all that was said. Knows nothing of servers or of models.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from chatbind_cli.review.cases import Case
from chatbind_cli.review.judges import Verdict
from chatbind_cli.review.prompts import Message, ask_again, build_messages
from chatbind_cli.review.reply import UnreadableScores, read_object, read_scores
from chatbind_cli.review.rules import Rule, Rules

Ask = Callable[[list[Message], dict[str, Any], bool], Awaitable[str]]
"""(messages, metadata to fill in, whether this is the second question) -> reply."""


class NoReplyError(Exception):
    """One case got no reply, after all attempts or at once."""


def find_rule(rules: Rules, case: Case) -> Rule:
    """The rule for a case.

    Raises:
        RecordError: the user's rules have none.
    """
    with_context = case.context is not None
    return rules.find(case.category, case.modality, with_context=with_context)


async def ask_for_scores(ask: Ask, case: Case, rule: Rule, *, swapped: bool) -> Verdict:
    """The scores that a chat model gives, in the order of the answer files.

    Args:
        ask: sends a chat and returns the reply.
        case: what is judged.
        rule: by which rule.
        swapped: show the second answer first.
    """
    messages = build_messages(case, rule, swapped=swapped)
    metadata: dict[str, Any] = {"rule": rule.fingerprint}
    said: list[str] = []
    problem = ""
    for second in (False, True):
        try:
            reply = await ask(messages, metadata, second)
        except NoReplyError as error:
            return Verdict(content="\n\n".join(said), error=str(error), metadata=metadata)
        try:
            scores = read_scores(reply)
        except UnreadableScores as error:
            problem = str(error)
            said.append(reply)
            messages = ask_again(messages, reply)
            continue
        said.append(_as_text(reply))
        if second:
            metadata["asked_again"] = True
        return Verdict(
            scores=scores[::-1] if swapped else scores,
            content="\n\n".join(said),
            metadata=metadata,
        )
    error_text = f"the scores cannot be read: {problem}"
    return Verdict(content="\n\n".join(said), error=error_text, metadata=metadata)


def _as_text(reply: str) -> str:
    """The seed's form of a reply, scores on the first line, also where it came as an object."""
    structured = read_object(reply)
    if structured is None:
        return reply
    (first, second), explanation = structured
    return f"{first:g} {second:g}\n{explanation}".rstrip()
