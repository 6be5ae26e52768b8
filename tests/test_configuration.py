# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tests of LoopMDMConfig: defaults, validation with messages that help, round trips through JSON."""

import json
import re

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import random_ids, tiny_config, tiny_model
from transformers import AutoConfig

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM

SIZES = ["vocab_size", "hidden_size", "intermediate_size", "head_dim", "max_position_embeddings", "num_hidden_layers"]
SIZES += ["num_attention_heads", "num_key_value_heads", "attention_block_size"]
# Overrides of a valid configuration, and what the error must say: the value and how to repair it.
BAD_VALUES = [
    *(({name: value}, f"`{name}` is {value}; it must be at least 1") for name in SIZES for value in (0, -4)),
    ({"num_loops": 0}, "`num_loops` is 0; it must be an integer of at least 1"),
    ({"max_train_loops": -4}, "`max_train_loops` is -4; it must be an integer of at least 1"),
    ({"num_loops": 1.5}, "'num_loops' expected int, got float (value: 1.5)"),
    ({"num_loops": "3"}, "'num_loops' expected int, got str (value: '3')"),
    ({"num_loops": True}, "'num_loops' expected int, got bool (value: True)"),
    ({"num_loops": None}, "'num_loops' expected int, got NoneType"),
    ({"mask_token_id": True}, "'mask_token_id' with value True"),
    ({"loop_start": 3}, "mid is layers[3:3] of 4 layers; it needs 0 <= loop_start < loop_end <= num_hidden_layers"),
    ({"loop_start": 3, "loop_end": 1}, "mid is layers[3:1] of 4 layers; it needs 0 <= loop_start < loop_end"),
    ({"loop_start": -1}, "mid is layers[-1:3] of 4 layers; it needs 0 <= loop_start"),
    ({"loop_end": 5}, "mid is layers[1:5] of 4 layers; it needs 0 <= loop_start < loop_end <= num_hidden_layers"),
    ({"num_hidden_layers": 2}, "mid is layers[1:3] of 2 layers; it needs 0 <= loop_start < loop_end"),
    ({"mask_token_id": None}, "`mask_token_id` is missing; a masked diffusion model needs the id of its [MASK] token"),
    ({"mask_token_id": 23}, "`mask_token_id` is 23, outside the vocabulary of 23 tokens; raise `vocab_size`"),
    ({"mask_token_id": -1}, "`mask_token_id` is -1, outside the vocabulary of 23 tokens"),
    ({"mask_token_id": 0}, "`mask_token_id` and `pad_token_id` are both 0; give [MASK] a token of its own"),
    ({"eos_token_id": [1, 22]}, "`mask_token_id` and `eos_token_id` are both 22; give [MASK] a token of its own"),
    ({"pad_token_id": 23}, "`pad_token_id` is 23, outside the vocabulary of 23 tokens"),
    ({"eos_token_id": [1, -2]}, "`eos_token_id` is -2, outside the vocabulary of 23 tokens"),
    ({"hidden_act": "relux"}, "`hidden_act` is 'relux'; choose one of transformers' ACT2FN"),
    ({"hidden_size": 34}, "`hidden_size` (34) is not a multiple of `num_attention_heads` (4)"),
    ({"hidden_size": 36}, "`head_dim` is 9; rotary embeddings need an even one"),
    ({"num_key_value_heads": 3}, "`num_attention_heads` (4) is not a multiple of `num_key_value_heads` (3); choose"),
    ({"rope_parameters": {"rope_type": "spiral"}}, "`rope_type` is 'spiral'; it must be one of default, "),
    (
        {"attention_block_size": 4, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
        "`rope_type` is 'dynamic', whose frequencies depend on the length; block-causal attention",
    ),
    ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` is not supported"),
    ({"loop_update": "residual"}, "'loop_update' expected one of ('replace', 'damped'), got residual"),
    ({"position_embedding_type": "alibi"}, "expected one of ('rope', 'learned'), got alibi"),
    ({"norm_type": "batchnorm"}, "expected one of ('rmsnorm', 'layernorm'), got batchnorm"),
    ({"rope_precision": "half"}, "'rope_precision' expected one of ('model', 'float32', 'bfloat16'), got half"),
    ({"rope_full_precision": True}, '`rope_full_precision=True` is `rope_precision="float32"`'),
    ({"rope_table_dtype": "bfloat16"}, '`rope_table_dtype="bfloat16"` is `rope_precision="bfloat16"`'),
]


@pytest.mark.parametrize(
    ("overrides", "message"), BAD_VALUES, ids=[" ".join(f"{k}={v}" for k, v in bad.items()) for bad, _ in BAD_VALUES]
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises((StrictDataclassError, ValueError), match=re.escape(message)):
        tiny_config(**overrides)


def test_derived_defaults():
    config = tiny_config()
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    learned = tiny_config(position_embedding_type="learned", head_dim=7)
    assert (learned.rope_parameters, learned.head_dim) == (None, 7)


@pytest.mark.parametrize("num_loops", [1, 2, 12])
@pytest.mark.parametrize(("loop_start", "loop_end"), [(0, 1), (1, 3), (0, 4), (3, 4)])
def test_layer_counts(loop_start, loop_end, num_loops):
    config = tiny_config(loop_start=loop_start, loop_end=loop_end)
    executed = [*range(loop_start), *([*range(loop_start, loop_end)] * num_loops), *range(loop_end, 4)]
    assert config.num_mid_layers == loop_end - loop_start
    assert config.num_executed_layers(num_loops) == len(executed)


OTHER_VALUES = {
    "learned damped": {"position_embedding_type": "learned", "loop_update": "damped", "norm_type": "layernorm"},
    "qk norm": {"num_key_value_heads": 2, "head_dim": 12, "use_qk_norm": True, "eos_token_id": [1, 2]},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    "blocks": {"attention_block_size": 4, "shift_logits": True, "rope_precision": "bfloat16", "bos_token_id": 3},
}


@pytest.mark.parametrize("overrides", OTHER_VALUES.values(), ids=OTHER_VALUES)
def test_save_and_load(tmp_path, overrides):
    config = tiny_config(**overrides)
    config.save_pretrained(tmp_path)
    for loaded in (LoopMDMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LoopMDMConfig
        for name in LoopMDMConfig.__annotations__:
            assert getattr(loaded, name) == getattr(config, name), name
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["mask_token_id"]) == ("loopmdm", 22)
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"}


def test_a_saved_field_that_no_longer_exists_is_named(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text()) | {"rope_full_precision": False}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises((StrictDataclassError, ValueError), match="`rope_full_precision` is not a field"):
        AutoConfig.from_pretrained(tmp_path)


def test_overrides_at_load(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert LoopMDMConfig.from_pretrained(tmp_path, num_loops=9).num_loops == 9
    # transformers applies these after the configuration was validated, so that the model has to look again.
    bad = LoopMDMConfig.from_pretrained(tmp_path, loop_end=9)
    with pytest.raises(StrictDataclassError, match=re.escape("mid is layers[1:9] of 4 layers")):
        LoopMDMForMaskedLM(bad)


@pytest.mark.parametrize(
    ("legacy", "rope_parameters"),
    [
        ({"rope_theta": 500.0}, {"rope_type": "default", "rope_theta": 500.0}),
        (
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        ),
    ],
    ids=["default", "linear"],
)
def test_both_rope_spellings(legacy, rope_parameters):
    assert tiny_config(**legacy).rope_parameters.items() >= rope_parameters.items()
    ids = random_ids(2, 16)
    old, new, default = (
        model(ids).logits
        for model in (tiny_model(**legacy), tiny_model(rope_parameters=rope_parameters), tiny_model())
    )
    assert torch.equal(old, new)
    assert not torch.allclose(new, default, atol=1e-3)
