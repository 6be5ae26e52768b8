# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Trains a small byte-level BPE tokenizer with a mask token on text files.

python examples/pretrain_text/make_tokenizer.py --text train.txt --vocab-size 2048 --output tokenizer
"""

import argparse

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "mask_token": "<|mask|>"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, help="text files in UTF-8")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens, special ones included (default: 2048)")
    parser.add_argument("--output", required=True, help="folder to write")
    args = parser.parse_args()

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train(args.text, vocab_size=args.vocab_size, special_tokens=list(SPECIAL.values()), show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, **SPECIAL).save_pretrained(args.output)


if __name__ == "__main__":
    main()
