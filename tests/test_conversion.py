# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Tests that a converted checkpoint computes what its source computes: against logits and tokens that the authors' own
code gave for tiny checkpoints in their published formats (tests/fixtures), bit for bit against transformers' classes,
and, so that these comparisons are known to notice a mistake, against conversions that are wrong on purpose. Then what
the conversions need of the model: block-causal attention, shifted logits, LayerNorm.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from conversion import (
    FIXTURES,
    NAMES,
    OPTIONS,
    PADDED,
    SHIFTED,
    TOLERANCES,
    build,
    computing_in,
    largest_difference,
    logits_of,
    meta,
    open_fixture,
    plan_fixture,
    references,
    source_tensors,
)
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama import modeling_llama

from loopmdm import LoopMDMForMaskedLM
from loopmdm.convert import Plan, Recipe, Source, convert_checkpoint
from loopmdm.generation_utils import DenoisingStep, LoopMDMGenerationConfig, commit_rule

HUB_FILES = {"cache_utils.py", "configuration_loopmdm.py", "generation_utils.py", "modeling_loopmdm.py"}
exact = {"rtol": 1e-12, "atol": 1e-12}

fixtures = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Callable[[str], Path]:
    """The folder that a fixture is converted to, once."""
    root = tmp_path_factory.mktemp("converted")

    def convert(name: str) -> Path:
        if not (root / name).exists():
            convert_checkpoint(FIXTURES / name, root / name, **OPTIONS.get(name, {}))
        return root / name

    return convert


def load(folder: Path, **kwargs) -> LoopMDMForMaskedLM:
    return LoopMDMForMaskedLM.from_pretrained(folder, **kwargs).eval()


# The source's logits


@fixtures
def test_converted_folder_gives_the_sources_logits(converted, name):
    model = load(converted(name))
    assert model.dtype == torch.float32
    assert model.config.mask_token_id == meta(name)["mask_token_id"]
    assert model.config.shift_logits == meta(name)["shifted_logits"]
    assert largest_difference(model, name, "f32") <= TOLERANCES["f32"]


@fixtures
def test_plan_gives_the_sources_logits_in_float64(name):
    """Rounding hides nothing here. The plan's recipes are applied in float64 too, where a folder holds float32."""
    assert largest_difference(build(plan_fixture(name), "f64"), name, "f64") <= TOLERANCES["f64"]


@pytest.mark.parametrize("name", SHIFTED)
def test_first_real_position_of_a_shifted_model_keeps_its_own_row(name):
    """What predicts it in the source, the row before it, does not exist; this is Dream's choice."""
    model, stored = build(plan_fixture(name), "f64"), references(name)
    cases = [("logits", None)] + [("right", "mask_right"), ("left", "mask_left")] * (name in PADDED)
    for case, padding in cases:
        mask = None if padding is None else stored[padding]
        first = [0, 0] if mask is None else mask.argmax(-1).tolist()
        with computing_in("f64"):
            ours = logits_of(model, stored["input_ids"], mask, num_loops=1)
        for row, column in enumerate(first):
            torch.testing.assert_close(
                ours[row, column], stored[f"{case}_f64"][row, column], rtol=0, atol=TOLERANCES["f64"]
            )


def test_smdms_mask_token_is_never_predicted(converted):
    """The source's head has no row for [MASK]; the one that ours needs takes nothing from the others."""
    logits = logits_of(load(converted("smdm")), references("smdm")["input_ids"], num_loops=1)
    assert logits.shape[-1] == references("smdm")["logits_f32"].shape[-1] + 1
    assert (logits[..., -1] == -1e4).all()
    assert (logits.softmax(-1)[..., -1] == 0).all()


# Bit for bit, in bfloat16


LLAMA_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)


def transformers_reference(reference: str, name: str, rename: Callable[[str], str] = lambda name: name):
    """A fixture in transformers' own class: weights in bfloat16, rotary frequencies in float32."""
    source = json.loads((FIXTURES / name / "config.json").read_text())
    if name == "llada":
        keys = {
            "hidden_size": "d_model",
            "intermediate_size": "mlp_hidden_size",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "num_key_value_heads": "n_kv_heads",
            "max_position_embeddings": "max_sequence_length",
            "tie_word_embeddings": "weight_tying",
        }
        source |= {ours: source[theirs] for ours, theirs in keys.items()}
    config = getattr(transformers, f"{reference}Config")(
        **{key: source[key] for key in LLAMA_SETTINGS if key in source},
        rope_parameters={
            "rope_type": "default",
            **(source.get("rope_scaling") or {}),
            "rope_theta": source["rope_theta"],
        },
        attn_implementation="sdpa",
    )
    model = getattr(transformers, f"{reference}ForCausalLM")(config)
    loaded = model.load_state_dict({rename(key): tensor for key, tensor in source_tensors(name).items()}, strict=False)
    assert loaded.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    assert not loaded.unexpected_keys
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.tie_weights()
    return model.eval()


def full_mask(length: int, block_size: int | None = None) -> torch.Tensor:
    """Without a 4-D mask of its own, transformers would make a causal one."""
    block = torch.arange(length) // (block_size or length)
    hidden = block[:, None] < block
    return torch.zeros(1, 1, length, length).masked_fill(hidden, torch.finfo(torch.bfloat16).min).bfloat16()


LLADA_NAMES = {
    "transformer.wte.": "embed_tokens.",
    "transformer.ln_f.": "norm.",
    "transformer.blocks.": "layers.",
    ".attn_norm.": ".input_layernorm.",
    ".ff_norm.": ".post_attention_layernorm.",
    ".q_proj.": ".self_attn.q_proj.",
    ".k_proj.": ".self_attn.k_proj.",
    ".v_proj.": ".self_attn.v_proj.",
    ".attn_out.": ".self_attn.o_proj.",
    ".ff_proj.": ".mlp.gate_proj.",
    ".up_proj.": ".mlp.up_proj.",
    ".ff_out.": ".mlp.down_proj.",
}


def llada_to_llama(name: str) -> str:
    if name == "model.transformer.ff_out.weight":  # the head, called as every layer's MLP output
        return "lm_head.weight"
    for theirs, ours in LLADA_NAMES.items():
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize(
    ("name", "reference", "block_size"),
    [
        ("a2d_llama3", "Llama", None),
        ("a2d_qwen3", "Qwen3", None),
        ("dream", "Qwen2", None),
        ("sdar", "Qwen3", 4),
    ],
)
def test_bfloat16_logits_are_transformers_bit_for_bit(name, reference, block_size, tmp_path):
    convert_checkpoint(FIXTURES / name, tmp_path / "model", dtype="bfloat16", **OPTIONS.get(name, {}))
    model, ids = load(tmp_path / "model"), references(name)["input_ids"]
    expected = logits_of(
        transformers_reference(reference, name), ids, attention_mask=full_mask(ids.shape[1], block_size)
    )
    assert expected.dtype == torch.bfloat16
    if model.config.shift_logits:
        expected = torch.cat((expected[:, :1], expected[:, :-1]), dim=1)
    assert torch.equal(logits_of(model, ids, num_loops=1), expected)
    # The comparison sees in what precision is rotated.
    model.config.rope_full_precision = True
    assert not torch.equal(logits_of(model, ids, num_loops=1), expected)


def rotate_in_float32(monkeypatch):
    """Makes transformers' Llama rotate as LLaDA's code does with `rope_full_precision`."""
    apply, rotary = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRotaryEmbedding.forward

    def apply_in_float32(query, key, cos, sin, **kwargs):
        assert cos.dtype == torch.float32
        rotated = apply(query.float(), key.float(), cos, sin, **kwargs)
        return tuple(part.to(query.dtype) for part in rotated)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", apply_in_float32)
    monkeypatch.setattr(
        modeling_llama.LlamaRotaryEmbedding,
        "forward",
        lambda self, states, *args, **kwargs: rotary(self, states.float(), *args, **kwargs),
    )


@pytest.mark.parametrize("full_precision", [True, False])
def test_bfloat16_logits_of_llada_are_transformers_bit_for_bit(full_precision, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for file in (FIXTURES / "llada").glob("model*"):
        (source / file.name).symlink_to(file)
    config = json.loads((FIXTURES / "llada" / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rope_full_precision": full_precision}))
    convert_checkpoint(source, tmp_path / "model", dtype="bfloat16")
    model, ids = load(tmp_path / "model"), references("llada")["input_ids"]
    if full_precision:
        rotate_in_float32(monkeypatch)
    reference = transformers_reference("Llama", "llada", llada_to_llama)
    expected = logits_of(reference, ids, attention_mask=full_mask(ids.shape[1]))
    assert torch.equal(logits_of(model, ids, num_loops=1), expected)
    model.config.rope_full_precision = not full_precision
    assert not torch.equal(logits_of(model, ids, num_loops=1), expected)


# The loop's place


@fixtures
def test_no_loops_compute_the_same_wherever_the_layers_are_split(converted, name):
    model, ids = load(converted(name)), references(name)["input_ids"]
    config, num_layers = model.config, model.config.num_hidden_layers
    plain = logits_of(model, ids, num_loops=1)
    for config.loop_update in ("replace", "damped"):
        for start in range(num_layers):
            for end in range(start + 1, num_layers + 1):
                config.loop_start, config.loop_end = start, end
                assert torch.equal(logits_of(model, ids, num_loops=1), plain)
        assert (logits_of(model, ids, num_loops=2) - plain).abs().max() > 0.1


def test_conversions_with_different_loops_hold_the_same_weights(converted, tmp_path):
    convert_checkpoint(FIXTURES / "llada", tmp_path / "model", loop_start=0, loop_end=3, num_loops=4)
    first, second = converted("llada"), tmp_path / "model"
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    config = load(second).config
    assert (config.loop_start, config.loop_end, config.num_loops, config.loop_update) == (0, 3, 4, "damped")
    assert load(first).config.num_loops == 1


# Wrong on purpose


def change_recipes(plan: Plan, ending: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Does something more to all tensors of the result whose names end so."""
    targets = [target for target in plan.recipes if target.endswith(ending)]
    assert targets
    for target in targets:
        recipe = plan.recipes[target]
        plan.recipes[target] = Recipe(
            recipe.sources, "", lambda *tensors, compute=recipe.compute: change(compute(*tensors))
        )


def copy_instead(plan: Plan, ending: str) -> None:
    """Replaces what is computed from a source tensor by that tensor."""
    targets = [target for target in plan.recipes if target.endswith(ending)]
    assert targets
    for target in targets:
        plan.recipes[target] = Recipe(plan.recipes[target].sources, "", lambda tensor, *others: tensor)


def swap_recipes(plan: Plan, first: str, second: str) -> None:
    targets = [target for target in plan.recipes if first in target]
    assert targets
    for target in targets:
        other = target.replace(first, second)
        plan.recipes[target], plan.recipes[other] = plan.recipes[other], plan.recipes[target]


def drop(plan: Plan, ending: str) -> None:
    targets = [target for target in plan.recipes if target.endswith(ending)]
    assert targets
    for target in targets:
        del plan.recipes[target]


def interleave_rotary_rows(plan: Plan) -> None:
    """What is right for checkpoints that rotate feature 2i with 2i + 1 (Meta's own Llama files)."""

    def change(tensor):
        heads = tensor.unflatten(0, (-1, plan.config.head_dim // 2, 2))
        return heads.transpose(1, 2).flatten(0, 2)

    for part in "qk":
        change_recipes(plan, f"{part}_proj.weight", change)


def drop_query_key_value_bias(plan: Plan) -> None:
    for part in "qkv":
        drop(plan, f"{part}_proj.bias")
    plan.config.attention_bias = False


def drop_query_key_norm(plan: Plan) -> None:
    for part in "qk":
        drop(plan, f"{part}_norm.weight")
    plan.config.use_qk_norm = False


def drop_rope_scaling(plan: Plan) -> None:
    assert plan.config.rope_parameters["rope_type"] == "llama3"
    plan.config.rope_parameters = {"rope_type": "default", "rope_theta": plan.config.rope_parameters["rope_theta"]}


def read_smdms_heads_side_by_side(plan: Plan) -> None:
    size = plan.config.hidden_size
    for index, part in enumerate("qkv"):
        for target in [target for target in plan.recipes if target.endswith(f"{part}_proj.weight")]:
            plan.recipes[target] = Recipe(
                plan.recipes[target].sources, "", lambda tensor, start=index * size: tensor[start : start + size]
            )


def swap_first_two_layers(plan: Plan) -> None:
    swap_recipes(plan, "model.layers.0.", "model.layers.1.")


def settings(**values) -> Callable[[Plan], None]:
    """Changes the result's configuration, each value to another one than it has."""

    def change(plan):
        for name, value in values.items():
            assert getattr(plan.config, name) != value
            setattr(plan.config, name, value)

    return change


def theta(value: float) -> Callable[[Plan], None]:
    def change(plan):
        assert plan.config.rope_parameters["rope_theta"] != value
        plan.config.rope_parameters["rope_theta"] = value

    return change


def zero(plan: Plan, ending: str) -> None:
    change_recipes(plan, ending, torch.zeros_like)


WRONG_PLANS: list[tuple[str, str, Callable[[Plan], None]]] = [
    ("rotary rows interleaved", "llada", interleave_rotary_rows),
    ("rotary rows interleaved", "mdlm_hf", interleave_rotary_rows),
    ("gate and up swapped", "llada", lambda plan: swap_recipes(plan, "gate_proj", "up_proj")),
    ("gate and up swapped", "llada_gqa_tied", lambda plan: swap_recipes(plan, "gate_proj", "up_proj")),
    ("gate and up swapped", "smdm", lambda plan: swap_recipes(plan, "gate_proj", "up_proj")),
    ("fused swiglu halves swapped", "llada_seq_swiglu", lambda plan: swap_recipes(plan, "gate_proj", "up_proj")),
    ("norms swapped", "llada", lambda plan: swap_recipes(plan, "input_layernorm", "post_attention_layernorm")),
    ("layer groups in another order", "llada_seq_swiglu", swap_first_two_layers),
    ("rope theta 1e4", "llada", theta(1e4)),
    ("rope theta 1e4", "dream", theta(1e4)),
    ("rope theta 5e5", "diffullama", theta(5e5)),
    ("epsilon 1e-6", "llada", settings(rms_norm_eps=1e-6)),
    ("epsilon 1e-6", "illada", settings(rms_norm_eps=1e-6)),
    ("epsilon 1e-6", "diffullama", settings(rms_norm_eps=1e-6)),
    ("epsilon 1e-6", "smdm", settings(rms_norm_eps=1e-6)),
    ("epsilon 1e-6", "mdlm_hf", settings(rms_norm_eps=1e-6)),
    ("epsilon 1e-6", "diffugpt", settings(rms_norm_eps=1e-6)),
    ("epsilon 1e-5", "llada_seq_swiglu", settings(rms_norm_eps=1e-5)),
    ("epsilon 1e-5", "dream", settings(rms_norm_eps=1e-5)),
    ("epsilon 1e-5", "a2d_llama3", settings(rms_norm_eps=1e-5)),
    ("query, key and value bias dropped", "dream", drop_query_key_value_bias),
    ("query, key and value bias dropped", "fast_dllm_v2", drop_query_key_value_bias),
    ("query, key and value bias dropped", "open_dcoder", drop_query_key_value_bias),
    ("query, key and value bias dropped", "llada_gqa_tied", drop_query_key_value_bias),
    ("query and key norm dropped", "a2d_qwen3", drop_query_key_norm),
    ("query and key norm dropped", "sdar", drop_query_key_norm),
    ("rope scaling dropped", "a2d_llama3", drop_rope_scaling),
    ("block mask ignored", "sdar", settings(attention_block_size=None)),
    ("block mask ignored", "bd3lm", settings(attention_block_size=None)),
    ("block mask ignored", "fast_dllm_v2", settings(attention_block_size=None)),
    ("blocks of another size", "bd3lm_noadaln", settings(attention_block_size=5)),
    ("heads side by side", "smdm", read_smdms_heads_side_by_side),
    ("exact rotary tables", "smdm", settings(rope_table_dtype="float32")),
    ("tanh gelu for erf", "llada_layernorm_plain", settings(hidden_act="gelu_pytorch_tanh")),
    ("tanh gelu for erf", "llada_gqa_tied", settings(hidden_act="gelu_pytorch_tanh")),
    ("erf gelu for tanh", "mdlm_hf", settings(hidden_act="gelu")),
    ("erf gelu for tanh", "radd", settings(hidden_act="gelu")),
    ("erf gelu for tanh", "diffugpt", settings(hidden_act="gelu")),
    ("modulation's shift dropped", "mdlm_hf", lambda plan: zero(plan, "input_layernorm.bias")),
    ("last modulation's shift dropped", "bd3lm", lambda plan: zero(plan, "model.norm.bias")),
    ("modulation's scale dropped", "mdlm_hf", lambda plan: copy_instead(plan, "post_attention_layernorm.weight")),
    ("modulation's gate dropped", "mdlm_hf", lambda plan: copy_instead(plan, "o_proj.weight")),
    ("modulation's gate dropped from a bias", "udlm_hf", lambda plan: copy_instead(plan, "down_proj.bias")),
    ("norm bias dropped", "radd", lambda plan: zero(plan, "input_layernorm.bias")),
    ("norm bias dropped", "llada_layernorm_plain", lambda plan: zero(plan, "post_attention_layernorm.bias")),
    ("output bias dropped", "llada_layernorm_plain", lambda plan: zero(plan, "o_proj.bias")),
    ("head bias dropped", "llada_layernorm_plain", lambda plan: zero(plan, "lm_head.bias")),
    ("gemma's 1 not added", "llada_scaled", lambda plan: copy_instead(plan, "layernorm.weight")),
    ("gemma's 1 not added to the last norm", "llada_scaled", lambda plan: copy_instead(plan, "model.norm.weight")),
    ("embedding scale dropped", "llada_scaled", lambda plan: copy_instead(plan, "embed_tokens.weight")),
    ("logit scale dropped", "llada_scaled", lambda plan: copy_instead(plan, "lm_head.weight")),
    ("square matrix not transposed", "diffugpt", lambda plan: copy_instead(plan, "o_proj.weight")),
    ("positions dropped", "diffugpt", lambda plan: zero(plan, "embed_positions.weight")),
    *(("logits not shifted", name, settings(shift_logits=False)) for name in SHIFTED),
    *(
        ("logits shifted", name, settings(shift_logits=True))
        for name in ("llada", "a2d_qwen3", "mdlm_hf", "radd", "sdar", "smdm")
    ),
]


@pytest.mark.parametrize(
    ("name", "change"),
    [(name, change) for _, name, change in WRONG_PLANS],
    ids=[f"{name}-{what.replace(' ', '-')}" for what, name, _ in WRONG_PLANS],
)
def test_wrong_plans_are_noticed(name, change):
    """In float32; the tolerance in float64 is stricter by far."""
    plan = plan_fixture(name)
    change(plan)
    assert largest_difference(build(plan, "f32"), name, "f32") > TOLERANCES["f32"]


def at_another_noise_level(source: Source) -> None:
    source.sigma = 0.38


def at_the_given_noise_level(source: Source) -> None:
    """The source's code sets the level to 0; the reference logits were made with 0.37 given."""
    source.config["time_conditioning"], source.sigma = True, 0.37


def raw_weights(source: Source) -> None:
    del source.extras["ema"]


def in_transformers_5_spelling_without_theta(source: Source) -> None:
    source.config["rope_parameters"] = {"rope_type": "default"}
    del source.config["rope_theta"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("udlm_hf", at_another_noise_level),
        ("mdlm_hf", at_the_given_noise_level),
        ("bd3lm", at_the_given_noise_level),
        ("mdlm_ckpt", raw_weights),
        ("dream", in_transformers_5_spelling_without_theta),
    ],
)
def test_wrong_readings_of_the_source_are_noticed(name, change):
    source = open_fixture(name)
    change(source)
    assert largest_difference(build(plan_fixture(name, source), "f32"), name, "f32") > TOLERANCES["f32"]


@pytest.mark.parametrize("name", PADDED)
def test_ignored_padding_is_noticed(name):
    model = build(plan_fixture(name), "f32")
    assert largest_difference(model, name, "f32", without_padding_mask=True) > TOLERANCES["f32"]


@pytest.mark.parametrize("name", [name for name in NAMES if "config_transformers5" in meta(name)])
def test_transformers_5_spelling_of_the_config_is_the_same(name):
    source = open_fixture(name)
    architectures, source.config = source.config["architectures"], meta(name)["config_transformers5"]
    assert "rope_theta" not in source.config
    source.config["architectures"] = architectures
    assert largest_difference(build(plan_fixture(name, source), "f64"), name, "f64") <= TOLERANCES["f64"]


# What a conversion writes


@fixtures
def test_folder_is_complete_and_recorded(converted, name):
    folder = converted(name)
    files = {"config.json", "generation_config.json", "conversion.json", "model.safetensors", *HUB_FILES}
    assert {path.name for path in folder.iterdir()} == files
    for file in HUB_FILES:
        assert (folder / file).read_bytes() == (Path(__file__).parents[1] / file).read_bytes()

    model, tensors = load(folder), load_file(folder / "model.safetensors")
    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert tensors.keys() == state.keys() - tied
    for target, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[target]), target

    record = json.loads((folder / "conversion.json").read_text())
    assert record["tensors"].keys() == tensors.keys()
    source = open_fixture(name)
    plan = plan_fixture(name, source)
    used = {tensor for entry in record["tensors"].values() for tensor in entry["from"]}
    # Every tensor of the source is accounted for, and every one of the record is the source's.
    assert used | set(record["ignored"]) | set(record["copies"]) == source.tensors.keys()
    assert not used & set(record["ignored"])
    assert all(tensor.endswith("inv_freq") or "sampling_eps" in tensor for tensor in record["ignored"])
    assert all(entry["how"] for entry in record["tensors"].values())
    assert record["family"] == plan.family.name
    assert record["special_tokens"]["mask_token_id"] == meta(name)["mask_token_id"]
    assert record["layers"] == len(model.model.layers)

    counts = record["parameters"]
    start, end = model.config.loop_start, model.config.loop_end
    for part, layers in (
        ("head", model.model.layers[:start]),
        ("mid", model.model.layers[start:end]),
        ("tail", model.model.layers[end:]),
    ):
        assert counts[part] == sum(parameter.numel() for parameter in layers.parameters()), part
    assert counts["total"] == model.num_parameters()
    assert counts["total"] == sum(counts[part] for part in ("head", "mid", "tail", "embeddings_and_head"))


def test_shards_hold_the_same_tensors(converted, tmp_path):
    convert_checkpoint(FIXTURES / "mdlm_hf", tmp_path / "model", max_shard_size="60KB")
    whole = load_file(converted("mdlm_hf") / "model.safetensors")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "model" / file)[name], whole[name])
    assert largest_difference(load(tmp_path / "model"), "mdlm_hf", "f32") <= TOLERANCES["f32"]


# A converted folder as a model

LOAD_AND_SAVE_AGAIN = """
import ast
import sys
import torch
sys.modules["loopmdm"] = None  # as if it were not installed: importing it is an ImportError
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

torch.set_num_threads(1)

def check(folder, expected, auto_class):
    model, expected = auto_class.from_pretrained(folder, trust_remote_code=True), load_file(expected)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    for num_loops in (1, 2):
        with torch.no_grad():
            logits = model(expected["input_ids"], expected["mask"], num_loops=num_loops).logits
        torch.testing.assert_close(logits, expected[f"logits_{num_loops}"], rtol=0, atol=1e-6)
    generated = model.generate(expected["input_ids"], expected["mask"], **arguments)
    assert torch.equal(generated, expected["generated"])
    return model

arguments, folders = ast.literal_eval(sys.argv[1]), sys.argv[2:]
auto_classes = (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM)
for folder, auto_class in zip(folders, auto_classes, strict=True):
    model = check(folder, f"{folder}.expected", auto_class)
    model.save_pretrained(f"{folder}-again")
    check(f"{folder}-again", f"{folder}.expected", AutoModelForMaskedLM)
"""
ROUND_TRIPS = ("llada", "mdlm_hf", "dream")
GENERATE = {"max_new_tokens": 4, "num_loops": 2, "unmasking": "left_to_right"}


def test_folders_load_and_save_without_the_package(tmp_path):
    for name in ROUND_TRIPS:
        convert_checkpoint(FIXTURES / name, tmp_path / name)
        model, stored = load(tmp_path / name), references(name)
        ids, mask = stored["input_ids"], stored["mask_left"]
        save_file(
            {
                "input_ids": ids,
                "mask": mask,
                **{f"logits_{num_loops}": logits_of(model, ids, mask, num_loops=num_loops) for num_loops in (1, 2)},
                "generated": model.generate(ids, mask, **GENERATE),
            },
            tmp_path / f"{name}.expected",
        )
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_SAVE_AGAIN, repr(GENERATE), *(str(tmp_path / name) for name in ROUND_TRIPS)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ROUND_TRIPS:
        again = load(tmp_path / f"{name}-again")
        assert largest_difference(again, name, "f32") <= TOLERANCES["f32"]
        assert again.generation_config.unmasking == load(tmp_path / name).generation_config.unmasking


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_converted_models_are_trained_with_lora(converted, name):
    base = load(converted(name))
    ids, labels = references(name)["input_ids"].clone(), references(name)["input_ids"]
    mask_token = base.config.mask_token_id
    labels = labels.masked_fill(labels == mask_token, 1)
    ids[:, ::2] = mask_token
    plain = logits_of(base, ids, num_loops=2)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.train()(ids, labels=labels, num_loops=2).loss.backward()
    gradients = {parameter: p.grad for parameter, p in model.named_parameters() if p.requires_grad}
    assert gradients
    assert all("lora" in parameter and gradient.abs().max() > 0 for parameter, gradient in gradients.items())
    assert (logits_of(model.eval(), ids, num_loops=2) - plain).abs().max() > 0.01
    generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=None, num_loops=2)
    assert (generated != mask_token).all()
    assert torch.equal(generated[ids != mask_token], ids[ids != mask_token])


@fixtures
def test_converted_models_generate_with_loops(converted, name):
    model, ids = load(converted(name)), references(name)["input_ids"][:, :5]
    arguments = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True}
    prompt = ids.masked_fill(ids == model.config.mask_token_id, 1)
    output = model.generate(prompt, torch.ones_like(ids), num_loops=2, **arguments)
    assert output.sequences.shape == (2, 11)
    assert torch.equal(output.sequences[:, :5], prompt)
    assert (output.sequences != model.config.mask_token_id).all()
    assert (output.loops == 2 * output.forward_passes).all()


# The sources' samplers

SAMPLERS = json.loads((FIXTURES / "samplers.json").read_text())
DREAM_RULES = {"maskgit_plus": "confidence", "topk_margin": "margin", "entropy": "entropy"}


def run_ids(runs):
    return [f"{run.get('alg', 'llada')}-{index}" for index, run in enumerate(runs)]


@pytest.mark.parametrize("run", SAMPLERS["llada"], ids=run_ids(SAMPLERS["llada"]))
def test_generate_is_lladas_sampler_step_by_step(converted, run):
    model, prompt = load(converted(run["checkpoint"])), torch.tensor(run["prompt"])
    output = model.generate(
        prompt,
        torch.ones_like(prompt),
        max_new_tokens=run["gen_length"],
        block_length=run["block_length"],
        max_denoising_steps=run["steps_per_block"],
        unmasking="confidence",
        num_loops=1,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_trace=True,
    )
    assert [step.tokens.tolist() for step in output.trace] == run["history"]
    assert output.sequences.tolist() == run["sequences"]


@pytest.mark.parametrize("run", SAMPLERS["dream"], ids=run_ids(SAMPLERS["dream"]))
def test_commit_rules_choose_what_dreams_sampler_does(converted, run):
    """
    Dream's schedule is another, so each of its steps is taken from the state before it, with its own count. Its rules
    see the probability of [MASK] too, which `generate` takes away beforehand: that turns one close choice of these
    runs.
    """
    model, mask_token = load(converted(run["checkpoint"])), run["mask_token_id"]
    rule = commit_rule(LoopMDMGenerationConfig(unmasking=DREAM_RULES[run["alg"]]))
    new = torch.full((len(run["prompt"]), run["max_new_tokens"]), mask_token)
    state = torch.cat((torch.tensor(run["prompt"]), new), dim=1)
    for after, count in zip(run["history"], run["committed_per_step"], strict=True):
        logits = logits_of(model, state, num_loops=1)
        step = DenoisingStep(
            logits=logits,
            tokens=logits.argmax(-1),
            masked=state == mask_token,
            size=(state == mask_token).sum(-1),
            index=0,
            num_steps=torch.ones(len(state), dtype=torch.long),
            penalty=torch.zeros(state.shape),
            remask_probability=0.0,
            noise=lambda: pytest.fail("none of these rules draws"),
        )
        commit = step.best(rule.score(step), torch.tensor(count))
        state = state.where(~commit, step.tokens)
        assert state.tolist() == after
    assert state.tolist() == run["sequences"]


# Block-causal attention


def real_positions(mask):
    """Position of every column, counted over real tokens; -1 on padding."""
    return torch.where(mask.bool(), mask.cumsum(-1) - 1, -1)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_token_has_no_effect_on_earlier_blocks(attn_implementation, padding):
    model = tiny_model(attention_block_size=4, attn_implementation=attn_implementation)
    ids, mask = random_ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    if padding != "none":
        mask[1, slice(3) if padding == "left" else slice(-3, None)] = 0
    block = real_positions(mask).div(4, rounding_mode="floor")
    before = logits_of(model, ids, mask, num_loops=2)
    for column in range(13):
        changed = ids.clone()
        changed[:, column] = (changed[:, column] + 1) % 22
        after = logits_of(model, changed, mask, num_loops=2)
        is_equal = (after == before).all(-1)
        for row in range(2):
            real = mask[row] == 1
            sees = real & (block[row] >= block[row, column]) & bool(mask[row, column])
            assert torch.equal(~is_equal[row] & real, sees), (row, column)


def test_block_causal_rows_do_not_depend_on_padding():
    model = tiny_model(attention_block_size=4).double()
    ids = random_ids(1, 9)
    for left in (1, 3, 4):
        padded = torch.nn.functional.pad(ids, (left, 2))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, 2))
        logits = logits_of(model, padded, mask)[:, left : left + 9]
        torch.testing.assert_close(logits, logits_of(model, ids), **exact)


def committed_columns(output, row=0):
    """The columns that were filled in each block of a generation."""
    blocks = {}
    for step in output.trace:
        blocks.setdefault(step.block, set()).update(step.committed[row].nonzero().flatten().tolist())
    return [sorted(blocks[block]) for block in sorted(blocks)]


@pytest.mark.parametrize(
    ("block_length", "expected"),
    [
        (None, [[6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17]]),
        (4, [[6, 7], [8, 9, 10, 11], [12, 13, 14, 15], [16, 17]]),
        (8, [[6, 7], [*range(8, 16)], [16, 17]]),
        (12, [[*range(6, 12)], [*range(12, 18)]]),
    ],
)
def test_generation_blocks_are_those_of_the_attention(block_length, expected):
    model, arguments = tiny_model(attention_block_size=4), {"return_dict_in_generate": True, "output_trace": True}
    prompt = random_ids(1, 6).masked_fill(random_ids(1, 6) == 22, 1)
    output = model.generate(prompt, max_new_tokens=12, block_length=block_length, **arguments)
    assert committed_columns(output) == expected
    # Without block-causal attention blocks begin where the prompt ends.
    output = tiny_model().generate(prompt, max_new_tokens=12, block_length=4, **arguments)
    assert committed_columns(output) == [[6, 7, 8, 9], [10, 11, 12, 13], [14, 15, 16, 17]]


def test_block_causal_text_does_not_depend_on_what_comes_behind():
    """With blocks that were not the attention's, tokens would see [MASK]s that later ones replace."""
    model = tiny_model(attention_block_size=4)
    prompt = random_ids(2, 6).masked_fill(random_ids(2, 6) == 22, 1)
    whole = model.generate(prompt, max_new_tokens=14)
    for length in (2, 6, 10):
        assert torch.equal(model.generate(prompt, max_new_tokens=length), whole[:, : 6 + length])
    padded = torch.nn.functional.pad(prompt, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (3, 0))
    assert torch.equal(model.generate(padded, mask, max_new_tokens=14)[:, 3:], whole)


@pytest.mark.parametrize("block_length", [1, 3, 6, 10])
def test_generation_blocks_that_cut_the_attentions_raise(block_length):
    with pytest.raises(ValueError, match=rf"`block_length` is {block_length}.*blocks of 4 positions.*multiple"):
        tiny_model(attention_block_size=4).generate(random_ids(1, 6), max_new_tokens=12, block_length=block_length)


@pytest.mark.parametrize(
    "attn_implementation", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"]
)
def test_flash_attention_cannot_be_block_causal(attn_implementation):
    model = tiny_model(attention_block_size=4)
    model.config._attn_implementation = attn_implementation  # none of them is installed here
    with pytest.raises(ValueError, match=r"cannot be block-causal.*sdpa"):
        model(random_ids(1, 8))


def test_a_4d_mask_takes_the_place_of_the_blocks():
    ids = random_ids(2, 8)
    mask = torch.zeros(2, 1, 8, 8)
    logits = logits_of(tiny_model(attention_block_size=4), ids, mask)
    torch.testing.assert_close(logits, logits_of(tiny_model(), ids), rtol=0, atol=1e-5)
    assert (logits - logits_of(tiny_model(attention_block_size=4), ids)).abs().max() > 0.1


# Shifted logits

MASKS = {
    "right": [[1] * 9, [1] * 6 + [0] * 3],
    "left": [[1] * 9, [0] * 3 + [1] * 6],
    "inside": [[1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1, 1, 1, 0]],
}
IDS = random_ids(2, 9, seed=1)  # the first token of a row and its first real one differ, whatever the mask
masks = pytest.mark.parametrize("mask", [torch.tensor(mask) for mask in MASKS.values()], ids=MASKS)


def by_hand(model, ids, mask=None):
    """A shifted model's logits, each row without its padding, through the layers and the head; NaN on padding."""
    mask = torch.ones_like(ids) if mask is None else mask
    logits = torch.full((*ids.shape, model.config.vocab_size), torch.nan, dtype=model.dtype)
    for row in range(len(ids)):
        real = mask[row].nonzero().flatten()
        states = model.model(ids[row : row + 1, real]).last_hidden_state[0]
        states = torch.stack([states[max(index - 1, 0)] for index in range(len(real))])
        logits[row, real] = model.lm_head(states)
    return logits


@masks
def test_shifted_rows_predict_their_own_token_under_padding(mask):
    model, ids = tiny_model(shift_logits=True).double(), IDS
    with torch.no_grad():
        torch.testing.assert_close(logits_of(model, ids), by_hand(model, ids), **exact)
        expected, logits = by_hand(model, ids, mask), logits_of(model, ids, mask)
    torch.testing.assert_close(logits[mask == 1], expected[mask == 1], **exact)
    assert (logits - logits_of(tiny_model().double(), ids, mask))[mask == 1].abs().max() > 0.1


@masks
def test_loss_of_a_shifted_model_is_that_of_the_aligned_rows(mask):
    model, ids = tiny_model(shift_logits=True).double(), IDS
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(1, 22, ids.shape, generator=generator).masked_fill(mask == 0, -100)
    labels[0, 0], weights = -100, torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    logits = by_hand(model, ids, mask)
    logits[..., 22] = -torch.inf  # [MASK] is never the answer
    losses = [
        -weights[row, column] * logits[row, column].log_softmax(-1)[labels[row, column]]
        for row, column in (labels != -100).nonzero().tolist()
    ]
    expected = sum(losses) / len(losses)
    for mode in (model.train(), model.eval()):
        loss = mode(ids, mask, labels=labels, loss_weights=weights, num_loops=3).loss
        torch.testing.assert_close(loss, expected, **exact)


@masks
def test_logits_to_keep_are_columns_of_a_shifted_models_logits(mask):
    model, ids = tiny_model(shift_logits=True).double(), IDS
    logits = logits_of(model, ids, mask)
    torch.testing.assert_close(logits_of(model, ids, mask, logits_to_keep=3), logits[:, -3:], **exact)
    columns = torch.tensor([0, 4, 7])
    torch.testing.assert_close(logits_of(model, ids, mask, logits_to_keep=columns), logits[:, columns], **exact)
    columns = torch.tensor([[0, 1], [8, 3]])
    expected = torch.stack([logits[row, columns[row]] for row in range(2)])
    torch.testing.assert_close(logits_of(model, ids, mask, logits_to_keep=columns), expected, **exact)


def test_shifted_models_generate_the_same_in_a_padded_batch():
    model = tiny_model(shift_logits=True)
    prompts = [random_ids(1, length, seed=length).clamp(max=21) for length in (3, 7)]
    batch = torch.cat([torch.nn.functional.pad(prompt, (7 - prompt.shape[1], 0)) for prompt in prompts])
    mask = torch.tensor([[0] * 4 + [1] * 3, [1] * 7])
    together = model.generate(batch, mask, max_new_tokens=6)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, max_new_tokens=6)
        assert torch.equal(together[row, -6:], alone[0, -6:])
    assert not torch.equal(together, tiny_model().generate(batch, mask, max_new_tokens=6))


# LayerNorm, plain MLP and a head with a bias

GPT_LIKE = {
    "norm_type": "layernorm",
    "use_gated_mlp": False,
    "hidden_act": "gelu_new",
    "mlp_bias": True,
    "lm_head_bias": True,
    "tie_word_embeddings": False,
}
PLAIN_MODELS = {
    "rope": GPT_LIKE,
    "learned": {**GPT_LIKE, "position_embedding_type": "learned", "attention_bias": True},
    "tied": {**GPT_LIKE, "tie_word_embeddings": True},
    "blocks-shifted": {**GPT_LIKE, "attention_block_size": 4, "shift_logits": True},
}
plain_models = pytest.mark.parametrize("overrides", PLAIN_MODELS.values(), ids=PLAIN_MODELS)


@plain_models
def test_layer_norm_models_have_these_parameters(overrides):
    model = tiny_model(**overrides)
    names = {name for name, _ in model.named_parameters()}
    for norm in ("model.norm", "model.layers.0.input_layernorm", "model.layers.3.post_attention_layernorm"):
        assert {f"{norm}.weight", f"{norm}.bias"} <= names
    assert {"lm_head.bias", "model.layers.0.mlp.up_proj.bias", "model.layers.0.mlp.down_proj.bias"} <= names
    assert not any("gate_proj" in name for name in names)


@plain_models
def test_flops_of_layer_norm_models_equal_the_measured_ones(overrides):
    model, ids = tiny_model(attn_implementation="eager", **overrides), random_ids(3, 10)
    for num_loops in (1, 2, 5):
        for arguments, num_logits in (({}, None), ({"logits_to_keep": 1}, 1)):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                model(ids, num_loops=num_loops, **arguments)
            assert model.flops(3, 10, num_loops, num_logits) == counter.get_total_flops()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@plain_models
def test_gradient_checkpointing_of_layer_norm_models_changes_no_bit(overrides):
    ids, labels = random_ids(2, 9), random_ids(2, 9, seed=1).clamp(max=21)
    gradients, layer_runs = [], []
    for checkpointing in (False, True):
        model = tiny_model(**overrides).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        runs = []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *args, runs=runs: runs.append(1))
        model(ids, labels=labels, num_loops=3).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        layer_runs.append(len(runs))
    assert layer_runs == [3, 6]
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradients[1][name], gradient), name


@plain_models
def test_layer_norm_models_are_saved_and_loaded(overrides, tmp_path):
    model, ids = tiny_model(**overrides), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = LoopMDMForMaskedLM.from_pretrained(tmp_path)
    assert {name: getattr(loaded.config, name) for name in overrides} == overrides
    for num_loops in (1, 3):
        assert torch.equal(logits_of(loaded, ids, num_loops=num_loops), logits_of(model, ids, num_loops=num_loops))
    assert torch.equal(loaded.generate(ids, max_new_tokens=3), model.generate(ids, max_new_tokens=3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm_type": "batchnorm"}, "`norm_type` is 'batchnorm'; it must be one of rmsnorm, layernorm"),
        ({"norm_type": None}, "'norm_type' expected str"),
        ({"rope_table_dtype": "float64"}, "`rope_table_dtype` is 'float64'; it must be one of float32, bfloat16"),
        ({"rope_table_dtype": torch.bfloat16}, "'rope_table_dtype' expected str"),
        ({"attention_block_size": 0}, "`attention_block_size` is 0; it must be at least 1"),
        ({"attention_block_size": -4}, "`attention_block_size` is -4; it must be at least 1"),
        ({"attention_block_size": 4.0}, "'attention_block_size'"),
        ({"attention_block_size": True}, "'attention_block_size'"),
        ({"shift_logits": 1}, "'shift_logits' expected bool"),
        ({"lm_head_bias": "yes"}, "'lm_head_bias' expected bool"),
        ({"rope_full_precision": None}, "'rope_full_precision' expected bool"),
    ],
)
def test_bad_values_of_the_new_settings_raise(values, message):
    with pytest.raises(StrictDataclassError) as error:
        tiny_config(**values)
    assert message in f"{error.value} {error.value.__cause__}"


def test_new_settings_survive_json():
    values = {
        "norm_type": "layernorm",
        "rope_table_dtype": "bfloat16",
        "rope_full_precision": True,
        "attention_block_size": 4,
        "shift_logits": True,
        "lm_head_bias": True,
    }
    config = tiny_config(**values)
    read = type(config).from_dict(json.loads(config.to_json_string()))
    assert {name: getattr(read, name) for name in values} == values
    defaults = tiny_config()
    assert all(getattr(defaults, name) != value for name, value in values.items())
