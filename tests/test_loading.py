# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tests of the ways in: code from a folder or a Hub repo, the package, what either saves; and of damaged folders."""

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversion import save_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    PreTrainedConfig,
    pipeline,
)
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from loopmdm import LoopMDMConfig, LoopMDMForMaskedLM, LoopMDMGenerationConfig, LoopMDMModel

ROOT = Path(__file__).parents[1]
LOOPMDM_FILES = {"configuration_loopmdm.py", "modeling_loopmdm.py"}
HUB_FILES = {"cache_utils.py", "commit_rules.py", "generation_outputs.py", "generation_utils.py", "loop_policies.py"}
HUB_FILES |= {"loop_context.py", "weight_files.py", *LOOPMDM_FILES}
SAVED_FILES = {"config.json", "generation_config.json", "model.safetensors", *HUB_FILES}
AUTO_CLASSES = [AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM]


# The code that the Hub serves


@pytest.mark.parametrize("name", sorted(HUB_FILES))
def test_hub_files_import_nothing_but_the_three_libraries_and_one_another(name):
    absolute, relative = set(), set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # transformers overlooks `from . import module`.
            assert node.level == 0 or (node.level == 1 and node.module), ast.unparse(node)
            (relative if node.level else absolute).add(node.module.split(".")[0])
    assert absolute <= {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    # transformers scans the text for imports, docstrings included. What it finds it demands, and what not it leaves.
    assert set(get_imports(ROOT / name)) == absolute
    needed = {Path(file).name for file in get_relative_import_files(ROOT / name)}
    assert {f"{module}.py" for module in relative} <= needed <= HUB_FILES
    if name == "modeling_loopmdm.py":
        assert needed | {name} == HUB_FILES


# Ways in


class FreshProcess:
    """
    A Python process that cannot import the package and has no network, with empty caches. Calling it runs a function
    of this file in there, given by its source; it may use `SETUP`'s names, `check`, and its own arguments.
    """

    SETUP = """
import json, os, sys
import torch
sys.modules["loopmdm"] = None  # as if it were not installed: importing it is an ImportError
from safetensors.torch import load_file
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, pipeline
AUTO_CLASSES = [AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM]
torch.set_num_threads(1)
"""
    LOOP = """
import json, sys, traceback
results, sys.stdout = sys.stdout, sys.stderr
namespace = {}
for line in sys.stdin:
    error = None
    try:
        exec(compile(*json.loads(line), "exec"), namespace)
    except BaseException:
        error = traceback.format_exc()
    print(json.dumps(error), file=results, flush=True)
"""

    def __init__(self, folder: Path):
        self.folder = folder
        variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "HF_MODULES_CACHE": str(folder / "modules")}
        command, pipes = [sys.executable, "-c", self.LOOP], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=folder, env={**os.environ, **variables}, text=True, **pipes)
        self._run(self.SETUP, "setup")
        self(check)

    def __call__(self, function: Callable, *args: str | Path) -> None:
        lines, first = inspect.getsourcelines(function)
        call = f"{function.__name__}(*{tuple(map(str, args))})" if args else ""
        self._run("\n" * (first - 1) + textwrap.dedent("".join(lines)) + call, __file__)

    def _run(self, *code: str) -> None:
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()
        error = json.loads(self.process.stdout.readline() or '"The fresh process died."')
        assert error is None, error


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    process = FreshProcess(tmp_path_factory.mktemp("fresh"))
    yield process
    process.process.kill()
    process.process.communicate()


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    # Without this file `generate(ids)` would find nothing to do.
    model.generation_config.update(max_new_tokens=5, unmasking="left_to_right")
    return model


@pytest.fixture(scope="module")
def clone(model, tmp_path_factory):
    """A clone of the Hub repo: code and tiny weights in one folder, whose name could not be a module's."""
    clone = tmp_path_factory.mktemp("clone") / "loop-mdm.v1"
    model.save_pretrained(clone)
    for name in HUB_FILES:
        (clone / name).unlink()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, clone)
    return clone


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """What every loaded model has to give, as a file."""
    ids = random_ids(2, 10)
    tensors = {"input_ids": ids, "sequences_default": model.generate(ids)}
    for num_loops in (1, 4):
        with torch.no_grad():
            tensors[f"logits_{num_loops}"] = model(ids, num_loops=num_loops).logits
        tensors[f"sequences_{num_loops}"] = model.generate(ids, num_loops=num_loops)
    assert not torch.equal(tensors["logits_1"], tensors["logits_4"])
    assert not torch.equal(tensors["sequences_1"], tensors["sequences_4"])
    save_file(tensors, path := tmp_path_factory.mktemp("expected") / "expected.safetensors")
    return path


def check(model, expected):
    """Whether a model is the one that `expected` describes. Runs in this process and in the fresh one."""
    expected = load_file(expected)
    ids = expected["input_ids"]
    assert not model.training
    assert type(model).__name__ == "LoopMDMForMaskedLM"
    assert type(model.generation_config).__name__ == "LoopMDMGenerationConfig"
    assert model.generation_config.unmasking == "left_to_right"
    assert torch.equal(model.generate(ids), expected["sequences_default"])
    for num_loops in (1, 4):
        with torch.no_grad():
            logits = model(ids, num_loops=num_loops).logits
        torch.testing.assert_close(logits, expected[f"logits_{num_loops}"], rtol=0, atol=1e-6)
        assert torch.equal(model.generate(ids, num_loops=num_loops), expected[f"sequences_{num_loops}"])


def load_and_save_twice(source, expected, out, count):
    for auto_class in AUTO_CLASSES[: int(count)]:
        model = auto_class.from_pretrained(source, trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")
        check(model, expected)
        first, second = f"{out}/{auto_class.__name__}", f"{out}/{auto_class.__name__}-again"
        model.save_pretrained(first)
        model = AutoModel.from_pretrained(first, trust_remote_code=True)
        model.save_pretrained(second)
        check(AutoModelForMaskedLM.from_pretrained(second, trust_remote_code=True), expected)
    assert sys.modules["loopmdm"] is None


def assert_complete(folder):
    """A saved folder holds the files of a Hub repo, with this code and the auto map that names it."""
    assert {path.name for path in folder.iterdir()} == SAVED_FILES
    for name in HUB_FILES:
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    assert json.loads((folder / "config.json").read_text())["auto_map"] == tiny_config().auto_map


@pytest.fixture(scope="module")
def saved_by_clone(clone, expected, fresh):
    out = fresh.folder / "saved_by_clone"
    fresh(load_and_save_twice, clone, expected, out, "3")
    return sorted(out.iterdir())


def test_clone(saved_by_clone):
    assert len(saved_by_clone) == 6
    for folder in saved_by_clone:
        assert_complete(folder)


def test_hub_snapshot(model, expected, fresh):
    repo, commit = fresh.folder / "hub" / "models--user--loop-mdm.v1", "0123456789" * 4
    model.save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    out = fresh.folder / "saved_by_snapshot"
    fresh(load_and_save_twice, "user/loop-mdm.v1", expected, out, "1")
    for folder in out.iterdir():
        assert_complete(folder)


def test_working_directory_and_config_first(clone, expected, fresh, tmp_path):
    """From a local folder the configuration's code is loaded twice, so that there are two classes of one name."""

    def load(clone, expected, out):
        config = AutoConfig.from_pretrained(clone, trust_remote_code=True)
        assert type(config).__name__ == "LoopMDMConfig"
        assert isinstance(config, PreTrainedConfig)
        model = AutoModel.from_pretrained(clone, config=config, trust_remote_code=True)
        check(model, expected)
        check(type(model).from_pretrained(clone), expected)
        check(type(model).from_pretrained(clone, config=config), expected)
        blank = AutoModelForMaskedLM.from_config(config, trust_remote_code=True).eval()
        blank.load_state_dict(model.state_dict())
        blank.generation_config = model.generation_config
        check(blank, expected)
        blank.save_pretrained(out)
        overridden = AutoModel.from_pretrained(out, num_loops=2, max_train_loops=4, trust_remote_code=True).config
        assert (overridden.num_loops, overridden.max_train_loops) == (2, 4)
        os.chdir(clone)
        check(AutoModel.from_pretrained(".", trust_remote_code=True), expected)

    fresh(load, clone, expected, tmp_path / "saved")
    assert_complete(tmp_path / "saved")


@pytest.mark.parametrize("trust_remote_code", [None, True])
def test_package(clone, expected, saved_by_clone, tmp_path, trust_remote_code):
    """With the package imported its classes are used, whatever code lies in the folder."""
    assert type(AutoConfig.from_pretrained(clone, trust_remote_code=trust_remote_code)) is LoopMDMConfig
    for auto_class in AUTO_CLASSES:
        loaded = auto_class.from_pretrained(clone, trust_remote_code=trust_remote_code)
        assert type(loaded) is LoopMDMForMaskedLM
        assert type(loaded.generation_config) is LoopMDMGenerationConfig
        assert type(auto_class.from_config(loaded.config)) is LoopMDMForMaskedLM
    check(loaded, expected)
    check(AutoModel.from_pretrained(saved_by_clone[0], trust_remote_code=trust_remote_code), expected)
    loaded.save_pretrained(tmp_path)
    assert_complete(tmp_path)


def test_pipelines_by_path(clone, expected, fresh, tmp_path):
    shutil.copytree(clone, folder := tmp_path / "with-tokenizer")
    save_tokenizer(folder, 22, extra=("[MASK]",), mask="[MASK]", pad="w0")

    def run(folder, expected):
        expected = load_file(expected)
        rows = [[f"w{i}" if i < 22 else "[MASK]" for i in row] for row in expected["input_ids"].tolist()]
        prompts = [" ".join(row) for row in rows]
        pipe = pipeline("text-generation", model=folder, trust_remote_code=True, device="cpu")
        for num_loops in (1, 4):
            answers = pipe(prompts, num_loops=num_loops, batch_size=2, return_tensors=True)
            generated = [answer["generated_token_ids"] for (answer,) in answers]
            assert generated == expected[f"sequences_{num_loops}"].tolist()
        pipe = pipeline("fill-mask", model=folder, trust_remote_code=True, device="cpu", top_k=1)
        filled = [answer["token"] for (answer,) in pipe(prompts[0])]
        masked = expected["input_ids"][:1] == 22
        assert filled == pipe.model(expected["input_ids"][:1]).logits[masked].argmax(-1).tolist()

    fresh(run, folder, expected)


def test_lora_on_code_of_a_folder(clone, expected, fresh, tmp_path):
    def run(clone, expected, out):
        ids = load_file(expected)["input_ids"]
        model = AutoModel.from_pretrained(clone, trust_remote_code=True)
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, config)
        generated = model.generate(ids, num_loops=2)
        assert not torch.equal(generated, AutoModel.from_pretrained(clone, trust_remote_code=True).generate(ids))
        model.save_pretrained(f"{out}/adapter")
        base = AutoModel.from_pretrained(clone, trust_remote_code=True)
        model = PeftModel.from_pretrained(base, f"{out}/adapter")
        assert torch.equal(model.generate(ids, num_loops=2), generated)
        model.merge_and_unload().save_pretrained(f"{out}/merged")
        # An adapter's folder names its base model.
        for folder in ("adapter", "merged"):
            model = AutoModelForMaskedLM.from_pretrained(f"{out}/{folder}", trust_remote_code=True)
            assert torch.equal(model.generate(ids, num_loops=2), generated)

    fresh(run, clone, expected, tmp_path)
    assert_complete(tmp_path / "merged")


def test_push_to_hub_uploads_code_weights_and_configs(model, monkeypatch):
    uploaded = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return types.SimpleNamespace(repo_id=repo_id)

        def create_commit(self, repo_id, operations, **kwargs):
            uploaded.append((repo_id, sorted(operation.path_in_repo for operation in operations)))

    monkeypatch.setattr("transformers.utils.hub.hf_api", Api)
    card = types.SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: card)
    model.push_to_hub("user/loop-mdm")
    assert uploaded == [("user/loop-mdm", sorted(SAVED_FILES))]


# Configurations at load


def test_generation_config_comes_from_the_models_folder_with_the_changes_of_the_call(tmp_path):
    model = tiny_model()
    model.generation_config.update(num_loops=2, eos_token_id=5)
    model.save_pretrained(tmp_path / "models" / "one")
    read = LoopMDMForMaskedLM.from_pretrained
    assert read(tmp_path / "models", subfolder="one").generation_config.num_loops == 2
    tiny_model().save_pretrained(tmp_path / "models")
    assert read(tmp_path / "models", subfolder="one").generation_config.num_loops == 2
    assert read(tmp_path / "models").generation_config.num_loops is None
    assert read(tmp_path / "models", num_loops=5).generation_config.num_loops is None
    changed = read(tmp_path / "models" / "one", num_loops=4, eos_token_id=7, pad_token_id=3).generation_config
    assert (changed.num_loops, changed.eos_token_id, changed.pad_token_id) == (4, 7, 3)
    assert read(tmp_path / "models" / "one", eos_token_id=None).generation_config.eos_token_id is None


def test_generation_config_is_saved_and_read(tmp_path):
    model = tiny_model(eos_token_id=5)
    model.generation_config.update(num_loops=[1, 2], eos_penalty=0.5, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert (saved["num_loops"], saved["eos_penalty"], saved["eos_token_id"]) == ([1, 2], 0.5, 5)
    loaded = LoopMDMForMaskedLM.from_pretrained(tmp_path)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    for config_class in (GenerationConfig, LoopMDMGenerationConfig):
        given = config_class(max_new_tokens=2, do_sample=True, top_k=3)
        loaded = LoopMDMForMaskedLM.from_pretrained(tmp_path, generation_config=given).generation_config
        assert type(loaded) is LoopMDMGenerationConfig
        assert (loaded.max_new_tokens, loaded.do_sample, loaded.top_k, loaded.num_loops) == (2, True, 3, None)
    for content in ('{"num_loops": 0}', '{"nm_loops": 2}'):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(ValueError, match="`num_loops`"):
            LoopMDMForMaskedLM.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert LoopMDMForMaskedLM.from_pretrained(tmp_path).generation_config.eos_token_id == 5


def test_config_overrides_at_load(tmp_path):
    model, ids = tiny_model(), random_ids(2, 8)
    model.save_pretrained(tmp_path)
    model.config.loop_end = 2
    for model_class in (LoopMDMForMaskedLM, AutoModel):
        loaded = model_class.from_pretrained(tmp_path, num_loops=5, loop_end=2)
        assert (loaded.config.num_loops, loaded.config.loop_end) == (5, 2)
        assert torch.equal(loaded.generate(ids), model.generate(ids, num_loops=5))
        with pytest.raises(TypeError, match="nm_loops"):
            model_class.from_pretrained(tmp_path, nm_loops=5)


# Checkpoints that do not fit


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of the whole model and of the model without its head, tied and untied."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, tied in (("tied", True), ("untied", False)):
        model = tiny_model(tie_word_embeddings=tied)
        model.save_pretrained(root / name)
        model.model.save_pretrained(root / f"{name}-base")
    return root


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_base_and_whole_model_load_from_each_other(folders, name):
    tied, ids = name == "tied", random_ids(2, 8)
    model = tiny_model(tie_word_embeddings=tied)
    with torch.no_grad():
        states, logits = model.model(ids).last_hidden_state, model(ids).logits
        for folder in (name, f"{name}-base"):
            assert torch.equal(LoopMDMModel.from_pretrained(folders / folder)(ids).last_hidden_state, states)
        loaded, info = LoopMDMForMaskedLM.from_pretrained(folders / name, output_loading_info=True)
        assert torch.equal(loaded(ids).logits, logits) and not any(info.values())
        assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
        assert ("lm_head.weight" in load_file(folders / name / "model.safetensors")) == (not tied)
        if tied:
            assert torch.equal(LoopMDMForMaskedLM.from_pretrained(folders / "tied-base")(ids).logits, logits)
            return
    with pytest.raises(ValueError, match=r"1 differ: lm_head\.weight is missing"):
        LoopMDMForMaskedLM.from_pretrained(folders / "untied-base")
    copied = LoopMDMForMaskedLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(copied.lm_head.weight, model.lm_head.weight)


def damaged(folder: Path, out: Path, drop: str | None = None, **add: torch.Tensor) -> Path:
    """A copy of a checkpoint without one tensor and with others, `__` standing for a dot."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    tensors.pop(drop, None)
    tensors.update({name.replace("__", "."): tensor for name, tensor in add.items()})
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("model_class", [LoopMDMForMaskedLM, LoopMDMModel, AutoModel])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "model.layers.2.mlp.up_proj.weight"}, r"1 differ: .*layers\.2\.mlp\.up_proj\.weight is missing"),
        ({"drop": "model.embed_tokens.weight"}, r"embed_tokens\.weight is missing"),
        ({"model__layers__4__mlp__up_proj__weight": torch.ones(2)}, r"1 differ: model\.layers\.4\..* is unexpected"),
        ({"lm_head__bias": torch.ones(23)}, r"1 differ: lm_head\.bias is unexpected"),
        ({"drop": "model.norm.weight", "norm__bias": torch.ones(32)}, r"norm\.weight is missing, .*is unexpected"),
    ],
    ids=["layer", "embeddings", "surplus layer", "surplus bias", "both"],
)
def test_missing_and_surplus_tensors_raise(folders, tmp_path, model_class, change, message):
    folder = damaged(folders / "tied", tmp_path / "damaged", **change)
    for output_loading_info in (False, True):
        with pytest.raises(ValueError, match=f"{folder} are not those of a LoopMDM.*{message}"):
            model_class.from_pretrained(folder, output_loading_info=output_loading_info)


def test_a_deeper_config_than_the_checkpoint_raises_briefly(folders):
    with pytest.raises(ValueError, match="9 differ") as error:
        LoopMDMForMaskedLM.from_pretrained(folders / "tied", num_hidden_layers=5)
    assert str(error.value).count("is missing") == 5


def test_mismatched_shapes_raise_unless_ignored(folders, tmp_path):
    folder = damaged(folders / "tied", tmp_path / "damaged", model__norm__weight=torch.ones(5))
    for model_class in (LoopMDMForMaskedLM, LoopMDMModel):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            model_class.from_pretrained(folder)
    model, info = LoopMDMForMaskedLM.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert isinstance(model, LoopMDMForMaskedLM)
    assert [name for name, *_ in info["mismatched_keys"]] == ["model.norm.weight"]


def test_pickles_are_loaded_only_on_demand(folders, tmp_path):
    shutil.copytree(folders / "untied", folder := tmp_path / "pickle")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    for model_class in (LoopMDMForMaskedLM, LoopMDMModel, AutoModel):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            model_class.from_pretrained(folder)
    loaded = LoopMDMForMaskedLM.from_pretrained(folder, use_safetensors=False)
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])


def test_sharded_checkpoint(model, expected, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    check(LoopMDMForMaskedLM.from_pretrained(tmp_path), expected)
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        LoopMDMForMaskedLM.from_pretrained(tmp_path)
