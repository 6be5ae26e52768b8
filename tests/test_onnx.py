# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""ONNX graphs compute what the model does, for any number of rows and positions, and their runner writes the same."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from commands import refusal, run
from tiny import BIASES, SHALLOW, random_ids, scores, tiny_model

from loopmdm.convert import onnx_graphs
from loopmdm.convert.onnx_graphs import export_graphs

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
from loopmdm.convert.onnx_runner import OnnxModel

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# Between them all that tells one position from another, and every kind of layer
MODELS = {
    "block-causal-yarn": {
        "attention_block_size": 4,
        "rope_parameters": YARN,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
    },
    "learned-shifted-damped": {
        "position_embedding_type": "learned",
        "shift_logits": True,
        "use_gated_mlp": False,
        "norm_type": "layernorm",
        "loop_update": "damped",
        "lm_head_bias": True,
        **BIASES,
    },
}


class Unknown(torch.nn.Module):
    """A function that ONNX does not have."""

    def forward(self, states):
        return torch.special.i0e(states)


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """A model, and the folder of its graphs."""
    folder = tmp_path_factory.mktemp("onnx")
    model = tiny_model(**SHALLOW, **MODELS[request.param])
    model.generation_config.update(max_denoising_steps=6, eos_token_id=[3, 5, 7, 9])
    model.save_pretrained(folder / "model")
    said = run("export", folder / "model", folder / "graphs", "--format", "onnx")
    assert "three graphs of 0." in " ".join(said.split())
    return model, folder / "graphs"


def padded(num_rows: int, length: int):
    """Tokens, and a mask with padding at the left, at the right and in between."""
    ids = random_ids(num_rows, length)
    mask = torch.ones_like(ids)
    if length > 4:
        mask[0, :2] = mask[-1, -1] = mask[num_rows // 2, 2] = 0
    return ids, mask


@torch.no_grad()
def test_logits_are_those_of_the_model_at_any_shape(exported):
    model, folder = exported
    graphs = OnnxModel(folder)
    for shape in ((1, 1), (1, 9), (3, 33), (2, 64)):
        ids, mask = padded(*shape)
        for num_loops in (1, 3, 6):
            wanted = model(ids, attention_mask=mask, num_loops=num_loops).logits[mask != 0]
            found = torch.from_numpy(graphs.logits(ids, mask, num_loops))[mask != 0]
            torch.testing.assert_close(scores(found), scores(wanted), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_new_tokens": 9},
        {"max_new_tokens": 12, "block_length": 4, "max_denoising_steps": 2},
        {"max_denoising_steps": 7, "unmasking": "margin"},
        {"max_new_tokens": 9, "unmasking": "entropy", "num_loops": [1, 4, 2]},
        {"unmasking": "left_to_right", "suppress_tokens": [3, 4], "confidence_threshold": 0.5},
    ],
    ids=["saved", "new", "blocks", "margin", "entropy", "suppressed"],
)
def test_the_runner_writes_what_generate_writes(exported, settings):
    model, folder = exported
    ids, mask = padded(6, 20)
    wanted = model.generate(ids, attention_mask=mask, **{"max_new_tokens": 0} | settings).numpy()
    assert (OnnxModel(folder).generate(ids, mask, **settings) == wanted).all()


def test_end_tokens_within_a_text_are_no_padding(exported):
    """`pad_token_id` is an end token, so only the ends of rows can tell whether it is padding."""
    model, folder = exported
    ids, alike, settings = random_ids(2, 9), {"pad_token_id": 5, "eos_token_id": 5}, {"max_new_tokens": 3}
    ids[ids == 5] = 6
    ids[0, 4] = 5
    for given in (ids, torch.nn.functional.pad(ids, (1, 0), value=5)):  # within a text, and as all rows' first token
        wanted = model.generate(given, **alike, **settings).numpy()
        assert (OnnxModel(folder).generate(given.numpy(), **alike, **settings) == wanted).all()
    ids[1, 0] = 5
    with pytest.raises(ValueError, match="Token 5 may be padding or text here; give the `attention_mask`"):
        OnnxModel(folder).generate(ids.numpy(), **alike, **settings)


def test_the_runner_refuses_what_it_does_not_do(exported):
    folder = exported[1]
    about = json.loads((folder / "model.json").read_text())
    about["generation"]["remask_probability"] = 0.2
    graphs, ids = OnnxModel(folder, about), random_ids(2, 8)
    with pytest.raises(ValueError, match=r"`remask_probability` \(0.2\) is saved with the model"):
        graphs.generate(ids)
    graphs.generate(ids, remask_probability=None)
    for settings, said in (
        ({"top_k": 5}, r"`top_k` \(5\) was given"),
        ({"unmasking": "random"}, "`unmasking` is 'random'; choose one of confidence"),
        ({"max_new_tokens": 60}, "60 tokens are new; .* at most 64"),
        ({"num_loops": 0}, "`num_loops` is 0"),
        ({"max_new_tokens": -1}, "`max_new_tokens` is -1; it must be at least 0"),
        ({"block_length": 0}, "`block_length` is 0; it must be at least 1"),
        ({"max_denoising_steps": 0}, "`max_denoising_steps` is 0; it must be at least 1"),
        ({"num_loops": [3, 1], "max_denoising_steps": 1}, "`num_loops` lists 2 steps of 1"),
        ({"confidence_threshold": 95}, "`confidence_threshold` is 95; it must be above 0, and at most 1"),
        ({"suppress_tokens": [23]}, "`suppress_tokens` holds 23, .* vocabulary of 23"),
        ({"suppress_tokens": [-1]}, "`suppress_tokens` holds -1"),
    ):
        with pytest.raises(ValueError, match=said):
            graphs.generate(ids, **{"remask_probability": None} | settings)
    causal = OnnxModel(folder, {**about, "attention_block_size": 4})
    with pytest.raises(ValueError, match="`block_length` is 6; this model's attention takes multiples of 4"):
        causal.generate(ids, remask_probability=None, block_length=6)
    with pytest.raises(ValueError, match="nothing to generate"):
        graphs.generate([[1, 2]], remask_probability=None)
    with pytest.raises(ValueError, match="vocabulary of 23"):
        graphs.generate([[22, 23]], remask_probability=None)


def test_the_folder_runs_with_numpy_and_onnxruntime_alone(exported):
    model, folder = exported
    names = {"model.json", "onnx_runner.py", "prelude.onnx", "loop.onnx", "readout.onnx"}
    assert {path.name for path in folder.iterdir()} == names
    code = (
        "import sys, onnx_runner; print(onnx_runner.OnnxModel('.').generate([[22, 4, 22, 6]]).tolist());"
        "assert not {'torch', 'transformers', 'loopmdm'} & set(sys.modules)"
    )
    place = importlib.util.find_spec("onnxruntime").submodule_search_locations[0]
    environment = {"PYTHONPATH": f"{folder}:{place.removesuffix('/onnxruntime')}"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout
    wanted = model.generate(torch.tensor([[22, 4, 22, 6]]), max_new_tokens=0)
    assert json.loads(found) == wanted.tolist()


def test_int8_weights_are_smaller_and_answer_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graphs, "EXTERNAL", 10_000)  # some weights become files of their own
    model = tiny_model(hidden_size=64, intermediate_size=128, shift_logits=True, loop_update="damped")
    (tmp_path / "full").mkdir()
    (tmp_path / "small").mkdir()
    full = export_graphs(model, tmp_path / "full", length=16)
    small = export_graphs(model, tmp_path / "small", "int8", length=16)
    assert (full["weights"], small["weights"]) == ("float32", "int8")
    assert (tmp_path / "full" / "loop.onnx.data").is_file()
    assert sum(small["bytes"].values()) < 0.5 * sum(full["bytes"].values())
    assert sum(full["bytes"].values()) == sum(path.stat().st_size for path in (tmp_path / "full").iterdir())
    assert full["largest_difference"] < 1e-4 < small["largest_difference"] < 0.2
    assert not any(b".py" in path.read_bytes() for path in tmp_path.rglob("*.onnx"))  # nothing of this machine


def test_what_cannot_be_expressed_is_named(tmp_path, monkeypatch):
    scaled = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(ValueError, match=r"`rope_type` 'dynamic'.* other frequencies for every length"):
        export_graphs(tiny_model(rope_parameters=scaled), tmp_path)
    with pytest.raises(ValueError, match=r"`weights` \(`--dtype`\) is 'int4'; ONNX graphs take float32 or int8"):
        export_graphs(tiny_model(), tmp_path, "int4")
    model = tiny_model()
    model.model.layers[0].mlp.act_fn = Unknown()
    with pytest.raises(ValueError, match=r"The model's prelude cannot become an ONNX graph: .*i0e"):
        export_graphs(model, tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match=r"takes onnxscript; run `pip install 'loopmdm\[onnx\]'`"):
        export_graphs(tiny_model(), tmp_path)


def test_options_without_effect_are_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    command = "export", tmp_path / "model", tmp_path / "graphs", "--format", "onnx"
    for option in (("--num-loops", 3), ("--verify",), ("--max-shard-size", "1GB"), ("--trust-remote-code",)):
        assert f"{option[0]}" in refusal(*command, *option)
    assert "`--dtype`) is 'bfloat16'" in refusal(*command, "--dtype", "bfloat16")
    assert "exists already" in refusal(*command[:2], tmp_path / "model", *command[3:])
