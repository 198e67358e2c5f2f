"""The ChatBind model: a language model that reads soft tokens between its word tokens.

Media arrive as embeddings of the encoder, one vector a medium, in the order of their placeholders.
Importing this module makes the `chatbind` model type known to the Auto classes of transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from chatbind_cli.errors import RecordError
from chatbind_cli.media.medium import Medium
from chatbind_cli.model.config import ChatBindConfig, encoder_of, end_ids
from chatbind_cli.model.label_loss import LossWay, loss_at_labels, loss_way, shared_loss
from chatbind_cli.model.packed_attention import packed_rows
from chatbind_cli.model.pretrained import blank_model
from chatbind_cli.model.projector import Projector


def word_embeddings(model: PreTrainedModel) -> torch.nn.Embedding:
    """The input embeddings of a language model (or of a ChatBind model: its language model's)."""
    return cast(torch.nn.Embedding, model.get_input_embeddings())


def rotates_by_length(config: PreTrainedConfig) -> bool:
    """Whether positions of a language model's rows depend on how long the longest of them is."""
    parameters = str(getattr(config, "rope_parameters", None))
    return "dynamic" in parameters or "longrope" in parameters


def media_inputs(
    media: Sequence[Medium], device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """What `forward` takes of media that were embedded; nothing for no media."""
    rows = [medium.embedding for medium in media if medium.embedding is not None]
    if not rows:
        return {}
    weights = torch.tensor([medium.weight for medium in media], device=device)
    return {"media_embeddings": torch.stack(rows).to(device), "media_weights": weights}


class ChatBindForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A causal language model with a projector before it.

    Args:
        config: the model's configuration.
        language_model: the language model, if it is loaded already; made from the configuration,
            with fresh weights, unless given.
    """

    config: ChatBindConfig
    config_class = ChatBindConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, config: ChatBindConfig, language_model: PreTrainedModel | None = None
    ) -> None:
        super().__init__(config)
        if language_model is None:
            language_model = blank_model(cast(PreTrainedConfig, config.text_config))
        self.language_model = language_model
        self.projector = Projector(
            encoder_of(config).widths,
            word_embeddings(language_model).embedding_dim,
            kind=config.projector_type,
            tokens=config.tokens_per_embedding,
            layout=config.projector_layout,
        )
        parameters = inspect.signature(language_model.forward).parameters
        self._forwarded = frozenset(parameters)
        self.accepts_loss_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.loss_way: LossWay | None = None  # found when it is first needed
        self.post_init()
        ends = getattr(language_model.generation_config, "eos_token_id", None)
        self.generation_config = config.generation(end_ids(ends))

    def get_input_embeddings(self) -> torch.nn.Module:
        """The language model's word embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Replaces the language model's word embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> torch.nn.Module | None:
        """The language model's output layer."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: torch.nn.Module) -> None:
        """Replaces the language model's output layer."""
        self.language_model.set_output_embeddings(value)

    def soft_tokens(
        self, media_embeddings: torch.Tensor, media_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings as the language model reads them.

        Args:
            media_embeddings: [media, embedding_dim], any floating-point type, as the encoder gives
                them (not normalised).
            media_weights: [media], how much each counts; 1 unless given. Applied after
                normalisation, which would undo it.

        Returns:
            [media, tokens_per_embedding, width of a word embedding].
        """
        vectors = media_embeddings.float()
        if self.config.normalize_embeddings:
            vectors = functional.normalize(vectors, dim=-1)
        return self.projector(vectors, None if media_weights is None else media_weights.float())

    def prompt_embeddings(
        self,
        input_ids: torch.Tensor,
        media_embeddings: torch.Tensor | None = None,
        media_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the language model reads for `input_ids` and media, [batch, length, width].

        In the type of the projector; see `forward` for the arguments.

        Raises:
            RecordError: the number of placeholders and of media differ.
        """
        words = word_embeddings(self)(input_ids).to(self.projector.dtype)
        return self._embed(words, input_ids, media_embeddings, media_weights)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        media_embeddings: torch.Tensor | None = None,
        media_weights: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        media_positions: torch.Tensor | None = None,
        label_positions: torch.Tensor | None = None,
        step_share: float | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Reads word tokens and soft tokens, and predicts the next ones.

        Args:
            input_ids: [batch, length]; each medium is a run of `<im_patch>`.
            attention_mask: [batch, length], 0 at padding.
            position_ids: [batch, length].
            past_key_values: keys and values of earlier positions.
            inputs_embeds: [batch, length, width], in place of `input_ids`; then soft tokens are in.
            media_embeddings: [media, embedding_dim], in the order of the placeholders, row by row.
            media_weights: [media], see `soft_tokens`.
            labels: [batch, length], -100 where nothing is to be learned; shifted inside.
            use_cache: whether to return keys and values; unless said, not with `labels`.
            logits_to_keep: how many of the last positions need logits; 0 for all.
            num_items_in_batch: divides the loss, in place of the number of its tokens; 0 is as 1.
            media_positions: int64 [placeholders], in the flattened `input_ids`; spares a search.
            label_positions: int64 [n], where labels are predicted; then the loss alone is returned.
            step_share: what this pass is of its step, for what a language model adds to its loss.
            **kwargs: passed on as far as the language model takes them, see also `packed_rows`.

        Raises:
            RecordError: the number of placeholders and of media differ.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("forward needs input_ids or inputs_embeds")
            media = (media_embeddings, media_weights, media_positions)
            cached = past_key_values is not None and past_key_values.get_seq_length() > 0
            generated = cached and media_embeddings is None and labels is None
            words = word_embeddings(self)(input_ids)
            inputs_embeds = words if generated else self._embed(words, input_ids, *media)
        optional = {
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": False if use_cache is None and labels is not None else use_cache,
            "logits_to_keep": logits_to_keep,
        }
        kwargs.update((k, v) for k, v in optional.items() if k in self._forwarded)
        if not self.accepts_loss_kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k in self._forwarded}
        inputs = kwargs | {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        with packed_rows(self.language_model, inputs):
            return self._predict(labels, label_positions, num_items_in_batch, step_share, inputs)

    def _predict(
        self,
        labels: torch.Tensor | None,
        positions: torch.Tensor | None,
        num_items: int | torch.Tensor | None,
        step_share: float | None,
        inputs: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        """What the language model says to these inputs; see `forward`."""
        items = None if num_items is None else torch.as_tensor(num_items).clamp(min=1)
        if labels is not None and positions is not None:
            inputs.pop("logits_to_keep", None)
            way = self.find_loss_way()
            return loss_at_labels(
                self.language_model, way, positions, labels, items, step_share, **inputs
            )
        if items is not None and self.accepts_loss_kwargs:
            inputs["num_items_in_batch"] = items
        output = self.language_model(labels=labels, **inputs)
        if labels is not None:
            output.loss = shared_loss(self.language_model, output, step_share)
        return output

    def find_loss_way(self) -> LossWay:
        """How the loss at labels alone is computed; the first call tries the language model."""
        if self.loss_way is None:
            self.loss_way = loss_way(self.language_model, word_embeddings(self).weight.shape[1])
        return self.loss_way

    def _embed(
        self,
        words: torch.Tensor,
        input_ids: torch.Tensor,
        media_embeddings: torch.Tensor | None,
        media_weights: torch.Tensor | None,
        media_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Word embeddings [batch, length, width], with soft tokens in place of `<im_patch>`."""
        if media_positions is None:
            media_positions = self._soft_positions(input_ids).flatten().nonzero().squeeze(1)
        found = len(media_positions)
        media = 0 if media_embeddings is None else len(media_embeddings)
        tokens = self.config.tokens_per_embedding
        if found != media * tokens:
            each = f" of {tokens} tokens each" if tokens > 1 else ""
            raise RecordError(
                f"the prompts have {found} <im_patch> token(s), but there are {media} media{each}",
                hint="every medium needs its own placeholder",
            )
        if media_embeddings is None or media == 0:
            return words + self._untouched() if self.training else words
        soft = self.soft_tokens(media_embeddings.to(words.device), media_weights)
        flat = words.flatten(0, 1)
        placed = flat.index_copy(0, media_positions, soft.flatten(0, 1).to(words))
        return placed.view_as(words)

    def _soft_positions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Where soft tokens stand: bool, of the shape of `input_ids`."""
        patch = self.config.im_patch_id
        return torch.eq(input_ids, -1 if patch is None else patch)

    def _untouched(self) -> torch.Tensor:
        """Zero, but with the projector in its graph.

        A batch of text only gives the projector no gradient; distributed training waits for one.
        """
        return sum(
            (p.sum() * 0.0 for p in self.projector.parameters()), torch.zeros(()).to(self.device)
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Media are read with the prompt; later steps see them through the cache."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            inputs["media_embeddings"] = None
            inputs["media_weights"] = None
        return inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Repeats each row `expand_size` times (beams, several answers), its media as a group."""
        media = {k: model_kwargs.pop(k, None) for k in ("media_embeddings", "media_weights")}
        if expand_size > 1 and input_ids is not None and media["media_embeddings"] is not None:
            per_row = self._soft_positions(input_ids).sum(dim=1)
            counts = (per_row // self.config.tokens_per_embedding).tolist()
            for name, value in media.items():
                if value is not None:
                    groups = value.split(counts)
                    media[name] = torch.cat([g for g in groups for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        return input_ids, {**model_kwargs, **media}

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """Fresh weights for what a checkpoint lacks; the language model looks after its own."""
        if isinstance(module, Projector):
            std = getattr(self.config.text_config, "initializer_range", None) or 0.02
            module.reset_parameters(std)


AutoModelForCausalLM.register(ChatBindConfig, ChatBindForConditionalGeneration, exist_ok=True)
