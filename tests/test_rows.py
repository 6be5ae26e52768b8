# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`generate` for many rows: one file in the input's order, whatever the batches, the processes and the kills."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import refusal, run
from evaluation_models import save_looped, with_special, word_tokenizer
from filelock import FileLock
from processes import start

from loopmdm import LoopMDMForMaskedLM
from loopmdm.evaluation import generate_rows, rows
from loopmdm.evaluation.texts import batches_by_length
from loopmdm.objective import seeded_generator
from loopmdm_cli import main

SAMPLED = {"max_new_tokens": 6, "do_sample": True, "max_denoising_steps": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_looped(tmp_path_factory.mktemp("models") / "looped")


def words(count: int, generator: random.Random) -> str:
    return " ".join(f"w{generator.randrange(29)}" for _ in range(count))


def write(path: Path, lines: list) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Texts of many lengths, with boards, conversations and rows that cannot be used between them."""
    generator, lines = random.Random(0), []
    for number in range(40):
        text = words(generator.randrange(1, 30), generator)
        lines.append({"messages": [{"role": "user", "content": text}]} if number % 9 == 4 else {"text": text})
        if number % 10 == 7:
            lines += ["{not JSON", {"prompt": words(60, generator)}, {"prompt": f"{text} <mask> w1 <mask>"}]
    return write(tmp_path_factory.mktemp("data") / "in.jsonl", lines)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory) -> bytes:
    """The output of one process that nothing stops."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    generate_rows(model, data, output, batch_size=4, window=32, **SAMPLED)
    return output.read_bytes()


def lines_of(output: Path | bytes) -> list[dict]:
    return [json.loads(line) for line in (output if isinstance(output, bytes) else output.read_bytes()).splitlines()]


# Lines


def test_prompts_end_where_they_do_in_training(model, tmp_path):
    """Behind the end token that a tokenizer puts behind every text, nothing would come."""
    shutil.copytree(model, tmp_path / "ends")
    with_special(word_tokenizer(), "$A <end>").save_pretrained(tmp_path / "ends")
    data, options, made = write(tmp_path / "in.jsonl", [{"text": "w1 w2"}]), ("--max-new-tokens", 4), []
    for folder in (model, tmp_path / "ends"):
        texts = run("generate", folder, "w1 w2", *options, "--json")
        output = tmp_path / f"{Path(folder).name}.jsonl"
        run("generate", folder, "--data", data, "--output", output, *options)
        made.append((texts, output.read_bytes()))
    assert made[0] == made[1]


@pytest.mark.parametrize("options", [SAMPLED, {"max_new_tokens": 5}, {"eos_token_id": 5, **SAMPLED}], ids=str)
def test_every_row_has_the_answer_that_it_gets_alone(model, data, tmp_path, options):
    generate_rows(model, data, tmp_path / "out.jsonl", batch_size=8, window=32, seed=3, **options)
    loaded, tokenizer = LoopMDMForMaskedLM.from_pretrained(model).eval(), word_tokenizer()
    found, count = lines_of(tmp_path / "out.jsonl"), 0
    assert [line["index"] for line in found] == list(range(len(data.read_text().splitlines())))
    for line, text in zip(found, data.read_text().splitlines(), strict=True):
        if "error" in line:
            continue
        row = json.loads(text)
        chat = row.get("messages")
        prompt = f"w0 {chat[0]['content']} w0" if chat else row.get("text", row.get("prompt"))
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        generator = seeded_generator(3, "generate", line["index"], 0)
        alone = loaded.generate(ids, generator=generator, return_dict_in_generate=True, **options)
        tokens, real = alone.sequences[0], alone.attention_mask[0, ids.shape[1] :]
        assert line["answer"] == tokenizer.decode(tokens[ids.shape[1] :], skip_special_tokens=True)
        assert line.get("text") == (None if chat else tokenizer.decode(tokens, skip_special_tokens=True))
        assert [line[name] for name in rows.COSTS] == [int(alone[name]) for name in rows.COSTS]
        masks = int((ids == 2).sum())
        # Those in the prompt are not denoised any more where the row ends, which is behind them.
        assert line["tokens"] == masks + int(real.sum())
        end = options.get("eos_token_id", 1)
        assert line["finish_reason"] == ("stop" if end in tokens[ids.shape[1] :] else "length")
        count += 1
    assert count == 44


def test_bad_rows_are_reported_in_their_places(data, whole):
    raw = data.read_text().splitlines()
    bad = {line["index"]: line["error"] for line in lines_of(whole) if "error" in line}
    assert set(bad) == {i for i, line in enumerate(raw) if line == "{not JSON" or len(line.split()) > 55}
    assert len(bad) == 8
    for index, error in bad.items():
        assert f"line {index + 1} " in error
        assert ("not valid JSON" if raw[index] == "{not JSON" else "60 tokens, and 6 new ones") in error


@pytest.mark.parametrize(
    "row, error",
    [
        ("[1]", "is a list; it must be an object"),
        ({"answer": "w1"}, "has no text called prompt or"),
        ({"prompt": "w1", "context": "w2"}, "has `context`, which would be lost"),
        ({"conversations": ["w1"]}, "has `conversations`, which would be lost; give `messages`"),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, "has no message to answer"),
        ({"messages": [{"content": "w1"}]}, "message 1 needs `role`"),
        ({"text": "w" * 65 * 256}, "has at least 65 tokens; the model has 64 positions"),
        ({"text": "w1 w2"}, "has nothing to generate"),
    ],
    ids=range(8),
)
def test_what_is_wrong_with_a_row(model, tmp_path, row, error):
    good = {"text": "w1 <mask> w2"}
    generate_rows(model, write(tmp_path / "in.jsonl", [good, row, good]), tmp_path / "out.jsonl", max_new_tokens=0)
    first, second, third = lines_of(tmp_path / "out.jsonl")
    assert second["index"] == 1 and error in second["error"] and len(second) == 2
    assert first["text"] == third["text"] and first["finish_reason"] == "filled" and first["tokens"] == 1
    assert "<mask>" not in first["text"] and "answer" not in first


def test_a_given_end_token_is_no_reason_to_finish(model, tmp_path):
    rows = [{"text": "w1 <mask> w2 <end>"}]
    generate_rows(model, write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", max_new_tokens=0)
    assert lines_of(tmp_path / "out.jsonl")[0]["finish_reason"] == "filled"


def test_an_answer_at_the_end_of_a_conversation_is_left_out(model, tmp_path):
    question = {"role": "user", "content": "w1 w2"}
    pairs = [{"messages": [question]}, {"messages": [question, {"role": "assistant", "content": "w9"}]}]
    pairs += [{"prompt": [question], "completion": [{"role": "assistant", "content": "w8"}]}]
    generate_rows(model, write(tmp_path / "in.jsonl", pairs), tmp_path / "out.jsonl", max_new_tokens=3)
    assert len({line["answer"] for line in lines_of(tmp_path / "out.jsonl")}) == 1


def test_several_answers_to_a_row(model, tmp_path):
    data = write(tmp_path / "in.jsonl", [{"text": "w1 w2"}, "{", {"text": "w3"}])
    generate_rows(model, data, tmp_path / "out.jsonl", num_return_sequences=2, **SAMPLED)
    found = lines_of(tmp_path / "out.jsonl")
    places = [(line["index"], line.get("answer_index")) for line in found]
    assert places == [(0, 0), (0, 1), (1, None), (2, 0), (2, 1)]
    assert found[0]["answer"] != found[1]["answer"]


def test_parquet_and_data_sets(model, tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = [{"text": "w1 w2"}, {"text": "w3"}]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "in.parquet")
    outputs = []
    for source in (write(tmp_path / "in.jsonl", lines), tmp_path / "in.parquet", tmp_path / "set"):
        outputs.append(tmp_path / f"{source.name}.out")
        generate_rows(model, source, outputs[-1], **SAMPLED)
    assert len({output.read_bytes() for output in outputs}) == 1


# Batches


def test_batches_hold_rows_of_similar_length():
    lengths = [3, 0, 9, 1, 0, 2, 9, 4]
    texts = [[0] * length for length in lengths]
    assert list(batches_by_length(texts, 3)) == [[1, 4], [3, 5, 0], [7, 2, 6]]
    # Of rows with 2 new tokens each, padded to the longest
    assert list(batches_by_length(texts, None, 12, 2)) == [[1, 4], [3, 5], [0, 7], [2], [6]]


@pytest.mark.parametrize("sizes", [{"batch_size": 1}, {"batch_size": 50}, {"max_batch_tokens": 90}], ids=str)
def test_batches_make_no_difference(model, data, whole, tmp_path, sizes):
    generate_rows(model, data, tmp_path / "out.jsonl", window=50, **sizes, **SAMPLED)
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_few_rows_are_held_at_a_time(model, tmp_path, monkeypatch):
    """Those of a window, however long the input."""
    data = write(tmp_path / "in.jsonl", [{"text": "w1 <mask>"}] * 100)
    held, plan = [], rows._Writer.plan
    monkeypatch.setattr(rows._Writer, "plan", lambda self, chunk: held.append(len(chunk)) or plan(self, chunk))
    generate_rows(model, data, tmp_path / "out.jsonl", window=16)
    assert held == [16] * 6 + [4]
    assert len(lines_of(tmp_path / "out.jsonl")) == 100


# Processes and kills


def work(rank: int, processes: int, *arguments, **options) -> None:
    """`generate_rows` in a process that is one of several."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes)}
    generate_rows(*arguments, **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--text-column", "txt"], "None of the 3 rows can be used: in.jsonl, line 1 has no text called txt"),
        (["--max-new-tokens", 999], "None of the 3 rows can be used: in.jsonl, line 1 has 2 tokens, and 999 new ones"),
        (["--num-return-sequences", 2], "answers are the same; add `do_sample=True`"),
    ],
)
def test_a_mistake_leaves_nothing_in_the_way(model, tmp_path, monkeypatch, capfd, wrong, message):
    monkeypatch.chdir(tmp_path)
    write(Path("in.jsonl"), [{"text": "w1 w2"}, {"text": "w3"}, {"text": "w4"}])
    command = ["generate", model, "--data", "in.jsonl", "--output", "out.jsonl"]
    with pytest.raises(SystemExit) as exit_:
        main([str(part) for part in [*command, *wrong]])
    assert exit_.value.code == 2 and message in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    run(*command, "--max-new-tokens", 2)
    assert len(lines_of(Path("out.jsonl"))) == 3


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_make_no_difference(model, data, whole, tmp_path, processes):
    arguments = model, str(data), str(tmp_path / "out.jsonl")
    options = {"batch_size": 4, "window": 32, **SAMPLED}
    started = [start(work, rank, processes, *arguments, **options) for rank in range(processes)]
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert not list((tmp_path / "out.jsonl.run").glob("*.jsonl"))


def test_the_last_process_writes_the_output(model, data, whole, tmp_path, monkeypatch):
    output, options = tmp_path / "out.jsonl", {"batch_size": 4, "window": 32, **SAMPLED}
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        assert not output.exists()
        monkeypatch.setenv("RANK", rank)
        report = generate_rows(model, data, output, **options)
        assert (report.missing == 0) == (rank == "1") and report.tokens > 0
    assert output.read_bytes() == whole and report.errors == 8 and "not valid JSON" in report.first_error


def finished_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*-*.jsonl"))


def test_kills_make_no_difference(model, data, whole, tmp_path):
    """Of one process and of two in turn, each at a random moment of its work. Then it is done in peace."""
    output, kills, moments = tmp_path / "out.jsonl", 0, random.Random(1)
    options = {"batch_size": 4, "window": 32, **SAMPLED}
    folder, arguments = tmp_path / "out.jsonl.run", (model, str(data), str(output))
    for attempt in range(6):
        before, number = finished_bytes(folder), 1 + attempt % 2
        started = [start(work, rank, number, *arguments, **options) for rank in range(number)]
        while finished_bytes(folder) == before and any(process.is_alive() for process in started):
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        for process in started:
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
    assert kills >= 3
    generate_rows(model, data, output, **options)
    assert output.read_bytes() == whole


def test_a_line_that_a_kill_cut_off_is_made_again(model, data, whole, tmp_path, monkeypatch):
    output, options = tmp_path / "out.jsonl", {"batch_size": 4, "window": 32, **SAMPLED}
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "0")
        generate_rows(model, data, output, **options)
    part = min(output.with_name("out.jsonl.run").glob("0*.jsonl"))
    part.write_bytes(part.read_bytes()[:-30])
    generate_rows(model, data, output, **options)
    assert output.read_bytes() == whole


# What is refused


def test_an_output_of_something_else_is_refused(model, data, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"
    lines = data.read_text().splitlines()
    source = write(tmp_path / "in.jsonl", lines[:5])
    generate_rows(model, source, output, **SAMPLED)
    before = output.read_bytes()
    monkeypatch.setattr(rows, "load_model", None)  # nothing is loaded for what is there, or is refused
    assert generate_rows(model, source, output, **SAMPLED).tokens == 0
    for options, name in (({"seed": 1}, "seed"), ({"batch_size": 3}, "batch_size"), ({"top_p": 0.5}, "top_p")):
        with pytest.raises(ValueError, match=f"other settings .they differ in {name}"):
            generate_rows(model, source, output, **options, **SAMPLED)
    write(source, lines[1:6])
    with pytest.raises(ValueError, match=r"another input or .* differ in sha256"):
        generate_rows(model, source, output, **SAMPLED)
    with pytest.raises(ValueError, match=r"exists already, and is not of a run"):
        generate_rows(model, source, source, **SAMPLED)
    with pytest.raises(ValueError, match=r"^\. is a folder; name a file"):
        generate_rows(model, source, ".", **SAMPLED)
    assert output.read_bytes() == before


def test_another_model_is_refused(model, data, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"text": "w1 <mask>"}])
    generate_rows(model, source, tmp_path / "out.jsonl")
    other = save_looped(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"differ in model\.safetensors"):
        generate_rows(other, source, tmp_path / "out.jsonl")


def test_one_process_of_a_rank_at_a_time(model, data, tmp_path):
    (tmp_path / "out.jsonl.run").mkdir()
    with FileLock(tmp_path / "out.jsonl.run" / "rank0.lock"), pytest.raises(ValueError, match="Another process"):
        generate_rows(model, data, tmp_path / "out.jsonl", **SAMPLED)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"batch_size": 2, "max_batch_tokens": 20}, "give one"),
        ({"max_batch_tokens": 0}, "`max_batch_tokens` is 0"),
        ({"window": 0}, "`window` is 0"),
        ({"unmasking": "best"}, "`unmasking` is 'best'"),
    ],
    ids=str,
)
def test_arguments_that_are_refused(model, data, tmp_path, options, error):
    with pytest.raises(ValueError, match=error):
        generate_rows(model, data, tmp_path / "out.jsonl", **options)
    assert not list(tmp_path.iterdir())


# The command


def test_the_command(model, data, whole, tmp_path):
    torch.manual_seed(0)
    options = ["--max-new-tokens", 6, "--do-sample", "--max-denoising-steps", 3, "--max-batch-tokens", 100]
    run("generate", model, "--data", data, "--output", tmp_path / "out.jsonl", *options)
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--data", "in.jsonl"], "--data needs --output"),
        (["w1", "--data", "in.jsonl", "--output", "o"], "There are prompts beside --data"),
        (["--data", "in.jsonl", "--output", "o", "--json"], "--json has no effect"),
        (["--data", "in.jsonl", "--output", "o", "--html-columns", "0"], "--html-columns (0) has no effect"),
        (["--data", "in.jsonl", "--output", "o", "--split", "test"], "--split (test) has no effect"),
        (["w1", "--output", "o"], "--output (o) has no effect: it is for --data"),
        (["--data", "nowhere.jsonl", "--output", "o"], "nowhere.jsonl is not a file"),
        (["--data", "in.txt", "--output", "o"], "in.txt is a text; give rows"),
    ],
    ids=range(8),
)
def test_commands_that_are_refused(model, tmp_path, monkeypatch, arguments, error):
    monkeypatch.chdir(tmp_path)
    assert error in refusal("generate", model, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "this is process 2 of 2 (RANK, WORLD_SIZE); ranks are 0 to 1"),
        ({"RANK": "1"}, "this is process 1 of 1"),
        ({"WORLD_SIZE": "2"}, "this is process (RANK is not set) of 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'; it must be a whole number of at least 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number of at least 1"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
    ],
)
def test_processes_that_make_no_sense_are_refused(model, data, tmp_path, monkeypatch, environment, error):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "out.jsonl"
    assert error in refusal("generate", model, "--data", data, "--output", output)
    assert error in refusal("train", tmp_path / "run.yaml")
    with pytest.raises(ValueError, match="environment"):
        generate_rows(model, data, output)
    assert not [*tmp_path.iterdir()]
