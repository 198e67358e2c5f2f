"""Verdicts as others publish them, as review records: a winner has the score 1, the other one 0.

FastChat's judgements on MT-bench, of pairs (`model_1`, `model_2`, `g1_winner`, `g2_winner`,
`judge`, `turn`) and of single answers (`model`, `score`, `judge`), and its votes of people
(`model_a`, `model_b`, `winner`, `judge`); AlpacaEval's annotations (`instruction`, `generator_1`,
`output_1`, ..., `annotator`, `preference` from 1 to 2); our own labels (`question_id`, `models`,
`winner`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from chatbind_cli.files import sha256_text
from chatbind_cli.jsonl import Record, dumps

_NAMES = (("model_1", "model_2"), ("model_a", "model_b"), ("generator_1", "generator_2"))
_GAMES = {"g1_winner": [1, 2], "g2_winner": [2, 1], "winner": [1, 2]}
_PLACES = {"1": 0.0, "2": 1.0, "model_1": 0.0, "model_2": 1.0, "model_a": 0.0, "model_b": 1.0}


def as_reviews(record: Record) -> Iterator[Record]:
    """The reviews that a published record holds; any other record as it is."""
    keys = next((pair for pair in _NAMES if all(key in record for key in pair)), ())
    models = [str(record[key]) for key in keys] or record.get("models")
    games = {key: order for key, order in _GAMES.items() if key in record}
    if "tuple" in record or "error" in record:
        yield record
    elif isinstance(models, list) and len(models) == 2 and (games or "preference" in record):
        for key, order in games.items():
            said = record.get(key.replace("winner", "judgment"))
            share = winner_share(record[key], models)
            yield _review(record, models, share, said=said, order=order)
        if not games:
            yield _annotation(record, models)
    elif "model" in record and type(record.get("score")) in (int, float):
        single = _review(record, [str(record["model"])], 0.0, said=record.get("judgment"))
        yield single | {"tuple": [record["score"]]}
    else:
        yield record


def winner_share(winner: object, models: Sequence[object]) -> float | None:
    """How much of a win is the second model's: 1, 1/2 or 0; None of what names no winner."""
    if winner in models:
        return float(models.index(winner))
    return 0.5 if str(winner).startswith("tie") else _PLACES.get(str(winner))


def _annotation(record: Record, models: list[str]) -> Record:
    preference = record["preference"]
    good = type(preference) in (int, float) and (preference == 0 or 1 <= preference <= 2)
    share = (preference or 1.5) - 1 if good else None  # 0 was once a tie
    outputs = [record.get("output_1"), record.get("output_2")]
    lengths = [len(text) for text in outputs if isinstance(text, str)]
    return _review(record, models, share, order=[1, 2], preference=share, lengths=lengths)


def _review(
    record: Record, models: list[str], share: float | None, said: object = None, **metadata: object
) -> Record:
    judge = record.get("judge", record.get("annotator", ""))
    judge = " ".join(map(str, judge)) if isinstance(judge, list) else str(judge)
    question = record.get("question_id", sha256_text(str(record.get("instruction")))[:16])
    turn, order = record.get("turn", 1), metadata.get("order")
    slot = dumps({"of": [question, turn, models, judge, order]})
    review: Record = {
        "question_id": question,
        **{f"answer{side}_id": f"{name}, turn {turn}" for side, name in enumerate(models, start=1)},
        "category": record.get("category", record.get("dataset")),
        "content": str(said or ""),
        "tuple": None if share is None else [1 - share, share],
        "reviewer_id": judge,
        "metadata": {"models": models, "pair": models, "slot": slot, **metadata},
    }
    return review if share is not None else review | {"error": "names no winner"}
