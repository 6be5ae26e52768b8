# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""LoopMDM: a bidirectional transformer for masked diffusion that applies its early-middle layers several times.

Norm, rotary embedding, attention, MLP and layer follow Llama and Qwen, without the causal mask. [`LoopMDMModel`]
contains the loop. [`LoopMDMForMaskedLM`] adds the output head, the diffusion loss and `generate` (in
generation_utils.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .cache_utils import LayerMemory, LoopMDMCache
from .configuration_loopmdm import LoopMDMConfig, check_num_loops
from .generation_utils import LoopMDMGenerationConfig, LoopMDMGenerationMixin
from .loop_context import (
    LoopContext,
    check_inputs,
    check_positions_to_keep,
    check_shape,
    count_positions,
    document_starts,
    make_mask,
    narrow_mask,
    one_of,
    predictors,
    take_positions,
)
from .loop_policies import LoopPolicy, iterate_while_moving, resolve_policy
from .weight_files import CheckedPreTrainedModel


@dataclass
class LoopMDMModelOutput(BaseModelOutput):
    """
    Output of [`LoopMDMModel`]: `last_hidden_state`, after the final norm, and

    Args:
        loops (`torch.LongTensor` of shape `(batch_size,)`): Number of loops that changed each row.
        token_loops (the same, with an exit rule): Number of loops, summed over the real positions of each row.
        cache ([`LoopMDMCache`], with `use_cache=True` or if one was given): The keys and values.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, on request as in transformers):
            One per executed layer in order: head, mid of each loop, tail. Hidden states begin with the embeddings.
    """

    loops: torch.LongTensor | None = None
    token_loops: torch.LongTensor | None = None
    cache: LoopMDMCache | None = None


@dataclass
class LoopMDMMaskedLMOutput(MaskedLMOutput):
    """
    Output of [`LoopMDMForMaskedLM`]: all of [`LoopMDMModelOutput`] except `last_hidden_state`, and

    Args:
        loss (`torch.FloatTensor` of shape `()`, with `labels`): The masked diffusion loss in nats per label.
        logits (`torch.FloatTensor` of shape `(batch_size, num_positions, vocab_size)`):
            Row `i` predicts token `i`; the mask token has -inf. None in training with `labels`.
    """

    loops: torch.LongTensor | None = None
    token_loops: torch.LongTensor | None = None
    cache: LoopMDMCache | None = None


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


def make_norm(config: LoopMDMConfig) -> nn.Module:
    """Makes the norm over `hidden_size` given by `config.norm_type`."""
    norm = {"rmsnorm": LoopMDMRMSNorm, "layernorm": nn.LayerNorm}[config.norm_type]
    return norm(config.hidden_size, config.rms_norm_eps)


class LoopMDMRotaryEmbedding(nn.Module):
    """Cosines and sines for the given positions, each `(batch_size, sequence_length, head_dim)`."""

    inv_freq: torch.Tensor

    def __init__(self, config: LoopMDMConfig):
        super().__init__()
        self.config = config
        # Names that transformers' `_init_weights` expects.
        self.rope_type = config.rope_parameters["rope_type"]
        self.rope_init = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        inv_freq, self.attention_scaling = self.rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        kept = self.inv_freq
        super()._apply(fn, recurse)
        # `.to(torch.bfloat16)` would round them.
        if self.inv_freq.dtype != kept.dtype and self.inv_freq.is_meta == kept.is_meta:
            self.inv_freq = kept.to(self.inv_freq.device)
        return self

    @staticmethod
    def compute_default_rope_parameters(config: LoopMDMConfig, device=None, seq_len=None):
        """Inverse frequencies `theta ** (-2i / head_dim)` in float32, and the factor 1 on cosines and sines."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0  # rounds as in transformers

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor, lengths: torch.Tensor | None = None):
        """`lengths`, `(1 or batch_size,)`, of the rows, for "dynamic" and "longrope"; from the positions if None."""
        inv_freq = self.inv_freq.to(hidden_states.device, torch.float32)
        if self.rope_type in ("dynamic", "longrope"):
            # Frequencies depend on the length, and are computed per row so that rows do not affect one another.
            lengths = (position_ids.amax(-1) + 1 if lengths is None else lengths).tolist()
            rows = [self.rope_init(self.config, hidden_states.device, seq_len=n)[0] for n in lengths]
            inv_freq = torch.stack(rows).unsqueeze(1)
        # Angles always need float32: in bfloat16, position 257 equals position 256.
        angles = (position_ids[..., None].float() * inv_freq).repeat(1, 1, 2)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        dtype = hidden_states.dtype
        if self.config.rope_precision == "bfloat16":  # SMDM
            cos, sin = cos.bfloat16(), sin.bfloat16()
        elif self.config.rope_precision == "float32":  # LLaDA
            dtype = torch.promote_types(dtype, torch.float32)
        return cos.to(dtype), sin.to(dtype)


def apply_rotary_pos_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """
    Rotates `states`, `(batch, heads, length, head_dim)`, in the dtype of `cos` and `sin`. Feature i is paired with
    feature i + head_dim / 2, as in Llama.
    """
    rotated = states.to(cos.dtype)
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
    return rotated.to(states.dtype)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """Reference attention, the only one that returns attention weights. `attention_mask` is added to the scores."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    scores = scores.to(torch.promote_types(query.dtype, torch.float32))
    if attention_mask is not None:
        scores = scores + attention_mask  # in float16, the lowest number and a score can add up to -inf
    probabilities = scores.softmax(-1).to(query.dtype)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


class LoopMDMAttention(nn.Module):
    """Llama's attention without the causal mask, with optional biases and query/key norm."""

    def __init__(self, config: LoopMDMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)  # bias: Qwen2, Dream
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)  # bias: GPT-2
        # Qwen3, SDAR
        self.q_norm = LoopMDMRMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = LoopMDMRMSNorm(config.head_dim, config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_embeddings: tuple[torch.Tensor, ...] = (),
        memory: LayerMemory | None = None,
        queries: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`queries`, `(batch_size, num_queries)`, are the positions to compute; the mask covers these alone."""
        asking = hidden_states if queries is None else take_positions(hidden_states, queries)
        head_dim = self.config.head_dim
        query_shape = (*asking.shape[:-1], self.config.num_attention_heads, head_dim)
        key_shape = (*hidden_states.shape[:-1], self.config.num_key_value_heads, head_dim)
        # (batch, heads, length, head_dim); the norm is over head_dim
        query = self.q_norm(self.q_proj(asking).view(query_shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(key_shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(key_shape).transpose(1, 2)
        if position_embeddings:
            key = apply_rotary_pos_emb(key, *position_embeddings)
            if queries is not None:
                position_embeddings = tuple(take_positions(table, queries) for table in position_embeddings)
            query = apply_rotary_pos_emb(query, *position_embeddings)
        if memory is not None:
            key, value = memory.update(key, value, self.layer_idx)

        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        states, weights = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs
        )
        return self.o_proj(states.reshape(*asking.shape[:-1], query_shape[-2] * head_dim)), weights


class LoopMDMMLP(nn.Module):
    """Gated MLP (SwiGLU with the default activation) or plain MLP (GPT-2, MDLM)."""

    def __init__(self, config: LoopMDMConfig):
        super().__init__()
        self.config = config
        if config.use_gated_mlp:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self.config.use_gated_mlp:
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

    def forward(self, hidden_states: torch.Tensor, queries: torch.LongTensor | None = None, **kwargs) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(hidden_states), queries=queries, **kwargs)[0]
        hidden_states = attended + (hidden_states if queries is None else take_positions(hidden_states, queries))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class LoopMDMPreTrainedModel(CheckedPreTrainedModel):
    config_class = LoopMDMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LoopMDMLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Outputs are recorded at every call, so loops appear unrolled.
    _can_record_outputs = {"hidden_states": LoopMDMLayer, "attentions": LoopMDMAttention}


class LoopMDMModel(LoopMDMPreTrainedModel):
    """
    The looped transformer without the output head: head, mid `num_loops` times, tail, final norm. Probes, objectives
    and tests can call its parts:

    ```python
    >>> states, context = model.prelude(input_ids, attention_mask)  # embeddings and head
    >>> for states, _ in model.iterate(states, context, num_loops):  # mid, the state after every loop
    ...     last_hidden_state = model.readout(states, context)  # tail and final norm
    ```
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]  # from a checkpoint with the output head

    def __init__(self, config: LoopMDMConfig):
        super().__init__(config)
        config.validate()  # `from_pretrained(..., loop_end=9)` changes an existing configuration
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type == "learned":  # GPT-2
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = LoopMDMRotaryEmbedding(config)
        self.layers = nn.ModuleList(LoopMDMLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        # Set by training, and not in the config, which would save them: the default number of loops of a training
        # pass, how many of the last loops pass full gradients (None: all), and whether activations are recomputed.
        self.num_train_loops: int | None = None
        self.gradient_loops: int | None = None
        self.checkpoint_loops = False
        self.post_init()

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
        visible_loops: int | None = None,
        loop_policy: LoopPolicy | None = None,
        positions_to_keep: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LoopMDMModelOutput:
        """
        See [`LoopMDMForMaskedLM`]. With `positions_to_keep`, `(batch_size, num_positions)`, the last layer computes
        only the states that predict these positions, and `last_hidden_state` has no others.
        """
        if num_loops is None:
            in_training = self.training and self.num_train_loops is not None
            num_loops = self.num_train_loops if in_training else self.config.num_loops
        check_num_loops(num_loops)
        check_kwargs(self, kwargs)
        trains = self.training and torch.is_grad_enabled()
        policy = resolve_policy(self.config, loop_tolerance, visible_loops, loop_policy, trains, inputs_embeds is None)
        given = one_of(input_ids, inputs_embeds)
        num_rows = given.shape[0] if given.ndim > 0 else 0  # `len` cannot be exported
        cache = self._prepare_cache(past_key_values, use_cache, num_rows, num_loops, policy, visible_loops)
        inputs = input_ids, attention_mask, position_ids, inputs_embeds, document_ids
        states, context = self.prelude(*inputs, cache, **kwargs)
        loops = torch.zeros(num_rows, dtype=torch.long, device=states.device)
        token_loops = None if policy is None else torch.zeros_like(loops)
        for looped, moving in self.iterate(states, context, num_loops, policy):
            states = looped
            loops += 1 if moving is None else moving.any(-1)
            if moving is not None:
                token_loops += moving.sum(-1)
        if positions_to_keep is not None and context.sources is not None:
            positions_to_keep = context.sources.expand(num_rows, -1).gather(1, positions_to_keep)
        states = self.readout(states, context, positions_to_keep)
        if use_cache:
            cache.store(context.cache.reach, input_ids, context.cache.places)
        return LoopMDMModelOutput(states, loops=loops, token_loops=token_loops, cache=cache)

    def prelude(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        document_ids: torch.LongTensor | None = None,
        past_key_values: LoopMDMCache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, LoopContext]:
        """Embeddings and head. Returns states, `(batch_size, sequence_length, hidden_size)`, and the context."""
        context = LoopContext(arguments=kwargs)
        masks = attention_mask, position_ids, document_ids
        check_inputs(self.config, input_ids, inputs_embeds, *masks, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = context.real = attention_mask.to(inputs_embeds.device) != 0
        everything = inputs_embeds.new_ones(1, inputs_embeds.shape[1], dtype=torch.bool)
        real = everything if context.real is None else context.real
        if document_ids is not None:
            document_ids = document_starts(document_ids.to(inputs_embeds.device)).cumsum(-1)
        if position_ids is None:
            position_ids = count_positions(real, document_ids)
            if past_key_values is not None:
                position_ids = position_ids + past_key_values.stored_lengths().to(position_ids.device)[:, None]
        context.sources = predictors(real, document_ids) if self.config.shift_logits else None
        if input_ids is not None:
            masked = context.masked = (input_ids == self.config.mask_token_id) & real
            if context.sources is not None:
                sources = torch.where(masked, context.sources, masked.shape[1])
                context.masked = nn.functional.pad(masked, (0, 1)).scatter(1, sources, True)[:, :-1]
        if past_key_values is not None:
            context.cache = past_key_values.open(position_ids, context.real)
        masks = attention_mask, position_ids, document_ids
        context.attention_mask = make_mask(self.config, inputs_embeds, *masks, context.cache)
        if self.config.position_embedding_type == "learned":
            inputs_embeds = inputs_embeds + self.embed_positions(position_ids)
        else:
            last = position_ids.masked_fill(~real, -1).amax(-1)
            lengths = last + 1 if context.cache is None else context.cache.reach
            context.position_embeddings = self.rotary_emb(inputs_embeds, position_ids, lengths)
        return self._run(0, self.config.loop_start, inputs_embeds, context), context

    def iterate(
        self, states: torch.Tensor, context: LoopContext, num_loops: int, policy: LoopPolicy | None = None
    ) -> Iterator[tuple[torch.Tensor, torch.BoolTensor | None]]:
        """
        Applies mid `num_loops` times. After every loop, yields the states, `(batch_size, sequence_length,
        hidden_size)`, and which positions changed, bool `(batch_size, sequence_length)` (None: all). With a `policy`,
        it ends once all rows or positions have stopped. In training, loops before the last `gradient_loops` pass the
        gradient through unchanged, as if they were the identity; otherwise head and embeddings would get none.
        """
        if policy is not None:
            yield from iterate_while_moving(self, states, context, num_loops, policy)
            return
        step_size = 1.0 / num_loops if self.config.loop_update == "damped" else 1.0
        trains = self.training and torch.is_grad_enabled()
        skipped = 0
        if trains and self.gradient_loops is not None:
            skipped = max(num_loops - max(self.gradient_loops, 1), 0)
        first = states
        for index in range(num_loops):
            if 0 < index == skipped:
                # Adds exactly zero, so that the values do not change in any dtype.
                states = states + (first - first.detach())
            if index < skipped:
                with torch.no_grad():
                    states = self.loop(states, context, index, step_size)
            elif trains and self.checkpoint_loops:
                states = checkpoint(self.loop, states, context, index, step_size, use_reentrant=False)
            else:
                states = self.loop(states, context, index, step_size)
            yield states, None

    def loop(self, states: torch.Tensor, context: LoopContext, index: int = 0, step_size: float = 1.0) -> torch.Tensor:
        """`h <- h + step_size * (mid(h) - h)`. A cache needs `index`, the number of the loop from 0."""
        updated = self._run(self.config.loop_start, self.config.loop_end, states, context, index)
        return updated if step_size == 1.0 else torch.lerp(states, updated, step_size)

    def readout(
        self, states: torch.Tensor, context: LoopContext, positions: torch.LongTensor | None = None
    ) -> torch.Tensor:
        """Tail and final norm, for all positions or only the given ones, `(batch_size, num_positions)`."""
        start, stop = self.config.loop_end, self.config.num_hidden_layers
        if positions is None or positions.shape[1] == 0 or start == stop or not context.can_narrow:
            states = self._run(start, stop, states, context)
            return self.norm(states if positions is None else take_positions(states, positions))
        states = self._run(start, stop - 1, states, context)
        asked = replace(context, queries=positions, attention_mask=narrow_mask(context.attention_mask, positions))
        return self.norm(self._run(stop - 1, stop, states, asked))

    def _run(self, start: int, stop: int, states: torch.Tensor, context: LoopContext, loop: int = 0) -> torch.Tensor:
        """Applies the physical layers `start` to `stop - 1` in turn; `loop` is the number of the current loop."""
        for index in range(start, stop):
            states = self.layers[index](
                states,
                attention_mask=context.attention_mask,
                position_embeddings=context.position_embeddings,
                # Not `past_key_values`, which transformers takes away from checkpointed layers, even in `generate`
                memory=None if context.cache is None else context.cache.layer(index, loop, states),
                queries=context.queries,
                **context.arguments,
            )
            if context.cache is not None and states.requires_grad:
                states.register_hook(refuse_gradient)  # it would be wrong: stored keys and values are detached
        return states

    def _prepare_cache(self, cache, use_cache, batch_size, num_loops, policy, visible_loops) -> LoopMDMCache | None:
        """Returns the cache of a pass: the given one, or a new one with `use_cache=True`."""
        if cache is None and not use_cache:
            return None
        wrong = None
        if cache is not None and not isinstance(cache, LoopMDMCache):
            wrong = f"`past_key_values` is a {type(cache).__name__}; a looped model needs a `LoopMDMCache`."
        elif self.training and torch.is_grad_enabled():
            wrong = "A cache passes no gradients on; call `model.eval()`, or train without it."
        elif cache is None and self.config.attention_block_size is None:
            wrong = "`use_cache=True` needs block-causal attention; pass a `LoopMDMCache` if stale values will do."
        elif use_cache and policy is not None and not policy.per_position:
            wrong = "`use_cache=True` stores every loop, but rows that stop early have fewer; use one of the two."
        elif use_cache and cache is not None and cache.reach is not None:
            wrong = "`use_cache=True` is for all rows of a cache; a selection of rows stores nothing."
        if wrong is not None:
            raise ValueError(wrong)
        if cache is None:
            return LoopMDMCache(self.config, num_loops, batch_size, visible_loops=visible_loops)
        if cache.reach is None:  # `generate` has checked a cache that it selects rows from
            cache.check(self.config, batch_size, num_loops, visible_loops)
        return cache


def refuse_gradient(gradient: torch.Tensor) -> None:
    raise ValueError("A pass with a cache, or in which positions stop looping, has no gradients; leave these out.")


def check_kwargs(model: nn.Module, kwargs: dict[str, Any]) -> None:
    # Trainer and pipelines pass arguments of transformers that have no effect here. Other names are mistakes.
    known = {*TransformersKwargs.__annotations__} - {"is_causal"}
    unknown = sorted(key for key, value in kwargs.items() if key not in known and value is not None)
    if unknown:
        raise ValueError(f"{type(model).__name__} takes no argument `{'`, `'.join(unknown)}`.")
    attention = model.config._attn_implementation
    if kwargs.get("output_attentions") and attention != "eager":
        fix = 'call `model.set_attn_implementation("eager")`'
        raise ValueError(f"`output_attentions` needs eager attention, and the model runs {attention!r}; {fix}.")
    if kwargs.get("output_hidden_states") not in (None, True, False):
        raise ValueError(f"`output_hidden_states` is {kwargs['output_hidden_states']!r}; it must be True or False.")


class LoopMDMForMaskedLM(LoopMDMPreTrainedModel, LoopMDMGenerationMixin):
    """
    LoopMDM with its output head: `forward` returns logits and the diffusion loss, `generate` denoises [MASK]s.

    Arguments of `forward` (B is the batch size, L the sequence length; one of the first two is required):
        input_ids (`torch.LongTensor` of shape `(B, L)`): Tokens, `config.mask_token_id` at those to predict.
        inputs_embeds (`torch.FloatTensor` of shape `(B, L, hidden_size)`): Their embeddings.
        attention_mask (`torch.Tensor` of shape `(B, L)`):
            0 on padding, which may be anywhere; any other value marks a real token. A 4-D mask is used unchanged, and
            also overrides `config.attention_block_size`.
        position_ids (`torch.LongTensor` of shape `(1 or B, L)`):
            By default, real tokens are counted from 0, and padding is not counted.
        labels (`torch.LongTensor` of shape `(B, L)`): Clean tokens; -100 is ignored. The loss is
            `sum(loss_weights * cross_entropy) / number of labels`.
        loss_weights (`torch.FloatTensor` of shape `(B, L)`, defaults to ones):
            Weight of every label. With 0 on visible and L/k on masked tokens (k of L are masked), the loss is the
            NELBO in nats per token (`training.MaskedDiffusionCollator`). Positions of weight 0 skip the output head.
        document_ids (`torch.LongTensor` of shape `(B, L)`):
            For several documents packed into a row: each run of equal ids is one. Tokens attend only to those of their
            own document, and positions are counted within it.
        past_key_values ([`LoopMDMCache`]):
            Keys and values of earlier positions, which the pass attends to. `input_ids` and `attention_mask` then
            cover only the new positions, which follow the stored ones by default. Exact with block-causal attention.
        use_cache (`bool`): Store the keys and values of this pass in `past_key_values`, and return it.
        num_loops (`int`): Number of loops; by default `config.num_loops`, or the number drawn in training.
        loop_tolerance (`float`): Adaptive loops of rows, see [`RowTolerance`].
        visible_loops (`int`): Fewer loops for tokens that are not [MASK], see [`VisibleLoops`].
        loop_policy ([`LoopPolicy`]): An exit rule of your own.
        logits_to_keep (`int` or `torch.LongTensor`, defaults to 0):
            The positions to compute logits for: a number of last positions (0: all), the same positions for all rows,
            `(num_positions,)`, or positions for each row, `(B, num_positions)`. In the last case, the last layer
            computes no other positions.
        num_items_in_batch (`int` or `torch.Tensor`):
            Divisor of the loss instead of the number of labels. transformers' Trainer passes the number of labels in
            all micro-batches of an optimiser step.
    """

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
        visible_loops: int | None = None,
        loop_policy: LoopPolicy | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LoopMDMMaskedLMOutput:
        """See the class. Raises a ValueError for arguments that are invalid or do not fit together."""
        given = one_of(input_ids, inputs_embeds)
        if loss_weights is not None and labels is None:
            raise ValueError("`loss_weights` weigh the loss of `labels`, which are missing; give both or neither.")
        continues = isinstance(past_key_values, LoopMDMCache) and position_ids is None and past_key_values.length > 0
        if self.config.shift_logits and continues:
            fix = "Begin the input one position earlier and give `position_ids`"
            raise ValueError(f"The position that predicts the first token is not in a cache. {fix}.")
        check_positions_to_keep(logits_to_keep, given)
        # The only positions whose states are needed, if they were chosen for each row
        keep = logits_to_keep if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.ndim == 2 else None
        if labels is not None or kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            keep = None
        loops = num_loops, loop_tolerance, visible_loops, loop_policy
        if keep is not None or any(rule is not None for rule in loops[1:]):
            self._check_adapters("A pass that leaves out positions or rows")
        inputs = input_ids, attention_mask, position_ids, inputs_embeds, document_ids, past_key_values, use_cache
        outputs = dict(self.model(*inputs, *loops, positions_to_keep=keep, **{**kwargs, "return_dict": True}))
        states, loss, logits = outputs.pop("last_hidden_state"), None, None
        if keep is None:
            states = self.align(states, attention_mask, document_ids)
        if labels is not None:
            loss = self._masked_diffusion_loss(states, input_ids, labels, loss_weights, num_items_in_batch)
        if labels is None or not self.training:
            if isinstance(logits_to_keep, int):
                states = states[:, -logits_to_keep:]
            elif logits_to_keep.ndim == 1:
                states = states[:, logits_to_keep]
            elif keep is None:
                states = take_positions(states, logits_to_keep)
            logits = self.logits(states)
        return LoopMDMMaskedLMOutput(loss=loss, logits=logits, **outputs)

    def align(
        self,
        states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Reorders states `(batch_size, sequence_length, hidden_size)` so that row i predicts token i. With
        `config.shift_logits`, it is taken from the real position before, or from i at the start of a row or document.
        """
        if not self.config.shift_logits:
            return states
        if attention_mask is None or getattr(attention_mask, "ndim", 0) == 4:  # which says nothing of padding
            attention_mask = states.new_ones(states.shape[:2])
        check_shape("attention_mask", attention_mask, tuple(states.shape[:2]))
        check_shape("document_ids", document_ids, tuple(states.shape[:2]))
        return take_positions(states, predictors(attention_mask.to(states.device), document_ids))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """
        The output head: logits `(..., vocab_size)` of `states`, `(..., hidden_size)`. The mask token gets -inf, so it
        is never sampled and has no probability (MDLM's zero masking probabilities).
        """
        logits = self.lm_head(states)
        logits[..., self.config.mask_token_id] = float("-inf")
        return logits

    def _masked_diffusion_loss(self, states, input_ids, labels, loss_weights, num_items_in_batch) -> torch.Tensor:
        shape, config = tuple(states.shape[:2]), self.config
        check_shape("labels", labels, shape)
        check_shape("loss_weights", loss_weights, shape)
        if labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`labels` is {labels.dtype}; it must be int64 or int32.")
        labels = labels.to(states.device, torch.int64)
        labelled = labels != -100
        num_labels = labelled.sum() if num_items_in_batch is None else num_items_in_batch
        if num_labels == 0:
            raise ValueError("`labels` holds -100 only, so there is nothing to learn; leave such batches out.")
        if loss_weights is not None:
            loss_weights = loss_weights.to(states.device)
            labelled = labelled & (loss_weights != 0)
        targets = labels[labelled]
        wrong = targets[(targets < 0) | (targets >= config.vocab_size) | (targets == config.mask_token_id)]
        if len(wrong) > 0:
            raise ValueError(
                f"`labels` holds {int(wrong[0])}, which is the mask token or outside the vocabulary of "
                f"{config.vocab_size} tokens; give clean tokens, and -100 where there is nothing to learn."
            )
        # A causal model's collator masks nothing; BERT's may leave few labels visible by chance.
        unweighted = loss_weights is None and input_ids is not None and len(targets) >= 10
        if unweighted and torch.equal(input_ids[labelled.to(input_ids.device)].to(targets), targets):
            fix = f"put the mask token ({config.mask_token_id}) there (`training.MaskedDiffusionCollator`)"
            raise ValueError(f"`labels` are the tokens of `input_ids`, which a model only has to copy; {fix}.")
        logits = self.logits(states[labelled])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        if loss_weights is not None:
            losses = losses * loss_weights[labelled]
        return losses.sum() / (num_labels.to(losses.device) if isinstance(num_labels, torch.Tensor) else num_labels)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """As in transformers. Raises a ValueError if the mask token would be removed."""
        mask_token_id = self.config.mask_token_id
        if new_num_tokens is not None and new_num_tokens <= mask_token_id:
            raise ValueError(f"{new_num_tokens} tokens do not hold the mask token ({mask_token_id}); keep more.")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def flops(
        self, batch_size: int, sequence_length: int, num_loops: int | None = None, num_logits: float | None = None
    ) -> int:
        """
        FLOPs of the matrix products in one forward pass, including padding (a multiply-add counts as two, as in
        torch's `FlopCounterMode`). A training step takes three times as many, or four with gradient checkpointing.
        `num_loops` defaults to the config's. `num_logits`, by default all, of a row's positions reach the output head,
        on average. `config.pass_flops` counts passes with a cache, and over chosen positions.
        """
        num_loops = check_num_loops(self.config.num_loops if num_loops is None else num_loops)
        length, num_logits = sequence_length, sequence_length if num_logits is None else num_logits
        return round(batch_size * self.config.pass_flops(length, length, length, num_logits, length * num_loops))


__all__ = ["LoopMDMForMaskedLM", "LoopMDMModel", "LoopMDMPreTrainedModel"]
