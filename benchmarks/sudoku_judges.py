# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Cheaper judges of Sudoku answers than the NELBO of `sudoku_search.py`, on its puzzles: a second look, in which the
model reads the filled board and says how likely it finds the digits that it sees, and a small head that is trained on
what the model makes of the filled board to say whether the answer is right.

    python benchmarks/sudoku_judges.py --output benchmarks/results/sudoku_judges.json

The head is trained on one-step answers to symmetric copies of other puzzles. The limits, up to which an answer is
accepted, are those that judge the most four-step answers to a third set of puzzles correctly.
"""

import torch
from common import begin, make_parser, write_result
from flagship.symmetry import Symmetry
from sudoku_search import Search, puzzles
from torch.nn import functional
from transformers import AutoTokenizer

from loopmdm import LoopMDMForMaskedLM


class Looks(Search):
    """A search whose judges look at filled boards, with a few loops."""

    def __init__(self, model, tokenizer, pairs, batch_size: int, loops: int):
        super().__init__(model, tokenizer, pairs, batch_size)
        self.loops, self.spent = loops, model.flops(1, self.boards.shape[1], num_loops=loops)

    @torch.no_grad()
    def look(self, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States of the cells `(N, 81, width)`, and log-probabilities of their digits, with the answers in sight."""
        states = [self.model.model(part, num_loops=self.loops)[0] for part in answers.split(self.batch_size)]
        log_probs = self.model.logits(torch.cat(states)).log_softmax(-1)
        return torch.cat(states), log_probs.gather(-1, answers[..., None])[..., 0]

    def second_look(self, answers, rows):
        return -(self.look(answers)[1].double() * self.blank[rows]).sum(-1), self.spent

    def use(self, head: torch.nn.Module) -> None:
        def judge(answers, rows):
            with torch.no_grad():
                return -head(*self.look(answers), self.blank[rows])[0].double(), self.spent

        self.judges = {"second look": (self.second_look, 0.0), "head": (judge, 0.0)}

    def answers(self, copies: int, **settings) -> torch.Tensor:
        """Answers to symmetric copies of all puzzles, `(copies, N, 81)`."""
        found = [self.generate(self.boards, **settings)[0]]
        for index in range(1, copies):
            symmetry = Symmetry(len(self.boards), torch.Generator().manual_seed(index), self.first_digit)
            found.append(symmetry.undo(self.generate(symmetry.apply(self.boards), **settings)[0]))
        return torch.stack(found)


class Head(torch.nn.Module):
    """The log-probability that every blank is filled in correctly `(N,)`, and its terms for the cells `(N, 81)`."""

    def __init__(self, width: int):
        super().__init__()
        self.cell = torch.nn.Sequential(torch.nn.Linear(width + 1, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1))

    def forward(self, states, log_probs, blank):
        features = torch.cat((states, log_probs.clamp(min=-10)[..., None]), -1)
        cells = functional.logsigmoid(self.cell(features)[..., 0]).masked_fill(~blank, 0)
        return cells.sum(-1), cells


def train_head(data: Looks, copies: int, epochs: int) -> Head:
    answers = data.answers(copies, max_denoising_steps=1)
    states, log_probs = (torch.cat(parts) for parts in zip(*(data.look(one) for one in answers), strict=True))
    right, blank = (answers == data.solutions).flatten(0, 1), data.blank.repeat(copies, 1)
    print(f"{len(right)} answers to train on, {int((~right.all(-1)).sum())} of them wrong", flush=True)
    head, size = Head(states.shape[-1]), min(64, len(right))
    steps = max(epochs * len(right) // size, 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(right), (size,))
        board, cells = head(states[rows], log_probs[rows], blank[rows])
        loss = sum(
            functional.binary_cross_entropy(one.exp().clamp(1e-6, 1 - 1e-6), target.float())
            for one, target in ((board, right[rows].all(-1)), (cells[blank[rows]], right[rows][blank[rows]]))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


def best_limit(scores: torch.Tensor, right: torch.Tensor) -> float:
    """The limit with the fewest wrong verdicts, in the middle (of logarithms) between the scores next to it."""
    scores, order = scores.clamp(min=1e-9).sort()
    right = right[order]
    errors = (
        torch.cat((torch.zeros(1), (~right).cumsum(0))) + right.sum() - torch.cat((torch.zeros(1), right.cumsum(0)))
    )
    at = int(errors.argmin())
    below, above = scores[max(at - 1, 0)], scores[min(at, len(scores) - 1)]
    return float((below * above).sqrt())


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(seed=3)  # as in sudoku_search.py; the head is trained on puzzles of seed 5
    parser.add_argument("--model", default=".", help="folder of the model (default: this one, the bundled model's)")
    parser.add_argument("--count", type=int, default=150, help="puzzles to choose answers to (default: 150)")
    parser.add_argument("--candidates", type=int, default=8, help="copies to choose from (default: 8)")
    parser.add_argument("--until-count", type=int, default=300, help="puzzles to accept answers to (default: 300)")
    parser.add_argument("--until", type=int, default=64, help="symmetric copies tried at most (default: 64)")
    parser.add_argument("--train", type=int, default=300, help="puzzles to train the head on (default: 300)")
    parser.add_argument("--copies", type=int, default=4, help="symmetric copies of each of them (default: 4)")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--validation", type=int, default=300, help="puzzles to choose limits on (default: 300)")
    parser.add_argument("--loops", type=int, default=4, help="loops of a look (default: 4)")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    begin(args)
    model = LoopMDMForMaskedLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def looks(seed: int, count: int) -> Looks:
        return Looks(model, tokenizer, puzzles.generate_puzzles(count, seed, None, None), args.batch_size, args.loops)

    head = train_head(looks(5, args.train), args.copies, args.epochs)
    validation, search, until = (
        looks(2, args.validation),
        looks(args.seed, args.count),
        looks(args.seed, args.until_count),
    )
    for one in (validation, search, until):
        one.use(head)
    answers, limits = validation.answers(1, max_denoising_steps=4)[0], {}
    right = validation.right(answers)
    for name, (judge, _) in validation.judges.items():
        scores = judge(answers, slice(None))[0]
        limits[name] = best_limit(scores, right)
        verdicts = {"right_accepted": int((scores <= limits[name])[right].sum()), "right": int(right.sum())}
        verdicts["wrong_accepted"] = int((scores <= limits[name])[~right].sum())
        print(name, limits[name], verdicts, flush=True)
    until.judges = {name: (judge, limits[name]) for name, (judge, _) in until.judges.items()}
    for name in until.judges:
        until.until_accepted(name, args.until)
    search.candidates("symmetric copies", args.candidates)
    parameters = sum(one.numel() for one in head.parameters())
    write_result(args, parameters=parameters, limits=limits, until=until.rows, rows=search.rows)


if __name__ == "__main__":
    main()
