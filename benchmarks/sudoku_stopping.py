# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Which minimal Sudokus do loops solve, by clues and by the technique that a puzzle needs, and which rule should stop the
loops? Fixed numbers, `loop_tolerance`, two untrained rules that look at the answer, a gate trained on the frozen
model, and an oracle that knows what the last loop will answer. This makes the tables and the picture of
docs/results/minimal-sudokus.md:

    python benchmarks/sudoku_stopping.py --threads 1 --work /tmp/stopping \\
        --output benchmarks/results/sudoku_stopping.json --plot docs/results/techniques.png

One pass with all loops is recorded for every puzzle; as rows do not see each other, it says what each rule would have
answered, and after how many loops. Batches are kept in `--work`, and a run that is interrupted goes on from there.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from common import begin, fit, load, make_parser, puzzles, read_pairs, solved, write_result
from torch.nn import functional

from loopmdm.loop_policies import LoopPolicy

BATCH, TECHNIQUES = 50, ("singles", "pairs", "beyond")
SIZES = {
    "count": 1000,  # held-out puzzles
    "validation": 300,  # puzzles to choose limits on
    "train": 400,  # puzzles to train the gate on
    "trajectories": 150,  # held-out puzzles for 16 steps
    "four_steps": 1000,  # held-out puzzles for four steps
    "epochs": 5,  # of the gate's training
}


class Recorder(LoopPolicy):
    """Stops nothing, and keeps what rules look at after every loop."""

    def __init__(self, model):
        self.model, self.states, self.probabilities, self.changes = model, [], [], []

    def goes_on(self, index, before, after, part):
        logits = self.model.lm_head(self.model.model.norm(after))[..., -9:]
        self.states.append(after.half())
        self.probabilities.append(logits.softmax(-1))
        self.changes.append((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1))
        return torch.ones(len(after), dtype=torch.bool)


@torch.no_grad()
def record(model, boards: torch.Tensor) -> dict[str, torch.Tensor]:
    """All loops over (N, 81) boards: states (loops, N, 81, width), the digits' probabilities, relative changes."""
    recorder = Recorder(model)
    model(boards, num_loops=model.config.num_loops, loop_policy=recorder)
    probabilities = torch.stack(recorder.probabilities)
    blank = boards == model.config.mask_token_id
    answers = probabilities.argmax(-1) + model.config.vocab_size - 9
    moved = ((probabilities[1:] - probabilities[:-1]).abs().amax(-1) * blank).amax(-1)
    return {
        "states": torch.stack(recorder.states),
        "answers": torch.where(blank, answers, boards).to(torch.int8),
        "changes": torch.stack(recorder.changes),
        "moved": torch.cat((torch.ones_like(moved[:1]), moved)),
        "blank": blank,
    }


class Stopper(LoopPolicy):
    """A row stops once its score, `score(before, after, blank)` of shape (N,), falls below the limit."""

    def __init__(self, score: Callable, limit: float):
        self.score, self.limit = score, limit

    def goes_on(self, index, before, after, part):
        going = self.score(before, after, part.masked) >= self.limit
        return going if index > 0 else torch.ones_like(going)  # the first loop is compared with nothing


class Unchanged(LoopPolicy):
    """A row stops once `count` loops in a row have not changed its answer, `answer(states)` of shape (N, 81)."""

    def __init__(self, answer: Callable, count: int):
        self.answer, self.count = answer, count

    def goes_on(self, index, before, after, part):
        if index == 0:
            self.answers, self.run = self.answer(after), torch.zeros(len(after))
            return torch.ones(len(after), dtype=torch.bool)
        answers = self.answer(after)
        same = ((answers == self.answers) | ~part.masked).all(-1)
        self.run = (self.run + 1) * same
        going = self.run < self.count
        self.answers, self.run = answers[going], self.run[going]  # the next call has the rows that go on
        return going


class Puzzles:
    """Minimal puzzles of a seed, and what has been recorded of them."""

    def __init__(self, work: Path, model, tokenizer, seed: int, count: int):
        self.work, self.model, self.seed = work, model, seed
        self.pairs = puzzles.generate_puzzles(count, seed, None, None)
        self.boards, self.solutions = read_pairs(tokenizer, self.pairs)

    def batches(self, name: str, compute: Callable, count: int | None = None) -> list:
        found = []
        for number, boards in enumerate(self.boards[:count].split(BATCH)):
            path = self.work / f"{name}-{self.seed}-{number * BATCH}-{len(boards)}.pt"
            if not path.is_file():
                torch.save(compute(self.model, boards), path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
            found.append(torch.load(path, mmap=True))
        return found

    def read(self) -> None:
        """Records all loops; sets right (loops, N): is the answer right after that loop?"""
        self.parts = self.batches("pass", record)
        self.answers, self.changes, self.moved = (
            torch.cat([part[name] for part in self.parts], 1) for name in ("answers", "changes", "moved")
        )
        self.right = (self.answers == self.solutions).all(-1)


def trajectory(model, boards: torch.Tensor) -> torch.Tensor:
    return model.generate(boards, num_loops=model.config.num_loops, max_denoising_steps=16)


def by_group(held_out: Puzzles, steps_right: torch.Tensor) -> list[dict]:
    """Solve rates by loops in one step, and in 16 steps of the first puzzles, for clues and techniques."""
    clues = [sum(char not in puzzles.BLANKS for char in puzzle) for puzzle, _ in held_out.pairs]
    ranges = ["at most 22", "23", "24", "25", "26", "at least 27"]
    groups = {"technique": [puzzles.technique(puzzle) for puzzle, _ in held_out.pairs]}
    groups["clues"] = [ranges[min(max(number, 22), 27) - 22] for number in clues]
    rows = []
    for kind, labels in groups.items():
        for label in TECHNIQUES if kind == "technique" else ranges:
            members = torch.tensor([one == label for one in labels])
            if not members.any():
                continue
            row = {kind: label, "puzzles": int(members.sum())}
            row["loops"] = [solved(right[members]) for right in held_out.right]
            chosen = steps_right[members[: len(steps_right)]]
            row["in_16_steps"] = solved(chosen) | {"puzzles": len(chosen)} if len(chosen) else None
            rows.append(row)
    return rows


def train_gate(model, data: Puzzles, epochs: int) -> torch.nn.Module:
    """Says of a blank, from its state and the change in the last loop, whether its answer is not yet the last one."""
    width = model.config.hidden_size
    gate = torch.nn.Sequential(torch.nn.Linear(2 * width, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1))
    inputs, labels = [], []
    for part in data.parts:
        blank = part["blank"].expand(len(part["states"]) - 1, -1, -1)
        inputs.append(gate_inputs(part["states"])[blank])
        labels.append((part["answers"][1:] != part["answers"][-1])[blank])
    features, targets = torch.cat(inputs), torch.cat(labels).float()

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(targets), (4096,))
        return functional.binary_cross_entropy_with_logits(gate(features[chosen].float())[:, 0], targets[chosen])

    fit(gate, loss, epochs * len(targets) // 4096)
    return gate.requires_grad_(False)


def gate_inputs(states: torch.Tensor) -> torch.Tensor:
    """(loops - 1, N, 81, 2 * width): directions of the states after loops 2, 3, ... and what the loop changed."""
    directions = functional.normalize(states.float(), dim=-1) * states.shape[-1] ** 0.5
    return torch.cat((directions[1:], directions[1:] - directions[:-1]), -1).half()


@torch.no_grad()
def gate_scores(gate: torch.nn.Module, data: Puzzles) -> torch.Tensor:
    """(loops, N): the largest logit of a row's blanks; nothing stops after the first loop."""
    found = []
    for part in data.parts:
        logits = torch.stack([gate(one.float())[..., 0] for one in gate_inputs(part["states"])])
        logits = logits.masked_fill(~part["blank"], -torch.inf).amax(-1)
        found.append(torch.cat((torch.full_like(logits[:1], torch.inf), logits)))
    return torch.cat(found, 1)


def stop(scores: torch.Tensor, limit: float) -> torch.Tensor:
    """(N,): the first loop, counted from 0, whose score is below the limit, or the last loop."""
    below = scores < limit
    below[-1] = True
    return below.to(torch.int8).argmax(0)


def rules(data: Puzzles, gate: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Scores (loops, N) that fall as the answer settles; the oracle knows the answer after the last loop."""
    same = (data.answers[1:] == data.answers[:-1]).all(-1)
    run = torch.zeros(data.right.shape)
    for loop in range(1, len(run)):  # how many loops in a row have not changed the answer
        run[loop] = (run[loop - 1] + 1) * same[loop - 1]
    settled = torch.arange(len(run), dtype=torch.float)[:, None].expand_as(run)
    return {
        "fixed number": -settled,
        "loop_tolerance": data.changes,
        "answer unchanged": -run,
        "probabilities": data.moved,
        "gate": gate_scores(gate, data),
        "oracle": (data.answers != data.answers[-1]).any(-1).float(),
    }


def paired(right: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Percentage points by which `right` is above `reference`, both of the same puzzles, and the standard error."""
    change = 100 * (right.double() - reference.double())
    return {
        "change": round(float(change.mean()), 2),
        "paired_error": round(float(change.std(correction=0) / len(change) ** 0.5), 2),
    }


def compare(validation: Puzzles, held_out: Puzzles, gate: torch.nn.Module) -> list[dict]:
    """For each rule, the limit with the fewest loops that costs one validation puzzle in 300 at most, on held-out."""
    rows, there = [], rules(held_out, gate)
    for name, scores in rules(validation, gate).items():
        limits = scores[scores.isfinite()].unique()
        limits = [*limits[:: max(len(limits) // 400, 1)].tolist(), float("-inf")]
        cost = []
        for limit in limits:
            at = stop(scores, limit)
            rate = float(validation.right.gather(0, at[None]).double().mean())
            is_good = rate >= float(validation.right[-1].double().mean()) - 1 / 300 - 1e-9
            cost.append(float(at.double().mean()) if is_good else float("inf"))
        limit = limits[cost.index(min(cost))]
        at = stop(there[name], limit)
        right, loops = held_out.right.gather(0, at[None])[0], float(at.double().mean()) + 1
        row = {"rule": name, "limit": limit if limit > float("-inf") else None, "mean_loops": round(loops, 2)}
        row |= {"validation_loops": round(min(cost) + 1, 2)}
        rows.append(row | solved(right) | paired(right, held_out.right[-1]))
        print(rows[-1], flush=True)
    return rows


def in_four_steps(model, gate: torch.nn.Module, stopping: list[dict], held_out: Puzzles, number: int) -> list[dict]:
    """
    The same limits in every one of four denoising steps. Rules that lose more than their error among the first 100
    puzzles are not tried on more.
    """

    def probabilities(states):
        return model.lm_head(model.model.norm(states))[..., -9:].softmax(-1)

    def moved(before, after, blank):
        first, second = (probabilities(one) for one in (before, after))
        return ((second - first).abs().amax(-1) * blank).amax(-1)

    def gated(before, after, blank):
        logits = gate(gate_inputs(torch.stack((before, after)))[0].float())[..., 0]
        return logits.masked_fill(~blank, -torch.inf).amax(-1)

    def unchanged(limit):  # the scores are the negative runs
        return Unchanged(lambda states: probabilities(states).argmax(-1), round(1 - limit))

    limits = {row["rule"]: row["limit"] for row in stopping}
    settings_of = {
        "probabilities": lambda limit: {"loop_policy": Stopper(moved, limit)},
        "answer unchanged": lambda limit: {"loop_policy": unchanged(limit)},
        "loop_tolerance": lambda limit: {"loop_tolerance": limit},
        "gate": lambda limit: {"loop_policy": Stopper(gated, limit)},
    }
    # A limit of None stops nothing.
    arms = {name: make(limits[name]) for name, make in settings_of.items() if limits[name] is not None}
    arms = {"16 loops": {}, **arms, "visible_loops=2": {"visible_loops": 2}}
    rows, reference = [], None
    for name, settings in arms.items():

        def answer(model, boards, settings=settings):
            sizes = {"num_loops": model.config.num_loops, "max_denoising_steps": 4, "return_dict_in_generate": True}
            output = model.generate(boards, **sizes, **settings)
            return {"answers": output.sequences, "loops": output.loops, "flops": output.flops}

        for count in sorted({min(number, 100), number}):
            parts = held_out.batches(f"four-{name}-{limits.get(name)}", answer, count)
            answers, loops, flops = (torch.cat([part[key] for part in parts]) for key in ("answers", "loops", "flops"))
            right = (answers == held_out.solutions[:count]).all(-1)
            row = {
                "rule": name,
                "puzzles": count,
                "loops": round(float(loops.double().mean()), 1),
                "mflops": round(float(flops.sum()) / 1e6 / count),
                **solved(right),
                **paired(right, right if reference is None else reference[:count]),
            }
            if row["change"] + row["paired_error"] < 0:
                break
        reference = right if reference is None else reference
        rows.append(row)
        print(rows[-1], flush=True)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for row in (row for row in rows if "technique" in row):
        rates, errors = ([one[name] for one in row["loops"]] for name in ("solved", "standard_error"))
        label = f"{row['technique']} ({row['puzzles']} puzzles)"
        axis.errorbar(range(1, len(rates) + 1), rates, errors, marker=".", label=label)
    axis.set(xlabel="loops, in one step", ylabel="solved, %", title="What loops solve, by technique needed")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = make_parser(__doc__)
    parser.set_defaults(seed=1)  # of the held-out puzzles; validation has 2, and the gate is trained on 5
    parser.set_defaults(**SIZES)
    parser.add_argument("--work", type=Path, required=True, help="folder for what is recorded")
    parser.add_argument("--plot", type=Path, help="draw solve rates by loops and technique")
    parser.add_argument("--quick", action="store_true", help="four of everything: a test of the script")
    args = parser.parse_args()
    if args.quick:
        vars(args).update(dict.fromkeys(SIZES, 4))
    begin(args)
    torch.manual_seed(0)
    args.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load()
    held_out, validation, train = (
        Puzzles(args.work, model, tokenizer, seed, count)
        for seed, count in ((args.seed, args.count), (2, args.validation), (5, args.train))
    )
    held_out.read()
    print([solved(right)["solved"] for right in held_out.right], flush=True)
    validation.read()
    train.read()
    gate = train_gate(model, train, args.epochs)
    stopping = compare(validation, held_out, gate)
    answers = torch.cat(held_out.batches("steps", trajectory, args.trajectories))
    rows = by_group(held_out, (answers == held_out.solutions[: len(answers)]).all(-1))
    if args.plot is not None:
        plot(rows, args.plot)
    four_steps = in_four_steps(model, gate, stopping, held_out, args.four_steps)
    write_result(args, rows=rows, stopping=stopping, four_steps=four_steps)


if __name__ == "__main__":
    main()
