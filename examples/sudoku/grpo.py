# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Reinforcement learning with GRPO (arXiv 2402.03300): the bundled Sudoku model learns from the rules alone, without a
solution, to fill a whole board in one denoising step.

    python examples/sudoku/grpo.py --updates 100

Every update draws several answers to each of a few puzzles, rewards every cell by the rules that it keeps, and makes
what was better than the puzzle's other answers likelier, by the log-probabilities that `trace_log_probs` gives.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import puzzles
import torch
from transformers import AutoTokenizer

from loopmdm import LoopMDMForMaskedLM, LoopMDMGenerationConfig
from loopmdm.objective import trace_log_probs

ROOT = Path(__file__).resolve().parents[2]
# A row, a column and a box of every number, as the places of their cells
UNITS = torch.tensor(
    [[9 * i + j for j in range(9)] for i in range(9)]
    + [[9 * j + i for j in range(9)] for i in range(9)]
    + [[27 * (i // 3) + 3 * (i % 3) + offset for offset in puzzles.BOX_OFFSETS] for i in range(9)]
)


def reward(boards: torch.Tensor) -> torch.Tensor:
    """Of every cell the share of its row, column and box in which no other cell holds the same, `(num_boards, 81)`."""
    cells = boards[:, UNITS]  # (num_boards, 27, 9)
    is_alone = (cells[..., None] == cells[..., None, :]).sum(-1) == 1
    kept = torch.zeros(boards.shape, dtype=torch.float64)
    return kept.index_add_(1, UNITS.flatten(), is_alone.flatten(1).double()) / 3


def solve_rate(model: LoopMDMForMaskedLM, boards: torch.Tensor, num_loops: int) -> float:
    answers = [model.generate(part, max_denoising_steps=1, num_loops=num_loops) for part in boards.split(100)]
    return float((reward(torch.cat(answers)) == 1).all(-1).double().mean())


def update(
    model: LoopMDMForMaskedLM, boards: torch.Tensor, config: LoopMDMGenerationConfig, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """The loss of GRPO for some puzzles, and the answers' mean reward."""
    copies, clip = config.num_return_sequences, 0.2
    output = model.generate(boards, generation_config=config, generator=generator)
    rewards = reward(output.sequences)
    answers = rewards.unflatten(0, (-1, copies))
    advantages = (answers - answers.mean(1, keepdim=True)).flatten(0, 1) / answers.std(1).mean().clamp(min=1e-4)
    log_probs = trace_log_probs(model, output, generation_config=config, batch_size=len(output.sequences))
    old = torch.stack([step.log_probs.nan_to_num() * step.committed for step in output.trace])
    committed = torch.stack([step.committed for step in output.trace])
    ratio = (log_probs - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -gain[committed].mean(), float(rewards.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT))
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--puzzles", type=int, default=8, help="per update")
    parser.add_argument("--answers", type=int, default=8, help="per puzzle")
    parser.add_argument("--clues", type=int, nargs=2, default=(28, 32))
    parser.add_argument("--num-loops", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--every", type=int, default=25, help="updates between two measurements")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON of what was measured")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model, tokenizer = LoopMDMForMaskedLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    count = args.held_out + args.updates * args.puzzles
    pairs = puzzles.generate_puzzles(count, seed=1000 + args.seed, min_clues=args.clues[0], max_clues=args.clues[1])
    texts = [puzzle.replace(".", tokenizer.mask_token) for puzzle, _ in pairs]
    boards = tokenizer(texts, return_tensors="pt", add_special_tokens=False).input_ids
    held_out, boards = boards[: args.held_out], boards[args.held_out :]
    config = LoopMDMGenerationConfig(
        num_loops=args.num_loops,
        max_denoising_steps=1,
        do_sample=True,
        num_return_sequences=args.answers,
        return_dict_in_generate=True,
        output_trace=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    generator, curve, started = torch.Generator().manual_seed(args.seed), [], time.perf_counter()
    for number, part in enumerate([*boards.split(args.puzzles), None]):
        if number % args.every == 0 or part is None:
            curve.append((number, solve_rate(model.eval(), held_out, args.num_loops)))
            print(f"{number} updates, {time.perf_counter() - started:.0f} s: {curve[-1][1]:.1%} solved", flush=True)
        if part is None:
            break
        loss, mean = update(model.train(), part, config, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"  {number}: mean reward {mean:.3f}", file=sys.stderr, flush=True)
    if args.output is not None:
        settings = {name: value for name, value in vars(args).items() if name != "output"}
        args.output.write_text(json.dumps({"settings": settings, "solve_rate": curve}, indent=1) + "\n")


if __name__ == "__main__":
    main()
