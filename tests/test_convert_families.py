# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Which family a checkpoint is of, which ones are refused and why, and starts from causal models and LoopMDMs."""

import contextlib
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from conversion import (
    FIXTURES,
    NAMES,
    OPTIONS,
    REMOVED,
    convert,
    edited,
    load,
    logits_of,
    open_fixture,
    refuse,
    same_weights,
    save_tokenizer,
)
from safetensors.torch import load_file, save_file
from tiny import randomize_vectors, tiny_model

import loopmdm.convert.families as families
from loopmdm.convert import FAMILIES, choose_family, convert_checkpoint, plan_conversion
from loopmdm.convert.llama_format import LlamaFormat

# Recognition


@pytest.mark.parametrize("name", NAMES)
def test_every_fixture_is_of_one_family_whatever_their_order(name, monkeypatch):
    source = open_fixture(name)
    matching = [family for family in FAMILIES if family.matches(source)]
    if "family" in OPTIONS.get(name, {}):  # stored as its causal ancestor is
        assert [family.from_causal for family in matching] == [True]
        return
    assert len(matching) == 1
    for seed in range(5):
        order = list(FAMILIES)
        random.Random(seed).shuffle(order)
        monkeypatch.setattr(families, "FAMILIES", order)
        assert choose_family(source) is matching[0]


def test_a_source_that_several_families_recognise_is_refused(out, monkeypatch):
    class Other(LlamaFormat):
        name, models, architectures = "other", "Other", ("DreamModel",)

    monkeypatch.setattr(families, "FAMILIES", [Other(), *FAMILIES])
    refuse(FIXTURES / "dream", out, "DreamModel", "several families", "--family: other, dream")
    assert convert("dream", out, family="dream")["family"] == "dream"
    assert convert("dream", out.with_name("other"), family=Other(), mask_token_id=125)["family"] == "other"


def test_families_are_named_and_found_once():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    modules = {path.stem for path in Path(families.__file__).parent.glob("*.py")} - {"__init__"}
    assert {type(family).__module__.rpartition(".")[2] for family in FAMILIES} == modules


@pytest.mark.parametrize(
    ("name", "model_type", "family"),
    [
        ("a2d_qwen3", "llada", "a2d-qwen3"),
        ("dream", REMOVED, "dream"),
        ("sdar", "Dream", "sdar"),
        ("illada", "llada", "illada"),
    ],
)
def test_model_type_may_lie(src, out, name, model_type, family):
    edited(name, src, config={"model_type": model_type})
    assert convert_checkpoint(src, out, **OPTIONS.get(name, {}))["family"] == family
    honest = out.with_name("honest")
    assert convert(name, honest)["family"] == family
    assert same_weights(out, honest)
    assert (out / "config.json").read_text() == (honest / "config.json").read_text()


@pytest.mark.parametrize(("fixture", "own"), [("llada", "llada"), ("dream", "dream"), ("mdlm_hf", "mdlm")])
def test_a_wrong_family_is_refused_or_fits(fixture, own):
    """Naming a family for files of another format ends in a ValueError, or its tensors are the same."""
    fitting = set()
    for family in FAMILIES:
        with contextlib.suppress(ValueError):
            fitting.add(plan_conversion(open_fixture(fixture), family=family.name, mask_token_id=60).family.name)
    llama_like = {family.name for family in FAMILIES if isinstance(family, LlamaFormat) and not family.from_causal}
    others = {"dream": llama_like - {"fast-dllm-v2", "sdar"}, "mdlm": {"mdlm"}}  # these need a block size
    assert fitting == others.get(own, {own})


# Refusals


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("BertForMaskedLM", "normed after the residual"),
        ("A2DBertForMaskedLM", "normed after the residual"),
        ("ModernBertForMaskedLM", "window"),
        ("A2DModernBertForMaskedLM", "window"),
        ("LLaDAMoEModelLM", "mixtures of experts"),
        ("LLaDA2MoeModelLM", "mixtures of experts"),
        ("SDARMoeForCausalLM", "mixtures of experts"),
        ("DiffusionGemmaForBlockDiffusion", "causal encoder"),
    ],
)
def test_architectures_that_cannot_be_converted(src, out, architecture, why):
    edited("a2d_qwen3", src, config={"architectures": [architecture]})
    for from_causal in (False, True):
        refuse(src, out, architecture, "cannot be converted", why, from_causal=from_causal)


EXPERT = {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(8, 48)}


@pytest.mark.parametrize(
    ("name", "changes", "options", "parts"),
    [
        ("a2d_qwen3", {"tensors": EXPERT}, {}, ["mixtures of experts"]),
        ("dream", {"tensors": {"model.layers.0.self_attn.q_norm.weight": torch.ones(12)}}, {}, ["DreamReasoner"]),
        ("udlm_hf", {}, {"mask_token_id": 63}, ["time_conditioning", "--sigma"]),
        ("udlm_hf", {}, {"sigma": 0.37}, ["mask token", "--mask-token-id"]),
        ("mdlm_hf", {}, {"sigma": 0.5}, ["`sigma` is 0.5", "not conditioned", "leave it out"]),
        ("mdlm_hf", {}, {"sigma": 0.0}, ["`sigma` is 0.0"]),
        ("radd", {}, {"sigma": 0.5}, ["`sigma` is 0.5", "not conditioned"]),
        ("llada", {}, {"sigma": 0.5}, ["`sigma` is 0.5", "llada", "leave it out"]),
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
        ("dream", {"config": {"rope_parameters": {"full": {"rope_theta": 1e4}}}}, {}, ["differ between layers"]),
        (
            "dream",
            {"config": {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}},
            {},
            ["`rope_scaling`", "differ", "remove one"],
        ),
        ("dream", {"config": {"rope_scaling": {"rope_type": "spiral"}}}, {}, ["`rope_type` is 'spiral'"]),
        ("dream", {"config": {"hidden_act": "wavy"}}, {}, ["`hidden_act` is 'wavy'"]),
        ("diffugpt", {"config": {"scale_attn_by_inverse_layer_idx": True}}, {}, ["scale_attn_by_inverse_layer_idx"]),
        ("diffugpt", {"config": {"scale_attn_weights": False}}, {}, ["`scale_attn_weights` is False"]),
        (
            "dream",
            {"config": {"architectures": ["StrangeLM"]}},
            {},
            ["StrangeLM", "not in a known format", "Dream", "MDLM"],
        ),
        ("dream", {"config": {"architectures": REMOVED}}, {}, ["not in a known format"]),
        (
            "diffullama",
            {},
            {},
            ["does not say that it is a diffusion model", "--family", "diffullama", "--from-causal"],
        ),
        ("open_dcoder", {}, {}, ["does not say that it is a diffusion model", "open-dcoder", "--from-causal"]),
        ("dream", {}, {"from_causal": True}, ["DreamModel", "not a causal model", "Llama", "GPT-2"]),
        ("mdlm_hf", {}, {"from_causal": True}, ["not a causal model"]),
        ("dream", {}, {"family": "dreams"}, ["no family 'dreams'", "dream", "llada"]),
        ("open_dcoder", {}, {"family": "causal-qwen2"}, ["no family 'causal-qwen2'"]),
        (
            "diffullama",
            {"config": {"architectures": ["GemmaForCausalLM"]}},
            {"family": "diffullama"},
            ["GemmaForCausalLM", "no diffullama model is"],
        ),
        ("dream", {}, {"shift_logits": False}, ["`shift_logits`", "--from-causal"]),
    ],
)
def test_checkpoints_that_are_refused(src, out, name, changes, options, parts):
    refuse(edited(name, src, **changes), out, *parts, **options)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llada", {"max_sequence_length": None}),
        ("llada", {"n_heads": REMOVED}),
        ("a2d_qwen3", {"rms_norm_eps": REMOVED}),
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
    refuse(edited(name, src, config=config), out)


# LoopMDMs


def test_looped_and_outdated_sources_are_refused(src, out):
    tiny_model(max_train_loops=8).save_pretrained(src)
    refuse(src, out, "looped model already", "`max_train_loops` is 8")
    config = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps(config | {"rope_full_precision": True}))
    refuse(src, out, "`rope_full_precision`", "rope_precision")


@pytest.mark.parametrize("tied", [True, False])
def test_a_loopmdm_trained_without_loops_gets_another_loop(tmp_path, out, tied):
    plain = tiny_model(max_train_loops=1, num_loops=1, tie_word_embeddings=tied, use_qk_norm=True)
    plain.generation_config.suppress_tokens = [11, 13]
    plain.generation_config.num_loops = 1
    plain.save_pretrained(tmp_path / "plain")
    loop = {"loop_start": 2, "loop_end": 4, "loop_update": "damped", "num_loops": 3, "max_train_loops": 5}
    assert convert_checkpoint(tmp_path / "plain", out, **loop)["family"] == "loopmdm"
    model = load(out)
    assert {name: getattr(model.config, name) for name in loop} == loop
    assert (model.config.mask_token_id, model.config.pad_token_id) == (22, 0)
    assert model.generation_config.suppress_tokens == [11, 13] and model.generation_config.num_loops is None
    ids = torch.arange(16)[None]
    assert torch.equal(logits_of(model, ids, num_loops=1), logits_of(plain, ids))
    assert not torch.equal(logits_of(model, ids), logits_of(plain, ids))


# Causal models


def causal(folder: Path, kind: str, tied: bool = False, prefix: bool = True):
    """A random causal model of 40 tokens, saved by transformers."""
    torch.manual_seed(1)
    values = {"vocab_size": 40, "tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "GPT2":
        values |= {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32, "initializer_range": 0.1}
    else:
        values |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        values |= {"num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2}
        values |= {"pad_token_id": 1} | ({"head_dim": 12} if kind == "Qwen3" else {})
    config = getattr(transformers, f"{kind}Config")(**values)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    randomize_vectors(model).eval().save_pretrained(folder)
    if not prefix:
        file = folder / "model.safetensors"
        tensors = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
        # transformers saved the causal mask as booleans until version 4.31.
        save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()}, file)
    return model


def bidirectional(model, ids: torch.Tensor) -> torch.Tensor:
    return logits_of(model, ids, attention_mask=torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1]))


@pytest.mark.parametrize(
    ("kind", "tied", "prefix", "size"),
    [
        *(("Qwen2", tied, True, size) for tied in (False, True) for size in (None, 36, 40)),
        ("GPT2", True, False, 36),
        ("GPT2", True, True, 40),
        ("GPT2", False, True, 40),
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
    record = convert_checkpoint(src, out, from_causal=True, verify=True)
    model, mask = load(out), size or 40
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
    ids = torch.randint(36, (2, 12), generator=torch.Generator().manual_seed(0))
    ours, theirs = logits_of(model, ids)[..., others], bidirectional(original, ids)[..., others]
    torch.testing.assert_close(ours[:, 1:], theirs[:, :-1], atol=2e-5, rtol=1e-5)
    found = record["verification"]
    assert found["max_difference"] < 1e-5 < 0.1 < found["max_logit"]
    assert kind in found["against"]


@pytest.mark.parametrize(
    "rope",
    [
        # As Phi-3 writes it: beside the entry, and before it
        {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 8},
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            "original_max_position_embeddings": 8,
        },
        # Twice the same, in the words of both versions of transformers
        {
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "rope_theta": 500.0,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        },
    ],
)
def test_rotary_settings_in_several_places(src, out, rope):
    causal(src, "Llama")
    file = src / "config.json"
    config = json.loads(file.read_text())
    del config["rope_parameters"]
    file.write_text(json.dumps(config | rope))
    original = transformers.LlamaForCausalLM.from_pretrained(src)
    convert_checkpoint(src, out, from_causal=True)
    ids = torch.arange(32)[None]
    ours, theirs = logits_of(load(out), ids)[:, 1:, :40], bidirectional(original, ids)[:, :-1]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Qwen2", "GPT2"])
@pytest.mark.parametrize("shift", [True, False])
def test_from_causal_with_and_without_shift(src, out, kind, shift):
    original = causal(src, kind, tied=kind == "GPT2")
    convert_checkpoint(src, out, from_causal=True, shift_logits=shift)
    model, ids = load(out), torch.arange(12)[None]
    assert model.config.shift_logits == shift
    ours, theirs = logits_of(model, ids)[..., :40], bidirectional(original, ids)
    if shift:
        ours, theirs = ours[:, 1:], theirs[:, :-1]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_from_causal_with_a_mask_token_that_exists(src, out):
    """A token named by the user or the tokenizer keeps its row."""
    original = causal(src, "Qwen2")
    save_tokenizer(src, 36, extra=("<|mask|>",))
    convert_checkpoint(src, out, from_causal=True)
    assert torch.equal(load(out).get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert json.loads((out / "config.json").read_text())["mask_token_id"] == 36
    for index, vocab_size in ((38, 40), (40, 41)):  # 40 is the first row that there is not
        other = out.with_name(str(index))
        convert_checkpoint(src, other, from_causal=True, mask_token_id=index)
        assert load(other).config.vocab_size == vocab_size


def test_from_causal_with_a_tokenizer_that_is_longer_than_the_embedding(src, out):
    causal(src, "Qwen2")
    save_tokenizer(src, 45)
    refuse(src, out, "45 tokens", "40 rows", "--mask-token-id", from_causal=True)
    refuse(src, out, "mask token is 41", "--mask-token-id", from_causal=True, mask_token_id=41)


def test_causal_models_need_the_word(src, out):
    causal(src, "GPT2", tied=True)
    refuse(src, out, "GPT2LMHeadModel", "--from-causal")
