# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Configuration of LoopMDM, a masked diffusion language model that applies a block of its layers several times."""

import difflib
import math
from dataclasses import fields
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
SIZES += " max_position_embeddings attention_block_size"
MAX_LOOPS = 10_000  # Far more than any useful model needs; more would seem to hang.
# Limits far above any real model. Larger sizes would overflow.
LARGEST, LARGEST_OF = 2**40, {"num_hidden_layers": 10_000, "num_attention_heads": 2**16, "head_dim": 2**16}
REMOVED_FIELDS = {
    "attention_dropout": "there is no dropout",
    "transformers_weights": "the weights are called model.safetensors",
    "rope_full_precision": '`rope_full_precision=True` is `rope_precision="float32"`',
    "rope_table_dtype": '`rope_table_dtype="bfloat16"` is `rope_precision="bfloat16"`',
}


def check_num_loops(num_loops: Any, name: str = "num_loops") -> int:
    """Returns `num_loops` if it is an integer from 1 to 10,000, raises ValueError otherwise."""
    if isinstance(num_loops, bool) or not isinstance(num_loops, int) or not 1 <= num_loops <= MAX_LOOPS:
        needed = f"an integer of at least 1 (1 is the plain, non-looped model) and at most {MAX_LOOPS}"
        raise ValueError(f"`{name}` is {num_loops!r}; it must be {needed}.")
    return num_loops


@strict
class LoopMDMConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LoopMDMForMaskedLM`]. The `num_hidden_layers` physical layers are split into
    `head = layers[:loop_start]`, `mid = layers[loop_start:loop_end]` and `tail = layers[loop_end:]`. One forward pass
    runs head once, mid `num_loops` times with the same weights, and tail once ("Looped Diffusion Language Models",
    arXiv 2605.26106). `num_loops=1` is the plain, non-looped transformer.

    A bad value raises huggingface_hub's `StrictDataclassError`, which names it and the fix.

    Args:
        vocab_size (`int`, defaults to 50258): Number of tokens, including special tokens and the mask token.
        hidden_size (`int`, defaults to 768): Width of the residual stream.
        intermediate_size (`int`, defaults to 2048): Width of the MLP.
        num_hidden_layers (`int`, defaults to 12): Number of physical layers: head, mid and tail, each counted once.
        num_attention_heads (`int`, defaults to 12): Number of query heads.
        num_key_value_heads (`int`, defaults to `num_attention_heads`): Number of key and value heads (grouped-query).
        head_dim (`int`, defaults to `hidden_size // num_attention_heads`): Width of one head.
        hidden_act (`str`, defaults to `"silu"`): Activation of the MLP, a name of transformers' `ACT2FN`.
        use_gated_mlp (`bool`, defaults to `True`): `down(act(gate(x)) * up(x))`; if False, GPT-2's `down(act(up(x)))`.
        max_position_embeddings (`int`, defaults to 1024):
            Maximum sequence length in tokens. It limits `generate` and learned positions, but not RoPE in `forward`.
        position_embedding_type (`"rope"` or `"learned"`, defaults to `"rope"`):
            Rotary embeddings in every layer, or a learned embedding per position, added to the token embedding.
        rope_parameters (`dict`, *optional*): As in Llama: `{"rope_type": "default", "rope_theta": 10000.0, ...}`.
        rope_precision (`"model"`, `"float32"` or `"bfloat16"`, defaults to `"model"`):
            How queries and keys are rotated: in the model's dtype (Llama, Qwen), always in float32 (LLaDA), or in the
            model's dtype with cosines and sines rounded to bfloat16 (SMDM).
        initializer_range (`float`, defaults to 0.02): Standard deviation of the initial weights.
        norm_type (`"rmsnorm"` or `"layernorm"`, defaults to `"rmsnorm"`): RMSNorm, or LayerNorm with weight and bias.
        rms_norm_eps (`float`, defaults to 1e-6): Epsilon of every norm, LayerNorm included.
        attention_bias (`bool`, defaults to `False`): Whether the query, key and value projections have a bias (Qwen2).
        attention_output_bias (`bool`, defaults to `False`): Whether attention's output projection has a bias (GPT-2).
        mlp_bias, lm_head_bias (`bool`, default to `False`): Whether the MLP and the output head have biases.
        use_qk_norm (`bool`, defaults to `False`): RMSNorm over `head_dim` on queries and keys, before RoPE (Qwen3).
        tie_word_embeddings (`bool`, defaults to `True`): Whether the output head shares the input embedding's weight.
        attention_block_size (`int`, *optional*):
            Block-causal attention (BD3LM, SDAR): the sequence is split into blocks of this size from position 0, and
            each position attends to its own and earlier blocks. By default, attention covers the whole sequence.
        shift_logits (`bool`, defaults to `False`):
            The hidden state of position i - 1 predicts token i, as in converted autoregressive models (Dream).
            The model realigns its logits, so row i always predicts token i.
        loop_start, loop_end (`int`, default to 1 and 3): mid is `layers[loop_start:loop_end]`.
        num_loops (`int`, defaults to 6): Default number of loops at inference.
        max_train_loops (`int`, defaults to 12):
            S_max: training draws the number of loops from Uniform{1..S_max}. Inference may use more.
        loop_update (`"replace"` or `"damped"`, defaults to `"replace"`):
            `"replace"`: `h <- mid(h)`, for models trained with loops. `"damped"`: `h <- h + (mid(h) - h) / num_loops`,
            which can loop layers that were trained without loops (arXiv 2605.23872).
        use_cache (`bool`, defaults to `True`): Without effect, since every Trainer sets it to `False` for good.
        mask_token_id (`int`): Id of [MASK]. Required; no other special token may share it.
        pad_token_id, bos_token_id (`int`, *optional*), eos_token_id (`int` or `list[int]`, *optional*): Other tokens.
    """

    model_type = "loopmdm"
    keys_to_ignore_at_inference = ["loops", "token_loops"]
    # `mask_token_id` is required. Without this, transformers 5.18 builds an empty config on saving, to find defaults.
    has_no_defaults_at_init = True

    vocab_size: int = 50258
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    use_gated_mlp: bool = True
    max_position_embeddings: int = 1024
    position_embedding_type: Literal["rope", "learned"] = "rope"
    rope_parameters: dict | None = None
    rope_precision: Literal["model", "float32", "bfloat16"] = "model"
    initializer_range: float = 0.02
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    lm_head_bias: bool = False
    use_qk_norm: bool = False
    tie_word_embeddings: bool = True
    attention_block_size: int | None = None
    shift_logits: bool = False
    loop_start: int = 1
    loop_end: int = 3
    num_loops: int = 6
    max_train_loops: int = 12
    loop_update: Literal["replace", "damped"] = "replace"
    use_cache: bool = True
    mask_token_id: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        for name, fix in REMOVED_FIELDS.items():
            if kwargs.get(name):
                raise ValueError(f"`{name}` is not a field of LoopMDMConfig: {fix}.")
        own = [field.name for field in fields(self)]
        # Unknown fields are kept, since other libraries add some. A misspelt field would have no effect.
        for name in kwargs:
            close = difflib.get_close_matches(name, own, n=1, cutoff=0.75)
            if close and not name.endswith("_token_id"):
                raise ValueError(f"`{name}` is not a field of LoopMDMConfig; did you mean `{close[0]}`?")
        dtype = getattr(torch, self.dtype.removeprefix("torch."), None) if isinstance(self.dtype, str) else self.dtype
        if self.dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"`dtype` is {self.dtype!r}; it must be a floating point type, such as bfloat16.")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads == 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
        # Every saved folder names its own code, however the model was made.
        model_classes = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM")
        code = dict.fromkeys(model_classes, "modeling_loopmdm.LoopMDMForMaskedLM")
        kwargs.setdefault("auto_map", {"AutoConfig": "configuration_loopmdm.LoopMDMConfig", **code})
        super().__post_init__(**kwargs)
        if self.position_embedding_type == "learned":
            self.rope_parameters = None  # the base class fills in a default

    @property
    def num_mid_layers(self) -> int:
        """Number of physical layers in mid, the looped block."""
        return self.loop_end - self.loop_start

    def num_executed_layers(self, num_loops: int) -> int:
        """Number of layers executed in a pass: `num_hidden_layers + (num_loops - 1) * num_mid_layers`."""
        return self.num_hidden_layers + (num_loops - 1) * self.num_mid_layers

    def pass_flops(self, num_queries: Any, num_keys: Any, num_last: Any, num_logits: Any, token_loops: Any) -> Any:
        """
        FLOPs of the matrix products in one forward pass over one row (a multiply-add counts as two). `num_queries`
        positions attend to `num_keys`. The last layer computes `num_last` of them and the output head `num_logits`.
        `token_loops` is the number of loops summed over positions. All arguments may be numbers or tensors.
        """
        query_size = self.num_attention_heads * self.head_dim
        key_value_size = self.num_key_value_heads * self.head_dim
        mlp_size = (3 if self.use_gated_mlp else 2) * self.intermediate_size
        keys_and_values = self.hidden_size * 2 * key_value_size
        rest = self.hidden_size * (2 * query_size + mlp_size) + 2 * query_size * num_keys
        once = self.num_hidden_layers - self.num_mid_layers
        layers = (keys_and_values + rest) * (num_queries * once + token_loops * self.num_mid_layers)
        if self.loop_end < self.num_hidden_layers:  # without a tail, the last layer is in mid and computes all
            layers = layers - rest * (num_queries - num_last)
        return 2 * (layers + num_logits * self.hidden_size * self.vocab_size)

    def validate_architecture(self):
        """Checks values and how they fit together; called by `@strict`."""
        if self.head_dim is None and self.num_attention_heads > 0:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) is not a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}); change one of them, or give `head_dim`."
            )
        for name in SIZES.split():
            value, most = getattr(self, name), LARGEST_OF.get(name, LARGEST)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"`{name}` is {value}; it must be at least 1, and at most {most}.")
        for name in ("num_loops", "max_train_loops"):
            check_num_loops(getattr(self, name), name)
        if not 0 < self.rms_norm_eps < math.inf:
            raise ValueError(f"`rms_norm_eps` is {self.rms_norm_eps}; it must be above 0, and finite.")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"`initializer_range` is {self.initializer_range}; it must be at least 0, and finite.")
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) is not a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads}); choose a divisor."
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"`hidden_act` is {self.hidden_act!r}; choose one of transformers' ACT2FN.")
        if self.position_embedding_type == "rope":
            self._validate_rope()
        if not 0 <= self.loop_start < self.loop_end <= self.num_hidden_layers:
            raise ValueError(
                f"mid is layers[{self.loop_start}:{self.loop_end}] of {self.num_hidden_layers} layers; it needs "
                "0 <= loop_start < loop_end <= num_hidden_layers."
            )
        self._validate_tokens()

    def _validate_rope(self):
        if self.head_dim % 2 != 0:
            raise ValueError(f"`head_dim` is {self.head_dim}; rotary embeddings need an even one.")
        rope_type, known = self.rope_parameters.get("rope_type"), ["default", *ROPE_INIT_FUNCTIONS]
        if rope_type not in known:
            raise ValueError(f"`rope_type` is {rope_type!r}; it must be one of {', '.join(sorted(known))}.")
        if rope_type in ("dynamic", "longrope") and self.attention_block_size is not None:
            # A later block would use other frequencies than the stored keys of earlier blocks.
            raise ValueError(
                f"`rope_type` is {rope_type!r}, whose frequencies depend on the length; block-causal attention "
                "(`attention_block_size`) needs some that do not, e.g. yarn."
            )
        if self.rope_parameters.get("partial_rotary_factor", 1) != 1:
            raise ValueError("`partial_rotary_factor` is not supported; all of `head_dim` is rotated.")
        try:  # the values that each kind of RoPE computes from its parameters
            values = [1.0 * self.rope_parameters["rope_theta"]]
            if rope_type != "default":
                with torch.device("cpu"):  # models are made on the meta device
                    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](self)
                values += [*frequencies.tolist(), float(scaling)]
        except Exception as error:
            reason = f"which does not work ({type(error).__name__}: {error})"
            raise ValueError(f"`rope_parameters` is {self.rope_parameters}, {reason}.") from error
        if not all(0 < value < math.inf for value in values):
            reason = "its frequencies must be above 0, and finite"
            raise ValueError(f"`rope_parameters` is {self.rope_parameters}; {reason}.")

    def _validate_tokens(self):
        if self.mask_token_id is None:
            raise ValueError(
                "`mask_token_id` is missing; a masked diffusion model needs the id of its [MASK] token, "
                "e.g. `mask_token_id=tokenizer.mask_token_id`."
            )
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"`mask_token_id` is {self.mask_token_id}, outside the vocabulary of {self.vocab_size} tokens; "
                "raise `vocab_size` (and resize the embeddings) or name another token."
            )
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        others = [("pad_token_id", self.pad_token_id), ("bos_token_id", self.bos_token_id)]
        for name, token in [*others, *(("eos_token_id", end) for end in ends)]:
            if token == self.mask_token_id:
                raise ValueError(f"`mask_token_id` and `{name}` are both {token}; give [MASK] a token of its own.")
            if token is not None and not 0 <= token < self.vocab_size:
                raise ValueError(f"`{name}` is {token}, outside the vocabulary of {self.vocab_size} tokens.")


__all__ = ["LoopMDMConfig", "check_num_loops"]
