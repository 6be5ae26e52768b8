# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Data: files and data sets read, texts, answers and conversations tokenised, rows packed and put in order."""

import itertools
import json
from functools import partial

import pytest
import torch
from evaluation_models import word_tokenizer
from tiny import tiny_config
from tokenizers.pre_tokenizers import Split
from torch.utils.data import DataLoader, IterableDataset
from training_runs import MASK, PAD

from loopmdm.data import encode, encode_with_bytes, load_tokenizer, read_examples, read_rows
from loopmdm.evaluation import read_texts
from loopmdm.training import (
    ExampleStream,
    MaskedDiffusionCollator,
    StreamedExamples,
    pack_documents,
    read_documents,
    read_jsonl,
    seeded_generator,
)

CONFIG = tiny_config(vocab_size=32, mask_token_id=2)


# The order of a run


def test_stream_visits_every_example_once_an_epoch():
    rows = [{"input_ids": torch.tensor([i])} for i in range(10)]
    stream = ExampleStream(rows, num_examples=25, seed=0)
    seen = [int(stream[i]["input_ids"]) for i in range(25)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert [stream[i]["index"] for i in (0, 24)] == [0, 24]
    assert [int(stream[i]["input_ids"]) for i in reversed(range(25))] == seen[::-1], "order of access is irrelevant"
    assert "index" not in rows[0], "examples are left alone"
    with pytest.raises(IndexError):
        stream[25]
    with pytest.raises(ValueError, match="no training examples"):
        ExampleStream([], 5, seed=0)


def test_stream_transform_derives_from_the_place_in_the_run():
    def add_noise(example, generator):
        return {**example, "noise": torch.rand((), generator=generator).item()}

    rows = [{"input_ids": torch.tensor([i])} for i in range(3)]
    first, second = (ExampleStream(rows, 9, seed=0, transform=add_noise) for _ in range(2))
    noise = [first[i]["noise"] for i in range(9)]
    assert [second[i]["noise"] for i in reversed(range(9))] == noise[::-1]
    assert len(set(noise)) == 9


def test_seeded_generators_differ_by_every_part():
    streams = {torch.rand((), generator=seeded_generator(*parts)).item() for parts in [(0, 1), (1, 0), (0, "1", 0)]}
    assert len(streams) == 3


def test_streamed_examples_go_on_over_the_epochs():
    passes = []

    def source():
        passes.append(1)
        return ({"input_ids": [i]} for i in range(3))

    stream = StreamedExamples(source)
    seen = list(itertools.islice(stream, 8))
    assert [row["index"] for row in seen] == list(range(8))
    assert [row["input_ids"][0] for row in seen] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(passes) == 3
    assert next(iter(stream))["index"] == 0, "a new pass starts anew"
    with pytest.raises(ValueError, match="no training examples"):
        next(iter(StreamedExamples(list)))
    left = [[{"input_ids": [1]}], []]
    with pytest.raises(ValueError, match="no training examples"):
        list(StreamedExamples(lambda: left.pop(0)))


def test_streamed_examples_want_a_function():
    class Endless(IterableDataset):
        def __iter__(self):
            return itertools.repeat({"input_ids": [1]})

    for data, kind in (([{"input_ids": [1]}], "list"), (Endless(), "Endless")):
        with pytest.raises(ValueError, match=rf"of type {kind}; give a .*`StreamedExamples\(lambda: examples\)`"):
            StreamedExamples(data)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_streamed_examples_are_shared_between_workers():
    stream = StreamedExamples(partial(list, [{"input_ids": i} for i in range(100)]))
    loader = iter(DataLoader(stream, batch_size=1, num_workers=2, collate_fn=lambda rows: rows[0]["index"]))
    assert len({next(loader) for _ in range(8)}) == 8


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("read", [True, False], ids=["by name", "as an object"])
@pytest.mark.parametrize("shards", [1, 4])
def test_workers_share_a_streamed_data_set_and_leave_nothing_out(tmp_path, monkeypatch, shards, read):
    """In a worker such a data set gives only a share of its files."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for shard in range(shards):
        rows = "".join(f'{{"text": "{number}"}}\n' for number in range(shard * 8, shard * 8 + 8))
        (tmp_path / f"{shard}.jsonl").write_text(rows)
    options = {"streaming": True, "data_files": [str(tmp_path / f"{shard}.jsonl") for shard in range(shards)]}

    def examples():
        if read:
            return (row for _, row in read_rows("json", dataset=options))
        return datasets.load_dataset("json", split="train", **options)

    loader = DataLoader(StreamedExamples(examples), batch_size=2, num_workers=2, collate_fn=list)
    batches = list(itertools.islice(loader, shards * 4 + 2))
    seen = {row["index"]: int(row["text"]) for batch in batches for row in batch}
    assert seen == {index: index % (shards * 8) for index in range(shards * 8 + 4)}


# Files


def test_read_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"b": "ü"}', encoding="utf-8")
    assert read_jsonl(path) == read_jsonl(str(path)) == [{"a": 1}, {"b": "ü"}]
    for content, message in [
        (b'{"a": 1}\n\n{"a": \n', r"rows.jsonl, line 3 is not valid JSON"),
        (b'{"a": 1}\n[1]\n', r"rows.jsonl, line 2 is a list; it must be an object"),
        (b'"x"\n', r"rows.jsonl, line 1 is a str"),
        (b"", "rows.jsonl holds no examples"),
        (b"\n \n", "rows.jsonl holds no examples"),
        ('{"a": 1}\n{"a": "ü"}\n'.encode("latin-1"), "rows.jsonl, line 2"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_jsonl(path)
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "none.jsonl")


def test_read_documents(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("first\nstill first\n\n\n  second ü \r\n\r\nthird\n".encode())
    assert list(read_documents(path)) == ["first\nstill first", "second ü", "third"]
    assert list(read_documents(str(path), separator="still")) == ["first", "first\n\n\n  second ü \n\nthird"]
    assert list(read_documents(path, separator=None)) == ["first\nstill first\n\n\n  second ü \n\nthird"]
    path.write_bytes(b" \n = First = \n \n text \n more \n\t\r\n \n = Second = \n")  # as in WikiText
    assert list(read_documents(path)) == ["= First =", "text \n more", "= Second ="]
    assert len(list(read_documents(path, "\n\n"))) == 1, "a text is taken as it is"
    path.write_bytes(b"a|b.c")
    assert list(read_documents(path, "|")) == ["a", "b.c"]
    for content, message in (
        (b" \n\n \n", r"text\.txt holds no text"),
        (b"a\n\n\xfc", r"text\.txt, line 3 is not text in UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(read_documents(path))


def test_rows_are_named_by_their_place(tmp_path):
    (tmp_path / "t.txt").write_text("a b\nc\n\n\nd\n")
    (tmp_path / "w.txt").write_text(" \n = a = \n \n\t\n b \n c \n  \n d")
    (tmp_path / "t.jsonl").write_text('{"x": 1}\n\n \n{"x": 2}\n')

    def read(name: str, **options) -> list[tuple]:
        return [(where.split(", ")[1], row) for where, row in read_rows(tmp_path / name, **options)]

    assert read("t.txt") == [("line 1", "a b\nc"), ("line 5", "d")]
    assert read("t.txt", documents="line") == [("line 1", "a b"), ("line 2", "c"), ("line 5", "d")]
    assert read("w.txt") == [("line 2", "= a ="), ("line 5", "b \n c"), ("line 8", "d")]
    assert read("t.txt", documents="file") == [("line 1", "a b\nc\n\n\nd")]
    assert read("t.jsonl") == [("line 1", {"x": 1}), ("line 4", {"x": 2})]
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises(ValueError, match=f"{name} is not a file"):
            read(name)


@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""], ids=["byte-order mark", "none"])
def test_byte_order_marks_are_not_text(tmp_path, mark):
    (tmp_path / "t.txt").write_bytes(mark + b"w1 w2\r\n\r\n" + mark + b"w3\r\n")
    (tmp_path / "t.jsonl").write_bytes(mark + b'{"text": "w1"}\r\n')
    assert [row for _, row in read_rows(tmp_path / "t.txt")] == ["w1 w2", "w3"]
    assert next(read_rows(tmp_path / "t.txt", "file"))[1].startswith("w1")
    assert read_jsonl(tmp_path / "t.jsonl") == [{"text": "w1"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", b'{"a": 1}\n{"a": 1, "b": 2, "a": 3}\n', "line 2 is not valid JSON: 'a' is there twice"),
        ("t.jsonl", b"[" * 100_000 + b"\n", "line 1 is not valid JSON"),
        ("t.jsonl", '{"a": "ü"}'.encode("utf-16"), "line 1 is not valid JSON"),
        ("t.txt", "ü".encode("utf-16"), "line 1 is not text in UTF-8"),
        (
            "t.csv",
            b"a,b\n1,2\n",
            "t.csv is not a .txt, .jsonl or .parquet file. The `datasets` library reads other kinds",
        ),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(read_rows(tmp_path / name))
    assert message in str(error.value)


def test_lines_without_end_are_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("loopmdm.data.files.LONGEST_LINE", 2**20)
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "' + "w" * 900_000 + '"}\n{"text": "' + "w" * 2_000_000 + '"}\n')
    rows = read_rows(path)
    assert len(next(rows)[1]["text"]) == 900_000
    with pytest.raises(ValueError, match=r"line 2 has more than 1 MiB; split it into several rows"):
        next(rows)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_folder_is_never_asked_about(file, tmp_path, monkeypatch):
    """A command that waits for an answer hangs where nobody is there."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    word_tokenizer().save_pretrained(tmp_path)
    code = {
        "model_type": "llada",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "Evil",
    }
    path = tmp_path / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**settings, **code}))
    if file == "config.json":  # of a model; the tokenizer needs none of it
        assert load_tokenizer(str(tmp_path)).mask_token_id == word_tokenizer().mask_token_id
    else:
        with pytest.raises(ValueError, match="has code of its own, which runs only on request"):
            load_tokenizer(str(tmp_path))


def test_a_streamed_row_that_cannot_be_read_is_named(monkeypatch):
    def rows():
        yield {"text": "w1"}
        raise OSError("the network is gone")

    monkeypatch.setattr("loopmdm.data.files.load_dataset_rows", lambda name, options: rows())
    with pytest.raises(ValueError, match="owner/rows, example 2 cannot be read: the network is gone"):
        list(read_rows("owner/rows"))


def test_data_sets_are_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"body": "w1 w2"}\n{"body": "w3"}\n')
    texts = read_texts(folder, word_tokenizer(), CONFIG, text_column="body", dataset={"split": "test"})
    assert [text.input_ids for text in texts] == [[4, 5], [6]]
    with pytest.raises(ValueError, match="cannot be loaded"):
        read_texts(folder, word_tokenizer(), CONFIG, dataset={"split": "nowhere"})
    (tmp_path / "t.csv").write_text("body,id\nw1 w2,1\n")
    assert list(read_rows("csv", dataset={"data_files": str(tmp_path / "t.csv")})) == [
        ("csv, example 1", {"body": "w1 w2", "id": 1})
    ]


# Packing


@pytest.mark.parametrize("length", [1, 3, 4, 100])
@pytest.mark.parametrize("end_token_id", [None, 2])
@pytest.mark.parametrize("isolate", [False, True])
def test_packed_rows_hold_all_tokens_in_order(length, end_token_id, isolate):
    documents = [[5, 6, 7], [8], [], [9, 10, 11, 12, 13, 14, 15], [16, 17]]
    rows = list(pack_documents(iter(documents), length, end_token_id, isolate))
    ends = [] if end_token_id is None else [end_token_id]
    ended = [document and document + ends for document in documents]
    assert [token for row in rows for token in row["input_ids"].tolist()] == [*itertools.chain(*ended)]
    assert all(len(row["input_ids"]) == length for row in rows[:-1]) and 1 <= len(rows[-1]["input_ids"]) <= length
    assert all(set(row) == ({"input_ids", "document_ids"} if isolate else {"input_ids"}) for row in rows)
    if isolate:
        ids = [document for row in rows for document in row["document_ids"].tolist()]
        assert ids == [i for i, document in enumerate(ended) for _ in document]
        assert all(row["document_ids"].shape == row["input_ids"].shape for row in rows)
    MaskedDiffusionCollator(MASK, PAD)([{**row, "index": i} for i, row in enumerate(rows)])


def test_packing_is_lazy_and_checks_its_length():
    rows = itertools.islice(pack_documents(itertools.repeat([1, 2, 3]), 2), 3)
    assert [row["input_ids"].tolist() for row in rows] == [[1, 2], [3, 1], [2, 3]]
    assert list(pack_documents([], 4)) == list(pack_documents([[], []], 4)) == []
    with pytest.raises(ValueError, match="`length` is 0"):
        list(pack_documents([[1]], 0))


# Texts


@pytest.mark.parametrize("separator", [" ", "\n", "  ", "\n\n ", ""])
def test_long_texts_are_tokenised_in_pieces(monkeypatch, separator):
    words = word_tokenizer(["<pad>", "<end>", "<mask>", *(f"{i}日" for i in range(10))])
    if not separator:  # nothing to cut at: every character is a token
        words.backend_tokenizer.pre_tokenizer = Split("", "isolated")
    text = separator.join(f"{i % 10}日" for i in range(200))
    whole, sizes = encode_with_bytes(words, text, "a text")
    monkeypatch.setattr("loopmdm.data.tokens._PIECE", 64)
    assert encode(words, text, "a text") == whole
    assert encode_with_bytes(words, text, "a text")[0] == whole
    found = encode_with_bytes(words, text, "a text")[1]
    assert sum(found) == sum(sizes) == len(text.encode()) and len(found) == len(whole)


def test_empty_texts_of_training_are_left_out(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "w1"}\n{"text": ""}\n{"text": " \\n"}\n{"text": "w2"}\n')
    rows = list(read_examples([str(path)], word_tokenizer(), CONFIG, "pretrain", 8, isolate_documents=True))
    assert [row["input_ids"].tolist() for row in rows] == [[4, 1, 5, 1]]


def test_documents_longer_than_a_row_go_on_in_the_next(tmp_path):
    (tmp_path / "t.txt").write_text("w1 w2 w3 w4 w5\n\nw6 w7")
    rows = read_examples([str(tmp_path / "t.txt")], word_tokenizer(), CONFIG, "pretrain", 4, isolate_documents=True)
    rows = [(row["input_ids"].tolist(), row["document_ids"].tolist()) for row in rows]
    assert rows == [([4, 5, 6, 7], [0] * 4), ([8, 1, 9, 10], [0, 0, 1, 1]), ([1], [1])]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "w1 <mask>"}', "line 3 holds the mask token (2); give clean text"),
        ('{"text": "\\ud800"}', "The tokenizer cannot read {path}, line 3"),
        ('{"text": null}', "line 3 has no text in 'text'; it has text (NoneType)"),
        ('{"prompt": "w1"}', "line 3 has no text in 'text', but prompt and answer; use `task: answers`"),
    ],
)
def test_bad_texts_of_training_are_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "w1"}\n\n' + line + "\n")
    with pytest.raises(ValueError) as error:
        list(read_examples([str(path)], word_tokenizer(), CONFIG, "pretrain", 8))
    assert message.format(path=path) in str(error.value)
    (tmp_path / "t.txt").write_text("w1\n\nw2\n\n\n\nw3 <mask>")
    with pytest.raises(ValueError, match=r"t\.txt, line 7 holds the mask token \(2\)"):
        list(read_examples([str(tmp_path / "t.txt")], word_tokenizer(), CONFIG, "pretrain", 8))


# Texts to score


def test_bytes_of_tokens_add_up_to_the_text():
    words = word_tokenizer(["<pad>", "<end>", "<mask>", "grün", "日本", "a"])
    # White space goes with the word before it.
    assert encode_with_bytes(words, "grün  日本\na", "a text") == ([3, 4, 5], [5 + 2, 6 + 1, 1])


def test_texts_are_read_whole(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("w1 w2\nw3\n\n\nw4\n")
    (text,) = read_texts(path, word_tokenizer(), CONFIG)
    assert text.input_ids == [4, 5, 6, 7] and all(text.maskable)
    assert read_texts(path, word_tokenizer(), CONFIG, documents="line", limit=2)[1].name == f"{path}, line 2"


def test_answers_are_scored_given_their_prompts(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"prompt": "w1 w2", "answer": "w3 w4 w5"},
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair, chat = read_texts(path, word_tokenizer(), CONFIG, task="answers")
    assert pair.input_ids == [4, 5, 6, 7, 8, 1]  # with the end token
    assert pair.maskable == [False] * 2 + [True] * 4
    assert pair.num_bytes == [0, 0, 3, 3, 2, 0]
    assert chat.maskable == [False] * 3 + [True] * (len(chat.input_ids) - 3) and chat.num_bytes is None


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_what_mask_tokens_stand_for_is_scored(tmp_path, suffix):
    words = word_tokenizer(["<pad>", "<end>", ".", "ab", "cd"], mask_token=".")
    words.backend_tokenizer.pre_tokenizer = Split("-", "removed")
    path = tmp_path / f"f.{suffix}"
    path.write_text("ab-.-cd ab-ab-cd\n" if suffix == "txt" else '{"masked": "ab-.-cd", "text": "ab-ab-cd"}\n')
    (text,) = read_texts(path, words, CONFIG, task="fill")
    assert text.input_ids == [3, 3, 4] and text.maskable == [False, True, False]


@pytest.mark.parametrize(
    ("name", "content", "arguments", "message"),
    [
        ("t.txt", " \n\n", {}, "holds no text"),
        ("t.txt", "w1 <mask>", {}, 'holds the mask token (2); give clean text; the task "fill"'),
        ("t.txt", "w1", {"task": "answers"}, "is a text"),
        ("t.txt", "w1", {"task": "chat"}, "The task is 'chat'; choose one of texts, answers, fill"),
        ("t.txt", "w1", {"documents": "page"}, "separated by 'page'"),
        ("t.txt", "w1", {"limit": 0}, "The limit is 0"),
        ("t.txt", "w1", {"task": "fill"}, "line 1 has 1 fields; give two"),
        ("t.txt", "w1 w2", {"task": "fill"}, "line 1: token 1 is 4 with mask tokens, and 5 without"),
        ("t.txt", "w1 w1", {"task": "fill"}, "holds no mask token (2), so there is nothing to fill in"),
        ("t.txt", "w28", {"config": tiny_config()}, "gives the token 31, outside the model's vocabulary of 23"),
        ("t.jsonl", '{"text": 3}\n', {}, "line 1 has no text in 'text'; it has text (int)"),
        ("t.jsonl", '{"body": "w1"}\n', {}, "line 1 has no text in 'text'; it has body"),
        (
            "t.jsonl",
            '{"masked": "<mask> w1", "text": "w1"}\n',
            {"task": "fill"},
            "2 tokens with mask tokens, but 1",
        ),
        ("t.jsonl", "{\n", {}, "line 1 is not valid JSON"),
    ],
    ids=str,
)
def test_bad_texts_are_named(tmp_path, name, content, arguments, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:
        read_texts(tmp_path / name, word_tokenizer(), **{"config": CONFIG, **arguments})
    assert message in str(error.value)
