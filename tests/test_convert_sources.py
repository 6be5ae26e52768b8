# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
Conversion of what users bring: checkpoints that are absent, damaged, incomplete, quantised or hostile, and the Hub.
Whatever is refused names the reason and leaves nothing behind.
"""

import builtins
import errno
import functools
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conversion import (
    FIXTURES,
    LLADA,
    OPTIONS,
    REMOVED,
    convert,
    edited,
    fixture_weights,
    load,
    logits_of,
    references,
    refuse,
    same_weights,
    stored,
    with_value,
)
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

import loopmdm.convert.source as source_module
from loopmdm.convert import convert_checkpoint, open_source


@pytest.fixture(scope="module")
def plain_llada(tmp_path_factory) -> Path:
    """The LLaDA fixture, converted without options."""
    folder = tmp_path_factory.mktemp("plain") / "llada"
    convert("llada", folder)
    return folder


# Files


def test_paths_that_do_not_exist(tmp_path, out):
    refuse(tmp_path / "no" / "model", out, str(tmp_path / "no" / "model"), "does not exist")
    refuse(tmp_path / "model.safetensors", out, "does not exist")


def test_folders_without_weights_or_config(tmp_path, src, out):
    src.mkdir()
    shutil.copy(FIXTURES / "llada" / "config.json", src)
    refuse(src, out, str(src), "holds no weights", "safetensors")
    refuse(src / "config.json", out, "config.json is not a file of weights", ".safetensors")
    refuse(
        FIXTURES / "llada" / "model-00001-of-00003.safetensors", out, "one file of several", str(FIXTURES / "llada")
    )
    whole = src / "model-00001-of-00001.safetensors"
    shutil.copy(FIXTURES / "a2d_qwen3" / "model.safetensors", whole)
    shutil.copy(FIXTURES / "a2d_qwen3" / "config.json", src)
    assert open_source(whole).tensors.keys() == open_source(FIXTURES / "a2d_qwen3").tensors.keys()
    shutil.copytree(FIXTURES / "llada", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    refuse(tmp_path / "bare", out, "cannot be recognised without a config.json", "put it into")


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"architectures": ['])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_json_that_is_none(src, out, name, text):
    edited("llada", src)
    (src / name).write_text(text)
    refuse(src, out, str(src / name))


def test_several_files_without_index(src, out):
    edited("llada", src)
    shutil.copy(src / "model.safetensors", src / "ema.safetensors")
    refuse(src, out, "several files of weights (ema.safetensors, model.safetensors)", "name one")
    assert convert_checkpoint(src / "ema.safetensors", out)["family"] == "llada"


def test_shards_that_do_not_fit_their_index(tmp_path, out):
    first, second = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    for name in ("absent", "lacking", "repeated"):
        shutil.copytree(FIXTURES / "llada", tmp_path / name)
    (tmp_path / "absent" / second).unlink()
    refuse(tmp_path / "absent", out, f"model.safetensors.index.json names {second}", "incomplete")
    weights = load_file(tmp_path / "lacking" / first)
    gone = weights.popitem()[0]
    save_file(weights, tmp_path / "lacking" / first)
    refuse(tmp_path / "lacking", out, f"{first} has {gone!r}, but it does not")
    shutil.copy(tmp_path / "repeated" / first, tmp_path / "repeated" / second)
    (tmp_path / "repeated" / "model.safetensors.index.json").unlink()
    refuse(tmp_path / "repeated", out, f"{second} holds", "again")


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_truncated_safetensors(src, out, share):
    """Cut in the header, and in the data; see test_hostile_models.py for all else that a header can be."""
    file = edited("llada", src) / "model.safetensors"
    os.truncate(file, int(share * file.stat().st_size))
    refuse(src, out, str(file), "is not a complete safetensors file")


def test_a_file_that_shrinks_while_it_is_read(src, out):
    file = edited("llada", src) / "model.safetensors"
    refuse(src, out, "cannot be read", on_plan=lambda plan: os.truncate(file, file.stat().st_size // 2))


# Tensors

ones = torch.ones


@pytest.mark.parametrize(
    ("name", "tensors", "parts"),
    [
        ("llada", {f"{LLADA}blocks.1.k_proj.weight": REMOVED}, ["lacks 1 tensors", "blocks.1.k_proj.weight"]),
        ("llada", {f"{LLADA}ff_out.weight": REMOVED}, ["lacks 1 tensors", f"{LLADA}ff_out.weight"]),
        ("llada", {f"{LLADA}blocks.3.ff_out.weight": REMOVED}, ["blocks.3."]),
        ("llada", {f"{LLADA}blocks.0.ff_norm.weight": REMOVED}, ["blocks.0.ff_norm.weight", "norms need weights"]),
        ("a2d_qwen3", {"model.embed_tokens.weight": REMOVED}, ["no tensor 'model.embed_tokens.weight'"]),
        ("a2d_qwen3", {"model.norm.weight": REMOVED}, ["model.norm.weight", "incomplete"]),
        ("a2d_qwen3", {"model.layers.0.self_attn.q_proj.weight": REMOVED}, ["layers.0.self_attn.q_proj.weight"]),
        ("dream", {"lm_head.weight": REMOVED}, ["lm_head.weight"]),
        ("dream", {"model.layers.2.self_attn.q_proj.bias": REMOVED}, ["layers.2.self_attn.q_proj.bias"]),
        ("mdlm_hf", {"backbone.sigma_map.mlp.2.bias": REMOVED}, ["lacks 1 tensors", "backbone.sigma_map.mlp.2.bias"]),
        ("diffugpt", {"denoise_model.wpe.weight": REMOVED}, ["denoise_model.wpe.weight"]),
        ("llada", {f"{LLADA}blocks.1.extra.weight": ones(3)}, ["has 1 tensors", "blocks.1.extra.weight", "adapter"]),
        ("dream", {"model.layers.1.mlp.up_proj.weight_scale": ones(80)}, ["weight_scale", "quantised"]),
        ("dream", {"model.layers.1.mlp.up_proj.bias": ones(80)}, ["model.layers.1.mlp.up_proj.bias"]),
        ("llada", {f"{LLADA}blocks.2.k_proj.weight": ones(47, 48)}, ["blocks.2.k_proj.weight", "(47, 48)"]),
        ("dream", {"model.norm.weight": ones(47)}, ["model.norm.weight", "(47,)", "(48,)"]),
        ("dream", {"model.layers.0.self_attn.q_proj.weight": ones(50, 48)}, ["`num_attention_heads` (4)"]),
        ("mdlm_hf", {"backbone.blocks.2.attn_qkv.weight": ones(100, 48)}, ["blocks.2.attn_qkv.weight", "(100, 48)"]),
        ("mdlm_hf", {"backbone.sigma_map.mlp.0.weight": ones(16, 255)}, ["backbone.sigma_map.mlp.0.weight"]),
        ("mdlm_hf", {"backbone.blocks.2.adaLN_modulation.weight": ones(300, 16)}, ["adaLN_modulation.weight"]),
        ("smdm", {"transformer.h.1.attn.attn.weight": ones(100, 48)}, ["transformer.h.1.attn.attn.weight"]),
        ("smdm", {"lm_head.weight": ones(120, 48)}, ["lm_head.weight", "(121, 48)"]),
        ("diffugpt", {"denoise_model.h.1.attn.c_attn.weight": ones(144, 48)}, ["h.1.attn.c_attn.weight"]),
    ],
)
def test_tensors_that_do_not_fit(src, out, name, tensors, parts):
    refuse(edited(name, src, tensors=tensors), out, *parts, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_absent_last_layers_are_noticed(src, out, name):
    """The config says how many layers there are; a shard without index may be what is missing."""
    last = {key: REMOVED for key in fixture_weights(name) if re.search(r"(blocks|layers|\.h)\.3\.", key)}
    refuse(edited(name, src, tensors=last), out, "4", "3", **OPTIONS.get(name, {}))


@pytest.mark.parametrize(
    ("name", "tensor", "value"),
    [
        ("llada", f"{LLADA}blocks.3.up_proj.weight", float("nan")),
        ("llada", f"{LLADA}wte.weight", float("-inf")),
        ("mdlm_hf", "backbone.blocks.1.adaLN_modulation.weight", float("inf")),
        ("mdlm_hf", "backbone.sigma_map.mlp.2.bias", float("nan")),
        ("smdm", "transformer.h.0.attn.attn.weight", float("inf")),
        ("diffugpt", "denoise_model.ln_f.bias", float("nan")),
    ],
)
def test_values_that_are_not_finite(src, out, name, tensor, value):
    edited(name, src, tensors={tensor: with_value(value)})
    refuse(src, out, tensor, "NaN or infinite", **OPTIONS.get(name, {}))


def test_values_that_float16_cannot_hold(src, out):
    name = f"{LLADA}blocks.0.q_proj.weight"
    edited("llada", src, tensors={name: with_value(1e6)})
    refuse(src, out, name, "float16 cannot hold", "--dtype float32", dtype="float16")
    convert_checkpoint(src, out, dtype="bfloat16")


@pytest.mark.parametrize(
    ("dtype", "file"),
    [
        *((getattr(torch, dtype), "model.safetensors") for dtype in ("int8", "uint8", "bool")),
        *((getattr(torch, dtype), "model.safetensors") for dtype in ("float8_e4m3fn", "float8_e5m2")),
        (torch.int8, "pytorch_model.bin"),
    ],
)
def test_quantised_tensors(src, out, dtype, file):
    name = f"{LLADA}blocks.0.q_proj.weight"
    edited("llada", src, tensors={name: lambda tensor: tensor.to(dtype)}, file=file)
    refuse(src, out, repr(name), "quantised", "Convert the original checkpoint", allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "head", "embedding", "setting"),
    [
        ("a2d_qwen3", "lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings"),
        ("llada_gqa_tied", f"{LLADA}ff_out.weight", f"{LLADA}wte.weight", "weight_tying"),
    ],
)
def test_a_stored_head_must_equal_the_embedding_that_it_is_tied_to(tmp_path, out, name, head, embedding, setting):
    weight, options = fixture_weights(name)[embedding], OPTIONS.get(name, {})
    different = edited(name, tmp_path / "different", tensors={head: with_value(3.0)(weight)})
    refuse(different, out, repr(head), repr(embedding), setting, **options)
    refuse(edited(name, tmp_path / "shorter", tensors={head: weight[:-1]}), out, repr(head), **options)
    record = convert_checkpoint(edited(name, tmp_path / "equal", tensors={head: weight}), out, **options)
    assert record["copies"] == {head: embedding}
    convert(name, out.with_name("plain"))
    assert same_weights(out, out.with_name("plain"))
    assert "lm_head.weight" not in stored(out)


def test_a_head_of_its_own_where_the_config_does_not_tie(src, out):
    head = with_value(3.0)(fixture_weights("a2d_qwen3")["model.embed_tokens.weight"])
    edited("a2d_qwen3", src, config={"tie_word_embeddings": False}, tensors={"lm_head.weight": head})
    convert_checkpoint(src, out, mask_token_id=125)
    assert torch.equal(load(out).lm_head.weight, head)


# Pickles


def test_pickles_are_read_on_request_alone(tmp_path, out, plain_llada):
    for file in ("pytorch_model.bin", "weights.pt", "weights.pth", "last.ckpt"):
        folder = edited("llada", tmp_path / file, file=file)
        for source in (folder, folder / file):
            refuse(source, out, f"{file} is a pickle", "--allow-pickle")
    convert_checkpoint(tmp_path / "pytorch_model.bin", out, allow_pickle=True)
    assert same_weights(out, plain_llada)


def test_sharded_pickles(src, out, plain_llada):
    edited("llada", src).joinpath("model.safetensors").unlink()
    weights = fixture_weights("llada")
    names = sorted(weights)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, members in parts.items():
        torch.save({name: weights[name] for name in members}, src / file)
    index = {"weight_map": {name: file for file, members in parts.items() for name in members}}
    (src / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refuse(src, out, "pytorch_model-00001-of-00002.bin is a pickle")
    convert_checkpoint(src, out, allow_pickle=True)
    assert same_weights(out, plain_llada)


def test_safetensors_come_before_pickles(src, out):
    edited("llada", src)
    (src / "pytorch_model.bin").write_bytes(b"never looked at")
    for allow_pickle in (False, True):
        convert_checkpoint(src, out, allow_pickle=allow_pickle)
        shutil.rmtree(out)


class Payload:
    """Pickles as a call of `function`, which may be another payload."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):
        raise NotImplementedError  # pickle wants a callable


# Where pickles are trusted each makes the file that it is given. torch's unpickler refuses those that call something
# of a blocked module, or something that they made. The others become inert.
PAYLOADS = {
    "eval": lambda marker: Payload(builtins.eval, f"open({str(marker)!r}, 'w')"),
    "subprocess": lambda marker: Payload(subprocess.run, ["touch", str(marker)]),
    "os.system": lambda marker: Payload(os.system, f"touch {marker}"),
    "partial": lambda marker: Payload(Payload(functools.partial, subprocess.run, ["touch", str(marker)])),
}
REFUSED = ("os.system", "partial")


@pytest.mark.parametrize("place", ["value", "tuple", "state_dict", "hyper_parameters"])
@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.filterwarnings("ignore:.*TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
def test_what_a_pickle_would_run_is_not_run(tmp_path, out, name, place):
    marker, file, weights = tmp_path / "executed", tmp_path / "model.ckpt", fixture_weights("llada")
    evil = PAYLOADS[name](marker)
    content = {
        "value": {"a": evil, **weights, "b": [evil, {"c": evil}]},
        "tuple": {"a": {"b": (evil,)}, **weights},
        "state_dict": {"state_dict": {**weights, "a": evil}},
        "hyper_parameters": {"hyper_parameters": {"config": evil}, "state_dict": weights, "callbacks": {"x": [evil]}},
    }[place]
    torch.save(content, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        torch.load(file, weights_only=False)
    assert marker.exists()
    marker.unlink()
    if name in REFUSED:
        message = refuse(file, out, "model.ckpt cannot be read as pickled weights", allow_pickle=True)
        assert "\n" not in message and "weights_only" not in message  # torch advises to trust the file
    else:
        source = open_source(file, allow_pickle=True)
        assert source.tensors.keys() == weights.keys()
        assert all(torch.equal(source.read(key), weights[key]) for key in weights)
    assert not marker.exists()


class Scripted(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_pickles_of_other_formats(tmp_path, out, monkeypatch):
    file = tmp_path / "model.bin"
    torch.save(fixture_weights("llada"), file, _use_new_zipfile_serialization=False)
    refuse(file, out, str(file), "zip format", "download it again", allow_pickle=True)
    for content, part in (([torch.ones(2)], "list"), ({"a": 1}, "no tensors"), ({}, "no tensors")):
        torch.save(content, file)
        refuse(file, out, str(file), part, allow_pickle=True)
    file.write_bytes(b"")
    refuse(file, out, str(file), "zip format", allow_pickle=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    refuse(file, out, str(file), "cannot be read", allow_pickle=True)
    torch.jit.script(Scripted()).save(file)
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("loaded"))
    refuse(file, out, str(file), "cannot be read", allow_pickle=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"storage", b"stor-ge"),
        # What sets an attribute of a function that torch's own files name
        lambda data: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x07\x00\x00\x00changedK\x01sb" + data[2:],
    ],
)
def test_damaged_pickles(tmp_path, out, change):
    file, bad = tmp_path / "model.bin", tmp_path / "bad.bin"
    torch.save(fixture_weights("llada"), file)
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(bad, "w") as copy:
        for entry in archive.infolist():
            data = archive.read(entry)
            copy.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    refuse(bad, out, "bad.bin cannot be read as pickled weights: ", allow_pickle=True)
    assert not hasattr(torch._utils._rebuild_tensor_v2, "changed")
    os.truncate(file, file.stat().st_size // 2)
    refuse(file, out, str(file), allow_pickle=True)


# Training checkpoints of MDLM's repository


HYPER_PARAMETERS = {"model": {"n_heads": 4, "length": 64}, "time_conditioning": False}


@pytest.fixture(scope="module")
def training_checkpoint() -> dict:
    """The fixture's content, with hyper-parameters as plain dicts."""
    source = open_source(FIXTURES / "mdlm_ckpt" / "model.ckpt", allow_pickle=True)
    return {
        "state_dict": {name: source.read(name).clone() for name in source.tensors},
        "ema": {"shadow_params": [tensor.clone() for tensor in source.extras["ema"]["shadow_params"]]},
        "hyper_parameters": {"config": HYPER_PARAMETERS},
    }


def test_averaged_weights_are_used(tmp_path, out, training_checkpoint):
    ids, logits = references("mdlm_ckpt")["input_ids"], references("mdlm_ckpt")["logits_f32"]
    convert_checkpoint(FIXTURES / "mdlm_ckpt" / "model.ckpt", out, allow_pickle=True)
    torch.save(training_checkpoint, tmp_path / "plain.ckpt")
    convert_checkpoint(tmp_path / "plain.ckpt", out.with_name("plain"), allow_pickle=True)
    assert same_weights(out, out.with_name("plain"))
    torch.save(training_checkpoint | {"ema": None}, tmp_path / "raw.ckpt")
    convert_checkpoint(tmp_path / "raw.ckpt", out.with_name("raw"), allow_pickle=True)
    raw = logits_of(load(out.with_name("raw")), ids)
    assert (raw - logits)[..., :-1].abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda shadow: shadow[:-1], ["39 averaged (EMA) weights", "40 parameters"]),
        (lambda shadow: [shadow[1], shadow[0], *shadow[2:]], ["averaged (EMA) weights", "do not fit"]),
        (lambda shadow: [shadow[0][:-1], *shadow[1:]], ["do not fit"]),
    ],
)
def test_averaged_weights_that_do_not_fit(tmp_path, out, training_checkpoint, change, parts):
    shadow = change(training_checkpoint["ema"]["shadow_params"])
    torch.save(training_checkpoint | {"ema": {"shadow_params": shadow}}, tmp_path / "last.ckpt")
    refuse(tmp_path / "last.ckpt", out, *parts, allow_pickle=True)


def test_hyper_parameters_are_heeded(tmp_path, out, training_checkpoint):
    file = tmp_path / "last.ckpt"

    def save(hyper_parameters):
        torch.save(training_checkpoint | {"hyper_parameters": hyper_parameters}, file)

    save({"config": HYPER_PARAMETERS | {"time_conditioning": True}})
    refuse(file, out, "time_conditioning", "--sigma", allow_pickle=True)
    convert_checkpoint(file, out, allow_pickle=True, sigma=0.4)
    shutil.rmtree(out)
    for gone in ("n_heads", "length"):
        model = {key: value for key, value in HYPER_PARAMETERS["model"].items() if key != gone}
        save({"config": HYPER_PARAMETERS | {"model": model}})
        refuse(file, out, gone, allow_pickle=True)
    save({"config": {"model": HYPER_PARAMETERS["model"]}})
    refuse(file, out, "time_conditioning", allow_pickle=True)
    for hyper_parameters in ({}, {"config": None}, {"config": {"time_conditioning": False}}):
        save(hyper_parameters)
        refuse(file, out, "hyper-parameters", "put a config.json", "`n_heads`", allow_pickle=True)
    # A config.json beside the file does as well.
    settings = {"n_heads": 4, "model_length": 64, "time_conditioning": False}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    convert_checkpoint(file, out, allow_pickle=True)
    convert("mdlm_ckpt", out.with_name("other"))
    assert same_weights(out, out.with_name("other"))


# SMDM's bare files


def test_smdm_files_are_known_by_their_names(tmp_path, out):
    original = FIXTURES / "smdm" / "mdm-TINY-1e18.safetensors"
    for name, parts in (
        ("mdm-TINY-1e18", ("does not name a known size", "`n_head`")),
        ("mdm-7M-1e18", ("does not name a known size", "mdm-7M-1e18.safetensors")),
        ("ar-6M-1e18", ("ar-6M-1e18.safetensors", "autoregressive")),
    ):
        shutil.copy(original, tmp_path / f"{name}.safetensors")
        refuse(tmp_path / f"{name}.safetensors", out, *parts)
    # A known size has its number of heads from the table, and without config.json a length of 2048.
    shutil.copy(original, tmp_path / "mdm-6M-1e18.safetensors")
    convert_checkpoint(tmp_path / "mdm-6M-1e18.safetensors", out)
    model = load(out)
    assert (model.config.num_attention_heads, model.config.max_position_embeddings) == (4, 2048)
    logits = logits_of(model, references("smdm")["input_ids"])[..., :128]
    torch.testing.assert_close(logits, references("smdm")["logits_f32"], atol=2e-5, rtol=0)
    # The config beside a file is used.
    assert convert_checkpoint(original, out.with_name("beside"))["family"] == "smdm"
    assert load(out.with_name("beside")).config.max_position_embeddings == 64


# The Hub


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: returns or raises `answer`, and remembers how it was asked."""
    state = SimpleNamespace(answer=FIXTURES / "llada", asked=None)

    def snapshot_download(repo_id, **kwargs):
        state.asked = repo_id, kwargs
        if isinstance(state.answer, Exception):
            raise state.answer
        return str(state.answer)

    monkeypatch.setattr(source_module, "snapshot_download", snapshot_download)
    return state


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_what_is_fetched_from_the_hub(out, hub, allow_pickle):
    record = convert_checkpoint("GSAI-ML/LLaDA-8B-Base", out, revision="v1", allow_pickle=allow_pickle)
    assert record["source"] == "GSAI-ML/LLaDA-8B-Base"
    repo_id, options = hub.asked
    assert repo_id == "GSAI-ML/LLaDA-8B-Base"
    assert options.pop("revision") == "v1"

    def fetched(name):
        return any(filter_repo_objects([name], **options))

    needed = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    needed += ["chat_template.jinja", "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json"]
    needed += ["README.md", "LICENSE", "NOTICE.txt"]
    assert all(fetched(name) for name in needed)
    assert not any(fetched(name) for name in ("modeling_llada.py", "configuration_llada.py", "x.onnx"))
    # An adapter is known, and refused, by its settings.
    weights = "adapter_model.safetensors", "adapter_model.bin"
    assert fetched("adapter_config.json") and not any(map(fetched, weights))
    assert [fetched(name) for name in ("pytorch_model.bin", "last.ckpt", "x.pt", "x.pth")] == [allow_pickle] * 4


def test_a_folder_comes_before_the_hub(tmp_path, out, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    edited("llada", tmp_path / "owner" / "name")
    convert_checkpoint("owner/name", out)
    assert hub.asked is None


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (HfHubHTTPError("503 Server Error\n\nsecond line", response=RESPONSE), "503 Server Error"),
        (RepositoryNotFoundError("404.\n\nRepository Not Found for url: https://...", response=RESPONSE), "Not Found"),
        (LocalEntryNotFoundError("Cannot find a snapshot.\nCheck your connection."), "Cannot find a snapshot."),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (HfHubHTTPError.__bases__[0]("timed out"), "timed out"),  # of whichever library the Hub's client uses
        (OSError(), "OSError"),
    ],
)
def test_errors_of_the_hub_are_one_line(out, hub, error, part):
    hub.answer = error
    assert "\n" not in refuse("owner/name", out, "owner/name is not a folder here", part)
