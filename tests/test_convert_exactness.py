# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
A converted checkpoint computes what its source computes: against logits and tokens that the authors' own code gave,
bit for bit against transformers' classes, and, so that these comparisons are known to notice a mistake, against
conversions that are wrong on purpose. And it works as a model: loops, `generate`, LoRA, loading without the package.
"""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest
import torch
import transformers
from conversion import (
    FIXTURES,
    NAMES,
    PADDED,
    SHIFTED,
    TOLERANCES,
    build,
    convert,
    edited,
    largest_difference,
    load,
    logits_of,
    meta,
    open_fixture,
    plan_fixture,
    references,
    stored,
)
from transformers.models.llama import modeling_llama

from loopmdm.commit_rules import COMMIT_RULES, DenoisingStep
from loopmdm.convert import Plan, Recipe, convert_checkpoint

ROOT = Path(__file__).parents[1]
fixtures = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Callable[[str], Path]:
    """The folder that a fixture is converted to, once."""
    root = tmp_path_factory.mktemp("converted")

    def get(name: str) -> Path:
        if not (root / name).exists():
            convert(name, root / name)
        return root / name

    return get


# The source's logits


@fixtures
def test_a_converted_folder_gives_the_sources_logits(converted, name):
    model, ids = load(converted(name)), references(name)["input_ids"]
    config, num_layers = model.config, model.config.num_hidden_layers
    assert (model.dtype, config.mask_token_id) == (torch.float32, meta(name)["mask_token_id"])
    assert config.shift_logits == meta(name)["shifted_logits"]
    assert largest_difference(model, name, "f32") <= TOLERANCES["f32"]
    # At one loop it is the same wherever the layers are split.
    plain = logits_of(model, ids, num_loops=1)
    assert (plain.softmax(-1)[..., config.mask_token_id] == 0).all()
    for config.loop_update in ("replace", "damped"):
        for config.loop_start, config.loop_end in combinations(range(num_layers + 1), 2):
            assert torch.equal(logits_of(model, ids, num_loops=1), plain)
        assert (logits_of(model, ids, num_loops=2) - plain).nan_to_num().abs().max() > 0.1


@fixtures
def test_a_plan_gives_the_sources_logits_in_float64(name):
    """Rounding hides nothing here. The plan's recipes are applied in float64 too, where a folder holds float32."""
    assert largest_difference(build(plan_fixture(name), "f64"), name, "f64") <= TOLERANCES["f64"]


@pytest.mark.parametrize("name", [name for name in NAMES if "config_transformers5" in meta(name)])
def test_transformers_5_spelling_of_the_config_is_the_same(name):
    source = open_fixture(name)
    source.config = meta(name)["config_transformers5"] | {"architectures": source.architectures}
    assert "rope_theta" not in source.config
    assert largest_difference(build(plan_fixture(name, source), "f64"), name, "f64") <= TOLERANCES["f64"]


# Bit for bit, in bfloat16

SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    "tie_word_embeddings",
)


def transformers_reference(reference: str, folder: Path):
    """A converted folder's tensors, whose names are Llama's, in transformers' own class, in bfloat16."""
    ours = json.loads((folder / "config.json").read_text())
    config = getattr(transformers, f"{reference}Config")(**{key: ours[key] for key in SETTINGS})
    config._attn_implementation = "sdpa"
    model, loaded = getattr(transformers, f"{reference}ForCausalLM").from_pretrained(
        None, config=config, state_dict=stored(folder), dtype=torch.bfloat16, output_loading_info=True
    )
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    return model.eval()


def rotate_in_float32(monkeypatch):
    """Makes transformers' Llama rotate as LLaDA's code does with `rope_full_precision`."""
    apply, rotary = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaRotaryEmbedding.forward

    def apply_in_float32(query, key, cos, sin, **kwargs):
        assert cos.dtype == torch.float32
        return tuple(part.to(query.dtype) for part in apply(query.float(), key.float(), cos, sin, **kwargs))

    def in_float32(self, states, *args, **kwargs):
        return rotary(self, states.float(), *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", apply_in_float32)
    monkeypatch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", in_float32)


@pytest.mark.parametrize(
    ("name", "reference", "changes"),
    [
        ("a2d_llama3", "Llama", {}),
        ("a2d_qwen3", "Qwen3", {}),
        ("dream", "Qwen2", {}),
        ("sdar", "Qwen3", {}),
        ("llada", "Llama", {"rope_full_precision": True}),
        ("llada", "Llama", {"rope_full_precision": False}),
    ],
)
def test_bfloat16_logits_are_transformers_bit_for_bit(name, reference, changes, src, out, monkeypatch):
    options = {"mask_token_id": meta(name)["mask_token_id"], "dtype": "bfloat16"}
    convert_checkpoint(edited(name, src, config=changes), out, **options)
    model, ids = load(out), references(name)["input_ids"]
    if changes.get("rope_full_precision"):
        rotate_in_float32(monkeypatch)
    # Without a 4-D mask of its own, transformers would make a causal one.
    block = torch.arange(ids.shape[1]) // (model.config.attention_block_size or ids.shape[1])
    mask = torch.zeros(1, 1, len(block), len(block), dtype=torch.bfloat16)
    mask = mask.masked_fill(block[:, None] < block, torch.finfo(torch.bfloat16).min)
    expected = logits_of(transformers_reference(reference, out), ids, attention_mask=mask)
    assert expected.dtype == torch.bfloat16
    if model.config.shift_logits:
        expected = torch.cat((expected[:, :1], expected[:, :-1]), dim=1)
    columns = [index for index in range(expected.shape[-1]) if index != model.config.mask_token_id]
    assert torch.equal(logits_of(model, ids, num_loops=1)[..., columns], expected[..., columns])
    # The comparison sees in what precision is rotated.
    model.config.rope_precision = "model" if model.config.rope_precision == "float32" else "float32"
    assert not torch.equal(logits_of(model, ids, num_loops=1)[..., columns], expected[..., columns])


# Wrong on purpose

Change = Callable[[Plan], None]


def each(ending: str, make: Callable[[Recipe], Recipe]) -> Change:
    """Other recipes for all tensors of the result whose names end so."""

    def change(plan):
        targets = [target for target in plan.recipes if target.endswith(ending)]
        assert targets
        plan.recipes |= {target: make(plan.recipes[target]) for target in targets}

    return change


def raw(ending: str) -> Change:
    """What is computed from a source tensor is replaced by that tensor."""
    return each(ending, lambda recipe: Recipe(recipe.sources, "", lambda tensor, *others: tensor))


def zero(ending: str) -> Change:
    def make(recipe):
        return Recipe(recipe.sources, "", lambda *tensors: torch.zeros_like(recipe.compute(*tensors)))

    return each(ending, make)


def swap(first: str, second: str) -> Change:
    def change(plan):
        targets = [target for target in plan.recipes if first in target]
        assert targets
        for target in targets:
            other = target.replace(first, second)
            plan.recipes[target], plan.recipes[other] = plan.recipes[other], plan.recipes[target]

    return change


def settings(**values) -> Change:
    """Other values in the result's configuration."""

    def change(plan):
        for name, value in values.items():
            assert getattr(plan.config, name) != value
            setattr(plan.config, name, value)

    return change


def without(*endings: str, **values) -> Change:
    def change(plan):
        before = len(plan.recipes)
        plan.recipes = {target: recipe for target, recipe in plan.recipes.items() if not target.endswith(endings)}
        assert len(plan.recipes) < before
        settings(**values)(plan)

    return change


def theta(value: float) -> Change:
    return settings(rope_parameters={"rope_type": "default", "rope_theta": value})


def interleave_rotary_rows(plan: Plan) -> None:
    """What is right for checkpoints that rotate feature 2i with 2i + 1 (Meta's own Llama files)."""

    def make(recipe):
        def compute(*tensors):
            heads = recipe.compute(*tensors).unflatten(0, (-1, plan.config.head_dim // 2, 2))
            return heads.transpose(1, 2).flatten(0, 2)

        return Recipe(recipe.sources, "", compute)

    for part in "qk":
        each(f"{part}_proj.weight", make)(plan)


def read_heads_side_by_side(plan: Plan) -> None:
    size = plan.config.hidden_size
    for index, part in enumerate("qkv"):

        def make(recipe, start=index * size):
            return Recipe(recipe.sources, "", lambda tensor: tensor[start : start + size])

        each(f"{part}_proj.weight", make)(plan)


WRONG_PLANS: dict[str, tuple[Change, str]] = {
    "rotary rows interleaved": (interleave_rotary_rows, "llada mdlm_hf"),
    "gate and up swapped": (swap("gate_proj", "up_proj"), "llada llada_gqa_tied llada_seq_swiglu smdm"),
    "norms swapped": (swap("input_layernorm", "post_attention_layernorm"), "llada"),
    "layers in another order": (swap("model.layers.0.", "model.layers.1."), "llada_seq_swiglu"),
    "theta 1e4": (theta(1e4), "llada dream"),
    "theta 5e5, no scaling": (theta(5e5), "diffullama a2d_llama3"),
    "epsilon 1e-6": (settings(rms_norm_eps=1e-6), "llada illada diffullama smdm mdlm_hf diffugpt"),
    "epsilon 1e-5": (settings(rms_norm_eps=1e-5), "llada_seq_swiglu dream a2d_llama3"),
    "biases dropped": (
        without("q_proj.bias", "k_proj.bias", "v_proj.bias", attention_bias=False),
        "dream fast_dllm_v2 open_dcoder llada_gqa_tied",
    ),
    "query and key norm dropped": (without("q_norm.weight", "k_norm.weight", use_qk_norm=False), "a2d_qwen3 sdar"),
    "block mask ignored": (settings(attention_block_size=None), "sdar bd3lm fast_dllm_v2"),
    "blocks of another size": (settings(attention_block_size=5), "bd3lm_noadaln"),
    "heads side by side": (read_heads_side_by_side, "smdm"),
    "exact rotary tables": (settings(rope_precision="model"), "smdm"),
    "tanh gelu for erf": (settings(hidden_act="gelu_pytorch_tanh"), "llada_layernorm_plain llada_gqa_tied"),
    "erf gelu for tanh": (settings(hidden_act="gelu"), "mdlm_hf radd diffugpt"),
    "shift dropped": (zero("input_layernorm.bias"), "mdlm_hf radd"),
    "last shift dropped": (zero("model.norm.bias"), "bd3lm"),
    "scale dropped": (raw("post_attention_layernorm.weight"), "mdlm_hf"),
    "gate dropped": (raw("o_proj.weight"), "mdlm_hf"),
    "gate dropped from a bias": (raw("down_proj.bias"), "udlm_hf"),
    "norm bias dropped": (zero("post_attention_layernorm.bias"), "llada_layernorm_plain"),
    "output bias dropped": (zero("o_proj.bias"), "llada_layernorm_plain"),
    "head bias dropped": (zero("lm_head.bias"), "llada_layernorm_plain"),
    "gemma's 1 not added": (raw("layernorm.weight"), "llada_scaled"),
    "gemma's 1 not added to the last norm": (raw("model.norm.weight"), "llada_scaled"),
    "embedding scale dropped": (raw("embed_tokens.weight"), "llada_scaled"),
    "logit scale dropped": (raw("lm_head.weight"), "llada_scaled"),
    "square matrix not transposed": (raw("o_proj.weight"), "diffugpt"),
    "positions dropped": (zero("embed_positions.weight"), "diffugpt"),
    "logits not shifted": (settings(shift_logits=False), " ".join(SHIFTED)),
    "logits shifted": (settings(shift_logits=True), "llada a2d_qwen3 mdlm_hf radd sdar smdm"),
}


@pytest.mark.parametrize(
    ("what", "name"), [(what, name) for what, (_, names) in WRONG_PLANS.items() for name in names.split()]
)
def test_wrong_plans_are_noticed(what, name):
    """In float32; the tolerance in float64 is stricter by far."""
    plan = plan_fixture(name)
    WRONG_PLANS[what][0](plan)
    assert largest_difference(build(plan, "f32"), name, "f32") > TOLERANCES["f32"]


def at_sigma(value: float) -> Callable:
    """MDLM's code sets the level to 0; the reference logits were made with 0.37 given."""

    def change(source):
        source.config["time_conditioning"], source.sigma = True, value

    return change


def without_theta(source) -> None:
    source.config["rope_parameters"] = {"rope_type": "default"}
    del source.config["rope_theta"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("udlm_hf", at_sigma(0.38)),
        ("mdlm_hf", at_sigma(0.37)),
        ("bd3lm", at_sigma(0.37)),
        ("mdlm_ckpt", lambda source: source.extras.pop("ema")),
        ("dream", without_theta),
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


# A converted folder as a model


def test_a_folder_holds_what_save_pretrained_writes(converted, tmp_path):
    """So it loads without the package, as any other folder. In addition it has the record."""
    folder = converted("dream")
    load(folder).save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {path.name for path in folder.iterdir()} == files | {"conversion.json", "README.md"}
    for file in files - {"model.safetensors", "generation_config.json"}:
        assert (folder / file).read_text() == (tmp_path / file).read_text(), file


@fixtures
def test_a_folder_is_recorded(converted, name):
    folder = converted(name)

    model, tensors = load(folder), stored(folder)
    state = model.state_dict()
    assert tensors.keys() == state.keys() - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, state[key]) for key, tensor in tensors.items())

    record, source = json.loads((folder / "conversion.json").read_text()), open_fixture(name)
    family = plan_fixture(name, source).family  # which gives LLaDA's layers other names
    assert record["tensors"].keys() == tensors.keys()
    used = {tensor for entry in record["tensors"].values() for tensor in entry["from"]}
    ignored = set(record["ignored"])
    assert used | ignored | set(record["copies"]) == source.tensors.keys()
    assert not used & ignored
    assert all(tensor.endswith("inv_freq") or "sampling_eps" in tensor for tensor in ignored)
    assert all(entry["how"] for entry in record["tensors"].values())
    assert (record["family"], record["layers"]) == (family.name, len(model.model.layers))
    assert record["special_tokens"]["mask_token_id"] == meta(name)["mask_token_id"]
    start, end = model.config.loop_start, model.config.loop_end
    counts = record["parameters"]
    for part, cut in (("head", slice(start)), ("mid", slice(start, end)), ("tail", slice(end, None))):
        assert counts[part] == sum(parameter.numel() for parameter in model.model.layers[cut].parameters()), part
    assert counts["total"] == model.num_parameters() == sum(counts.values()) - counts["total"]


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


@pytest.mark.parametrize("run", SAMPLERS["llada"])
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


@pytest.mark.parametrize("run", SAMPLERS["dream"], ids=lambda run: run["alg"])
def test_commit_rules_choose_what_dreams_sampler_does(converted, run):
    """
    Dream's schedule is another, so each of its steps is taken from the state before it, with its own count. Its rules
    see the probability of [MASK] too, which `generate` takes away beforehand: that turns one close choice of these
    runs.
    """
    model, mask_token = load(converted(run["checkpoint"])), run["mask_token_id"]
    rule = COMMIT_RULES[DREAM_RULES[run["alg"]]]()
    new = torch.full((len(run["prompt"]), run["max_new_tokens"]), mask_token)
    state = torch.cat((torch.tensor(run["prompt"]), new), dim=1)
    for after, count in zip(run["history"], run["committed_per_step"], strict=True):
        with torch.no_grad():
            logits = model.lm_head(model.align(model.model(state, num_loops=1).last_hidden_state, None))
        masked = state == mask_token
        step = DenoisingStep(
            index=0,
            row_list=list(range(len(state))),
            rows=torch.arange(len(state)),
            columns=torch.arange(state.shape[1]).expand(state.shape),
            masked=masked,
            counted=masked,
            size=masked.sum(-1),
            num_steps=torch.ones(len(state), dtype=torch.long),
            remask_probability=0.0,
            noise=lambda: pytest.fail("none of these rules draws"),
            logits=logits,
            tokens=logits.argmax(-1),
        )
        commit = step.best(rule.score(step), torch.tensor(count))
        state = state.where(~commit, step.tokens)
        assert state.tolist() == after
    assert state.tolist() == run["sequences"]
