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

# Overrides of a valid configuration, and what the error must say: the value and how to repair it.
BAD_VALUES = [
    ({"num_loops": 0}, "`num_loops` is 0; it must be at least 1"),
    ({"num_loops": -1}, "`num_loops` is -1; it must be at least 1"),
    ({"num_loops": 1.5}, "'num_loops' expected int, got float (value: 1.5)"),
    ({"num_loops": "3"}, "'num_loops' expected int, got str (value: '3')"),
    ({"num_loops": True}, "'num_loops' expected int, got bool (value: True)"),
    ({"num_loops": None}, "'num_loops' expected int, got NoneType"),
    ({"max_train_loops": 0}, "`max_train_loops` is 0; it must be at least 1"),
    ({"max_train_loops": 2.0}, "'max_train_loops' expected int, got float (value: 2.0)"),
    ({"loop_start": 3}, "mid is layers[3:3] of 4 layers; it needs 0 <= loop_start < loop_end <= num_hidden_layers"),
    ({"loop_start": 3, "loop_end": 1}, "mid is layers[3:1] of 4 layers; it needs 0 <= loop_start < loop_end"),
    ({"loop_start": -1}, "mid is layers[-1:3] of 4 layers; it needs 0 <= loop_start"),
    ({"loop_end": 5}, "mid is layers[1:5] of 4 layers; it needs 0 <= loop_start < loop_end <= num_hidden_layers"),
    ({"num_hidden_layers": 2}, "mid is layers[1:3] of 2 layers; it needs 0 <= loop_start < loop_end"),
    ({"loop_start": 1.0}, "'loop_start' expected int, got float (value: 1.0)"),
    ({"loop_update": "residual"}, "`loop_update` is 'residual'; it must be one of replace, damped"),
    ({"mask_token_id": None}, "`mask_token_id` is missing; a masked diffusion model needs the id of its [MASK] token"),
    ({"mask_token_id": 23}, "`mask_token_id` is 23, outside the vocabulary of 23 tokens; raise `vocab_size`"),
    ({"mask_token_id": -1}, "`mask_token_id` is -1, outside the vocabulary of 23 tokens"),
    ({"mask_token_id": True}, "'mask_token_id' with value True"),
    ({"mask_token_id": 0}, "`mask_token_id` and `pad_token_id` are both 0; give [MASK] a token of its own"),
    ({"eos_token_id": [1, 22]}, "`mask_token_id` and `eos_token_id` are both 22; give [MASK] a token of its own"),
    ({"pad_token_id": 23}, "`pad_token_id` is 23, outside the vocabulary of 23 tokens"),
    ({"hidden_act": "relux"}, "`hidden_act` is 'relux'; choose one of transformers' ACT2FN"),
    ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` is not supported"),
    ({"hidden_size": 34}, "`hidden_size` (34) is not a multiple of `num_attention_heads` (4)"),
    ({"position_embedding_type": "alibi"}, "`position_embedding_type` is 'alibi'; it must be one of rope, learned"),
    ({"rope_parameters": {"rope_type": "spiral"}}, "`rope_type` is 'spiral'; it must be one of default, "),
    ({"num_key_value_heads": 3}, "`num_attention_heads` (4) is not a multiple of `num_key_value_heads` (3); choose"),
    ({"num_key_value_heads": 8}, "`num_attention_heads` (4) is not a multiple of `num_key_value_heads` (8); choose"),
    ({"num_attention_heads": "4"}, "'num_attention_heads' expected int, got str (value: '4')"),
    ({"head_dim": 7}, "`head_dim` is 7; rotary embeddings need an even one"),
    ({"hidden_size": 36}, "`head_dim` is 9; rotary embeddings need an even one"),
    *(
        ({name: value}, f"`{name}` is {value}; it must be at least 1")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
        for value in (0, -4)
    ),
]


@pytest.mark.parametrize(
    ("overrides", "message"), BAD_VALUES, ids=[" ".join(f"{k}={v}" for k, v in bad.items()) for bad, _ in BAD_VALUES]
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(StrictDataclassError, match=re.escape(message)):
        tiny_config(**overrides)


def test_derived_defaults():
    config = tiny_config()
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert tiny_config(position_embedding_type="learned").rope_parameters is None
    assert tiny_config(position_embedding_type="learned", head_dim=7).head_dim == 7


@pytest.mark.parametrize("num_loops", [1, 2, 12])
@pytest.mark.parametrize(("loop_start", "loop_end"), [(0, 1), (1, 3), (0, 4), (3, 4)])
def test_layer_counts(loop_start, loop_end, num_loops):
    config = tiny_config(loop_start=loop_start, loop_end=loop_end, num_loops=num_loops)
    executed = [*range(loop_start), *([*range(loop_start, loop_end)] * num_loops), *range(loop_end, 4)]
    assert config.num_mid_layers == len(range(loop_start, loop_end))
    assert config.num_effective_layers == config.num_executed_layers(num_loops) == len(executed)
    assert config.num_executed_layers(1) == config.num_hidden_layers == 4


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"position_embedding_type": "learned", "loop_update": "damped", "loop_start": 0, "loop_end": 4},
        {"num_key_value_heads": 2, "head_dim": 12, "use_qk_norm": True, "eos_token_id": [1, 2], "bos_token_id": 3},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}, "attention_bias": True},
    ],
    ids=["defaults", "learned damped", "qk norm", "linear rope"],
)
def test_save_and_load(tmp_path, overrides):
    config = tiny_config(**overrides)
    config.save_pretrained(tmp_path)
    for loaded in (LoopMDMConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is LoopMDMConfig
        for name in LoopMDMConfig.__annotations__:
            assert getattr(loaded, name) == getattr(config, name), name

    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "loopmdm"
    assert saved["mask_token_id"] == 22
    assert set(saved["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"}


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
    config = tiny_config(**legacy)
    assert config.rope_parameters | rope_parameters == config.rope_parameters
    ids = random_ids(2, 16)
    old, new, default = (
        model(ids).logits
        for model in (tiny_model(**legacy), tiny_model(rope_parameters=rope_parameters), tiny_model())
    )
    assert torch.equal(old, new)
    assert not torch.allclose(new, default, atol=1e-3)
