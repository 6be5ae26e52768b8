# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What tests of generation share: batches, a model whose predictions are known, counts from outside, and two slow, plain
references. [`sample_row`] is the sampler, one row in plain Python from the documentation alone; [`Stored`] is a
transformer written out from the weights, which keeps keys and values by hand.
"""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from types import SimpleNamespace

import evaluation_models
import torch
from tiny import MASK, PAD, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from loopmdm import LoopMDMForMaskedLM
from loopmdm.modeling_loopmdm import LoopMDMMaskedLMOutput

CLOSE = 1e-6  # what float32 may get wrong of a number of about 1
BLOCK = 4  # of the attention of block-causal models
# Every row has a known token: positions that see nothing but [MASK] are ties, which rounding breaks.
ROWS = [[5, 3, 8, 1, 9, 2], [7, MASK, 6], [4, MASK, 11, 8, MASK, 2, 9, 1, 3]]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double_model(**overrides) -> LoopMDMForMaskedLM:
    """A tiny model of two loops in float64, where what differs by rounding alone gives the same tokens."""
    return tiny_model(**{"num_loops": 2} | overrides).double()


def batch_of(rows: list[list[int]], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as a batch and its mask, padded on the `"left"`, on the `"right"`, or anywhere (`"scattered"`)."""
    width = max(map(len, rows)) + (2 if side == "scattered" else 0)
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        places = torch.arange(len(row)) + (width - len(row) if side == "left" else 0)
        if side == "scattered":
            places = torch.randperm(width, generator=seeded(number))[: len(row)].sort().values
        ids[number, places], mask[number, places] = torch.tensor(row), 1
    return ids, mask


def real_tokens(sequences: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """What stands in the rows without padding; all positions behind the mask's are new."""
    real = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1).bool()
    return [row[where].tolist() for row, where in zip(sequences, real, strict=True)]


def run(model, ids, mask=None, **arguments):
    """`generate` with all that it reports."""
    arguments = {"return_dict_in_generate": True, "output_trace": True} | arguments
    return model.generate(ids, attention_mask=mask, **arguments)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word for every token of `tiny_config`."""
    # The last is what StopStringCriteria learns from how a tokenizer joins words
    words = ["[PAD]", *map(chr, range(97, 118)), "[MASK]", "abcdef"]
    return evaluation_models.word_tokenizer(words, pad_token="[PAD]", eos_token=None, mask_token="[MASK]")


class TableModel(LoopMDMForMaskedLM):
    """Predicts the probabilities `table`, `(length, vocab_size - 1)`, whatever it is shown, and keeps that."""

    def __init__(self, table):
        logits = torch.tensor(table, dtype=torch.float32).log()
        vocab_size = logits.shape[1] + 1
        super().__init__(tiny_config(vocab_size=vocab_size, mask_token_id=vocab_size - 1, pad_token_id=None))
        self.table = torch.nn.functional.pad(logits, (0, 1), value=-math.inf)  # [MASK] has no score
        self.inputs: list[torch.Tensor] = []

    def forward(self, input_ids, num_loops=None, logits_to_keep=None, **other):
        self.inputs.append(input_ids.clone())
        return LoopMDMMaskedLMOutput(logits=self.table[logits_to_keep], loops=torch.full((len(input_ids),), num_loops))

    def masks(self, num_rows: int = 1) -> torch.Tensor:
        """Input of [MASK]s alone, one per row of the table."""
        return torch.full((num_rows, len(self.table)), self.config.mask_token_id)


class Recorder:
    """A streamer without drafts."""

    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        assert value.ndim == 1 and value.device.type == "cpu"
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


def commit_steps(trace) -> torch.Tensor:
    """The step that (last) committed each position, `(num_rows, length)`; -1 where none did."""
    steps = torch.full(trace[0].committed.shape, -1)
    for number, step in enumerate(trace):
        steps[step.committed] = number
    return steps


@contextmanager
def counted(model, flops: bool = True):
    """
    Counts what runs within: `flops`, which is slow, and lists of (rows, positions), one for each call, of the
    `passes`, of every layer (`layers[i]`), of the last layer's MLP (`last`) and of the output `head`.
    """
    counts = SimpleNamespace(flops=0, passes=[], layers=[[] for _ in model.model.layers], last=[], head=[])

    def note(shapes):
        def hook(module, args, kwargs):
            shapes.append(tuple((args[0] if args else kwargs["input_ids"]).shape[:2]))

        return hook

    watched = [(model.model, counts.passes), (model.model.layers[-1].mlp, counts.last), (model.lm_head, counts.head)]
    watched += zip(model.model.layers, counts.layers, strict=True)
    handles = [module.register_forward_pre_hook(note(shapes), with_kwargs=True) for module, shapes in watched]
    with FlopCounterMode(display=False) if flops else nullcontext() as counter:
        yield counts
    counts.flops = counter.get_total_flops() if flops else None
    for handle in handles:
        handle.remove()


# Predictors of `sample_row`: called with (tokens, start, stop, step, loops, copy), a block from `start` to `stop` and
# which of the two rows of guidance it is, they return logits of every position, and the loops of every pass that ran.


def plain(model, length, keeps=False, **exits):
    """
    Every step is a forward pass over all that the block may see. Of a model that `keeps` what stands before it, later
    steps compute the block alone: a given token there, which guidance hides, is no [MASK] to loop for.
    """
    size, mask = model.config.attention_block_size, None
    if size is not None:
        blocks = torch.arange(length) // size
        hidden = (blocks[:, None] < blocks)[None, None]
        mask = torch.zeros(hidden.shape, dtype=model.dtype).masked_fill(hidden, torch.finfo(model.dtype).min)

    def predict(tokens, start, stop, step, num_loops, copy):
        # Later [MASK]s, which the block does not see, would loop too and be counted.
        stop = len(tokens) if mask is None else stop
        seen = None if mask is None else mask[..., :stop, :stop]
        output = model(torch.tensor([tokens[:stop]]), attention_mask=seen, num_loops=num_loops, **exits)
        loops = int(output.loops)
        if keeps and step > 0 and "visible_loops" in exits and model.config.mask_token_id not in tokens[start:stop]:
            loops = min(exits["visible_loops"], num_loops)
        return output.logits[0], [loops]

    return predict


def block_exits(model, length, keeps=True, **exits):
    """
    Block-causal models with an exit rule: what stands before a block is computed in a pass of its own, with all loops
    but what `visible_loops` takes; once a block, or at every step where nothing `keeps` it. The block may stop
    earlier.
    """
    visible = {"visible_loops": exits["visible_loops"]} if "visible_loops" in exits else {}
    kept = [0, 0]  # how much of the row is computed, for each row of guidance

    def predict(tokens, start, stop, step, num_loops, copy):
        ids, cache, source, filled = torch.tensor([tokens[:stop]]), None, start, []
        if start > 0:
            output = model(ids[:, :start], num_loops=num_loops, use_cache=True, **visible)
            cache, filled = output.cache, [int(output.loops)] if step == 0 or not keeps else []
            if filled and keeps and visible and model.config.mask_token_id not in tokens[kept[copy] : start]:
                filled = [min(num_loops, *visible.values())]
            kept[copy] = start
            source = start - int(model.config.shift_logits)  # whose state predicts the block's first token
        output = model(
            ids[:, source:],
            position_ids=torch.arange(source, stop)[None],
            past_key_values=cache,
            num_loops=num_loops,
            **exits,
        )
        logits = torch.nn.functional.pad(output.logits[0], (0, 0, source, 0))
        return logits, [*filled, int(output.loops)]

    return predict


class Stored:
    """
    Fast-dLLM's caches by their definition, for one row: the first step of a block (and every `interval`-th) computes
    all positions, the others the block alone (`"dual"`), or the block and all behind it (`"prefix"`). The keys and
    values of every layer stay as they were when a position was last computed, in mid in the last loop that did.
    """

    def __init__(self, model, length, kind="dual", interval=None, tolerance=None, visible_loops=None):
        self.model, self.config, self.length, self.kind = model, model.config, length, kind
        self.interval, self.tolerance, self.visible_loops = interval, tolerance, visible_loops
        self.memory = {}

    def refreshes(self, step):
        return step == 0 if self.interval is None else step % self.interval == 0

    def __call__(self, tokens, start, stop, step, num_loops, copy):
        first, last = max(start - 1, 0) if self.config.shift_logits else start, stop
        if self.refreshes(step):
            first, last = 0, self.length
        elif self.kind == "prefix":
            last = self.length
        logits, loops = self.run(tokens, first, last, num_loops, copy)
        return torch.nn.functional.pad(logits, (0, 0, first, 0)), [loops]

    def layers(self, start, stop, hidden, positions, copy):
        for index in range(start, stop):
            hidden = self.layer(index, hidden, positions, copy)
        return hidden

    def layer(self, index, hidden, positions, copy):
        config, layer = self.config, self.model.model.layers[index]
        attention, normed = layer.self_attn, layer.input_layernorm(hidden)
        query, key, value = (
            projection(normed).view(len(positions), -1, config.head_dim).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = attention.q_norm(query), attention.k_norm(key)
        if config.position_embedding_type == "rope":
            cos, sin = self.model.model.rotary_emb(hidden[None], positions[None], torch.tensor([self.length]))
            turn = torch.complex(cos, sin)[0, :, : config.head_dim // 2]

            def rotate(x):
                turned = torch.complex(*x.chunk(2, dim=-1)) * turn
                return torch.cat((turned.real, turned.imag), dim=-1)

            query, key = rotate(query), rotate(key)
        shape = (2, config.num_key_value_heads, self.length, config.head_dim)
        stored = self.memory.setdefault((index, copy), torch.zeros(shape).double())
        stored[0, :, positions], stored[1, :, positions] = key, value
        keys, values = stored.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, dim=1)
        attended = (query @ keys.transpose(1, 2) / math.sqrt(config.head_dim)).softmax(-1) @ values
        hidden = hidden + attention.o_proj(attended.transpose(0, 1).flatten(1))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def run(self, tokens, start, stop, num_loops, copy):
        """Computes the positions from `start` to `stop`: their logits, and the loops that ran."""
        config, inner, positions = self.config, self.model.model, torch.arange(start, stop)
        ids = torch.tensor(tokens[start:stop])
        hidden = inner.embed_tokens(ids)
        if config.position_embedding_type == "learned":
            hidden = hidden + inner.embed_positions(positions)
        hidden = self.layers(0, config.loop_start, hidden, positions, copy)
        loops, moving = 0, torch.ones(len(ids), dtype=torch.bool)
        while loops < num_loops and moving.any():
            before = hidden[moving]
            after = self.layers(config.loop_start, config.loop_end, before, positions[moving], copy)
            if config.loop_update == "damped":
                after = before + (after - before) / num_loops
            hidden, loops = hidden.index_put((moving,), after), loops + 1
            if self.tolerance is not None and (after - before).norm() < self.tolerance * before.norm():
                break
            if self.visible_loops is not None and loops >= self.visible_loops:
                moving = ids == config.mask_token_id
                if config.shift_logits:
                    moving = moving | torch.nn.functional.pad(moving[1:], (0, 1))
        hidden = self.layers(config.loop_end, config.num_hidden_layers, hidden, positions, copy)
        states = inner.norm(hidden)
        if config.shift_logits:
            states = torch.cat((states[:1], states[:-1]))
        return self.model.logits(states), loops


# The sampler


@dataclass
class Step:
    """What one denoising step of [`sample_row`] did."""

    block: int
    step: int
    loops: int
    committed: dict[int, tuple[float, float]]  # by position the probability, and the log-probability when drawn
    remasked: list[int]
    tokens: list[int]


@dataclass
class Sample:
    """
    Result of [`sample_row`]: the tokens, the loops of every forward pass, the steps, and whether two numbers that were
    compared lie so close that `generate`, which computes them in float32, may have decided otherwise.
    """

    tokens: list[int]
    passes: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    is_close: bool = False

    def note(self, *distances):
        """Of numbers that are compared; what is equal to the last bit stays so."""
        self.is_close |= any(0 < abs(distance) < CLOSE for distance in distances)

    def best(self, score: dict[int, float], highest: dict[int, float], count: int) -> set[int]:
        """
        The `count` positions of the highest scores; from the left among those that differ from the last one by no more
        than rounding does, given the `highest` probability at each.
        """
        if count < 1:
            return set()
        order = sorted(score, key=lambda place: (-score[place], place))
        last = order[min(count, len(order)) - 1]
        tie = 1e-5 * (abs(score[last]) + highest[last])
        gaps = {place: score[place] - score[last] for place in order}
        for gap in gaps.values():
            self.note(*([] if gap == 0 else [abs(gap) - tie]))
        above = {place for place in order if gaps[place] > tie}
        ties = sorted(place for place in order if abs(gaps[place]) <= tie)
        return above | set(ties[: count - len(above)])

    def warped(self, logits, temperature=1.0, top_k=None, top_p=None, min_p=None):
        """Scores `(vocab_size,)` after the sampling arguments, in transformers' order."""
        logits = logits / temperature
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -math.inf)
        if top_p is not None:
            probs, order = logits.softmax(-1).sort(descending=True, stable=True)
            self.note(*(probs.cumsum(-1) - top_p).tolist())
            logits = logits.index_fill(0, order[probs.cumsum(-1) - probs >= top_p], -math.inf)
        if min_p is not None:
            probs = logits.softmax(-1)
            self.note(*(probs - min_p * probs.max()).tolist())
            logits = logits.masked_fill(probs < min_p * probs.max(), -math.inf)
        return logits


@torch.no_grad()
def sample_row(
    predict,
    prompt,
    model,
    generator=None,
    max_new_tokens=0,
    block_length=None,
    max_denoising_steps=None,
    num_loops=None,
    unmasking="confidence",
    confidence_threshold=None,
    entropy_bound=None,
    remask_probability=0.0,
    eos_token_id=(),
    eos_penalty=0.0,
    pad_token_id=PAD,
    do_sample=False,
    guidance_scale=None,
    **sampling,
) -> Sample:
    """One row, step by step. Numbers are drawn for all positions of the block: tokens, then order, then remasking."""
    mask, block_size = model.config.mask_token_id, model.config.attention_block_size
    tokens = [*prompt, *[mask] * max_new_tokens]
    given, sample = [token != mask for token in tokens], Sample(tokens)
    loops_of = num_loops if isinstance(num_loops, list) else [num_loops or model.config.num_loops]
    block_length = block_length or block_size or len(tokens)
    origin = next((place for place, token in enumerate(tokens) if token == mask), len(tokens))
    origin = origin if block_size is None else origin // block_length * block_length
    last_given = max((place for place in range(len(tokens)) if given[place]), default=-1)
    is_ancestral = unmasking == "ancestral"

    for block, start in enumerate(range(origin, len(tokens), block_length)):
        stop = min(start + block_length, len(tokens))
        members = [place for place in range(start, stop) if not given[place]]
        num_steps = max_denoising_steps or len(members)
        if not (is_ancestral or remask_probability):
            num_steps = min(num_steps, len(members))
        logits, seen = None, None

        def draw(members=members):
            return dict(zip(members, torch.rand(len(members), generator=generator).tolist(), strict=True))

        for step in range(num_steps if members else 0):
            masked = [place for place in members if tokens[place] == mask]
            if not masked and not remask_probability:
                break
            loops, spent = loops_of[min(step, len(loops_of) - 1)], []
            # A step that finds the row as the one before found it has the same scores.
            if seen != (tokens, loops) or (isinstance(predict, Stored) and predict.refreshes(step)):
                logits, spent = predict(tokens, start, stop, step, loops, 0)
                if guidance_scale not in (None, 1):
                    hidden = [mask if given[place] else token for place, token in enumerate(tokens)]
                    unconditional, more = predict(hidden, start, stop, step, loops, 1)
                    unconditional, spent = unconditional.float(), spent + more
                    logits = unconditional + guidance_scale * (logits.float() - unconditional)
                    logits[:, mask] = -math.inf
            seen = ([*tokens], loops)
            sample.passes += spent

            noise = draw() if do_sample or is_ancestral else None
            choice, confidence, log_prob, score, highest = {}, {}, {}, {}, {}
            order = draw() if unmasking == "random" else None
            for place in masked:
                raw = logits[place].float().double()
                scores = sample.warped(raw, **sampling)
                choice[place] = int(scores.argmax())
                if noise is not None:
                    cumulative = scores.softmax(-1).cumsum(-1)
                    sample.note(*(cumulative[:-1] - noise[place]).tolist())
                    choice[place] = int((cumulative <= noise[place]).sum().clamp(max=len(cumulative) - 1))
                probs, penalty = raw.softmax(-1), eos_penalty * (choice[place] in eos_token_id)
                confidence[place] = float(probs[choice[place]]) - penalty
                log_prob[place] = confidence[place] + penalty, float(scores.log_softmax(-1)[choice[place]])
                highest[place], second = probs.topk(2).values.tolist()
                entropy = -float(torch.xlogy(probs, probs).sum()) + penalty
                score[place] = {
                    "confidence": confidence[place],
                    "margin": highest[place] - second - penalty,
                    "entropy": -entropy,
                    "left_to_right": -place,
                    "random": order and order[place],
                    "ancestral": 0.0,
                }[unmasking]
                confidence[place] = confidence[place], entropy

            rate = min(remask_probability, (num_steps - step - 1) / max(step, 1))
            if is_ancestral:
                chance = draw()
                commits = {place for place in masked if chance[place] < (1 + rate * step) / (num_steps - step)}
            chance = draw() if remask_probability else {}
            remasked = [place for place in chance if tokens[place] != mask and chance[place] < rate]
            if not is_ancestral:
                share = len(members) // num_steps * (step + 1) + min(len(members) % num_steps, step + 1)
                if remask_probability:
                    share = len(members) * (step + 1) // num_steps + len(remasked)
                quota = share - (len(members) - len(masked))
                quota = max(quota, 0 if remask_probability else 1)
                commits = sample.best(score, highest, quota)
            if confidence_threshold is not None:
                sample.note(*(confidence[place][0] - confidence_threshold for place in masked))
                commits |= {place for place in masked if confidence[place][0] >= confidence_threshold}
            if entropy_bound is not None:
                totals = [0.0, *accumulate(sorted(confidence[place][1] for place in masked))][: len(masked)]
                sample.note(*(total - entropy_bound for total in totals))
                within = sum(total <= entropy_bound for total in totals)
                commits |= sample.best({place: -confidence[place][1] for place in masked}, highest, within)

            for place in commits:
                tokens[place] = choice[place]
            for place in remasked:
                tokens[place] = mask
            committed = {place: log_prob[place] for place in sorted(commits)}
            sample.steps.append(Step(block, step, sum(spent), committed, remasked, [*tokens]))
            first_mask = tokens.index(mask) if mask in tokens else len(tokens)
            ends = [p for p in range(last_given + 1, first_mask) if not given[p] and tokens[p] in eos_token_id]
            if ends:
                tokens[ends[0] + 1 :] = [pad_token_id] * (len(tokens) - ends[0] - 1)
                return sample
    return sample


def assert_equals_reference(model, predictor=plain, rows=ROWS, sides=("scattered",), options=None, **arguments):
    """
    Every row of a batch, padded on each of the `sides`, has the tokens, passes and loops of the reference, which
    runs it alone. `options` are arguments that concern `generate` only. Returns the last output.
    """
    samples = [
        sample_row(
            predictor(model, len(row) + arguments.get("max_new_tokens", 0)), row, model, seeded(number), **arguments
        )
        for number, row in enumerate(rows)
    ]
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    for side in sides:
        ids, mask = batch_of(rows, side)
        generator = [seeded(number) for number in range(len(rows))]
        output = run(model, ids, mask, generator=generator, **arguments, **(options or {}))
        assert real_tokens(output.sequences, mask) == [sample.tokens for sample in samples]
        assert (output.sequences[:, : ids.shape[1]][mask == 0] == PAD).all()
        assert output.forward_passes.tolist() == [len(sample.passes) for sample in samples]
        assert output.loops.tolist() == [sum(sample.passes) for sample in samples]
    return output
