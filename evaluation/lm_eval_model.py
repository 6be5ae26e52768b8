# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""
LoopMDM in EleutherAI's lm-eval. Importing this module registers the model type `loopmdm`:

    import loopmdm.evaluation.lm_eval_model
    lm_eval.simple_evaluate(model="loopmdm", model_args="pretrained=FOLDER,num_loops=4", tasks=[...])

`python -m loopmdm.evaluation.lm_eval_model` is lm-eval's own command with that type, and `loopmdm eval lm-eval` runs
tasks at several numbers of loops.
"""

import argparse
import atexit
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm
from transformers import StoppingCriteria

from ..data import encode, this_process
from ..generation_utils import LoopMDMGenerationConfig, check_argument
from ..modeling_loopmdm import LoopMDMForMaskedLM
from ..objective import block_ids, check_settings, input_device, nelbo, seeded_generator
from .loading import check_device, load_model, load_tokenizer, read_model_config
from .rows import generate_together
from .texts import Text, Window, batches_by_length, make_windows, pad_windows

logger = logging.getLogger(__name__)

# Attributes that lm-eval writes into its results
SETTINGS = ("num_loops", "num_samples", "seed", "max_length", "stride", "max_gen_toks", "add_bos_token", "generation")
WHY_NOT_HF = (
    "lm-eval's model type `hf` scores a text as a causal language model does: it shows the model the whole text, and "
    "takes the logits at position i as the prediction of token i + 1. A masked diffusion model sees that token, so "
    "the numbers would mean nothing. Use `--model loopmdm`, which masks what is to be scored (NELBO) and generates by "
    "denoising."
)


class _Processes(TemplateLM):
    """lm-eval's interface to several processes that share the requests, through accelerate."""

    def start_processes(self, device: str | None) -> None:
        """Sets the device, the rank and the number of processes."""
        self.accelerator = None
        if device == "cuda:0" and not torch.cuda.is_available():
            device = "cpu"  # it is lm-eval's own default
        self._device = check_device(device)
        if this_process().number > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=self._device.type == "cpu")
            # A process that exits with an open group may abort, since gloo's threads outlive the objects they use.
            atexit.register(self.accelerator.end_training)
            self._device = self.accelerator.device
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.accelerator is None else self.accelerator.gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self.accelerator is None:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst=dst)
        return gathered

    def barrier(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


@register_model("loopmdm")
class LoopMDMEvalModel(_Processes):
    """
    lm-eval's interface to a LoopMDM.

    - `loglikelihood`: minus the NELBO of the continuation given the context, a Monte Carlo estimate
      ([`~loopmdm.evaluation.nelbo`], as in LLaDA, arXiv 2502.09992). It depends only on the seed and the two texts.
      Continuations of the same length get the same masks, which makes comparisons between them more exact. A
      continuation of one token is scored exactly. "Greedy" says whether the model fills in the continuation itself
      when every pass commits its most certain token (in a block-causal model, block by block).
    - `loglikelihood_rolling`: minus the NELBO of the whole text, in windows of `max_length` tokens that score `stride`
      tokens each.
    - `generate_until`: `model.generate`, cut at the first of the `until` strings. `max_gen_toks` tokens are denoised;
      with a `block_length`, a row stops after the block that contains a stop string.

    Args:
        pretrained (`str`): Folder of the model or of an adapter, or its Hub id; or a loaded [`LoopMDMForMaskedLM`].
        tokenizer (*optional*, defaults to `pretrained`'s): Folder, Hub id or object.
        num_loops (`int`, *optional*, defaults to `config.num_loops`): Loops of every pass.
        num_samples (`int`, defaults to 32): Masks per continuation or window; even.
        seed (`int`, defaults to 0): Seed of masks and of sampling.
        batch_size (`int`, defaults to 16): Masked texts, or prompts, per forward pass.
        max_batch_size (`int`, *optional*): Not used; lm-eval passes it for its automatic batch size.
        max_length (`int`, *optional*, defaults to `max_position_embeddings`, at most 4096): Most tokens of a forward
            pass. A longer context loses its beginning.
        stride (`int`, *optional*, defaults to `max_length`): Tokens that each further window scores.
        max_gen_toks (`int`, *optional*, defaults to half of `max_length`, at most 256): Tokens to generate if a task
            does not say.
        add_bos_token (`bool`, defaults to `False`): Put the tokenizer's start token before every text.
        dtype (`str`, defaults to `"auto"`), device (`str`, *optional*, by default a GPU if there is one),
            revision (`str`, defaults to `"main"`), trust_remote_code (`bool`, defaults to `False`, for tokenizers with
            code of their own): As in transformers. Under `accelerate launch` or `torchrun` every process takes its
            own device and its share of the requests.
        generation: Any argument of [`LoopMDMGenerationConfig`] (`unmasking`, `block_length`, `max_denoising_steps`,
            `confidence_threshold`, ...). The `generation_kwargs` of a task take precedence.

    Raises:
        ValueError: The model cannot be loaded, or an argument does not fit it.
    """

    def __init__(
        self,
        pretrained: str | LoopMDMForMaskedLM,
        tokenizer: Any = None,
        num_loops: int | None = None,
        num_samples: int = 32,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        stride: int | None = None,
        max_gen_toks: int | None = None,
        add_bos_token: bool = False,
        dtype: str = "auto",
        device: str | None = None,
        revision: str = "main",
        trust_remote_code: bool = False,
        **generation: Any,
    ):
        super().__init__()
        try:
            self.batch_size = int(16 if batch_size is None else batch_size)
        except ValueError:
            raise ValueError(f"`batch_size` is {batch_size!r}; give an integer.") from None
        check_argument("batch_size", self.batch_size, int, 1)
        if isinstance(pretrained, str):
            read_model_config(pretrained, revision)  # checks
        self.start_processes(device)
        if isinstance(pretrained, str):
            self.model = load_model(pretrained, dtype, str(self._device), revision)
        else:
            self.model, self._device = pretrained, input_device(pretrained)
        self.model.eval()
        self.pretrained, self.revision = pretrained if isinstance(pretrained, str) else None, revision
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer or pretrained, trust_remote_code, revision=revision)
        self.tokenizer = tokenizer
        config = self.model.config
        self.num_loops = config.num_loops if num_loops is None else num_loops
        self.num_samples, self.seed = num_samples, seed
        check_settings([self.num_loops], num_samples)
        longest = config.max_position_embeddings
        self.max_length = min(4096, longest) if max_length is None else max_length
        if not 1 <= self.max_length <= longest:
            raise ValueError(f"`max_length` is {self.max_length}; the model takes 1 to {longest} positions.")
        self.stride = self.max_length if stride is None else stride
        make_windows([], self.max_length, self.stride)  # checks
        self.max_gen_toks = max(1, min(256, self.max_length // 2)) if max_gen_toks is None else max_gen_toks
        check_argument("max_gen_toks", self.max_gen_toks, int, 1)
        self.add_bos_token = add_bos_token
        if add_bos_token and tokenizer.bos_token_id is None:
            raise ValueError("`add_bos_token` is True, and the tokenizer has no start token.")
        self.generation = generation
        LoopMDMGenerationConfig(**generation)  # checks

    # Texts and tokens

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = encode(self.tokenizer, string, "a text")
        if not self.add_bos_token or add_special_tokens is False or ids[:1] == [self.tokenizer.bos_token_id]:
            return ids
        return [self.tokenizer.bos_token_id, *ids]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError("The tokenizer has no chat template; run without --apply-chat-template.")
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # Likelihood

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = []
        for context, continuation in (request.args for request in requests):
            if context:
                encoded = self._encode_pair(context, continuation)
            else:  # the model needs no token before the first one
                encoded = self.tok_encode(context), self.tok_encode(continuation, False)
            pairs.append(((context, continuation), *encoded))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = [(0.0, True)] * len(requests)  # an empty continuation is certain
        places = [place for place, ((_, text), _, ids) in enumerate(requests) if ids or text.strip()]
        requests, windows = [requests[place] for place in places], []
        for (_, text), _, continuation in requests:
            if not 1 <= len(continuation) <= self.max_length:
                raise ValueError(
                    f"The continuation {text[:40]!r} has {len(continuation)} tokens; it must have 1 to `max_length` "
                    f"({self.max_length})."
                )
        rooms = [self.max_length - len(continuation) for _, _, continuation in requests]
        contexts = shorten([context for _, context, _ in requests], rooms)
        for context, (_, _, continuation) in zip(contexts, requests, strict=True):
            ids, given = context + continuation, len(context)
            windows.append(Window(0, 0, ids, [position >= given for position in range(len(ids))], None))
        scores = self._score(windows, [0] * len(windows), disable_tqdm)  # choices are compared on the same masks
        for chosen in batches_by_length([window.input_ids for window in windows], self.batch_size):
            greedy = fills_in(self.model, [windows[index] for index in chosen], self.num_loops)
            for index, is_greedy in zip(chosen, greedy, strict=True):
                results[places[index]] = (scores[index], is_greedy)
                self.cache_hook.add_partial("loglikelihood", requests[index][0], results[places[index]])
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        texts = []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            start = len(ids) - len(self.tok_encode(text, False))
            texts.append(Text(text[:40], ids, [position >= start for position in range(len(ids))]))
        windows = make_windows(texts, self.max_length, self.stride)
        # Masks of their own: the same ones in every text would add noise that no number of texts averages out.
        scores = self._score(windows, [str(window.input_ids) for window in windows], disable_tqdm)
        totals = [0.0] * len(texts)
        for window, score in zip(windows, scores, strict=True):
            totals[window.text] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _score(self, windows: list[Window], indices: Sequence[int | str], disable_tqdm: bool) -> list[float]:
        """Minus the NELBO in nats of each window, whose masks depend on the seed and its index."""
        scores = [0.0] * len(windows)
        # A single token has only one mask, so the fewest samples allowed score it exactly.
        single = [index for index, window in enumerate(windows) if sum(window.maskable) == 1]
        several = [index for index, window in enumerate(windows) if sum(window.maskable) > 1]
        with tqdm(total=len(windows), desc="NELBO", disable=disable_tqdm or self.rank != 0) as bar:
            for members, num_samples in ((single, 2), (several, self.num_samples)):
                size = max(1, 4 * self.batch_size // num_samples)
                for places in batches_by_length([windows[index].input_ids for index in members], size):
                    chosen = [members[place] for place in places]
                    estimate = nelbo(
                        self.model,
                        *pad_windows([windows[index] for index in chosen]),
                        num_loops=self.num_loops,
                        num_samples=num_samples,
                        batch_size=self.batch_size,
                        seed=self.seed,
                        indices=[indices[index] for index in chosen],
                    )
                    for index, nats in zip(chosen, estimate.nats[0].tolist(), strict=True):
                        scores[index] = -nats
                    bar.update(len(chosen))
        return scores

    # Generation

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        plans = []
        for index, (_, arguments) in enumerate(request.args for request in requests):
            plans.append(self.generation_plan(arguments))  # all are checked before the first one runs
            groups.setdefault(repr(sorted(arguments.items(), key=str)), []).append(index)
        contexts, rooms, seeds, seen = [], [], [], Counter()
        for request, (_, arguments) in zip(requests, plans, strict=True):
            text = request.args[0]
            contexts.append(self.tok_encode(text))
            rooms.append(self.max_length - arguments["max_new_tokens"])
            # With sampling, a prompt that is asked several times gets several answers.
            seeds.append((self.seed, "generate", seen[text], text))
            seen[text] += 1
        contexts = shorten(contexts, rooms)
        answers: list[str] = [None] * len(requests)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm or self.rank != 0) as bar:
            for members in groups.values():
                until, arguments = plans[members[0]]
                for places in batches_by_length([contexts[index] for index in members], self.batch_size):
                    chosen = [members[place] for place in places]
                    generators = [seeded_generator(*seeds[index]) for index in chosen]
                    texts = self._generate([contexts[index] for index in chosen], generators, until, arguments)
                    for index, text in zip(chosen, texts, strict=True):
                        answers[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(len(chosen))
        return answers

    def generation_plan(self, arguments: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
        """The stop strings, and the arguments of `generate`, of a task's `generation_kwargs`."""
        arguments = dict(arguments)
        until = arguments.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        counts = [arguments.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
        count = next((value for value in counts if value is not None), self.max_gen_toks)
        if not 1 <= count < self.max_length:
            raise ValueError(
                f"`max_gen_toks` is {count}; it must be at least 1 and leave a part of `max_length` "
                f"({self.max_length}) to the prompt."
            )
        settings = {"num_loops": self.num_loops, **self.generation, **arguments}
        # Tasks ask for greedy decoding by `temperature: 0`, or by `do_sample: false` with sampling arguments left in.
        if settings.get("temperature") == 0:
            if settings.get("do_sample"):
                raise ValueError(
                    "`do_sample` is true, and `temperature` 0, which is greedy; add `temperature=1.0`, or leave "
                    "`do_sample` out."
                )
            settings["do_sample"] = False
        if not settings.get("do_sample"):
            for name in ("temperature", "top_k", "top_p", "min_p"):
                settings.pop(name, None)
        settings["max_new_tokens"] = count
        LoopMDMGenerationConfig(**settings)  # checks
        return until, settings

    def _generate(
        self, contexts: list[list[int]], generators: list[torch.Generator], until: list[str], arguments: dict[str, Any]
    ) -> list[str]:
        width = max(map(len, contexts))
        stop = [StopAtText(self.tokenizer, contexts, until)] if until and arguments.get("block_length") else None
        given = {"generator": generators, "stopping_criteria": stop, "tokenizer": self.tokenizer}
        output, _ = generate_together(self.model, contexts, **given, **arguments)
        return [answer(self.tokenizer, self.model, row[width:], until) for row in output.sequences.tolist()]

    def get_model_info(self) -> dict[str, Any]:
        """Facts that lm-eval adds to its results."""
        from importlib.metadata import version

        return {
            "pretrained": self.pretrained,
            "model_revision": self.revision,
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_device": str(self._device),
            "processes": self.world_size,
            "loopmdm_version": version("loopmdm"),
            "model_batch_size": self.batch_size,
            **{name: getattr(self, name) for name in SETTINGS},
        }


@torch.no_grad()
def fills_in(model: LoopMDMForMaskedLM, windows: list[Window], num_loops: int) -> list[bool]:
    """
    Whether the model fills in the scored tokens of each window itself: every forward pass commits the most certain
    token, until all are filled in or one is wrong.
    """
    device, mask_token_id = input_device(model), model.config.mask_token_id
    targets, attention_mask, to_fill = pad_windows(windows)
    blocks = block_ids(attention_mask != 0, torch.zeros_like(targets), model.config.attention_block_size)
    tokens = targets.masked_fill(to_fill, mask_token_id)
    alive = torch.ones(len(windows), dtype=torch.bool)
    while bool((alive & (tokens == mask_token_id).any(-1)).any()):
        rows = (alive & (tokens == mask_token_id).any(-1)).nonzero().flatten()
        open_ = tokens[rows] == mask_token_id
        first = blocks[rows].where(open_, torch.iinfo(torch.long).max).min(-1, keepdim=True).values
        open_ &= blocks[rows] == first
        places = open_.long().argsort(dim=-1, descending=True, stable=True)[:, : int(open_.sum(-1).max())]
        logits = model(
            tokens[rows].to(device),
            attention_mask=attention_mask[rows].to(device),
            num_loops=num_loops,
            logits_to_keep=places.to(device),
        ).logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        confidence, choice = (part.cpu() for part in logits.softmax(-1).max(-1))
        best = confidence.where(open_.gather(1, places), -1).argmax(-1, keepdim=True)
        place, chosen = (part.gather(1, best).squeeze(1) for part in (places, choice))
        tokens[rows, place] = chosen
        alive[rows] = chosen == targets[rows, place]
    return alive.tolist()


def shorten(contexts: list[list[int]], rooms: list[int]) -> list[list[int]]:
    """Contexts cut to the number of tokens that there is room for; the end is kept."""
    cut = sum(len(ids) > room for ids, room in zip(contexts, rooms, strict=True))
    if cut:
        longest = max(map(len, contexts))
        logger.warning("%d of %d contexts lose their beginning; the longest has %d tokens.", cut, len(rooms), longest)
    return [ids[max(0, len(ids) - room) :] for ids, room in zip(contexts, rooms, strict=True)]


def answer(tokenizer: Any, model: LoopMDMForMaskedLM, ids: list[int], until: Iterable[str]) -> str:
    """The text of new tokens up to the first end token or string in `until`, which may name special tokens."""
    special = set(tokenizer.all_special_tokens)
    of_model = [model.config.eos_token_id, model.generation_config.eos_token_id]  # the latter includes turn ends
    of_model = [end for part in of_model for end in (part if isinstance(part, list | tuple) else [part])]
    ends = {tokenizer.eos_token_id, *of_model, *(tokenizer.convert_tokens_to_ids(w) for w in until if w in special)}
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    kept = [token for token in ids[:end] if token != model.config.mask_token_id]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    places = [place for place in (text.find(word) for word in until if word) if place >= 0]
    return text[: min(places)] if places else text


class StopAtText(StoppingCriteria):
    """Stops rows whose text behind its prompt contains a string of `until`. `generate` calls it after every block."""

    def __init__(self, tokenizer: Any, prompts: list[list[int]], until: list[str]):
        self.tokenizer, self.prompts, self.until = tokenizer, prompts, until

    def _new(self, row: list[int]) -> list[int]:
        return row[max((len(prompt) for prompt in self.prompts if row[: len(prompt)] == prompt), default=0) :]

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        texts = [self.tokenizer.decode(self._new(row)) for row in input_ids.tolist()]
        return torch.tensor(
            [any(word and word in text for word in self.until) for text in texts], device=input_ids.device
        )


def main() -> None:
    """lm-eval's command with the model type `loopmdm`."""
    from lm_eval.__main__ import cli_evaluate

    parser = argparse.ArgumentParser(add_help=False)
    for names in (("--model", "-M"), ("--model_args", "-a"), ("--config", "-C")):
        parser.add_argument(*names)
    given, _ = parser.parse_known_args()
    usual = "hf" if given.model_args and not given.config else None  # what lm-eval takes
    if (given.model or usual) in ("hf", "hf-auto", "huggingface"):
        print(f"loopmdm: error: {WHY_NOT_HF}", file=sys.stderr)
        sys.exit(2)
    cli_evaluate()


if __name__ == "__main__":
    main()
