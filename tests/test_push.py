# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""`loopmdm push`: what is refused, what goes to the Hub, and what stays. The Hub is one of the test's own."""

import contextlib
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import refusal
from commands import run as command
from evaluation_models import word_tokenizer
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from loopmdm.hub import load_in_fresh_process, write_card
from loopmdm.training import lora_config


class Hub:
    """Stands for `HfApi`: remembers what is asked of it."""

    def __init__(self, public: tuple[str, ...] = ()):
        self.public, self.repos, self.commits = public, {}, []

    def __call__(self):
        return self

    def create_repo(self, repo, private, exist_ok):
        assert exist_ok
        self.repos.setdefault(repo, private and repo not in self.public)
        return SimpleNamespace(repo_id=repo)

    def repo_info(self, repo):
        return SimpleNamespace(private=self.repos[repo])

    def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
        paths = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        kept = sorted(filter_repo_objects(paths, ignore_patterns=ignore_patterns))
        self.commits.append((repo_id, commit_message, kept))
        return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}")


@pytest.fixture
def hub(monkeypatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    hub = Hub(public=("ann/public",))
    monkeypatch.setattr("loopmdm.hub.push.HfApi", hub)
    return hub


@pytest.fixture
def loads(monkeypatch):
    """Takes it for granted that the folder loads, which takes seconds."""
    monkeypatch.setattr("loopmdm.hub.load_in_fresh_process", lambda folder: {"class": "X", "parameters": 1})


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model with a tokenizer, a card with a licence, and what trainings leave."""
    folder = tmp_path / "model"
    tiny_model(vocab_size=40, mask_token_id=2).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    card = write_card(folder)
    card.write_text(card.read_text(encoding="utf-8").replace("---\n", "---\nlicense: mit\n", 1), encoding="utf-8")
    for name in ("checkpoints/checkpoint-2/model.safetensors", "training_args.bin", ".lock", ".cache/x", "runs.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Runs in this process what others run in a fresh one, which imports torch anew."""

    def run(command, **options):
        *_, code, folder = command
        monkeypatch.setattr(sys, "argv", ["-c", folder])
        monkeypatch.setitem(sys.modules, "loopmdm", sys.modules["loopmdm"])  # the code hides it
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            try:
                exec(code, {})
            except SystemExit as exit_:
                return SimpleNamespace(returncode=1, stderr=str(exit_))
        return SimpleNamespace(returncode=0, stdout=shown.getvalue())

    monkeypatch.setattr("loopmdm.hub.push.subprocess.run", run)


def test_a_folder_is_loaded_and_uploaded(folder, hub, quick):
    shown = " ".join(command("push", folder, "ann/looped", "--private", "--message", "First").split())
    ((repo, message, files),) = hub.commits
    assert (repo, message, hub.repos) == ("ann/looped", "First", {"ann/looped": True})
    assert {"README.md", "config.json", "model.safetensors", "modeling_loopmdm.py", "tokenizer.json"} <= set(files)
    assert not [name for name in files if name.startswith((".", "checkpoints")) or name == "training_args.bin"]
    assert "runs.txt" in files and "mit" in shown and "https://huggingface.co/ann/looped" in shown
    # The card loads what it lies beside there, and keeps the licence.
    card = ModelCard((folder / "README.md").read_text(encoding="utf-8"))
    assert 'from_pretrained("ann/looped"' in card.text and card.data.license == "mit"


def test_a_dry_run_changes_nothing(folder, hub, loads):
    before = (folder / "README.md").read_text(encoding="utf-8")
    assert "modeling_loopmdm.py" in command("push", folder, "ann/looped", "--dry-run")
    assert hub.commits == [] and hub.repos == {}
    assert (folder / "README.md").read_text(encoding="utf-8") == before


def test_a_users_card_goes_as_it_is(folder, hub, loads):
    (folder / "README.md").write_text("---\nlicense: [mit, apache-2.0]\n---\n# Mine\n")
    command("push", folder, "ann/looped")
    assert (folder / "README.md").read_text() == "---\nlicense: [mit, apache-2.0]\n---\n# Mine\n"


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ("library_name: transformers", "names no licence"),
        ("license:", "names no licence"),
        ("license: other", "name it with `license_name`"),
        ("license: other\nlicense_name: x\nlicense_link: LICENSE.txt", "which is not in"),
        ("license: [", "cannot be read"),
        ("- mit", "cannot be read"),
    ],
)
def test_a_card_without_a_licence_is_refused(folder, hub, metadata, says):
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n# Mine\n")
    assert says in refusal("push", folder, "ann/looped") and hub.repos == {}


def test_what_cannot_be_pushed_is_refused_before_anything_is_loaded(folder, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("loopmdm.hub.load_in_fresh_process", None)
    assert "is not an id on the Hub" in refusal("push", folder, "a/b/c")
    assert "does not hold a model" in refusal("push", tmp_path, "ann/looped")
    (folder / "README.md").unlink()
    assert "has no README.md" in refusal("push", folder, "ann/looped")
    (folder / "export.json").write_text("{}")
    assert f"`hf upload ann/looped {folder}` publishes it" in refusal("push", folder, "ann/looped")


def test_an_adapter_of_a_local_folder_is_refused(folder, hub, tmp_path):
    model = tiny_model()
    adapter = get_peft_model(model, lora_config(model.config, r=2))
    adapter.peft_config["default"].base_model_name_or_path = str(folder)
    adapter.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert "an adapter of" in refusal("push", tmp_path / "adapter", "ann/looped")


def test_nobody_logged_in(folder, hub, loads, monkeypatch):
    monkeypatch.setattr("loopmdm.hub.push.get_token", lambda: None)
    assert "hf auth login" in refusal("push", folder, "ann/looped") and hub.repos == {}


def test_a_public_repository_does_not_become_private_in_silence(folder, hub, loads):
    assert "is public" in refusal("push", folder, "ann/public", "--private") and hub.commits == []


def test_weights_that_give_no_numbers_are_refused(folder, quick):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.full((32,), torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not finite"):
        load_in_fresh_process(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path, quick):
    tiny_model().save_pretrained(tmp_path)  # 23 tokens
    word_tokenizer().save_pretrained(tmp_path)  # 32
    with pytest.raises(ValueError, match="32 tokens, and the model 23"):
        load_in_fresh_process(tmp_path)


def test_an_adapter_loads_in_a_fresh_process(folder, tmp_path):
    model = tiny_model(vocab_size=40, mask_token_id=2)
    adapter = get_peft_model(model, lora_config(model.config, r=2))
    adapter.peft_config["default"].base_model_name_or_path = str(folder)
    adapter.save_pretrained(tmp_path / "adapter")
    found = load_in_fresh_process(tmp_path / "adapter")
    assert found["class"].startswith("Peft") and json.dumps(found)
