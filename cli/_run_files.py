# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Templates of run files, which `loopmdm train --init` writes."""

from pathlib import Path

_HEAD = """\
# {what}
# Fill in the paths, look at the run before it runs, and start it:
#   loopmdm train {file} --dry-run
#   loopmdm train {file}
# Values can be changed on the command line (trainer.max_steps=100). docs/training.md explains all keys.

output: {output}   # a new folder; the model, its card and checkpoints go there
"""
_TRAINER = """\
trainer:                # transformers' TrainingArguments
  {length}
  per_device_train_batch_size: {rows}
  gradient_accumulation_steps: 1   # raise it for larger steps than fit into memory
  learning_rate: {rate}
  # bf16: true          # on GPUs that have it: faster, and half the memory for activations
  logging_steps: 10
  save_steps: 500       # and evaluate as often
  seed: 42
"""
_PRETRAINING = """\
tokenizer: ./tokenizer  # a folder, or an id on the Hub; it needs a mask token
data: [train.txt]       # .txt, .jsonl with "text", or the name of a data set on the Hub
eval_data: valid.txt    # text that is not in `data`: its NELBO is measured, by loops
eval_texts: 2           # and so many of its beginnings continued, to read
# documents: line       # what separates texts in .txt files: blank_line (the default), line or file
sequence_length: 256    # tokens of a row; texts are packed into rows

model_config:           # arguments of LoopMDMConfig; special tokens come from the tokenizer
  hidden_size: 384
  intermediate_size: 1024
  num_hidden_layers: 12
  num_attention_heads: 6
  max_position_embeddings: 256
  loop_start: 2         # layers 2 to 4, of 0 to 11, are looped
  loop_end: 5
  num_loops: 4          # the default of `generate`
  max_train_loops: 6    # S_max: every step draws its number of loops from 1 to S_max

loops:
  schedule: uniform     # late, growing or fixed are others
# gradient_loops: 2     # backpropagate through the last loops alone: less memory and time
# checkpoint_loops: true   # compute loops again in the backward pass: less memory, more time
optimizer: adamw        # or muon
# ema_decay: 0.999      # save an average of the weights over the run
"""
_DATA = """\
model: ./model          # a folder or Hub id: a LoopMDM, such as `loopmdm convert` makes
task: answers           # learn answers given prompts; pretrain learns whole texts
data: [train.jsonl]     # lines of {"prompt": ..., "completion": ...} or {"messages": [...]}
eval_data: valid.jsonl  # examples that are not in `data`: their NELBO is measured, by loops
eval_texts: 2           # examples of `eval_data` that each evaluation also answers, for you to read
# sequence_length: 512  # most tokens of an example; by default the model's limit, at most 1024
# skip_long: true       # leave out longer examples instead of refusing them
"""
_ANSWERS = (
    _DATA
    + """\

# model_config: {loop_update: replace, max_train_loops: 6}   # for a converted model: heal it (docs/training.md)
loops:
  schedule: uniform     # growing, for a model that has never looped
# gradient_loops: 2     # backpropagate through the last loops alone: less memory and time
# checkpoint_loops: true   # compute loops again in the backward pass: less memory, more time
"""
)
_ADAPTER = (
    _DATA
    + """\

lora:                   # arguments of peft's LoraConfig, and:
  layers: all           # which layers: all, head, mid (the looped ones), tail or head_tail
  r: 16
  lora_alpha: 32
  lora_dropout: 0.0
"""
)
_KINDS = {
    "pretraining": (
        ("A model from scratch, trained on texts.", "runs/pretrained"),
        _PRETRAINING,
        {"length": "max_steps: 10000", "rows": 16, "rate": "1.0e-3"},
    ),
    "answers": (
        ("A model, fine-tuned on answers to prompts.", "runs/answers"),
        _ANSWERS,
        {"length": "num_train_epochs: 3", "rows": 8, "rate": "1.0e-5"},
    ),
    "adapter": (
        ("A LoRA adapter of a model, trained on answers to prompts.", "runs/adapter"),
        _ADAPTER,
        {"length": "num_train_epochs: 3", "rows": 8, "rate": "2.0e-4"},
    ),
}


def write_template(kind: str, path: str | Path) -> None:
    """
    Writes a commented run file.

    Args:
        kind (`"pretraining"`, `"answers"` or `"adapter"`): What the run trains.
        path: The file, which must not exist.

    Raises:
        ValueError: The kind does not exist, or `path` does.
    """
    path = Path(path)
    if kind not in _KINDS:
        raise ValueError(f"There is no template called {kind!r}; choose one of {', '.join(_KINDS)}.")
    (what, output), body, trainer = _KINDS[kind]
    text = f"{_HEAD.format(what=what, file=path, output=output)}{body}\n{_TRAINER.format(**trainer)}"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{path} exists already; name a new file.") from None
