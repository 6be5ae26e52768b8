# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""NELBO of several models at several numbers of loops, on rows spread over text files, as in this folder's README.

python examples/heal_converted/evaluate.py --models converted healed plain --text train.txt test.txt
"""

import argparse

import torch
from transformers import AutoTokenizer

from loopmdm import LoopMDMForMaskedLM
from loopmdm.data import pack_documents, read_documents, spread
from loopmdm.evaluation import nelbo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders of models that share a tokenizer")
    parser.add_argument("--tokenizer", help="folder of the tokenizer (default: the first model's)")
    parser.add_argument("--text", nargs="+", required=True, help="text files in UTF-8")
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--samples", type=int, default=8, help="masks per row")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.models[0])
    texts = {}
    for path in args.text:
        paragraphs = read_documents(path, "\n\n")  # as the README's figures do, which take a line of spaces for text
        encoded = (tokenizer(text, add_special_tokens=False, verbose=False) for text in paragraphs)
        documents = (one["input_ids"] for one in encoded)
        rows = [row["input_ids"] for row in pack_documents(documents, args.length, tokenizer.eos_token_id)]
        texts[path] = torch.stack(spread([row for row in rows if len(row) == args.length], args.rows))
    for folder in args.models:
        model = LoopMDMForMaskedLM.from_pretrained(folder)
        for path, input_ids in texts.items():
            estimate = nelbo(model, input_ids, num_loops=args.loops, num_samples=args.samples, batch_size=64)
            values = zip(args.loops, *(part.tolist() for part in estimate.per_token()), strict=True)
            found = ", ".join(f"{loops}: {mean:.3f} ± {error:.3f}" for loops, mean, error in values)
            print(f"{folder} on {path}: {found}", flush=True)


if __name__ == "__main__":
    main()
