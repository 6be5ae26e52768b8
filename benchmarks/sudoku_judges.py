# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Are there cheaper judges of Sudoku answers than the NELBO of `sudoku_search.py`? On its puzzles: a second look, in
which the model reads the filled board and says how likely it finds the digits that it sees, and a small head that is
trained on what the model makes of the filled board to say whether the answer is right. This makes their rows in
docs/results/search.md:

    python benchmarks/sudoku_judges.py --output benchmarks/results/sudoku_judges.json

The head is trained on one-step answers to symmetric copies of other puzzles. The limits, up to which an answer is
accepted, are those that judge the most four-step answers to a third set of puzzles correctly.
"""

import torch
from common import begin, fit, load, make_parser, write_result
from sudoku_search import Search
from torch.nn import functional

SIZES = {
    "count": 150,  # puzzles to choose answers to
    "candidates": 8,  # copies to choose from
    "until_count": 300,  # puzzles to accept answers to
    "until": 64,  # copies tried at most
    "train": 300,  # puzzles to train the head on
    "copies": 4,  # of each of them
    "epochs": 60,
    "validation": 300,  # puzzles to choose limits on
}


class Looks(Search):
    """A search whose judges look at filled boards, with a few loops."""

    batch_size = 16

    def __init__(self, model, tokenizer, seed: int, count: int, loops: int):
        super().__init__(model, tokenizer, seed, count)
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
        return torch.stack([self.copy(index, **settings)[0] for index in range(copies)])


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

    def loss() -> torch.Tensor:
        rows = torch.randint(len(right), (size,))
        board, cells = head(states[rows], log_probs[rows], blank[rows])
        return sum(
            functional.binary_cross_entropy(one.exp().clamp(1e-6, 1 - 1e-6), target.float())
            for one, target in ((board, right[rows].all(-1)), (cells[blank[rows]], right[rows][blank[rows]]))
        )

    fit(head, loss, epochs * len(right) // size)
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
    parser.set_defaults(**SIZES)
    parser.add_argument("--loops", type=int, default=4, help="loops of a look (default: 4)")
    parser.add_argument("--quick", action="store_true", help="four of everything: a test of the script")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(dict.fromkeys(SIZES, 4))
    begin(args)
    model, tokenizer = load()

    def looks(seed: int, count: int) -> Looks:
        return Looks(model, tokenizer, seed, count, args.loops)

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
