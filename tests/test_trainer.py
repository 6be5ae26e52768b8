# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""LoopMDMTrainer: what it logs, evaluates and averages, what it refuses, adapters and the optimiser."""

import copy
import math

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny import random_ids, tiny_config, tiny_model
from training_runs import (
    MASK,
    PAD,
    EachStep,
    assert_equal,
    examples,
    make_trainer,
    steps_logged,
    weights,
)

from loopmdm import LoopMDMForMaskedLM
from loopmdm.evaluation import nelbo
from loopmdm.training import (
    ExampleStream,
    MaskedDiffusionCollator,
    MuonAdamW,
    draw_num_loops,
    make_loop_schedule,
    training_flops,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


# Log


@pytest.mark.parametrize(
    ("options", "args"),
    [
        ({}, {}),
        ({"gradient_loops": 2, "checkpoint_loops": True}, {"gradient_accumulation_steps": 2}),
        ({"loop_schedule": "growing", "max_loops": 3, "gradient_loops": 1}, {"gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_log_counts_loops_operations_and_tokens(tmp_path, monkeypatch, options, args):
    clock = [0.0]
    monkeypatch.setattr("loopmdm.training.trainer.time.perf_counter", lambda: clock[0])
    model = tiny_model(max_train_loops=4)
    ran, mid = [], model.model.loop
    model.model.loop = lambda *args, **kwargs: ran.append(1) or mid(*args, **kwargs)
    collator = MaskedDiffusionCollator(MASK, PAD)
    stream = ExampleStream([row for n in (4, 6) for row in examples(5, n)], 96, seed=0)
    args = {"max_steps": 6, "logging_steps": 2, **args}
    accumulation = args.get("gradient_accumulation_steps", 1)

    def tick(step):
        clock[0] += 0.5

    trainer = make_trainer(tmp_path, model, args=args, train_dataset=stream, callbacks=[EachStep(tick)], **options)
    trainer.train()
    schedule = make_loop_schedule(options.get("loop_schedule", "uniform"), model.config, options.get("max_loops"))
    draws = [schedule.draw(5, step, 6) for step in range(6)]
    if not args.get("gradient_checkpointing") and not options:
        assert len(ran) == sum(draws)
    batches = [collator([stream[4 * i + j] for j in range(4)]) for i in range(6 * accumulation)]
    total, before, lines = 0, 0, steps_logged(trainer)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        tokens = 0
        for step in (line["step"] - 2, line["step"] - 1):
            for batch in batches[step * accumulation : (step + 1) * accumulation]:
                tokens += batch["input_ids"].numel()
                total += training_flops(
                    model,
                    *batch["input_ids"].shape,
                    draws[step],
                    int(batch["loss_weights"].count_nonzero()) / 4,
                    options.get("gradient_loops"),
                    options.get("checkpoint_loops", False),
                    args.get("gradient_checkpointing", False),
                )
        assert line["num_loops"] == sum(draws[line["step"] - 2 : line["step"]]) / 2
        assert line["training_flops"] == total
        assert line["tokens_per_second"] == tokens, "two steps of half a second"
        assert line["flops_per_second"] == total - before
        before = total
    assert trainer.state.total_flos == total
    assert model.model.gradient_loops is None and model.model.checkpoint_loops is False, "nothing stays behind"
    assert model.model.num_train_loops is None


def test_time_of_evaluation_is_no_time_of_training(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("loopmdm.training.trainer.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        "loopmdm.training.trainer.nelbo",
        lambda *args, **kwargs: clock.__setitem__(0, clock[0] + 100) or nelbo(*args, **kwargs),
    )
    trainer = make_trainer(
        tmp_path, args={"eval_strategy": "steps", "eval_steps": 1}, eval_dataset=examples(2), eval_loops=[1],
        eval_samples=2, callbacks=[EachStep(lambda step: clock.__setitem__(0, clock[0] + 2))],
    )  # fmt: skip
    trainer.train()
    assert [line["tokens_per_second"] for line in steps_logged(trainer)] == [12, 12, 12, 12]


@pytest.mark.parametrize("how", ["resumed", "trained again"])
def test_speed_counts_the_operations_of_this_run_alone(tmp_path, how):
    trainer = make_trainer(tmp_path, args={"save_strategy": "steps"})
    trainer.train()
    if how == "resumed":
        trainer = make_trainer(tmp_path, args={"save_strategy": "steps", "max_steps": 5})
        trainer.train(resume_from_checkpoint=True)
        line, before = steps_logged(trainer)[4], steps_logged(trainer)[3]["training_flops"]
    else:
        trainer.train()
        line, before = steps_logged(trainer)[0], 0
    seconds = 24 / line["tokens_per_second"]
    assert line["flops_per_second"] * seconds == pytest.approx(line["training_flops"] - before, rel=1e-6)


# Evaluation


@pytest.mark.parametrize("averaged", [False, True])
def test_evaluation_is_the_nelbo_at_every_number_of_loops(tmp_path, averaged):
    held_out = [*examples(2, 6, seed=9), {"input_ids": torch.tensor([3, 4, 5]), "prompt_length": 1}]
    trainer = make_trainer(
        tmp_path, args={"per_device_eval_batch_size": 3, "eval_strategy": "steps", "eval_steps": 2},
        eval_dataset=held_out, eval_loops=[3, 1], eval_samples=4, ema_decay=0.5 if averaged else None,
    )  # fmt: skip
    trainer.train()
    model = trainer.ema.module if averaged else trainer.model
    ids = torch.stack([*(row["input_ids"] for row in held_out[:2]), torch.tensor([3, 4, 5, 0, 0, 0])])
    mask, maskable = torch.ones(3, 6), torch.ones(3, 6, dtype=torch.bool)
    mask[2, 3:], maskable[2, :1] = 0, False
    mean, error = nelbo(model, ids, mask, maskable, num_loops=[3, 1], num_samples=4, batch_size=3, seed=5).per_token()
    metrics = trainer.evaluate()
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4, 4]
    for found in (metrics, logged[1]):
        assert [found["eval_nelbo_3"], found["eval_nelbo_1"]] == mean.tolist()
        assert found["eval_nelbo_3_standard_error"] == error[0].item()
        assert found["eval_loss"] == found["eval_nelbo_1"]
        assert found["eval_runtime"] > 0
    assert logged[0]["eval_loss"] != logged[1]["eval_loss"]
    other = trainer.evaluate(held_out[:1], metric_key_prefix="test")
    assert {"test_loss", "test_nelbo_1", "test_nelbo_3"} <= other.keys()
    assert math.exp(other["test_loss"]) > 1 and other["test_loss"] != metrics["eval_loss"]


def test_evaluation_without_eval_loops_is_the_trainers(tmp_path):
    rows = examples(4, seed=3)
    trainer = make_trainer(tmp_path, eval_dataset=rows, args={"per_device_eval_batch_size": 4})
    batch = MaskedDiffusionCollator(MASK, PAD)(rows)
    expected = trainer.model(**batch, num_loops=3).loss.item()  # the config's loops
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_evaluation_needs_examples_and_their_reader(tmp_path):
    for dataset in (None, []):
        trainer = make_trainer(tmp_path, eval_dataset=dataset, eval_loops=[1])
        with pytest.raises(ValueError, match="`eval_loops` needs an `eval_dataset` with examples"):
            trainer.evaluate()
    trainer = make_trainer(tmp_path, eval_dataset=examples(2), eval_loops=[1], data_collator=lambda rows: rows)
    with pytest.raises(ValueError, match="`eval_loops` needs a MaskedDiffusionCollator"):
        trainer.evaluate()


@pytest.mark.parametrize("options", [{}, {"eval_loops": [1, 2], "eval_samples": 2, "ema_decay": 0.9}], ids=str)
def test_evaluation_leaves_the_random_numbers_of_training_alone(tmp_path, options):
    """With dropout another evaluation would train another model."""
    results = []
    for strategy in ("no", "steps"):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
        args = {"eval_strategy": strategy, "eval_steps": 1}
        trainer = make_trainer(tmp_path, model, args=args, eval_dataset=examples(3), **options)
        trainer.train()
        results.append(weights(model))
    assert_equal(*results)


def test_several_evaluation_sets(tmp_path):
    sets = {"a": examples(2), "b": examples(2, seed=1)}
    metrics = make_trainer(tmp_path, eval_dataset=sets, eval_loops=[1], eval_samples=2).evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= metrics.keys()


@pytest.mark.parametrize("options", [{"eval_loops": [0]}, {"eval_loops": []}, {"eval_loops": [1], "eval_samples": 3}])
def test_bad_evaluation_options_are_found_at_once(tmp_path, options):
    with pytest.raises(ValueError, match=r"num_loops|num_samples|eval_loops|eval_samples"):
        make_trainer(tmp_path, eval_dataset=examples(2), **options)


def test_evaluation_keeps_packed_documents_apart(tmp_path):
    # Of one token each: there is one mask only, so their bound is exact.
    packed = [{"input_ids": [3, 4, 5, 6, 7, 8], "document_ids": [0, 1, 2, 3, 4, 5]}]
    alone = [{"input_ids": [token]} for token in range(3, 9)]
    found = [
        make_trainer(tmp_path, eval_dataset=rows, eval_loops=[2], eval_samples=100).evaluate()
        for rows in (packed, alone)
    ]
    error = math.hypot(*(metrics["eval_nelbo_2_standard_error"] for metrics in found))
    assert abs(found[0]["eval_loss"] - found[1]["eval_loss"]) < 4 * error + 1e-6


# Moving average


def test_moving_average_by_hand(tmp_path):
    decay, average, states = 0.7, {}, []
    trainer = make_trainer(tmp_path, args={"save_strategy": "steps", "max_steps": 5}, ema_decay=decay)

    def follow(step):
        for name, parameter in trainer.model.named_parameters():
            value = parameter.detach().double()
            average[name] = value.clone() if step == 1 else decay * average[name] + (1 - decay) * value
        states.append(weights(trainer.model))

    trainer.add_callback(EachStep(follow))
    trainer.train()
    for name, parameter in trainer.ema.module.named_parameters():
        torch.testing.assert_close(parameter.double(), average[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(trainer.ema.module.lm_head.weight, trainer.model.lm_head.weight)
    assert_equal(weights(trainer.model), states[-1])

    # Checkpoints hold the weights of training, the final model their average; afterwards the weights are back.
    for step in (2, 4):
        saved = LoopMDMForMaskedLM.from_pretrained(tmp_path / f"checkpoint-{step}")
        assert_equal(weights(saved), states[step - 1])
        assert (tmp_path / f"checkpoint-{step}" / "ema.safetensors").is_file()
    trainer.save_model(str(tmp_path / "final"))
    final = LoopMDMForMaskedLM.from_pretrained(tmp_path / "final")
    assert_equal(weights(final), weights(trainer.ema.module))
    assert_equal(weights(trainer.model), states[-1])
    with pytest.raises(RuntimeError), trainer.averaged_weights():
        assert_equal(weights(trainer.model), weights(final))
        raise RuntimeError
    assert_equal(weights(trainer.model), states[-1])


@pytest.mark.parametrize("adapted", [False, True])
def test_moving_average_of_bfloat16_moves(tmp_path, adapted):
    """A hundredth of a change is less than bfloat16 can add to a weight."""
    model = tiny_model(max_train_loops=4).bfloat16()
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"), autocast_adapter_dtype=False)
    average, trained = {}, [name for name, one in model.named_parameters() if one.requires_grad]
    trainer = make_trainer(tmp_path, model, args={"max_steps": 12}, ema_decay=0.99)

    def follow(step):
        for name, parameter in trainer.model.named_parameters():
            value = parameter.detach().double()
            average[name] = value.clone() if step == 1 else 0.99 * average[name] + 0.01 * value

    trainer.add_callback(EachStep(follow))
    trainer.train()
    prefix = "base_model.model." if adapted else ""
    for name, parameter in trainer.ema.module.named_parameters():
        torch.testing.assert_close(parameter.double(), average[prefix + name], rtol=1e-4, atol=1e-6)
        assert parameter.dtype == (torch.float32 if prefix + name in trained else torch.bfloat16)
    raw = weights(trainer.model)
    trainer.save_model(str(tmp_path / "final"))
    assert_equal(weights(trainer.model), raw)
    if not adapted:
        final = LoopMDMForMaskedLM.from_pretrained(tmp_path / "final")
        assert_equal(weights(final), weights(copy.deepcopy(trainer.ema.module).bfloat16()))


def test_moving_average_changes_no_weight(tmp_path):
    results = []
    for decay in (None, 0.9):
        trainer = make_trainer(tmp_path, ema_decay=decay)
        trainer.train()
        results.append(weights(trainer.model))
    assert_equal(*results)


def test_before_the_first_step_there_is_no_average(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=examples(2), eval_loops=[2], eval_samples=2, ema_decay=0.9)
    plain = make_trainer(tmp_path, eval_dataset=examples(2), eval_loops=[2], eval_samples=2)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_an_average_does_not_work_with_the_best_checkpoint(tmp_path):
    """What is loaded at the end would not be what the average is of."""
    args = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    with pytest.raises(
        ValueError, match="`ema_decay` averages the whole run, so it does not work with `load_best_model_at_end`"
    ):
        make_trainer(tmp_path, args=args, ema_decay=0.5, eval_dataset=examples(3), eval_loops=[1], eval_samples=4)


@pytest.mark.parametrize("adapted", [False, True])
def test_accumulated_steps_equal_whole_ones(tmp_path, adapted):
    """transformers must see, through PEFT too, that the model divides its loss itself."""
    results = []
    for size, accumulation in ((4, 1), (2, 2)):
        # One row's noise does not depend on its micro-batch where every row has one token to mask.
        rows = [{**row, "prompt_length": 5} for row in examples(10)]
        model = (adapted_model("lora") if adapted else tiny_model(max_train_loops=4)).double()
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 3}
        trainer = make_trainer(tmp_path, model, rows, args)
        trainer.train()
        results.append((weights(trainer.model), [line["loss"] for line in steps_logged(trainer)]))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
    for name, value in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], value, rtol=1e-5, atol=1e-7)


# Arguments


@pytest.mark.parametrize(
    ("options", "args", "message"),
    [
        ({"gradient_loops": 5}, {}, r"`gradient_loops` is 5; it must be 1 to S_max \(4\)"),
        ({"gradient_loops": 3, "max_loops": 2}, {}, r"`gradient_loops` is 3.*\(2\)"),
        ({"gradient_loops": 0}, {}, "`gradient_loops` is 0"),
        ({"ema_decay": 0.0}, {}, r"`ema_decay` is 0.0; it must be between 0 and 1"),
        ({"ema_decay": 1.0}, {}, r"`ema_decay` is 1.0"),
        ({"ema_decay": math.nan}, {}, "`ema_decay` is nan"),
        ({"loop_schedule": "exact"}, {}, "The loop schedule is 'exact'; choose one of uniform"),
        ({"max_loops": 0}, {}, "`max_loops` is 0"),
        (
            {"eval_loops": [1, 2]},
            {"metric_for_best_model": "nelbo_4"},
            "nelbo_4.*choose one of eval_loss, eval_nel",
        ),
        ({}, {"save_strategy": "steps", "save_total_limit": 1}, "`save_total_limit` is 1, which leaves none"),
    ],
    ids=str,
)
def test_bad_arguments(tmp_path, options, args, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, args=args, **options)


def test_models_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Linear holds no LoopMDMForMaskedLM"):
        make_trainer(tmp_path, torch.nn.Linear(2, 2))


# Adapters

ADAPTERS = {
    "lora": LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    "lora all-linear": LoraConfig(r=4, lora_alpha=16, target_modules="all-linear"),
    "dora": LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj"], use_dora=True),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


def adapted_model(name: str):
    torch.manual_seed(0)
    return get_peft_model(tiny_model(max_train_loops=4), copy.deepcopy(ADAPTERS[name]))


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_learn_and_travel(tmp_path, name):
    base = weights(tiny_model(max_train_loops=4))
    model = adapted_model(name)
    rows = [{"input_ids": torch.tensor([2, 4, 6, 8, 10, 12])}] * 4
    args = {"max_steps": 24, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path, model, rows, args, ema_decay=0.5 if name == "lora" else None)
    trainer.train()
    learnt = torch.tensor([[2, 4, 6, 8, 10, 12]])
    before, after = (
        nelbo(m, learnt, num_loops=[1, 4], num_samples=32).per_token()[0] for m in (adapted_model(name), model)
    )
    assert (after < 0.8 * before).all()
    draws = [draw_num_loops(4, 5, step) for step in range(24)]
    assert [line["num_loops"] for line in steps_logged(trainer)] == draws
    inner = {
        key.replace(".base_layer", "").replace("base_model.model.", ""): value for key, value in weights(model).items()
    }
    assert all(torch.equal(inner[key], value) for key, value in base.items()), "the base is left alone"

    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny_model(max_train_loops=4), tmp_path / "adapter").eval()
    ids, prompt = random_ids(2, 8), torch.tensor([[2, 4, 6]])
    with torch.no_grad(), trainer.averaged_weights():
        model.eval()
        results = {loops: model(ids, num_loops=loops).logits for loops in (1, 3, 6)}
        generated = {loops: model.generate(prompt, max_new_tokens=3, num_loops=loops) for loops in (1, 3, 6)}
        merged = copy.deepcopy(model).merge_and_unload()
        plain = tiny_model(max_train_loops=4)
        for loops, expected in results.items():
            assert torch.equal(loaded(ids, num_loops=loops).logits, expected)
            torch.testing.assert_close(merged(ids, num_loops=loops).logits, expected, rtol=0, atol=2e-4)
            assert not torch.allclose(plain(ids, num_loops=loops).logits, expected, atol=0.1)
            assert torch.equal(loaded.generate(prompt, max_new_tokens=3, num_loops=loops), generated[loops])
            assert generated[loops].shape == (1, 6) and not (generated[loops] == MASK).any()


@pytest.mark.parametrize("ema", [None, 0.8])
def test_adapters_resume_bit_for_bit(tmp_path, ema):
    def run(checkpoint=None):
        args = {"save_strategy": "steps", "max_steps": 5}
        trainer = make_trainer(tmp_path, adapted_model("lora"), args=args, ema_decay=ema, checkpoint_loops=True)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run()
    resumed = run(str(tmp_path / "checkpoint-2"))
    assert_equal(weights(resumed.model), weights(whole.model))
    assert not torch.equal(
        *(run.model.state_dict()["base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"]
          for run in (whole, make_trainer(tmp_path, adapted_model("lora"))))
    )  # fmt: skip
    if ema:
        assert_equal(weights(resumed.ema.module), weights(whole.ema.module))
    with pytest.raises(ValueError, match="has no complete"):
        (tmp_path / "checkpoint-2" / "complete.json").unlink()
        run(str(tmp_path / "checkpoint-2"))


# The optimiser


def test_muon_adamw_splits_the_parameters_and_follows_the_schedule():
    model = tiny_model()
    optimizer = MuonAdamW(model, lr=0.5)
    in_muon = {id(p) for group in optimizer.muon.param_groups for p in group["params"]}
    in_adamw = {id(p) for group in optimizer.adamw.param_groups for p in group["params"]}
    assert not in_muon & in_adamw
    assert in_muon | in_adamw == {id(p) for p in model.parameters()}
    assert id(model.model.layers[0].mlp.up_proj.weight) in in_muon
    assert id(model.model.embed_tokens.weight) in in_adamw
    assert id(model.model.layers[0].input_layernorm.weight) in in_adamw
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.1)
    assert {group["lr"] for group in [*optimizer.muon.param_groups, *optimizer.adamw.param_groups]} == {0.05}


def test_muon_adamw_learns(tmp_path):
    torch.manual_seed(0)
    config = tiny_config(position_embedding_type="learned", initializer_range=0.02, max_train_loops=3)
    model = LoopMDMForMaskedLM(config)
    rows = [{"input_ids": torch.tensor([2, 4, 6, 8, 10, 12])}] * 4
    args = {"max_steps": 24, "lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path, model, rows, args, optimizers=(MuonAdamW(model, lr=1e-2), None))
    trainer.train()
    losses = [line["loss"] for line in steps_logged(trainer)]
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])


def test_muon_takes_parameters_that_are_all_matrices_of_the_layers():
    """Such as those of an adapter."""
    model = tiny_model().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name and parameter.ndim == 2)
    optimizer, ids = MuonAdamW(model, lr=1e-2), random_ids(2, 8)
    before = [parameter.clone() for parameter in model.parameters()]
    model(ids, labels=ids.clamp(max=MASK - 1)).loss.backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new) != new.requires_grad
