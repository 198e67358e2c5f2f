"""What trains in each stage, and that nothing else moves."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from chatbind_cli.model.chatbind import ChatBindForConditionalGeneration
from chatbind_cli.model.config import ChatBindConfig
from chatbind_cli.training.stages import RowEmbedding, fold_rows, select_trainable

START, PATCH, END = 30, 31, 32


def tiny(tied: bool = False, use_start_end: bool = True) -> ChatBindForConditionalGeneration:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=33,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )
    config = ChatBindConfig(
        text_config=base.config,
        embedding_dim=4,
        im_patch_id=PATCH,
        im_start_id=START,
        im_end_id=END,
        use_start_end=use_start_end,
    )
    return ChatBindForConditionalGeneration(config, base)


def batch(media: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, 5, START, PATCH, END, 7, 8, 2]])
    if not media:
        ids = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 2]])
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    return {**made, "media_embeddings": torch.randn(media, 4)} if media else made


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_pretrain_trains_the_projector_and_two_rows() -> None:
    model = tiny()
    report = select_trainable(model, "pretrain")
    assert trained(model) == {
        "projector.layers.0.weight",
        "projector.layers.0.bias",
        "language_model.model.embed_tokens.rows",
    }
    assert "the projector and the embeddings of <im_start>, <im_end>: 112 of" in report


def test_without_start_and_end_tokens_only_the_projector_trains() -> None:
    model = tiny(use_start_end=False)
    select_trainable(model, "pretrain")
    assert all(name.startswith("projector.") for name in trained(model))


def test_finetune_trains_everything_unless_the_language_model_is_frozen() -> None:
    model = tiny()
    select_trainable(model, "finetune")
    assert trained(model) == {name for name, _ in model.named_parameters()}
    frozen = tiny()
    select_trainable(frozen, "finetune", freeze_backbone=True)
    assert not any("layers.0.self_attn" in name for name in trained(frozen))


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_of_pretrain_moves_two_rows_and_the_projector_only(tied: bool) -> None:
    model = tiny(tied)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    select_trainable(model, "pretrain")
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    model(**batch()).loss.backward()
    optimizer.step()
    fold_rows(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    words = "language_model.model.embed_tokens.weight"
    assert moved == {"projector.layers.0.weight", "projector.layers.0.bias", words}
    rows = (after[words] != before[words]).any(dim=1).nonzero().flatten().tolist()
    assert rows == [START, END]


def test_wrapped_embeddings_give_what_the_plain_ones_give() -> None:
    base = nn.Embedding(10, 4)
    ids = torch.randint(0, 10, (3, 7))
    wrapped = RowEmbedding(base, [2, 9])
    assert torch.equal(wrapped(ids), base(ids))
    with torch.no_grad():
        wrapped.rows += 1
    expected = base(ids) + ((ids == 2) | (ids == 9)).unsqueeze(-1)
    assert torch.allclose(wrapped(ids), expected)
    assert torch.equal(wrapped.folded()(ids), wrapped(ids))


def test_embeddings_that_scale_what_they_look_up_scale_the_rows_too() -> None:
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * self.embed_scale

    base = Scaled(10, 4)
    ids = torch.arange(10)
    assert torch.equal(RowEmbedding(base, [2, 9])(ids), base(ids))


def test_a_batch_of_text_only_gives_every_trained_parameter_a_gradient() -> None:
    # else another process would wait for it for ever
    model = tiny()
    select_trainable(model, "pretrain")
    model.train()
    # gradients need a path: with the language model frozen it leads through the projector
    model(**batch(media=0)).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_rows_train_in_float32_where_the_frozen_weights_are_smaller() -> None:
    model = tiny().to(torch.bfloat16)
    select_trainable(model, "pretrain")
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert model.language_model.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(model(**batch()).loss)
