# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Does reinforcement learning with GRPO (arXiv 2402.03300) by `trace_log_probs` teach what likelihood does not? A small
model of 4x4 Sudoku learns from the rules alone, without a solution, to fill a whole board in one denoising step. This
makes the figures of docs/training.md:

    python benchmarks/grpo.py --threads 1 --output benchmarks/results/grpo.json

The 288 boards are split into three parts. A model first learns to fill in blank cells from the solutions of one part.
Every update then draws several answers to each of some puzzles of the second part, rewards those that keep the rules,
and makes what was better than the others likelier. The solve rate is that of puzzles of the third part.
A puzzle may have several solutions, and one step chooses every cell by itself, so that a model of the likelihood alone
mixes them.
"""

import itertools
import time

import torch
from common import begin, make_parser, write_result

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM, LoopMDMGenerationConfig
from loopmdm.objective import trace_log_probs

MASK, NUM_LOOPS, BLANKS = 0, 4, 10
PRETRAINING_STEPS, UPDATES = 600, 100
PUZZLES, ANSWERS = 32, 16  # of an update, and of a puzzle
EVERY = 20  # updates between two measurements
# The cells of every row, column and box
UNITS = [[4 * i + j for j in range(4)] for i in range(4)] + [[4 * j + i for j in range(4)] for i in range(4)]
UNITS += [[8 * (i // 2) + 2 * (i % 2) + cell for cell in (0, 1, 4, 5)] for i in range(4)]


def all_boards() -> torch.Tensor:
    """The 288 boards of 4x4 Sudoku, `(288, 16)`, in random order."""
    rows = list(itertools.permutations((1, 2, 3, 4)))
    boards = torch.tensor([sum(board, ()) for board in itertools.product(rows, repeat=4)])
    boards = boards[reward(boards) == 1]
    return boards[torch.randperm(len(boards), generator=torch.Generator().manual_seed(0))]


def make_puzzles(boards: torch.Tensor, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Puzzles with `BLANKS` random blank cells, which are [MASK], and a solution of each, `(count, 16)`."""
    solutions = boards[torch.randint(len(boards), (count,), generator=generator)]
    order = torch.rand(solutions.shape, generator=generator).argsort(-1).argsort(-1)
    return solutions.masked_fill(order < BLANKS, MASK), solutions


def reward(boards: torch.Tensor) -> torch.Tensor:
    """Of every board the share of rows, columns and boxes in which no number stands twice, `(num_boards,)`."""
    numbers = boards[:, torch.tensor(UNITS)].sort(-1).values
    return (numbers.diff(dim=-1) != 0).all(-1).double().mean(-1)


def solve_rate(model: LoopMDMForMaskedLM, boards: torch.Tensor) -> float:
    answers = model.eval().generate(boards, max_denoising_steps=1, num_loops=NUM_LOOPS)
    return float((reward(answers) == 1).double().mean())


def step(model: LoopMDMForMaskedLM, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def pretrain(model: LoopMDMForMaskedLM, boards: torch.Tensor, generator: torch.Generator) -> None:
    """Learns to fill in blank cells from solutions."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(PRETRAINING_STEPS):
        puzzles, solutions = make_puzzles(boards, 64, generator)
        labels = solutions.masked_fill(puzzles != MASK, -100)
        step(model, model.train()(input_ids=puzzles, labels=labels, num_loops=NUM_LOOPS).loss, optimizer)


def grpo_loss(
    model: LoopMDMForMaskedLM, boards: torch.Tensor, config: LoopMDMGenerationConfig, generator: torch.Generator
) -> torch.Tensor:
    """GRPO's loss for some puzzles; every puzzle has `config.num_return_sequences` answers."""
    output = model.generate(boards, generation_config=config, generator=generator)
    rewards = reward(output.sequences).unflatten(0, (-1, config.num_return_sequences))
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    log_probs = trace_log_probs(model, output, generation_config=config, batch_size=len(output.sequences))
    old = torch.stack([step.log_probs.nan_to_num() for step in output.trace])
    committed = torch.stack([step.committed for step in output.trace])
    ratio = (log_probs - old).exp()
    advantages = advantages.flatten()[None, :, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)[committed].mean()


def run(seed: int) -> list[float]:
    """The one-step solve rate of held-out puzzles every `EVERY` updates."""
    torch.manual_seed(seed)
    generator, known = torch.Generator().manual_seed(seed), all_boards().split(96)
    config = LoopMDMConfig(
        vocab_size=5,
        mask_token_id=MASK,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        loop_start=0,
        loop_end=2,
        position_embedding_type="learned",
        max_position_embeddings=16,
    )
    model = LoopMDMForMaskedLM(config)
    pretrain(model, known[0], generator)
    boards = make_puzzles(known[1], UPDATES * PUZZLES, generator)[0]
    held_out = make_puzzles(known[2], 1000, generator)[0]
    generation_config = LoopMDMGenerationConfig(
        num_loops=NUM_LOOPS,
        max_denoising_steps=1,
        do_sample=True,
        num_return_sequences=ANSWERS,
        return_dict_in_generate=True,
        output_trace=True,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    curve = []
    for number, part in enumerate([*boards.split(PUZZLES), None]):
        if number % EVERY == 0:
            curve.append(solve_rate(model, held_out))
            print(f"seed {seed}, {number} updates: {curve[-1]:.1%} solved in one step", flush=True)
        if part is None:
            break
        step(model, grpo_loss(model.eval(), part, generation_config, generator), optimizer)
    return curve


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", type=int, default=3, help="their seeds count from --seed")
    args = parser.parse_args()
    begin(args)
    started = time.perf_counter()
    curves = {seed: run(seed) for seed in range(args.seed, args.seed + args.runs)}
    write_result(args, solve_rate=curves, seconds=round(time.perf_counter() - started))


if __name__ == "__main__":
    main()
