# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Ideas for spending fewer loops at inference, on the Sudoku model: solve rate against layers executed per position.

    python benchmarks/loop_reuse.py --plan choose --seed 2 --count 240 --output docs/loop_reuse.json
    python benchmarks/loop_reuse.py --plan test --seed 1 --count 2000 --output docs/loop_reuse.json
    python benchmarks/loop_reuse.py --plan decide --seed 1 --count 2000 --output docs/loop_reuse.json

`choose` runs wide grids on puzzles of a seed of its own; `test` runs every idea in the settings that were chosen, most
of them on a share of the puzzles; `decide` runs the few that differ by little on all of them. All settings see the
same puzzles, so differences between them are paired (`minus_s6`: from six loops in as many steps). A puzzle counts as
solved when every blank is right. Cost is counted, not timed: token-layer passes divided by the number of positions.
"""

import argparse
import json
import math
import multiprocessing
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoTokenizer

from loopmdm import LoopMDMForMaskedLM

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "sudoku"))
import puzzles

HEAD, MID, TAIL, PASSES = range(4)  # columns of a cost


class Pass:
    """One forward pass over boards `(rows, length)`: the state after every loop and its logits, on demand."""

    def __init__(self, model, tokens):
        self.model, self.tokens, self.masked = model, tokens, tokens == model.config.mask_token_id
        state, self.context = model.model.prelude(tokens)
        self.states, self._logits, self.done = [state], {}, {}

    def state(self, loops: int):
        while len(self.states) <= loops:
            self.states.append(self.loop(self.states[-1]))
        return self.states[loops]

    def logits(self, loops: int):
        if loops not in self._logits:
            self._logits[loops] = self.readout(self.state(loops))
        return self._logits[loops]

    def loop(self, state):
        return self.model.model.loop(state, self.context)

    def readout(self, state):
        logits = self.model.lm_head(self.model.model.readout(state, self.context))
        logits[..., self.model.config.mask_token_id] = -math.inf
        return logits

    def cost(self, head=1.0, loops=0.0, readouts=1.0):
        """Layers executed per position, for every row; `loops` counts applications of the whole of mid."""
        config, rows = self.model.config, len(self.tokens)
        spent = torch.zeros(rows, 4)
        spent[:, HEAD] = head * config.loop_start
        spent[:, MID] = loops * (config.loop_end - config.loop_start)
        spent[:, TAIL] = readouts * (config.num_hidden_layers - config.loop_end)
        spent[:, PASSES] = 1
        return spent


# A method runs one forward pass: it takes the Pass, the index of the denoising step, the rows of the batch that still
# denoise, and a dictionary of tensors over the whole batch that it may keep between steps. It returns logits, costs,
# and the boards if it has changed them.


class Budget:
    """A number of loops for every denoising step (the last one goes on)."""

    def __init__(self, *loops: int):
        self.loops = loops

    def __call__(self, work, step, rows, memory):
        loops = self.loops[min(step, len(self.loops) - 1)]
        return work.logits(loops), work.cost(loops=loops), None


class RowExit:
    """
    Loops until a row has settled. Rules: "change" (relative change of the row's state under `tolerance`), "masked"
    (the same over its masked positions only), "prediction" (no masked position's best token changed, which takes a
    readout for every loop).
    """

    def __init__(self, tolerance: float | None, cap: int, rule: str = "change"):
        self.tolerance, self.cap, self.rule = tolerance, cap, rule

    def __call__(self, work, step, rows, memory):
        state, loops = work.state(0).clone(), torch.zeros(len(work.tokens))
        active = torch.arange(len(state))
        weight = work.masked[..., None] if self.rule == "masked" else torch.ones(1)
        best = None
        for index in range(1, self.cap + 1):
            before = state[active]
            known = index < len(work.states) or step == 0  # the first step's states are shared between settings
            after = work.state(index)[active] if known else work.loop(before)
            state[active] = after
            loops[active] += 1
            if self.rule == "prediction":
                logits = work.logits(index)[active] if known else work.readout(after)
                predicted = logits.argmax(-1)
                same = torch.zeros(len(active), dtype=torch.bool)
                if best is not None:
                    same = ((predicted == best) | ~work.masked[active]).all(-1)
                best = predicted[~same]
            else:
                part = weight[active] if self.rule == "masked" else weight
                change = ((after - before) * part).flatten(1).norm(dim=1) / (before * part).flatten(1).norm(dim=1)
                same = change < self.tolerance
            active = active[~same]
            if len(active) == 0:
                break
        readouts = loops if self.rule == "prediction" else 1
        return work.readout(state), work.cost(loops=loops, readouts=readouts), None


class TokenExit:
    """
    Loops single positions until they have settled; the others go on attending to the keys and values of a settled
    position's last update. A position settles when its own relative change falls under `tolerance`, or, with
    `patience`, when its best token has stayed the same for so many loops (visible positions then loop as long as any
    masked one of their row); a visible one also settles after `visible_loops`, and all do after `cap`.
    """

    def __init__(
        self, cap: int, tolerance: float = 0.0, visible_loops: int | None = None, patience: int | None = None
    ):
        self.cap, self.tolerance, self.patience = cap, tolerance, patience
        self.visible_loops = cap if visible_loops is None else visible_loops

    def __call__(self, work, step, rows, memory):
        layers = work.model.model.layers[work.model.config.loop_start : work.model.config.loop_end]
        state, length = work.state(0), work.tokens.shape[1]
        active = torch.ones_like(work.masked)
        stored = [None] * len(layers)
        updates, readouts = torch.zeros(len(state)), torch.zeros(len(state))
        best, agreed = None, torch.zeros_like(work.tokens)
        for index in range(1, self.cap + 1):
            updates += active.sum(-1)
            readouts += active.any(-1)
            before = state
            state = partial_loop(layers, state, active, stored)
            if self.tolerance > 0:
                change = (state - before).norm(dim=-1) / before.norm(dim=-1)
                active = active & ~(change < self.tolerance)
            if self.patience is not None:
                predicted = work.readout(state).argmax(-1)
                agreed = torch.where(predicted == best, agreed + 1, 0) if best is not None else agreed
                best = predicted
                masked_active = active & work.masked & (agreed < self.patience)
                active = masked_active | (active & ~work.masked & masked_active.any(-1, keepdim=True))
            if index >= self.visible_loops:
                active = active & work.masked
            if not active.any():
                break
        readouts = readouts if self.patience is not None else 1
        return work.readout(state), work.cost(loops=updates / length, readouts=readouts), None


def partial_loop(layers, state, active, stored):
    """Mid once on the active positions; `stored` holds the last keys and values of all positions, and is updated."""
    width = int(active.sum(-1).max())
    columns = active.int().argsort(dim=-1, descending=True, stable=True)[:, :width, None]
    valid = active.gather(1, columns[..., 0])[..., None]
    picked = state.take_along_dim(columns, 1)
    hidden = picked
    for index, layer in enumerate(layers):
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        shape = (*normed.shape[:2], -1, attention.head_dim)
        query = attention.q_norm(attention.q_proj(normed).view(shape))
        key = attention.k_norm(attention.k_proj(normed).view(shape)).flatten(2)
        value = attention.v_proj(normed)
        if stored[index] is None:  # the first loop: all positions are active
            stored[index] = torch.empty_like(key), torch.empty_like(value)
        for old, new in zip(stored[index], (key, value), strict=True):
            kept = torch.where(valid, new, old.take_along_dim(columns, 1))
            old.scatter_(1, columns.expand_as(kept), kept)
        keys, values = (tensor.view(len(tensor), -1, *query.shape[2:]).transpose(1, 2) for tensor in stored[index])
        mixed = scaled_dot_product_attention(query.transpose(1, 2), keys, values, scale=attention.scaling)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    hidden = torch.where(valid, hidden, picked)
    return state.scatter(1, columns.expand_as(hidden), hidden)


class WarmStart:
    """
    Mid begins from its final state in the previous denoising step, and runs `loops` times (`first` times in the first
    step). `mix` says where the unchanged positions begin: "keep" (that state; head runs on the changed positions
    only), "average" (its mean with head's output), "average_all" (the changed positions too), "difference" (that
    state plus the change of head's output, at all positions). Elsewhere changed positions begin from head's output.
    """

    def __init__(self, loops: int, first: int, mix: str):
        self.loops, self.first, self.mix = loops, first, mix

    def __call__(self, work, step, rows, memory):
        fresh, head = work.state(0), 1.0
        if step == 0:
            loops, state = self.first, work.state(self.first)
            memory["state"], memory["head"], memory["tokens"] = (
                tensor.clone() for tensor in (state, fresh, work.tokens)
            )
            logits = work.logits(loops)
        else:
            loops, last = self.loops, memory["state"][rows]
            changed = work.tokens != memory["tokens"][rows]
            if self.mix == "keep":
                state = torch.where(changed[..., None], fresh, last)
                head = changed.float().mean(-1)
            elif self.mix == "average":
                state = torch.where(changed[..., None], fresh, (fresh + last) / 2)
            elif self.mix == "average_all":
                state = (fresh + last) / 2
            else:
                state = last + fresh - memory["head"][rows]
            for _ in range(loops):
                state = work.loop(state)
            memory["state"][rows], memory["head"][rows], memory["tokens"][rows] = state, fresh, work.tokens
            logits = work.readout(state)
        return logits, work.cost(head=head, loops=loops), None


class HeadReuse:
    """Head runs only on positions whose token has changed; others keep that of their last change."""

    def __init__(self, loops: int):
        self.loops = loops

    def __call__(self, work, step, rows, memory):
        state, head = work.state(0), 1.0
        if step == 0:
            memory["head"], memory["tokens"] = state.clone(), work.tokens.clone()
            return work.logits(self.loops), work.cost(loops=self.loops), None
        changed = work.tokens != memory["tokens"][rows]
        head = changed.float().mean(-1)
        state = torch.where(changed[..., None], state, memory["head"][rows])
        memory["head"][rows], memory["tokens"][rows] = state, work.tokens
        for _ in range(self.loops):
            state = work.loop(state)
        return work.readout(state), work.cost(head=head, loops=self.loops), None


class CommitBetweenLoops:
    """
    Reads out after every `interval` loops and commits at once the masked positions of at least `threshold`; head's
    output of the new tokens replaces their state, and looping goes on, `cap` loops at most. Head costs only the new
    positions: with one layer in head, its stored keys and values make their outputs exactly those of a full rerun.
    """

    def __init__(self, interval: int, threshold: float, cap: int):
        self.interval, self.threshold, self.cap = interval, threshold, cap

    def __call__(self, work, step, rows, memory):
        tokens, state = work.tokens.clone(), work.state(0)
        head, loops, readouts = torch.ones(len(state)), torch.zeros(len(state)), torch.zeros(len(state))
        changed = False  # while no board has changed, the shared states serve
        final = torch.zeros_like(work.logits(self.interval))
        for index in range(1, self.cap + 1):
            masked = tokens == work.model.config.mask_token_id
            active = masked.any(-1)
            if not active.any():
                break
            loops += active
            state = work.loop(state) if changed else work.state(index)
            if index % self.interval and index < self.cap:
                continue
            readouts += active
            logits = work.readout(state) if changed else work.logits(index)
            final = torch.where(active[:, None, None], logits, final)
            if index == self.cap:
                break
            confidence, predicted = confidence_of(logits)
            commit = masked & (confidence >= self.threshold)
            if commit.any():
                changed = True
                tokens = torch.where(commit, predicted, tokens)
                state = torch.where(commit[..., None], work.model.model.prelude(tokens)[0], state)
                # A row that is done needs no more of head.
                head += commit.float().mean(-1) * (tokens == work.model.config.mask_token_id).any(-1)
        return final, work.cost(head=head, loops=loops, readouts=readouts), tokens


def confidence_of(logits):
    """As in generation_utils.py, to the last bit: confidences of 1 tie."""
    predicted = logits.argmax(-1)
    chosen = logits.gather(-1, predicted[..., None]).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).exp(), predicted


def denoise(model, tokens, method, steps: int, threshold: float | None, first: Pass):
    """Greedy generation by confidence, as `generate` does it. Returns the boards and the cost of every row."""
    tokens, mask = tokens.clone(), model.config.mask_token_id
    size, cost, memory = (tokens == mask).sum(-1), torch.zeros(len(tokens), 4), {}
    for step in range(steps):
        rows = (tokens == mask).any(-1).nonzero()[:, 0]
        if len(rows) == 0:
            break
        work = first if step == 0 else Pass(model, tokens[rows])
        if step == 0 and method in first.done:  # the same method with other steps has been here
            logits, spent, changed, memory = first.done[method]
            memory = {name: tensor.clone() for name, tensor in memory.items()}
        else:
            logits, spent, changed = method(work, step, rows, memory)
            if step == 0:
                first.done[method] = logits, spent, changed, {name: kept.clone() for name, kept in memory.items()}
        cost[rows] += spent
        boards = tokens[rows] if changed is None else changed
        masked = boards == mask
        confidence, predicted = confidence_of(logits)
        share, remainder = size[rows] // steps, size[rows] % steps
        left = masked.sum(-1)
        due = share * (step + 1) + remainder.clamp(max=step + 1) - (size[rows] - left)
        quota = torch.minimum(due.clamp(min=1), left)
        order = confidence.masked_fill(~masked, -math.inf).argsort(dim=-1, descending=True, stable=True)
        commit = masked & (order.argsort(dim=-1) < quota[:, None])
        if threshold is not None:
            commit |= masked & (confidence >= threshold)
        tokens[rows] = torch.where(commit, predicted, boards)
    return tokens, cost


# --- what is run: name -> (method, steps, threshold, every): on every so-many-th batch of puzzles ---

STEPS = {"1": (1, None), "2": (2, None), "4": (4, None), "8": (8, None), "threshold": (8, 0.9)}


def make_plan(settings) -> dict:
    return {
        f"{name} | {mode}": (method, *STEPS[mode], every) for name, method, modes, every in settings for mode in modes
    }


def choose_plan() -> dict:
    few, both = ["1"], ["1", "threshold"]
    settings = [(f"constant S={loops}", Budget(loops), both, 1) for loops in (1, 2, 3, 4, 6, 8)]
    for cap, tolerance in ((6, 0.1), (6, 0.14), (6, 0.17), (6, 0.2), (12, 0.1), (12, 0.14)):
        for rule in ("change", "masked"):
            settings.append((f"row {rule} cap={cap} tol={tolerance}", RowExit(tolerance, cap, rule), few, 1))
    for tolerance in (0.1, 0.14, 0.2, 0.28):
        settings.append((f"token change cap=6 tol={tolerance}", TokenExit(6, tolerance), few, 1))
    for visible in (1, 2):
        for cap in (4, 6, 8):
            method = TokenExit(cap, visible_loops=visible)
            settings.append((f"token visible={visible} cap={cap}", method, both, 1))
    for cap, tolerances in ((6, (0.1, 0.14, 0.2, 0.28)), (8, (0.1, 0.14))):
        for tolerance in tolerances:
            method = TokenExit(cap, tolerance, visible_loops=1)
            settings.append((f"token visible=1 cap={cap} tol={tolerance}", method, few, 1))
    for patience in (1, 2):
        method = TokenExit(6, patience=patience)
        settings.append((f"token prediction cap=6 patience={patience}", method, few, 4))
    settings.append(("row prediction cap=6", RowExit(None, 6, "prediction"), few, 1))
    for interval in (1, 2, 3):
        for threshold in (0.9, 0.99):
            method = CommitBetweenLoops(interval, threshold, 6)
            settings.append((f"commit every={interval} at={threshold} cap=6", method, few, 4))
    for mix in ("keep", "average", "average_all", "difference"):
        for loops in (1, 2, 3):
            settings.append((f"warm {mix} S={loops} first=6", WarmStart(loops, 6, mix), ["threshold"], 4))
    for loops in (1, 2, 3):
        settings.append((f"constant S=6,{loops}", Budget(6, loops), ["threshold"], 4))
    return make_plan(settings)


def test_plan() -> dict:
    """All ideas; many run on every 2nd, 4th, 8th or 16th batch only."""
    settings, modes = [], {"one": "1", "two": "2", "four": "4", "eight": "8", "threshold": "threshold"}

    def add(name, method, **every):
        settings.extend((name, method, [modes[mode]], share) for mode, share in every.items())

    # 1. constant
    add("constant S=1", Budget(1), one=1, threshold=4, four=8, eight=8)
    add("constant S=2", Budget(2), one=1, threshold=4, four=4, eight=4)
    add("constant S=3", Budget(3), one=1, threshold=1, two=8, four=4, eight=4)
    add("constant S=4", Budget(4), one=1, threshold=1, two=8, four=4, eight=8)
    add("constant S=6", Budget(6), one=1, threshold=1, two=4, four=4, eight=4)
    add("constant S=8", Budget(8), one=1, threshold=4)
    add("constant S=12", Budget(12), one=1)
    # 2. rows stop
    add("row change cap=6 tol=0.14", RowExit(0.14, 6), one=1, threshold=4, eight=16)
    add("row change cap=6 tol=0.17", RowExit(0.17, 6), one=1, threshold=4)
    add("row change cap=6 tol=0.2", RowExit(0.2, 6), one=1)
    add("row change cap=8 tol=0.1", RowExit(0.1, 8), one=1)
    add("row change cap=12 tol=0.1", RowExit(0.1, 12), one=1)
    add("row masked cap=6 tol=0.14", RowExit(0.14, 6, "masked"), one=1)
    add("row prediction cap=6", RowExit(None, 6, "prediction"), one=2)
    # 3. tokens stop
    add("token change cap=6 tol=0.14", TokenExit(6, 0.14), one=4, threshold=8)
    add("token change cap=6 tol=0.2", TokenExit(6, 0.2), one=4)
    for patience in (1, 2):
        add(f"token prediction cap=6 patience={patience}", TokenExit(6, patience=patience), one=16)
    add("token visible=1 cap=6", TokenExit(6, visible_loops=1), one=1, threshold=1, four=4, eight=4)
    add("token visible=2 cap=6", TokenExit(6, visible_loops=2), one=1, threshold=1, two=4, four=4, eight=4)
    add("token visible=3 cap=6", TokenExit(6, visible_loops=3), one=4, threshold=4)
    add("token visible=2 cap=4", TokenExit(4, visible_loops=2), one=2, threshold=2, four=8, eight=8)
    add("token visible=2 cap=8", TokenExit(8, visible_loops=2), one=2)
    # 4. budgets by step
    for budget in ((6, 3, 2, 1), (1, 2, 3, 6), (1, 5, 5, 1), (4, 2, 1, 1), (1, 1, 2, 4), (1, 3, 3, 1)):
        add(f"budget {budget}", Budget(*budget), four=8)
    for budget in ((4, 3, 3, 2, 1, 1, 1, 1), (1, 1, 1, 1, 2, 3, 3, 4), (1, 1, 2, 4, 4, 2, 1, 1)):
        add(f"budget {budget}", Budget(*budget), eight=16)
    # 5. warm start
    for loops in (1, 2, 3):
        add(f"constant S=6,{loops}", Budget(6, loops), threshold=8)
        for mix in ("keep", "average", "average_all", "difference"):
            every = {"four": 16} if loops == 2 else {}
            add(f"warm {mix} S={loops} first=6", WarmStart(loops, 6, mix), threshold=8, **every)
    add("constant S=6,2", Budget(6, 2), four=16)
    # 6. head reuse
    add("head reuse S=6", HeadReuse(6), threshold=4, four=8, eight=16)
    # 7. commits between loops
    for interval in (1, 2, 3):
        for threshold in (0.9, 0.99):
            add(f"commit every={interval} at={threshold} cap=6", CommitBetweenLoops(interval, threshold, 6), one=8)
    add("commit every=3 at=0.99 cap=12", CommitBetweenLoops(3, 0.99, 12), one=8)
    return make_plan(settings)


def decide_plan() -> dict:
    """What differs by little, on all puzzles: one step and parallel commitment."""
    few, both = ["1"], ["1", "threshold"]
    settings = [
        (f"constant S={loops}", Budget(loops), both if loops in (3, 4, 6) else few, 1) for loops in range(1, 9)
    ]
    for visible in (1, 2, 3):
        settings.append((f"token visible={visible} cap=6", TokenExit(6, visible_loops=visible), both, 1))
    settings.append(("row change cap=6 tol=0.14", RowExit(0.14, 6), few, 1))
    settings.append(("row change cap=6 tol=0.17", RowExit(0.17, 6), few, 1))
    settings.append(("row change cap=12 tol=0.1", RowExit(0.1, 12), few, 2))
    settings.append(("row masked cap=6 tol=0.14", RowExit(0.14, 6, "masked"), few, 1))
    return make_plan(settings)


PLANS = {"choose": choose_plan, "test": test_plan, "decide": decide_plan}


def run_batch(task):
    """Solved and costs of one batch under every setting that takes it."""
    index, boards, solutions = task
    model, plan = WORKER["model"], WORKER["plan"]
    with torch.inference_mode():
        first, results = Pass(model, boards), {}
        for name, (method, steps, threshold, every) in plan.items():
            if index % every == 0:
                tokens, cost = denoise(model, boards, method, steps, threshold, first)
                results[name] = ((tokens == solutions).all(-1).tolist(), cost.tolist())
    return index, results


WORKER = {}


def start_worker(folder: str, plan: str) -> None:
    torch.set_num_threads(1)
    WORKER["model"] = LoopMDMForMaskedLM.from_pretrained(folder).eval()
    WORKER["plan"] = PLANS[plan]()


def check_against_generate(model, boards) -> None:
    """The study's own denoising gives what `generate` gives, board for board and layer for layer."""
    first = Pass(model, boards)
    for method, arguments in (
        (Budget(3), {"num_loops": 3}),
        (RowExit(0.1, 6), {"num_loops": 6, "loop_tolerance": 0.1}),
        (TokenExit(3), {"num_loops": 3}),
        (Budget(4, 3, 2, 1), {"num_loops": [4, 3, 2, 1]}),
    ):
        for steps, threshold in ((1, None), (4, None), (8, 0.9)):
            if isinstance(arguments["num_loops"], list) and steps != 4:
                continue
            tokens, cost = denoise(model, boards, method, steps, threshold, first)
            expected = model.generate(
                boards,
                max_new_tokens=0,
                max_denoising_steps=steps,
                confidence_threshold=threshold,
                return_dict_in_generate=True,
                **arguments,
            )
            same = (tokens == expected.sequences).all(-1)
            counted = cost[:, :PASSES].sum(-1)
            if not same.all() or not torch.allclose(counted, expected.layer_passes.float()):
                raise SystemExit(f"{method.__class__.__name__} {arguments} in {steps} steps differs from `generate`.")


def summarize(results: dict[str, dict[int, tuple]], plan: dict) -> list[dict]:
    """A row per setting; the difference from S=6 in the same steps is paired, with its standard error."""
    rows = []
    for name, batches in results.items():
        solved = {i: value for i, (value, _) in batches.items()}
        cost = torch.tensor([row for _, (_, value) in sorted(batches.items()) for row in value])
        flat = torch.tensor([value for i in sorted(solved) for value in solved[i]], dtype=torch.float64)
        mean = cost.mean(0)
        row = {
            "method": name.split(" | ")[0],
            "steps": name.split(" | ")[1],
            "puzzles": len(flat),
            "solved": flat.mean().item(),
            "standard_error": (flat.std() / len(flat) ** 0.5).item(),
            "layers": mean[:PASSES].sum().item(),
            "head": mean[HEAD].item(),
            "mid": mean[MID].item(),
            "tail": mean[TAIL].item(),
            "passes": mean[PASSES].item(),
            "loops_per_pass": (mean[MID] / 2 / mean[PASSES]).item(),
        }
        for loops in (6, 1):
            other = results.get(f"constant S={loops} | {row['steps']}")
            if other is not None:
                common = sorted(set(batches) & set(other))
                if common:
                    mine, theirs = (
                        torch.tensor([value for i in common for value in source[i][0]], dtype=torch.float64)
                        for source in (batches, other)
                    )
                    difference = mine - theirs
                    row[f"minus_s{loops}"] = difference.mean().item()
                    row[f"minus_s{loops}_error"] = (difference.std() / len(difference) ** 0.5).item()
                    row[f"only_here_vs_s{loops}"] = int((difference > 0).sum())
                    row[f"only_s{loops}"] = int((difference < 0).sum())
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".", help="folder of the model (default: the current one)")
    parser.add_argument("--plan", choices=sorted(PLANS), default="test", help="which settings (default: test)")
    parser.add_argument("--count", type=int, default=2000, help="number of puzzles (default: 2000)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the puzzles (default: 1)")
    parser.add_argument("--threads", type=int, default=2, help="worker processes of one thread each (default: 2)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop early; the batches done by then count")
    parser.add_argument("--batch-size", type=int, default=16, help="puzzles that run together (default: 16)")
    parser.add_argument("--output", help="JSON file to write, or to add this plan to")
    args = parser.parse_args()

    torch.set_num_threads(1)
    model = LoopMDMForMaskedLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = puzzles.generate_puzzles(args.count, args.seed, 32, 46)
    boards, solutions = (torch.tensor(tokenizer(list(texts))["input_ids"]) for texts in zip(*pairs, strict=True))
    with torch.no_grad():
        check_against_generate(model, boards[:16])
    print("agrees with `generate`", flush=True)

    plan = PLANS[args.plan]()
    tasks = [
        (index, boards[start : start + args.batch_size].clone(), solutions[start : start + args.batch_size].clone())
        for index, start in enumerate(range(0, len(boards), args.batch_size))
    ]
    results, started = {name: {} for name in plan}, time.monotonic()
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.threads, start_worker, (args.model, args.plan)) as pool:
        for done, (index, batch) in enumerate(pool.imap_unordered(run_batch, tasks), start=1):
            for name, result in batch.items():
                results[name][index] = result
            if done % 10 == 0 or done == len(tasks):
                print(f"{done}/{len(tasks)} batches, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            if time.monotonic() - started > 60 * args.minutes:
                break
    rows = summarize(results, plan)
    for row in rows:
        paired = f"{100 * row['minus_s6']:+6.2f} +- {100 * row['minus_s6_error']:.2f}" if "minus_s6" in row else ""
        print(
            f"{row['method']:36s} {row['steps']:>9s}  n={row['puzzles']:<5d} {100 * row['solved']:5.2f} %  "
            f"layers {row['layers']:6.2f}  passes {row['passes']:4.2f}  loops {row['loops_per_pass']:4.2f}  {paired}"
        )
    if args.output:
        settings = {
            name: value for name, value in vars(args).items() if name not in ("model", "output", "threads", "minutes")
        }
        path = Path(args.output)
        record = json.loads(path.read_text()) if path.is_file() else {}
        record[args.plan] = {"settings": settings, "torch": torch.__version__, "rows": rows}
        path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
