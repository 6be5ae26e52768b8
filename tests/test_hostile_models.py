# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Models in folders that are damaged, or made to harm: `from_pretrained` raises, and reads nothing it must not."""

import json
import pickle
import re
import shutil
import struct

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tiny import random_ids, tiny_config, tiny_model
from transformers import AutoModel

from loopmdm import LoopMDMForMaskedLM, LoopMDMGenerationConfig
from loopmdm.weight_files import read_header, read_index

CLASSES = [LoopMDMForMaskedLM, AutoModel]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "model"
    tiny_model().save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(plain, tmp_path):
    return shutil.copytree(plain, tmp_path / "model")


@pytest.fixture
def shards(plain_shards, tmp_path):
    return shutil.copytree(plain_shards, tmp_path / "sharded")


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(folder, message, error=ValueError, **kwargs):
    for model_class in CLASSES:
        with pytest.raises(error, match=message):
            model_class.from_pretrained(folder, **kwargs)


# Configurations


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(({"rms_norm_eps": value}, "`rms_norm_eps`") for value in (float("nan"), float("inf"), -1e-6, 0.0)),
        *(({"initializer_range": value}, "`initializer_range`") for value in (float("nan"), -0.1)),
        *(
            ({"rope_parameters": {"rope_type": "default", "rope_theta": value}}, "`rope_parameters`")
            for value in (0.0, -1e4, float("nan"), float("inf"), "many", "1e4", None)
        ),
        *(
            ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, **factor}}, "`rope_parameters`")
            for factor in ({"factor": 0.0}, {"factor": float("nan")}, {"factor": -2.0}, {})
        ),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "`rope_parameters`"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}}, "`rope_parameters`"),
        ({"rope_parameters": {"rope_type": ["x"], "rope_theta": 1e4}}, "`rope_type`"),
        ({"eos_token_id": 23}, "`eos_token_id` is 23, outside the vocabulary"),
        ({"eos_token_id": [1, -1]}, "`eos_token_id` is -1, outside the vocabulary"),
        ({"pad_token_id": 99}, "`pad_token_id` is 99"),
        ({"bos_token_id": 23}, "`bos_token_id` is 23"),
        ({"attention_dropout": 2.0}, "there is no dropout"),
        ({"num_loops": 10**30}, "`num_loops` is 10"),
        ({"max_train_loops": 10**9}, "`max_train_loops` is 10"),
        ({"num_hidden_layers": 10**7}, "`num_hidden_layers` is 10"),
        ({"hidden_size": 10**30}, "`hidden_size` is 10"),
        ({"n_loops": 4}, "did you mean `num_loops`"),
        ({"max_train_loop": 4}, "did you mean `max_train_loops`"),
        ({"dtype": "float99"}, "`dtype` is 'float99'"),
        ({"dtype": "int8"}, "`dtype` is 'int8'"),
        ({"transformers_weights": "adapter_model.bin"}, "model.safetensors"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(folder, values, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_config(**values)
    change(folder / "config.json", **values)
    for model_class in CLASSES:
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            model_class.from_pretrained(folder)


def test_a_number_of_loops_that_never_ends_is_refused_by_each_call():
    model, ids = tiny_model(), random_ids(1, 4)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="`num_loops` is 1000000000000"):
            call(ids, num_loops=10**12)


def test_fields_of_other_libraries_are_kept():
    config = tiny_config(sep_token_id=3, task_specific="x", torch_dtype="bfloat16", use_cache=True)
    assert (config.task_specific, config.dtype) == ("x", torch.bfloat16)


@pytest.mark.parametrize(
    "text", ["null", "[1]", "{", '{"a":' * 100_000, "\xff"], ids=["null", "list", "cut", "deep", "latin"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_damaged(folder, name, text):
    (folder / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=name):
        LoopMDMForMaskedLM.from_pretrained(folder)
    if name == "generation_config.json":
        with pytest.raises(ValueError, match=name):
            LoopMDMGenerationConfig.from_pretrained(folder)


def test_a_folder_without_generation_config_is_as_good_as_ever(folder):
    (folder / "generation_config.json").unlink()
    assert LoopMDMForMaskedLM.from_pretrained(folder).generation_config.pad_token_id == 0
    (folder / "generation_config.json").mkdir()
    assert LoopMDMForMaskedLM.from_pretrained(folder).generation_config.pad_token_id == 0


# Indexes


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/x.safetensors", "a/../../outside.safetensors", "..\\x.safetensors"]
)
def test_an_index_leads_nowhere_else(shards, name):
    """Not even where the other file is what it should be."""
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    first = index["weight_map"]["model.embed_tokens.weight"]
    shutil.copy(shards / first, shards.parent / "outside.safetensors")
    index["weight_map"] = {key: name if file == first else file for key, file in index["weight_map"].items()}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(shards, "leads out of its folder")


class Trap:
    def __reduce__(self):
        return pytest.fail, ("A pickle was read.",)


@pytest.mark.parametrize("dtype", ["auto", None])
def test_an_index_that_names_a_pickle(shards, dtype):
    tensors = {key: value for file in shards.glob("*.safetensors") for key, value in load_file(file).items()}
    torch.save(tensors, shards / "w.bin")
    change(shards / "model.safetensors.index.json", weight_map=dict.fromkeys(tensors, "w.bin"))
    change(shards / "config.json", dtype=None)
    refused(shards, r"w\.bin', which is not a \.safetensors file", dtype=dtype)
    with open(shards / "w.safetensors", "wb") as file:  # a pickle by another name
        pickle.dump(Trap(), file)
    change(shards / "model.safetensors.index.json", weight_map=dict.fromkeys(tensors, "w.safetensors"))
    refused(shards, "not a complete safetensors file")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        *(({"weight_map": names}, "has no `weight_map`") for names in ([], {}, "x", None, {"a": 1}, {"a": ["x"]})),
        ({}, "has no `weight_map`"),
        ({"weight_map": {"a": "x.safetensors"}}, "has no `metadata`"),
        ([1], "holds a list"),
        (None, "holds a NoneType"),
    ],
    ids=str,
)
def test_indexes_that_are_none(shards, index, message):
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(shards, f"model.safetensors.index.json {message}")


# Files of weights


@pytest.mark.parametrize("size", [0, 7, 8, 100, 0.5, -1, 1])
def test_truncated_and_overlong_files(folder, size):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data + b"\0" if size == 1 else data[: int(size * len(data)) if isinstance(size, float) else size])
    refused(folder, f"{re.escape(str(file))} is not a complete safetensors file")


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2, 10**30]},
        {"shape": [-1, 32]},
        {"shape": "big"},
        {"shape": [[1]]},
        {"dtype": "F64"},
        {"dtype": ["F32"]},
        {"data_offsets": [0, 10**30]},
        {"data_offsets": [-4, 0]},
        {"data_offsets": [4]},
        {"data_offsets": None},
    ],
    ids=str,
)
def test_headers_that_lie(folder, entry):
    file = folder / "model.safetensors"
    header, rest = header_of(file.read_bytes())
    header["model.norm.weight"] |= entry
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    refused(folder, "is not a complete safetensors file")


@pytest.mark.parametrize("header", [b"null", b"[]", b'{"a":1}', b"[" * 100_000, b'{"\xff":1}'])
def test_headers_that_are_none(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(folder, "is not a complete safetensors file")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn, torch.int64])
def test_numbers_that_mean_nothing_as_they_are(folder, dtype):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "`quantization_config`")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_honest_files_load(folder, shards, dtype):
    model = tiny_model().to(dtype)
    model.save_pretrained(folder)
    names = read_header(folder / "model.safetensors")
    assert {shape for _, shape in names.values()} == {tuple(value.shape) for value in model.state_dict().values()}
    assert torch.equal(LoopMDMForMaskedLM.from_pretrained(folder, dtype="auto").lm_head.weight, model.lm_head.weight)
    assert set(read_index(shards / "model.safetensors.index.json")) == set(names)
    LoopMDMForMaskedLM.from_pretrained(shards)


# Tokens that are never produced


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True}, {"unmasking": "ancestral"}, {"guidance_scale": 2.0}], ids=str
)
def test_suppressed_tokens_are_never_produced(options):
    model, ids = tiny_model(), random_ids(3, 6)
    generators = [torch.Generator().manual_seed(row) for row in range(3)]
    allowed = {3, 5, 8}
    made = model.generate(
        ids,
        max_new_tokens=12,
        suppress_tokens=[i for i in range(22) if i not in allowed],
        generator=generators,
        **options,
    )
    assert set(made[:, 6:].flatten().tolist()) <= allowed
    assert set(made[:, :6][ids == 22].tolist()) <= allowed


def test_suppressed_tokens_are_checked():
    for tokens, message in (([-1], "at least 0"), ([23], "outside the vocabulary"), (["a"], "type int"), (3, "list")):
        with pytest.raises(ValueError, match=message):
            tiny_model().generate(random_ids(1, 4), max_new_tokens=2, suppress_tokens=tokens)
    with pytest.raises(ValueError, match="finite"):  # nothing is left
        tiny_model().generate(random_ids(1, 4), max_new_tokens=2, suppress_tokens=list(range(22)))
