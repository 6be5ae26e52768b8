# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The library's model, computed in bfloat16 from compiled layers, and a sampler; see trial.py."""

import time

import torch
from torch.nn import functional

CELLS, MASK = 81, 1


def _norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    states = states.float()
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6) * weight


def layer(states, qkv, out, gate_up, down, norm1, norm2, norm_q, norm_k, heads: int):
    """One pre-norm layer. States are float32, products in the dtype of the matrices."""
    batch, length, width = states.shape
    dtype = qkv.dtype
    query, key, value = (
        functional.linear(_norm(states, norm1).to(dtype), qkv).view(batch, length, 3, heads, -1).unbind(2)
    )
    query, key = _norm(query, norm_q), _norm(key, norm_k)
    query = (query * query.shape[-1] ** -0.5).to(dtype).transpose(1, 2)
    key, value = key.to(dtype).transpose(1, 2), value.transpose(1, 2)
    attention = (query @ key.transpose(2, 3)).float().softmax(-1).to(dtype) @ value
    states = states + functional.linear(attention.transpose(1, 2).reshape(batch, length, width), out)
    gate, up = functional.linear(_norm(states, norm2).to(dtype), gate_up).chunk(2, -1)
    return states + functional.linear((functional.silu(gate.float()) * up.float()).to(dtype), down)


def read(states, norm, embeddings):
    """Logits; [PAD] is a digit like others, as in the library, and [MASK] none."""
    logits = _norm(states, norm) @ embeddings.t()
    return logits.index_fill(-1, torch.tensor([MASK]), float("-inf"))


def loss(states, norm, embeddings, targets, weights):
    logits = _norm(states, norm) @ embeddings.t()
    logits = torch.where(torch.arange(logits.shape[-1]) == MASK, -1e9, logits)
    chosen = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return -(chosen * weights).sum()


_compiled_layer = torch.compile(layer, dynamic=False)
_compiled_loss = torch.compile(loss, dynamic=False)


class Looped:
    """A [`LoopMDMForMaskedLM`] with learned positions, query/key norm and a gated MLP, from its own weights."""

    def __init__(self, model, compiled: bool = False, dtype: torch.dtype = torch.bfloat16):
        self.model, self.head, self.config, self.dtype = model.model, model.lm_head, model.config, dtype
        self.layer, self.loss = (_compiled_layer, _compiled_loss) if compiled else (layer, loss)

    def weights(self) -> list[tuple]:
        """Once for each pass: gradients go through it."""
        parts = []
        for block in self.model.layers:
            attention, mlp = block.self_attn, block.mlp
            parts.append(
                (
                    torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)).to(
                        self.dtype
                    ),
                    attention.o_proj.weight.to(self.dtype),
                    torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).to(self.dtype),
                    mlp.down_proj.weight.to(self.dtype),
                    block.input_layernorm.weight,
                    block.post_attention_layernorm.weight,
                    attention.q_norm.weight,
                    attention.k_norm.weight,
                )
            )
        return parts

    def run(self, parts: list[tuple], states: torch.Tensor) -> torch.Tensor:
        for part in parts:
            states = self.layer(states, *part, heads=self.config.num_attention_heads)
        return states

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(inputs) + self.model.embed_positions.weight

    def losses(self, inputs, targets, weights, loops: int, deep: bool):
        """The weighted loss after every loop, or the last, and the last one's confidence."""
        start, stop = self.config.loop_start, self.config.loop_end
        parts = self.weights()
        head, mid, tail = parts[:start], parts[start:stop], parts[stop:]
        norm, embeddings = self.model.norm.weight, self.head.weight
        states, found = self.run(head, self.embed(inputs)), []
        for loop in range(loops):
            states = self.run(mid, states)
            if deep or loop == loops - 1:
                final = self.run(tail, states)
                found.append(self.loss(final, norm, embeddings, targets, weights))
        with torch.no_grad():
            confidence = read(final, norm, embeddings).softmax(-1).amax(-1)
        return found, confidence

    @torch.no_grad()
    def logits(self, inputs: torch.Tensor, loops: int | list[int], parts: list[tuple] | None = None):
        """Logits after so many loops; of several numbers a list."""
        start, stop = self.config.loop_start, self.config.loop_end
        parts = self.weights() if parts is None else parts
        wanted = loops if isinstance(loops, list) else [loops]
        states, found = self.run(parts[:start], self.embed(inputs)), {}
        for loop in range(1, max(wanted) + 1):
            states = self.run(parts[start:stop], states)
            if loop in wanted:
                found[loop] = read(self.run(parts[stop:], states), self.model.norm.weight, self.head.weight)
        return [found[loop] for loop in wanted] if isinstance(loops, list) else found[loops]


def one_step(model, tokens, blank, loops: list[int], batch_size: int = 50) -> dict[str, list[float]]:
    """After each number of loops, of one step from the clues alone: percent solved, percent of cells right, loss."""
    looped, sums = Looped(model), torch.zeros(len(loops), 3)
    for start in range(0, len(tokens), batch_size):
        clean, hidden = tokens[start : start + batch_size], blank[start : start + batch_size]
        for index, logits in enumerate(looped.logits(clean.masked_fill(hidden, MASK), loops)):
            right = logits.argmax(-1) == clean
            nats = functional.cross_entropy(logits[hidden], clean[hidden], reduction="sum")
            sums[index] += torch.stack(((right | ~hidden).all(-1).sum(), (right & hidden).sum(), nats))
    sums /= torch.tensor([len(tokens), blank.sum(), blank.sum()])
    return {
        str(number): [round(100 * solved, 1), round(100 * right, 1), round(nats, 3)]
        for number, (solved, right, nats) in zip(loops, sums.tolist(), strict=True)
    }


@torch.no_grad()
def decode(model, inputs: torch.Tensor, loops: int, steps: int, batch_size: int = 50) -> torch.Tensor:
    """Single greedy trajectories: each step commits an even share of the masks, the most confident first."""
    looped, done = Looped(model), []
    parts = looped.weights()
    for start in range(0, len(inputs), batch_size):
        boards = inputs[start : start + batch_size].clone()
        for left in range(steps, 0, -1):
            masked = boards == MASK
            active = masked.any(-1)
            if not active.any():
                break
            probabilities, best = looped.logits(boards[active], loops, parts).softmax(-1).max(-1)
            masked = masked[active]
            count = (masked.sum(-1) + left - 1) // left
            order = probabilities.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(-1)
            boards[active] = torch.where(masked & (order < count[:, None]), best, boards[active])
        done.append(boards)
    return torch.cat(done)


def many_steps(model, tokens, blank, loops: int, steps: int) -> float:
    """Percent of puzzles solved in so many steps."""
    answers = decode(model, tokens.masked_fill(blank, MASK), loops, steps)
    return round(100 * (answers == tokens).all(-1).float().mean().item(), 1)


def short_evaluation(model, tokens, blank, loops: int) -> dict:
    """For the curve: one step at several numbers of loops, 16 steps at the most of training."""
    started = time.perf_counter()
    grid = sorted({1, 2, max(1, loops // 4), max(1, loops // 2), loops, 2 * loops})
    record = {
        "one_step": one_step(model, tokens, blank, grid),
        "16_steps": many_steps(model, tokens[:100], blank[:100], loops, 16),
    }
    return {**record, "eval_seconds": round(time.perf_counter() - started, 1)}


def evaluation(model, tokens, blank, loops: int, count: int = 100, long: bool = False) -> dict:
    """Solve rates in percent, by loops and steps, of a single greedy trajectory."""
    started = time.perf_counter()
    grid = sorted({1, 2, max(1, loops // 4), max(1, loops // 2), loops, 2 * loops, 4 * loops})
    record = {"one_step_300": one_step(model, tokens, blank, grid), "puzzles": count, "by_loops_and_steps": {}}
    tokens, blank = tokens[:count], blank[:count]
    for number in (max(1, loops // 2), loops):
        record["by_loops_and_steps"][number] = {
            steps: many_steps(model, tokens, blank, number, steps) for steps in (4, 8, 16)
        }
    if long:
        record["by_loops_and_steps"][loops][64] = many_steps(model, tokens, blank, loops, 64)
    return {**record, "seconds": round(time.perf_counter() - started, 1)}


__all__ = ["Looped", "decode", "evaluation", "many_steps", "one_step", "short_evaluation"]
