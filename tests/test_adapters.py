# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Adapters in place of models: loaded, measured, calibrated, trained on; and which layers a new one sits on."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from commands import refusal, run
from evaluation_models import save_looped, word_tokenizer
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from test_snippets import ROOT, examples_of
from tiny import tiny_config, tiny_model
from training_runs import run_writer
from transformers.utils import logging

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM, LoopMDMGenerationConfig
from loopmdm.convert import merge, merge_adapter
from loopmdm.data import load_tokenizer
from loopmdm.data.pretrained import MERGE
from loopmdm.evaluation import measure_dynamics, nelbo
from loopmdm.evaluation.loading import load_model, read_generation_config, read_model_config
from loopmdm.training import LoopMDMTrainer, lora_config
from loopmdm.training.run import read_config, train

IDS = torch.tensor([[4, 5, 2, 7]])


def save_adapter(base: str, folder: Path, **options) -> str:
    """A LoRA that changes the base model, as peft saves it: without config, tokenizer and settings."""
    model = LoopMDMForMaskedLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    logging.disable_progress_bar()  # on stderr, where refusals are looked for
    return save_looped(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> str:
    return save_adapter(base, tmp_path_factory.mktemp("models") / "adapter")


@torch.no_grad()
def expected_logits(base: str, adapter: str) -> torch.Tensor:
    model = PeftModel.from_pretrained(LoopMDMForMaskedLM.from_pretrained(base), adapter).eval()
    return model(IDS).logits


@torch.no_grad()
def test_an_adapter_is_loaded_with_its_base(base, adapter):
    model = load_model(adapter)
    assert torch.equal(model(IDS).logits, expected_logits(base, adapter)) and not model.training
    assert not torch.equal(model(IDS).logits, load_model(base)(IDS).logits)
    assert read_model_config(adapter).to_dict() == read_model_config(base).to_dict()
    assert load_tokenizer(adapter).get_vocab() == load_tokenizer(base).get_vocab(), "that of the base"


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "down_proj"], use_dora=True, init_lora_weights=False),
        LoraConfig(target_modules=["q_proj"], use_rslora=True, modules_to_save=["lm_head"], init_lora_weights=False),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [4, 5]}),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
        AdaLoraConfig(target_modules=["q_proj"], init_lora_weights=False, total_step=9, tinit=1, tfinal=1),
        LoHaConfig(target_modules=["q_proj"], init_weights=False),
        OFTConfig(target_modules=["q_proj"], oft_block_size=4, init_weights=False),
        VeraConfig(target_modules=["q_proj"], r=4, init_weights=False),
        VBLoRAConfig(target_modules=["q_proj"], r=4, num_vectors=8, vector_length=4),
    ],
    ids=lambda config: config.peft_type.value,
)
@pytest.mark.parametrize("tied", [False, True])
def test_adapters_of_other_kinds_are_loaded(base, tmp_path, config, tied):
    place = save_looped(tmp_path / "tied", tie_word_embeddings=True) if tied else base
    model = get_peft_model(LoopMDMForMaskedLM.from_pretrained(place), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.full_like(parameter, 0.01))
        expected = model(IDS).logits
        model.save_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(load_model(str(tmp_path / "adapter"))(IDS).logits, expected)


def test_an_adapter_with_other_tensors_is_refused(base, adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "own")
    settings, tensors = own / "adapter_config.json", load_file(own / "adapter_model.safetensors")
    content = json.loads(settings.read_text())
    for targets in (["q_proj"], ["q_proj", "v_proj", "k_proj"]):
        settings.write_text(json.dumps(content | {"target_modules": targets}))
        for load in (load_model, lambda own: merge_adapter(own, tmp_path / "new")):
            with pytest.raises(ValueError, match=r"are not those of its adapter_config.json and its base model \("):
                load(str(own))
    settings.write_text(json.dumps(content))
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:, :-1].clone()}, own / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit its base model: .*size mismatch"):
        load_model(str(own))


def test_settings_saved_with_an_adapter_win(base, adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "own")
    assert read_generation_config(adapter).eos_token_id == 1 == load_model(adapter).generation_config.eos_token_id
    LoopMDMGenerationConfig(eos_token_id=[1, 9], num_loops=2).save_pretrained(own)
    for settings in (read_generation_config(str(own)), load_model(str(own)).generation_config):
        assert (settings.eos_token_id, settings.num_loops) == ([1, 9], 2)


def test_commands_take_adapters(base, adapter, tmp_path):
    def tokens(model: str) -> str:
        return run("generate", model, "w1 w2", "--max-new-tokens", 6, "--num-loops", 2)

    assert tokens(adapter) != tokens(base)
    facts = json.loads(run("info", adapter, "--json"))
    assert facts["adapter of"] == base and facts["layers"] == 4
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5\n")
    options = ("--text", tmp_path / "text.txt", "--num-loops", 2, "--num-samples", 4)
    run("eval", "likelihood", adapter, *options, "--output", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    with torch.no_grad():
        estimate = nelbo(load_model(adapter), torch.tensor([[4, 5, 6, 7, 8]]), num_loops=2, num_samples=4)
    assert record["results"][0]["nats_per_token"] == pytest.approx(estimate.per_token()[0].item(), rel=1e-4)
    protocol = record["protocol"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= protocol["model"]["sha256"].keys()
    assert protocol["base_model"]["source"] == base and "model.safetensors" in protocol["base_model"]["sha256"]


def test_calibration_writes_into_the_folder_of_an_adapter(adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "own")
    (tmp_path / "data.jsonl").write_text('{"prompt": "w1", "answer": "w2 w3"}\n' * 8)
    options = ("--num-loops", 2, "--max-loss", 1, "--quality", "agreement")
    run("calibrate", own, "--data", tmp_path / "data.jsonl", *options)
    settings = json.loads((own / "generation_config.json").read_text())
    assert settings["num_loops"] == 1 and settings["eos_token_id"] == 1, "those of the base, with the loops chosen"
    assert load_model(str(own)).generation_config.num_loops == 1


def test_lm_eval_takes_adapters(base, adapter):
    lm_eval_model = pytest.importorskip("loopmdm.evaluation.lm_eval_model")
    lm = lm_eval_model.LoopMDMEvalModel(adapter, num_samples=2, device="cpu")
    with torch.no_grad():
        assert torch.equal(lm.model(IDS).logits, expected_logits(base, adapter))
    assert lm.tok_encode("w1 w2") == [4, 5]


def test_adapters_are_not_converted_but_merged(base, adapter, tmp_path):
    message = refusal("convert", adapter, tmp_path / "out")
    assert "is an adapter, not a whole model" in message and f"`{MERGE.format(adapter)}`" in message
    assert not (tmp_path / "out").exists()
    merged = tmp_path / "merged"
    exec("import loopmdm.convert\n" + MERGE.format(adapter).replace('"merged"', f'"{merged}"'))
    with torch.no_grad():
        found = LoopMDMForMaskedLM.from_pretrained(merged)(IDS).logits
    torch.testing.assert_close(found, expected_logits(base, adapter))
    assert read_generation_config(str(merged)).eos_token_id == 1, "that of the base"
    assert load_tokenizer(str(merged)).get_vocab() == load_tokenizer(base).get_vocab()


def test_a_merge_as_documented_keeps_what_the_adapter_learnt(run_file, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained("tokenizer")
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    path = run_file(output="few-loops", tokenizer="tokenizer", lora={"r": 2})
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    train(read_config(path))
    (tmp_path / "data.jsonl").write_text('{"prompt": "w1", "answer": "w2 w3"}\n' * 8)
    options = ("--num-loops", 2, "--max-loss", 1, "--quality", "agreement")
    run("calibrate", "few-loops", "--data", "data.jsonl", *options)
    (code,) = [example.code for example in examples_of(ROOT / "docs/adapt.md") if "merge" in example.code]
    exec(code, {})
    merged = LoopMDMForMaskedLM.from_pretrained("merged")
    assert merged.generation_config.eos_token_id == [1, tokenizer.convert_tokens_to_ids("w9")]
    assert merged.generation_config.num_loops == 1, "as calibrated"
    assert load_tokenizer("merged").chat_template == CHAT != load_tokenizer(base).chat_template
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, load_model("few-loops")(IDS).logits)
    assert not list(Path("merged").glob("adapter*"))
    for file in ("few-loops/adapter_model.safetensors", "merged/model.safetensors"):
        assert Path(file).stat().st_mode & 0o044, "others may read what this user has made"
    for record in ("training.json", "loop_budget.json"):
        assert (Path("merged") / record).read_bytes() == (Path("few-loops") / record).read_bytes()
    card = (Path("merged") / "README.md").read_text()
    assert "# merged" in card and "## How it was made" in card and "Not measured yet" not in card


def test_a_merge_keeps_the_licence_of_the_base(base, tmp_path):
    """peft's own card of an adapter has no licence, and a folder as the base model."""
    licensed = shutil.copytree(base, tmp_path / "base")
    (licensed / "README.md").write_text("---\nlicense: other\nlicense_name: its-own\n---\nA model.\n")
    (licensed / "LICENSE").write_text("As you like.")
    model = get_peft_model(LoopMDMForMaskedLM.from_pretrained(licensed), lora_config(tiny_config(), r=2))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    card = (tmp_path / "merged/README.md").read_text()
    assert "license_name: its-own" in card and str(tmp_path) not in card
    assert (tmp_path / "merged/LICENSE").read_text() == "As you like."


def test_an_adapter_on_the_hub_is_merged_with_its_records_and_the_revision_of_its_base(
    base, adapter, tmp_path, monkeypatch
):
    """With a stand-in for the Hub: files of `me/adapter` and of `me/base` at a revision."""
    own = shutil.copytree(adapter, tmp_path / "adapter")
    record = json.loads((own / "adapter_config.json").read_text())
    asked = {"base_model_name_or_path": "me/base", "revision": "v2"}
    (own / "adapter_config.json").write_text(json.dumps(record | asked))
    (own / "training.json").write_text("{}")
    monkeypatch.setattr(merge, "locate", lambda name, what: str(own))
    monkeypatch.setattr(merge, "adapter_base", lambda name: {"me/adapter": "me/base"}.get(name))
    monkeypatch.setattr(merge, "load_tokenizer", lambda name, trust: load_tokenizer(base))
    monkeypatch.setattr(merge, "read_generation_config", lambda name: None)
    calls = []

    def load(name, **options):
        calls.append((name, options["revision"]))
        return load_model(base)

    monkeypatch.setattr(merge, "load_model", load)
    merge_adapter("me/adapter", tmp_path / "merged")
    assert calls == [("me/base", "v2")] and (tmp_path / "merged/training.json").read_text() == "{}"


def test_what_cannot_be_merged_is_named(base, adapter, tmp_path):
    tied = save_looped(tmp_path / "tied", tie_word_embeddings=True)
    untied = LoraConfig(target_modules=["lm_head"], modules_to_save=["embed_tokens"])
    for name, place, settings in (
        ("own", tied, untied),
        ("soft", base, SOFT[0]),
        ("ends", tied, LoraConfig(target_modules=["q_proj", "lm_head"])),
        ("late", base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5])),
    ):
        get_peft_model(LoopMDMForMaskedLM.from_pretrained(place), settings).save_pretrained(tmp_path / name)
    second = shutil.copytree(adapter, tmp_path / "second")
    settings = json.loads((second / "adapter_config.json").read_text()) | {"base_model_name_or_path": adapter}
    (second / "adapter_config.json").write_text(json.dumps(settings))
    for model, output, message in (
        (second, "new", "is an adapter itself; merge"),
        (tmp_path / "soft", "new", "holds soft prompts (PROMPT_TUNING), which no weights take up"),
        (tmp_path / "ends", "new", "adapts a weight that embeddings and head share (`tie_word_embeddings`)"),
        (tmp_path / "late", "new", f"peft cannot merge {tmp_path / 'late'}: "),
        (base, "new", "adapter_config.json"),
        (adapter, "soft", "exists already; name a new folder"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            merge_adapter(str(model), tmp_path / output)
    assert not (tmp_path / "new").exists()
    merge_adapter(tmp_path / "own", tmp_path / "new")  # its embeddings are its own
    assert not LoopMDMConfig.from_pretrained(tmp_path / "new").tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "nowhere"}, "nowhere, the base model in adapter_config.json of "),
        ({"base_model_name_or_path": "./nowhere"}, "./nowhere does not hold the base model of the adapter"),
        ({"base_model_name_or_path": None}, "does not name the adapter's model"),
        ("weights", "is an adapter without adapter_model.safetensors; only safetensors files are read"),
    ],
    ids=str,
)
def test_adapters_that_cannot_load_are_named(adapter, tmp_path, change, message):
    bad = shutil.copytree(adapter, tmp_path / "bad")
    if change == "weights":
        (bad / "adapter_model.safetensors").unlink()
    else:
        settings = json.loads((bad / "adapter_config.json").read_text())
        (bad / "adapter_config.json").write_text(json.dumps(settings | change))
    for command in (("info", bad), ("generate", bad, "w1")):
        assert message in refusal(*command)


# Soft prompts

SOFT = [
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
]


@pytest.mark.parametrize("config", SOFT, ids=lambda config: config.peft_type.value)
def test_soft_prompts_are_not_left_out(config):
    clean, plain = torch.tensor([[4, 5, 6]]), tiny_model()
    expected = nelbo(plain, clean, num_samples=2).nats
    model = get_peft_model(tiny_model(), config)
    for call in (
        lambda: nelbo(model, clean, num_samples=2),
        lambda: measure_dynamics(model, clean),
        lambda: LoopMDMTrainer(model),
    ):
        with pytest.raises(ValueError, match=f"is {config.peft_type.value}: its soft prompts act on the forward pass"):
            call()
    with model.disable_adapter():
        assert torch.equal(nelbo(model, clean, num_samples=2).nats, expected)


def test_commands_refuse_soft_prompts(base, tmp_path):
    get_peft_model(LoopMDMForMaskedLM.from_pretrained(base), SOFT[0]).save_pretrained(tmp_path / "soft")
    assert "is an adapter of soft prompts (PROMPT_TUNING)" in refusal("generate", tmp_path / "soft", "w1")


# Training


@pytest.fixture
def run_file(tmp_path, base):
    """Writes a run on answers: `run_file(key=value)`, see `run_writer`."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "w1 w2", "completion": "w3"}\n' * 8)
    trainer = {"max_steps": 2, "learning_rate": 0.05, "save_strategy": "no", "disable_tqdm": True}
    values = {"output": str(tmp_path / "out"), "model": base, "data": str(tmp_path / "a.jsonl"), "task": "answers"}
    return run_writer(tmp_path, {**values, "sequence_length": 16, "trainer": trainer})


def test_training_goes_on_from_an_adapter(run_file, base, adapter, tmp_path):
    before = expected_logits(base, adapter)
    train(read_config(run_file(model=adapter), ["trainer.learning_rate=1.0e-12"]))
    kept = expected_logits(base, str(tmp_path / "out"))
    torch.testing.assert_close(kept, before, msg="what was learnt is lost")
    train(read_config(run_file(model=adapter, output=str(tmp_path / "more"))))
    after = expected_logits(base, str(tmp_path / "more"))
    assert not torch.equal(after, before)
    assert json.loads((tmp_path / "more" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert not (tmp_path / "more" / "config.json").exists()


def test_an_adapter_that_is_trained_further_keeps_its_settings(run_file, adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "own")
    settings = {"num_loops": 1, "block_length": 8, "confidence_threshold": 0.9, "eos_token_id": [1, 5]}
    (own / "generation_config.json").write_text(json.dumps(settings))
    train(read_config(run_file(model=str(own))))
    found = load_model(str(tmp_path / "out")).generation_config
    assert (found.block_length, found.confidence_threshold, found.eos_token_id) == (8, 0.9, [1, 5])
    assert found.num_loops is None, "that was for the weights before"


def test_an_adapter_finds_its_base_from_other_folders(run_file, base, tmp_path, monkeypatch):
    """Its run names the base by a relative path, and another folder holds another model of that name."""
    shutil.copytree(base, tmp_path / "mine")
    save_looped(tmp_path / "elsewhere/mine", num_hidden_layers=5)
    monkeypatch.chdir(tmp_path)
    train(read_config(run_file(model="mine", lora={"r": 2})))
    monkeypatch.chdir("elsewhere")
    assert load_model(str(tmp_path / "out")).config.num_hidden_layers == 4
    shutil.move(tmp_path / "mine", tmp_path / "moved")
    message = f"{tmp_path / 'mine'} does not hold the base model of the adapter {tmp_path / 'out'}"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(str(tmp_path / "out"))


@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["whole", "adapter"])
def test_loops_that_were_chosen_for_other_weights_are_left_out(run_file, base, tmp_path, lora, caplog):
    calibrated = shutil.copytree(base, tmp_path / "calibrated")
    settings = {"num_loops": 1, "visible_loops": 1, "eos_token_id": 1}
    (calibrated / "generation_config.json").write_text(json.dumps(settings))
    logging.enable_propagation()
    try:
        train(read_config(run_file(model=str(calibrated), lora=lora, loops={"max_loops": 4})))
    finally:
        logging.disable_propagation()
    found = load_model(str(tmp_path / "out")).generation_config
    assert (found.num_loops, found.visible_loops, found.eos_token_id) == (None, None, 1)
    assert "`num_loops=1` of generation_config.json was for other weights" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"r": 2}}, "`lora` asks for another one on top. Leave `lora` out to go on training"),
        (
            {"model_config": {"loop_update": "damped"}},
            "`model_config` changes loop_update, which the folder of an adap",
        ),
        ({"tokenizer": "./nowhere"}, "./nowhere"),
        ({"tokenizer": "runs/of/mine"}, "runs/of/mine does not hold a tokenizer; it is not a folder"),
    ],
    ids=str,
)
def test_what_training_cannot_go_on_from_is_refused(run_file, adapter, tmp_path, changes, message):
    assert message in refusal("train", run_file(model=adapter, **changes))
    assert not (tmp_path / "out" / "training.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config": {"max_train_loops": 2}}, "`model_config` changes max_train_loops, which the folder of an"),
        (
            {"model": None, "model_config": {"hidden_size": 32, "num_attention_heads": 4}},
            "`lora` needs a `model`: an adapter is saved without",
        ),
    ],
    ids=str,
)
def test_what_an_adapter_would_not_hold_is_refused(run_file, base, changes, message):
    assert message in refusal("train", run_file(tokenizer=base, lora={"r": 2}, **changes))


def test_an_adapter_beside_a_whole_model_is_merged_first(run_file, base, adapter, tmp_path):
    both = shutil.copytree(base, tmp_path / "both")
    shutil.copytree(adapter, both, dirs_exist_ok=True)
    assert "holds an adapter beside a whole model; merge them" in refusal("train", run_file(model=str(both)))
    with torch.no_grad():
        assert torch.equal(load_model(str(both))(IDS).logits, expected_logits(base, adapter))
    merge_adapter(str(both), tmp_path / "merged")
    with torch.no_grad():
        found = LoopMDMForMaskedLM.from_pretrained(tmp_path / "merged")(IDS).logits
    torch.testing.assert_close(found, expected_logits(base, adapter))


def test_soft_prompts_are_not_trained(run_file, base, tmp_path):
    get_peft_model(LoopMDMForMaskedLM.from_pretrained(base), SOFT[0]).save_pretrained(tmp_path / "soft")
    assert "holds soft prompts, which the masked" in refusal("train", run_file(model=str(tmp_path / "soft")))


# Which tokens end an answer

CHAT = "{% for m in messages %} w{{ 7 if m['role'] == 'user' else 8 }} {{ m['content'] }} w9{% endfor %} w8"


@pytest.mark.parametrize(("lora", "steps"), [(None, 60), ({"r": 2}, 1)], ids=["all weights", "adapter"])
def test_a_turn_end_that_was_learnt_ends_generation(run_file, base, tmp_path, lora, steps):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    path = run_file(tokenizer=str(tmp_path / "tokenizer"), lora=lora)
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    train(read_config(path, [f"trainer.max_steps={steps}", "trainer.learning_rate=0.02", "loops.max_loops=3"]))
    end = tokenizer.convert_tokens_to_ids("w9")
    model = load_model(str(tmp_path / "out"))
    assert model.generation_config.eos_token_id == [1, end], "that of the model, and what was learnt"
    if lora is not None:  # one step does not teach the answer
        return
    prompt = torch.tensor([tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]])
    made = model.generate(prompt, max_new_tokens=6)[0, prompt.shape[1] :]
    assert tokenizer.convert_ids_to_tokens(made) == ["w2", "w9", "<pad>", "<pad>", "<pad>", "<pad>"]


def test_the_end_of_plain_answers_is_an_end_token(run_file, tmp_path):
    base = save_looped(tmp_path / "endless", eos_token_id=None)
    assert load_model(base).generation_config.eos_token_id is None
    train(read_config(run_file(model=base), ["trainer.max_steps=1"]))
    assert LoopMDMForMaskedLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id in (1, [1])


# Which layers an adapter sits on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"target_modules": ["q_proj", "attn_out", "ff_proj"]},
            "`target_modules` has 'attn_out', which is not in",
        ),
        ({"target_modules": ["lm_head", "q_proj"], "layers": "mid"}, "'lm_head', which is not in layers [1, 2]"),
        ({"target_modules": ".*attn_out.*"}, "'.*attn_out.*', which is not in the model; use"),
        ({"target_modules": []}, "`target_modules` is []"),
        ({"modules_to_save": ["head"]}, "`modules_to_save` has 'head'"),
        ({"exclude_modules": ["out_proj"]}, "`exclude_modules` has 'out_proj'"),
        ({"rank_pattern": {"query": 4}}, "`rank_pattern` has 'query'"),
        ({"alpha_pattern": {"layers.9.*": 4}}, "`alpha_pattern` has 'layers.9.*'"),
        (
            {"layers_to_transform": [0, 9], "target_modules": ["q_proj"]},
            "`layers_to_transform` names layer 9; the model",
        ),
        ({"layers": "mid", "layers_to_transform": [0]}, "give one of them"),
        ({"target_parameters": ["up_proj.weight", "wte.weight"]}, "`target_parameters` has 'wte.weight'"),
        ({"trainable_token_indices": [3, 23]}, "`trainable_token_indices` has 23; the model's tokens are 0 to 22."),
        ({"inference_mode": True}, "`inference_mode` is True, which does not work here: nothing would be trained"),
        ({"layer_replication": [[0, 2], [1, 4]]}, "`layer_replication` is [[0, 2], [1, 4]], which does not work"),
        ({"target_modules": ["embed_tokens"]}, "`target_modules` has 'embed_tokens', whose weight embeddings and"),
        ({"target_modules": ["lm_head", "q_proj"]}, "`target_modules` has 'lm_head', whose weight"),
        ({"target_parameters": ["embed_tokens.weight"]}, "`target_parameters` has 'embed_tokens.weight', whose"),
        ({"layers": [0, 1]}, "The layers to adapt are [0, 1]; choose one of all, head, mid"),
    ],
    ids=str,
)
def test_names_that_match_nothing_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        lora_config(tiny_config(), **options)
    assert message in str(error.value)
    if "which is not in" in message:
        assert "down_proj, gate_proj, k_proj, lm_head" in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": r".*\.self_attn\.[qv]_proj", "rank_pattern": {"layers.1.*q_proj": 2, "v_proj": 3}},
        {"target_modules": ["mlp.up_proj"], "layers": "mid", "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 2},
        {"target_modules": r".*(q_proj|lm_head)", "exclude_modules": ["lm_head"]},
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.up_proj.weight"],
            "trainable_token_indices": [0, 22],
        },
    ],
    ids=str,
)
def test_names_that_the_model_has_are_taken(options):
    model = tiny_model()
    adapted = get_peft_model(model, lora_config(model.config, **options))
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
