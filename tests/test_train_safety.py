# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A training that goes wrong stops and says so: numbers that are not finite, options that would take the loss away."""

import math

import datasets
import pytest
import torch
from tiny import tiny_config, tiny_model
from training_runs import MASK, PAD, EachStep, build_run, examples, make_trainer, training_args
from transformers import Trainer

from loopmdm.data.stream import check_passes
from loopmdm.training import (
    ExampleStream,
    LoopMDMTrainer,
    LoopSamplingCallback,
    MaskedDiffusionCollator,
    StreamedExamples,
    last_complete_checkpoint,
    make_loop_schedule,
)
from loopmdm.training.checks import check_options


def break_weight(model, value: float = math.nan):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = value


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    steps = []
    trainer = build_run(tmp_path, callbacks=[EachStep(steps.append)])
    trainer.add_callback(EachStep(lambda step: break_weight(trainer.model) if step == 3 else None))
    with pytest.raises(
        ValueError, match=r"The loss is nan in step 4: training has diverged.*Lower `learning_rate` \(0.01\)"
    ):
        trainer.train()
    assert steps == [1, 2, 3]
    assert trainer.model.model.num_train_loops is None, "nothing stays behind"
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="holds NaN or infinite values in step 3"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    trainer = build_run(tmp_path)
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ValueError, match=r"The norm of the gradient is (inf|nan) in step 1: training has diverged"):
        trainer.train()


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """The last step's update shows in no loss any more."""
    trainer = build_run(tmp_path, max_steps=4, args={"save_steps": 4})
    trainer.add_callback(EachStep(lambda step: break_weight(trainer.model, math.inf) if step == 4 else None))
    with pytest.raises(ValueError, match=r"The weight model.layers.1.mlp.up_proj.weight holds NaN .* in step 4"):
        trainer.train()
    assert last_complete_checkpoint(tmp_path) is None
    trainer = make_trainer(tmp_path / "unsaved", args={"max_steps": 1})
    trainer.add_callback(EachStep(lambda step: break_weight(trainer.model, math.inf)))
    with pytest.raises(ValueError, match=r"holds NaN or infinite values in step 1"):
        trainer.train()


def test_damaged_weights_are_named_before_training(tmp_path):
    trainer = make_trainer(tmp_path)
    break_weight(trainer.model)
    with pytest.raises(ValueError, match=r"up_proj.weight is NaN or infinite before the first step"):
        trainer.train()


def test_weights_in_float16_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"embed_tokens.weight is trained in float16.*in float32"):
        make_trainer(tmp_path, tiny_model(max_train_loops=4).half())
    frozen = tiny_model(max_train_loops=4).half().requires_grad_(False)
    frozen.model.norm.float().requires_grad_(True)
    make_trainer(tmp_path, frozen)


@pytest.mark.parametrize(
    ("options", "args", "message"),
    [
        ({}, {"label_smoothing_factor": 1e-12}, "`label_smoothing_factor` is 1e-12, which does not work here"),
        ({}, {"use_liger_kernel": True}, "`use_liger_kernel` is True"),
        ({}, {"label_names": ["input_ids"]}, r"`label_names` is \['input_ids'\]"),
        ({}, {"auto_find_batch_size": True}, "`auto_find_batch_size` is True"),
        ({}, {"ignore_data_skip": True}, "`ignore_data_skip` is True"),
        ({}, {"train_sampling_strategy": "group_by_length"}, "`train_sampling_strategy` is 'group_by_length'"),
        (
            {},
            {"train_sampling_strategy": "random", "accelerator_config": {"use_seedable_sampler": False}},
            "`use_seedable_sampler` is False",
        ),
        ({"compute_loss_func": lambda *args, **kwargs: 0}, {}, "`compute_loss_func` does not work here"),
        ({"compute_metrics": lambda pair: {}, "eval_loops": [1]}, {}, "`compute_metrics` is never called with"),
        (
            {"preprocess_logits_for_metrics": lambda logits, labels: logits, "eval_loops": [1]},
            {},
            "`preprocess_logits_for_metrics` is never called with",
        ),
        (
            {"eval_dataset": StreamedExamples(lambda: examples(3)), "eval_loops": [1]},
            {},
            "The evaluation set is a stream that starts again at its end",
        ),
        ({"data_collator": None}, {}, "There is no `data_collator` that masks tokens"),
    ],
    ids=lambda value: str(value).partition(" at 0x")[0][:50],
)
def test_options_that_would_give_another_loss_are_refused(tmp_path, options, args, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, args=args, **options)


def test_labels_are_counted_over_all_processes(tmp_path, monkeypatch):
    args = training_args(tmp_path, average_tokens_across_devices=False)
    check_options(args, make_loop_schedule("uniform", tiny_config()))  # one process has all of them
    monkeypatch.setattr(type(args), "world_size", 2)
    with pytest.raises(ValueError, match="`average_tokens_across_devices` is False, which does not work here"):
        check_options(args, make_loop_schedule("uniform", tiny_config()))


@pytest.mark.parametrize("args", [{"max_steps": 4}, {"max_steps": -1, "num_train_epochs": 2}], ids=str)
def test_a_run_that_ends_too_early_is_not_repeated(tmp_path, args):
    """A second pass would have the masks of the first."""
    stream = ExampleStream(examples(5), 12 if args["max_steps"] > 0 else 8, seed=0)
    trainer = make_trainer(tmp_path, train_dataset=stream, args=args)
    with pytest.raises(ValueError, match=r"training would pass over them 2 times.*its `num_examples` to 16, and"):
        trainer.train()
    plain = {"cls": Trainer, "callbacks": [LoopSamplingCallback(4)]}
    for dataset in (stream, examples(8)):  # which have an `index` too
        for options in (plain, {}):
            trainer = make_trainer(tmp_path, train_dataset=dataset, args=args, **options)
            with pytest.raises(ValueError, match=r"pass over them 2 times, with the same masks; (raise|wrap it in)"):
                trainer.train()
    table = datasets.Dataset.from_list([{"input_ids": [4, 5], "index": index} for index in range(8)])
    with pytest.raises(ValueError, match="with their places in the run"):
        check_passes(table, 2)
    check_passes(table.to_iterable_dataset(), 2)  # a stream, which nobody can count
    # Rows of a collator of one's own
    collate = lambda rows: {"input_ids": torch.stack(rows), "labels": torch.stack(rows) + 1}  # noqa: E731
    rows = [torch.tensor([4, 5, 6])] * 8
    make_trainer(tmp_path, train_dataset=rows, data_collator=collate, args=args, **plain).train()


def test_a_model_made_later_is_refused(tmp_path):
    make, collator = lambda: tiny_model(max_train_loops=4), MaskedDiffusionCollator(MASK, PAD)
    with pytest.raises(ValueError, match="`model_init` does not work here"):
        LoopMDMTrainer(args=training_args(tmp_path), model_init=make, data_collator=collator)


def test_a_plain_trainer_cannot_smooth_labels_either(tmp_path):
    data = ExampleStream(examples(4), 16, seed=0)
    trainer = make_trainer(tmp_path, cls=Trainer, train_dataset=data, args={"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match="`loss_weights` weigh the loss of `labels`, which are missing"):
        trainer.train()


def test_a_streamed_evaluation_set_is_read_to_its_end(tmp_path):
    rows = [{"input_ids": row["input_ids"].tolist()} for row in examples(3, seed=2)]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    found, expected = (
        make_trainer(tmp_path, eval_dataset=dataset, eval_loops=[2], eval_samples=4).evaluate()
        for dataset in (stream, rows)
    )
    assert found["eval_loss"] == expected["eval_loss"]
