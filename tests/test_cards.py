# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what they say of licence, origin and loops, and that they leave cards of others alone."""

import json
import re
from pathlib import Path

import pytest
from commands import run as command
from conversion import convert, edited
from evaluation_models import word_tokenizer
from huggingface_hub import ModelCard
from tiny import tiny_model
from training_runs import SIZES, TEXT, run_writer

from loopmdm.convert import convert_checkpoint
from loopmdm.hub import is_own_card, read_source_card, write_card
from loopmdm.hub.sections import what_loops_buy
from loopmdm.training.run import read_config, train

LICENSED = (
    "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nlanguage: [en]\n---\n\n# A source\n\n94 %!\n"
)


@pytest.fixture
def run(tmp_path):
    """A run in a moment: `run(key=value)`, see `run_writer`, trains and returns the output."""
    word_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text(TEXT)
    values = {
        "output": str(tmp_path / "out"),
        "tokenizer": str(tmp_path / "tokenizer"),
        "data": str(tmp_path / "text.txt"),
        "sequence_length": 16,
        "model_config": SIZES | {"num_hidden_layers": 3},
        "trainer": {"max_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True},
    }
    write = run_writer(tmp_path, values)

    def go(**changes) -> Path:
        config = read_config(write(**changes))
        train(config)
        return Path(config.output)

    return go


def read(folder: Path) -> tuple[dict, str]:
    """Metadata and text of a card, as the Hub reads them."""
    card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    return card.data.to_dict(), card.text


def python_of(text: str) -> str:
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+\.\d+", text))


def test_training_shows_what_it_measured_and_no_more(run, tmp_path, monkeypatch, capsys):
    out = run(eval_data=str(tmp_path / "text.txt"), eval_loops=[1, 2, 3], eval_sequences=4)
    evaluation = json.loads((out / "training.json").read_text())["evaluation"]
    metadata, text = read(out)
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-generation")
    assert "license" not in metadata and "base_model" not in metadata and "datasets" not in metadata
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["name"] == "text.txt" and str(tmp_path) not in text
    shown = {
        metric["args"]["num_loops"]: (metric["value"], metric["args"]["standard_error"])
        for metric in result["metrics"]
    }
    expected = {n: (evaluation[f"eval_nelbo_{n}"], evaluation[f"eval_nelbo_{n}_standard_error"]) for n in (1, 2, 3)}
    assert shown == expected
    for n, layers in ((1, 3), (2, 5), (3, 7)):
        value, error = re.search(rf"^\| {n} \| {layers} \| ([\d.]+) ± ([\d.]+) \|$", text, re.MULTILINE).groups()
        assert (float(value), float(error)) == pytest.approx(expected[n], abs=0.03 * expected[n][1])
    monkeypatch.chdir(tmp_path)
    exec(python_of(text), {})
    assert capsys.readouterr().out


def test_a_folder_of_data_is_no_data_set_of_the_hub(run, tmp_path, monkeypatch):
    (tmp_path / "corp" / "mine").mkdir(parents=True)
    (tmp_path / "corp" / "mine" / "train.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 8)
    monkeypatch.chdir(tmp_path)
    out = run(data="corp/mine", eval_data="corp/mine", eval_loops=[1], eval_sequences=2)
    monkeypatch.chdir(tmp_path / "corp")
    write_card(out, "ann/looped")
    metadata, text = read(out)
    assert metadata["model-index"][0]["results"][0]["dataset"] == {"name": "mine", "type": "file"}
    assert "datasets" not in metadata and "`mine`" in text and "corp/mine" not in text


def test_without_an_evaluation_there_is_no_figure(run):
    metadata, text = read(run())
    assert "model-index" not in metadata
    assert "Not measured yet" in text and "loopmdm eval likelihood" in text
    # but for what the run was, and the paper's number
    assert numbers(text) <= {"2605.26106", *re.findall(r"([\d.]+)e\+\d+ FLOPs", text)}


def test_the_licence_of_the_base_is_kept_over_two_generations(run, tmp_path):
    first = run()
    (first / "README.md").write_text(LICENSED)
    (first / "LICENSE").write_text("Do what you like.")
    second = run(model=str(first), model_config=None, output=str(tmp_path / "second"))
    third = run(model=str(second), model_config=None, output=str(tmp_path / "third"), lora={"r": 2})
    for folder in (second, third):
        metadata, _ = read(folder)
        assert {key: metadata[key] for key in ("license", "license_name", "license_link", "language")} == {
            "license": "other",
            "license_name": "tiny",
            "license_link": "LICENSE",
            "language": ["en"],
        }
        assert (folder / "LICENSE").read_text() == "Do what you like."
        assert not (folder / "README.source.md").exists()  # the card of the base does not speak of this model
    assert metadata["library_name"] == "peft"
    (second / "LICENSE").write_text("Do what we like.")
    write_card(second, source=read_source_card(first))
    assert (second / "LICENSE").read_text() == "Do what we like."
    assert "An adapter was trained from `second`, a local folder" in read(third)[1]


def test_what_adapters_and_chats_are_loaded_with_runs(run, tmp_path, monkeypatch, capsys):
    base = run()
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content + ' w1 ' }}{% endfor %}"
    )
    adapter = run(model=str(base), model_config=None, output=str(tmp_path / "adapter"), lora={"r": 2})
    code = python_of(read(adapter)[1])
    assert "AutoPeftModelForCausalLM" in code and "apply_chat_template" in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out


def test_a_card_is_replaced_while_nobody_changed_its_text(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    card = write_card(folder, "first")
    assert is_own_card(folder) and "# first" in card.read_text(encoding="utf-8")
    # The licence is the user's to add, and stays; line ends are those of the system.
    text = card.read_text(encoding="utf-8").replace("---\n", "---\nlicense: mit\n", 1)
    card.write_bytes(text.replace("\n", "\r\n").encode())
    assert write_card(folder, "you/second") == card
    metadata, body = read(folder)
    assert metadata["license"] == "mit" and '"you/second"' in body
    changed = card.read_text(encoding="utf-8").replace("## Limits", "## Limits, as I see them")
    card.write_text(changed, encoding="utf-8")
    assert not is_own_card(folder) and write_card(folder, "third") is None
    assert card.read_text(encoding="utf-8") == changed
    card.write_bytes(b"\xff\xfe")
    assert write_card(folder) is None


def test_a_model_without_a_tokenizer_has_lines_that_run(tmp_path, monkeypatch, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    write_card(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    exec(python_of(read(tmp_path / "model")[1]), {})
    assert "tensor" in capsys.readouterr().out


def test_a_conversion_keeps_the_sources_card_and_licence(src, out):
    source = edited("dream", src)
    (source / "README.md").write_text(LICENSED)
    (source / "LICENSE").write_text("Do what you like.")
    convert_checkpoint(source, out)
    metadata, text = read(out)
    assert (metadata["license"], metadata["license_name"], metadata["license_link"]) == ("other", "tiny", "LICENSE")
    assert (out / "LICENSE").read_text() == "Do what you like."
    # The source's text is kept whole, beside the card, as its figures are not this model's.
    assert (out / "README.source.md").read_text() == LICENSED and "94 %" not in text
    assert "[README.source.md](README.source.md)" in text and "never been trained with loops" in text
    assert "model-index" not in metadata


def test_a_conversion_shows_calibration_and_verification(out, tmp_path):
    record = convert("dream", out, verify=True)
    text = read(out)[1]
    assert f"the largest difference is {record['verification']['max_difference']:.2g}" in " ".join(text.split())
    score = {"nelbo": 5.0, "standard_error": 0.1}
    looped = {**score, "nelbo": 5.25, "loop_start": 1, "loop_end": 2, "change": 0.25, "change_standard_error": 0.012}
    record["calibration"] = {
        "num_loops": 2,
        "without_loops": score,
        "windows": [looped],
        "best": [1, 2],
        "text": "valid.txt",
        "sequences": 16,
        "length": 64,
    }
    section, results = what_loops_buy({"training": {}, "conversion": record, "budget": {}}, tiny_model().config, "x")
    assert "| 2 | 5.25 ± 0.10 |" in section and "2 loops change it by 0.250 ± 0.012" in section
    assert [result.metric_value for result in results] == [5.0, 5.25]


def test_calibrate_adds_its_measurements(tmp_path):
    model = tiny_model(loop_update="replace")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    write_card(folder)
    words = " ".join(f"w{i}" for i in range(12))  # one of which is the untrained model's guess
    (tmp_path / "data.jsonl").write_text(
        "".join(json.dumps({"prompt": f"w{i} w{i + 1}", "answer": words}) + "\n" for i in range(8))
    )
    options = ("--data", tmp_path / "data.jsonl", "--quality", "tokens", "--num-loops", 2, "--max-loss", 1)
    shown = command("calibrate", folder, *options)
    assert "README.md" in "".join(shown.split())
    budget = json.loads((folder / "loop_budget.json").read_text())
    metadata, text = read(folder)
    (result,) = metadata["model-index"][0]["results"]
    assert {metric["type"] for metric in result["metrics"]} == {"accuracy"}
    assert result["metrics"][-1]["value"] == 100 * budget["check"]["quality"]
    assert "tokens that are right" in text and "data.jsonl" in text and str(tmp_path) not in text
    (folder / "README.md").write_text("# Mine\n")
    assert "is yours" in " ".join(command("calibrate", folder, *options).split())
    assert (folder / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize(
    "content",
    [
        "---\nlicense: [\n---\n",
        "---\n- mit\n---\n",
        "no metadata",
        "---\nlicense: {a: 1}\n---\n",
        "---\nlicense: 3\n---\n",
    ],
)
def test_damaged_cards_of_sources_name_no_licence(tmp_path, content):
    (tmp_path / "README.md").write_text(content)
    card = read_source_card(tmp_path)
    assert card.metadata == {} and card.text == content


@pytest.mark.parametrize("base", ["", "folder", "/home/me/base", ["me/base", "./folder"]], ids=str)
def test_a_folder_of_somebody_is_no_base_model(tmp_path, monkeypatch, base):
    """peft and the Trainer write what they were given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "README.md").write_text(f"---\nbase_model: {json.dumps(base)}\n---\n")
    assert read_source_card(tmp_path).hub_id is None
    (tmp_path / "README.md").write_text("---\nbase_model: me/base\n---\n")
    assert read_source_card(tmp_path).hub_id == "me/base"


def test_the_hub_is_asked_for_the_licence_of_an_id(tmp_path, monkeypatch):
    """And where it does not answer, the card names the base all the same."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        (tmp_path / "README.md").write_text(LICENSED)
        return str(tmp_path)

    monkeypatch.setattr("loopmdm.hub.source.snapshot_download", snapshot_download)
    card = read_source_card("owner/name")
    assert asked == ["owner/name"] and card.hub_id == "owner/name"
    # There is no LICENSE here, so the link leads to where it is.
    assert card.metadata["license_link"] == "https://huggingface.co/owner/name/blob/main/LICENSE"

    def offline(name, allow_patterns):
        raise OSError("no network")

    monkeypatch.setattr("loopmdm.hub.source.snapshot_download", offline)
    card = read_source_card("owner/name")
    assert (card.hub_id, card.metadata) == ("owner/name", {})
