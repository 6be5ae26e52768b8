# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Fine-tunes the bundled Sudoku model with LoRA to do with fewer loops, and scores it before and after at every number of
loops.

    python examples/sudoku/puzzles.py --count 6300 --seed 5 --output easy.txt
    python examples/finetune_lora/finetune.py --puzzles easy.txt --output few-loops

The base model needs its 16 loops. The adapter is trained with 1 to 4. It is saved alone; peft loads it on the base.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoTokenizer, TrainingArguments

from loopmdm import LoopMDMForMaskedLM
from loopmdm.training import (
    ExampleStream,
    LoopMDMTrainer,
    MaskedDiffusionCollator,
    last_complete_checkpoint,
    lora_config,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "sudoku"))
import puzzles
from score import score
from train import RelabelDigits, encode


def scores(model, tokenizer, pairs: list[tuple[str, str]], loops: list[int], steps: int) -> dict[int, float]:
    """Share of puzzles solved at each number of loops."""
    model.eval()
    return {num_loops: score(model, tokenizer, pairs, num_loops, steps)["solved"] for num_loops in loops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parents[2]), help="base model (default: bundled)")
    parser.add_argument("--puzzles", required=True, help="training puzzles, a file that puzzles.py wrote")
    parser.add_argument("--output", required=True, help="folder of the adapter")
    parser.add_argument("--layers", default="all", help="all, head, mid, tail or head_tail (default: all)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps (default: 300)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=300, help="puzzles to score on, not trained on")
    parser.add_argument("--max-loops", type=int, default=4, help="S_max of the training (default: 4)")
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 3, 4, 8, 16], help="to score at")
    parser.add_argument("--denoising-steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = LoopMDMForMaskedLM.from_pretrained(args.model)
    pairs = puzzles.read_puzzles(args.puzzles)
    held_out, pairs = pairs[: args.held_out], pairs[args.held_out :]
    before = scores(model, tokenizer, held_out, args.loops, args.denoising_steps)
    print("before:", {loops: f"{100 * solved:.1f} %" for loops, solved in before.items()}, flush=True)

    options = {"r": args.rank, "lora_alpha": 2 * args.rank}
    adapted = get_peft_model(model, lora_config(model.config, layers=args.layers, **options))
    adapted.print_trainable_parameters()
    examples = encode(tokenizer, pairs)
    checkpoints = Path(args.output) / "checkpoints"
    trainer = LoopMDMTrainer(
        model=adapted,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            train_sampling_strategy="sequential",
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            logging_steps=20,
            save_steps=100,
            save_total_limit=2,
            remove_unused_columns=False,
            report_to="none",
            seed=args.seed,
        ),
        max_loops=args.max_loops,
        train_dataset=ExampleStream(
            examples, args.steps * args.batch_size, args.seed, transform=RelabelDigits(tokenizer)
        ),
        data_collator=MaskedDiffusionCollator(tokenizer.mask_token_id, tokenizer.pad_token_id, seed=args.seed),
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(checkpoints))
    adapted.save_pretrained(args.output)

    after = scores(adapted, tokenizer, held_out, args.loops, args.denoising_steps)
    print("loops  before  after")
    for loops in args.loops:
        print(f"{loops:5d}  {100 * before[loops]:5.1f}%  {100 * after[loops]:5.1f}%")
    settings = {name: value for name, value in vars(args).items() if name not in ("model", "puzzles", "output")}
    record = {"settings": settings, "torch": torch.__version__, "before": before, "after": after}
    (Path(args.output) / "scores.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
