# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
What other libraries put around a model, and what is done with it then. Each cell of the table, wrapper by use, equals
the plain model, or raises an error that names the remedy. The ids of the tests are the table (`--collect-only`); a
cell that cannot apply is skipped, and says why (`-rs`).
"""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
)
from tiny import ARCHITECTURES, MASK, random_ids, tiny_model
from torch import nn
from transformers import TorchAoConfig

from loopmdm import LoopMDMForMaskedLM
from loopmdm.evaluation import measure_dynamics, nelbo

# Sizes, and models

SIZES = {
    "40": {"vocab_size": 40, "mask_token_id": 39},
    "9000": {"vocab_size": 9000, "mask_token_id": 8999, "tie_word_embeddings": False},
}
BLOCK = 4


def plain(size: str, blocks: bool = False) -> LoopMDMForMaskedLM:
    """Head, mid and tail of a layer each, two loops."""
    layers = {"num_hidden_layers": 3, "loop_end": 2, "num_loops": 2, "hidden_size": 32, "intermediate_size": 64}
    return tiny_model(**layers, **SIZES[size], attention_block_size=BLOCK if blocks else None)


def plain_with(state: dict[str, torch.Tensor], size: str, blocks: bool) -> LoopMDMForMaskedLM:
    """A plain model of other weights; untied where the two ends differ."""
    ends = state["lm_head.weight"], state["model.embed_tokens.weight"]
    model = plain(size, blocks)
    if not torch.equal(*ends):
        model.lm_head.weight = nn.Parameter(torch.empty_like(ends[0]))
    model.load_state_dict(state)
    return model


# Uses: each returns tensors by name


CLEAN = random_ids(2, 8).clamp(max=21)
TOKENS = CLEAN[0, :2].tolist()
PADDED = torch.tensor([[1] * 8, [0, 0] + [1] * 6])
WEIGHTS = torch.linspace(0.5, 2.0, 16).view(2, 8) * torch.tensor([1, 0, 1, 1] * 2)


def masked(model) -> torch.Tensor:
    ids = CLEAN.clone()
    ids[:, [2, 3, 6]] = config_of(model).mask_token_id
    return ids


def config_of(model):
    """Peft's wrapper, DataParallel's and torch's have no `config` of the kind that is meant, or none."""
    return next(module for module in model.modules() if isinstance(module, LoopMDMForMaskedLM)).config


@torch.no_grad()
def forward(model):
    outputs = model(input_ids=masked(model), attention_mask=PADDED, num_loops=3)
    return {"logits": outputs.logits[:, -CLEAN.shape[1] :][PADDED.bool()]}  # behind soft prompts, if there are any


@torch.no_grad()
def narrow(model):
    keep = torch.tensor([[3, 2], [7, 7]])
    outputs = model(input_ids=masked(model), attention_mask=PADDED, logits_to_keep=keep, visible_loops=1)
    return {"logits": outputs.logits}


def labelled(model):
    labels = CLEAN.masked_fill(PADDED == 0, -100)
    inputs = {"input_ids": masked(model), "attention_mask": PADDED, "labels": labels, "loss_weights": WEIGHTS}
    return model(**inputs, num_loops=2)


@torch.no_grad()
def labels(model):
    outputs = labelled(model)
    return {"loss": outputs.loss} | ({} if outputs.logits is None else {"logits": outputs.logits[PADDED.bool()]})


def generate(model, **how):
    arguments = {"max_new_tokens": 6, "block_length": BLOCK, "max_denoising_steps": 2, **how}
    arguments |= {"return_dict_in_generate": True, "output_trace": True}
    arguments["eos_token_id"] = list(range(1, config_of(model).vocab_size // 4))  # rows leave the batch
    output = model.generate(input_ids=masked(model), attention_mask=PADDED, **arguments)
    assert (output.sequences != config_of(model).mask_token_id).all()
    return {"tokens": output.sequences, "confidence": output.trace[0].confidence, "flops": output.flops}


def likelihood(model):
    estimate = nelbo(model, CLEAN, attention_mask=PADDED, num_loops=[1, 3], num_samples=2)
    return {"nats": estimate.nats, "tokens' nats": estimate.token_nats}


def dynamics(model):
    found = measure_dynamics(model, CLEAN, PADDED, num_loops=2, timesteps=[0.5], masks_per_text=1)
    names = ("loss", "change", "distance", "attention")
    return {name: torch.from_numpy(getattr(found, name)) for name in names}


def training_step(model):
    """The loss, and what a step makes of it."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.02)
    before = labelled(model).loss
    before.backward()
    assert all(0 < parameter.grad.abs().max() < torch.inf for parameter in parameters)
    optimizer.step()
    after = labelled(model).loss.detach()
    model.eval()
    assert after < before
    return {"loss": before.detach(), "after": after}


USES: dict[str, Callable] = {
    "forward": forward,
    "narrowed": narrow,
    "labels": labels,
    "generate": generate,
    "generate-exact": generate,
    "generate-prefix": partial(generate, cache_implementation="prefix"),
    "generate-dual": partial(generate, cache_implementation="dual"),
    "nelbo": likelihood,
    "dynamics": dynamics,
    "training-step": training_step,
    "save-and-load": forward,
}
GENERATION = [name for name in USES if name.startswith("generate")]


# Wrappers


@dataclass
class Wrapper:
    """
    Args:
        wrap: Makes of a plain model the wrapped one and the plain model that it should equal; `(model, size, blocks,
            folder)`.
        atol: What the wrapper may change.
        load: Loads what the wrapped model's `save_pretrained` has written, `(folder, size)`.
        trains_others: Whether a training step moves other parameters than the plain model's.
        refused: By use the error that is raised.
        cannot: By use why the cell cannot apply.
        sizes: Those of the models that the uses take in turn.
    """

    wrap: Callable
    atol: float = 1e-5
    load: Callable = lambda folder, size: LoopMDMForMaskedLM.from_pretrained(folder)
    trains_others: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=dict)
    sizes: tuple[str, ...] = tuple(SIZES)


def alike(change: Callable) -> Callable:
    """A wrapper that leaves all results as they are, from what it does to a model."""
    return lambda model, size, blocks, folder: (change(model), plain(size, blocks))


def offload_to_disk(model, size, blocks, folder):
    return disk_offload(model, folder / "offload", execution_device="cpu"), plain(size, blocks)


def device_map(placement: dict, model, size, blocks, folder):
    """Loaded with some of the modules on the disk."""
    model.save_pretrained(folder / "saved")
    loaded = LoopMDMForMaskedLM.from_pretrained(folder / "saved", offload_folder=folder / "offload", **placement)
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    return loaded, plain(size, blocks)


MAPS = {
    "mid": {"model.layers.1": "disk"},
    "ends": {"model.embed_tokens": "disk", "lm_head": "disk", "model.norm": "disk"},
}
MODULES = ["lm_head", "model.embed_tokens", "model.norm", "model.rotary_emb", *(f"model.layers.{i}" for i in range(3))]


def on_disk(name: str) -> Callable:
    return partial(device_map, {"device_map": dict.fromkeys(MODULES, "cpu") | MAPS[name]})


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def randomized(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """Adapters that change something, as trained ones do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def adapted(make_config: Callable, finish: Callable = lambda model: model) -> Callable:
    """A model with an adapter; what peft merges, as a plain model's weights, is what it should equal."""

    def wrap(model, size, blocks, folder):
        peft_model = randomized(get_peft_model(model, make_config(size)))
        merged = copy.deepcopy(peft_model).merge_and_unload()
        reference = plain_with(merged.state_dict(), size, blocks)
        assert not torch.equal(reference(CLEAN).logits, plain(size, blocks)(CLEAN).logits), "the adapter does nothing"
        return finish(peft_model), reference

    return wrap


def load_adapter(folder, size, name=""):
    return PeftModel.from_pretrained(plain(size), folder / name).eval()


def lora(size: str, **more) -> LoraConfig:
    """On every module that it may name; tied ends are one tensor, which peft cannot adapt twice."""
    ends = [] if size == "40" else ["embed_tokens", "lm_head"]
    return LoraConfig(**{"r": 2, "target_modules": LINEAR + ends, "task_type": "CAUSAL_LM"} | more)


def two_adapters(model, size, blocks, folder):
    """The second one is in force, after the first one was."""
    peft_model = get_peft_model(model, lora(size))
    peft_model.add_adapter("second", lora(size, target_modules=LINEAR))
    for name in ("default", "second"):
        peft_model.set_adapter(name)
        randomized(peft_model)
        peft_model(input_ids=CLEAN)
    merged = copy.deepcopy(peft_model).merge_and_unload(adapter_names=["second"])
    return peft_model, plain_with(merged.state_dict(), size, blocks)


def activated_lora(model, size, blocks, folder):
    """The adapter acts on what follows the last token that calls for it; the rest of a row has the plain weights."""
    config = lora(size, target_modules=LINEAR, alora_invocation_tokens=TOKENS[1:])
    peft_model, reference = randomized(get_peft_model(model, config)), plain(size, blocks)
    columns = torch.arange(CLEAN.shape[1])
    last = torch.where(TOKENS[1] == CLEAN, columns, -1).amax(-1, keepdim=True)
    active = (columns >= last) & (last >= 0)
    for name, module in peft_model.get_base_model().named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            reference.get_submodule(name).register_forward_hook(
                lambda module, args, output, delta=delta: output + active[..., None] * (args[0] @ delta.T)
            )
    assert active.any() and not active.all()
    return peft_model, reference


def soft_prompt(kind, **sizes) -> Callable:
    """The reference puts the prompt's embeddings before those of the input."""

    def wrap(model, size, blocks, folder):
        peft_model = get_peft_model(model, kind(num_virtual_tokens=3, task_type="CAUSAL_LM", **sizes)).eval()
        is_prefix = kind is PrefixTuningConfig  # keys and values, which no loop of ours takes
        return peft_model, None if is_prefix else Prompted(peft_model, plain(size, blocks))

    return wrap


class Prompted(nn.Module):
    def __init__(self, peft_model, model):
        super().__init__()
        self.prompt, self.model = peft_model.get_prompt(2).detach(), model

    def forward(self, input_ids, attention_mask, **arguments):
        embeddings = torch.cat((self.prompt, self.model.get_input_embeddings()(input_ids)), 1)
        mask = torch.cat((torch.ones(2, 3).long(), attention_mask), 1)
        return self.model(inputs_embeds=embeddings, attention_mask=mask, **arguments)


def quantized(make_config: Callable) -> Callable:
    """Weights in few bits; the reference has what they stand for, in float32."""

    def wrap(model, size, blocks, folder):
        pytest.importorskip("torchao")
        model.save_pretrained(folder / "saved")
        config = TorchAoConfig(make_config())
        loaded = LoopMDMForMaskedLM.from_pretrained(folder / "saved", quantization_config=config, dtype=torch.float32)
        state = {name: value.detach() for name, value in loaded.state_dict().items()}
        packed = [name for name, value in state.items() if type(value) is not torch.Tensor]
        assert len(packed) == 3 * len(LINEAR)
        state |= {name: state[name].dequantize() for name in packed}
        return loaded, plain_with(state, size, blocks)

    return wrap


def int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def int4():
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))


def lora_on_int4(model, size, blocks, folder):
    """The reference has the same adapter, merged into what the quantised weights stand for."""
    models = []
    for base in quantized(int4)(model, size, blocks, folder):
        torch.manual_seed(0)
        models.append(randomized(get_peft_model(base, lora(size, target_modules=LINEAR))))
    return models[0], plain_with(models[1].merge_and_unload().state_dict(), size, blocks)


def compile_layers(model):
    for layer in model.model.layers:
        layer.compile(backend="eager", dynamic=True)
    return model


def pickled_config(model, size, blocks, folder):
    copied = LoopMDMForMaskedLM(pickle.loads(pickle.dumps(model.config))).eval()
    copied.load_state_dict(model.state_dict())
    return copied, model


def patched_forward(model):
    """As offloaders and quantisers of one's own: `forward` is another, and the parameters are placeholders."""
    for module in list(model.modules()):
        if not list(module.children()):
            module.forward = copy.deepcopy(module).forward
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    empty = None if tensor is None else torch.empty_like(tensor, device="meta")
                    tensors[name] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return model


def hooked(model, size, blocks, folder):
    """Hooks before and behind the modules, which double what comes out; the reference has weights twice as large."""
    reference = plain(size, blocks)
    names = ["lm_head", "model.norm", *(f"model.layers.{i}.mlp.down_proj" for i in range(3))]
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda module, args, output: 2 * output)
        state[f"{name}.weight"] *= 2
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    for i in range(3):
        state[f"model.layers.{i}.self_attn.o_proj.weight"] *= 2
    return model, plain_with(state, size, blocks)


class Replicas(nn.Module):
    """What torch.nn.DataParallel makes of a model in a forward pass: a replica for each half of the batch, a thread
    each. Its replicas hold plain tensors in place of parameters."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def replicate(self):
        modules = {module: module._replicate_for_data_parallel() for module in self.module.modules()}
        for module, replica in modules.items():
            for name, child in module._modules.items():
                setattr(replica, name, modules[child]) if child is not None else None
            for name, parameter in module._parameters.items():
                if parameter is None:
                    replica._parameters[name] = None
                else:
                    setattr(replica, name, parameter * 1)
        return modules[self.module]

    def forward(self, **inputs):
        def run(row):
            mine = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            with torch.set_grad_enabled(is_enabled):
                return self.replicate()(**mine, num_items_in_batch=count)

        is_enabled = torch.is_grad_enabled()
        count = (inputs["labels"] != -100).sum() if "labels" in inputs else None
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(run, range(2)))
        joined = outputs[0]
        joined.logits = None if joined.logits is None else torch.cat([output.logits for output in outputs])
        joined.loss = None if joined.loss is None else sum(output.loss for output in outputs)
        return joined


def in_two_threads(use: Callable, model) -> list[dict]:
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(use, model) for _ in range(2)]]


OFFLOADED = {"training-step": "accelerate's offload is for inference: gradients would have to go to the disk"}
PLACEHOLDERS = {
    "training-step": "the parameters are placeholders",
    "save-and-load": "the parameters are placeholders",
}
UNSAVED = "accelerate has the weights; `remove_hook_from_submodules` gives them back"
ACTIVATED = dict.fromkeys((*GENERATION, "narrowed", "nelbo", "dynamics"), "activated LoRA")
SOFT = dict.fromkeys((*GENERATION, "nelbo", "dynamics"), "soft *prompts")
# Which of the positions are [MASK] embeddings do not tell, and weights are of the labels that they came with.
PROMPTS = SOFT | {"narrowed": "give `input_ids`"}
PROMPTS |= dict.fromkeys(("labels", "training-step"), "`loss_weights` has shape")
FOLDED = {"save-and-load": "what is saved are the weights, not the hooks"}
DATA_PARALLEL = dict.fromkeys(
    GENERATION, "torch.nn.DataParallel has no `generate`; one calls that of the model inside"
)

WRAPPERS: dict[str, Wrapper] = {
    "cpu_offload": Wrapper(
        alike(partial(cpu_offload, execution_device="cpu")), cannot=OFFLOADED | {"save-and-load": UNSAVED}
    ),
    "disk_offload": Wrapper(offload_to_disk, cannot=OFFLOADED | {"save-and-load": UNSAVED}),
    "device_map-mid": Wrapper(on_disk("mid"), cannot=OFFLOADED),
    "device_map-ends": Wrapper(on_disk("ends"), cannot=OFFLOADED),
    "device_map-auto": Wrapper(
        partial(device_map, {"device_map": "auto", "max_memory": {"cpu": "40KB"}}), cannot=OFFLOADED
    ),
    "lora": Wrapper(adapted(lora), load=load_adapter, trains_others=True),
    "dora": Wrapper(adapted(partial(lora, use_dora=True)), load=load_adapter, trains_others=True),
    "ia3": Wrapper(
        adapted(lambda size: IA3Config(target_modules=LINEAR, feedforward_modules=["down_proj"])),
        load=load_adapter,
        trains_others=True,
    ),
    "trainable-tokens": Wrapper(
        adapted(lambda size: TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"])),
        load=load_adapter,
        trains_others=True,
    ),
    "lora-and-tokens": Wrapper(
        adapted(partial(lora, target_modules=LINEAR, trainable_token_indices=TOKENS)),
        load=load_adapter,
        trains_others=True,
    ),
    "lora-and-saved-modules": Wrapper(
        adapted(partial(lora, target_modules=LINEAR, modules_to_save=["lm_head", "norm"])),
        load=load_adapter,
        trains_others=True,
        sizes=("9000",),  # peft unties the ends, and so does whoever loads the adapter
    ),
    "two-adapters": Wrapper(two_adapters, load=partial(load_adapter, name="second"), trains_others=True),
    "activated-lora": Wrapper(activated_lora, load=load_adapter, trains_others=True, refused=ACTIVATED),
    "merged-adapter": Wrapper(
        adapted(lora, finish=lambda model: model.merge_and_unload()), cannot={"training-step": "a plain model again"}
    ),
    "merged-in-place": Wrapper(
        adapted(partial(lora, target_modules=LINEAR), finish=lambda model: (model.merge_adapter(), model)[1]),
        load=load_adapter,
        cannot={"training-step": "peft trains what it has not merged"},
    ),
    "prompt-tuning": Wrapper(soft_prompt(PromptTuningConfig), load=load_adapter, refused=PROMPTS),
    "p-tuning": Wrapper(soft_prompt(PromptEncoderConfig, encoder_hidden_size=32), load=load_adapter, refused=PROMPTS),
    "prefix-tuning": Wrapper(
        soft_prompt(PrefixTuningConfig),
        refused=SOFT | dict.fromkeys(USES.keys() - SOFT.keys(), "LoopMDMCache"),
    ),
    "int8": Wrapper(quantized(int8), atol=1e-4, cannot={"training-step": "integers have no gradients"}),
    "int4": Wrapper(quantized(int4), atol=1e-4, cannot={"training-step": "integers have no gradients"}),
    "lora-on-int4": Wrapper(
        lora_on_int4,
        atol=1e-4,
        trains_others=True,
        cannot={"save-and-load": "the adapter alone is saved, as that of `lora`"},
    ),
    "compiled": Wrapper(alike(compile_layers), sizes=("40",)),
    "deepcopy": Wrapper(alike(copy.deepcopy), atol=0),
    "pickle": Wrapper(alike(lambda model: pickle.loads(pickle.dumps(model))), atol=0),
    "pickled-config": Wrapper(pickled_config, atol=0),
    "bfloat16": Wrapper(alike(lambda model: model.to(torch.bfloat16)), atol=0.25),
    "train-mode": Wrapper(alike(lambda model: model.train()), atol=0),
    "train-then-eval": Wrapper(alike(lambda model: model.train().eval()), atol=0),
    "patched-forward": Wrapper(alike(patched_forward), atol=0, cannot=PLACEHOLDERS),
    "hooks": Wrapper(hooked, trains_others=True, cannot=FOLDED),
    "replicas": Wrapper(alike(Replicas), cannot=DATA_PARALLEL | {"save-and-load": "one saves the model inside"}),
    "two-threads": Wrapper(
        alike(lambda model: model), cannot={"training-step": "both would add to the same gradients"}
    ),
}
CELLS = [
    (name, use, wrapper.sizes[(row + column) % len(wrapper.sizes)])
    for row, (name, wrapper) in enumerate(WRAPPERS.items())
    for column, use in enumerate(USES)
]
THREADS = ("two-threads",)
MUTATING = ("training-step", "save-and-load")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return lambda: tmp_path_factory.mktemp("wrapped")


@pytest.fixture(scope="module")
def build(folders):
    """Wraps a plain model; once for all uses that leave it as it was."""

    def make(name, size, blocks):
        torch.manual_seed(0)
        return WRAPPERS[name].wrap(plain(size, blocks), size, blocks, folders())

    kept = cache(make)
    yield lambda name, size, blocks, use: (make if use in MUTATING else kept)(name, size, blocks)
    torch.compiler.reset()


def assert_same(found: dict, expected: dict, atol: float) -> None:
    """Tokens and costs are compared where rounding alone differs."""
    assert found.keys() >= expected.keys()
    for name, value in expected.items():
        if name not in ("tokens", "flops"):
            close = partial(torch.testing.assert_close, rtol=10 * atol, atol=atol, equal_nan=True)
            close(found[name].double(), value.double(), msg=lambda message, name=name: f"{name}: {message}")
        elif atol < 0.01:
            assert torch.equal(found[name], value), name


@pytest.mark.filterwarnings("ignore")  # of the libraries around
@pytest.mark.parametrize(("name", "use", "size"), CELLS)
def test_wrapped_models_equal_the_plain_one(name, use, size, build, folders):
    wrapper = WRAPPERS[name]
    if use in wrapper.cannot:
        pytest.skip(wrapper.cannot[use])
    model, reference = build(name, size, use == "generate-exact", use)
    if use in wrapper.refused:
        with pytest.raises(ValueError, match=wrapper.refused[use]):
            USES[use](model)
        return
    if use == "save-and-load":
        folder = folders()
        model.save_pretrained(folder)
        loaded = wrapper.load(folder, size)
        found, expected = forward(loaded), forward(model)
        assert found["logits"].dtype == expected["logits"].dtype
        assert_same(found, expected, wrapper.atol)
        return
    expected = USES[use](reference)
    results = in_two_threads(USES[use], model) if name in THREADS else [USES[use](model)]
    if wrapper.trains_others:
        expected.pop("after", None)
    if name == "train-mode" and use == "labels":
        expected.pop("logits")  # there are none in training
    for found in results:
        assert_same(found, expected, wrapper.atol)


@pytest.mark.parametrize("overrides", [*ARCHITECTURES.values(), {"attention_block_size": 4}], ids=str)
def test_no_module_of_any_architecture_is_read(overrides):
    model, reference = patched_forward(tiny_model(**overrides)), tiny_model(**overrides)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    ids, keep = random_ids(2, 8), torch.tensor([[3, 0], [5, 5]])
    labels = ids.masked_fill(ids == MASK, 3)
    for arguments in ({}, {"logits_to_keep": keep}, {"visible_loops": 1}, {"labels": labels}):
        found, expected = model(ids, **arguments), reference(ids, **arguments)
        assert torch.equal(found.logits, expected.logits)
        assert found.loss is None or torch.equal(found.loss, expected.loss)
    assert torch.equal(model.generate(ids, max_new_tokens=4), reference.generate(ids, max_new_tokens=4))
