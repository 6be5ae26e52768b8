# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What more computation at inference buys on minimal Sudokus: more denoising steps, more loops, remasking, or several
candidates, sampled or from symmetric copies of the puzzle, and how to choose among them with and without the rules;
and, with `--until`, symmetric copies tried one after another until an answer is accepted: by the rules, because two
copies agree, or by its NELBO.

    python benchmarks/sudoku_search.py --count 150 --output benchmarks/results/sudoku_search.json
    python benchmarks/sudoku_search.py --count 300 --until 64 --output benchmarks/results/sudoku_until.json

Every row gives the percentage of puzzles solved and the FLOPs per puzzle in units of one trajectory at the model's own
loops and 16 steps. Candidates are nested: the first of eight are the four. The first is the plain greedy trajectory.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from common import begin, make_parser, solved, write_result
from flagship.symmetry import Symmetry
from transformers import AutoTokenizer

from loopmdm import LoopMDMForMaskedLM
from loopmdm.evaluation import nelbo

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "sudoku"))
import puzzles

STEPS = 16
# NELBO of an answer, in nats, up to which it is taken to be right. On puzzles of another seed (2) right answers have
# 0.03 at most by four masks, and wrong ones 3 at least.
ACCEPTED = 0.3


class Search:
    """Runs arms over the same puzzles and keeps a table."""

    def __init__(self, model, tokenizer, pairs: list[tuple[str, str]], batch_size: int):
        self.model, self.batch_size, self.rows = model, batch_size, []
        self.boards, self.solutions = (
            tokenizer(list(texts), return_tensors="pt")["input_ids"] for texts in zip(*pairs, strict=True)
        )
        self.blank = self.boards == model.config.mask_token_id
        self.first_digit = tokenizer.convert_tokens_to_ids("1")
        self.unit = self.flops(STEPS)

    def flops(self, passes: float) -> float:
        return passes * self.model.flops(1, self.boards.shape[1])

    def generate(
        self, boards: torch.Tensor, seed: int | None = None, **settings
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Answers, the log-probability of their trajectories, and FLOPs per puzzle."""
        answers, log_probs, flops = [], [], 0
        settings = {"max_denoising_steps": STEPS, "num_loops": self.model.config.num_loops, **settings}
        for start in range(0, len(boards), self.batch_size):
            part = boards[start : start + self.batch_size]
            generators = None
            if seed is not None:
                generators = [torch.Generator().manual_seed(1_000_003 * seed + start + i) for i in range(len(part))]
            output = self.model.generate(
                part, generator=generators, return_dict_in_generate=True, output_trace=True, **settings
            )
            answers.append(output.sequences)
            steps = (step.confidence.log().nan_to_num() * step.committed for step in output.trace)
            log_probs.append(sum(step.sum(-1) for step in steps))
            flops += int(output.flops.sum())
        return torch.cat(answers), torch.cat(log_probs), flops / len(boards)

    def add(self, arm: str, right: torch.Tensor, flops: float, **more) -> None:
        self.rows.append({"arm": arm, **more, "cost": round(flops / self.unit, 2), **solved(right)})
        print(json.dumps(self.rows[-1]), flush=True)

    def single(self, arm: str, seed: int | None = None, **settings) -> None:
        answers, _, flops = self.generate(self.boards, seed, **settings)
        self.add(arm, self.right(answers), flops, **settings)

    def right(self, answers: torch.Tensor) -> torch.Tensor:
        """The only solution is the only board that keeps the rules and the clues."""
        return (answers == self.solutions).all(-1)

    def candidates(self, arm: str, count: int, masks: int) -> None:
        """Several answers to every puzzle, and every way to choose one of the first 1, 2, 4, ... of them."""
        found = []
        for index in range(count):
            if arm == "symmetric copies" and index > 0:
                symmetry = Symmetry(len(self.boards), torch.Generator().manual_seed(index), self.first_digit)
                answers, log_probs, flops = self.generate(symmetry.apply(self.boards))
                answers = symmetry.undo(answers)
            elif index > 0:
                answers, log_probs, flops = self.generate(self.boards, seed=index, do_sample=True)
            else:
                answers, log_probs, flops = self.generate(self.boards)
            bound = nelbo(self.model, answers, maskable=self.blank, num_samples=masks, batch_size=self.batch_size)
            found.append((answers, log_probs, -bound.nats[0].to(log_probs.dtype), flops))
        answers, log_probs, bounds = (torch.stack(parts) for parts in list(zip(*found, strict=True))[:3])
        right = torch.stack([self.right(part) for part in answers])
        size = 2
        while size <= count:
            flops = sum(flops for *_, flops in found[:size])
            same = answers[:size, None] == answers[None, :size]  # (size, size, num_puzzles, 81)
            scores = {
                "trajectory": log_probs[:size],
                "majority": same.all(-1).sum(1).double(),
                "agreement": same.sum((1, -1)).double(),
                "nelbo": bounds[:size],
                "majority, then nelbo": same.all(-1).sum(1).double() + bounds[:size].double().sigmoid(),
            }
            self.add(arm, right[:size].any(0), flops, candidates=size, choice="rules")
            for choice, score in scores.items():
                extra = self.flops(size * masks) if "nelbo" in choice else 0
                best = score.argmax(0, keepdim=True)
                self.add(arm, right[:size].gather(0, best)[0], flops + extra, candidates=size, choice=choice)
            size *= 2

    def measure_all(self, candidates: int, masks: int) -> None:
        """Everything that needs no judge to stop."""
        loops = self.model.config.num_loops
        for steps in (1, 4, STEPS, 2 * STEPS, 4 * STEPS):
            self.single("steps", max_denoising_steps=steps)
        for number in (loops // 2, loops + loops // 2, 2 * loops):
            self.single("loops", num_loops=number)
        self.single("remasking", seed=0, max_denoising_steps=2 * STEPS, remask_probability=0.05)
        for arm, count in (("symmetric copies", candidates), ("samples", candidates // 2)):
            self.candidates(arm, count, masks)

    def until_accepted(self, judge: str, copies: int, masks: int, steps: int = 4) -> None:
        """Symmetric copies of the puzzles whose answers the judge has not accepted yet, until `copies` are tried."""
        count, flops = len(self.boards), 0.0
        right, scores = torch.zeros(count, dtype=torch.bool), torch.full((count,), math.inf, dtype=torch.float64)
        seen = torch.zeros(count, copies, self.boards.shape[1], dtype=torch.long)
        for index in range(copies + 1):
            rows = (scores > ACCEPTED).nonzero().flatten()
            if index == copies or len(rows) == 0 or index in (1, 2, 4, 8, 16, 32, 64):
                more = {"choice": judge, "steps": steps, "candidates": index, "accepted": count - len(rows)}
                self.add("until accepted", right, flops / count, **more)
            if index == copies or len(rows) == 0:
                return
            if index == 0:
                answers, _, spent = self.generate(self.boards, max_denoising_steps=steps)
            else:
                symmetry = Symmetry(len(rows), torch.Generator().manual_seed(index), self.first_digit)
                answers, _, spent = self.generate(symmetry.apply(self.boards[rows]), max_denoising_steps=steps)
                answers = symmetry.undo(answers)
            is_right = (answers == self.solutions[rows]).all(-1)
            found, flops = (~is_right).double(), flops + spent * len(rows)
            if judge == "agreement":
                found = 1 - (answers[:, None] == seen[rows, :index]).all(-1).any(-1).double()
                seen[rows, index] = answers
            elif judge == "nelbo":
                blank, sizes = self.blank[rows], {"num_samples": masks, "batch_size": self.batch_size}
                found = nelbo(self.model, answers, maskable=blank, **sizes).nats[0]
                flops += self.flops(masks) * len(rows)
            better = found < scores[rows]
            right[rows], scores[rows] = is_right.where(better, right[rows]), found.where(better, scores[rows])


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(seed=3)  # training has puzzles of seed 0, held-out scores of seed 1, pilots of seed 2
    parser.add_argument("--model", default=".", help="folder of the model (default: this one, the bundled model's)")
    parser.add_argument("--count", type=int, default=200, help="minimal puzzles (default: 200)")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--masks", type=int, default=4, help="masks per NELBO of an answer (default: 4)")
    parser.add_argument("--until", type=int, help="only try symmetric copies until one is accepted, at most so many")
    parser.add_argument("--batch-size", type=int, default=50)
    args = parser.parse_args()
    begin(args)
    model = LoopMDMForMaskedLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = puzzles.generate_puzzles(args.count, args.seed, None, None)
    search, started = Search(model, tokenizer, pairs, args.batch_size), time.perf_counter()
    if args.until is not None:
        for judge in ("rules", "agreement", "nelbo"):
            search.until_accepted(judge, args.until, args.masks)
    else:
        search.measure_all(args.candidates, args.masks)
    write_result(args, seconds=round(time.perf_counter() - started), rows=search.rows)


if __name__ == "__main__":
    main()
