# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""Conversations and pairs, under the chat templates and names that people have: what is prompt, and what is learnt."""

import json
import logging

import pytest
from evaluation_models import with_special, word_tokenizer
from tiny import tiny_config

from loopmdm.data import encode_answer, encode_prompt, read_examples, turn_end
from loopmdm.data.chat import read_question
from loopmdm.evaluation import read_texts

WORDS = [
    "<pad>",
    "<unk>",
    "<s>",
    "</s>",
    "<mask>",
    "<eot>",
    "<user>",
    "<assistant>",
    "<system>",
    "<end>",
    "### ",
    "be",
]
WORDS += ["2+2?", "4", "kind", "5", "<tools>", "[/INST]", "[INST]", "User:", "Bot:", ":", "<think>", "</think>"]
USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "be kind"}
ROLES = "{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }} <eot>{% endfor %}"
# LLaDA's opens an assistant's turn whatever it is asked
UNASKED = ROLES + " <assistant>"
ON_REQUEST = ROLES + "{% if add_generation_prompt %} <assistant>{% endif %}"
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %} [INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} </s>{% else %}{{ raise_exception('No system') }}"
    "{% endif %}{% if loop.first and m['role'] == 'assistant' %}{{ raise_exception('The user comes first') }}"
    "{% endif %}{% endfor %}"
)
QWEN = (
    "{% for m in messages %} <{{ m['role'] }}> {% if m['role'] == 'assistant' and loop.last %}<think> </think> "
    "{% endif %}{{ m['content'] }} <eot>\n{% endfor %}{% if add_generation_prompt %} <assistant> {% endif %}"
)
GENERATION = (
    "{% for m in messages %} <{{ m['role'] }}>{% generation %} {{ m['content'] }} <eot>{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def tokenizer_with(template: str | None, special: tuple[str, ...] = (), **tokens: str | None):
    tokenizer = word_tokenizer(WORDS, **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | tokens)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    return tokenizer


def parts(tokenizer, example: dict) -> tuple[str, str]:
    """Prompt and answer as text."""
    encoded = encode_answer(tokenizer, example)
    words, length = tokenizer.convert_ids_to_tokens(encoded["input_ids"]), encoded["prompt_length"]
    return " ".join(words[:length]), " ".join(words[length:])


@pytest.mark.parametrize("special", [(), ("<eot>",), ("<assistant>", "<user>"), ("<eot>", "<assistant>", "<user>")])
@pytest.mark.parametrize(
    ("template", "prompt", "answer", "end"),
    [
        (ON_REQUEST, "<user> 2+2? <eot> <assistant>", "4 <eot>", "<eot>"),
        (UNASKED, "<user> 2+2? <eot> <assistant>", "4 <eot>", "<eot>"),
        ("{{ bos_token }}" + UNASKED, "<s> <user> 2+2? <eot> <assistant>", "4 <eot>", "<eot>"),
        (UNASKED.replace(" <eot>", " <eot>\n"), "<user> 2+2? <eot> <assistant>", "4 <eot>", "<eot>"),
        (GENERATION, "<user> 2+2? <eot> <assistant>", "4 <eot>", "<eot>"),
        (ROLES, "<user> 2+2? <eot>", "<assistant> 4 <eot>", "<eot>"),  # never opened: the model opens it
        (QWEN, "<user> 2+2? <eot> <assistant>", "<think> </think> 4 <eot>", "<eot>"),
        (ROLES.replace("<eot>", "</s> <eot>"), "<user> 2+2? </s> <eot>", "<assistant> 4 </s>", "</s>"),
        (MISTRAL, "<s> [INST] 2+2? [/INST]", "4 </s>", "</s>"),
        ("{% for m in messages %} {{ m['content'] }} <eot>{% endfor %}", "2+2? <eot>", "4 <eot>", "<eot>"),
        ("{% for m in messages %} {{ m['content'] }}\n{% endfor %}", "2+2?", "4", None),
    ],
    ids=str,
)
def test_an_answer_goes_up_to_its_turn_end(template, prompt, answer, end, special):
    tokenizer = tokenizer_with(template, special)
    for content in ("4", "4 4", "5 <user> 2+2?"):
        example = {"messages": [USER, {**ANSWER, "content": content}]}
        assert parts(tokenizer, example) == (prompt, answer.replace("4", content))
    found = turn_end(tokenizer)
    assert (found if found is None else tokenizer.convert_ids_to_tokens(found)) == end


def test_several_special_tokens_end_a_turn_together():
    """Cohere's. What opens another turn unasked does not belong to them."""
    special = ("<end>", "<eot>", "<assistant>")
    tokenizer = tokenizer_with(ON_REQUEST.replace(" <eot>", "<end><eot>"), special)
    assert parts(tokenizer, {"messages": [USER, ANSWER]}) == ("<user> 2+2? <end> <eot> <assistant>", "4 <end> <eot>")
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<eot>")
    first = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('The user comes first') }}{% endif %}"
    unasked = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eot>{% endfor %}<assistant>"
    for template in (unasked, first + unasked):
        tokenizer = tokenizer_with(template, special)
        assert parts(tokenizer, {"messages": [USER, ANSWER]})[1] == "4 <eot>"


@pytest.mark.parametrize("template", [UNASKED, ON_REQUEST])
def test_earlier_turns_are_context(template):
    tokenizer = tokenizer_with(template)
    messages = [SYSTEM, USER, {**ANSWER, "content": "5"}, USER, ANSWER]
    expected = "<system> be kind <eot> <user> 2+2? <eot> <assistant> 5 <eot> <user> 2+2? <eot> <assistant>", "4 <eot>"
    assert parts(tokenizer, {"messages": messages}) == expected
    # TRL's other format says the same; all of a completion is learnt.
    assert parts(tokenizer, {"prompt": messages[:4], "completion": messages[4:]}) == expected
    prompt, answer = parts(tokenizer, {"prompt": messages[:2], "completion": messages[2:]})
    assert prompt == "<system> be kind <eot> <user> 2+2? <eot> <assistant>"
    assert answer == "5 <eot> <user> 2+2? <eot> <assistant> 4 <eot>"


def test_fields_that_data_sets_fill_up_do_not_count():
    template = ON_REQUEST.replace("{{ m['content'] }}", "{{ m['content'] }}{% if m['tool'] is defined %} 5{% endif %}")
    tokenizer = tokenizer_with(template)
    assert parts(tokenizer, {"messages": [{**USER, "tool": None}, ANSWER]})[0] == "<user> 2+2? <eot> <assistant>"


@pytest.mark.parametrize("tools", [[{"name": "kind"}], '[{"name": "kind"}]', None, []])
def test_tools_reach_the_template(tools):
    tokenizer = tokenizer_with("{% if tools %}<tools> {{ tools[0]['name'] }}{% endif %}" + ON_REQUEST)
    prompt, answer = parts(tokenizer, {"messages": [USER, ANSWER], "tools": tools})
    assert prompt == ("<tools> kind " if tools else "") + "<user> 2+2? <eot> <assistant>" and answer == "4 <eot>"


def test_a_prompt_whose_last_token_grows_with_the_answer():
    """What is learnt begins with the tokens that generation would have to make."""
    tokenizer = tokenizer_with(
        "{{ messages[0]['content'] }} Bot:{% if messages|length > 1 %}{{ messages[1]['content'] }}{% endif %}"
    )
    tokenizer.add_tokens(["Bot:4"])
    assert parts(tokenizer, {"messages": [USER, ANSWER]}) == ("2+2? Bot:", "4")


@pytest.mark.parametrize("prompt", ["prompt", "question", "instruction"])
@pytest.mark.parametrize("answer", ["completion", "answer", "response", "output"])
def test_pairs_by_any_name(prompt, answer):
    tokenizer = tokenizer_with(None)
    assert parts(tokenizer, {prompt: "2+2?", answer: "4", "id": 3}) == ("2+2?", "4 </s>")
    assert parts(tokenizer, {prompt: "2+2?", answer: "4 </s>"}) == ("2+2?", "4 </s>")  # no second end
    assert parts(tokenizer, {prompt: "", answer: "4"}) == ("", "4 </s>")
    assert parts(tokenizer, {prompt: "2+2?", answer: ""}) == ("2+2?", "</s>")
    assert parts(tokenizer, {"instruction": "be", "prompt": "2+2?", answer: "4"}) == ("2+2?", "4 </s>")  # the first
    assert parts(tokenizer_with(None, eos_token=None), {prompt: "2+2?", answer: "4"}) == ("2+2?", "4")


@pytest.mark.parametrize(
    ("template", "start"), [("<s> $A </s>", "<s> "), ("$A </s>", ""), ("<s> $A", "<s> "), ("$A", "")]
)
def test_ends_that_tokenizers_add_to_prompts_are_left_out_and_those_of_the_text_stay(template, start):
    tokenizer = with_special(tokenizer_with(None), template)
    for prompt in ("2+2?", "2+2? </s>", "</s>", ""):
        given = (start + prompt).strip()
        assert parts(tokenizer, {"prompt": prompt, "completion": "4"}) == (given, "4 </s>")
        assert tokenizer.decode(encode_prompt(tokenizer, {"prompt": prompt})) == given
    without = with_special(tokenizer_with(None, eos_token=None), template)
    assert encode_prompt(without, {"prompt": "4"}) == without("4")["input_ids"]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"messages": [SYSTEM, USER, ANSWER]}, "the chat template does not take these messages: No system"),
        (
            {"messages": [{"role": "user", "value": "2+2?"}, ANSWER]},
            "message 1 needs `role` and `content`; it has role, v",
        ),
        ({"messages": [ANSWER]}, "has no message before the answer"),
        *(({"messages": bad}, "`messages` must be a list that ends with one") for bad in ([], "2+2?", ["2+2?", "4"])),
        ({"messages": [USER, {"role": "model", "content": "4"}]}, "that ends with one of the role `assistant`"),
        (
            {"messages": [USER, ANSWER], "images": ["a"]},
            "has `images`, which would be lost; the model reads text alone",
        ),
        ({"messages": [USER, ANSWER], "tools": "{"}, "`tools` is not a list, and not valid JSON"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": 1}}, "has `chat_template_kwargs`"),
        ({"prompt": [USER], "completion": "4"}, "`prompt` is a list of messages; the other part must be one too"),
        ({"prompt": "2+2?", "completion": [ANSWER]}, "`completion` is a list of messages"),
        (
            {"prompt": [USER], "completion": []},
            "must be a list of messages that ends with one of the role `assistant`",
        ),
        ({"prompt": ["2+2?"], "completion": [ANSWER]}, "messages must be a list of objects"),
        ({"prompt": [USER], "completion": [USER]}, "ends with one of the role `assistant`"),
        (
            {"conversations": [{"from": "human", "value": "4"}]},
            "has `conversations`, which would be lost; give `messa",
        ),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "has `chosen`, which would be lost; give prompts"),
        ({"instruction": "be", "input": "2+2?", "output": "4"}, "has `input`, which would be lost; write it into the"),
        ({"system": "be kind", "prompt": "2+2?", "completion": "4"}, "has `system`, which would be lost"),
        ({"prompt": "2+2? \ud800", "completion": "4"}, "The tokenizer cannot read Row 3"),
        ({"prompt": "2+2?", "completion": None}, "no text called answer or response or output or completion"),
        ({"prompt": 5, "completion": "4"}, "no text called prompt or question or instruction"),
        ({}, "it has nothing"),
    ],
    ids=str,
)
def test_rows_that_would_be_misread_are_refused(example, message):
    with pytest.raises(ValueError) as error:
        encode_answer(tokenizer_with(MISTRAL), example, "Row 3")
    assert "Row 3" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "2+2?", "completion": "4"},
    ],
    ids=["messages", "lists", "texts"],
)
@pytest.mark.parametrize(
    ("column", "fix"),
    [
        ({"weights": [0, 1]}, "the objective sets the weights itself"),
        ({"loss_mask": [0, 1]}, "say what is learnt with `labels`"),
        ({"position_ids": [0, 1]}, "positions are counted"),
        ({"images": ["a"]}, "the model reads text alone"),
        ({"system": "be kind"}, "write it"),
        ({"system_prompt": "be kind"}, "write it"),
        ({"context": "be kind"}, "write it into the"),
        ({"history": ["be kind"]}, "write it into the"),
        ({"label": False}, "keep only the rows whose label is true"),
    ],
    ids=str,
)
def test_columns_that_would_be_lost_are_refused_in_every_kind_of_row(row, column, fix):
    with pytest.raises(ValueError, match=f"Row 3 has .*`{next(iter(column))}`.*; {fix}"):
        encode_answer(tokenizer_with(ON_REQUEST), row | column, "Row 3")
    empty = {name: type(value)() for name, value in column.items() if value} | {"label": True}
    assert parts(tokenizer_with(ON_REQUEST), row | empty) == parts(tokenizer_with(ON_REQUEST), row)


@pytest.mark.parametrize(
    ("column", "fix"), [({"chosen": "4"}, "give prompts with one"), ({"conversations": [USER]}, "give `messages`")]
)
def test_other_formats_are_refused_unless_there_are_messages(column, fix):
    for row in ({"prompt": [USER], "completion": [ANSWER]}, {"prompt": "2+2?", "completion": "4"}):
        with pytest.raises(ValueError, match=f"`{next(iter(column))}`, which would be lost; {fix}"):
            encode_answer(tokenizer_with(ON_REQUEST), row | column)
    assert parts(tokenizer_with(ON_REQUEST), {"messages": [USER, ANSWER]} | column)[1] == "4 <eot>"


def test_a_system_prompt_in_a_column_is_no_part_of_a_question():
    with pytest.raises(ValueError, match="has `system`, which would be lost; write it as a message of the role `sys"):
        encode_prompt(tokenizer_with(ON_REQUEST), {"messages": [USER], "system": "be kind"})


def test_answers_that_weigh_other_than_others_are_refused():
    tokenizer = tokenizer_with(ON_REQUEST)
    ignored = {**ANSWER, "content": "5", "weight": 0}
    assert parts(tokenizer, {"prompt": [USER], "completion": [{**ANSWER, "weight": 1}]})[1] == "4 <eot>"
    assert parts(tokenizer, {"messages": [USER, ignored, USER, {**ANSWER, "weight": 1}]})[1] == "4 <eot>"
    for row in ({"messages": [USER, ignored]}, {"prompt": [USER], "completion": [ignored, USER, ANSWER]}):
        with pytest.raises(
            ValueError, match="Row 3 has an answer of `weight` 0, which would be learnt in full; leave"
        ):
            encode_answer(tokenizer, row, "Row 3")


@pytest.mark.parametrize(
    ("template", "content", "message"),
    [
        (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} <think>{% endif %}",
            "4",
            "it ends a prompt with ' <think>', but continues with '4' if there is an answer",
        ),
        (
            "{% for m in messages %}{% for part in m['content'] %}{{ part.text }}{% endfor %}{% endfor %}",
            "4",
            "leaves",
        ),
        (ROLES.replace("{{ m['content'] }}", ""), [{"type": "text", "text": "4"}], "`content` is a list of parts"),
        (None, "4", "has no chat template"),
        (
            "{% for m in messages|reverse %}{{ m['content'] + ' ' }}{% endfor %}",
            "4",
            "does not put the answer behind the prompt",
        ),
    ],
    ids=str,
)
def test_templates_that_lose_the_answer_are_named(template, content, message):
    with pytest.raises(ValueError) as error:
        encode_answer(tokenizer_with(template), {"messages": [USER, {**ANSWER, "content": content}]}, "Row 3")
    assert "Row 3" in str(error.value) and message in str(error.value)


def test_calls_of_tools_are_answers():
    body = "{% if m['tool_calls'] %}<tools> {{ m['tool_calls'][0]['function']['name'] }}{% else %}"
    body += "{{ m['content'] }}{% endif %}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "kind"}}]}
    for template in (ON_REQUEST, UNASKED):
        tokenizer = tokenizer_with(template.replace("{{ m['content'] }}", body))
        assert parts(tokenizer, {"messages": [USER, call]}) == ("<user> 2+2? <eot> <assistant>", "<tools> kind <eot>")
    tokenizer.chat_template += "{% if messages[-1]['tool_calls'] %} 5{% endif %}"
    with pytest.raises(ValueError, match="so that it is not clear where the answer ends"):
        encode_answer(tokenizer, {"messages": [USER, call]})


CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "kind"}}]}
# Writes the reasoning of the last turn alone, as Qwen3's does
REASONING = ON_REQUEST.replace(
    "{{ m['content'] }}",
    "{% if loop.last and m['reasoning_content'] %}<think> {{ m['reasoning_content'] }} </think> {% endif %}"
    "{{ m['content'] }}",
)
# Refuses a result of a tool that no call asked for
CALLS = ON_REQUEST.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'tool' and not messages[loop.index0 - 1]['tool_calls'] %}{{ raise_exception('No call') }}"
    "{% endif %}{{ m['content'] }}{% if m['tool_calls'] %}<tools>{% endif %}",
)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [USER, CALL]}, "tool_calls"),
        ({"messages": [USER, CALL, {"role": "tool", "content": "4"}, ANSWER]}, "tool_calls"),
        ({"messages": [USER, {**ANSWER, "content": "5"}, USER, {**ANSWER, **CALL}]}, "tool_calls"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "kind"}]}, "tools"),
        *(
            ({"prompt": [USER], "completion": [{**ANSWER, name: "5"}]}, name)
            for name in ("reasoning", "reasoning_content", "thinking")
        ),
        ({"prompt": [USER], "completion": [{**ANSWER, "thinking": "5"}, USER, ANSWER]}, "thinking"),
    ],
    ids=str,
)
def test_what_a_template_leaves_out_is_refused(row, name):
    with pytest.raises(ValueError, match=f"Row 3 has `{name}`, which the chat template leaves out; give a tokenizer"):
        encode_answer(tokenizer_with(ON_REQUEST), row, "Row 3")


@pytest.mark.parametrize("row", [{"tools": [{"name": "kind"}], "messages": [USER]}, {"messages": [USER, CALL, USER]}])
def test_what_a_template_leaves_out_of_a_question_is_refused(row):
    with pytest.raises(ValueError, match="which the chat template leaves out"):
        encode_prompt(tokenizer_with(ON_REQUEST), row)
    answered = {"messages": [USER, CALL]}  # the answer, which is no part of the question
    assert encode_prompt(tokenizer_with(ON_REQUEST), answered) == [
        WORDS.index(w) for w in ("<user>", "2+2?", "<eot>", "<assistant>")
    ]


def test_templates_may_leave_out_the_reasoning_of_earlier_turns():
    thought = {**ANSWER, "reasoning_content": "5"}
    tokenizer, prompt = tokenizer_with(REASONING), "<user> 2+2? <eot> <assistant>"
    rows = [{"messages": [USER, thought, USER, thought]}, {"messages": [USER, {**thought, "reasoning": "5"}]}]
    for row, context in zip(rows, (f"{prompt} 4 <eot> {prompt}", prompt), strict=True):
        assert parts(tokenizer, row) == (context, "<think> 5 </think> 4 <eot>")
    assert encode_prompt(tokenizer, {"messages": [USER, thought, USER]})
    with pytest.raises(ValueError, match="`reasoning_content`, which the chat template leaves out"):  # it is learnt
        encode_answer(tokenizer, {"prompt": [USER], "completion": [thought, USER, thought]})


# Writes a call behind a special token, as Mistral's and LFM2's do, and the values of its arguments
CONTENT, NAMED = "{{ m['content'] }}", "{{ m['tool_calls'][0]['function']['arguments'].values()|join }}"
SPOKEN = ON_REQUEST.replace(CONTENT, f"{CONTENT}{{% if m['tool_calls'] is defined %}} <tools> {NAMED}{{% endif %}}")


@pytest.mark.parametrize("named", [NAMED, "{{ '' + m['tool_calls'][0]['function']['arguments'] }}"])
@pytest.mark.parametrize("arguments", [{"what": "kind"}, '{"what": "kind"}'])
@pytest.mark.parametrize("is_text", [False, True])
def test_calls_are_given_as_the_template_reads_them(named, arguments, is_text):
    """Objects for most; JSON for DeepSeek's, which puts texts together."""
    tokenizer = tokenizer_with(SPOKEN.replace(NAMED, named), ("kind",))
    calls = [{"type": "function", "function": {"name": "be", "arguments": arguments}}]
    call = {**ANSWER, "tool_calls": json.dumps(calls) if is_text else calls}
    assert parts(tokenizer, {"messages": [USER, call]})[1].startswith("4 <tools>")
    assert "kind" in parts(tokenizer, {"messages": [USER, call]})[1].split()


ARGUMENTS = "m['tool_calls'][0]['function']['arguments']"


@pytest.mark.parametrize(
    "template",
    [
        # Cannot be written without tools
        SPOKEN.replace(NAMED, f"{{{{ {ARGUMENTS} | tojson }}}}")
        + "{% for t in tools %}{% endfor %}{{ tools[0].x.y }}",
        # Python's way to show an object would be taken for JSON
        SPOKEN.replace(NAMED, f"{{{{ {ARGUMENTS} }}}}"),
        # Needs a content
        SPOKEN.replace(NAMED, f"{{{{ m['content'] + {ARGUMENTS} | tojson }}}}"),
    ],
)
@pytest.mark.parametrize("arguments", [{"a": "b"}, '{"a": "b"}'])
@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_arguments_are_written_as_json(template, arguments, content):
    calls = [{"type": "function", "function": {"name": "be", "arguments": arguments}}]
    message = {"role": "assistant", "tool_calls": calls, **content}
    messages = [USER, message, {"role": "tool", "content": "4"}, USER]
    _, text = read_question(
        tokenizer_with(template), messages, "A row", [{"x": {"y": ""}}] if "tools[0]" in template else None
    )
    assert '{"a": "b"}' in text and "{'a'" not in text


@pytest.mark.parametrize("calls", ["[]", "null", "", [], None])
def test_no_calls_are_none_in_every_spelling(calls):
    text = ON_REQUEST.replace(CONTENT, f"{{% if 'tool_calls' in m %}}<tools>{{% else %}}{CONTENT}{{% endif %}}")
    assert parts(tokenizer_with(text), {"messages": [USER, {**ANSWER, "tool_calls": calls}]})[1] == "4 <eot>"


@pytest.mark.parametrize("calls", ["be", {"name": "be"}, True, ["be"]])
def test_calls_that_are_no_list_of_objects_are_refused(calls):
    with pytest.raises(ValueError, match=r"message 2 has `tool_calls` that are .*; give a list of objects"):
        encode_answer(tokenizer_with(SPOKEN), {"messages": [USER, {**ANSWER, "tool_calls": calls}]})


@pytest.mark.parametrize("special", [(), ("<tools>",), ("<tools>", "<eot>")])
@pytest.mark.parametrize("arguments", [{"what": "kind"}, '{"what": "kind"}'])
def test_an_answer_is_learnt_with_its_calls(special, arguments):
    tokenizer = tokenizer_with(SPOKEN, special)
    call = {**ANSWER, "tool_calls": [{"type": "function", "function": {"name": "be", "arguments": arguments}}]}
    assert parts(tokenizer, {"messages": [USER, call]})[1] == "4 <tools> kind <eot>"
    assert parts(tokenizer, {"messages": [USER, {**call, "content": ""}]})[1] == "<tools> kind <eot>"
    assert parts(tokenizer, {"messages": [USER, {**ANSWER, "tool_calls": []}]})[1] == "4 <eot>"
    unless = f"{{% if not m['tool_calls'] %}}{CONTENT}{{% endif %}}"
    silent = tokenizer_with(SPOKEN.replace(CONTENT, unless))
    assert parts(silent, {"messages": [USER, {**call, "content": ""}]})[1] == "<tools> kind <eot>"
    assert parts(silent, {"messages": [USER, {**call, "content": [{"type": "text", "text": ""}]}]})[0]
    with pytest.raises(ValueError, match="has `content`, which the chat template leaves out"):
        encode_answer(silent, {"messages": [USER, call]})


def test_fields_that_say_nothing_are_nothing_lost():
    for field in ({"reasoning_content": "\n\n"}, {"tool_calls": []}, {"thinking": ""}, {"tool_calls": None}):
        assert parts(tokenizer_with(ON_REQUEST), {"messages": [USER, ANSWER | field]})[1] == "4 <eot>"
    none = {"messages": [USER, ANSWER], "tools": "[]"}
    template = "{% if tools is not none %}<tools> {% endif %}" + ON_REQUEST
    assert parts(tokenizer_with(template), none) == ("<user> 2+2? <eot> <assistant>", "4 <eot>")


def test_a_mask_token_in_a_question_is_refused():
    """It would be filled in, and the answer taken from the wrong place."""
    tokenizer = tokenizer_with(ON_REQUEST)
    assert tokenizer.mask_token == "<mask>"
    with pytest.raises(ValueError, match="holds the mask token <mask>, which stands for what is to be"):
        encode_prompt(tokenizer, {"messages": [{**USER, "content": "2+2? <mask>"}]})


def test_a_system_prompt_that_the_messages_begin_with_is_not_lost():
    tokenizer, messages = tokenizer_with(ON_REQUEST), [SYSTEM, USER, ANSWER]
    expected = parts(tokenizer, {"messages": messages})
    assert parts(tokenizer, {"messages": messages, "system_prompt": SYSTEM["content"]}) == expected
    with pytest.raises(ValueError, match="`system_prompt`"):
        encode_answer(tokenizer, {"messages": messages, "system_prompt": "be"})


def test_the_older_format_of_calls_is_refused():
    call = {"role": "assistant", "content": "", "function_call": {"name": "kind", "arguments": "{}"}}
    with pytest.raises(ValueError, match="message 2 has `function_call`; give `tool_calls`"):
        encode_answer(tokenizer_with(ON_REQUEST), {"messages": [USER, call]})
    with pytest.raises(ValueError, match="has `functions`, which would be lost; give them as `tools`"):
        encode_answer(tokenizer_with(ON_REQUEST), {"messages": [USER, ANSWER], "functions": [{"name": "kind"}]})


def test_a_template_that_needs_calls_has_read_them():
    messages = [USER, {**CALL, "content": ""}, {"role": "tool", "content": "4"}, ANSWER]
    assert parts(tokenizer_with(CALLS), {"messages": messages})[1] == "4 <eot>"
    with pytest.raises(ValueError, match="`tools`, which the chat template leaves out"):
        encode_answer(tokenizer_with(CALLS), {"messages": messages, "tools": [{"name": "kind"}]})


def test_contents_of_parts_are_read_by_templates_that_do():
    template = ON_REQUEST.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part.text }}{% endfor %}")
    messages = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in (USER, ANSWER)]
    assert parts(tokenizer_with(template), {"messages": messages}) == ("<user> 2+2? <eot> <assistant>", "4 <eot>")
    assert turn_end(tokenizer_with(template)) == WORDS.index("<eot>")


def test_empty_columns_are_nothing_lost():
    example = {"instruction": "2+2?", "input": "", "output": "4", "system": None, "images": [], "chosen": None}
    assert parts(tokenizer_with(None), example) == ("2+2?", "4 </s>")


# Files of them

CONFIG = tiny_config(vocab_size=64, mask_token_id=4)


def read(path, rows: list[dict], tokenizer=None, length: int = 16, **options) -> list[dict]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_with(MISTRAL) if tokenizer is None else tokenizer
    return list(read_examples([str(path)], tokenizer, CONFIG, "answers", length, **options))


PAIR = {"prompt": "2+2?", "completion": "4"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "2+2?", "completion": "4 <mask>"}, "line 2 holds the mask token (4)"),
        ({"prompt": "<mask>", "completion": "4"}, "line 2 holds the mask token (4)"),
        ({"messages": [SYSTEM, USER, ANSWER]}, "line 2: the chat template does not take these messages: No system"),
        ({"prompt": "2+2? " * 20, "completion": "4"}, "line 2 has 22 tokens, more than `sequence_length` (16)"),
        ({"prompt": "x" * 5000, "completion": "4"}, "line 2 has at least 19 tokens, more than `sequence_length` (16)"),
        ({"text": "2+2?"}, "line 2 has no text called prompt"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError) as error:
        read(tmp_path / "r.jsonl", [PAIR, row])
    assert message in str(error.value) and "r.jsonl" in str(error.value)


def test_an_answer_without_tokens_is_named(tmp_path):
    with pytest.raises(ValueError, match="line 1 has an answer without tokens"):
        read(tmp_path / "r.jsonl", [{**PAIR, "completion": ""}], tokenizer_with(None, eos_token=None))


def test_long_rows_are_left_out_on_request_before_they_are_tokenised(tmp_path, monkeypatch):
    tokenizer, long = tokenizer_with(MISTRAL), "2+2? " * 10**6
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *args, **kwargs: pytest.fail("tokenised"))
    rows = [{"prompt": long, "completion": "4"}, {"messages": [{**USER, "content": long}, ANSWER]}]
    assert read(tmp_path / "r.jsonl", rows, tokenizer, skip_long=True) == []


def test_the_same_is_scored_as_is_learnt(tmp_path):
    rows = [{"messages": [USER, ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}, PAIR, {**PAIR, "messages": None}]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizer_with(UNASKED)
    texts = read_texts(path, tokenizer, CONFIG, task="answers")
    for text, end in zip(texts, ("<eot>", "<eot>", "</s>", "</s>"), strict=True):
        scored = [token for token, is_scored in zip(text.input_ids, text.maskable, strict=True) if is_scored]
        assert tokenizer.convert_ids_to_tokens(scored) == ["4", end]
    assert [text.num_bytes for text in texts] == [None, None, [0, 1, 0], [0, 1, 0]]


def test_columns_without_effect_are_named(tmp_path, caplog):
    rows = [{**PAIR, "id": 1, "source": "x"}, {"messages": [USER, ANSWER], "prompt": "not read", "id": 2}]
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path / "r.jsonl", rows)) == 2
    assert [record.getMessage().partition("r.jsonl")[2] for record in caplog.records] == [
        ": not used: id, source.",
        ": not used: prompt.",
    ]
