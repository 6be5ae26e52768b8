# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A generation as one HTML file: that it says what the trace says, for any text, and how large it is."""

import base64
import json
import math
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PUZZLE, refusal, run
from tiny import MASK, PAD, tiny_model

from loopmdm.generation_outputs import LoopMDMGenerationOutput, LoopMDMTraceStep
from loopmdm.web import trace_to_html
from loopmdm.web.trace import COMMITTED, GIVEN, GUESSED, KEPT, REMASKED, WAITING, write_html

ROOT = Path(__file__).resolve().parents[1]


class Words:
    """A tokenizer that gives every token a text, by default its number."""

    def __init__(self, texts: dict[int, str] | None = None):
        self.texts = texts or {}

    def decode(self, ids, **_):
        return "".join(self.texts.get(token, f" {token}") for token in ids).replace("▁", "")

    def convert_ids_to_tokens(self, token):
        return self.texts.get(token, f" {token}")


class Parser(HTMLParser):
    """The data of a page, its scripts, and the text that a reader sees without scripts."""

    def __init__(self, html: str):
        super().__init__()
        self.inside, self.scripts, self.addresses, self.text, self.elements = None, [], [], "", []
        self.feed(html)
        data = next(script for kind, script in self.scripts if kind == "application/json")
        self.data = json.loads(data)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.elements.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "script":
            self.scripts.append([dict(attributes).get("type"), ""])

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1][1] += data
        elif self.inside != "style":
            self.text += data


def planes(data: dict, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a row what each position was, the texts shown (None: nothing), and percentages, each (steps, length)."""
    packed = data["rows"][row]
    shape = (len(data["steps"]), packed["length"])
    raw = zlib.decompress(base64.b64decode(packed["packed"]))
    count = math.prod(shape)
    assert len(raw) == 6 * count
    kinds = np.frombuffer(raw, np.uint8, count).reshape(shape)
    numbers = np.frombuffer(raw, "<i4", count, offset=count).reshape(shape)
    shown = np.array([*data["tokens"], None], dtype=object)[numbers]
    return kinds, shown, np.frombuffer(raw, np.uint8, count, offset=5 * count).reshape(shape)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def generate(model, ids, **arguments):
    arguments = {"max_denoising_steps": 4, "return_dict_in_generate": True, "output_trace": True} | arguments
    return model.generate(torch.tensor(ids), **arguments)


def test_every_step_is_shown_as_the_trace_has_it(model):
    """Tokens are given, waiting, guessed, committed, or were before; the last step shows the result."""
    output = generate(model, [[5, MASK, 7, MASK, MASK], [9, 8, 7, 6, 5]], max_new_tokens=3, block_length=4)
    data = Parser(trace_to_html(output, Words())).data
    assert data["steps"] == [{"block": step.block, "step": step.step} for step in output.trace]
    for row in range(2):
        kinds, shown, sure = planes(data, row)
        assert data["rows"][row]["loops"] == [int(step.loops[row]) for step in output.trace]
        for number, step in enumerate(output.trace):
            masked = step.confidence[row].isfinite().numpy()
            committed = step.committed[row].numpy()
            assert ((kinds[number] == COMMITTED) == committed).all()
            assert ((kinds[number] == GUESSED) == (masked & ~committed)).all()
            left = (step.tokens[row] == MASK).numpy()
            assert (np.isin(kinds[number], (WAITING, GUESSED)) == left).all()
            texts = np.array([f" {token}" for token in step.tokens[row].tolist()])
            assert (shown[number][~left] == texts[~left]).all()
            guesses = [f" {token}" for token in step.predictions[row].tolist()]
            assert all(shown[number][i] == guesses[i] for i in (masked & ~committed).nonzero()[0])
            known = (step.confidence[row][masked] * 100).round().numpy()
            assert (sure[number][masked] == known).all()
        assert (kinds[:, 0] == GIVEN).all()
        assert set(np.unique(kinds[-1])) <= {GIVEN, KEPT, COMMITTED}
        assert [f" {token}" for token in output.sequences[row].tolist()] == shown[-1].tolist()
    # A token stays as sure as it was when it was committed.
    kinds, _, sure = planes(data, 1)
    for column in range(5, 8):
        (when,) = (kinds[:, column] == COMMITTED).nonzero()
        assert (sure[when[0] :, column] == sure[when[0], column]).all()


def made_up(num_steps: int, ids, commits, tokens, remasks=None) -> list[LoopMDMTraceStep]:
    """Steps that commit and send back the columns listed for every step and row; confidence is 0.5."""
    sequences, target, steps = torch.tensor(ids), torch.tensor(tokens), []
    for number in range(num_steps):
        committed, remasked = torch.zeros_like(sequences).bool(), torch.zeros_like(sequences).bool()
        for row, columns in enumerate(commits[number]):
            committed[row, columns] = True
        for row, columns in enumerate(remasks[number] if remasks else []):
            remasked[row, columns] = True
        confidence = torch.where(sequences == MASK, 0.5, math.nan)
        sequences = sequences.where(~committed, target).masked_fill(remasked, MASK)
        loops = torch.ones(len(ids), dtype=torch.long)
        fields = {"committed": committed, "remasked": remasked, "tokens": sequences, "confidence": confidence}
        predictions = torch.where(confidence.isfinite(), target, -1)
        counts = {"block": 0, "step": number, "loops": loops}
        steps.append(LoopMDMTraceStep(**counts, predictions=predictions, log_probs=confidence.log(), **fields))
    return steps


def test_what_is_sent_back_is_shown_once_more():
    steps = made_up(3, [[MASK, MASK]], commits=[[[0]], [[1]], [[0]]], remasks=[[[]], [[0]], [[]]], tokens=[[4, 5]])
    output = LoopMDMGenerationOutput(torch.tensor([[4, 5]]), trace=steps)
    kinds, shown, sure = planes(Parser(trace_to_html(output, Words())).data, 0)
    assert kinds.tolist() == [[COMMITTED, GUESSED], [REMASKED, COMMITTED], [COMMITTED, KEPT]]
    assert shown[1].tolist() == [" 4", " 5"]
    assert sure[0, 0] == sure[2, 0] == 50


def test_padding_is_left_out(model):
    ids = torch.tensor([[PAD, PAD, 5, MASK], [7, 8, 9, MASK]])
    output = generate(model, ids.tolist(), attention_mask=(ids != PAD).long())
    data = Parser(trace_to_html(output, Words())).data
    assert [row["length"] for row in data["rows"]] == [2, 4]
    alone = generate(model, [[5, MASK]])
    ours, theirs = planes(data, 0), planes(Parser(trace_to_html(alone, Words())).data, 0)
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))


def test_what_lies_behind_the_end_is_shown_apart(model):
    """Of a row that ends early the final text is what counts, and the rest was written all the same."""
    plain = generate(model, [[5, MASK, 7]], max_new_tokens=6, max_denoising_steps=6)
    end = int(plain.sequences[0, 5])
    output = generate(model, [[5, MASK, 7]], max_new_tokens=6, max_denoising_steps=6, eos_token_id=end)
    data = Parser(trace_to_html(output, Words())).data
    (row,) = data["rows"]
    assert row["end"] == int(output.attention_mask.sum()) < row["length"] == 9
    final = output.sequences[0, : row["end"]].tolist()
    assert [data["tokens"][number] for number in row["final"]] == [f" {token}" for token in final]


def test_texts_are_escaped_wherever_they_stand(model):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    output = generate(model, [[5, MASK]])
    token = int(output.sequences[0, 1])
    html = trace_to_html(output, Words({5: evil, token: evil}), title=evil, names=[evil])
    page = Parser(html)
    assert [kind for kind, _ in page.scripts] == ["application/json", None]
    assert "img" not in page.elements
    assert evil in page.data["tokens"]
    assert page.text.count(evil) == 2 + 1 + 2  # title and heading, name, and the final text
    assert page.addresses == ["data:,"]


def test_a_first_space_is_kept_of_tokenizers_that_take_it_away(model):
    output = generate(model, [[5, MASK]])
    assert " five" in Parser(trace_to_html(output, Words({5: "▁five"}))).data["tokens"]


def test_the_final_text_and_the_cost_are_there_without_scripts(model):
    output = generate(model, [[5, MASK, MASK]])
    page = Parser(trace_to_html(output, Words(), names=["The name"]))
    assert "".join(f" {token}" for token in output.sequences[0].tolist()) in page.text
    assert f"{int(output.forward_passes)} forward passes, {int(output.loops)} loops" in page.text
    assert "The name" in page.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trace": None}, "`return_dict_in_generate` and `output_trace`"),
        ({"trace": []}, "nothing to show"),
        ({"columns": 0}, "`columns` is 0"),
        ({"columns": 2.5}, "`columns` is 2.5"),
        ({"names": ["one", "two"]}, "2 entries for 1 rows"),
    ],
)
def test_what_cannot_be_shown_is_named(model, change, said):
    output = generate(model, [[5, MASK]])
    if "trace" in change:
        output.trace = change.pop("trace")
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        trace_to_html(output, Words(), **change)


def test_a_long_trace_stays_small():
    """2,000 tokens, 256 steps, and guesses that change at random."""
    length, num_steps, generator = 2000, 256, torch.Generator().manual_seed(0)
    order = torch.randperm(length, generator=generator)
    step_of = torch.empty(length, dtype=torch.long).scatter(0, order, torch.arange(length) * num_steps // length)
    final = torch.randint(30000, (1, length), generator=generator)
    steps = []
    for number in range(num_steps):
        masked = step_of >= number
        committed = (step_of == number)[None]
        confidence = torch.rand(1, length, generator=generator).masked_fill(~masked, math.nan)
        tokens = final.where(step_of <= number, torch.full_like(final, 30001))
        guesses = torch.randint(30000, (1, length), generator=generator).where(masked, torch.full_like(final, -1))
        fields = {"committed": committed, "remasked": torch.zeros_like(committed), "tokens": tokens}
        fields |= {"predictions": guesses, "confidence": confidence, "log_probs": confidence}
        steps.append(LoopMDMTraceStep(block=0, step=number, loops=torch.ones(1, dtype=torch.long), **fields))
    html = trace_to_html(LoopMDMGenerationOutput(final, trace=steps), Words())
    assert len(html.encode()) < 5_000_000


# The command


def test_generate_writes_the_page(tmp_path):
    path = tmp_path / "trace.html"
    shown = run("generate", ROOT, PUZZLE, PUZZLE, "--max-denoising-steps", 3, "--html", path, "--html-columns", 9)
    data = Parser(path.read_text(encoding="utf-8")).data
    assert data["columns"] == 9
    assert len(data["rows"]) == 2
    assert len(data["steps"]) == 3
    assert "".join(data["tokens"][number] for number in data["rows"][0]["final"]) == shown.splitlines()[0]
    assert list(tmp_path.iterdir()) == [path]


def test_every_answer_has_its_name_and_the_tokens_of_a_run_without_a_page(tmp_path):
    drawn = ("generate", ROOT, PUZZLE, "1" + "." * 80, "--do-sample", "--num-return-sequences", 2)
    drawn += ("--max-denoising-steps", 2, "--max-new-tokens", 0)
    plain = run(*drawn).splitlines()
    assert run(*drawn, "--html", tmp_path / "trace.html").splitlines() == plain
    page = Parser((tmp_path / "trace.html").read_text(encoding="utf-8"))
    texts = ["".join(page.data["tokens"][number] for number in row["final"]) for row in page.data["rows"]]
    assert texts == plain and len(set(plain)) > 2
    places = [page.text.index(f"{text} ({copy} of 2)") for text in (PUZZLE, "1" + "." * 80) for copy in (1, 2)]
    assert places == sorted(places)


def test_prompts_that_are_not_denoised_together_have_no_common_page(tmp_path):
    path = tmp_path / "trace.html"
    wrong = refusal("generate", tmp_path / "missing", *["x"] * 3, "--batch-size", 2, "--html", path)
    assert "there are 3 at a --batch-size of 2; give --batch-size 3, or fewer prompts" in wrong
    wrong = refusal("generate", ROOT, PUZZLE, "12", "--html", path)
    assert "prompt 1 has 0 new tokens after 81 of its own, and prompt 2 has nothing to denoise" in wrong
    wrong = refusal("generate", ROOT, "12", "", "--max-new-tokens", 3, "--html", path)
    assert "prompt 1 has 3 new tokens after 2 of its own, and prompt 2 has 3 new tokens after 0" in wrong
    assert not path.exists()


def test_a_page_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "trace.html").mkdir()
    with pytest.raises(OSError):
        write_html(tmp_path / "trace.html", "page")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.html"]


def test_wrong_options_are_refused_before_anything_is_loaded(tmp_path):
    missing = tmp_path / "missing"
    assert "in a folder that does not exist" in refusal("generate", missing, "x", "--html", missing / "trace.html")
    assert "is a folder" in refusal("generate", missing, "x", "--html", tmp_path)
    (tmp_path / "older.html").write_text("an older one")
    assert "older.html exists already" in refusal("generate", missing, "x", "--html", tmp_path / "older.html")
    assert (tmp_path / "older.html").read_text() == "an older one"
    assert "--html-columns is 0" in refusal(
        "generate", missing, "x", "--html", tmp_path / "trace.html", "--html-columns", 0
    )
    assert "give both" in refusal("generate", missing, "x", "--html-columns", 9)
