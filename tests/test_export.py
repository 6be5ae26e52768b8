# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Loops written out as layers: every format computes in transformers' own classes, and converted back, what the looped
model does; what a format cannot express is refused.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from commands import refusal, run
from conversion import computing_in, convert, logits_of, save_tokenizer, stored
from tiny import MASK, random_ids, scores, tiny_model

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM, LoopMDMGenerationConfig
from loopmdm.convert import Recipe, convert_checkpoint, export_checkpoint, formats

# A model that each format expresses as it is
MODELS = {
    "a2d-llama": {"tie_word_embeddings": False, "num_key_value_heads": 2, "head_dim": 12, "mlp_bias": True},
    "a2d-qwen2": {"attention_bias": True, "tie_word_embeddings": False},
    "a2d-qwen3": {"use_qk_norm": True, "num_key_value_heads": 2, "head_dim": 12},
    "llama-bidirectional": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "qwen2-bidirectional": {"attention_bias": True},
    "qwen3-bidirectional": {"use_qk_norm": True},
    "diffullama": {"shift_logits": True},
    "dream": {"shift_logits": True, "attention_bias": True, "num_key_value_heads": 2},
    "llada": {"rope_precision": "float32", "tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    "sdar": {"use_qk_norm": True, "attention_block_size": 4, "tie_word_embeddings": False, "head_dim": 12},
}
LLADA = "model.transformer."
# LLaDA's names, and those of Llama in transformers, as the published checkpoints have them
NAMES = {
    "wte": "model.embed_tokens",
    "ln_f": "model.norm",
    "ff_out": "lm_head",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "attn_out": "self_attn.o_proj",
    "up_proj": "mlp.up_proj",
    **{f"{part}_proj": f"self_attn.{part}_proj" for part in "qkv"},
    "blocks.ff_out": "mlp.down_proj",
    "ff_proj": "mlp.gate_proj",
}


@pytest.fixture
def saved(tmp_path):
    """Saves a tiny model, and returns its folder."""

    def save(**overrides) -> Path:
        tiny_model(**overrides).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def refuse(model: Path, out: Path, *parts: str, **options) -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(ValueError) as error:
        export_checkpoint(model, out, **options)
    for part in parts:
        assert part in str(error.value)
    assert sorted(out.parent.iterdir()) == before


def as_llama(folder: Path) -> tuple[dict, dict]:
    """config.json and tensors of an exported folder in the words of transformers' classes."""
    config, weights = json.loads((folder / "config.json").read_text()), stored(folder)
    if config["model_type"] != "llada":
        return config, weights
    words = {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "mlp_hidden_size": "intermediate_size"}
    words |= {"n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "rms_norm_eps": "rms_norm_eps"}
    words |= {"vocab_size": "vocab_size", "rope_theta": "rope_theta", "weight_tying": "tie_word_embeddings"}
    renamed = {}
    for name, tensor in weights.items():
        prefix, module = "", name.removeprefix(LLADA).removesuffix(".weight")
        if module.startswith("blocks."):
            _, index, module = module.split(".")
            prefix, module = f"model.layers.{index}.", f"blocks.{module}" if module == "ff_out" else module
        renamed[f"{prefix}{NAMES[module]}.weight"] = tensor
    return {word: config[name] for name, word in words.items()} | {"block_size": None}, renamed


def transformers_logits(folder: Path, reference: str, ids: torch.Tensor, is_native: bool) -> torch.Tensor:
    """In float64, with "float32" as another name of it, so that the norms do not round."""
    settings, weights = as_llama(folder)
    with computing_in("f64"):
        ignored = ("architectures", "model_type", "torch_dtype", "auto_map")
        config = getattr(transformers, f"{reference}Config")(
            **{name: value for name, value in settings.items() if name not in ignored}
        )
        config._attn_implementation = "sdpa"
        model = getattr(transformers, f"{reference}ForCausalLM")(config).eval()
        missing = model.load_state_dict({name: t.double() for name, t in weights.items()}, strict=False)
        assert not missing.unexpected_keys
        assert set(missing.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
        model.tie_weights()
        if is_native:  # `is_causal` in its config
            return logits_of(model, ids)
        block = torch.arange(ids.shape[1]) // (settings.get("block_size") or ids.shape[1])
        mask = torch.zeros(1, 1, len(block), len(block)).masked_fill(block[:, None] < block, -1e300)
        return logits_of(model, ids, attention_mask=mask)


@pytest.mark.parametrize("num_loops", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_every_format_computes_what_the_loops_do(name, num_loops, saved, tmp_path):
    model, ids = saved(**MODELS[name]), random_ids(2, 12)
    record = export_checkpoint(model, tmp_path / "out", num_loops=num_loops, format=name)
    assert record["layers_from"] == [0, *[1, 2] * num_loops, 3]
    # The looped model, in float64 too
    weights = {key: tensor.double() for key, tensor in stored(model).items()}
    with computing_in("f64"):
        looped = LoopMDMForMaskedLM(LoopMDMConfig.from_pretrained(model, dtype=torch.float64)).eval()
        looped.load_state_dict(weights, strict=False)
        looped.tie_weights()
        expected = logits_of(looped, ids, num_loops=num_loops)
    reference = formats()[name].reference or "Llama"
    found = transformers_logits(tmp_path / "out", reference, ids, name.endswith("-bidirectional"))
    if MODELS[name].get("shift_logits"):
        found = torch.cat((found[:, :1], found[:, :-1]), 1)
    found[..., MASK] = -torch.inf
    assert (scores(found) - scores(expected)).abs().max() < 1e-10
    # Converted back: the plain model, with the same tokens
    family = name if name == "diffullama" else None
    convert_checkpoint(tmp_path / "out", tmp_path / "back", family=family)
    back = LoopMDMForMaskedLM.from_pretrained(tmp_path / "back", dtype=torch.float64).eval()
    source = LoopMDMForMaskedLM.from_pretrained(model, dtype=torch.float64).eval()
    again = logits_of(back, ids, num_loops=1)
    assert (scores(again) - scores(logits_of(source, ids, num_loops=num_loops))).abs().max() < 1e-10
    assert (back.config.pad_token_id, back.config.shift_logits) == (0, source.config.shift_logits)


def test_formats_are_those_that_are_tested():
    assert formats().keys() == MODELS.keys()


@pytest.mark.parametrize("name", ["llada", "dream", "a2d_qwen3", "sdar"])
def test_a_converted_model_goes_back_to_the_format_that_it_came_from(name, tmp_path):
    convert(name, tmp_path / "looped", loop_start=1, loop_end=3)
    record = export_checkpoint(tmp_path / "looped", tmp_path / "out", num_loops=1)
    assert record["format"] == name.replace("_", "-")
    # At one loop the very tensors of the source
    source, written = stored(Path(__file__).parent / "fixtures" / name), stored(tmp_path / "out")
    assert all(torch.equal(source[key], tensor) for key, tensor in written.items())
    ignored = {key for key in source.keys() - written.keys() if "inv_freq" not in key}
    assert ignored <= {"lm_head.weight"}


def test_missing_biases_are_zeros(saved, tmp_path):
    record = export_checkpoint(saved(), tmp_path / "out", num_loops=2, format="qwen2-bidirectional", verify=True)
    biases = [tensor for name, tensor in stored(tmp_path / "out").items() if name.endswith("bias")]
    assert len(biases) == 3 * 6 and not any(bias.any() for bias in biases)
    for found, limit in zip(record["verification"], (1e-10, 5e-5), strict=True):
        assert found["max_difference"] < limit * found["max_logit"]


def test_verification_notices_wrong_weights_and_leaves_nothing(saved, tmp_path, monkeypatch):
    model = saved()
    wrong = lambda name: Recipe((name,), "almost a copy", lambda tensor: tensor * 1.001)  # noqa: E731
    monkeypatch.setattr("loopmdm.convert.unroll.copy", wrong)
    refuse(model, tmp_path / "out", "differs from the source by", num_loops=2, verify=True)


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_llada_with_biases_and_layer_norm(tie_word_embeddings, saved, tmp_path):
    options = {"norm_type": "layernorm", "rms_norm_eps": 1e-5, "attention_output_bias": True, "hidden_act": "gelu"}
    model = saved(**options, tie_word_embeddings=tie_word_embeddings)
    (found,) = export_checkpoint(model, tmp_path / "out", num_loops=2, format="llada", verify=True)["verification"]
    assert found["max_difference"] < 1e-10 * found["max_logit"]


def test_the_nearest_format_is_found(saved, tmp_path):
    for index, (overrides, name) in enumerate(
        [({"use_qk_norm": True}, "a2d-qwen3"), ({}, "a2d-llama"), ({"shift_logits": True}, "diffullama")]
    ):
        assert export_checkpoint(saved(**overrides), tmp_path / str(index), num_loops=1)["format"] == name
    message = "No format expresses {}: none can express `use_gated_mlp` False. Write ONNX graphs instead"
    model = saved(use_gated_mlp=False, position_embedding_type="rope")
    refuse(model, tmp_path / "out", message.format(model), num_loops=1)


@pytest.mark.parametrize(
    ("name", "overrides", "property"),
    [
        ("llada", {"use_qk_norm": True}, "use_qk_norm"),
        ("llada", {"shift_logits": True}, "shift_logits"),
        ("llada", {"head_dim": 12}, "head_dim"),
        ("llada", {"hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ("llada", {"norm_type": "layernorm", "rms_norm_eps": 1e-3}, "rms_norm_eps"),
        ("llada", {"lm_head_bias": True}, "lm_head_bias"),
        ("llada", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_parameters"),
        ("dream", {}, "shift_logits"),
        ("dream", {"shift_logits": True, "head_dim": 12}, "head_dim"),
        ("dream", {"shift_logits": True, "attention_output_bias": True}, "attention_output_bias"),
        ("a2d-qwen3", {}, "use_qk_norm"),
        ("a2d-llama", {"rope_precision": "bfloat16"}, "rope_precision"),
        ("a2d-llama", {"attention_block_size": 4}, "attention_block_size"),
        ("a2d-llama", {"norm_type": "layernorm"}, "norm_type"),
        ("a2d-llama", {"position_embedding_type": "learned"}, "position_embedding_type"),
        ("a2d-llama", {"use_gated_mlp": False}, "use_gated_mlp"),
        ("a2d-llama", {"lm_head_bias": True}, "lm_head_bias"),
        ("a2d-qwen2", {"mlp_bias": True, "attention_bias": True}, "mlp_bias"),
        ("sdar", {"use_qk_norm": True}, "attention_block_size"),
    ],
)
def test_what_a_format_cannot_express_is_refused_by_name(name, overrides, property, saved, tmp_path):
    refuse(
        saved(**overrides), tmp_path / "out", f"The format {name} cannot express", property, num_loops=2, format=name
    )


def test_wrong_numbers_of_loops_are_refused(saved, tmp_path):
    model = saved()
    for wrong in (0, -1, 10_001, True, [1, 2], 2.0):
        refuse(model, tmp_path / "out", "num_loops", num_loops=wrong)
    refuse(model, tmp_path / "out", "give `num_loops`", num_loops=None)
    refuse(model, tmp_path / "out", "Take fewer loops", num_loops=6000)
    assert "--num-loops" in refusal("export", model, tmp_path / "out", "--num-loops", "1,2")
    assert "give --num-loops" in refusal("export", model, tmp_path / "out")


def test_a_trained_model_is_exported(tmp_path):
    """The Trainer leaves `use_cache: false` in its config."""
    model = tiny_model(use_qk_norm=True)
    arguments = transformers.TrainingArguments(tmp_path / "run", use_cpu=True, report_to=[])
    transformers.Trainer(model, arguments).save_model(tmp_path / "trained")
    assert not LoopMDMConfig.from_pretrained(tmp_path / "trained").use_cache
    export_checkpoint(tmp_path / "trained", tmp_path / "out", num_loops=2, format="a2d-qwen3")
    convert_checkpoint(tmp_path / "out", tmp_path / "back")
    ids = random_ids(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            LoopMDMForMaskedLM.from_pretrained(tmp_path / "back")(ids).logits, model(ids, num_loops=2).logits
        )


def test_other_models_are_refused(saved, tmp_path):
    damped = saved(loop_update="damped")
    refuse(damped, tmp_path / "out", "damped", "`loop_update`", num_loops=2)
    assert export_checkpoint(damped, tmp_path / "plain", num_loops=1)["layers"] == 4
    refuse(damped, tmp_path / "out", "There is no format 'gguf'", num_loops=1, format="gguf")
    refuse(tmp_path / "plain", tmp_path / "out", "is not a LoopMDM", num_loops=1)
    refuse(damped, tmp_path / "plain", "exists already", num_loops=1)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(damped)}))
    (adapter / "adapter_model.safetensors").touch()
    refuse(adapter, tmp_path / "out", "is an adapter", "merge_adapter", num_loops=1)


def test_weights_that_do_not_fit_are_refused(saved, tmp_path):
    model = saved()
    settings = json.loads((model / "config.json").read_text())
    for changes, part in (({"intermediate_size": 40}, "asks for"), ({"num_hidden_layers": 3}, "no place for")):
        (model / "config.json").write_text(json.dumps(settings | changes))
        refuse(model, tmp_path / "out", part, num_loops=2)


def test_the_command_writes_shards_a_tokenizer_and_a_card(saved, tmp_path):
    model, out = saved(use_qk_norm=True, bos_token_id=3), tmp_path / "out"
    LoopMDMGenerationConfig(eos_token_id=[1, 5]).save_pretrained(model)  # a turn end that training has learnt
    save_tokenizer(model, MASK, extra=("<|mask|>",), mask="<|mask|>", pad="w0")
    (model / "LICENSE").write_text("Do as you like.")
    shown = run(
        "export", model, out, "--num-loops", 3, "--format", "a2d-qwen3", "--max-shard-size", "20KB", "--verify"
    )
    assert "a2d-qwen3 model of 8 layers" in " ".join(shown.split()) and "float64" in shown
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 8 and max(shard.stat().st_size for shard in shards) < 25_000
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored(out).keys()
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["A2DQwen3LMHeadModel"] and config["num_hidden_layers"] == 8
    assert (config["mask_token_id"], config["bos_token_id"], config["torch_dtype"]) == (MASK, 3, "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, config=transformers.PreTrainedConfig())
    assert tokenizer.mask_token_id == MASK
    settings = json.loads((out / "generation_config.json").read_text())
    assert (settings["pad_token_id"], settings["eos_token_id"], config["eos_token_id"]) == (0, [1, 5], [1, 5])
    card = (out / "README.md").read_text()
    assert "3 loops as layers" in card and "float64" in card and (out / "LICENSE").exists()
    assert json.loads((out / "export.json").read_text())["num_loops"] == 3
