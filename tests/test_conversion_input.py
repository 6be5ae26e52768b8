# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Conversion of what users bring: damaged, foreign and hostile checkpoints, arguments that do not fit, tokenizers in all
their spellings, full disks. Whatever is refused names the reason and leaves nothing behind.
"""

import builtins
import errno
import functools
import gc
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import weakref
import zipfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
import transformers
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import loopmdm.convert.engine as engine
import loopmdm.convert.source as source_module
import loopmdm_cli as cli
from loopmdm import LoopMDMForMaskedLM
from loopmdm.convert import (
    FAMILIES,
    Source,
    choose_family,
    convert_checkpoint,
    default_window,
    open_source,
    plan_conversion,
)

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).resolve().parent / "fixtures"
REMOVED = object()
# What the files of some fixtures do not tell
OPTIONS = {
    "a2d_llama3": {"mask_token_id": 125},
    "a2d_qwen3": {"mask_token_id": 125},
    "diffugpt": {"mask_token_id": 127},
    "diffullama": {"mask_token_id": 127, "family": "diffullama"},
    "fast_dllm_v2": {"mask_token_id": 63},
    "open_dcoder": {"mask_token_id": 63, "family": "open-dcoder"},
    "udlm_hf": {"mask_token_id": 63, "sigma": 0.37},
    "mdlm_ckpt": {"allow_pickle": True},
}
LLADA = "model.transformer."


@functools.cache
def fixture_weights(name: str) -> dict[str, torch.Tensor]:
    files = sorted((FIXTURES / name).glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def edited(name: str, folder: Path, config=None, tensors=None, file="model.safetensors") -> Path:
    """
    A copy of a fixture in one file, with other values in config.json and other tensors; `REMOVED` removes. A tensor
    may be given as a function of the old one.
    """
    folder.mkdir(parents=True)
    settings = json.loads((FIXTURES / name / "config.json").read_text()) | (config or {})
    settings = {key: value for key, value in settings.items() if value is not REMOVED}
    (folder / "config.json").write_text(json.dumps(settings))
    weights = dict(fixture_weights(name))
    for key, tensor in (tensors or {}).items():
        weights[key] = tensor(weights[key]) if callable(tensor) else tensor
    weights = {key: tensor.clone() for key, tensor in weights.items() if tensor is not REMOVED}
    if file.endswith(".safetensors"):
        save_file(weights, folder / file)
    else:
        torch.save(weights, folder / file)
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    """The path to write, in an empty folder."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


@pytest.fixture
def src(tmp_path) -> Path:
    return tmp_path / "source"


def nothing_left(out: Path) -> bool:
    return os.listdir(out.parent) == []


def refuse(source: str | Path, out: Path, *parts: str, **options) -> str:
    """Converts in vain: a ValueError whose message has all `parts`, and an empty folder."""
    with pytest.raises(ValueError) as error:
        convert_checkpoint(source, out, **options)
    assert nothing_left(out)
    message = str(error.value)
    for part in parts:
        assert part in message, message
    return message


def converted(folder: Path) -> LoopMDMForMaskedLM:
    return LoopMDMForMaskedLM.from_pretrained(folder).eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def same_weights(first: Path, second: Path) -> bool:
    first, second = stored(first), stored(second)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def reference(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    with numpy.load(FIXTURES / name / "ref.npz") as arrays:
        return torch.from_numpy(arrays["input_ids"]).long(), torch.from_numpy(arrays["logits_f32"])


@torch.no_grad()
def logits_of(model, input_ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(input_ids=input_ids, **kwargs).logits


@pytest.fixture(scope="module")
def plain_llada(tmp_path_factory) -> Path:
    """The LLaDA fixture, converted without options."""
    folder = tmp_path_factory.mktemp("plain") / "llada"
    convert_checkpoint(FIXTURES / "llada", folder)
    return folder


# Sources: files that are absent, incomplete or damaged


def test_a_path_that_does_not_exist(tmp_path, out):
    refuse(tmp_path / "no" / "model", out, str(tmp_path / "no" / "model"), "does not exist")
    refuse(tmp_path / "model.safetensors", out, "does not exist")


def test_a_folder_without_weights(src, out):
    src.mkdir()
    shutil.copy(FIXTURES / "llada" / "config.json", src)
    refuse(src, out, str(src), "holds no weights", "safetensors")
    (src / "model.safetensors").mkdir()
    (src / "model.safetensors").rmdir()
    refuse(src / "config.json", out, "config.json is no file of weights", ".safetensors")


def test_without_config(src, out):
    shutil.copytree(FIXTURES / "llada", src)
    (src / "config.json").unlink()
    refuse(src, out, "has no config.json", "put the one of the checkpoint there")


def test_smdm_files_are_known_by_their_names(tmp_path, out):
    original = FIXTURES / "smdm" / "mdm-TINY-1e18.safetensors"
    (tmp_path / "files").mkdir()
    for name, parts in (
        ("mdm-TINY-1e18", ("does not name a known size", "`n_head`")),
        ("mdm-7M-1e18", ("does not name a known size", "mdm-7M-1e18.safetensors")),
        ("ar-6M-1e18", ("ar-6M-1e18.safetensors", "autoregressive")),
    ):
        shutil.copy(original, tmp_path / "files" / f"{name}.safetensors")
        refuse(tmp_path / "files" / f"{name}.safetensors", out, *parts)
    # A known size has its number of heads from the table.
    shutil.copy(original, tmp_path / "files" / "mdm-6M-1e18.safetensors")
    convert_checkpoint(tmp_path / "files" / "mdm-6M-1e18.safetensors", out)
    model = converted(out)
    assert (model.config.num_attention_heads, model.config.mask_token_id) == (4, 128)
    input_ids, logits = reference("smdm")
    torch.testing.assert_close(logits_of(model, input_ids)[..., :128], logits, atol=2e-5, rtol=0)


def test_the_config_beside_a_file_of_weights_is_used(out):
    record = convert_checkpoint(FIXTURES / "smdm" / "mdm-TINY-1e18.safetensors", out)
    assert record["family"] == "smdm"
    assert converted(out).config.max_position_embeddings == 64


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"architectures": ['])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_json_that_is_none(src, out, name, text):
    edited("llada", src)
    (src / name).write_text(text)
    refuse(src, out, str(src / name))


def test_several_files_without_index(src, out):
    edited("llada", src)
    shutil.copy(src / "model.safetensors", src / "ema.safetensors")
    refuse(src, out, "several files of weights (ema.safetensors, model.safetensors)", "name one")
    assert convert_checkpoint(src / "ema.safetensors", out)["family"] == "llada"


def test_an_index_that_names_absent_shards(src, out):
    shutil.copytree(FIXTURES / "llada", src)
    (src / "model-00002-of-00003.safetensors").unlink()
    refuse(src, out, "model.safetensors.index.json names model-00002-of-00003.safetensors", "incomplete")


def test_an_index_that_names_a_tensor_its_shard_lacks(src, out):
    shutil.copytree(FIXTURES / "llada", src)
    shard = src / "model-00001-of-00003.safetensors"
    weights = load_file(shard)
    gone = weights.popitem()[0]
    save_file(weights, shard)
    refuse(src, out, f"model-00001-of-00003.safetensors holds {gone!r}, but it does not")


def test_shards_that_repeat_a_tensor(src, out):
    shutil.copytree(FIXTURES / "llada", src)
    shutil.copy(src / "model-00001-of-00003.safetensors", src / "model-00002-of-00003.safetensors")
    (src / "model.safetensors.index.json").unlink()
    refuse(src, out, "model-00002-of-00003.safetensors holds", "again")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 200, 0.1, 0.5, -4, -1])
def test_truncated_safetensors(src, out, size):
    """Cut in the header's length, in the header, and in the data."""
    file = edited("llada", src) / "model.safetensors"
    total = file.stat().st_size
    with open(file, "r+b") as stream:
        stream.truncate(int(size * total) if isinstance(size, float) else size if size >= 0 else total + size)
    refuse(src, out, str(file), "no complete safetensors file")


def test_damaged_header(src, out):
    file = edited("llada", src) / "model.safetensors"
    for offset, text in ((0, b"\xff" * 8), (8, b"xxxx"), (60, b'"""')):
        original = file.read_bytes()
        file.write_bytes(original[:offset] + text + original[offset + len(text) :])
        refuse(src, out, str(file), "no complete safetensors file")
        file.write_bytes(original)


def test_a_file_that_shrinks_while_it_is_read(src, out):
    file = edited("llada", src) / "model.safetensors"

    def cut(plan):
        with open(file, "r+b") as stream:
            stream.truncate(file.stat().st_size // 2)

    refuse(src, out, "cannot be read", on_plan=cut)


def ones(*shape):
    return torch.ones(*shape)


@pytest.mark.parametrize(
    ("name", "tensors", "parts"),
    [
        ("llada", {f"{LLADA}blocks.1.k_proj.weight": REMOVED}, ["lacks 1 tensors", "blocks.1.k_proj.weight"]),
        ("llada", {f"{LLADA}wte.weight": REMOVED}, ["LLaDAModelLM"]),
        ("llada", {f"{LLADA}ff_out.weight": REMOVED}, ["lacks 1 tensors", f"{LLADA}ff_out.weight"]),
        ("llada", {f"{LLADA}blocks.3.ff_out.weight": REMOVED}, ["blocks.3."]),
        ("a2d_qwen3", {"model.embed_tokens.weight": REMOVED}, ["no tensor 'model.embed_tokens.weight'"]),
        ("a2d_qwen3", {"model.norm.weight": REMOVED}, ["model.norm.weight", "incomplete"]),
        ("a2d_qwen3", {"model.layers.2.self_attn.k_norm.weight": REMOVED}, ["layers.2.self_attn.k_norm.weight"]),
        ("a2d_qwen3", {"model.layers.0.self_attn.q_proj.weight": REMOVED}, ["layers.0.self_attn.q_proj.weight"]),
        ("a2d_qwen3", {"model.layers.1.input_layernorm.weight": REMOVED}, ["model.layers.1."]),
        ("dream", {"lm_head.weight": REMOVED}, ["lm_head.weight"]),
        ("dream", {"model.layers.2.self_attn.q_proj.bias": REMOVED}, ["layers.2.self_attn.q_proj.bias"]),
        ("mdlm_hf", {"backbone.sigma_map.mlp.2.bias": REMOVED}, ["lacks 1 tensors", "backbone.sigma_map.mlp.2.bias"]),
        ("mdlm_hf", {"backbone.blocks.3.norm1.weight": REMOVED}, ["lacks 1 tensors", "blocks.3.norm1.weight"]),
        ("diffugpt", {"denoise_model.wpe.weight": REMOVED}, ["denoise_model.wpe.weight"]),
        ("diffugpt", {"denoise_model.h.1.attn.c_attn.bias": REMOVED}, ["h.1.attn.c_attn.bias"]),
        ("llada", {f"{LLADA}blocks.1.extra.weight": ones(3)}, ["has 1 tensors", "blocks.1.extra.weight", "adapter"]),
        ("dream", {"model.layers.1.mlp.up_proj.lora_A.weight": ones(3, 3)}, ["lora_A", "adapter"]),
        ("dream", {"model.layers.1.mlp.up_proj.weight_scale": ones(80)}, ["weight_scale", "quantised"]),
        ("dream", {"model.layers.1.mlp.up_proj.bias": ones(80)}, ["model.layers.1.mlp.up_proj.bias"]),
        ("mdlm_hf", {"backbone.cond_map.weight": ones(3)}, ["backbone.cond_map.weight"]),
        ("llada", {f"{LLADA}blocks.2.k_proj.weight": ones(47, 48)}, ["blocks.2.k_proj.weight", "(47, 48)"]),
        ("llada", {f"{LLADA}ff_out.weight": ones(100, 48)}, [f"{LLADA}ff_out.weight", "(100, 48)", "(128, 48)"]),
        ("dream", {"model.norm.weight": ones(47)}, ["model.norm.weight", "(47,)", "(48,)"]),
        ("dream", {"model.norm.weight": ones(1, 48)}, ["model.norm.weight", "(1, 48)", "(48,)"]),
        ("dream", {"model.layers.0.self_attn.q_proj.weight": ones(50, 48)}, ["`num_attention_heads` (4)"]),
        ("mdlm_hf", {"backbone.blocks.2.attn_qkv.weight": ones(100, 48)}, ["blocks.2.attn_qkv.weight", "(100, 48)"]),
        ("mdlm_hf", {"backbone.sigma_map.mlp.0.weight": ones(16, 255)}, ["backbone.sigma_map.mlp.0.weight"]),
        ("smdm", {"transformer.h.1.attn.attn.weight": ones(100, 48)}, ["transformer.h.1.attn.attn.weight"]),
        ("diffugpt", {"denoise_model.h.1.attn.c_attn.weight": ones(144, 48)}, ["h.1.attn.c_attn.weight"]),
    ],
)
def test_tensors_that_do_not_fit(src, out, name, tensors, parts):
    edited(name, src, tensors=tensors)
    refuse(src, out, *parts, **OPTIONS.get(name, {}))


def with_value(value: float):
    def change(tensor):
        changed = tensor.clone()
        changed.view(-1)[tensor.numel() // 2] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("name", "tensor", "value"),
    [
        ("llada", f"{LLADA}blocks.3.up_proj.weight", float("nan")),
        ("llada", f"{LLADA}wte.weight", float("-inf")),
        ("mdlm_hf", "backbone.blocks.1.adaLN_modulation.weight", float("inf")),
        ("mdlm_hf", "backbone.sigma_map.mlp.2.bias", float("nan")),
        ("smdm", "transformer.h.0.attn.attn.weight", float("inf")),
        ("diffugpt", "denoise_model.ln_f.bias", float("nan")),
    ],
)
def test_values_that_are_not_finite(src, out, name, tensor, value):
    edited(name, src, tensors={tensor: with_value(value)})
    refuse(src, out, tensor, "NaN or infinite", **OPTIONS.get(name, {}))


def test_values_that_float16_cannot_hold(src, out):
    name = f"{LLADA}blocks.0.q_proj.weight"
    edited("llada", src, tensors={name: with_value(1e6)})
    refuse(src, out, name, "float16 cannot hold", "--dtype float32", dtype="float16")
    convert_checkpoint(src, out, dtype="bfloat16")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool])
def test_quantised_tensors(src, out, dtype):
    name = f"{LLADA}blocks.0.q_proj.weight"
    edited("llada", src, tensors={name: lambda tensor: tensor.to(dtype)})
    refuse(src, out, repr(name), "quantised", "Convert the original checkpoint")


@pytest.mark.parametrize("dtype", [torch.int8])
def test_quantised_tensors_in_pickles(src, out, dtype):
    name = f"{LLADA}blocks.0.q_proj.weight"
    edited("llada", src, tensors={name: lambda tensor: tensor.to(dtype)}, file="pytorch_model.bin")
    refuse(src, out, repr(name), "quantised", allow_pickle=True)


TIED = [
    ("a2d_qwen3", "lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings"),
    ("llada_gqa_tied", f"{LLADA}ff_out.weight", f"{LLADA}wte.weight", "weight_tying"),
]


@pytest.mark.parametrize(("name", "head", "embedding", "setting"), TIED)
def test_a_stored_head_must_equal_the_embedding_that_it_is_tied_to(tmp_path, out, name, head, embedding, setting):
    weight = fixture_weights(name)[embedding]
    options = OPTIONS.get(name, {})
    different = edited(name, tmp_path / "different", tensors={head: with_value(3.0)(weight)})
    refuse(different, out, repr(head), repr(embedding), setting, **options)
    shorter = edited(name, tmp_path / "shorter", tensors={head: weight[:-1]})
    refuse(shorter, out, repr(head), **options)
    record = convert_checkpoint(edited(name, tmp_path / "equal", tensors={head: weight}), out, **options)
    assert record["copies"] == {head: embedding}
    plain = out.with_name("plain")
    convert_checkpoint(FIXTURES / name, plain, **options)
    assert same_weights(out, plain)
    assert "lm_head.weight" not in stored(out)


def test_a_head_of_its_own_where_the_config_does_not_tie(src, out):
    head = with_value(3.0)(fixture_weights("a2d_qwen3")["model.embed_tokens.weight"])
    edited("a2d_qwen3", src, config={"tie_word_embeddings": False}, tensors={"lm_head.weight": head})
    convert_checkpoint(src, out, mask_token_id=125)
    assert torch.equal(converted(out).lm_head.weight, head)


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_absent_last_layers_are_noticed(src, out, name):
    """The config says how many layers there are; a shard without index may be what is missing."""
    last = {key: REMOVED for key in fixture_weights(name) if re.search(r"(blocks|layers|\.h)\.3\.", key)}
    edited(name, src, tensors=last)
    refuse(src, out, "4", "3", **OPTIONS.get(name, {}))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llada", {"n_heads": REMOVED}),
        ("llada", {"block_type": REMOVED}),
        ("llada", {"max_sequence_length": None}),
        ("a2d_qwen3", {"num_attention_heads": REMOVED}),
        ("a2d_qwen3", {"rms_norm_eps": REMOVED}),
        ("mdlm_hf", {"n_heads": REMOVED}),
        ("mdlm_hf", {"time_conditioning": REMOVED}),
        ("sdar", {"block_size": REMOVED}),
        ("fast_dllm_v2", {"bd_size": REMOVED}),
        ("diffugpt", {"n_head": REMOVED}),
        ("radd", {"model": REMOVED}),
    ],
)
def test_settings_that_are_needed(src, out, name, config):
    edited(name, src, config=config)
    refuse(src, out, repr(next(iter(config))), "add it to config.json", **OPTIONS.get(name, {}))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llada", {"n_heads": 0}),
        ("llada", {"n_heads": "four"}),
        ("llada", {"pad_token_id": [1]}),
        ("llada", {"mask_token_id": "125"}),
        ("dream", {"architectures": 1}),
        ("dream", {"rope_scaling": 7}),
        ("radd", {"model": "small"}),
    ],
)
def test_settings_of_a_wrong_type(src, out, name, config):
    edited(name, src, config=config)
    refuse(src, out)


# Families


REFUSED = [
    ("BertForMaskedLM", "normed after the residual"),
    ("A2DBertForMaskedLM", "normed after the residual"),
    ("ModernBertForMaskedLM", "window"),
    ("A2DModernBertForMaskedLM", "window"),
    ("LLaDAMoEModelLM", "mixtures of experts"),
    ("LLaDA2MoeModelLM", "mixtures of experts"),
    ("SDARMoeForCausalLM", "mixtures of experts"),
    ("DiffusionGemmaForBlockDiffusion", "causal encoder"),
]


@pytest.mark.parametrize(("architecture", "why"), REFUSED)
def test_architectures_that_cannot_be_converted(src, out, architecture, why):
    edited("a2d_qwen3", src, config={"architectures": [architecture]})
    refuse(src, out, architecture, "cannot be converted", why)
    refuse(src, out, architecture, "cannot be converted", why, from_causal=True)


def expert(index: int) -> dict[str, torch.Tensor]:
    return {f"model.layers.0.mlp.experts.{index}.up_proj.weight": ones(8, 48)}


@pytest.mark.parametrize(
    ("name", "changes", "options", "parts"),
    [
        ("a2d_qwen3", {"tensors": expert(0)}, {}, ["mixtures of experts"]),
        ("dream", {"tensors": {"model.layers.0.self_attn.q_norm.weight": ones(12)}}, {}, ["DreamReasoner", "Qwen3"]),
        ("udlm_hf", {}, {"mask_token_id": 63}, ["time_conditioning", "--sigma"]),
        ("udlm_hf", {}, {"sigma": 0.37}, ["mask token", "--mask-token-id"]),
        ("mdlm_hf", {}, {"sigma": 0.5}, ["`sigma` is 0.5", "not conditioned", "leave it out"]),
        ("mdlm_hf", {}, {"sigma": 0.0}, ["`sigma` is 0.0"]),
        ("mdlm_hf", {"config": {"cfg": True}}, {}, ["`cfg`", "classes"]),
        ("bd3lm", {"config": {"causal": True}}, {}, ["`causal`", "not a diffusion model"]),
        ("llada", {"config": {"attention_layer_norm": True}}, {}, ["`attention_layer_norm` is on"]),
        ("llada", {"config": {"alibi": True}}, {}, ["`alibi` is on"]),
        ("llada", {"config": {"rope": False}}, {}, ["`rope` is off"]),
        ("llada", {"config": {"activation_type": "swiglu"}}, {}, ["swiglu", "cannot run"]),
        ("llada", {"config": {"activation_type": "mish"}}, {}, ["`activation_type` is 'mish'", "silu"]),
        ("llada", {"config": {"layer_norm_type": "huge"}}, {}, ["`layer_norm_type` is 'huge'", "rms"]),
        ("llada", {"config": {"block_type": "other"}}, {}, ["`block_type` is 'other'", "sequential"]),
        ("a2d_qwen3", {"config": {"use_sliding_window": True}}, {}, ["`use_sliding_window`"]),
        ("dream", {"config": {"use_mrope": True}}, {}, ["`use_mrope`"]),
        ("dream", {"config": {"rope_scaling": {"rope_type": "mrope"}}}, {}, ["mrope"]),
        ("dream", {"config": {"rope_scaling": {"rope_type": "spiral"}}}, {}, ["`rope_type` is 'spiral'"]),
        ("dream", {"config": {"hidden_act": "wavy"}}, {}, ["`hidden_act` is 'wavy'"]),
        ("diffugpt", {"config": {"scale_attn_by_inverse_layer_idx": True}}, {}, ["scale_attn_by_inverse_layer_idx"]),
        ("dream", {"config": {"architectures": ["StrangeLM"]}}, {}, ["StrangeLM", "no known format", "Dream", "MDLM"]),
        ("dream", {"config": {"architectures": REMOVED}}, {}, ["no known format"]),
        ("diffullama", {}, {}, ["says nothing of diffusion", "--family", "diffullama", "--from-causal"]),
        ("open_dcoder", {}, {}, ["says nothing of diffusion", "open-dcoder", "--from-causal"]),
        ("dream", {}, {"from_causal": True}, ["DreamModel", "none of the causal models", "Llama", "GPT-2"]),
        ("mdlm_hf", {}, {"from_causal": True}, ["none of the causal models"]),
        ("dream", {}, {"family": "dreams"}, ["no family 'dreams'", "dream", "llada"]),
        ("open_dcoder", {}, {"family": "causal-qwen2"}, ["no family 'causal-qwen2'"]),
        ("dream", {}, {"shift_logits": False}, ["`shift_logits`", "--from-causal"]),
    ],
)
def test_families_that_are_refused(src, out, name, changes, options, parts):
    edited(name, src, **changes)
    refuse(src, out, *parts, **options)


def test_a_wrong_family_is_refused_or_fits():
    """Naming a family for files of another format ends in a ValueError, or its tensors are the same."""
    names = [family.name for family in FAMILIES if not family.from_causal]
    kind = {"a2d-llama": "llama", "a2d-qwen2": "llama", "a2d-qwen3": "llama", "open-dcoder": "llama"}
    kind |= {"fast-dllm-v2": "llama", "sdar": "llama", "diffullama": "llama", "dream": "llama", "illada": "llama"}
    kind |= {"mdlm": "dit", "bd3lm": "dit"}
    for fixture, own in (("llada", "llada"), ("dream", "dream"), ("mdlm_hf", "mdlm"), ("radd", "radd")):
        for name in names:
            source = open_source(FIXTURES / fixture)
            try:
                plan_conversion(source, family=name, mask_token_id=60)
            except ValueError:
                assert name != own
            else:
                assert kind.get(name, name) == kind.get(own, own), (fixture, name)


def test_a_looped_source_is_refused(tmp_path, out):
    tiny_model(max_train_loops=8).save_pretrained(tmp_path / "looped")
    refuse(tmp_path / "looped", out, "looped model already", "`max_train_loops` is 8")


@pytest.mark.parametrize("tied", [True, False])
def test_a_loopmdm_trained_without_loops_gets_another_loop(tmp_path, out, tied):
    plain = tiny_model(max_train_loops=1, num_loops=1, tie_word_embeddings=tied, use_qk_norm=True)
    plain.save_pretrained(tmp_path / "plain")
    record = convert_checkpoint(
        tmp_path / "plain", out, loop_start=2, loop_end=4, loop_update="damped", num_loops=3, max_train_loops=5
    )
    assert record["family"] == "loopmdm"
    model = converted(out)
    config = model.config
    assert (config.loop_start, config.loop_end, config.num_loops, config.max_train_loops) == (2, 4, 3, 5)
    assert (config.loop_update, config.mask_token_id, config.pad_token_id) == ("damped", 22, 0)
    input_ids = torch.arange(16)[None]
    assert torch.equal(logits_of(model, input_ids, num_loops=1), logits_of(plain, input_ids))
    assert not torch.equal(logits_of(model, input_ids), logits_of(plain, input_ids))


@pytest.mark.parametrize(
    ("name", "model_type", "family"),
    [
        ("a2d_qwen3", "llada", "a2d-qwen3"),
        ("dream", "qwen2", "dream"),
        ("dream", REMOVED, "dream"),
        ("sdar", "Dream", "sdar"),
        ("mdlm_hf", "bert", "mdlm"),
        ("diffugpt", "llada", "diffugpt"),
        ("illada", "llada", "illada"),
    ],
)
def test_model_type_may_lie(src, out, name, model_type, family):
    edited(name, src, config={"model_type": model_type})
    options = OPTIONS.get(name, {})
    assert convert_checkpoint(src, out, **options)["family"] == family
    honest = out.with_name("honest")
    assert convert_checkpoint(FIXTURES / name, honest, **options)["family"] == family
    assert same_weights(out, honest)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, honest)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir() if path.is_dir()))
def test_every_fixture_is_of_one_family(name):
    folder = FIXTURES / name
    files = [*folder.glob("*.ckpt"), folder]
    source = open_source(files[0], allow_pickle=True)
    if OPTIONS.get(name, {}).get("family"):
        assert not any(family.matches(source) for family in FAMILIES if not family.from_causal)
    else:
        assert [family.name for family in FAMILIES if family.matches(source) and not family.from_causal] == [
            choose_family(source).name
        ]


# Arguments


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"loop_start": 1, "loop_end": 5}, ["layers[1:5] of 4 layers", "loop_end <= num_hidden_layers"]),
        ({"loop_start": -1, "loop_end": 2}, ["layers[-1:2]"]),
        ({"loop_start": 2, "loop_end": 2}, ["layers[2:2]"]),
        ({"loop_start": 3, "loop_end": 1}, ["layers[3:1]"]),
        ({"loop_start": 1}, ["`loop_start` and `loop_end` go together"]),
        ({"loop_end": 2}, ["`loop_start` and `loop_end` go together"]),
        ({"num_loops": 0}, ["`num_loops` is 0", "at least 1"]),
        ({"num_loops": -3}, ["`num_loops` is -3"]),
        ({"max_train_loops": 0}, ["`max_train_loops` is 0"]),
        ({"loop_update": "add"}, ["`loop_update` is 'add'", "replace, damped"]),
        ({"dtype": "float8"}, ["`dtype` is 'float8'", "bfloat16"]),
        ({"dtype": "int8"}, ["`dtype` is 'int8'"]),
        ({"dtype": "float64"}, ["`dtype` is 'float64'"]),
        ({"mask_token_id": 128}, ["mask token is 128", "128 rows", "--mask-token-id"]),
        ({"mask_token_id": -1}, ["mask token is -1"]),
        ({"calibrate_on": "nowhere.txt"}, ["nowhere.txt is no file"]),
        ({"verify_against": "nowhere.npz"}, ["nowhere.npz is no file"]),
        ({"calibrate_on": __file__, "loop_start": 1, "loop_end": 2}, ["Calibration", "`loop_start`"]),
        ({"calibrate_on": __file__, "loop_end": 2}, ["Calibration", "`loop_start`"]),
        ({"calibrate_on": __file__}, ["no tokenizer", Path(__file__).name]),
        ({"max_shard_size": "many"}, ["many"]),
    ],
)
def test_arguments_that_do_not_fit(out, options, parts):
    refuse(FIXTURES / "llada", out, *parts, **options)


def test_calibration_width_without_calibration(out):
    refuse(FIXTURES / "llada", out, "calibrat", calibration_width=2)


@pytest.mark.parametrize("size", [0])
def test_shard_sizes_that_are_none(out, size):
    refuse(FIXTURES / "llada", out, "max_shard_size", max_shard_size=size)


def test_an_argument_that_is_bad_is_found_before_any_weight_is_read(out, monkeypatch):
    monkeypatch.setattr(Source, "read", lambda self, name: pytest.fail("read"))
    monkeypatch.setattr(engine.tempfile, "mkdtemp", lambda **kwargs: pytest.fail("wrote"))
    refuse(FIXTURES / "llada", out, "layers[1:5]", loop_start=1, loop_end=5)
    refuse(FIXTURES / "mdlm_hf", out, "mask token is 128", mask_token_id=128)


@pytest.mark.parametrize("what", ["folder", "file", "link", "dangling link"])
def test_existing_output_is_left_alone(tmp_path, out, what):
    if what == "folder":
        out.mkdir()
        (out / "mine.txt").write_text("keep")
    elif what == "file":
        out.write_text("keep")
    else:
        target = tmp_path / "target"
        if what == "link":
            target.mkdir()
        out.symlink_to(target)
    with pytest.raises(ValueError, match="exists already; name a new folder, or remove it") as error:
        convert_checkpoint(FIXTURES / "llada", out)
    assert str(out) in str(error.value)
    assert os.listdir(out.parent) == ["out"]
    if what == "folder":
        assert (out / "mine.txt").read_text() == "keep"
    elif what == "file":
        assert out.read_text() == "keep"
    else:
        assert out.is_symlink()
        assert (tmp_path / "target").exists() == (what == "link")


def test_output_that_appears_during_the_conversion(out):
    def appear(what, done, total):
        out.mkdir(exist_ok=True)
        (out / "mine.txt").write_text("keep")

    with pytest.raises(ValueError, match="has come into being"):
        convert_checkpoint(FIXTURES / "llada", out, progress=appear)
    assert os.listdir(out.parent) == ["out"]
    assert os.listdir(out) == ["mine.txt"]


def test_missing_parents_are_made(tmp_path):
    convert_checkpoint(FIXTURES / "llada", tmp_path / "a" / "b" / "c")
    assert converted(tmp_path / "a" / "b" / "c").config.mask_token_id == 125


# A disk that is full, and interruptions


def test_too_little_space_is_found_beforehand(out, monkeypatch):
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * 2**20))
    monkeypatch.setattr(Source, "read", lambda self, name: pytest.fail("read"))
    message = refuse(FIXTURES / "llada", out, str(out), "0.01 GB free", "make room")
    assert float(re.search(r"needs ([\d.]+) GB", message)[1]) == pytest.approx(0.0675, abs=0.003)


def failing_save(monkeypatch, error: BaseException | None, at: int = 2) -> None:
    """`save_file` leaves half a file and raises, or is killed, at the `at`-th shard."""
    calls = []

    def save(tensors, path, metadata=None):
        calls.append(path)
        save_file(tensors, path, metadata=metadata)
        if len(calls) == at:
            os.truncate(path, os.path.getsize(path) // 2)
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error

    monkeypatch.setattr(engine, "save_file", save)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit()]
)
def test_nothing_is_left_of_an_interrupted_conversion(out, monkeypatch, error):
    failing_save(monkeypatch, error)
    with pytest.raises(type(error)) as raised:
        convert_checkpoint(FIXTURES / "llada", out, max_shard_size=100_000)
    assert raised.value is error
    assert nothing_left(out)


@pytest.mark.parametrize("step", ["write_tokenizer", "_write_code", "_load"])
def test_nothing_is_left_when_a_later_step_fails(out, monkeypatch, step):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(engine, step, fail)
    with pytest.raises(OSError, match="No space"):
        convert_checkpoint(FIXTURES / "dream", out, verify=True)
    assert nothing_left(out)


def test_a_killed_conversion_leaves_nothing_that_loads(out, monkeypatch):
    child = os.fork()
    if child == 0:
        try:
            failing_save(monkeypatch, None)
            convert_checkpoint(FIXTURES / "llada", out, max_shard_size=100_000)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = out.parent.iterdir()
    assert left.name.startswith(".out.")
    assert not (left / "config.json").exists()
    assert len(list(left.glob("*.safetensors"))) == 2
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModel.from_pretrained(left)
    convert_checkpoint(FIXTURES / "llada", out)  # what is left is not in the way
    assert converted(out).config.mask_token_id == 125


# Pickles


def test_pickles_are_read_on_request_alone(tmp_path, out, plain_llada):
    for file in ("pytorch_model.bin", "weights.pt", "weights.pth", "last.ckpt"):
        folder = edited("llada", tmp_path / file, file=file)
        for source in (folder, folder / file):
            refuse(source, out, f"{file} is a pickle", "--allow-pickle")
    convert_checkpoint(tmp_path / "pytorch_model.bin", out, allow_pickle=True)
    assert same_weights(out, plain_llada)


def test_sharded_pickles(src, out, plain_llada):
    edited("llada", src).joinpath("model.safetensors").unlink()
    weights = fixture_weights("llada")
    names = sorted(weights)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, members in parts.items():
        torch.save({name: weights[name] for name in members}, src / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (src / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refuse(src, out, "pytorch_model-00001-of-00002.bin is a pickle")
    convert_checkpoint(src, out, allow_pickle=True)
    assert same_weights(out, plain_llada)


def test_safetensors_come_before_pickles(src, out):
    edited("llada", src)
    (src / "pytorch_model.bin").write_bytes(b"never looked at")
    for allow_pickle in (False, True):
        convert_checkpoint(src, out, allow_pickle=allow_pickle)
        shutil.rmtree(out)


class Payload:
    """Pickles as a call of `function`, which may be another payload."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):
        raise NotImplementedError  # pickle wants a callable


def payloads(marker: Path, folder: Path) -> dict[str, Payload]:
    """Every one makes the file `marker` when it is unpickled as usual."""
    touch = f"touch {marker}"
    nested = folder / "nested.pt"
    torch.save({"x": Payload(os.system, touch)}, nested)
    os_module = Payload(importlib.import_module, "os")
    return {
        "os.system": Payload(os.system, touch),
        "eval": Payload(builtins.eval, f"open({str(marker)!r}, 'w')"),
        "exec": Payload(builtins.exec, f"open({str(marker)!r}, 'w')"),
        "subprocess": Payload(subprocess.run, ["touch", str(marker)]),
        "partial": Payload(Payload(functools.partial, os.system, touch)),
        "getattr": Payload(Payload(getattr, os_module, "system"), touch),
        "torch.load": Payload(torch.load, str(nested)),
        "storage": Payload(torch.storage._load_from_bytes, nested.read_bytes()),
        "path": Payload(Path.touch, marker),
    }


PAYLOADS = ["os.system", "eval", "exec", "subprocess", "partial", "getattr", "storage", "torch.load", "path"]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *((name, "value") for name in PAYLOADS),
        *((name, place) for name in ("os.system", "partial") for place in ("tuple", "state_dict", "hyper_parameters")),
    ],
)
def test_what_a_pickle_would_run_is_not_run(tmp_path, src, out, plain_llada, name, place):
    """The payload works where pickles are trusted; here it does nothing, and the tensors beside it load."""
    marker = tmp_path / "executed"
    evil = payloads(marker, tmp_path)[name]
    edited("llada", src).joinpath("model.safetensors").unlink()
    weights = fixture_weights("llada")
    content = {
        "value": {"a": evil, **weights, "b": [evil, {"c": evil}]},
        "tuple": {"a": {"b": (evil,)}, **weights},
        "state_dict": {"state_dict": {**weights, "a": evil}},
        "hyper_parameters": {"hyper_parameters": {"config": evil}, "state_dict": weights, "callbacks": {"x": [evil]}},
    }[place]
    torch.save(content, src / "model.ckpt")
    if place == "value":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
            torch.load(src / "model.ckpt", weights_only=False)
        assert marker.exists()
        marker.unlink()
    source = open_source(src, allow_pickle=True)
    assert source.tensors.keys() == weights.keys()
    assert all(torch.equal(source.read(key), weights[key]) for key in weights)
    if name == "eval":
        convert_checkpoint(src, out, allow_pickle=True)
        assert same_weights(out, plain_llada)
    assert not marker.exists()


def test_a_pickle_that_is_all_payload(tmp_path, out):
    marker = tmp_path / "executed"
    for i, content in enumerate(payloads(marker, tmp_path).values()):
        torch.save(content, tmp_path / f"{i}.pt")
        refuse(tmp_path / f"{i}.pt", out, f"{i}.pt", allow_pickle=True)
    assert not marker.exists()


def test_pickles_of_other_formats(tmp_path, out):
    file = tmp_path / "model.bin"
    torch.save(fixture_weights("llada"), file, _use_new_zipfile_serialization=False)
    refuse(file, out, str(file), "zip format", "convert it to safetensors", allow_pickle=True)
    for content, part in (([torch.ones(2)], "list"), ({"a": 1}, "no tensors"), ({}, "no tensors")):
        torch.save(content, file)
        refuse(file, out, str(file), part, allow_pickle=True)
    file.write_bytes(b"")
    refuse(file, out, str(file), allow_pickle=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    refuse(file, out, str(file), "cannot be read", allow_pickle=True)


class Scripted(torch.nn.Module):
    def forward(self, x):
        return x


def test_torchscript_is_refused(tmp_path, out):
    torch.jit.script(Scripted()).save(tmp_path / "model.pt")
    refuse(tmp_path / "model.pt", out, "model.pt", allow_pickle=True)


def test_torchscript_is_not_loaded(tmp_path, out, monkeypatch):
    torch.jit.script(Scripted()).save(tmp_path / "model.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    refuse(tmp_path / "model.pt", out, "model.pt", allow_pickle=True)


def damaged_pickle(path: Path, to: Path, change) -> None:
    """A copy of a zip archive with a changed data.pkl."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as copy:
        for entry in archive.infolist():
            data = archive.read(entry)
            copy.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)


@pytest.mark.parametrize("position", [0, 0.01, 0.3, 0.7, 0.99])
def test_corrupted_pickles(tmp_path, out, position):
    file = tmp_path / "model.bin"
    torch.save(fixture_weights("llada"), file)

    def cut(data):
        return data[: int(position * len(data))]

    damaged_pickle(file, tmp_path / "cut.bin", cut)
    refuse(tmp_path / "cut.bin", out, "cut.bin", "cannot be read", allow_pickle=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"storage", b"stor-ge"),
        lambda data: b"\x80\x04\x95" + b"\xff" * 8 + data[2:],
    ],
)
def test_pickles_with_damaged_bytes(tmp_path, out, change):
    torch.save(fixture_weights("llada"), tmp_path / "model.bin")
    damaged_pickle(tmp_path / "model.bin", tmp_path / "bad.bin", change)
    refuse(tmp_path / "bad.bin", out, "bad.bin", allow_pickle=True)


def test_a_pickle_cannot_change_torch(tmp_path):
    torch.save(fixture_weights("llada"), tmp_path / "model.bin")
    build = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x07\x00\x00\x00changedK\x01s\x86b0"
    damaged_pickle(tmp_path / "model.bin", tmp_path / "bad.bin", lambda data: build + data[2:])
    open_source(tmp_path / "bad.bin", allow_pickle=True)
    function = torch._utils._rebuild_tensor_v2
    changed = hasattr(function, "changed")
    vars(function).clear()
    assert not changed


@pytest.mark.parametrize("size", [0.2, 0.6, 0.999])
def test_truncated_pickles(tmp_path, out, size):
    file = tmp_path / "model.bin"
    torch.save(fixture_weights("llada"), file)
    os.truncate(file, int(size * file.stat().st_size))
    refuse(file, out, str(file), allow_pickle=True)


@pytest.fixture(scope="module")
def training_checkpoint() -> dict:
    """What a training checkpoint of MDLM's repository holds, with hyper-parameters as plain dicts."""
    source = open_source(FIXTURES / "mdlm_ckpt" / "model.ckpt", allow_pickle=True)
    config = {"model": {"n_heads": 4, "length": 64}, "time_conditioning": False}
    return {
        "state_dict": {name: source.read(name).clone() for name in source.tensors},
        "ema": {"shadow_params": [tensor.clone() for tensor in source.extras["ema"]["shadow_params"]]},
        "hyper_parameters": {"config": config},
    }


def test_averaged_weights_are_used(tmp_path, out, training_checkpoint):
    input_ids, logits = reference("mdlm_ckpt")
    convert_checkpoint(FIXTURES / "mdlm_ckpt" / "model.ckpt", out, allow_pickle=True)
    torch.testing.assert_close(logits_of(converted(out), input_ids), logits, atol=2e-5, rtol=0)
    torch.save(training_checkpoint, tmp_path / "plain.ckpt")
    convert_checkpoint(tmp_path / "plain.ckpt", out.with_name("plain"), allow_pickle=True)
    assert same_weights(out, out.with_name("plain"))
    torch.save(training_checkpoint | {"ema": None}, tmp_path / "raw.ckpt")
    convert_checkpoint(tmp_path / "raw.ckpt", out.with_name("raw"), allow_pickle=True)
    assert (logits_of(converted(out.with_name("raw")), input_ids) - logits).abs().max() > 0.1


def test_a_training_checkpoint_in_a_folder(src, out):
    shutil.copytree(FIXTURES / "mdlm_ckpt", src)
    assert convert_checkpoint(src, out, allow_pickle=True)["family"] == "mdlm"


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda shadow: shadow[:-1], ["39 averaged (EMA) weights", "40 parameters"]),
        (lambda shadow: [*shadow, torch.ones(3)], ["41 averaged (EMA) weights"]),
        (lambda shadow: [shadow[1], shadow[0], *shadow[2:]], ["averaged (EMA) weights", "do not fit"]),
        (lambda shadow: [shadow[0][:-1], *shadow[1:]], ["do not fit"]),
        (lambda shadow: [], ["0 averaged (EMA) weights"]),
    ],
)
def test_averaged_weights_that_do_not_fit(tmp_path, out, training_checkpoint, change, parts):
    shadow = change(training_checkpoint["ema"]["shadow_params"])
    torch.save(training_checkpoint | {"ema": {"shadow_params": shadow}}, tmp_path / "last.ckpt")
    refuse(tmp_path / "last.ckpt", out, *parts, allow_pickle=True)


def test_hyper_parameters_are_heeded(tmp_path, out, training_checkpoint):
    config = {"model": {"n_heads": 4, "length": 64}, "time_conditioning": True}
    file = tmp_path / "last.ckpt"
    torch.save(training_checkpoint | {"hyper_parameters": {"config": config}}, file)
    refuse(file, out, "time_conditioning", "--sigma", allow_pickle=True)
    convert_checkpoint(file, out, allow_pickle=True, sigma=0.4)
    shutil.rmtree(out)
    for hyper in ({}, {"config": None}, {"config": {"time_conditioning": False}}):
        torch.save(training_checkpoint | {"hyper_parameters": hyper}, file)
        refuse(file, out, "hyper-parameters", "put a config.json", "`n_heads`", allow_pickle=True)
    settings = {"n_heads": 4, "model_length": 64, "time_conditioning": False}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    convert_checkpoint(file, out, allow_pickle=True)
    torch.save(training_checkpoint, file)
    (tmp_path / "config.json").unlink()
    convert_checkpoint(file, out.with_name("other"), allow_pickle=True)
    assert same_weights(out, out.with_name("other"))


@pytest.mark.parametrize("gone", ["n_heads", "length", "time_conditioning"])
def test_hyper_parameters_that_lack_a_value(tmp_path, out, training_checkpoint, gone):
    config = {"model": {"n_heads": 4, "length": 64}, "time_conditioning": False}
    config.pop(gone, None)
    config["model"].pop(gone, None)
    torch.save(training_checkpoint | {"hyper_parameters": {"config": config}}, tmp_path / "last.ckpt")
    refuse(tmp_path / "last.ckpt", out, gone, allow_pickle=True)


# Writing


@pytest.mark.parametrize("max_shard_size", [60_000, "60KB"])
def test_shards(out, max_shard_size):
    convert_checkpoint(FIXTURES / "dream", out, max_shard_size=max_shard_size)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    index = json.loads((out / "model.safetensors.index.json").read_text())
    weights = stored(out)
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in weights.values())
    assert {name: file.name for file in shards for name in load_file(file)} == index["weight_map"]
    assert all(file.stat().st_size < 60_000 + 10_000 for file in shards)
    whole = out.with_name("whole")
    convert_checkpoint(FIXTURES / "dream", whole)
    assert [file.name for file in whole.glob("model.*")] == ["model.safetensors"]
    assert same_weights(out, whole)
    input_ids = torch.arange(20)[None]
    assert torch.equal(logits_of(converted(out), input_ids), logits_of(converted(whole), input_ids))


@pytest.mark.parametrize(
    ("kept", "asked", "expected"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float16"),
        ("float32", "bfloat16", "bfloat16"),
        ("float32", "float16", "float16"),
        ("bfloat16", "float32", "float32"),
        ("float64", "float32", "float32"),
    ],
)
@pytest.mark.parametrize("name", ["fast_dllm_v2", "bd3lm_noadaln"])
def test_dtypes(src, out, name, kept, asked, expected):
    kept, expected = getattr(torch, kept), getattr(torch, expected)
    edited(name, src, tensors={key: lambda tensor: tensor.to(kept) for key in fixture_weights(name)})
    record = convert_checkpoint(src, out, dtype=asked, **OPTIONS.get(name, {}))
    assert record["dtype"] == str(expected).removeprefix("torch.")
    weights = stored(out)
    assert {tensor.dtype for tensor in weights.values()} == {expected}
    assert LoopMDMForMaskedLM.from_pretrained(out, dtype="auto").dtype == expected
    embedding = "model.embed_tokens.weight" if name == "fast_dllm_v2" else "backbone.vocab_embed.embedding"
    original = fixture_weights(name)[embedding]
    assert torch.equal(weights["model.embed_tokens.weight"], original.to(kept).to(expected))


def test_float64_and_mixed_sources(tmp_path, out):
    mixed = edited("dream", tmp_path / "mixed", tensors={"model.norm.weight": lambda tensor: tensor.bfloat16()})
    assert convert_checkpoint(mixed, out)["dtype"] == "float32"
    halves = {key: lambda tensor: tensor.half() for key in fixture_weights("dream")}
    halves["model.norm.weight"] = lambda tensor: tensor.bfloat16()
    edited("dream", tmp_path / "halves", tensors=halves)
    assert convert_checkpoint(tmp_path / "halves", out.with_name("halves"))["dtype"] == "float32"


@pytest.mark.parametrize("name", ["dream", "mdlm_hf", "diffugpt"])
def test_one_shard_is_in_memory_at_a_time(out, monkeypatch, name):
    limit, alive, peak = 60_000, [], []
    real_read, real_make, real_save = Source.read, engine._make, engine.save_file

    def track(tensor):
        alive.append((weakref.ref(tensor), tensor.numel() * tensor.element_size()))
        peak.append(sum(size for reference, size in alive if reference() is not None))
        return tensor

    monkeypatch.setattr(Source, "read", lambda self, key: track(real_read(self, key)))
    monkeypatch.setattr(engine, "_make", lambda plan, key: track(real_make(plan, key)))
    saved = []

    def save(tensors, path, **kwargs):
        saved.append(len(tensors))
        real_save(tensors, path, **kwargs)

    monkeypatch.setattr(engine, "save_file", save)
    gc.disable()
    try:
        convert_checkpoint(FIXTURES / name, out, max_shard_size=limit, **OPTIONS.get(name, {}))
    finally:
        gc.enable()
    largest = max(tensor.numel() * 4 for tensor in fixture_weights(name).values())
    assert len(saved) > 3
    # A shard, and the tensors that the next one is made of
    assert max(peak) <= limit + 2.5 * largest
    assert max(peak) < sum(size for _, size in alive) / 2


def test_progress(out):
    calls = []
    convert_checkpoint(FIXTURES / "llada", out, progress=lambda *call: calls.append(call), max_shard_size=100_000)
    assert {what for what, _, _ in calls} == {"writing"}
    totals = {total for _, _, total in calls}
    assert totals == {sum(4 * tensor.numel() for tensor in stored(out).values())}
    done = [done for _, done, _ in calls]
    assert all(first < second for first, second in pairwise(done))
    assert done[-1] == totals.pop()
    assert len(done) == len(stored(out))


def test_the_plan_comes_before_anything_is_written(out):
    plans = []

    def on_plan(plan):
        plans.append(plan)
        assert nothing_left(out)

    record = convert_checkpoint(FIXTURES / "llada", out, on_plan=on_plan)
    (plan,) = plans
    assert plan.record()["tensors"] == record["tensors"]
    assert plan.num_bytes == sum(4 * tensor.numel() for tensor in stored(out).values())
    assert json.loads((out / "conversion.json").read_text()) == record


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_are_readable_as_the_umask_says(src, out, umask):
    edited("llada", src)
    save_tokenizer(src, 120, mask="<|mask|>")
    for path in src.iterdir():
        path.chmod(0o600)
    before = os.umask(umask)
    try:
        convert_checkpoint(src, out, max_shard_size=100_000, mask_token_id=125)
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask
    assert {path.name: path.stat().st_mode & 0o777 & ~0o111 for path in out.rglob("*")} == {
        path.name: 0o666 & ~umask for path in out.rglob("*")
    }


def test_the_source_is_not_changed(src, out):
    edited("llada", src)
    save_tokenizer(src, 126, pad="w120")
    before = {path.name: path.read_bytes() for path in src.iterdir()}
    convert_checkpoint(src, out)
    assert {path.name: path.read_bytes() for path in src.iterdir()} == before


# Tokenizers and special tokens


def save_tokenizer(folder: Path, size: int, extra: tuple[str, ...] = (), template: str | None = None, **named) -> None:
    """A word-level tokenizer of tokens w0, w1, ... and then `extra`; `named` names special tokens."""
    model = Tokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    model.pre_tokenizer = WhitespaceSplit()
    special = {f"{name}_token": token for name, token in named.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0", **special)
    tokenizer.add_tokens(list(extra), special_tokens=True)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    change(content)
    path.write_text(json.dumps(content))


def no_mask(name: str = "llada", **config) -> dict:
    return {"config": {"mask_token_id": REMOVED, **config}}


def check_tokenizer(out: Path, mask_token_id: int, mask_token: str) -> PreTrainedTokenizerFast:
    config = json.loads((out / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.mask_token_id == config["mask_token_id"] == mask_token_id
    assert tokenizer.mask_token == mask_token
    assert config["pad_token_id"] != mask_token_id
    assert tokenizer.pad_token_id != mask_token_id
    encoded = tokenizer(f"w1 {mask_token} w2")["input_ids"]
    assert encoded == [1, mask_token_id, 2]
    assert tokenizer.decode(encoded, skip_special_tokens=True).split() == ["w1", "w2"]
    return tokenizer


@pytest.mark.parametrize("mask", ["<|mask|>", "<|mdm_mask|>", "<|MASK|>", "[MASK]", "<mask>", "|<MASK>|"])
def test_mask_by_well_known_name(src, out, mask):
    edited("llada", src, **no_mask())
    save_tokenizer(src, 120, extra=("<a>", mask))
    record = convert_checkpoint(src, out)
    assert record["special_tokens"]["mask_found"] == "tokenizer (by name)"
    check_tokenizer(out, 121, mask)


def test_mask_by_the_tokenizers_own_word(src, out):
    edited("llada", src, **no_mask())
    save_tokenizer(src, 120, mask="<hole>")
    assert convert_checkpoint(src, out)["special_tokens"]["mask_found"] == "tokenizer"
    check_tokenizer(out, 120, "<hole>")


def test_mask_by_config(src, out):
    """The config names a token that the tokenizer has, without saying what it is."""
    edited("llada", src)
    save_tokenizer(src, 125, extra=("<|mdm_mask|>",))
    assert convert_checkpoint(src, out)["special_tokens"]["mask_found"] == "config.json"
    check_tokenizer(out, 125, "<|mdm_mask|>")


def test_mask_in_added_tokens_alone(src, out):
    """Slow tokenizers keep added tokens in a file of their own (Fast-dLLM v2)."""
    edited("fast_dllm_v2", src)
    save_tokenizer(src, 62)
    (src / "tokenizer_config.json").write_text("{}")
    (src / "added_tokens.json").write_text(json.dumps({"|<MASK>|": 63, "<x>": 62}))
    record = convert_checkpoint(src, out)
    assert (record["special_tokens"]["mask_token_id"], record["special_tokens"]["mask_token"]) == (63, "|<MASK>|")
    assert AutoTokenizer.from_pretrained(out).mask_token_id == 63


@pytest.mark.parametrize(
    ("name", "expected"), [("illada", 5), ("mdlm_hf", 127), ("radd", 64), ("bd3lm", 63), ("smdm", 128)]
)
def test_mask_by_family(out, name, expected):
    record = convert_checkpoint(FIXTURES / name, out)
    assert record["special_tokens"]["mask_token_id"] == expected
    assert record["special_tokens"]["mask_found"] == f"family {record['family']}"


def test_a_familys_mask_beyond_a_small_vocabulary(src, out):
    edited("llada", src, **no_mask())
    refuse(src, out, "mask token is 126336", "128 rows", "--mask-token-id")


def test_mask_that_nothing_names(out):
    refuse(FIXTURES / "a2d_qwen3", out, "neither in its config nor in its tokenizer", "--mask-token-id")


def test_contradicting_masks(src, out):
    edited("llada", src)
    save_tokenizer(src, 120, mask="<hole>")
    refuse(src, out, "125 in config.json", "120 ('<hole>')", "--mask-token-id")
    record = convert_checkpoint(src, out, mask_token_id=120)
    assert record["special_tokens"]["mask_found"] == "argument"
    check_tokenizer(out, 120, "<hole>")


def test_the_argument_wins_over_the_tokenizer(src, out):
    edited("llada", src, **no_mask())
    save_tokenizer(src, 120, mask="<hole>", extra=("<other>",))
    convert_checkpoint(src, out, mask_token_id=121)
    check_tokenizer(out, 121, "<other>")


@pytest.mark.parametrize("in_config", [True, False])
def test_pad_equal_to_mask(src, out, in_config):
    edited("llada", src, config={"pad_token_id": 125 if in_config else REMOVED, "eos_token_id": 120})
    save_tokenizer(src, 125, pad="<|mask|>", eos="w120")
    convert_checkpoint(src, out)
    tokenizer = check_tokenizer(out, 125, "<|mask|>")
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == 120
    assert tokenizer.pad_token_id == 120
    model = converted(out)
    ids = tokenizer(["w1 w2 w3", "w4"], return_tensors="pt", padding=True, padding_side="left")
    model.generate(**ids, max_new_tokens=2, block_length=2)


def test_the_tokenizers_pad_is_used_where_the_config_has_none(src, out):
    edited("llada", src, config={"pad_token_id": None, "eos_token_id": None})
    save_tokenizer(src, 126, pad="w7", eos="w8", bos="w9")
    record = convert_checkpoint(src, out)
    tokens = record["special_tokens"]
    assert (tokens["pad_token_id"], tokens["eos_token_id"], tokens["bos_token_id"]) == (7, 8, 9)


def test_special_tokens_outside_the_vocabulary_are_dropped(src, out):
    edited("llada", src, config={"pad_token_id": 500, "eos_token_id": [600, 3, 125], "bos_token_id": 700})
    tokens = convert_checkpoint(src, out)["special_tokens"]
    assert (tokens["pad_token_id"], tokens["eos_token_id"], tokens["bos_token_id"]) == (3, 3, None)


TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.mark.parametrize("as_file", [True, False])
def test_chat_templates_are_kept(src, out, as_file):
    edited("llada", src)
    save_tokenizer(src, 126, template=TEMPLATE)
    (src / "chat_template.jinja").unlink(missing_ok=True)
    if as_file:
        (src / "chat_template.jinja").write_text(TEMPLATE)
        edit_json(src / "tokenizer_config.json", lambda content: content.pop("chat_template", None))
    else:
        edit_json(src / "tokenizer_config.json", lambda content: content.update(chat_template=TEMPLATE))
    convert_checkpoint(src, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False).split() == ["w1", "w2"]


def test_lists_of_ends_in_the_generation_config(src, out):
    edited("llada", src, config={"eos_token_id": 120})
    (src / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4], "pad_token_id": 5}))
    convert_checkpoint(src, out)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [3, 4]
    assert generation["pad_token_id"] == 5
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [3, 4]
    assert converted(out).generation_config.eos_token_id == [3, 4]


def test_a_tokenizer_without_a_class_name(src, out):
    edited("llada", src)
    save_tokenizer(src, 126, pad="w1")
    edit_json(src / "tokenizer_config.json", lambda content: content.pop("tokenizer_class"))
    convert_checkpoint(src, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.mask_token_id == 125
    assert tokenizer("w1 w2")["input_ids"] == [1, 2]


def test_a_tokenizer_of_tokenizer_json_alone(src, out):
    edited("llada", src, **no_mask())
    save_tokenizer(src, 125, extra=("<|mdm_mask|>",))
    (src / "tokenizer_config.json").unlink()
    convert_checkpoint(src, out)
    check_tokenizer(out, 125, "<|mdm_mask|>")


def test_a_tokenizer_that_lacks_the_mask_token_gets_it(src, out):
    edited("mdlm_hf", src)
    save_tokenizer(src, 127, pad="w0", eos="w0")
    record = convert_checkpoint(src, out)
    assert record["special_tokens"]["mask_token"] == "<|mask|>"
    tokenizer = check_tokenizer(out, 127, "<|mask|>")
    assert len(tokenizer) == 128
    tokenizer.save_pretrained(out.with_name("again"))
    assert AutoTokenizer.from_pretrained(out.with_name("again")).mask_token_id == 127


def test_a_tokenizer_that_is_shorter_by_more_than_the_mask(src, out):
    """[MASK] is in the embedding's last rows, and the tokenizer has no token for those before it."""
    edited("llada", src)
    save_tokenizer(src, 100)
    convert_checkpoint(src, out)
    # A tokenizer would give a new token the first free id, 100, which is another row.
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.mask_token_id is None and converted(out).config.mask_token_id == 125


def test_no_tokenizer_is_fine(out):
    record = convert_checkpoint(FIXTURES / "llada", out)
    assert record["tokenizer_files"] == []
    assert record["special_tokens"]["mask_token"] is None
    assert not list(out.glob("tokenizer*"))


# Causal models


def causal(folder: Path, kind: str, vocab_size: int = 40, tied: bool = False, prefix: bool = True):
    """A random causal model, saved by transformers."""
    torch.manual_seed(1)
    common = {"vocab_size": vocab_size, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "GPT2":
        config = transformers.GPT2Config(**common | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32})
    else:
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2, "pad_token_id": 1}
        if kind == "Qwen3":
            shape["head_dim"] = 12
        config = getattr(transformers, f"{kind}Config")(**common | shape)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            elif kind == "GPT2":
                parameter *= 5
    model.save_pretrained(folder)
    if not prefix:
        file = folder / "model.safetensors"
        weights = load_file(file)
        save_file({key.removeprefix("transformer."): value for key, value in weights.items()}, file)
    return model


@torch.no_grad()
def bidirectional(model, input_ids: torch.Tensor) -> torch.Tensor:
    length = input_ids.shape[1]
    return model(input_ids=input_ids, attention_mask=torch.zeros(len(input_ids), 1, length, length)).logits


@pytest.mark.parametrize(
    ("kind", "tied", "prefix", "size"),
    [
        *(("Qwen2", tied, True, size) for tied in (False, True) for size in (None, 36, 40)),
        ("GPT2", True, False, 36),
        ("GPT2", True, True, 40),
        ("Llama", True, True, 40),
        ("Llama", False, True, 36),
        ("Qwen3", False, True, 40),
        ("Qwen3", True, True, None),
    ],
)
def test_from_causal(src, out, kind, tied, prefix, size):
    """
    [MASK] takes the first row that the tokenizer leaves free, or a new one; it is the mean of those before, and all
    else is the causal model with its mask taken away.
    """
    original = causal(src, kind, tied=tied, prefix=prefix)
    if size is not None:
        save_tokenizer(src, size, eos="w5")
    record = convert_checkpoint(src, out, from_causal=True)
    model = converted(out)
    mask = size or 40
    assert record["family"] == f"causal-{kind.lower()}"
    assert record["special_tokens"]["mask_found"] == "new token"
    assert (model.config.mask_token_id, model.config.vocab_size) == (mask, max(40, mask + 1))
    assert model.config.tie_word_embeddings == tied
    for ours, theirs in (
        (model.get_input_embeddings().weight, original.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, original.get_output_embeddings().weight),
    ):
        torch.testing.assert_close(ours[mask], theirs[:mask].mean(0), atol=1e-6, rtol=0)
        others = [row for row in range(40) if row != mask]
        assert torch.equal(ours[others], theirs[others])
    input_ids = torch.randint(36, (2, 12), generator=torch.Generator().manual_seed(0))
    ours, theirs = logits_of(model, input_ids), bidirectional(original, input_ids)
    columns = [column for column in range(40) if column != mask]
    torch.testing.assert_close(ours[:, 1:, columns], theirs[:, :-1, columns], atol=2e-5, rtol=1e-5)
    if size is not None:
        check_tokenizer(out, mask, "<|mask|>")


@pytest.mark.parametrize(("kind", "shift"), [("Qwen2", None), ("Qwen2", False), ("GPT2", True), ("GPT2", False)])
def test_from_causal_with_and_without_shift(src, out, kind, shift):
    original = causal(src, kind, tied=kind == "GPT2")
    convert_checkpoint(src, out, from_causal=True, shift_logits=shift)
    model = converted(out)
    assert model.config.shift_logits == (shift is not False)
    input_ids = torch.arange(12)[None]
    ours, theirs = logits_of(model, input_ids)[..., :40], bidirectional(original, input_ids)
    if shift is False:
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(ours[:, 1:], theirs[:, :-1], atol=2e-5, rtol=1e-5)


def test_from_causal_with_a_mask_token_that_exists(src, out):
    """A token named by the user or the tokenizer keeps its row."""
    original = causal(src, "Qwen2")
    save_tokenizer(src, 36, extra=("<|mask|>",))
    convert_checkpoint(src, out, from_causal=True)
    weight = converted(out).get_input_embeddings().weight
    assert torch.equal(weight, original.get_input_embeddings().weight)
    check_tokenizer(out, 36, "<|mask|>")
    convert_checkpoint(src, out.with_name("other"), from_causal=True, mask_token_id=38)
    assert converted(out.with_name("other")).config.vocab_size == 40


def test_from_causal_with_a_tokenizer_that_is_longer_than_the_embedding(src, out):
    causal(src, "Qwen2")
    save_tokenizer(src, 45)
    refuse(src, out, "45 tokens", "40 rows", "--mask-token-id", from_causal=True)
    refuse(src, out, "mask token is 41", "--mask-token-id", from_causal=True, mask_token_id=41)


@pytest.mark.parametrize("kind", ["Qwen3", "GPT2"])
def test_from_causal_verifies(src, out, kind):
    causal(src, kind, tied=kind == "GPT2")
    found = convert_checkpoint(src, out, from_causal=True, verify=True)["verification"]
    assert found["max_difference"] < 1e-5 < found["max_logit"]
    assert kind in found["against"]


def test_from_causal_needs_the_word_even_for_recognised_models(src, out):
    causal(src, "GPT2", tied=True)
    refuse(src, out, "GPT2LMHeadModel", "--from-causal")


# The Hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: returns or raises `answer`, and remembers how it was asked."""
    state = SimpleNamespace(answer=FIXTURES / "llada", asked=None)

    def snapshot_download(repo_id, **kwargs):
        state.asked = repo_id, kwargs
        if isinstance(state.answer, Exception):
            raise state.answer
        return str(state.answer)

    monkeypatch.setattr(source_module, "snapshot_download", snapshot_download)
    return state


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_what_is_fetched_from_the_hub(out, hub, allow_pickle):
    record = convert_checkpoint("GSAI-ML/LLaDA-8B-Base", out, revision="v1", allow_pickle=allow_pickle)
    assert record["source"] == "GSAI-ML/LLaDA-8B-Base"
    repo_id, options = hub.asked
    assert (repo_id, options.pop("revision")) == ("GSAI-ML/LLaDA-8B-Base", "v1")
    patterns = options.pop("allow_patterns")
    assert options == {}

    def fetched(name):
        return any(Path(name).match(pattern) for pattern in patterns)

    needed = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    needed += ["chat_template.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json"]
    assert all(fetched(name) for name in needed)
    assert not any(fetched(name) for name in ("modeling_llada.py", "configuration_llada.py", "README.md", "x.onnx"))
    pickles = ("pytorch_model.bin", "last.ckpt", "x.pt", "x.pth")
    assert [fetched(name) for name in pickles] == [allow_pickle] * 4


def test_a_folder_comes_before_the_hub(tmp_path, out, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edited("llada", tmp_path / "owner" / "name")
    convert_checkpoint("owner/name", out)
    assert hub.asked is None


RESPONSE = SimpleNamespace(headers={}, request=None)
HTTP_ERROR = HfHubHTTPError.__bases__[0]  # of whichever library the Hub's client uses


@pytest.mark.parametrize(
    "error",
    [
        HfHubHTTPError("503 Server Error\n\nsecond line", response=RESPONSE),
        LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.\nCheck your connection."),
        OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled."),
        ConnectionError("no route to host"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
)
def test_errors_of_the_hub_are_one_line(out, hub, error):
    hub.answer = error
    message = refuse("owner/name", out, "owner/name is no folder here", str(error).splitlines()[0])
    assert "\n" not in message


def test_a_repository_that_does_not_exist_is_called_that(out, hub):
    message = (
        "404 Client Error. (Request ID: Root=1-2)\n\nRepository Not Found for url: "
        "https://huggingface.co/api/models/owner/name.\nPlease make sure you specified the correct `repo_id`."
    )
    hub.answer = RepositoryNotFoundError(message, response=RESPONSE)
    refuse("owner/name", out, "Repository Not Found")


@pytest.mark.parametrize("error", [OSError(), HTTP_ERROR("timed out")])
def test_other_errors_of_the_hub(out, hub, error):
    hub.answer = error
    refuse("owner/name", out, "owner/name")


# Verification


VERIFIABLE = ["a2d_qwen3", "dream", "sdar", "diffugpt"]


@pytest.mark.parametrize("name", VERIFIABLE)
def test_verification_with_transformers(out, name):
    calls = []
    record = convert_checkpoint(
        FIXTURES / name, out, verify=True, progress=lambda *call: calls.append(call), **OPTIONS.get(name, {})
    )
    found = record["verification"]
    assert found["max_difference"] <= 1e-5 < 0.1 < found["max_logit"]
    assert found["max_difference"] <= found["tolerance"]
    assert json.loads((out / "conversion.json").read_text())["verification"] == found
    assert found["transformers"] == transformers.__version__


def test_verification_runs_in_float32_whatever_is_written(out):
    found = convert_checkpoint(FIXTURES / "dream", out, verify=True, dtype="float32")["verification"]
    assert found["dtype"] == "float32"


def lying(monkeypatch, **changes) -> None:
    """Families whose config has other values than their sources."""
    real = engine.choose_family

    def choose(*args, **kwargs):
        family = real(*args, **kwargs)
        return replace(family, config=lambda source: {**family.config(source), **changes})

    monkeypatch.setattr(engine, "choose_family", choose)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dream", {"rms_norm_eps": 0.01}),
        ("a2d_qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("sdar", {"use_qk_norm": True, "rms_norm_eps": 0.1}),
        ("diffugpt", {"hidden_act": "relu"}),
        ("dream", {"shift_logits": True, "rms_norm_eps": 2e-4}),
    ],
)
def test_a_wrong_conversion_is_found_out(out, monkeypatch, name, changes):
    lying(monkeypatch, **changes)
    refuse(FIXTURES / name, out, "differs from the source", "tolerance", verify=True, **OPTIONS.get(name, {}))


def test_wrong_weights_are_found_out(out, monkeypatch):
    real = engine._make

    def make(plan, name):
        made = real(plan, name)
        return made.flip(0) if name == "model.layers.2.self_attn.k_proj.weight" else made

    monkeypatch.setattr(engine, "_make", make)
    refuse(FIXTURES / "dream", out, "differs from the source", verify=True)


@pytest.mark.parametrize("name", ["llada", "mdlm_hf"])
def test_families_that_transformers_does_not_have(out, name):
    refuse(FIXTURES / name, out, "no class of its own", "--verify-against", "write_reference.py", verify=True)


def reference_file(path: Path, **changes) -> Path:
    input_ids, logits = reference("llada")
    numpy.savez(path, **{"input_ids": input_ids.numpy(), "logits": logits.numpy()} | changes)
    return path


def test_verification_with_a_file(tmp_path, out):
    file = reference_file(tmp_path / "reference.npz")
    found = convert_checkpoint(FIXTURES / "llada", out, verify_against=file)["verification_against_file"]
    assert found["against"] == "reference.npz"
    assert found["max_difference"] < 1e-5
    assert found["tokens"] == reference("llada")[0].numel()


@pytest.mark.parametrize("name", ["dream", "diffugpt", "diffullama"])
def test_verification_with_a_file_of_a_shifted_model(tmp_path, out, name):
    """The file has the logits as the source returns them; the shift is the converted model's."""
    input_ids, logits = reference(name)
    numpy.savez(tmp_path / "reference.npz", input_ids=input_ids.numpy(), logits=logits.numpy())
    options = OPTIONS.get(name, {})
    convert_checkpoint(FIXTURES / name, out, verify_against=str(tmp_path / "reference.npz"), **options)
    shutil.rmtree(out)
    numpy.savez(tmp_path / "reference.npz", input_ids=input_ids.numpy(), logits=logits.roll(1, 1).numpy())
    refuse(FIXTURES / name, out, "differs", verify_against=tmp_path / "reference.npz", **options)


def test_reference_logits_that_differ(tmp_path, out):
    logits = reference("llada")[1]
    for change, part in ((1e-2, "differs from the source by 0.01"), (float("nan"), "not finite")):
        wrong = logits.clone()
        wrong[-1, -1, -1] += change
        file = reference_file(tmp_path / "wrong.npz", logits=wrong.numpy())
        refuse(FIXTURES / "llada", out, part, verify_against=file)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"text", ["no readable .npz file"]),
        ({"input_ids": numpy.zeros((2, 4), int)}, ["no array 'logits'", "write_reference.py"]),
        ({"logits": numpy.zeros((2, 4, 128))}, ["no array 'input_ids'"]),
        ({"input_ids": numpy.zeros(4, int), "logits": numpy.zeros((1, 4, 128))}, ["tokens (4,)", "(1, 4, 128)"]),
        ({"input_ids": numpy.zeros((1, 4), int), "logits": numpy.zeros((1, 5, 128))}, ["(1, 4)", "(1, 5, 128)"]),
        ({"input_ids": numpy.zeros((1, 4), int), "logits": numpy.zeros((1, 4))}, ["logits (1, 4)"]),
        ({"input_ids": numpy.array([{}], object), "logits": numpy.zeros((1, 4, 9))}, ["no readable .npz file"]),
    ],
)
def test_reference_files_that_are_none(tmp_path, out, content, parts):
    file = tmp_path / "reference.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        numpy.savez(file, allow_pickle=True, **content)
    refuse(FIXTURES / "llada", out, str(file), *parts, verify_against=file)


@pytest.mark.parametrize("size", [0, 10_000])
def test_truncated_reference_files(tmp_path, out, size):
    file = reference_file(tmp_path / "reference.npz")
    os.truncate(file, size)
    refuse(FIXTURES / "llada", out, "no readable .npz file", verify_against=file)


@pytest.mark.parametrize(
    "changes",
    [
        {"input_ids": numpy.full((2, 4), 128), "logits": numpy.zeros((2, 4, 128))},  # IndexError
        {"input_ids": numpy.zeros((1, 0), int), "logits": numpy.zeros((1, 0, 128))},  # nothing is compared
        {"input_ids": numpy.array([["a"]]), "logits": numpy.zeros((1, 1, 128))},  # TypeError
        {"input_ids": numpy.zeros((1, 4), int), "logits": numpy.zeros((1, 4, 0))},  # no columns
    ],
)
def test_reference_files_that_say_nothing(tmp_path, out, changes):
    file = reference_file(tmp_path / "reference.npz", **changes)
    refuse(FIXTURES / "llada", out, "reference.npz", verify_against=file)


def test_reference_script(tmp_path, out, monkeypatch, capsys):
    """What the script writes of a model that needs remote code is what the option wants."""
    plain = tiny_model(max_train_loops=1, num_loops=1)
    plain.save_pretrained(tmp_path / "plain")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    arguments = ["--auto-class", "AutoModelForMaskedLM", "--length", "9", "--batch-size", "3", "--max-token", "20"]
    file = tmp_path / "reference.npz"
    monkeypatch.setattr(sys, "argv", ["write_reference.py", str(tmp_path / "plain"), str(file), *arguments])
    runpy.run_path(str(ROOT / "convert" / "write_reference.py"), run_name="__main__")
    assert "logits (3, 9, 23)" in capsys.readouterr().out
    with numpy.load(file) as arrays:
        assert arrays["input_ids"].max() < 20
    record = convert_checkpoint(tmp_path / "plain", out, verify_against=file, loop_start=0, loop_end=2)
    assert record["verification_against_file"]["max_difference"] < 1e-6
    with torch.no_grad():
        plain.model.norm.weight[3] += 0.1
    plain.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="differs from the source"):
        convert_checkpoint(tmp_path / "other", out.with_name("other"), verify_against=file)


def test_reference_script_needs_nothing_of_this_package():
    text = (ROOT / "convert" / "write_reference.py").read_text()
    assert set(re.findall(r"^ *(?:import|from) ([\w.]+)$", text, re.MULTILINE)) == {
        "argparse",
        "numpy",
        "torch",
        "transformers",
    }


# The command


def command(monkeypatch, capsys, *args) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `loopmdm`."""
    monkeypatch.setattr(sys, "argv", ["loopmdm", *map(str, args)])
    code = 0
    try:
        cli.main()
    except SystemExit as error:
        code = error.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_convert_command(monkeypatch, capsys, src, out):
    edited("llada", src)
    save_tokenizer(src, 125, extra=("<|mdm_mask|>",), pad="w120", eos="w120")
    code, printed, _ = command(monkeypatch, capsys, "convert", src, out, "--num-loops", "4")
    assert code == 0
    for part in ("as llada", "parameters", "layers[0:1]", "layers[1:2]", "layers[2:4]", "num_loops 4", "damped"):
        assert part in printed, printed
    assert "125 <|mdm_mask|> (from config.json)" in printed
    assert "is written" in printed
    config = json.loads((out / "config.json").read_text())
    assert (config["num_loops"], config["loop_update"], config["mask_token_id"]) == (4, "damped", 125)

    code, printed, _ = command(monkeypatch, capsys, "info", out, "--json")
    assert code == 0
    facts = json.loads(printed)
    assert (facts["mid"], facts["num_loops"], facts["mask_token_id"]) == ("layers[1:2]", 4, 125)

    code, printed, _ = command(
        monkeypatch, capsys, "generate", out, "w1 w2 w3", "--max-new-tokens", "4", "--max-denoising-steps", "2"
    )
    assert code == 0
    assert printed.startswith("w1 w2 w3")
    assert "mdm_mask" not in printed


def test_dry_run_writes_nothing(monkeypatch, capsys, out):
    code, printed, _ = command(monkeypatch, capsys, "convert", FIXTURES / "dream", out, "--dry-run", "--verify")
    assert code == 0
    assert "as dream" in printed
    assert "is written" not in printed
    assert nothing_left(out)
    missing = out.parent / "missing" / "out"
    assert command(monkeypatch, capsys, "convert", FIXTURES / "dream", missing, "--dry-run")[0] == 0
    assert nothing_left(out)


def test_verify_option(monkeypatch, capsys, out):
    code, printed, _ = command(monkeypatch, capsys, "convert", FIXTURES / "dream", out, "--verify")
    assert code == 0
    assert "Qwen2ForCausalLM" in printed
    assert "largest difference" in printed


@pytest.mark.parametrize(
    ("name", "args", "part"),
    [
        ("nowhere/at/all", [], "does not exist"),
        ("a2d_qwen3", [], "--mask-token-id"),
        ("open_dcoder", [], "--from-causal"),
        ("dream", ["--family", "dreams"], "no family 'dreams'"),
        ("dream", ["--num-loops", "0"], "`num_loops` is 0"),
        ("dream", ["--loop-start", "1"], "go together"),
        ("dream", ["--loop-start", "1", "--loop-end", "9"], "layers[1:9]"),
        ("dream", ["--dtype", "int4"], "`dtype` is 'int4'"),
        ("dream", ["--calibrate", "nowhere.txt"], "nowhere.txt is no file"),
        ("dream", ["--verify-against", "nowhere.npz"], "nowhere.npz is no file"),
        ("llada", ["--verify"], "--verify-against"),
        ("mdlm_hf", ["--sigma", "0.5"], "`sigma` is 0.5"),
        ("udlm_hf", [], "--sigma"),
        ("mdlm_ckpt", [], "--allow-pickle"),
        ("dream", ["--no-shift-logits"], "`shift_logits`"),
        ("dream", ["--from-causal"], "none of the causal models"),
    ],
)
def test_convert_command_errors(monkeypatch, capsys, out, name, args, part):
    code, _, error = command(monkeypatch, capsys, "convert", FIXTURES / name, out, *args)
    assert code == 2
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1, error
    assert lines[0].startswith("loopmdm: error: ")
    assert part in lines[0]
    assert nothing_left(out)


def test_a_full_disk_is_one_line(monkeypatch, capsys, out):
    failing_save(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    code, _, error = command(monkeypatch, capsys, "convert", FIXTURES / "dream", out, "--max-shard-size", "100KB")
    assert code == 2
    assert error.strip().splitlines()[-1].startswith("loopmdm: error: ")
    assert "No space left on device" in error
    assert nothing_left(out)


def test_help_of_convert_does_not_import_torch():
    code = (
        "import sys, typer.testing, loopmdm_cli as cli\n"
        "print(typer.testing.CliRunner().invoke(cli.app, ['convert', '--help']).output)\n"
        "assert not {'torch', 'transformers', 'loopmdm'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for option in ("--num-loops", "--dry-run", "--verify", "--calibrate"):
        assert option in result.stdout


# Calibration


@pytest.fixture(scope="module")
def readable(tmp_path_factory) -> Path:
    """A LLaDA checkpoint with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("calibration")
    edited("llada", folder / "source")
    save_tokenizer(folder / "source", 120, pad="w0")
    words = torch.randint(1, 120, (400,), generator=torch.Generator().manual_seed(3)).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    (folder / "short.txt").write_text("w1 w2 w3")
    return folder


def test_calibration(readable, out):
    text = readable / "text.txt"
    calls = []
    record = convert_checkpoint(
        readable / "source",
        out,
        calibrate_on=text,
        calibration_sequences=2,
        calibration_length=32,
        progress=lambda *call: calls.append(call),
    )
    found = record["calibration"]
    assert json.loads((out / "calibration.json").read_text()) == found
    assert json.loads((out / "conversion.json").read_text())["calibration"] == found
    assert (out / "calibration.png").read_bytes().startswith(b"\x89PNG")
    windows = found["windows"]
    assert [(row["loop_start"], row["loop_end"]) for row in windows] == [(1, 2), (2, 3)]
    best = min(windows, key=lambda row: row["nelbo"])
    assert found["best"] == [best["loop_start"], best["loop_end"]]
    config = converted(out).config
    assert [config.loop_start, config.loop_end] == found["best"]
    assert [record["loop"]["loop_start"], record["loop"]["loop_end"]] == found["best"]
    assert record["loop"]["chosen"] == "by calibration on text.txt"
    assert (found["num_loops"], found["sequences"], found["length"], found["text"]) == (2, 2, 32, "text.txt")
    total = sum(value for key, value in record["parameters"].items() if key != "total")
    assert total == record["parameters"]["total"]
    assert [call[1:] for call in calls if call[0] == "calibrating"] == [(1, 3), (2, 3), (3, 3)]

    again = convert_checkpoint(
        readable / "source", out.with_name("again"), calibrate_on=text, calibration_sequences=2, calibration_length=32
    )
    assert again["calibration"] == found


def test_calibration_measures_what_the_model_scores(readable, out):
    """The recorded numbers are the NELBO of the written model with that window."""
    from loopmdm.evaluation import nelbo

    text = readable / "text.txt"
    options = {"calibrate_on": text, "calibration_sequences": 1, "calibration_length": 40, "num_loops": 3}
    found = convert_checkpoint(readable / "source", out, **options)["calibration"]
    assert (found["num_loops"], found["loop_update"]) == (3, "damped")
    model, tokenizer = converted(out), AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer(text.read_text())["input_ids"][:40]])
    plain = nelbo(model, ids, num_loops=1, num_samples=8, batch_size=8)
    assert plain.per_token()[0].item() == pytest.approx(found["without_loops"]["nelbo"], abs=1e-5)
    looped = nelbo(model, ids, num_loops=3, num_samples=8, batch_size=8)
    assert looped.per_token()[0].item() == pytest.approx(min(row["nelbo"] for row in found["windows"]), abs=1e-5)


@pytest.mark.parametrize(("width", "windows"), [(2, [(1, 3)]), (3, [(0, 3), (1, 4)])])
def test_calibration_width(readable, out, width, windows):
    record = convert_checkpoint(
        readable / "source",
        out,
        calibrate_on=readable / "text.txt",
        calibration_width=width,
        calibration_sequences=1,
        calibration_length=16,
    )
    assert [(row["loop_start"], row["loop_end"]) for row in record["calibration"]["windows"]] == windows
    assert converted(out).config.num_mid_layers == width


def test_calibration_that_cannot_be_done(readable, out, tmp_path):
    text = readable / "text.txt"
    refuse(readable / "source", out, "short.txt has 3 tokens", "at least 64", calibrate_on=readable / "short.txt")
    for width in (0, 5, -1):
        refuse(
            readable / "source",
            out,
            f"width of the loop is {width}",
            "4 layers",
            calibrate_on=text,
            calibration_width=width,
        )
    refuse(FIXTURES / "llada", out, "no tokenizer", str(text), calibrate_on=text)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    refuse(readable / "source", out, calibrate_on=tmp_path / "binary.txt")


def test_what_calibration_lacks_is_found_before_writing(out, monkeypatch):
    monkeypatch.setattr(Source, "read", lambda self, name: pytest.fail("read"))
    refuse(FIXTURES / "llada", out, "no tokenizer", calibrate_on=__file__)


def test_what_verification_lacks_is_found_before_writing(out, monkeypatch):
    monkeypatch.setattr(Source, "read", lambda self, name: pytest.fail("read"))
    refuse(FIXTURES / "llada", out, "no class of its own", verify=True)


# The default window


@pytest.mark.parametrize(
    ("num_layers", "replace_window", "damped_window"),
    [
        (1, (0, 1), (0, 1)),
        (2, (1, 2), (0, 1)),
        (4, (1, 2), (1, 2)),
        (6, (1, 2), (2, 3)),
        (12, (1, 3), (5, 7)),
        (28, (2, 7), (11, 15)),
        (32, (3, 8), (13, 17)),
    ],
)
def test_default_window(num_layers, replace_window, damped_window):
    assert default_window(num_layers, "replace") == replace_window
    assert default_window(num_layers, "damped") == damped_window


def test_default_windows_are_valid():
    for num_layers in range(1, 200):
        for update in ("replace", "damped"):
            start, end = default_window(num_layers, update)
            assert 0 <= start < end <= num_layers
            if num_layers >= 3:
                assert start >= 1 and end < num_layers  # a layer for head and one for tail


@pytest.mark.parametrize("num_loops", [1, 2])
def test_the_default_update_is_by_num_loops(out, num_loops):
    record = convert_checkpoint(FIXTURES / "dream", out, num_loops=num_loops)
    update = "replace" if num_loops == 1 else "damped"
    assert record["loop"]["loop_update"] == update
    assert (record["loop"]["loop_start"], record["loop"]["loop_end"]) == default_window(4, update)
    assert record["loop"]["chosen"] == "by depth"
