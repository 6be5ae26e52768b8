# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""LoopMDM: a bidirectional transformer for masked diffusion whose early-middle layers are applied several times.

The file reads top to bottom: norm, rotary embedding, attention, MLP and layer are those of the Llama / Qwen family
without the causal mask; [`LoopMDMModel`] is where the loop is; [`LoopMDMForMaskedLM`] adds the head, the diffusion
loss and `generate` (in generation_utils.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_utils import HostCopy, LayerMemory, LoopMDMCache, OpenCache, remember
from .configuration_loopmdm import LoopMDMConfig, check_num_loops
from .generation_utils import LoopMDMGenerationConfig, LoopMDMGenerationMixin


@dataclass
class LoopMDMModelOutput(BaseModelOutput):
    """
    Output of [`LoopMDMModel`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Output of tail, after the final norm.
        loops (`torch.LongTensor` of shape `(batch_size,)`):
            Applications of mid that changed each row; below `num_loops` only with `loop_tolerance`.
        token_loops (`torch.LongTensor` of shape `(batch_size,)`, with `loop_exit="token"`):
            Applications of mid to single positions, over the row's real ones.
        past_key_values ([`LoopMDMCache`], with `use_cache=True` or where one was given):
            Keys and values of every executed layer.
        hidden_states (`tuple(torch.FloatTensor)`, with `output_hidden_states=True`):
            Embeddings, then the output of every executed layer in order: head, mid of each loop, tail. The last one
            is `last_hidden_state`. Each of shape `(batch_size, sequence_length, hidden_size)`.
        attentions (`tuple(torch.FloatTensor)`, with `output_attentions=True` and eager attention):
            Attention probabilities of every executed layer in the same order, each of shape
            `(batch_size, num_attention_heads, sequence_length, sequence_length)`.
    """

    loops: torch.LongTensor | None = None
    token_loops: torch.LongTensor | None = None
    past_key_values: LoopMDMCache | None = None


@dataclass
class LoopMDMMaskedLMOutput(MaskedLMOutput):
    """
    Output of [`LoopMDMForMaskedLM`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, with `labels`):
            The masked diffusion loss in nats per label.
        logits (`torch.FloatTensor` of shape `(batch_size, num_positions, vocab_size)`):
            Raw scores; row `i` predicts token `i`. `None` in training with `labels`, where nobody reads them.
        loops, token_loops, past_key_values, hidden_states, attentions:
            As in [`LoopMDMModelOutput`].
    """

    loops: torch.LongTensor | None = None
    token_loops: torch.LongTensor | None = None
    past_key_values: LoopMDMCache | None = None


class LoopMDMRMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.promote_types(dtype, torch.float32))
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon)).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


def make_norm(config: LoopMDMConfig) -> nn.Module:
    """The norm over `hidden_size` that `config.norm_type` names."""
    norm = {"rmsnorm": LoopMDMRMSNorm, "layernorm": nn.LayerNorm}[config.norm_type]
    return norm(config.hidden_size, config.rms_norm_eps)


class LoopMDMRotaryEmbedding(nn.Module):
    """Tables of cosines and sines for the given positions, each `(batch_size, sequence_length, head_dim)`."""

    inv_freq: torch.Tensor

    def __init__(self, config: LoopMDMConfig):
        super().__init__()
        self.config = config
        # Names that transformers' `dynamic_rope_update` and `_init_weights` expect.
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: LoopMDMConfig, device=None, seq_len=None):
        """Inverse frequencies `theta ** (-2i / head_dim)` in float32, and the factor 1 on cosines and sines."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0  # rounds as in transformers

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.LongTensor):
        # Angles need float32 whatever the model's dtype: in bfloat16 position 257 equals position 256.
        angles = position_ids[..., None].float() * self.inv_freq.to(hidden_states.device, torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        if self.config.rope_table_dtype != "float32":
            table_dtype = getattr(torch, self.config.rope_table_dtype)
            cos, sin = cos.to(table_dtype), sin.to(table_dtype)
        dtype = hidden_states.dtype
        if self.config.rope_full_precision:
            dtype = torch.promote_types(dtype, torch.float32)
        return cos.to(dtype), sin.to(dtype)


def apply_rotary_pos_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotates `(batch, heads, length, head_dim)` in the dtype of the tables; feature i pairs with feature
    i + head_dim / 2, as in Llama.
    """
    rotated = states.to(cos.dtype)
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
    return rotated.to(states.dtype)


def document_starts(document_ids: torch.LongTensor) -> torch.BoolTensor:
    """Where a row's documents begin, `(batch_size, sequence_length)`, given the id of every token's document."""
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.cat((torch.ones_like(changes[:, :1]), changes), dim=1)


def take_positions(values: torch.Tensor, positions: torch.LongTensor) -> torch.Tensor:
    """Of `values`, `(1 or batch_size, length, size)`, the rows at `positions`, `(batch_size, num_positions)`."""
    return values.expand(positions.shape[0], -1, -1).take_along_dim(positions[..., None], dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference attention, the only one that returns its probabilities. `attention_mask` is added to the scores."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


class LoopMDMAttention(nn.Module):
    """Bidirectional multi-head attention with optional grouped keys and values, biases and query/key norm."""

    def __init__(self, config: LoopMDMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        query_size, key_value_size = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        if config.use_qk_norm:
            self.q_norm = LoopMDMRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = LoopMDMRMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        memory: LayerMemory | None = None,
        queries: torch.Tensor | None = None,
        query_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        `memory` are the layer's stored keys and values. `queries`, `(batch_size, num_queries)`, are the positions
        whose
        output is wanted, by default all; `query_embeddings` are their rotary tables, `attention_mask` is theirs too.
        """
        batch_and_length = hidden_states.shape[:-1]
        asking = hidden_states if queries is None else take_positions(hidden_states, queries)
        batch_and_queries = asking.shape[:-1]
        # (batch, length, heads, head_dim); the norm is over head_dim
        query = self.q_proj(asking).view(*batch_and_queries, self.config.num_attention_heads, self.head_dim)
        key = self.k_proj(hidden_states).view(*batch_and_length, -1, self.head_dim)
        value = self.v_proj(hidden_states).view(*batch_and_length, -1, self.head_dim)
        if self.config.use_qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        # (batch, heads, length, head_dim)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if position_embeddings is not None:
            query = apply_rotary_pos_emb(query, *(position_embeddings if queries is None else query_embeddings))
            key = apply_rotary_pos_emb(key, *position_embeddings)
        if memory is not None:
            key, value = remember(memory, key, value)
        if batch_and_queries[1] == 0:  # only what a cache stores was wanted
            return hidden_states.new_zeros(*batch_and_queries, hidden_states.shape[-1]), None

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, probabilities = attention(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*batch_and_queries, self.o_proj.in_features)), probabilities


class LoopMDMMLP(nn.Module):
    """Gated MLP (SwiGLU with the default activation), or a plain one."""

    def __init__(self, config: LoopMDMConfig):
        super().__init__()
        self.is_gated = config.use_gated_mlp
        if self.is_gated:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.is_gated:
            return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class LoopMDMLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: LoopMDMConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LoopMDMAttention(config, layer_idx)
        self.mlp = LoopMDMMLP(config)
        self.input_layernorm = make_norm(config)
        self.post_attention_layernorm = make_norm(config)

    def forward(self, hidden_states: torch.Tensor, queries: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), queries=queries, **kwargs)[0]
        hidden_states = (hidden_states if queries is None else take_positions(hidden_states, queries)) + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LoopMDMPreTrainedModel(PreTrainedModel):
    config_class = LoopMDMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LoopMDMLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        # Layers are recorded call by call, so the loops appear unrolled. Since transformers 5.23 the hidden states can
        # be picked by index, and negative ones count from the executed layers.
        "hidden_states": OutputRecorder(
            LoopMDMLayer,
            **(
                {"num_hidden_layers_key": "num_effective_layers"}
                if "num_hidden_layers_key" in OutputRecorder.__dataclass_fields__
                else {}
            ),
        ),
        "attentions": LoopMDMAttention,
    }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """
        As in transformers, with two differences: a checkpoint that lacks tensors, or has some that the model has not,
        raises a ValueError, where transformers warns and goes on with random weights; and only safetensors files are
        read, never pickles, unless `use_safetensors=False` asks for them.
        """
        kwargs.setdefault("use_safetensors", True)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        wrong = {kind: sorted(info[f"{kind}_keys"]) for kind in ("missing", "unexpected") if info[f"{kind}_keys"]}
        if wrong:
            found = "; ".join(
                f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
                for kind, names in wrong.items()
            )
            raise ValueError(
                f"The tensors of {pretrained_model_name_or_path} are not those of a {cls.__name__} with this "
                f"configuration: {found}. Is config.json the one that the weights were saved with?"
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args, **kwargs):
        """As in transformers. FSDP puts a class of its own in place of a model's, which is not the one to save."""
        cls = type(self)
        own = next(base for base in cls.__mro__ if base.__module__ == __name__)
        if cls is own or not cls.__module__.startswith("torch."):
            return super().save_pretrained(*args, **kwargs)
        names = cls.__module__, cls.__name__
        cls.__module__, cls.__name__ = own.__module__, own.__name__
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            cls.__module__, cls.__name__ = names


class RelativeChangeExit:
    """
    Exit rule of adaptive loops: a row has settled when `||h_new - h|| / ||h||` falls under `tolerance`.

    An exit rule is called after every loop with the states before and after it, `(batch_size, sequence_length,
    hidden_size)`, and the padding mask `(batch_size, sequence_length)` or None; it returns the settled rows,
    `(batch_size,)` bool, or with `per_token` the settled positions, `(batch_size, sequence_length)` bool.
    """

    def __init__(self, tolerance: float, per_token: bool = False):
        self.tolerance, self.per_token = tolerance, per_token

    def __call__(self, before: torch.Tensor, after: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        dtype = torch.promote_types(before.dtype, torch.float32)
        before, after = before.to(dtype), after.to(dtype)
        change = after - before
        if self.per_token:
            return change.norm(dim=-1) < self.tolerance * before.norm(dim=-1)
        if real is not None:
            change, before = change * real.unsqueeze(-1), before * real.unsqueeze(-1)
        return change.flatten(1).norm(dim=1) < self.tolerance * before.flatten(1).norm(dim=1)


def _one_of(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give either `input_ids` or `inputs_embeds`, and not both.")
    return input_ids if inputs_embeds is None else inputs_embeds


def _can_narrow(mask: Any) -> bool:
    """Whether rows and queries can be picked from an attention mask, as from those of sdpa and eager attention."""
    return mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 4)


def _narrow_mask(mask: torch.Tensor | None, queries: torch.LongTensor) -> torch.Tensor | None:
    """The mask, `(1 or batch_size, heads, length, keys)`, of the `queries`, `(batch_size, num_queries)`."""
    if mask is None or mask.shape[2] == 1:
        return mask
    return mask.expand(queries.shape[0], -1, -1, -1).take_along_dim(queries[:, None, :, None], dim=2)


def _narrow_context(
    context: dict[str, Any],
    rows: torch.LongTensor | None = None,
    queries: torch.LongTensor | None = None,
    real: torch.BoolTensor | None = None,
) -> dict[str, Any]:
    """
    The context of [`LoopMDMModel.prelude`] for some `rows`, `(M,)`, of the pass, and of their positions for `queries`,
    `(M, P)`, False in `real` where they are filler.
    """
    narrowed = dict(context)
    mask, tables = context["attention_mask"], context.get("position_embeddings")
    if rows is not None and mask is not None and mask.shape[0] > 1:
        mask = mask[rows]
    if rows is not None and tables is not None and tables[0].shape[0] > 1:
        tables = tuple(table[rows] for table in tables)
    if queries is not None:
        mask = _narrow_mask(mask, queries)
        tables = None if tables is None else tuple(take_positions(table, queries) for table in tables)
    narrowed["attention_mask"] = mask
    if tables is not None:
        narrowed["position_embeddings"] = tables
    if "cache" in context:
        narrowed["cache"] = context["cache"].narrow(rows, queries, real)
    return narrowed


class LoopMDMModel(LoopMDMPreTrainedModel):
    """
    The looped transformer without a head: head, `num_loops` times mid, tail, final norm.

    The three parts are methods of their own, for probes, exit rules and tests:

    ```python
    >>> hidden_states, context = model.prelude(input_ids, attention_mask)  # embeddings and head
    >>> for _ in range(num_loops):
    ...     hidden_states = model.loop(hidden_states, context)  # mid once
    >>> last_hidden_state = model.readout(hidden_states, context)  # tail and final norm
    ```
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]  # in a checkpoint of the whole model

    def __init__(self, config: LoopMDMConfig):
        super().__init__(config)
        config.validate()  # `from_pretrained(..., loop_end=9)` changes the configuration after it was made
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        if config.position_embedding_type == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = LoopMDMRotaryEmbedding(config)
        self.layers = nn.ModuleList(LoopMDMLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        # What training sets, kept off the config, where it would be saved with the model: the loops of a training pass
        # that names none, anew for every optimiser step; how many of the last loops pass gradients back in full (None:
        # all); and whether each loop's activations are computed again in the backward pass.
        self.num_train_loops: int | None = None
        self.gradient_loops: int | None = None
        self.checkpoint_loops = False
        self.post_init()

    def prelude(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        past_key_values: LoopMDMCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        Embeddings and head. Returns the hidden states, `(batch_size, sequence_length, hidden_size)`, and the context
        (mask, rotary tables, cache, attention arguments) that [`~LoopMDMModel.loop`] and [`~LoopMDMModel.readout`]
        take.
        """
        _one_of(input_ids, inputs_embeds)
        if inputs_embeds is None:
            self._check_input_ids(input_ids)
            inputs_embeds = self.embed_tokens(input_ids)
        self._check_shapes(inputs_embeds, attention_mask, document_ids, past_key_values, position_ids is not None)
        batch_size, length = inputs_embeds.shape[:2]
        if position_ids is None:
            position_ids = torch.arange(length, device=inputs_embeds.device).unsqueeze(0)
            if attention_mask is not None and attention_mask.ndim == 2:
                # Padding takes no position, so that it changes nothing wherever it stands.
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            if document_ids is not None:
                position_ids = position_ids - (position_ids * document_starts(document_ids)).cummax(-1).values
            if past_key_values is not None:
                position_ids = position_ids + past_key_values.row_lengths(position_ids.device)[:, None]

        context = dict(kwargs)
        if past_key_values is None:
            context["attention_mask"] = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                and_mask_function=self._visible(position_ids.expand(batch_size, length), document_ids),
            )
        else:
            context["cache"] = past_key_values.open(position_ids, attention_mask)
            context["attention_mask"] = self._mask_with_cache(inputs_embeds, position_ids, context["cache"])
        if self.config.position_embedding_type == "learned":
            hidden_states = inputs_embeds + self.embed_positions(position_ids)
        else:
            hidden_states = inputs_embeds
            context["position_embeddings"] = self.rotary_emb(hidden_states, position_ids)
        return self._run(0, self.config.loop_start, hidden_states, context), context

    def loop(
        self, hidden_states: torch.Tensor, context: dict[str, Any], step_size: float = 1.0, index: int = 0
    ) -> torch.Tensor:
        """
        Applies mid once: `h <- h + step_size * (mid(h) - h)`, which is `mid(h)` itself at `step_size=1`. `index`, the
        loop's number from 0, matters where there is a cache.
        """
        updated = self._run(self.config.loop_start, self.config.loop_end, hidden_states, context, index)
        return updated if step_size == 1.0 else torch.lerp(hidden_states, updated, step_size)

    def readout(
        self, hidden_states: torch.Tensor, context: dict[str, Any], positions: torch.LongTensor | None = None
    ) -> torch.Tensor:
        """
        Applies tail and the final norm. With `positions`, `(batch_size, num_positions)`, only their states are
        returned, and the last layer asks and computes for them alone.
        """
        start, stop = self.config.loop_end, self.config.num_hidden_layers
        mask = context["attention_mask"]
        if positions is None or start == stop or not _can_narrow(mask):
            hidden_states = self._run(start, stop, hidden_states, context)
            return self.norm(hidden_states if positions is None else take_positions(hidden_states, positions))
        hidden_states = self._run(start, stop - 1, hidden_states, context)
        narrowed = {**context, "queries": positions, "attention_mask": _narrow_mask(mask, positions)}
        if "position_embeddings" in context:
            narrowed["query_embeddings"] = tuple(
                take_positions(table, positions) for table in context["position_embeddings"]
            )
        return self.norm(self._run(stop - 1, stop, hidden_states, narrowed))

    def _visible(self, position_ids: torch.LongTensor, document_ids: torch.LongTensor | None) -> Callable | None:
        """
        A mask function, True where a query may see a key: in its own and earlier blocks with
        `config.attention_block_size`, and in its own document where several are packed into a row. None: everywhere.
        """
        block_size = self.config.attention_block_size
        if block_size is None and document_ids is None:
            return None
        if "flash" in self.config._attn_implementation:
            what = "see packed documents apart" if block_size is None else f"be block-causal (blocks of {block_size})"
            raise ValueError(
                f"{self.config._attn_implementation!r} attention cannot {what}; call "
                '`model.set_attn_implementation("sdpa")`, or "flex_attention".'
            )
        blocks = None if block_size is None else position_ids // block_size

        def is_visible(batch, head, query, key):
            visible = True if document_ids is None else document_ids[batch, query] == document_ids[batch, key]
            return visible if blocks is None else (blocks[batch, query] >= blocks[batch, key]) & visible

        return is_visible

    def _mask_with_cache(
        self, inputs_embeds: torch.Tensor, position_ids: torch.LongTensor, cache: OpenCache
    ) -> torch.Tensor | None:
        """The mask of queries at `position_ids`, `(1 or batch_size, length)`, over the places of the cache."""
        batch_size, length = inputs_embeds.shape[:2]
        places = torch.arange(cache.stop, device=position_ids.device)
        stored = places < cache.lengths[:, None].expand(batch_size, 1)
        block_size = self.config.attention_block_size
        # On an accelerator looking at the values would make every pass wait for it; there a mask costs less.
        looks = position_ids.device.type == "cpu"
        if looks and bool(stored.all()):
            stored = None
        is_visible = None
        if block_size is not None and not (
            looks and int(position_ids.min()) // block_size == (cache.stop - 1) // block_size
        ):
            blocks = (position_ids // block_size).expand(batch_size, length)

            def is_visible(batch, head, query, key):
                return blocks[batch, query] >= key // block_size

        if "flash" in self.config._attn_implementation and (stored is not None or is_visible is not None):
            raise ValueError(
                f"{self.config._attn_implementation!r} attention cannot mask stored keys, which rows of different "
                'lengths and blocks need; call `model.set_attn_implementation("sdpa")`.'
            )
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=stored,
            # Says how many keys there are.
            encoder_hidden_states=inputs_embeds.new_empty(1, 1, 1).expand(batch_size, cache.stop, 1),
            and_mask_function=is_visible,
        )

    def _check_shapes(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        document_ids: torch.LongTensor | None,
        past_key_values: LoopMDMCache | None,
        has_positions: bool,
    ):
        batch_size, length = inputs_embeds.shape[:2]
        stored = 0 if past_key_values is None or has_positions else past_key_values.length
        # Rotary positions go on, some kinds by design ("dynamic"); learned ones do not.
        if self.config.position_embedding_type == "learned" and stored + length > self.config.max_position_embeddings:
            raise ValueError(
                f"The input has {stored + length} positions, more than `max_position_embeddings` "
                f"({self.config.max_position_embeddings}), and positions are learned; shorten it."
            )
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape != (batch_size, length):
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}; the input needs {(batch_size, length)}"
                + ("." if past_key_values is None else ", its own positions without those of the cache.")
            )
        if document_ids is not None and document_ids.shape != (batch_size, length):
            raise ValueError(
                f"`document_ids` has shape {tuple(document_ids.shape)}; the input needs {(batch_size, length)}."
            )
        if past_key_values is not None and document_ids is not None:
            raise ValueError("`document_ids` and `past_key_values` do not go together; packed rows are not cached.")
        if past_key_values is not None and attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"`attention_mask` has {attention_mask.ndim} dimensions; `past_key_values` needs (batch_size, length)."
            )

    def _prepare_cache(
        self,
        past_key_values: LoopMDMCache | None,
        use_cache: bool | None,
        batch_size: int,
        num_loops: int,
        loop_tolerance: float | None,
        visible_loops: int | None,
    ) -> LoopMDMCache | None:
        if past_key_values is None and not use_cache:
            return None
        if self.training:
            raise ValueError(
                "A cache passes no gradients on; call `model.eval()`, or train without `past_key_values`."
            )
        if use_cache and loop_tolerance is not None and not getattr(past_key_values, "share_loops", False):
            raise ValueError(
                "`use_cache=True` stores the keys and values of every loop, and `loop_tolerance` leaves some out; use "
                "one of the two."
            )
        if past_key_values is None:
            if self.config.attention_block_size is None:
                raise ValueError(
                    "`use_cache=True` needs block-causal attention: in this model every position sees all others, and "
                    "its keys and values change with them. Pass a `LoopMDMCache` where stale ones will do, as "
                    '`generate(cache_implementation="dual")` does.'
                )
            past_key_values = LoopMDMCache(self.config, num_loops, batch_size, 0)
        if not isinstance(past_key_values, LoopMDMCache):
            raise ValueError(
                f"`past_key_values` is a {type(past_key_values).__name__}; a looped model needs a `LoopMDMCache`, "
                "which has a place for every loop."
            )
        past_key_values.check(self, batch_size, num_loops, visible_loops)
        if use_cache and past_key_values.rows is not None:
            raise ValueError("`use_cache=True` is for all rows of a cache; a selection of rows stores nothing.")
        return past_key_values

    def _run(
        self, start: int, stop: int, hidden_states: torch.Tensor, context: dict[str, Any], loop: int = 0
    ) -> torch.Tensor:
        """Applies the physical layers `start` to `stop` in turn; `loop` is the number of the loop that they run in."""
        cache = context.get("cache")
        arguments = {name: value for name, value in context.items() if name != "cache"}
        for index in range(start, stop):
            if cache is not None:
                arguments["memory"] = cache.layer(index, loop, hidden_states)
            layer = self.layers[index]
            # A compiled layer would need more graphs for the one pass of few queries: its shapes change in every step.
            run = layer._call_impl if "queries" in arguments else layer
            hidden_states = run(hidden_states, **arguments)
        return hidden_states

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        past_key_values: LoopMDMCache | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        loop_tolerance: float | None = None,
        loop_exit: str = "row",
        visible_loops: int | None = None,
        positions_to_keep: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LoopMDMModelOutput:
        """
        See [`LoopMDMForMaskedLM.forward`]. `positions_to_keep`, `(batch_size, num_positions)`, are those that
        `last_hidden_state` is wanted of; the last layer computes no others.
        """
        num_loops = self._resolve_num_loops(num_loops)
        self._check_loop_tolerance(loop_tolerance, loop_exit)
        self._check_visible_loops(visible_loops, input_ids, loop_tolerance, loop_exit)
        self._check_kwargs(kwargs, num_loops, loop_tolerance)
        batch_size = _one_of(input_ids, inputs_embeds).shape[0]
        past_key_values = self._prepare_cache(
            past_key_values, use_cache, batch_size, num_loops, loop_tolerance, visible_loops
        )

        hidden_states, context = self.prelude(
            input_ids, attention_mask, position_ids, inputs_embeds, document_ids, past_key_values, **kwargs
        )
        token_loops = None
        real = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        exit_rule = None
        if loop_tolerance is not None:
            exit_rule = RelativeChangeExit(loop_tolerance, per_token=loop_exit == "token")
        if visible_loops is not None or loop_exit == "token":
            keeps_looping = None if visible_loops is None else self._keeps_looping(input_ids, real)
            hidden_states, loops, token_loops = self._loop_positions(
                hidden_states, context, real, num_loops, keeps_looping, visible_loops or num_loops, exit_rule
            )
        elif exit_rule is not None:
            hidden_states, loops = self._loop_until_settled(hidden_states, context, real, num_loops, exit_rule)
        else:
            hidden_states = self._loop_times(hidden_states, context, num_loops)
            loops = torch.full((hidden_states.shape[0],), num_loops, device=hidden_states.device)
        hidden_states = self.readout(hidden_states, context, positions_to_keep)
        if past_key_values is not None and use_cache:
            cache = context["cache"]
            past_key_values.store(cache.lengths, cache.stop, input_ids, cache.places)
        return LoopMDMModelOutput(
            last_hidden_state=hidden_states, loops=loops, token_loops=token_loops, past_key_values=past_key_values
        )

    def _loop_times(self, hidden_states: torch.Tensor, context: dict[str, Any], num_loops: int) -> torch.Tensor:
        """
        Applies mid `num_loops` times. In training, loops before the last `gradient_loops` pass the gradient on
        unchanged, as if they were the identity: head and embeddings would get none without it.
        """
        step_size = 1.0 / num_loops if self.config.loop_update == "damped" else 1.0
        trains = self.training and torch.is_grad_enabled()
        if trains and self.gradient_loops is not None and self.gradient_loops < num_loops:
            skipped = num_loops - self.gradient_loops
            with torch.no_grad():
                looped = hidden_states
                for _ in range(skipped):
                    looped = self.loop(looped, context, step_size)
            # Adds exactly zero, so that the values are those of the loops in any dtype.
            hidden_states = looped + (hidden_states - hidden_states.detach())
            num_loops = self.gradient_loops
        for index in range(num_loops):
            if trains and self.checkpoint_loops:
                hidden_states = checkpoint(self.loop, hidden_states, context, step_size, use_reentrant=False)
            else:
                hidden_states = self.loop(hidden_states, context, step_size, index)
        return hidden_states

    def _loop_until_settled(
        self,
        hidden_states: torch.Tensor,
        context: dict[str, Any],
        real: torch.Tensor | None,
        num_loops: int,
        exit_rule: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.LongTensor]:
        """
        Loops each row until `exit_rule` finds it settled, at most `num_loops` times. A settled row keeps its state
        while others go on, so its result does not depend on them. Returns the states and the loops of every row.

        On the CPU a settled row leaves the batch at once. On an accelerator it stays, and that all have settled is
        read one loop late, so that the host never waits.
        """
        settled_states, rows = hidden_states, None  # `rows` still loop; None: all
        active = torch.ones(hidden_states.shape[0], dtype=torch.bool, device=hidden_states.device)
        loops = torch.zeros_like(active, dtype=torch.long)
        narrows = hidden_states.device.type == "cpu" and _can_narrow(context["attention_mask"])
        flag = None
        for index in range(num_loops):
            updated = self.loop(hidden_states, context, index=index)
            settled = exit_rule(hidden_states, updated, real)
            hidden_states = torch.where(active[:, None, None], updated, hidden_states)
            loops = loops + active if rows is None else loops.index_add(0, rows, active.long())
            active = active & ~settled
            if index + 1 == num_loops:
                break
            late, flag = flag, HostCopy(active)
            if hidden_states.device.type == "cpu":
                late = flag
            going = None if late is None else late.get()
            if going is not None and not going.any():
                break
            if narrows and not going.all():
                keep = going.nonzero().squeeze(-1)
                settled_states = self._put_rows(settled_states, rows, hidden_states)
                hidden_states, active = hidden_states[keep], active[keep]
                real = None if real is None else real[keep]
                context = _narrow_context(context, keep)
                rows = keep if rows is None else rows[keep]
        return self._put_rows(settled_states, rows, hidden_states), loops

    @staticmethod
    def _put_rows(states: torch.Tensor, rows: torch.Tensor | None, updated: torch.Tensor) -> torch.Tensor:
        return updated if rows is None else states.index_copy(0, rows, updated)

    def _loop_positions(
        self,
        hidden_states: torch.Tensor,
        context: dict[str, Any],
        real: torch.Tensor | None,
        num_loops: int,
        keeps_looping: torch.BoolTensor | None,
        visible_loops: int,
        exit_rule: RelativeChangeExit | None,
    ) -> tuple[torch.Tensor, torch.LongTensor, torch.LongTensor]:
        """
        Loops some positions more often than others: after `visible_loops` only those of `keeps_looping`, `(batch_size,
        sequence_length)`, go on, and each at most until `exit_rule` finds it settled. Those that stopped keep their
        state, and with it the keys and values of their last update, which the others go on attending to. Returns the
        states, the loops of every row, and the applications of mid to its single positions.
        """
        if not _can_narrow(context["attention_mask"]):
            raise ValueError(
                f"Loops that differ from position to position cannot be run by {self.config._attn_implementation!r} "
                'attention here; call `model.set_attn_implementation("sdpa")`.'
            )
        batch_size, length = hidden_states.shape[:2]
        if "cache" not in context:
            # The positions' own keys and values, for this pass alone. They are numbered by column.
            columns = torch.arange(length, device=hidden_states.device)
            memory = LoopMDMCache(self.config, 1, batch_size, length, share_loops=True)
            context = {**context, "cache": OpenCache(memory, columns, length, columns.new_full((batch_size,), length))}
        cache = context["cache"]
        active = torch.ones(batch_size, length, dtype=torch.bool, device=hidden_states.device)
        if real is not None:
            active = active & real.bool()
        counts = active.sum(-1)
        loops, token_loops = torch.zeros_like(counts), torch.zeros_like(counts)
        index, part = 0, None
        while index < num_loops:
            if index == visible_loops and keeps_looping is not None:
                active = active & keeps_looping
                counts = active.sum(-1)
            if index == 0 or (exit_rule is None and index < visible_loops):
                updated = self.loop(hidden_states, context, index=index)
                loops, token_loops = loops + 1, token_loops + counts
                if exit_rule is not None:
                    active = active & ~exit_rule(hidden_states, updated, real)
                    counts = active.sum(-1)
                hidden_states, index = updated, index + 1
                continue
            if part is None or exit_rule is not None:
                # The moving positions of the moving rows; a row with fewer than others is filled up. Without an exit
                # rule they stay the same, and the host waits for their number but once.
                width = int(counts.max())
                if width == 0:
                    break
                rows = counts.nonzero().squeeze(-1)
                rows = None if len(rows) == batch_size else rows
                moving = active if rows is None else active[rows]
                queries = moving.long().argsort(dim=-1, descending=True, stable=True)[:, :width]
                moving = moving.gather(1, queries)
                part = _narrow_context(context, rows, queries, moving)
                places = (torch.arange(batch_size, device=queries.device) if rows is None else rows)[:, None], queries
            cache.carry(index)
            loops, token_loops = loops + (counts > 0), token_loops + counts
            before = take_positions(hidden_states if rows is None else hidden_states[rows], queries)
            after = self.loop(before, part, index=index)
            hidden_states = hidden_states.index_put(places, torch.where(moving[..., None], after, before))
            if exit_rule is not None:
                active = active.index_put(places, moving & ~exit_rule(before, after, None))
                counts = active.sum(-1)
            index += 1
        for rest in range(index, num_loops):
            cache.carry(rest)  # for passes that look for them there
        return hidden_states, loops, token_loops

    def _resolve_num_loops(self, num_loops: int | None) -> int:
        if num_loops is None:
            in_training = self.training and self.num_train_loops is not None
            num_loops = self.num_train_loops if in_training else self.config.num_loops
        return check_num_loops(num_loops)

    def _check_loop_tolerance(self, loop_tolerance: float | None, loop_exit: str = "row"):
        if loop_exit not in ("row", "token"):
            raise ValueError(f'`loop_exit` is {loop_exit!r}; it must be "row" or "token".')
        if loop_tolerance is None:
            if loop_exit != "row":
                raise ValueError(f"`loop_exit` is {loop_exit!r} without effect; give a `loop_tolerance`.")
            return
        if loop_exit == "token" and self.training:
            raise ValueError('`loop_exit="token"` passes no gradients on; call `model.eval()`.')
        if isinstance(loop_tolerance, bool) or not isinstance(loop_tolerance, int | float) or not loop_tolerance >= 0:
            raise ValueError(
                f"`loop_tolerance` is {loop_tolerance!r}; it must be a number of at least 0, the relative change of "
                "the hidden state under which a row stops looping (e.g. 0.05)."
            )
        if self.config.loop_update == "damped":
            raise ValueError(
                '`loop_tolerance` needs `loop_update="replace"`: a damped model\'s steps depend on `num_loops`, so '
                "an earlier state is not the result of fewer loops. Choose `num_loops` instead."
            )

    def _check_visible_loops(
        self,
        visible_loops: int | None,
        input_ids: torch.LongTensor | None,
        loop_tolerance: float | None,
        loop_exit: str,
    ):
        if visible_loops is None:
            return
        check_num_loops(visible_loops, "visible_loops")
        if self.config.loop_update == "damped":
            raise ValueError(
                '`visible_loops` needs `loop_update="replace"`: after fewer of its steps a damped model\'s state is '
                "not the result of fewer loops."
            )
        if self.training:
            raise ValueError("`visible_loops` passes no gradients on; call `model.eval()`.")
        if input_ids is None:
            raise ValueError("`visible_loops` has to know which tokens are [MASK]; give `input_ids`.")
        if loop_tolerance is not None and loop_exit == "row":
            raise ValueError(
                '`visible_loops` goes with `loop_tolerance` of single positions; add `loop_exit="token"`.'
            )

    def _keeps_looping(self, input_ids: torch.LongTensor, real: torch.Tensor | None) -> torch.BoolTensor:
        """The [MASK]s, and with `config.shift_logits` what predicts them."""
        masked = input_ids == self.config.mask_token_id
        if real is not None:
            masked = masked & real.bool()
        if self.config.shift_logits:
            masked = masked | nn.functional.pad(masked[:, 1:], (0, 1))
        return masked

    def _check_kwargs(self, kwargs: dict[str, Any], num_loops: int, loop_tolerance: float | None):
        # Trainer and pipelines pass on arguments of transformers that have no effect here; others are typing errors.
        known = {*TransformersKwargs.__annotations__, "use_cache"} - {"is_causal"}
        unknown = sorted(key for key, value in kwargs.items() if key not in known and value is not None)
        if unknown:
            raise ValueError(f"{type(self).__name__} takes no argument `{'`, `'.join(unknown)}`.")
        if kwargs.get("output_attentions") and self.config._attn_implementation != "eager":
            raise ValueError(
                f"`output_attentions` needs eager attention, and the model runs "
                f'{self.config._attn_implementation!r}; call `model.set_attn_implementation("eager")`.'
            )
        indices = kwargs.get("output_hidden_states")
        indices = list(indices) if isinstance(indices, list | tuple) else [indices]
        if any(index is not None and index < 0 for index in indices) and (
            num_loops != self.config.num_loops or loop_tolerance is not None
        ):
            raise ValueError(
                f"`output_hidden_states` is {kwargs['output_hidden_states']}; negative indices are counted for "
                f"`config.num_loops` ({self.config.num_loops}) loops. Use positive ones or `True`."
            )

    def _check_input_ids(self, input_ids: torch.LongTensor):
        # On an accelerator looking at the values would make every forward pass wait for it.
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or input_ids.numel() == 0:
            return
        low, high = input_ids.aminmax()
        if low < 0 or high >= self.embed_tokens.num_embeddings:
            raise ValueError(
                f"`input_ids` holds {int(low if low < 0 else high)}, outside the vocabulary of "
                f"{self.embed_tokens.num_embeddings} tokens; is it the right tokenizer?"
            )


class LoopMDMForMaskedLM(LoopMDMPreTrainedModel, LoopMDMGenerationMixin):
    """LoopMDM with its output head: `forward` gives logits and the diffusion loss, `generate` denoises [MASK]s."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    generation_config_class = LoopMDMGenerationConfig

    def __init__(self, config: LoopMDMConfig):
        super().__init__(config)
        self.model = LoopMDMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        loss_weights: torch.FloatTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        past_key_values: LoopMDMCache | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        loop_tolerance: float | None = None,
        loop_exit: str = "row",
        visible_loops: int | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LoopMDMMaskedLMOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Tokens, those to predict replaced by `config.mask_token_id`.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 on real tokens, 0 on padding, which may stand anywhere. A 4-D mask is passed on as it is, in place of
                `config.attention_block_size` too.
            position_ids (`torch.LongTensor` of shape `(1 or batch_size, sequence_length)`, *optional*):
                By default real tokens are counted from 0 and padding takes no position.
            document_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Several documents packed into a row: tokens of different ids do not see each other, and positions are
                counted within each document, whose tokens stand together.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Token embeddings, in place of `input_ids`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Clean tokens; -100 where nothing is to be learned. With them `loss` is
                `sum(loss_weights * cross_entropy) / number of labels`, the mask token having probability zero.
            loss_weights (`torch.FloatTensor` of shape `(batch_size, sequence_length)`, defaults to ones):
                Weight of every label, e.g. 0 on visible and L/k on masked tokens, which makes the loss the NELBO in
                nats per token (`training.MaskedDiffusionCollator`). Positions of weight zero cost no head.
            num_loops (`int`, *optional*):
                Applications of mid; by default what training drew (in training mode), or `config.num_loops`.
            past_key_values ([`LoopMDMCache`], *optional*):
                Keys and values of earlier positions, which the pass attends to; `input_ids` and `attention_mask` are
                those of its own positions alone, by default those that follow. Exact with block-causal attention.
            use_cache (`bool`, *optional*):
                Keep the keys and values of this pass in `past_key_values`, which the output then holds.
            loop_tolerance (`float`, *optional*):
                Adaptive loops: a row stops looping when `||h_new - h|| / ||h||` over its real positions falls under
                this, after at most `num_loops`.
            loop_exit (`"row"` or `"token"`, defaults to `"row"`):
                With `"token"` the tolerance is that of single positions: those that have settled are no longer
                updated, while others loop on and attend to them as they are.
            visible_loops (`int`, *optional*):
                Tokens that are not [MASK] loop so many times at most, while the [MASK]s loop on and attend to them as
                they are (with `config.shift_logits` also the tokens before a [MASK], whose states predict it).
            logits_to_keep (`int` or `torch.LongTensor`, defaults to 0):
                Compute logits only of the last so many positions (0: all), of the given positions `(num_positions,)`,
                or of positions chosen for every row `(batch_size, num_positions)`. Chosen for every row, the last
                layer computes no others either.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*):
                Divisor of the loss in place of the number of labels; transformers' Trainer passes the number of labels
                in all micro-batches of an optimiser step.
        """
        inputs = _one_of(input_ids, inputs_embeds)
        shifts, before = self.config.shift_logits, None
        if shifts and past_key_values is not None and position_ids is None:
            before = past_key_values.state_before()
            if before is None and past_key_values.length > 0:
                raise ValueError(
                    "This model predicts a token from the position before it, and `past_key_values` does not hold the "
                    "state of its last position any more (it was cropped, or filled by `generate`). Begin the input "
                    "with that position again and give `position_ids`."
                )
        # Positions whose states alone are needed, where they were chosen for every row.
        keep = None
        records = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
        if labels is None and not records and isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2:
            keep = logits_to_keep
        if shifts and (use_cache or before is not None):
            keep = None
        elif shifts and keep is not None:
            sources = self._sources(inputs.shape[1], inputs.device, attention_mask, document_ids)
            keep = sources.expand(inputs.shape[0], -1).gather(1, keep)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            document_ids=document_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            num_loops=num_loops,
            loop_tolerance=loop_tolerance,
            loop_exit=loop_exit,
            visible_loops=visible_loops,
            positions_to_keep=keep,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if shifts and use_cache:
            outputs.past_key_values.keep_state(hidden_states, attention_mask)
        if keep is None:
            hidden_states = self.align(hidden_states, attention_mask, document_ids, before)
        loss = logits = None
        if labels is not None:
            loss = self._masked_diffusion_loss(hidden_states, labels, loss_weights, num_items_in_batch)
        if labels is None or not self.training:
            logits = self._head(hidden_states if keep is not None else self._keep(hidden_states, logits_to_keep))
        return LoopMDMMaskedLMOutput(
            loss=loss,
            logits=logits,
            loops=outputs.loops,
            token_loops=outputs.token_loops,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _head(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        The output head. On the CPU one product of few rows with all of a large vocabulary runs far below the machine's
        rate; in slices of the vocabulary it is a quarter faster, and equal to the last bit.
        """
        head, slice_size, shape = self.lm_head, 1024, hidden_states.shape[:-1]
        is_plain = type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks
        if (
            not is_plain
            or head.bias is not None
            or torch.is_grad_enabled()
            or hidden_states.device.type != "cpu"
            or hidden_states.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or not 1 < shape.numel() <= 160
            or head.out_features < 8 * slice_size
        ):
            return head(hidden_states)
        states = hidden_states.reshape(-1, head.in_features)
        logits = states.new_empty(len(states), head.out_features)
        for start in range(0, head.out_features, slice_size):
            part = head.weight[start : start + slice_size]
            torch.mm(states, part.t(), out=logits[:, start : start + slice_size])
        return logits.view(*shape, -1)

    def align(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        document_ids: torch.LongTensor | None = None,
        before: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Output states `(batch_size, sequence_length, hidden_size)` such that row i predicts token i. With
        `config.shift_logits` row i is the state of the real position before i; the first real position of a row, or of
        a packed document, keeps its own, or takes the one that came `before` it, `(batch_size, hidden_size)`.
        Otherwise nothing changes.
        """
        if not self.config.shift_logits:
            return hidden_states
        sources = self._sources(hidden_states.shape[1], hidden_states.device, attention_mask, document_ids)
        aligned = take_positions(hidden_states, sources.expand(hidden_states.shape[0], -1))
        if before is not None:
            columns = torch.arange(hidden_states.shape[1], device=hidden_states.device)
            aligned = torch.where((sources == columns)[..., None], before[:, None], aligned)
        return aligned

    @staticmethod
    def _sources(
        length: int,
        device: torch.device,
        attention_mask: torch.Tensor | None,
        document_ids: torch.LongTensor | None = None,
    ) -> torch.LongTensor:
        """With `config.shift_logits`, the columns whose states predict the tokens, `(1 or batch_size, length)`."""
        columns = torch.arange(length, device=device).unsqueeze(0)
        before = (columns - 1).clamp(min=0)
        if attention_mask is not None and attention_mask.ndim == 2:
            last_real = torch.where(attention_mask.to(device) != 0, columns, -1).cummax(-1).values
            before = torch.cat((torch.full_like(last_real[:, :1], -1), last_real[:, :-1]), dim=1)
            before = torch.where(before < 0, columns, before)
        if document_ids is not None:
            before = torch.where(document_starts(document_ids.to(device)), columns, before)
        return before

    @staticmethod
    def _keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        if isinstance(logits_to_keep, int):
            return hidden_states[:, -logits_to_keep:]
        if logits_to_keep.ndim == 1:
            return hidden_states[:, logits_to_keep]
        return take_positions(hidden_states, logits_to_keep)

    def _masked_diffusion_loss(
        self,
        hidden_states: torch.Tensor,
        labels: torch.LongTensor,
        loss_weights: torch.Tensor | None,
        num_items_in_batch: int | torch.Tensor | None,
    ) -> torch.Tensor:
        for name, tensor in (("labels", labels), ("loss_weights", loss_weights)):
            if tensor is not None and tensor.shape != hidden_states.shape[:2]:
                raise ValueError(
                    f"`{name}` has shape {tuple(tensor.shape)}; the input needs {tuple(hidden_states.shape[:2])}."
                )
        labels = labels.to(hidden_states.device)
        labelled = labels != -100
        if num_items_in_batch is None:
            num_items_in_batch = labelled.sum()
            if num_items_in_batch == 0:
                raise ValueError("`labels` holds -100 only, so there is nothing to learn; leave such batches out.")
        if loss_weights is not None:
            loss_weights = loss_weights.to(hidden_states.device)
            labelled = labelled & (loss_weights != 0)
        targets = labels[labelled]
        # On an accelerator looking at the values would make every step wait for it.
        if targets.device.type == "cpu" and targets.numel() > 0:
            low, high = (int(bound) for bound in targets.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"`labels` holds {low if low < 0 else high}, outside the vocabulary of {self.config.vocab_size} "
                    "tokens; give token ids, and -100 where there is nothing to learn."
                )
        if (targets == self.config.mask_token_id).any():
            raise ValueError(
                f"`labels` holds the mask token ({self.config.mask_token_id}), which is never produced; "
                "give the clean tokens, and -100 where there is none."
            )
        logits = self.lm_head(hidden_states[labelled])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        mask_token = torch.tensor([self.config.mask_token_id], device=logits.device)
        logits = logits.index_fill(-1, mask_token, float("-inf"))
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        if loss_weights is not None:
            losses = losses * loss_weights[labelled]
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(losses.device)
        return losses.sum() / num_items_in_batch

    def flops(
        self,
        batch_size: int,
        sequence_length: int,
        num_loops: int | None = None,
        num_logits: float | None = None,
        num_keys: int | None = None,
        last_layer: float | None = None,
    ) -> int:
        """
        Floating point operations of the matrix products in one forward pass (a multiply-add is two), the convention of
        torch's `FlopCounterMode`. A training step takes three times as many, four with gradient checkpointing.

        Args:
            batch_size (`int`): Number of rows.
            sequence_length (`int`): Positions per row, padding included.
            num_loops (`int`, defaults to `config.num_loops`): Applications of mid.
            num_logits (`float`, defaults to `sequence_length`): Mean number of positions per row that reach the head.
            num_keys (`int`, defaults to `sequence_length`): Positions attended to, those of a cache included.
            last_layer (`float`, defaults to `sequence_length`):
                Mean number of positions per row that the last layer computes; of the others only keys and values.
        """
        num_loops = check_num_loops(self.config.num_loops if num_loops is None else num_loops)
        return round(
            batch_size
            * self.pass_flops(
                sequence_length,
                sequence_length if num_keys is None else num_keys,
                sequence_length if last_layer is None else last_layer,
                sequence_length if num_logits is None else num_logits,
                sequence_length * num_loops,
            )
        )

    def pass_flops(self, num_queries, num_keys, last_layer, num_logits, token_loops):
        """
        The same for one row, of numbers or tensors: positions computed, positions attended to, those that the last
        layer computes in full, logits, and applications of mid to single positions.
        """
        config = self.config
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        mlp_size = (3 if config.use_gated_mlp else 2) * config.intermediate_size
        keys_and_values = config.hidden_size * 2 * key_value_size
        rest = config.hidden_size * (2 * query_size + mlp_size) + 2 * query_size * num_keys
        once = config.num_hidden_layers - config.num_mid_layers
        layers = (keys_and_values + rest) * (num_queries * once + token_loops * config.num_mid_layers)
        if config.loop_end < config.num_hidden_layers:
            layers = layers - rest * (num_queries - last_layer)
        return 2 * (layers + num_logits * config.hidden_size * self.lm_head.out_features)


__all__ = [
    "LoopMDMForMaskedLM",
    "LoopMDMMaskedLMOutput",
    "LoopMDMModel",
    "LoopMDMModelOutput",
    "LoopMDMPreTrainedModel",
]
