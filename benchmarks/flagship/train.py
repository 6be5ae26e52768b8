# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
One training run on minimal Sudoku puzzles, resumable, with variants that the library does not have.

    python benchmarks/flagship/train.py --settings '{"name": "base", "tflop": 60}' --data DATA --output RUNS

The model is the library's and its checkpoints load with it; the forward pass here computes the same in bfloat16 from
compiled layers, 2 to 2.5 times as fast on a CPU with AVX512-BF16. One run is one folder of RUNS: `state.pt` (the last
checkpoint), `log.jsonl` (losses and short evaluations), `model/` and `result.json` (in the end).
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM
from loopmdm.data import write_json
from loopmdm.training import MuonAdamW

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "sudoku"))
import fast
import puzzles
from symmetry import Symmetry

CELLS, MASK, FIRST_DIGIT, VOCABULARY = 81, 1, 2, 11
SAVE_SECONDS, EVAL_TFLOP = 120.0, 10.0  # between two checkpoints, and two short evaluations


@dataclasses.dataclass
class Settings:
    """One trial. Defaults are the base that the pilots vary."""

    name: str = "base"
    tflop: float = 60.0
    stop: float = 0.0  # end after so many TFLOP all the same, in the middle of the schedules
    seed: int = 0
    # model
    init: str = ""  # folder of a model of this shape to go on from
    width: int = 128
    mlp: int = 352
    heads: int = 4
    head: int = 0
    mid: int = 1
    tail: int = 0
    positions: str = "plain"  # or "structured": sum of a row's, a column's and a box's random vector
    position_scale: float = 0.02
    tied: bool = True  # the head is the embedding
    embed_scale: float = 0.02  # standard deviation of the embedding, at first
    # loops
    loops: int = 16
    schedule: str = "constant"  # "uniform": 1..loops each step; "grow": from first_loops to loops until grow_until
    first_loops: int = 4
    grow_until: float = 0.5  # share of the budget
    grow_power: float = 1.0
    deep: bool = True  # a loss after every loop, weighted r / R
    # noise
    noise: str = "atom"  # "policy": reveal confident cells of the last step's rows; "uniform"
    atom: float = 0.5  # share of rows with every blank masked
    # optimiser
    batch: int = 32
    lr: float = 3e-3
    warmup: int = 50
    decay: float = 0.5  # the last share of the budget with a falling rate
    ema: float = 0.0  # decay of the averaged weights, which are then evaluated and saved


def build_model(settings: Settings) -> LoopMDMForMaskedLM:
    torch.manual_seed(settings.seed)
    model = LoopMDMForMaskedLM(
        LoopMDMConfig(
            vocab_size=VOCABULARY,
            hidden_size=settings.width,
            intermediate_size=settings.mlp,
            num_hidden_layers=settings.head + settings.mid + settings.tail,
            num_attention_heads=settings.heads,
            use_qk_norm=True,
            position_embedding_type="learned",
            max_position_embeddings=CELLS,
            loop_start=settings.head,
            loop_end=settings.head + settings.mid,
            tie_word_embeddings=settings.tied,
            num_loops=settings.loops,
            max_train_loops=settings.loops,
            mask_token_id=MASK,
            pad_token_id=0,
        )
    )
    positions = model.model.embed_positions.weight
    with torch.no_grad():
        if settings.positions == "structured":
            rows, columns, boxes = torch.randn(3, 9, settings.width)
            cell = torch.arange(CELLS)
            row, column = cell // 9, cell % 9
            positions.copy_((rows[row] + columns[column] + boxes[row // 3 * 3 + column // 3]) / math.sqrt(3))
        else:
            positions.normal_()
        positions.mul_(settings.position_scale)
        model.model.embed_tokens.weight.mul_(settings.embed_scale / 0.02)
    if settings.init:
        model.load_state_dict(LoopMDMForMaskedLM.from_pretrained(settings.init).state_dict())
    return model


def read_boards(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean tokens, `(N, 81)` int64, and which of them are blank in the puzzle, bool."""
    pairs = puzzles.read_puzzles(path)
    tokens = torch.tensor([[int(digit) + FIRST_DIGIT - 1 for digit in solution] for _, solution in pairs])
    blank = torch.tensor([[cell in puzzles.BLANKS for cell in puzzle] for puzzle, _ in pairs])
    return tokens, blank


class Noise:
    """Batches of clean tokens and what is masked. With "policy" a row stays for several steps, so there is a state."""

    def __init__(self, settings: Settings, boards: tuple[torch.Tensor, torch.Tensor]):
        self.settings, self.boards, self.rows = settings, boards, None

    def draw(self, step: int):
        settings = self.settings
        generator = torch.Generator().manual_seed(1_000_003 * settings.seed + step)
        size = settings.batch
        chosen = torch.randint(len(self.boards[0]), (size,), generator=generator)
        symmetry = Symmetry(size, generator, FIRST_DIGIT)
        tokens, blank = symmetry.apply(self.boards[0][chosen]), self.boards[1][chosen].gather(1, symmetry.cells)
        count = blank.sum(-1)
        every = torch.rand(size, generator=generator) < settings.atom
        if settings.noise == "policy":
            return self._policy(tokens, blank, every, generator)
        if settings.noise == "uniform":
            every = torch.zeros_like(every)
        uniform = (torch.rand((), generator=generator) + torch.arange(size) / size) % 1.0
        kept = torch.where(every, count, (uniform * count).long() + 1)
        # A random `kept` of the blanks of each row
        order = torch.rand(blank.shape, generator=generator).masked_fill(~blank, 2.0).argsort(-1).argsort(-1)
        return tokens, blank & (order < kept[:, None])

    def _policy(self, tokens, blank, new, generator):
        """Rows that are not `new` go on from their last step with the most confident cells opened, to their truth."""
        if self.rows is not None:
            old_tokens, old_masked, confidence = self.rows
            left = old_masked.sum(-1)
            share = torch.rand(len(left), generator=generator)
            order = confidence.masked_fill(~old_masked, -1.0).argsort(-1, descending=True).argsort(-1)
            masked = old_masked & (order >= (share * left).long()[:, None].clamp(min=1))
            new = new | (masked.sum(-1) == 0)
            tokens = torch.where(new[:, None], tokens, old_tokens)
            blank = torch.where(new[:, None], blank, masked)
        self.rows = (tokens, blank, torch.zeros(tokens.shape))
        return tokens, blank

    def observe(self, confidence: torch.Tensor):
        if self.settings.noise == "policy":
            self.rows = (*self.rows[:2], confidence)


def num_loops(settings: Settings, step: int, progress: float) -> int:
    generator = torch.Generator().manual_seed(7_000_003 * (settings.seed + 1) + step)
    if settings.schedule == "uniform":
        return int(torch.randint(1, settings.loops + 1, (), generator=generator))
    if settings.schedule == "grow":
        share = min(1.0, progress / settings.grow_until) ** settings.grow_power
        return round(settings.first_loops + share * (settings.loops - settings.first_loops))
    return settings.loops


def step_flops(settings: Settings, model: LoopMDMForMaskedLM, loops: int) -> int:
    """FLOPs of forward and backward of a batch, counted as the library counts."""
    once, twice = (model.flops(settings.batch, CELLS, number, 0) for number in (1, 2))
    mid = twice - once
    layer = mid // settings.mid
    logits = 2 * settings.batch * CELLS * settings.width * VOCABULARY
    losses = loops if settings.deep else 1
    return 3 * (settings.head * layer + mid * loops + losses * (settings.tail * layer + logits))


def rate(settings: Settings, step: int, progress: float) -> float:
    falling = min(1.0, (1 - progress) / settings.decay) if settings.decay else 1.0
    return settings.lr * min(1.0, (step + 1) / settings.warmup) * max(falling, 0.0)


@torch.no_grad()
def evaluate(model: LoopMDMForMaskedLM, tokens: torch.Tensor, blank: torch.Tensor, loops: int) -> dict:
    """
    `one_step`: by number of loops the percentage of boards solved and of cells right in one step from the clues, and
    nats per cell. `16_steps`: the percentage of the first 100 boards solved in 16 steps at the most loops.
    """
    model.eval()
    boards, found = tokens.masked_fill(blank, MASK), {}
    for number in sorted({1, 2, max(1, loops // 4), max(1, loops // 2), loops, 2 * loops}):
        logits = torch.cat([model(part, num_loops=number).logits for part in boards.split(50)])
        right = logits.argmax(-1) == tokens
        solved, cells = (right | ~blank).all(-1).float().mean().item(), right[blank].float().mean().item()
        nats = torch.nn.functional.cross_entropy(logits[blank], tokens[blank]).item()
        found[str(number)] = [round(100 * solved, 1), round(100 * cells, 1), round(nats, 3)]
    answers = [model.generate(part, num_loops=loops, max_denoising_steps=16) for part in boards[:100].split(50)]
    solved = (torch.cat(answers) == tokens[:100]).all(-1).float().mean().item()
    return {"one_step": found, "16_steps": round(100 * solved, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", required=True, help="JSON of what differs from the base")
    parser.add_argument("--data", type=Path, required=True, help="folder of minimal.txt and validation.txt")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(**json.loads(args.settings))
    folder = args.output / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "settings.json", dataclasses.asdict(settings))

    model = build_model(settings)
    optimizer = MuonAdamW(model, lr=settings.lr)
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()} if settings.ema else None
    noise = Noise(settings, read_boards(args.data / "minimal.txt"))
    validation = read_boards(args.data / "validation.txt")
    step, spent, seconds, next_eval = 0, 0.0, 0.0, EVAL_TFLOP
    state_file = folder / "state.pt"
    if state_file.is_file():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        noise.rows, average = state["rows"], state["average"]
        step, spent, seconds, next_eval = (state[name] for name in ("step", "spent", "seconds", "next_eval"))
        print(f"{settings.name}: resumed at step {step}, {spent / 1e12:.1f} TFLOP", flush=True)

    def log(**record):
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "tflop": round(spent / 1e12, 3), **record}) + "\n")

    def averaged():
        if average is None:
            return model
        copy = build_model(settings)
        copy.load_state_dict(average)
        return copy

    def save():
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rows": noise.rows,
            "average": average,
            "step": step,
            "spent": spent,
            "seconds": seconds,
            "next_eval": next_eval,
        }
        torch.save(state, folder / "state.tmp")
        os.replace(folder / "state.tmp", state_file)

    trained = fast.Looped(model)
    saved = time.perf_counter()
    losses: list[list[float]] = []
    budget = 1e12 * (settings.stop or settings.tflop)
    while spent < budget:
        started = time.perf_counter()
        progress = spent / (settings.tflop * 1e12)
        loops = num_loops(settings, step, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate(settings, step, progress)
        tokens, masked = noise.draw(step)
        inputs, weights = tokens.masked_fill(masked, MASK), masked / masked.sum()
        by_loop, confidence = trained.losses(inputs, tokens, weights, loops, settings.deep)
        importance = torch.arange(loops - len(by_loop) + 1, loops + 1, dtype=torch.float32)
        ((torch.stack(by_loop) * importance).sum() / importance.sum()).backward()
        noise.observe(confidence)
        spent += step_flops(settings, model, loops)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if average is not None:
            decay = min(settings.ema, (1 + step) / (10 + step))
            for name, tensor in model.state_dict().items():
                average[name].lerp_(tensor, 1 - decay)
        seconds += time.perf_counter() - started
        losses.append([by_loop[0].item(), by_loop[-1].item()])
        if not math.isfinite(losses[-1][-1]):
            raise FloatingPointError(f"loss {losses[-1]} at step {step}")
        if step % 20 == 0:
            first, last = (sum(column) / len(losses) for column in zip(*losses, strict=True))
            losses.clear()
            log(first=round(first, 4), last=round(last, 4), norm=round(norm, 3), loops=loops, seconds=round(seconds))
        if next_eval * 1e12 <= spent < budget:
            next_eval += EVAL_TFLOP
            log(seconds=round(seconds), **evaluate(averaged(), *validation, settings.loops))
        if time.perf_counter() - saved > SAVE_SECONDS:
            save()
            saved = time.perf_counter()
    save()
    best = averaged()
    best.save_pretrained(folder / "model")
    record = {
        "settings": dataclasses.asdict(settings),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": step,
        "training_tflop": spent / 1e12,
        "training_seconds": seconds,
        "evaluation": evaluate(best, *validation, settings.loops),
    }
    write_json(folder / "result.json", record)


if __name__ == "__main__":
    main()
