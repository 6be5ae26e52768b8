# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Tiny models and tokenizers in folders, for the tests of the evaluation tools."""

from pathlib import Path

import torch
from tiny import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<end>", "<mask>", *(f"w{i}" for i in range(29))]
CHAT = "{% for m in messages %}w0 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w0 {% endif %}"


def word_tokenizer(words: list[str] = WORDS, **special: str | None) -> PreTrainedTokenizerFast:
    """One token per word; unknown words are the first that is no special token."""
    special = {"pad_token": "<pad>", "eos_token": "<end>", "mask_token": "<mask>"} | special
    unknown = next(word for word in words if word not in special.values())
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **special)


def with_special(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The tokenizer, which puts the special tokens of a template such as `<s> $A </s>` around every text."""
    special = [(word, tokenizer.convert_tokens_to_ids(word)) for word in template.split() if word != "$A"]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def save_looped(folder: Path, **overrides) -> str:
    """A random LoopMDM of 32 words, 64 positions and three loops."""
    values = {"vocab_size": len(WORDS), "mask_token_id": 2, "pad_token_id": 0, "eos_token_id": 1}
    tiny_model(**values | overrides).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def make_judge(seed: int = 0, vocab_size: int = len(WORDS)) -> LlamaForCausalLM:
    """A random causal Llama of the same words, with 32 positions."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save_judge(folder: Path) -> str:
    make_judge().save_pretrained(folder)
    word_tokenizer(bos_token="<end>").save_pretrained(folder)
    return str(folder)
