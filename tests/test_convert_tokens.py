# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Special tokens of a conversion, and the tokenizer's files in all their spellings."""

import json
from pathlib import Path

import pytest
import torch
from conversion import FIXTURES, REMOVED, convert, edited, load, refuse, save_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from loopmdm.convert import convert_checkpoint

NO_MASK = {"mask_token_id": REMOVED}


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    change(content)
    path.write_text(json.dumps(content))


def check_tokenizer(out: Path, mask_token_id: int, mask_token: str) -> PreTrainedTokenizerFast:
    """Config and tokenizer agree about [MASK], which is not the padding; decoding leaves it out."""
    config, tokenizer = json.loads((out / "config.json").read_text()), AutoTokenizer.from_pretrained(out)
    assert tokenizer.mask_token_id == config["mask_token_id"] == mask_token_id
    assert tokenizer.mask_token == mask_token
    assert mask_token_id not in (config["pad_token_id"], tokenizer.pad_token_id)
    encoded = tokenizer(f"w1 {mask_token} w2")["input_ids"]
    assert encoded == [1, mask_token_id, 2]
    assert tokenizer.decode(encoded, skip_special_tokens=True).split() == ["w1", "w2"]
    return tokenizer


WELL_KNOWN = ("<|mask|>", "<|mdm_mask|>", "<|MASK|>", "[MASK]", "<mask>", "|<MASK>|")


@pytest.mark.parametrize(
    ("config", "tokenizer", "options", "found", "mask"),
    [
        *((NO_MASK, {"extra": ("<a>", name)}, {}, "tokenizer (by name)", (121, name)) for name in WELL_KNOWN),
        (NO_MASK, {"mask": "<hole>"}, {}, "tokenizer", (120, "<hole>")),
        # The config names a token that the tokenizer has, without saying what it is.
        ({}, {"size": 125, "extra": ("<|mdm_mask|>",)}, {}, "config.json", (125, "<|mdm_mask|>")),
        (NO_MASK, {"mask": "<hole>", "extra": ("<b>",)}, {"mask_token_id": 121}, "argument", (121, "<b>")),
        ({}, {"mask": "<hole>"}, {"mask_token_id": 120}, "argument", (120, "<hole>")),
        # The tokenizer lacks the first free id, and gets a token of it.
        ({}, {"size": 125, "pad": "w0", "eos": "w0"}, {}, "config.json", (125, "<|mask|>")),
    ],
)
def test_where_the_mask_token_is_found(src, out, config, tokenizer, options, found, mask):
    edited("llada", src, config=config)
    save_tokenizer(src, **{"size": 120} | tokenizer)
    record = convert_checkpoint(src, out, **options)["special_tokens"]
    assert (record["mask_found"], record["mask_token_id"], record["mask_token"]) == (found, *mask)
    check_tokenizer(out, *mask).save_pretrained(out.with_name("again"))
    assert AutoTokenizer.from_pretrained(out.with_name("again")).mask_token_id == mask[0]


@pytest.mark.parametrize(
    ("name", "expected"), [("illada", 5), ("mdlm_hf", 127), ("radd", 64), ("bd3lm", 63), ("smdm", 128)]
)
def test_mask_by_family(out, name, expected):
    record = convert(name, out)
    assert record["special_tokens"]["mask_token_id"] == expected
    assert record["special_tokens"]["mask_found"] == f"family {record['family']}"


def test_mask_in_added_tokens_alone(src, out):
    """Slow tokenizers keep added tokens in a file of their own (Fast-dLLM v2)."""
    edited("fast_dllm_v2", src)
    save_tokenizer(src, 62)
    (src / "tokenizer_config.json").write_text("{}")
    (src / "added_tokens.json").write_text(json.dumps({"|<MASK>|": 63, "<x>": 62}))
    record = convert_checkpoint(src, out)["special_tokens"]
    assert (record["mask_token_id"], record["mask_token"]) == (63, "|<MASK>|")
    assert AutoTokenizer.from_pretrained(out).mask_token_id == 63


def test_mask_in_a_vocabulary_with_scores(src, out):
    """Unigram tokenizers list pairs of token and score."""
    edited("llada", src, config=NO_MASK)
    tokenizer = Tokenizer(Unigram([("<unk>", 0.0), ("[MASK]", -1.5), ("w1", -2.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(src)
    assert convert_checkpoint(src, out)["special_tokens"]["mask_token_id"] == 1


def test_masks_that_cannot_be_determined(tmp_path, out):
    refuse(FIXTURES / "a2d_qwen3", out, "Neither config nor tokenizer", "--mask-token-id")
    small = edited("llada", tmp_path / "small", config=NO_MASK)
    refuse(small, out, "mask token is 126336 (family llada)", "128 rows", "--mask-token-id")
    contradicted = edited("llada", tmp_path / "contradicted")
    save_tokenizer(contradicted, 120, mask="<hole>")
    refuse(contradicted, out, "125 in config.json", "120 ('<hole>')", "--mask-token-id")
    for index in (-1, 128):
        refuse(FIXTURES / "llada", out, f"mask token is {index} (argument)", mask_token_id=index)


@pytest.mark.parametrize("in_config", [True, False])
def test_pad_equal_to_mask(src, out, in_config):
    edited("llada", src, config={"pad_token_id": 125 if in_config else REMOVED, "eos_token_id": 120})
    save_tokenizer(src, 125, pad="<|mask|>", eos="w120")
    convert_checkpoint(src, out)
    tokenizer = check_tokenizer(out, 125, "<|mask|>")
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == tokenizer.pad_token_id == 120
    ids = tokenizer(["w1 w2 w3", "w4"], return_tensors="pt", padding=True, padding_side="left")
    load(out).generate(**ids, max_new_tokens=2, block_length=2)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        # The tokenizer's, where no config has any
        (dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id")), {}, (7, 8, 9)),
        # The generation config's before the config's
        ({"eos_token_id": 120}, {"eos_token_id": [3, 4], "pad_token_id": 5}, (5, [3, 4], 9)),
        # [MASK] is dropped, and -1, by which Llama's early configs mean none; padding is then an end token.
        ({"pad_token_id": -1, "eos_token_id": [3, 125], "bos_token_id": 125}, {}, (3, 3, None)),
    ],
)
def test_other_special_tokens(src, out, config, generation, expected):
    edited("llada", src, config=config)
    save_tokenizer(src, 126, pad="w7", eos="w8", bos="w9")
    if generation:
        (src / "generation_config.json").write_text(json.dumps(generation))
    record = convert_checkpoint(src, out)["special_tokens"]
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    written = [json.loads((out / file).read_text()) for file in ("config.json", "generation_config.json")]
    for content in (record, *written):
        assert tuple(content.get(name) for name in names) == expected
    assert load(out).generation_config.eos_token_id == expected[1]


TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.mark.parametrize("as_file", [True, False])
def test_chat_templates_are_kept(src, out, as_file):
    edited("llada", src)
    save_tokenizer(src, 126, template=TEMPLATE)
    (src / "chat_template.jinja").unlink(missing_ok=True)
    if as_file:
        (src / "chat_template.jinja").write_text(TEMPLATE)
    edit_json(
        src / "tokenizer_config.json",
        lambda content: content.pop("chat_template", None) if as_file else content.update(chat_template=TEMPLATE),
    )
    convert_checkpoint(src, out)
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    assert AutoTokenizer.from_pretrained(out).apply_chat_template(messages, tokenize=False).split() == ["w1", "w2"]


def test_tokenizers_with_few_files(tmp_path, out):
    """Without a class's name; of tokenizer.json alone; without anything."""
    unnamed = edited("llada", tmp_path / "unnamed")
    save_tokenizer(unnamed, 126, pad="w1")
    edit_json(unnamed / "tokenizer_config.json", lambda content: content.pop("tokenizer_class"))
    convert_checkpoint(unnamed, out)
    assert AutoTokenizer.from_pretrained(out).mask_token_id == 125
    assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"] == [1, 2]
    bare = edited("llada", tmp_path / "bare", config=NO_MASK)
    save_tokenizer(bare, 125, extra=("<|mdm_mask|>",))
    (bare / "tokenizer_config.json").unlink()
    convert_checkpoint(bare, out.with_name("bare"))
    check_tokenizer(out.with_name("bare"), 125, "<|mdm_mask|>")
    record = convert("llada", out.with_name("none"))
    assert record["tokenizer_files"] == []
    assert record["special_tokens"]["mask_token"] is None
    assert not list(out.with_name("none").glob("tokenizer*"))


def test_further_chat_templates_are_kept(src, out):
    edited("llada", src)
    save_tokenizer(src, 126, template={"default": TEMPLATE, "tool_use": "w3"})
    assert (src / "additional_chat_templates").is_dir()
    convert_checkpoint(src, out)
    assert AutoTokenizer.from_pretrained(out).chat_template == {"default": TEMPLATE, "tool_use": "w3"}


@pytest.mark.parametrize(
    "names", [{"mask_token": "w7"}, {"mask_token": {"content": "w7"}, "pad_token": "w7"}], ids=str
)
def test_a_map_of_special_tokens_counts_as_in_transformers(src, out, names):
    """It wins where tokenizer_config.json has no `added_tokens_decoder`, as transformers 5 writes it."""
    edited("llada", src, config=NO_MASK)
    save_tokenizer(src, 126, mask="w5", eos="w9")
    (src / "special_tokens_map.json").write_text(json.dumps(names))
    assert AutoTokenizer.from_pretrained(src).mask_token_id == 7
    convert_checkpoint(src, out)
    assert check_tokenizer(out, 7, "w7").eos_token == "w9"
    convert_checkpoint(src, out.with_name("other"), mask_token_id=5)
    check_tokenizer(out.with_name("other"), 5, "w5")


def test_ends_of_a_map_stay_beside_a_new_mask(src, out):
    edited("llada", src)
    save_tokenizer(src, 125)
    (src / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "w9", "lstrip": False}}))
    convert_checkpoint(src, out)
    assert check_tokenizer(out, 125, "<|mask|>").eos_token == "w9"


@pytest.mark.parametrize("named", [True, False])
def test_a_vocabulary_of_lines(src, out, named):
    """BERT's, in which [MASK] has a name, or takes the first free id."""
    # The class's name may stand in config.json instead, as with older GPT-2s.
    edited(
        "llada", src, config={**(NO_MASK if named else {}), **({"tokenizer_class": "BertTokenizer"} if named else {})}
    )
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]" if named else "w4", *(f"w{i}" for i in range(5, 125))]
    (src / "vocab.txt").write_text("\n".join(words) + "\n")
    settings = {
        "tokenizer_class": "BertTokenizer",
        "added_tokens_decoder": {"0": {"content": "[PAD]", "special": True}},
    }
    settings |= {"mask_token": "[MASK]"} if named else {"mask_token": None}
    if named:
        del settings["tokenizer_class"]
    (src / "tokenizer_config.json").write_text(json.dumps(settings))
    convert_checkpoint(src, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.mask_token_id == json.loads((out / "config.json").read_text())["mask_token_id"]
    assert tokenizer.mask_token_id == (4 if named else 125) and tokenizer("w9")["input_ids"][1] == 9


@pytest.mark.parametrize("added", [("<a>", "<b>"), ()])
def test_a_new_mask_moves_no_added_token(src, out, added):
    """transformers 5 saves some tokenizers without `added_tokens_decoder`, and reads nothing else beside one."""
    edited("llada", src, config={"mask_token_id": 100 + len(added)})
    words = {f"w{i}": i for i in range(100)}
    tokenizer = Qwen2Tokenizer(vocab=words, merges=[], unk_token="w0", pad_token="w1", eos_token="w2")
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.save_pretrained(src)
    edit_json(src / "tokenizer_config.json", lambda content: content.pop("added_tokens_decoder", None))
    before = AutoTokenizer.from_pretrained(src)
    assert before.convert_tokens_to_ids(list(added)) == [100 + i for i in range(len(added))]
    convert_checkpoint(src, out)
    after = AutoTokenizer.from_pretrained(out)
    assert after.mask_token_id == 100 + len(added) and after.mask_token == "<|mask|>"
    assert after.get_vocab() == before.get_vocab() | {"<|mask|>": 100 + len(added)}
    assert set(after.all_special_tokens) == {*before.all_special_tokens, "<|mask|>"}


def test_ids_with_gaps(src, out):
    """A tokenizer would give a new token the number of its tokens, 120, which is an id of another one."""
    edited("llada", src)
    save_tokenizer(src, 125)
    edit_json(src / "tokenizer.json", lambda content: [content["model"]["vocab"].pop(f"w{i}") for i in range(5, 10)])
    convert_checkpoint(src, out)
    assert AutoTokenizer.from_pretrained(out).mask_token_id is None
    assert load(out).config.mask_token_id == 125


def test_a_tokenizer_that_is_shorter_by_more_than_the_mask(src, out):
    """A tokenizer would give a new token the first free id, 100, which is another row than [MASK]'s."""
    edited("llada", src)
    save_tokenizer(src, 100)
    convert_checkpoint(src, out)
    assert AutoTokenizer.from_pretrained(out).mask_token_id is None
    assert load(out).config.mask_token_id == 125


@pytest.mark.parametrize("from_files", [False, True])
def test_ids_that_the_tokenizer_lacks_are_never_generated(src, out, from_files):
    """The embedding has 128 rows; the config's own special tokens count although the tokenizer lacks them."""
    edited("llada", src, config={"mask_token_id": 125, "eos_token_id": 126, "pad_token_id": 127})
    save_tokenizer(src, 110)
    if from_files:  # code of its own is not run, and the files say as much
        edit_json(src / "tokenizer_config.json", lambda content: content.update(EVIL_TOKENIZER))
    convert_checkpoint(src, out)
    model = load(out)
    assert model.generation_config.suppress_tokens == list(range(110, 125))
    drawn = model.generate(torch.tensor([[1, 2]] * 8), max_new_tokens=24, do_sample=True, temperature=50.0)
    assert not set(range(110, 125)) & set(drawn.flatten().tolist())
    assert (drawn >= 126).any() or (drawn >= 100).any()
    plain = edited("llada", src.with_name("without"))
    convert_checkpoint(plain, out.with_name("without"))
    assert load(out.with_name("without")).generation_config.suppress_tokens is None


EVIL_TOKENIZER = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
