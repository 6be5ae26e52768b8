"""The objective, the order of examples, the draws of loops and the optimiser."""

import itertools
import math
from collections import Counter

import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers import Trainer, TrainingArguments

from loopmdm import LoopMDMForMaskedLM
from loopmdm.training import (
    ExampleStream,
    LoopMDMTrainer,
    LoopSamplingCallback,
    MaskedDiffusionCollator,
    MuonAdamW,
    draw_num_loops,
    seeded_generator,
)

MASK, PAD = 22, 0


def examples(count: int, length: int = 6, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 22, (length,), generator=generator)} for _ in range(count)]


def indexed(rows: list[dict]) -> list[dict]:
    return [{**row, "index": index} for index, row in enumerate(rows)]


# --- collator ---


def test_collator_masks_labels_and_weights():
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "maskable": [False, True, True, True, True], "index": 3},
        {"input_ids": [5, 6, 7], "index": 4},
    ]
    batch = MaskedDiffusionCollator(MASK, PAD, seed=1)(rows)
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7, 8, 9], [5, 6, 7, -100, -100]]
    assert batch["input_ids"][0, 0] == 5, "a prompt token stays visible"
    for i, maskable in enumerate((4, 3)):
        masked = batch["input_ids"][i] == MASK
        count = int(masked.sum())
        assert 1 <= count <= maskable
        expected = torch.where(masked, maskable / count, 0.0)
        torch.testing.assert_close(batch["loss_weights"][i], expected)
        visible = batch["attention_mask"][i].bool() & ~masked
        original = torch.tensor(rows[i]["input_ids"] + [PAD] * (5 - len(rows[i]["input_ids"])))
        assert torch.equal(batch["input_ids"][i][visible], original[visible])


def test_collator_noise_depends_on_seed_and_index_alone():
    collator = MaskedDiffusionCollator(MASK, PAD, seed=1)
    rows = indexed(examples(8))
    first, again = collator(rows), MaskedDiffusionCollator(MASK, PAD, seed=1)(rows)
    torch.manual_seed(123)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["input_ids"], MaskedDiffusionCollator(MASK, PAD, seed=2)(rows)["input_ids"])
    later = [{**row, "index": row["index"] + 8} for row in rows]
    assert not torch.equal(first["input_ids"], collator(later)["input_ids"])


def test_collator_spreads_the_number_of_masks_over_a_batch():
    collator = MaskedDiffusionCollator(MASK, PAD)
    for start in range(0, 200, 8):
        rows = [{**row, "index": start + i} for i, row in enumerate(examples(8, length=8))]
        counts = (collator(rows)["input_ids"] == MASK).sum(-1).tolist()
        assert sorted(counts) == list(range(1, 9)), "8 rows of 8 tokens get every number of masks once"


def test_collator_estimates_the_enumerated_nelbo():
    """The mean loss over the collator's noise is the NELBO summed over all masks of a short sequence."""
    length = 4
    model = tiny_model().double()
    ids = torch.tensor([3, 7, 1, 12])

    def loss_of(masked: torch.Tensor) -> float:
        noised = torch.where(masked, MASK, ids)[None]
        logits = model(noised, num_loops=2).logits[0]
        logits[:, MASK] = -math.inf
        log_probs = logits.log_softmax(-1)[torch.arange(length), ids]
        return -log_probs[masked].sum().item()

    # E over k uniform in 1..L, then over the masks of k tokens, of L/k * loss, per token.
    expected = 0.0
    with torch.no_grad():
        for k in range(1, length + 1):
            losses = [
                loss_of(torch.tensor([i in chosen for i in range(length)]))
                for chosen in itertools.combinations(range(length), k)
            ]
            expected += sum(losses) / len(losses) / k / length

        collator = MaskedDiffusionCollator(MASK, PAD)
        draws = []
        for start in range(0, 6400, 64):
            batch = collator([{"input_ids": ids, "index": start + i} for i in range(64)])
            draws.append(model(**batch, num_loops=2).loss.item())
    error = torch.tensor(draws).std().item() / math.sqrt(len(draws))
    assert abs(sum(draws) / len(draws) - expected) < 4 * error
    assert error < 0.02 * expected


def test_collator_refuses_what_cannot_be_learned():
    with pytest.raises(ValueError, match="Example 7 has no maskable token"):
        MaskedDiffusionCollator(MASK, PAD)([{"input_ids": [1, 2], "maskable": [False, False], "index": 7}])
    with pytest.raises(ValueError, match="pad_token_id"):
        MaskedDiffusionCollator(MASK)([{"input_ids": [1, 2], "index": 0}, {"input_ids": [1], "index": 1}])


# --- order and loops ---


def test_stream_visits_every_example_once_an_epoch():
    rows = [{"input_ids": torch.tensor([i])} for i in range(10)]
    stream = ExampleStream(rows, num_examples=25, seed=0)
    seen = [int(stream[i]["input_ids"]) for i in range(25)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert [stream[i]["index"] for i in (0, 24)] == [0, 24]
    assert [int(stream[i]["input_ids"]) for i in reversed(range(25))] == seen[::-1], "order of access is irrelevant"
    assert "index" not in rows[0], "examples are left alone"
    with pytest.raises(IndexError):
        stream[25]
    with pytest.raises(ValueError, match="no training examples"):
        ExampleStream([], 5, seed=0)


def test_stream_transform_derives_from_the_place_in_the_run():
    def add_noise(example, generator):
        return {**example, "noise": torch.rand((), generator=generator).item()}

    rows = [{"input_ids": torch.tensor([i])} for i in range(3)]
    first, second = (ExampleStream(rows, 9, seed=0, transform=add_noise) for _ in range(2))
    noise = [first[i]["noise"] for i in range(9)]
    assert [second[i]["noise"] for i in reversed(range(9))] == noise[::-1]
    assert len(set(noise)) == 9


def test_loop_draws_are_uniform_and_fixed_by_seed_and_step():
    draws = [draw_num_loops(6, seed=0, step=step) for step in range(3000)]
    assert draws == [draw_num_loops(6, seed=0, step=step) for step in range(3000)]
    assert draws[:50] != [draw_num_loops(6, seed=1, step=step) for step in range(50)]
    counts = Counter(draws)
    assert set(counts) == set(range(1, 7))
    chi_square = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert chi_square < 15.1  # 99 % point of 5 degrees of freedom
    assert {draw_num_loops(1, 0, step) for step in range(20)} == {1}
    with pytest.raises(ValueError, match="at least 1"):
        draw_num_loops(0, 0, 0)


def test_seeded_generators_differ_by_every_part():
    streams = {torch.rand((), generator=seeded_generator(*parts)).item() for parts in [(0, 1), (1, 0), (0, "1", 0)]}
    assert len(streams) == 3


# --- Trainer ---


def training_args(folder, **overrides) -> TrainingArguments:
    values = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 5,
        **overrides,
    }
    return TrainingArguments(**values)


def recorded_loops(model) -> list[int]:
    """Collects the loops of every forward pass of `model` in training mode."""
    seen = []
    forward = model.model.forward

    def recording(*args, **kwargs):
        if model.training:
            seen.append(model.model.num_train_loops)
        return forward(*args, **kwargs)

    model.model.forward = recording
    return seen


@pytest.mark.parametrize("plain_trainer", [False, True])
def test_trainer_draws_loops_once_per_optimiser_step(tmp_path, plain_trainer):
    model = tiny_model(max_train_loops=6)
    seen = recorded_loops(model)
    args = training_args(tmp_path, gradient_accumulation_steps=2, save_strategy="no")
    stream = ExampleStream(examples(16), 6 * 8, seed=0)
    collator = MaskedDiffusionCollator(MASK, PAD)
    if plain_trainer:
        trainer = Trainer(
            model, args, train_dataset=stream, data_collator=collator, callbacks=[LoopSamplingCallback(6)]
        )
    else:
        trainer = LoopMDMTrainer(model, args, train_dataset=stream, data_collator=collator)
    trainer.train()
    drawn = [draw_num_loops(6, seed=5, step=step) for step in range(6)]
    assert seen == [loops for loops in drawn for _ in range(2)], "both micro-batches share the step's loops"
    assert len(set(drawn)) > 1
    assert model.model.num_train_loops is None, "and nothing stays behind"


def test_trainer_counts_the_operations_of_the_loops_drawn(tmp_path):
    model = tiny_model(max_train_loops=6)
    stream = ExampleStream(examples(24), 24, seed=0)
    collator = MaskedDiffusionCollator(MASK, PAD)
    trainer = LoopMDMTrainer(
        model, training_args(tmp_path, save_strategy="no"), train_dataset=stream, data_collator=collator
    )
    trainer.train()
    expected = 0
    for step in range(6):
        batch = collator([stream[i] for i in range(4 * step, 4 * step + 4)])
        num_logits = int((batch["loss_weights"] != 0).sum()) / 4
        expected += 3 * model.flops(4, 6, draw_num_loops(6, 5, step), num_logits)
    assert trainer.state.total_flos == expected


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    def run(folder, **kwargs):
        torch.manual_seed(0)
        model = LoopMDMForMaskedLM(tiny_config(max_train_loops=4))
        trainer = LoopMDMTrainer(
            model,
            training_args(folder),
            train_dataset=ExampleStream(examples(10), 24, seed=0),
            data_collator=MaskedDiffusionCollator(MASK, PAD),
            optimizers=(MuonAdamW(model, lr=1e-2), None),
        )
        trainer.train(**kwargs)
        return model.state_dict()

    whole = run(tmp_path / "a")
    torch.manual_seed(99)  # the global generator must not matter
    resumed = run(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


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
    model = LoopMDMForMaskedLM(
        tiny_config(position_embedding_type="learned", initializer_range=0.02, max_train_loops=3)
    )
    rows = [{"input_ids": torch.tensor([2, 4, 6, 8, 10, 12])}] * 4
    args = training_args(tmp_path, max_steps=30, save_strategy="no")
    trainer = LoopMDMTrainer(
        model,
        args,
        train_dataset=ExampleStream(rows, 120, seed=0),
        data_collator=MaskedDiffusionCollator(MASK, PAD),
        optimizers=(MuonAdamW(model, lr=1e-2), None),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
