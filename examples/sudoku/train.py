# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Trains a small LoopMDM that solves Sudoku, by the paper's recipe and with transformers' Trainer.

    python examples/sudoku/puzzles.py --count 60000 --seed 0 --output train.txt
    python examples/sudoku/train.py --puzzles train.txt --output sudoku-loopmdm

An interrupted run goes on from its last checkpoint when the same command is given again. `--max-train-loops 1` trains
the same-size model without loops on the same budget of training FLOPs, in fewer FLOPs per step and so in more steps.
"""

import argparse
import json
from pathlib import Path

import puzzles
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM, LoopMDMGenerationConfig
from loopmdm.training import (
    ExampleStream,
    LoopMDMTrainer,
    MaskedDiffusionCollator,
    MuonAdamW,
    last_complete_checkpoint,
)

CELLS = 81
PAD, MASK, DIGITS = "[PAD]", ".", "123456789"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """
    One token for each digit and "." as the mask token, so that a puzzle in the usual notation is already the model's
    input and its answer reads the same way. White space is ignored and "0" is another way to write a blank.
    """
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate([PAD, MASK, *DIGITS])}))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), ""), normalizers.Replace("0", MASK)]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        mask_token=MASK,
        model_max_length=CELLS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LoopMDMForMaskedLM:
    """A fresh model: 1.2M parameters in 6 layers, head 1 / mid 2 / tail 3, unless the arguments say otherwise."""
    torch.manual_seed(args.seed)
    config = LoopMDMConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        use_qk_norm=True,
        position_embedding_type="learned",
        max_position_embeddings=CELLS,
        loop_start=args.loop_start,
        loop_end=args.loop_end,
        num_loops=args.max_train_loops,
        max_train_loops=args.max_train_loops,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LoopMDMForMaskedLM(config)
    model.generation_config = LoopMDMGenerationConfig(
        max_new_tokens=0, max_denoising_steps=8, pad_token_id=tokenizer.pad_token_id
    )
    return model


def encode(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[dict]:
    """Examples for the collator: the solution's tokens, maskable where the puzzle has a blank."""
    solutions = tokenizer([solution for _, solution in pairs])["input_ids"]
    return [
        {"input_ids": torch.tensor(ids), "maskable": torch.tensor([cell == MASK for cell in puzzle])}
        for ids, (puzzle, _) in zip(solutions, pairs, strict=True)
    ]


class RelabelDigits:
    """Augmentation: permutes the nine digits of a grid, which keeps it a solution of the puzzle permuted alike."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.digit_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(DIGITS)))
        self.num_tokens = len(tokenizer)

    def __call__(self, example: dict, generator: torch.Generator) -> dict:
        table = torch.arange(self.num_tokens)
        table[self.digit_ids] = self.digit_ids[torch.randperm(9, generator=generator)]
        return {**example, "input_ids": table[example["input_ids"]]}


def steps_for(model: LoopMDMForMaskedLM, args: argparse.Namespace) -> int:
    """Optimiser steps whose expected training FLOPs, over the draws of the number of loops, come to the budget."""
    loops = range(1, args.max_train_loops + 1)
    per_step = sum(3 * model.flops(args.batch_size, CELLS, num_loops, num_logits=20) for num_loops in loops)
    return max(1, round(args.tflop * 1e12 * len(loops) / per_step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--puzzles", required=True, help="training puzzles, a file that puzzles.py wrote")
    parser.add_argument("--output", required=True, help="folder of the trained model; checkpoints go inside")
    parser.add_argument("--tflop", type=float, default=200.0, help="training budget in 10^12 FLOPs (default: 200)")
    parser.add_argument("--max-train-loops", type=int, default=6, help="S_max; 1 trains without loops (default: 6)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--loop-start", type=int, default=1)
    parser.add_argument("--loop-end", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=352)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--save-steps", type=int, default=100)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    tokenizer = build_tokenizer()
    model = build_model(args, tokenizer)
    pairs = puzzles.read_puzzles(args.puzzles)
    if len(pairs) <= 256:
        raise SystemExit(f"{args.puzzles} holds {len(pairs)} puzzles; give more, as 256 are held out for evaluation.")
    held_out, pairs = pairs[:256], pairs[256:]
    max_steps = steps_for(model, args)
    stream = ExampleStream(
        encode(tokenizer, pairs), max_steps * args.batch_size, args.seed, transform=RelabelDigits(tokenizer)
    )
    validation = [{**example, "index": index} for index, example in enumerate(encode(tokenizer, held_out))]

    checkpoints = Path(args.output) / "checkpoints"
    training_args = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=max_steps,
        per_device_train_batch_size=args.batch_size,
        train_sampling_strategy="sequential",
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": max_steps // 2, "decay_type": "linear"},
        warmup_steps=min(50, max_steps // 10),
        max_grad_norm=1.0,
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=args.save_steps,
        prediction_loss_only=True,
        save_steps=args.save_steps,
        save_total_limit=2,
        seed=args.seed,
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = LoopMDMTrainer(
        model=model,
        args=training_args,
        train_dataset=stream,
        eval_dataset=validation,
        data_collator=MaskedDiffusionCollator(tokenizer.mask_token_id, tokenizer.pad_token_id, seed=args.seed),
        optimizers=(MuonAdamW(model, lr=args.lr), None),
    )
    result = trainer.train(resume_from_checkpoint=last_complete_checkpoint(checkpoints))

    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    settings = {name: value for name, value in vars(args).items() if name not in ("puzzles", "output")}
    record = {
        **settings,
        "steps": max_steps,
        "training_tflop": trainer.state.total_flos / 1e12,
        "seconds": result.metrics["train_runtime"],
    }
    (Path(args.output) / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
