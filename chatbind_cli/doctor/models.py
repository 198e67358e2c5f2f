"""Whether models run: a small one with random weights writes a few tokens."""

from __future__ import annotations

from collections.abc import Iterator

from chatbind_cli.doctor.finding import OK, PROBLEM, Finding

_TOKENS = 4


def look_at_models() -> Iterator[Finding]:
    """A finding for a language model that writes."""
    try:
        yield Finding("model", "language model", OK, _write())
    except (ImportError, OSError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        yield Finding("model", "language model", PROBLEM, reason, "see the packages above")


def _write() -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    start = torch.ones(1, 2, dtype=torch.long)
    written = model.generate(start, max_new_tokens=_TOKENS, do_sample=False)
    return f"a small LLaMA wrote {written.shape[1] - start.shape[1]} tokens"
