# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The examples of CONTRIBUTING.md, run as they stand: each is about ten lines long and has the effect it names."""

import importlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from conversion import FIXTURES, edited, refuse
from tiny import random_ids, tiny_model
from training_runs import EachStep, examples, training_args

import loopmdm.convert.families as families
import loopmdm_cli
from loopmdm.convert import convert_checkpoint
from loopmdm.training import ExampleStream, MaskedDiffusionCollator

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"^## (Add an? .*?)$.*?^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
PROMPT = random_ids(2, 5).clamp(max=21)


def execute(title: str, **names) -> dict:
    exec(EXAMPLES[title], names)
    return names


@pytest.fixture
def model():
    """A tiny model whose `generate` returns what it cost and did."""
    model = tiny_model(max_train_loops=4)
    model.generation_config.update(return_dict_in_generate=True, output_trace=True)
    return model


def test_there_are_six_examples_of_about_ten_lines():
    assert len(EXAMPLES) == 6 == TEXT.count("```python")
    for title, code in EXAMPLES.items():
        assert len([line for line in code.splitlines() if line.strip()]) <= 12, title


def test_commit_rule(model):
    output = execute("Add a commit rule", model=model, prompt=PROMPT)["output"]
    order = [step.committed.nonzero()[:, 1].tolist() for step in output.trace]
    assert order == [[column] * 2 for column in (8, 7, 6, 5, 12, 11, 10, 9)]


def test_way_of_caching(model):
    output = execute("Add a way of caching", model=model, prompt=PROMPT)["output"]
    plain = model.generate(PROMPT, max_new_tokens=8, block_length=4)
    assert (output.flops < plain.flops).all()
    # The first block is what it would be if there were no other.
    alone = model.generate(PROMPT, max_new_tokens=4).sequences
    assert torch.equal(output.sequences[:, :9], alone)
    assert not torch.equal(plain.sequences[:, :9], alone)


def test_exit_rule(model):
    ids = random_ids(6, 9)
    output = execute("Add an exit rule", model=model, input_ids=ids)["output"]
    assert 1 < output.loops.min() < output.loops.max() < 12
    for row, num_loops in enumerate(output.loops.tolist()):
        alone = model(ids[row : row + 1], num_loops=num_loops).logits
        torch.testing.assert_close(output.logits[row : row + 1], alone)
    padded, mask = (torch.nn.functional.pad(tensor, (3, 0)) for tensor in (ids, torch.ones_like(ids)))

    def with_padding(input_ids, **arguments):
        return model(padded, mask, **arguments)

    assert torch.equal(execute("Add an exit rule", model=with_padding, input_ids=ids)["output"].loops, output.loops)


def test_loop_schedule(model, tmp_path):
    data, collator = ExampleStream(examples(10), 200, seed=0), MaskedDiffusionCollator(22, 0)
    args = training_args(tmp_path, max_steps=24)
    trainer = execute("Add a loop schedule", model=model, args=args, collator=collator, data=data)["trainer"]
    drawn = []
    trainer.add_callback(EachStep(lambda step: drawn.append(model.model.num_train_loops)))
    trainer.train()
    assert drawn == [trainer.loop_schedule.draw(args.seed, step, 24) for step in range(24)]
    counts = torch.tensor([drawn.count(loops) for loops in (1, 2, 3, 4)])
    assert counts.sum() == 24 and counts[3] > 2 * counts[0]


def test_family(src, out, tmp_path, monkeypatch):
    edited("a2d_llama3", src, config={"architectures": ["MyModelForDiffusion"], "mask_token_id": 125})
    refuse(src, out, "MyModelForDiffusion", "not in a known format")
    (tmp_path / "my_model.py").write_text(EXAMPLES["Add a family of checkpoints"])
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    monkeypatch.setattr(families, "FAMILIES", families.discover())
    record = convert_checkpoint(src, out, verify=True)
    assert record["family"] == "my-model"
    assert record["verification"]["max_difference"] < 1e-5
    own = next(family for family in families.FAMILIES if family.name == "my-model")
    assert convert_checkpoint(FIXTURES / "dream", out.with_name("own"), family=own)["family"] == "my-model"


def test_command(model, tmp_path, monkeypatch, capsys):
    """In a copy of the package, as commands stay registered."""
    model.save_pretrained(tmp_path / "model")
    shutil.copytree(Path(loopmdm_cli.__file__).parent, tmp_path / "copied_cli")
    (tmp_path / "copied_cli" / "parameters.py").write_text(EXAMPLES["Add a command"])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module("copied_cli").main(["parameters", str(tmp_path / "model")])
    assert (exit_.value.code, capsys.readouterr().out) == (None, f"{model.num_parameters()}\n")
