# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""A model as three ONNX graphs, the parts of its loop: `prelude` (embeddings and head), `loop` (mid once), and
`readout` (tail, norm and output head). Whoever runs them decides how often mid is applied.
"""

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import write_json
from ..generation_utils import LoopMDMGenerationConfig
from ..loop_context import LoopContext, take_positions
from ..modeling_loopmdm import LoopMDMForMaskedLM
from .write import check_output, new_folder

GRAPHS = ("prelude", "loop", "readout")
WEIGHTS = ("float32", "int8")
EXTERNAL = 10**9  # bytes of a graph's weights, above which they are a file of their own; protobuf ends at 2 GB
# How `generate` reports, which graphs know nothing of, and a cache that changes no token
REPORTS = ("return_dict_in_generate", "output_scores", "output_trace", "use_cache", "bos_token_id")


class Part(nn.Module):
    """One of the `GRAPHS`. Without a `context`, which is constant, it computes one from the attention mask."""

    def __init__(self, name: str, model: LoopMDMForMaskedLM, context: LoopContext | None = None):
        super().__init__()
        self.name, self.model, self.context = name, model, context

    def forward(self, value: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        Tokens `(batch_size, length)` or states `(batch_size, length, hidden_size)` to states, or to logits
        `(batch_size, length, vocab_size)`.
        """
        base = self.model.model
        if self.name == "prelude":
            return base.prelude(value, attention_mask)[0]
        context = self.context
        if context is None:
            # The head that runs here as well reaches no output, so that the exporter leaves it out.
            _, context = base.prelude(inputs_embeds=value, attention_mask=attention_mask)
        if self.name == "loop":  # mid(h); of damped models the caller goes a part of the way there
            return base.loop(value, context)
        return self.model.logits(self._align(base.readout(value, context), attention_mask))

    def _align(self, states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The model's own `align`, without `cummax`, which ONNX lacks."""
        if not self.model.config.shift_logits:
            return states
        columns = torch.arange(states.shape[1])
        before = columns < columns[:, None]
        if attention_mask is not None:
            before = before & (attention_mask[:, None] != 0)
        last = torch.where(before, columns, -1).amax(-1)
        return take_positions(states, torch.where(last < 0, columns, last).expand(states.shape[:2]))


def _check_possible(weights: str) -> None:
    """Raises a ValueError for other kinds of weights, and where a library is missing."""
    if weights not in WEIGHTS:
        raise ValueError(f"`weights` (`--dtype`) is {weights!r}; ONNX graphs take {' or '.join(WEIGHTS)}.")
    for library in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(library)
        except ImportError:
            raise ValueError(
                f"Exporting a model to ONNX takes {library}; run `pip install 'loopmdm[onnx]'`."
            ) from None


def _check_exportable(model: LoopMDMForMaskedLM, is_dynamic: bool) -> None:
    """Raises a ValueError that names what about the model cannot be expressed."""
    config, wrong = model.config, None
    rope_type = (config.rope_parameters or {}).get("rope_type")
    if is_dynamic and rope_type in ("dynamic", "longrope"):
        wrong = f"its rotary embedding (`rope_type` {rope_type!r}) has other frequencies for every length"
    elif getattr(config, "quantization_config", None) is not None:
        wrong = "its weights are quantised (`quantization_config`); export the model that it was made of"
    if wrong is not None:
        raise ValueError(f"The model cannot become ONNX graphs: {wrong}.")


@torch.no_grad()
def export_graphs(
    model: LoopMDMForMaskedLM, folder: Path, weights: str = "float32", length: int | None = None
) -> dict[str, Any]:
    """
    Writes `prelude.onnx`, `loop.onnx` and `readout.onnx`, and compares them with the model.

    Args:
        model ([`LoopMDMForMaskedLM`]): In float32 and eval mode, on the CPU.
        folder (`Path`): An existing folder.
        weights (`str`, defaults to `"float32"`): Or `"int8"`: matrices with a scale for each column.
        length (`int`, *optional*):
            Graphs of one row of so many positions without padding, which take no attention mask, and in which
            everything about positions is constant. By default they take any number of rows and positions.

    Returns:
        `dict`: The kind of weights, the bytes of each graph, and the largest difference of a probability.

    Raises:
        ValueError: A library is missing, the model cannot be expressed, or float32 graphs do not compute what it does.
    """
    _check_possible(weights)
    _check_exportable(model, length is None)
    shape = (1, length) if length is not None else (2, min(8, model.config.max_position_embeddings))
    ids = torch.full(shape, model.config.mask_token_id)
    states, context = model.model.prelude(ids)
    context = None if length is None else context
    sizes = {}
    for name in GRAPHS:
        graphs = _to_onnx(Part(name, model, context), ids if name == "prelude" else states, length is None)
        if weights == "int8":
            _round_weights(graphs.graph)
        sizes[name] = _save(graphs, folder / f"{name}.onnx")
    difference = _largest_difference(model, folder, length)
    if weights == "float32" and not difference < 1e-3:
        raise ValueError(f"The exported graphs differ from the model: probabilities by up to {difference:.2g}.")
    return {"weights": weights, "bytes": sizes, "largest_difference": difference}


def _to_onnx(part: Part, value: torch.Tensor, is_dynamic: bool) -> Any:
    """A part in onnxscript's representation, weights included."""
    arguments: tuple = (value,)
    names, shapes = ["input"], None
    if is_dynamic:
        mask = torch.ones(value.shape[:2], dtype=torch.long)
        mask[0, 0] = 0
        dimensions = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("length")}
        arguments, names, shapes = (value, mask), ["input", "attention_mask"], (dimensions, dimensions)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    options = {"input_names": names, "output_names": ["output"], "dynamic_shapes": shapes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = torch.onnx.export(part.eval(), arguments, dynamo=True, verbose=False, **options).model
        except torch.onnx.errors.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            raise ValueError(f"The model's {part.name} cannot become an ONNX graph: {reason}") from error
    for entry in model.graph.inputs if is_dynamic else ():
        if any(isinstance(size, int) for size in entry.shape[:2]):
            raise ValueError(f"The model's {part.name} depends on the shape {tuple(entry.shape)} of its input.")
    # Where in this machine's files everything comes from
    values = [value for node in model.graph for value in node.outputs]
    for entry in (model, model.graph, *model.graph, *values, *model.graph.initializers.values()):
        entry.metadata_props.clear()
    return model


def _round_weights(graph: Any) -> None:
    """Stores matrices as int8 with a scale for each column, and turns them back into float32 in the graph."""
    import numpy as np
    import onnx_ir as ir

    first = graph[0]
    for name, value in list(graph.initializers.items()):
        array = value.const_value.numpy()
        if array.dtype != np.float32 or array.ndim != 2:
            continue
        scale = np.maximum(np.abs(array).max(0), 1e-12) / np.float32(127)
        parts = {f"{name}_int8": np.round(array / scale).astype(np.int8), f"{name}_scale": scale.astype(np.float32)}
        stored = [ir.val(part, const_value=ir.tensor(numbers, name=part)) for part, numbers in parts.items()]
        for part in stored:
            graph.register_initializer(part)
        node = ir.node("DequantizeLinear", stored, attributes={"axis": 1})
        node.outputs[0].shape, node.outputs[0].dtype = value.shape, value.dtype
        graph.insert_before(first, node)
        value.replace_all_uses_with(node.outputs[0])
        del graph.initializers[name]


def _save(model: Any, path: Path) -> int:
    """Writes a graph, with large weights in a file beside it, and returns the bytes."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir.save(model, path, external_data=f"{path.name}.data" if size > EXTERNAL else None)
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def _largest_difference(model: LoopMDMForMaskedLM, folder: Path, length: int | None) -> float:
    """Of a probability, between graphs and model, at one loop and at the model's own number, on random tokens."""
    from .onnx_runner import OnnxModel

    config, generator = model.config, torch.Generator().manual_seed(0)
    graphs = OnnxModel(folder, {"num_loops": config.num_loops, "loop_update": config.loop_update}, num_threads=1)
    shape = (1, length) if length is not None else (3, min(33, config.max_position_embeddings))
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    tokens = tokens.masked_fill(torch.rand(shape, generator=generator) < 0.5, config.mask_token_id)
    real = torch.ones_like(tokens)
    if length is None and shape[1] > 3:  # padding at the left, at the right, and in between
        real[0, :2] = real[1, -1] = real[2, 1] = 0
    worst = 0.0
    for num_loops in {1, config.num_loops}:
        ours = torch.from_numpy(graphs.logits(tokens, real, num_loops)).softmax(-1)
        wanted = model(tokens, attention_mask=real, num_loops=num_loops).logits.softmax(-1)
        difference = (ours - wanted).abs()[real != 0].max().item()
        worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def saved_settings(model: LoopMDMForMaskedLM) -> dict[str, Any]:
    """The settings of `generate` saved with a model that ask for something: what a caller of the graphs has to do."""
    settings = model.generation_config
    found = {name: getattr(settings, name) for name in LoopMDMGenerationConfig.FIELDS if name not in REPORTS}
    return {name: value for name, value in found.items() if value != LoopMDMGenerationConfig.FIELDS[name][0]}


def export_onnx(
    source: str, output: str | Path, weights: str = "float32", revision: str | None = None
) -> dict[str, Any]:
    """
    Writes a model as a folder of graphs for any number of rows and positions: `prelude.onnx`, `loop.onnx`,
    `readout.onnx`, `model.json`, which describes the model and is returned, and `onnx_runner.py`, which runs them
    with numpy and onnxruntime alone.

    Args:
        source (`str`): Folder or Hub id of a LoopMDM.
        output (`str` or `Path`): The folder to write, which must not exist. It appears complete or not at all.
        weights (`str`, defaults to `"float32"`): Or `"int8"`: matrices with a scale for each column.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Raises:
        ValueError: A value is wrong, a library is missing, or something about the model cannot be expressed.
    """
    from ..evaluation.loading import load_model

    output = Path(output).expanduser()
    check_output(output)
    _check_possible(weights)
    model = load_model(source, "float32", "cpu", revision)
    own = ["num_loops", "loop_update", "vocab_size", "max_position_embeddings", "attention_block_size"]
    tokens = ("mask_token_id", "pad_token_id", "bos_token_id")
    with new_folder(output) as folder:
        about = export_graphs(model, folder, weights)
        about |= {name: getattr(model.config, name) for name in (*own, *tokens)}
        about["generation"] = saved_settings(model)
        write_json(folder / "model.json", about)
        shutil.copy(Path(__file__).with_name("onnx_runner.py"), folder)
    return about
