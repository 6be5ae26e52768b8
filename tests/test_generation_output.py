# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""What `generate` reports besides the tokens: costs against counts from outside, the trace, and streams."""

import math
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from generation_reference import (
    BLOCK,
    ROWS,
    Recorder,
    batch_of,
    counted,
    double_model,
    plain,
    real_tokens,
    run,
    sample_row,
    seeded,
    word_tokenizer,
)
from tiny import MASK, PAD, tiny_model
from transformers import EosTokenCriteria, MaxLengthCriteria, TextDiffusionStreamer, TextIteratorStreamer, TextStreamer

from loopmdm import LoopMDMGenerationConfig
from loopmdm.cache_utils import DualCache
from loopmdm.commit_rules import CommitRule, MarginRule
from loopmdm.loop_policies import LoopPolicy

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from common import count_waits


@pytest.fixture(scope="module")
def model():
    return double_model()


# Costs


DUAL, PREFIX = ({"cache_implementation": kind, "block_length": 5} for kind in ("dual", "prefix"))
EXITS = {"num_loops": 4, "loop_tolerance": 0.45}
BLOCKS = {"attention_block_size": BLOCK}
SHIFT = {"shift_logits": True}
WAYS = {
    "whole": ({}, {}),
    "shift": (SHIFT, {"block_length": 4}),
    "no tail": ({"loop_end": 4}, {}),
    "plain mlp": ({"use_gated_mlp": False, "num_key_value_heads": 1, "head_dim": 12}, {}),
    "exact": (BLOCKS, {}),
    "exact, shift": (BLOCKS | SHIFT, {}),
    "not cached": (BLOCKS, {"use_cache": False}),
    "tolerance": ({}, EXITS),
    "tolerance, exact": (BLOCKS, EXITS),
    "visible": ({}, {"num_loops": 4, "visible_loops": 1}),
    "visible, exact, shift": (BLOCKS | SHIFT, {"num_loops": 4, "visible_loops": 1}),
    "dual": ({}, DUAL),
    "dual, shift": (SHIFT, DUAL),
    "dual, refresh": ({}, DUAL | {"cache_refresh_interval": 2}),
    "dual, tolerance": ({}, DUAL | EXITS),
    "dual, visible": ({}, DUAL | {"num_loops": 4, "visible_loops": 1}),
    "prefix": ({}, PREFIX),
    "guided": ({}, {"guidance_scale": 1.5}),
    "guided, off": ({}, {"guidance_scale": 1.0}),
    "guided, exact": (BLOCKS, {"guidance_scale": 1.5}),
    "guided, dual": ({}, DUAL | {"guidance_scale": 1.5}),
    "loops of steps": ({}, {"num_loops": [1, 3]}),
    "threshold": (BLOCKS, {"confidence_threshold": 0.3}),
    "ancestral": ({}, {"unmasking": "ancestral", "max_denoising_steps": 15}),
    "remasking": ({}, {"remask_probability": 0.3, "max_denoising_steps": 12}),
    "ends": (BLOCKS, {"eos_token_id": list(range(6, 15))}),
}


@pytest.mark.parametrize(("overrides", "arguments"), WAYS.values(), ids=WAYS)
def test_costs_are_those_counted_from_outside_and_of_a_row_alone(overrides, arguments):
    model, (ids, mask) = double_model(**overrides), batch_of(ROWS, "scattered")
    model.set_attn_implementation("eager")
    start, stop = model.config.loop_start, model.config.loop_end
    arguments = {"max_new_tokens": 5, **arguments}
    with counted(model, flops=False) as counts:
        output = run(model, ids, mask, generator=[seeded(number) for number in range(3)], **arguments)
    assert int(output.forward_passes.sum()) == sum(rows for rows, _ in counts.passes)
    assert int(output.loops.sum()) == sum(rows for rows, _ in counts.layers[start])
    # The formula of the documentation
    layers = output.forward_passes * (4 - (stop - start)) + output.loops * (stop - start)
    assert int(layers.sum()) == sum(rows for shapes in counts.layers for rows, _ in shapes)
    assert torch.equal(torch.stack([step.loops for step in output.trace]).sum(0), output.loops)
    for number, row in enumerate(ROWS):
        with counted(model, flops=number == 2) as counts:
            alone = run(model, torch.tensor([row]), generator=[seeded(number)], **arguments)
        assert counts.flops in (None, int(alone.flops))
        assert real_tokens(output.sequences, mask)[number] == alone.sequences[0].tolist()
        for name in ("forward_passes", "loops", "flops", "tokens_per_forward"):
            assert getattr(output, name)[number] == getattr(alone, name)[0], name


@pytest.mark.parametrize("overrides", [{}, BLOCKS, SHIFT], ids=str)
@pytest.mark.parametrize("arguments", [{}, {"cache_implementation": "dual"}, {"guidance_scale": 1.5}], ids=str)
def test_only_masked_positions_reach_the_head(overrides, arguments):
    if "cache_implementation" in arguments and "attention_block_size" in overrides:
        pytest.skip("refused")
    model, factor = double_model(**overrides), 2 if "guidance_scale" in arguments else 1
    with counted(model, flops=False) as counts:
        model.generate(torch.tensor([[5, 3, 8, 1]]), max_new_tokens=8, block_length=4, **arguments)
    expected = [factor * left for left in [4, 3, 2, 1] * 2]
    for shapes in (counts.head, counts.last):
        assert [rows * positions for rows, positions in shapes] == expected


def test_speed_counts_what_was_denoised(model):
    output = run(model, torch.tensor([[5, MASK, 3], [4, 8, 1]]), max_new_tokens=4, max_denoising_steps=2)
    assert output.tokens_per_forward.tolist() == [2.5, 2.0]
    assert output.seconds > 0 and output.tokens_per_second == pytest.approx(9 / output.seconds)
    assert output.cache is None


def host_reads(max_new_tokens, batch_size, **arguments):
    ids, model = torch.tensor([[5, 3, 8, 1]] * batch_size), tiny_model()
    sizes = {"max_new_tokens": max_new_tokens, "block_length": max_new_tokens}
    return count_waits(lambda: model.generate(ids, **sizes, **arguments), "cpu")


@pytest.mark.parametrize(
    "arguments", [{}, {"cache_implementation": "dual"}, {"eos_token_id": 3}, {"guidance_scale": 2.0}], ids=str
)
def test_a_step_waits_for_the_device_a_few_times_whatever_the_batch(arguments):
    """On the CPU, which looks at values where an accelerator would not."""
    few, many, rows = (host_reads(*sizes, **arguments) for sizes in ((8, 1), (24, 1), (8, 6)))
    assert (many - few) / 16 <= 8 and rows == few


# The trace


@pytest.mark.parametrize(
    "arguments",
    [
        {"block_length": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_denoising_steps": 4},
        {"unmasking": "ancestral", "remask_probability": 0.3, "max_denoising_steps": 12},
        {"num_loops": [1, 4], "guidance_scale": 1.5, "confidence_threshold": 0.4},
        {"eos_token_id": list(range(6, 15)), "eos_penalty": 0.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("row", ROWS[1:], ids=str)
def test_the_trace_says_what_every_step_of_the_reference_did(model, arguments, row):
    sample = sample_row(plain(model, len(row) + 7), row, model, seeded(3), max_new_tokens=7, **arguments)
    trace = run(model, torch.tensor([row]), max_new_tokens=7, generator=[seeded(3)], **arguments).trace
    before = [*row, *[MASK] * 7]
    for found, step in zip(trace, sample.steps, strict=True):
        assert (found.block, found.step, found.loops.tolist()) == (step.block, step.step, [step.loops])
        assert found.committed[0].nonzero().flatten().tolist() == [*step.committed]
        assert found.remasked[0].nonzero().flatten().tolist() == step.remasked
        assert found.tokens.tolist() == [step.tokens]
        block = arguments.get("block_length", len(before))
        first = row.index(MASK) + step.block * block
        masked = [first <= place < first + block and token == MASK for place, token in enumerate(before)]
        predictions = found.predictions[0]
        assert (predictions >= 0).tolist() == masked
        assert all(predictions[place] == found.tokens[0, place] for place in step.committed)
        for name, column in (("confidence", 0), ("log_probs", 1)):
            values = getattr(found, name)[0]
            assert (~values.isnan()).tolist() == masked
            expected = [pair[column] for pair in step.committed.values()]
            torch.testing.assert_close(values[[*step.committed]], torch.tensor(expected), atol=1e-5, rtol=1e-4)
        before = step.tokens


def test_the_trace_of_a_batch_is_that_of_its_rows(model):
    (ids, mask), arguments = batch_of(ROWS), {"max_new_tokens": 5, "block_length": 4}
    trace = run(model, ids, mask, **arguments).trace
    steps = [(step.block, step.step) for step in trace]
    assert steps == sorted(set(steps))
    for number, row in enumerate(ROWS):
        busy = [step for step in trace if step.loops[number] > 0]
        alone = run(model, torch.tensor([row]), **arguments).trace
        assert [(step.block, step.step) for step in busy] == [(step.block, step.step) for step in alone]
        for found, expected in zip(busy, alone, strict=True):
            assert real_tokens(found.tokens, mask)[number] == expected.tokens[0].tolist()
        assert not any(step.committed[number].any() for step in trace if step.loops[number] == 0)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"do_sample": True, "top_k": 5, "temperature": 0.5}, {"remask_probability": 0.5, "max_denoising_steps": 9}],
    ids=str,
)
def test_scores_are_those_that_tokens_were_chosen_by(model, arguments):
    ids, mask = batch_of(ROWS)
    arguments |= {"max_new_tokens": 5, "block_length": 4, "generator": [seeded(row) for row in range(len(ROWS))]}
    output = run(model, ids, mask, output_scores=True, **arguments)
    masked = torch.nn.functional.pad((ids == MASK) & (mask != 0), (0, 5), value=True)
    columns = masked.any(0).nonzero().flatten().tolist()
    assert len(output.scores) == len(columns)
    log_probs = {}
    for step in output.trace:
        for row, column in step.committed.nonzero().tolist():
            log_probs[row, column] = step.log_probs[row, column]
    for column, scores in zip(columns, output.scores, strict=True):
        assert scores.shape == (len(ROWS), model.config.vocab_size)
        assert torch.equal(scores.isnan().all(-1), ~masked[:, column])
        for row in masked[:, column].nonzero().flatten().tolist():
            found = scores[row].log_softmax(-1)[output.sequences[row, column]]
            torch.testing.assert_close(found, log_probs[row, column], atol=1e-5, rtol=1e-5)
            assert "top_k" not in arguments or scores[row].isfinite().sum() == 5
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        model.generate(ids, mask, output_scores=True, max_new_tokens=5)


# Streams


class DraftRecorder(Recorder):
    def __init__(self):
        super().__init__()
        self.drafts = []

    def put_draft(self, value):
        self.drafts.append((len(self.puts), value.tolist()))


@pytest.mark.parametrize(
    ("prompt", "arguments"),
    [
        ([5, 9, 3], {}),
        ([5, 9, 3], {"block_length": 3}),
        ([PAD, PAD, 5], {"block_length": 3}),
        ([5, 9, PAD, PAD], {"block_length": 3}),
        ([MASK, 5, MASK, 9, 9, 9, 9, MASK, 3], {"block_length": 2}),
        ([MASK, MASK], {"block_length": 3}),
        ([5, 9, 3], {"block_length": 3, "eos_token_id": list(range(6, 15))}),
        ([5, 9, 3], {"block_length": 3, "stopping_criteria": [MaxLengthCriteria(5)]}),
    ],
    ids=["one block", "blocks", "left padding", "right padding", "infilling", "no prompt", "end token", "stopped"],
)
@pytest.mark.parametrize("recorder", [Recorder, DraftRecorder])
def test_streamed_tokens_are_the_sequence(model, prompt, arguments, recorder):
    streamer = recorder()
    sequence = model.generate(torch.tensor([prompt]), max_new_tokens=8, streamer=streamer, **arguments)[0].tolist()
    assert [token for put in streamer.puts for token in put] == [token for token in sequence if token != PAD]
    assert streamer.ended and [] not in streamer.puts[1:]
    # The prompt up to the first [MASK] comes first, empty or not, as `skip_prompt` expects.
    first = prompt.index(MASK) if MASK in prompt else len(prompt)
    assert streamer.puts[0] == [token for token in prompt[:first] if token != PAD]


def test_drafts_show_the_block_as_it_stands(model):
    streamer = DraftRecorder()
    model.generate(torch.tensor([[5, 9]]), max_new_tokens=6, block_length=3, streamer=streamer)
    assert [len(put) for put in streamer.puts] == [2, 3, 3]
    for block in (1, 2):
        drafts = [draft for number, draft in streamer.drafts if number == block]
        assert [draft.count(MASK) for draft in drafts] == [2, 1, 0]
        assert drafts[-1] == streamer.puts[block]


def test_drafts_come_with_the_confidence_of_the_token_chosen_last(model):
    class Confident(DraftRecorder):
        takes_confidence = True

        def put_draft(self, value, confidence):
            super().put_draft(value)
            self.confidence = [*getattr(self, "confidence", []), confidence.tolist()]

    for arguments in ({}, {"remask_probability": 0.3, "max_denoising_steps": 5}):
        streamer, prompt = Confident(), torch.tensor([[PAD, 5, MASK, 9, MASK]])
        arguments = {**arguments, "max_new_tokens": 3, "block_length": 4, "do_sample": True, "top_k": 3}
        torch.manual_seed(0)
        output = model.generate(
            prompt, streamer=streamer, output_trace=True, return_dict_in_generate=True, **arguments
        )
        assert len(output.trace) == len(streamer.drafts)
        last = torch.full((8,), math.nan)
        for step, (puts, draft), shown in zip(output.trace, streamer.drafts, streamer.confidence, strict=True):
            last = torch.where(step.predictions[0] >= 0, step.confidence[0], last)
            start = 1 + sum(map(len, streamer.puts[:puts]))  # behind the padding
            torch.testing.assert_close(torch.tensor(shown), last[start : start + len(draft)], equal_nan=True)


def test_one_row_is_streamed(model):
    for batch, arguments in ((2, {}), (1, {"num_return_sequences": 2, "do_sample": True})):
        with pytest.raises(ValueError, match="`streamer` shows one row, and there are 2"):
            model.generate(torch.full((batch, 2), 5), max_new_tokens=2, streamer=Recorder(), **arguments)


@pytest.mark.parametrize("streamer_class", [TextStreamer, TextDiffusionStreamer, TextIteratorStreamer])
@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("prompt", ["e i", "[MASK]"])
def test_text_streamers_of_transformers(model, capsys, streamer_class, skip_prompt, prompt):
    tokenizer = word_tokenizer()
    inputs = tokenizer(prompt, return_tensors="pt").input_ids
    streamer = streamer_class(tokenizer, skip_prompt=skip_prompt)
    sequence = model.generate(inputs, max_new_tokens=6, block_length=2, streamer=streamer)
    printed = "".join(streamer) if streamer_class is TextIteratorStreamer else capsys.readouterr().out
    if streamer_class is TextDiffusionStreamer:
        assert "[MASK]" in printed  # in drafts, which are erased again
        printed = re.sub("\0337.*?\0338\033\\[J", "", printed, flags=re.DOTALL)
    start = inputs.shape[1] if skip_prompt and prompt != "[MASK]" else 0
    assert printed.split() == tokenizer.decode(sequence[0, start:]).split()


# Rules and policies of one's own


class Everything(CommitRule):
    def __call__(self, step):
        return torch.ones_like(step.masked)


class Nothing(CommitRule):
    def __call__(self, step):
        return torch.zeros_like(step.masked)


class AfterTwoSteps(CommitRule):
    def __call__(self, step):
        return step.masked & (step.index >= 2)


class NeverLiked(CommitRule):
    def score(self, step):
        return torch.full(step.masked.shape, -torch.inf)


class Always(LoopPolicy):
    def goes_on(self, index, before, after, part):
        return torch.ones(len(after), dtype=torch.bool)


class Misshapen(LoopPolicy):
    def goes_on(self, index, before, after, part):
        return torch.ones(after.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("result", [torch.ones(1, 2), torch.ones(2, dtype=torch.bool), 1, None], ids=str)
def test_results_of_rules_are_checked(result):
    class Misshapen(CommitRule):
        def __call__(self, step):
            return result

    with pytest.raises(ValueError, match=r"`Misshapen` returned .*; it must return bool of shape \(1, 2\)"):
        tiny_model().generate(torch.tensor([[3, MASK, MASK]]), unmasking=Misshapen())


def test_rules_and_policies_in_a_config_are_used_as_they_are():
    """Not as copies: they may count, or hold the model."""
    seen, lock = [], threading.Lock()

    class Counting(CommitRule):
        def __call__(self, step):
            with lock:
                seen.append(step.index)
            return step.masked

    class CountingLoops(Always):
        def goes_on(self, index, before, after, part):
            seen.append(index)
            return super().goes_on(index, before, after, part)

    rule, policy = Counting(), CountingLoops()
    rule.lock = policy.lock = lock
    config = LoopMDMGenerationConfig(unmasking=rule, loop_policy=policy, num_loops=2, max_new_tokens=2)
    tiny_model().generate(torch.tensor([[3]]), generation_config=config)
    assert seen == [0, 1, 0] and config.max_new_tokens == 2


def test_rules_of_ones_own_never_write_over_given_tokens():
    rows = torch.tensor([[3, MASK, MASK, MASK], [3, MASK, 4, 5]])
    tokens = tiny_model().generate(rows, unmasking=Everything())
    assert torch.equal(tokens[rows != MASK], rows[rows != MASK])
    assert not (tokens == MASK).any()


def test_no_mask_is_left_in_silence():
    rows = torch.tensor([[3, MASK, MASK, MASK], [3, MASK, 4, 5]])
    with pytest.raises(ValueError, match=r"rule Nothing has left \[MASK\]s"):
        tiny_model().generate(rows, unmasking=Nothing())
    # Whatever the other rows are: a longer row has more steps, which its neighbours may not use.
    late = AfterTwoSteps()
    assert not (tiny_model().generate(rows[:1], unmasking=late) == MASK).any()
    for batch in (rows[1:], rows):
        with pytest.raises(ValueError, match=r"rule AfterTwoSteps has left \[MASK\]s"):
            tiny_model().generate(batch, unmasking=late)
    for seed in range(5):
        torch.manual_seed(seed)
        tokens = tiny_model().generate(rows, unmasking=NeverLiked(), remask_probability=0.5, max_denoising_steps=4)
        assert not (tokens == MASK).any()


def test_policies_are_checked():
    ids = torch.tensor([[3, MASK, 4]])
    with pytest.raises(ValueError, match="give an instance of a LoopPolicy"):
        tiny_model()(ids, loop_policy="x")
    with pytest.raises(
        ValueError, match=r"`Misshapen.goes_on` returned torch.bool of shape \(1, 3\).* bool of shape \(1,\); with"
    ):
        tiny_model()(ids, num_loops=3, loop_policy=Misshapen())


@pytest.mark.parametrize(
    ("argument", "value"),
    [("unmasking", MarginRule()), ("loop_policy", Always()), ("cache_implementation", DualCache)],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_rules_and_policies_in_a_config_are_shown_and_never_saved(tmp_path, argument, value):
    config = LoopMDMGenerationConfig(**{argument: value})
    assert getattr(value, "__name__", type(value).__name__) in repr(config)
    assert config == LoopMDMGenerationConfig(**{argument: value})
    with pytest.raises(ValueError, match=f"`{argument}` is .* cannot be saved; pass it to `generate`"):
        config.save_pretrained(tmp_path)


def test_criteria_are_asked_before_an_end_token_of_the_same_block(model):
    free = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=6)[0, 3:].tolist()
    second, last = free[1], next(token for token in free[2:] if token not in free[:2])
    ended = model.generate(
        torch.tensor([[3, 4, 5]]),
        max_new_tokens=6,
        eos_token_id=last,
        stopping_criteria=[EosTokenCriteria(second)],
    )[0, 3:].tolist()
    stop = free.index(second) + 1
    assert ended[:stop] == free[:stop]
    assert set(ended[stop:]) == {PAD}


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [("num_loop", 1, "did you mean `num_loops`?"), ("repetition_penalty", 1.3, "use a `logits_processor`")],
)
def test_settings_assigned_to_the_config_are_not_ignored(name, value, fix, tmp_path):
    model = tiny_model()
    setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=re.escape(f"takes no argument `{name}`: {fix}")):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=3)
    with pytest.raises(ValueError, match=f"takes no argument `{name}`"):  # nor saved, since they would not load
        model.save_pretrained(tmp_path)


def test_names_of_other_samplers_are_answered():
    ids = torch.tensor([[3, 4]])
    with pytest.raises(ValueError, match="takes no argument `inputs`: use `input_ids`"):
        tiny_model().generate(inputs=ids, max_new_tokens=3)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tiny_model().generate(ids, max_new_tokens=3, pad_token_id=100)
    generators = (torch.Generator().manual_seed(0),)
    again = [torch.Generator().manual_seed(0)]
    drawn = [tiny_model().generate(ids, max_new_tokens=3, do_sample=True, generator=g) for g in (generators, again)]
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="holds one generator several times"):
        tiny_model().generate(ids.repeat(2, 1), max_new_tokens=3, do_sample=True, generator=again * 2)


def test_a_generation_config_of_another_kind_is_refused():
    for config in ({"max_new_tokens": 4}, "greedy", 3):
        with pytest.raises(ValueError, match=r"`generation_config` is .*; give a LoopMDMGenerationConfig, or its arg"):
            tiny_model().generate(torch.tensor([[3, 4]]), generation_config=config)


def test_greedy_on_request_whatever_way_of_sampling_the_config_describes():
    model, ids = tiny_model(), torch.tensor([[3, 4]])
    expected = model.generate(ids, max_new_tokens=4)
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=5)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
