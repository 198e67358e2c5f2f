"""Mutants of files with values in them: records, configs, weights; all from a given generator.

Changes keys and values of what was read, and writes it anew with the right lengths and check sums.
"""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import struct
import zipfile
from typing import Any

from fuzzing.mutants import EXTREMES, mutate
from fuzzing.seeds import packed

# ---- JSON


def _deep() -> Any:
    value: Any = 1
    for _ in range(400):
        value = [value]
    return value


_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**400, 1 << 63),
    *("", " ", "x" * 200_000, "\ud800", "a\0b", "\x1b[31m\r\n"),
    *([], {}, [[]], [None], {"a": {"b": []}}),
    *("../../etc/passwd", "/etc/passwd", "0.png", "data:,x", "data:image/png;base64,AAAA"),
    *("http://[::1", "http://127.0.0.1:99999/x", "http://127.0.0.1:1/x", "-"),
    *("<image>" * 50, ["0.png"] * 9, "file:///etc/passwd"),
)
_KEYS = (
    *("encoder", "error", "line", "metadata", "model_id", "embedding", "answer_id", "question_id"),
    *("id", "path", "modality", "text", "video", "thermal", "image", "conversations", "scores"),
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    found: list[tuple[Any, Any]] = []
    if not isinstance(value, (dict, list)):
        return found
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        found += [(value, key), *_places(item)]
    return found


def mutate_json(value: Any, r: random.Random, values: tuple[Any, ...] = _VALUES) -> Any:
    """A value with something replaced, missing, or added."""
    value = copy.deepcopy(value)
    for _ in range(r.choice((1, 1, 2, 4))):
        places = _places(value)
        if not places:
            return value
        container, key = r.choice(places)
        what = r.random()
        if what < 0.65:
            container[key] = copy.deepcopy(r.choice((*values, _deep())))
        elif what < 0.8:
            del container[key]
        elif isinstance(container, dict):
            container[r.choice(_KEYS)] = copy.deepcopy(r.choice(values))
    return value


def mutate_records(records: list[Any], r: random.Random) -> bytes:
    """A file of records, broken in its JSON, its lines, its bytes or its compression."""
    changed = mutate_json(records, r) if r.random() < 0.6 else copy.deepcopy(records)
    changed = changed if isinstance(changed, list) else [changed]
    if r.random() < 0.1:
        changed += changed[:2] * r.choice((1, 50))
    lines = [
        json.dumps(item, ensure_ascii=r.random() < 0.9).encode(errors="surrogatepass")
        for item in changed
    ]
    if r.random() < 0.1 and lines:  # a key twice
        lines[0] = lines[0].replace(b"{", b'{"question_id": null, "id": [], ', 1)
    text = b"[" + b",\n".join(lines) + b"]" if r.random() < 0.15 else b"\n".join(lines) + b"\n"
    dice = r.random()
    if dice < 0.3:
        at = r.randrange(len(text))
        text = r.choice(
            (
                text[:at],
                text[:at] + b"\xff\xfe" + text[at:],
                text[:at] + b"\0" + text[at:],
                text.replace(b"\n", b"\r\n"),
                b"\xef\xbb\xbf" + text,
                text.replace(b"\n", b"\n\n \n"),
                text[:at] + b"\n" + text[at:],
                text + b"{not json}\n" + lines[0] + b"\n",
                text + b"[" * 100_000,
                text + b'{"question_id": 1e999, "text": "x"}\n',
                text + b"{" + b"x" * 300_000 + b"}\n",
                text[:at] + r.randbytes(3) + text[at:],
                b"",
                b"\n",
                text.replace(b'"', b"'"),
            )
        )
    if dice > 0.85:
        text = text + b" " * r.choice((0, 0, 300 << 20)) if dice > 0.98 else text
        text = packed(text)[r.choice(("gz", "zst"))]
        text = text[: r.choice((len(text), len(text), len(text) * 2 // 3, 12))]
    return text


_CONFIG_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 7, 1.5, 1e308, float("nan"), 10**9, 10**30),
    *("x", "", [], {}, [[]], ["x"], "x" * 100_000, "\ud800", "../../../etc/passwd"),
    {
        "AutoConfig": "evil.Config",
        "AutoModelForCausalLM": "evil.Model",
        "AutoTokenizer": ["evil.Tok", None],
    },
    *("evil.Config", "llava", "bert", "torch.float7", "float8_e4m3fn", "LlamaForCausalLM"),
)
_CONFIG_KEYS = (
    *("auto_map", "model_type", "quantization_config", "rope_scaling", "torch_dtype"),
    *("hidden_size", "num_hidden_layers", "vocab_size", "architectures", "chat_template"),
    *("tokenizer_class", "repetition_penalty", "max_time", "transformers_weights"),
    "max_position_embeddings",
)
_TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% include '/etc/passwd' %}",
    "{{ messages[99].x.y }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{",
    "{{ raise_exception('no\nway') }}",
    "{{ 10**10**7 }}",
)


def mutate_config(data: bytes, name: str, r: random.Random) -> bytes:
    """A JSON file of a model folder with other values, or broken bytes."""
    if r.random() < 0.2:
        return mutate(data, data, r)
    value = json.loads(data)
    if "token" in name and r.random() < 0.3:
        value["chat_template"] = r.choice(_TEMPLATES)
    elif r.random() < 0.5:
        value[r.choice(_CONFIG_KEYS)] = r.choice(_CONFIG_VALUES)
    else:
        value = mutate_json(value, r, _CONFIG_VALUES)
    return json.dumps(value).encode()


# ---- weights


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("echo run > PWNED; echo run > ../PWNED",)


def _deep_pickle() -> bytes:
    return b"\x80\x02)" + b"\x85" * 2_000_000 + b"."


def mutate_weights(data: bytes, r: random.Random) -> bytes:
    """A weights file with another header, pickle, member or content."""
    dice = r.random()
    if data[:2] == b"PK" and dice < 0.7:
        return _zip_mutant(data, r)
    if data[8:9] == b"{" and dice < 0.7:
        return _safetensors_mutant(data, r)
    if dice > 0.9:
        return r.choice(
            (pickle.dumps(_Evil(), 2), _deep_pickle(), b"\x80\x02" + b"]" * 9 + b".", data[:40])
        )
    return mutate(data, data[len(data) // 2 :], r)


def _member(body: bytes, r: random.Random) -> bytes:
    if r.random() < 0.5:
        return mutate(body, body, r)
    return r.choice((pickle.dumps(_Evil(), 2), _deep_pickle(), b"", bytes(200 << 20)))


def _zip_mutant(data: bytes, r: random.Random) -> bytes:
    """The members written anew, so that their check sums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        target = r.choice([n for n in old.namelist() if r.random() < 0.2 or n.endswith("data.pkl")])
        for name in old.namelist():
            body = old.read(name)
            if name == target:
                body = _member(body, r)
            if name != target or r.random() < 0.95:
                squeeze = r.random() < 0.2 or len(body) > 1 << 24
                new.writestr(name, body, zipfile.ZIP_DEFLATED if squeeze else zipfile.ZIP_STORED)
    return out.getvalue()


_HEADER_VALUES: tuple[Any, ...] = (
    *(None, -1, 0, 1, "x", [], {}, [0, 1 << 62], [1 << 31, 1 << 31]),
    *("F32", "I64", "F64", "BF16", "F8_E4M3", "BOOL"),
    *([-1, 4], [0, 0], [0, 10**30], float("nan"), [[1]], [2.5, 1]),
)


def _safetensors_mutant(data: bytes, r: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if r.random() < 0.75:
        header = mutate_json(header, r, _HEADER_VALUES)
    else:
        body = body[: r.randrange(len(body))] if r.random() < 0.5 else body + bytes(64)
    text = json.dumps(header).encode()
    length = len(text) if r.random() < 0.9 else r.choice(EXTREMES) & ((1 << 63) - 1)
    return struct.pack("<Q", length) + text + body
