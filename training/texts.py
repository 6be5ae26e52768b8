# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Short texts that show, beside the NELBO, what a model under training writes at each number of loops."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..objective import evaluating, input_device, seeded_generator
from .trainer import LoopMDMTrainer

# Tokens of a text at most, denoising steps of a block at most, and tokens of a row that it continues
NEW_TOKENS, STEPS, GIVEN = 32, 16, 8


class EvaluationTexts(TrainerCallback):
    """
    Has each evaluation of a [`LoopMDMTrainer`] draw a few texts, print them, and put them into the log. They are drawn
    with the same random numbers each time and at each number of loops, so that what differs is what was learnt.

    Args:
        trainer: Whose model writes, and whose `eval_loops` it writes with.
        rows (`Sequence[dict]`): Examples. Texts continue their prompts, or without a prompt their first 8 tokens.
        tokenizer: Of the model.
    """

    def __init__(self, trainer: LoopMDMTrainer, rows: Sequence[dict[str, Any]], tokenizer: Any):
        self.trainer, self.tokenizer, self.step = trainer, tokenizer, None
        self.prompts = [torch.as_tensor(row["input_ids"])[None, : _given(row)] for row in rows]

    def on_evaluate(self, args, state, control, **kwargs):
        if state.global_step == self.step:  # the evaluation at the end, of a model that was evaluated already
            return
        self.step, model = state.global_step, self.trainer.looped_model
        with self.trainer.averaged_weights(), evaluating(model):
            texts = [self._continue(model, index, args.seed) for index in range(len(self.prompts))]
        state.log_history.append({"step": self.step, "eval_texts": texts})
        if state.is_world_process_zero:
            tqdm.write("\n".join(["", *(line for text in texts for line in _lines(text)), ""]))

    def _continue(self, model: Any, index: int, seed: int) -> dict[str, str]:
        prompt = self.prompts[index].to(input_device(model))
        texts = {"prompt": self.tokenizer.decode(prompt[0])}
        for loops in self.trainer.eval_loops:
            made = model.generate(
                prompt,
                max_new_tokens=min(NEW_TOKENS, model.config.max_position_embeddings - prompt.shape[1]),
                max_denoising_steps=STEPS,
                num_loops=loops,
                do_sample=True,
                generator=seeded_generator(seed, "texts", index),
            )
            texts[str(loops)] = self.tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True)
        return texts


def _given(row: dict[str, Any]) -> int:
    """How many tokens of an example are its prompt."""
    prompt = row.get("prompt_length", 0)
    if "maskable" in row:
        prompt = int(torch.as_tensor(row["maskable"]).long().argmax())
    return prompt or min(GIVEN, max(1, len(row["input_ids"]) // 2))


def _lines(text: dict[str, str]) -> list[str]:
    """One for the prompt and one for each number of loops."""
    names = {name: name if name == "prompt" else f"loops {name}" for name in text}
    width = max(map(len, names.values()))
    return [f"{names[name]:{width}}  {' '.join(value.split())}" for name, value in text.items()]
