# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What does more computation at inference buy on minimal Sudokus? More denoising steps, more loops, remasking, or several
candidates, sampled or from symmetric copies of the puzzle, and how to choose among them with and without the rules;
with `--later-look`, remasking by confidence in place of ReMDM's draw; and, with `--until`, symmetric copies tried one
after another until an answer is accepted: by the rules, because two copies agree, or by its NELBO. These make the
tables and the picture of docs/results/search.md:

    python benchmarks/sudoku_search.py --count 150 --output benchmarks/results/sudoku_search.json
    python benchmarks/sudoku_search.py --count 300 --later-look --output benchmarks/results/sudoku_later_look.json
    python benchmarks/sudoku_search.py --count 300 --until 64 --output benchmarks/results/sudoku_until.json
    python benchmarks/sudoku_search.py --plot docs/results/search.png

Every row gives the percentage of puzzles solved and the FLOPs per puzzle in units of one trajectory at the model's own
loops and 16 steps. Candidates are nested: the first of eight are the four. The first is the plain greedy trajectory.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from common import begin, load, make_parser, positive, puzzles, read_pairs, solved, write_result
from flagship.symmetry import Symmetry

from loopmdm.commit_rules import CommitRule
from loopmdm.evaluation import nelbo

# Scores `(N,)` of answers `(N, 81)` to the puzzles of those rows, the lower the better, and FLOPs per answer
Judge = Callable[[torch.Tensor, slice | torch.Tensor], tuple[torch.Tensor, float]]
STEPS, CANDIDATES = 16, 8
# NELBO of an answer, in nats, up to which it is taken to be right. On puzzles of another seed (2) right answers have
# 0.03 at most by four masks, and wrong ones 3 at least.
ACCEPTED = 0.3
LIMITS = (0, 0.5, 0.9, 0.99, 0.9995)  # probabilities below which a committed digit is masked again

RESULTS = Path(__file__).parent / "results"
# How the picture draws them
ARMS = {
    "steps": ("1 to 64 steps", "-", "o"),
    "loops": ("8 to 32 loops", "-", "s"),
    "remasking": ("ReMDM's remasking, 32 steps", "", "x"),
    "samples": ("2 and 4 samples", ":", "v"),
    "symmetric copies": ("2 to 8 copies", "--", "."),
    "until accepted": ("until accepted", "-", "."),
}
CHOICES = {
    "rules": ("rules", "black"),
    "nelbo": ("NELBO", "tab:red"),
    "second look": ("second look", "tab:orange"),
    "head": ("trained head", "tab:green"),
    "trajectory": ("likelihood", "tab:purple"),
    "majority": ("majority", "tab:cyan"),
    "agreement": ("agreement", "tab:blue"),
}


class LaterLook(CommitRule):
    """The most confident first; a committed digit to which a later pass gives less than `limit` is masked again."""

    def __init__(self, limit: float):
        self.limit = limit

    def __call__(self, step):
        # Every step covers the same positions, as some may be masked again.
        self.held = step.tokens if step.index == 0 else step.tokens.where(step.masked, self.held)
        seen = step.logits.softmax(-1).gather(-1, self.held[..., None])[..., 0]
        is_last = step.index + 1 == step.num_steps
        step.remask = step.counted & ~step.masked & (seen < self.limit) & ~is_last[:, None]  # not ReMDM's draw
        return step.best(step.confidence)


class Search:
    """Runs arms over the same minimal puzzles and keeps a table. A NELBO of an answer takes so many `masks`."""

    batch_size = 50

    def __init__(self, model, tokenizer, seed: int, count: int, masks: int = 4):
        self.model, self.masks, self.rows = model, masks, []
        # How answers are judged without the rules, and the score up to which one is accepted
        self.judges: dict[str, tuple[Judge, float]] = {"nelbo": (self.nelbo, ACCEPTED)}
        self.boards, self.solutions = read_pairs(tokenizer, puzzles.generate_puzzles(count, seed, None, None))
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

    def copy(
        self, index: int, rows: slice | torch.Tensor = slice(None), **settings
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """As `generate`, of symmetric copy number `index` of each puzzle in `rows`; number 0 is the puzzle."""
        boards = self.boards[rows]
        if index == 0:
            return self.generate(boards, **settings)
        symmetry = Symmetry(len(boards), torch.Generator().manual_seed(index), self.first_digit)
        answers, log_probs, flops = self.generate(symmetry.apply(boards), **settings)
        return symmetry.undo(answers), log_probs, flops

    def add(self, arm: str, right: torch.Tensor, flops: float, **more) -> None:
        self.rows.append({"arm": arm, **more, "cost": round(flops / self.unit, 2), **solved(right)})
        print(json.dumps(self.rows[-1]), flush=True)

    def single(self, arm: str, seed: int | None = None, **settings) -> None:
        answers, _, flops = self.generate(self.boards, seed, **settings)
        self.add(arm, self.right(answers), flops, **settings)

    def right(self, answers: torch.Tensor) -> torch.Tensor:
        """The only solution is the only board that keeps the rules and the clues."""
        return (answers == self.solutions).all(-1)

    def nelbo(self, answers: torch.Tensor, rows: slice | torch.Tensor) -> tuple[torch.Tensor, float]:
        blank, sizes = self.blank[rows], {"num_samples": self.masks, "batch_size": self.batch_size}
        return nelbo(self.model, answers, maskable=blank, **sizes).nats[0], self.flops(self.masks)

    def candidates(self, arm: str, count: int) -> None:
        """Several answers to every puzzle, and every way to choose one of the first 1, 2, 4, ... of them."""
        found = []
        for index in range(count):
            if arm == "samples" and index > 0:
                answers, log_probs, flops = self.generate(self.boards, seed=index, do_sample=True)
            else:
                answers, log_probs, flops = self.copy(index)
            judged = {name: judge(answers, slice(None)) for name, (judge, _) in self.judges.items()}
            found.append((answers, log_probs, flops, judged))
        answers, log_probs = (torch.stack(parts) for parts in list(zip(*found, strict=True))[:2])
        right = torch.stack([self.right(part) for part in answers])
        size = 2
        while size <= count:
            flops = sum(flops for _, _, flops, _ in found[:size])
            same = answers[:size, None] == answers[None, :size]  # (size, size, num_puzzles, 81)
            scores = {
                "trajectory": log_probs[:size],
                "majority": same.all(-1).sum(1).double(),
                "agreement": same.sum((1, -1)).double(),
            }
            extra = {}
            for name in self.judges:
                judged = [judged[name] for *_, judged in found[:size]]
                scores[name], extra[name] = -torch.stack([one for one, _ in judged]), sum(spent for _, spent in judged)
            self.add(arm, right[:size].any(0), flops, candidates=size, choice="rules")
            for choice, score in scores.items():
                chosen = right[:size].gather(0, score.argmax(0, keepdim=True))[0]
                self.add(arm, chosen, flops + extra.get(choice, 0), candidates=size, choice=choice)
            size *= 2

    def measure_all(self) -> None:
        """Everything that needs no judge to stop."""
        loops = self.model.config.num_loops
        for steps in (1, 4, STEPS, 2 * STEPS, 4 * STEPS):
            self.single("steps", max_denoising_steps=steps)
        for number in (loops // 2, loops + loops // 2, 2 * loops):
            self.single("loops", num_loops=number)
        self.single("remasking", seed=0, max_denoising_steps=2 * STEPS, remask_probability=0.05)
        self.candidates("symmetric copies", CANDIDATES)
        self.candidates("samples", CANDIDATES // 2)

    def later_look(self) -> None:
        """Remasking by confidence; with a limit of 0 no digit is masked again."""
        for limit in LIMITS:
            # `generate` shows committed digits to a rule only if it may mask them again.
            answers, _, flops = self.generate(self.boards, remask_probability=1, unmasking=LaterLook(limit))
            if limit == 0:
                plain = answers
            changed = int((answers != plain).any(-1).sum())
            self.add("later look", self.right(answers), flops, limit=limit, changed=changed)

    def until_accepted(self, judge: str, copies: int, steps: int = 4) -> None:
        """Symmetric copies of the puzzles whose answers the judge has not accepted yet, until `copies` are tried."""
        count, flops = len(self.boards), 0.0
        right, scores = torch.zeros(count, dtype=torch.bool), torch.full((count,), math.inf, dtype=torch.float64)
        seen = torch.zeros(count, copies, self.boards.shape[1], dtype=torch.long)
        limit = self.judges[judge][1] if judge in self.judges else 0.5
        for index in range(copies + 1):
            rows = (scores > limit).nonzero().flatten()
            if index == copies or len(rows) == 0 or index in (1, 2, 4, 8, 16, 32, 64):
                more = {"choice": judge, "steps": steps, "candidates": index, "accepted": count - len(rows)}
                self.add("until accepted", right, flops / count, **more)
            if index == copies or len(rows) == 0:
                return
            answers, _, spent = self.copy(index, rows, max_denoising_steps=steps)
            is_right = (answers == self.solutions[rows]).all(-1)
            found, flops = (~is_right).double(), flops + spent * len(rows)
            if judge == "agreement":
                found = 1 - (answers[:, None] == seen[rows, :index]).all(-1).any(-1).double()
                seen[rows, index] = answers
            elif judge in self.judges:
                found, spent = self.judges[judge][0](answers, rows)
                flops += spent * len(rows)
            better = found < scores[rows]
            right[rows], scores[rows] = is_right.where(better, right[rows]), found.where(better, scores[rows])


def plot(path: Path, gflop: float) -> None:
    """All results of this script and of sudoku_judges.py; `gflop` of a trajectory is the unit of the costs."""
    from matplotlib.figure import Figure

    results = {
        name: json.loads((RESULTS / f"sudoku_{name}.json").read_text()) for name in ("search", "until", "judges")
    }
    rows = [row for result in results.values() for row in result["rows"]] + results["judges"]["until"]
    groups: dict[tuple[str, str | None], dict[int, dict]] = {}
    for row in rows:  # the judges' own rows repeat some
        groups.setdefault((row["arm"], row.get("choice")), {})[row["cost"]] = row
    figure = Figure(figsize=(6.4, 6.2), layout="constrained")
    axis = figure.subplots()
    for arm, (about, line, marker) in ARMS.items():
        for (name, choice), points in groups.items():
            if name != arm or (arm == "samples" and choice != "rules"):
                continue
            label = about if choice is None else f"{about}: {CHOICES[choice][0]}"
            color = "tab:gray" if choice is None else CHOICES[choice][1]
            cost, rate, error = zip(
                *((points[at]["cost"], points[at]["solved"], points[at]["standard_error"]) for at in sorted(points)),
                strict=True,
            )
            bars = {"elinewidth": 0.7, "linewidth": 1.4, "markersize": 4}
            axis.errorbar(cost, rate, error, color=color, linestyle=line, marker=marker, label=label, **bars)
    axis.set(xscale="log", ylim=(71, 101), ylabel="solved, %", title="What more computation solves")
    axis.set_xlabel("mean cost of a puzzle, in trajectories of 16 loops x 16 steps")
    axis.xaxis.set_major_formatter("{x:g}")
    above = axis.secondary_xaxis("top", functions=(lambda x: gflop * x, lambda x: x / gflop))
    above.xaxis.set_major_formatter("{x:g}")
    above.set_xlabel("GFLOP")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(seed=3)  # training has puzzles of seed 0, held-out scores of seed 1, pilots of seed 2
    parser.add_argument("--count", type=positive, default=200, help="minimal puzzles (default: 200)")
    parser.add_argument("--masks", type=int, default=4, help="masks per NELBO of an answer (default: 4)")
    parser.add_argument("--later-look", action="store_true", help="only try remasking by confidence")
    parser.add_argument(
        "--until", type=positive, help="only try symmetric copies until one is accepted, at most so many"
    )
    parser.add_argument("--plot", type=Path, help="only draw what is in benchmarks/results")
    args = parser.parse_args()
    begin(args)
    model, tokenizer = load()
    if args.plot is not None:
        plot(args.plot, STEPS * model.flops(1, 81) / 1e9)
        return
    search = Search(model, tokenizer, args.seed, args.count, args.masks)
    if args.later_look:
        search.later_look()
    elif args.until is not None:
        for judge in ("rules", "agreement", "nelbo"):
            search.until_accepted(judge, args.until)
    else:
        search.measure_all()
    write_result(args, rows=search.rows)


if __name__ == "__main__":
    main()
