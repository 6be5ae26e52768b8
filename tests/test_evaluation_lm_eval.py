# Copyright 2026 The LoopMDM authors. Licensed under the Apache License, Version 2.0.
"""The lm-eval adapter, end to end on local tasks with tiny models, offline."""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import run
from evaluation_models import save_judge, save_looped
from processes import as_rank, start

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from loopmdm.evaluation import nelbo  # noqa: E402
from loopmdm.evaluation.lm_eval_model import LoopMDMEvalModel, main  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DOCS = [
    {"question": "w1 w2 w3", "choices": ["w4 w5", "w6 w7 w8", "w9"], "label": 1},
    {"question": "w9 w8", "choices": ["w1 w1", "w2 w3", "w5 w6"], "label": 0},
    {"question": "w20", "choices": ["w21", "w22", "w23"], "label": 2},
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Data sets are cached here, and nothing is looked for on the network."""
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_looped(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lm(folder):
    return LoopMDMEvalModel(folder, num_loops=2, num_samples=8, batch_size=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of local tasks, one of each kind of request."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [doc | {"text": f"{doc['question']} {doc['choices'][0]} " + "w3 w4 " * 40} for doc in DOCS]
    (path / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    definitions = {
        "choose": {"output_type": "multiple_choice", "doc_to_target": "label", "doc_to_choice": "choices"}
        | {"metric_list": accuracy},
        "go_on": {
            "output_type": "generate_until",
            "doc_to_target": "w1",
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"until": ["w7"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0},
        },
        "roll": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }
    for name, values in definitions.items():
        (path / f"{name}.yaml").write_text(yaml.safe_dump(common | {"task": name} | values))
    return path


def evaluated(tasks: Path, *names: str, **options) -> dict | None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(tasks=list(names), task_manager=manager, bootstrap_iters=0, **options)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def scores(lm, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    """Of continuations as lm-eval gives them: with the white space that stands before them."""
    pairs = [(context, f" {text}" if context else text) for context, text in pairs]
    return lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def direct(lm, context: str, continuation: str, num_samples: int = 8) -> float:
    """Minus the NELBO of a continuation, from `nelbo` itself."""
    given = lm.tokenizer(context)["input_ids"] if context else []
    ids = torch.tensor([given + lm.tokenizer(continuation)["input_ids"]])
    maskable = torch.arange(ids.shape[1])[None] >= len(given)
    estimate = nelbo(lm.model, ids, maskable=maskable, num_loops=lm.num_loops, num_samples=num_samples)
    return -estimate.nats.item()


def test_likelihood_is_minus_the_nelbo(lm):
    pairs = [("w1 w2", "w3 w4 w5"), ("w9", "w8"), ("", "w1 w2 w3"), ("w1 w2 w3 w4", "w5 w6 w7")]
    found = scores(lm, *pairs)
    for pair, (score, _) in zip(pairs, found, strict=True):
        assert score == pytest.approx(direct(lm, *pair), rel=1e-5)
    # Neither the other requests nor their order matter.
    assert scores(lm, pairs[3])[0][0] == pytest.approx(found[3][0], rel=1e-5)


def test_an_empty_continuation_is_certain_and_stops_nothing(lm):
    pairs = [("w1 w2", ""), ("w1 w2", "w3 w4"), ("", ""), ("", "w3")]
    found = scores(lm, *pairs)
    assert found[0] == found[2] == (0.0, True)
    assert [found[1], found[3]] == scores(lm, pairs[1], pairs[3])
    assert scores(lm, ("w1", "")) == [(0.0, True)]


def test_one_token_is_scored_exactly(lm):
    ((score, _),) = scores(lm, ("w1 w2", "w3"))
    ids = torch.tensor([[4, 5, 2]])
    logits = lm.model(ids, num_loops=2).logits[0, 2].double()
    logits[2] = -torch.inf
    assert score == pytest.approx(logits.log_softmax(-1)[6].item(), rel=1e-5)


@pytest.mark.parametrize("overrides", [{}, {"attention_block_size": 2}], ids=str)
def test_greedy_is_what_the_model_fills_in_token_by_token(tmp_path, overrides):
    lm = LoopMDMEvalModel(save_looped(tmp_path / "model", **overrides), num_loops=3, num_samples=2)
    contexts = [f"w{i} w{i + 1} w{2 * i} w3" for i in range(8)]
    pairs, expected = [], []
    for context in contexts:
        ids = torch.tensor([lm.tokenizer(context)["input_ids"]])
        filled = lm.model.generate(ids, max_new_tokens=3, num_loops=3, eos_token_id=[])[0, ids.shape[1] :]
        words = lm.tokenizer.convert_ids_to_tokens(filled.tolist())
        pairs += [(context, " ".join(words)), (context, " ".join(["w5", *words[1:]]))]
        expected += [True, words[0] == "w5"]
    assert [is_greedy for _, is_greedy in scores(lm, *pairs)] == expected
    assert not all(expected)


def test_long_contexts_lose_their_beginning(lm):
    words = [f"w{i % 29}" for i in range(80)]
    score = scores(lm, (" ".join(words), "w3 w4"))[0][0]
    assert score == pytest.approx(scores(lm, (" ".join(words[-62:]), "w3 w4"))[0][0], rel=1e-5)
    with pytest.raises(ValueError, match=r"has 65 tokens; it must have 1 to `max_length` \(64\)"):
        scores(lm, ("w1", "w2 " * 65))


def test_rolling_likelihood_adds_up_windows(folder):
    lm = LoopMDMEvalModel(folder, num_loops=2, num_samples=8, max_length=4, stride=3)
    words = [f"w{i * 5 % 29}" for i in range(8)]
    (total,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (" ".join(words),)), disable_tqdm=True)
    ids = lm.tokenizer(" ".join(words))["input_ids"]
    expected = 0.0
    for begin, fresh, end in ((0, 0, 4), (3, 4, 7), (6, 7, 8)):
        window = torch.tensor([ids[begin:end]])
        maskable = torch.arange(begin, end)[None] >= fresh
        settings = {"num_loops": 2, "num_samples": 8 if end - fresh > 1 else 2, "indices": [str(ids[begin:end])]}
        expected -= nelbo(lm.model, window, maskable=maskable, **settings).nats.item()
    assert total == pytest.approx(expected, rel=1e-5)


def test_rolling_likelihoods_of_several_texts_have_errors_of_their_own(lm, monkeypatch):
    """Two texts that differ in one token have nearly the same costs: on the same masks, they would err alike."""
    monkeypatch.setattr(lm, "num_samples", 2)
    words = [f"w{i * 5 % 29}" for i in range(8)]
    texts = [(" ".join(words),), (" ".join([*words[:-1], "w3"]),)]
    found = []
    for seed in range(16):
        monkeypatch.setattr(lm, "seed", seed)
        found.append(lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True))
        (alone,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts[1]), disable_tqdm=True)
        assert found[-1][1] == pytest.approx(alone, rel=1e-5), "other texts do not matter"
    assert torch.tensor(found).T.corrcoef()[0, 1] < 0.7


def generated(lm, *prompts: str, **arguments) -> list[str]:
    return lm.generate_until(requests("generate_until", *((p, arguments) for p in prompts)), disable_tqdm=True)


def test_generation_is_that_of_generate(lm):
    prompts = ["w1 w2", "w5", "w9 w8 w7 w6"]
    found = generated(lm, *prompts, max_gen_toks=5, do_sample=False, temperature=0.0)
    for prompt, text in zip(prompts, found, strict=True):
        ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
        row = lm.model.generate(ids, max_new_tokens=5, num_loops=2)[0, ids.shape[1] :].tolist()
        row = row[: row.index(1)] if 1 in row else row
        assert text == lm.tokenizer.decode(row, skip_special_tokens=True)
        assert text


def test_a_learnt_turn_end_is_not_part_of_an_answer(lm, monkeypatch):
    whole = generated(lm, "w1 w2", max_gen_toks=8)[0].split()
    end = next(i for i, word in enumerate(whole) if word not in whole[:i] and i > 0)
    turn_end = lm.tokenizer.convert_tokens_to_ids(whole[end])
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", [1, turn_end])
    assert generated(lm, "w1 w2", max_gen_toks=8)[0].split() == whole[:end]


def test_generation_stops_at_until(lm):
    whole = generated(lm, "w1 w2", max_gen_toks=8)[0].split()
    assert len(whole) > 3
    assert generated(lm, "w1 w2", max_gen_toks=8, until=[whole[2], "never"])[0].split() == whole[:2]
    assert generated(lm, "w1 w2", max_gen_toks=8, until=whole[0])[0] == ""
    assert generated(lm, "w1 w2", max_gen_toks=8, until=["never"])[0].split() == whole


def test_with_blocks_generation_ends_after_the_block_that_holds_until(lm, monkeypatch):
    passes = []
    forward = type(lm.model.model).forward
    monkeypatch.setattr(type(lm.model.model), "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    settings = {"max_gen_toks": 12, "block_length": 3, "max_denoising_steps": 1}
    whole = generated(lm, "w1 w2", **settings)[0].split()
    assert len(passes) == 4 and len(whole) > 3
    passes.clear()
    assert generated(lm, "w1 w2", **settings, until=[whole[1]])[0].split() == whole[:1]
    assert len(passes) == 1
    longer = f"w1 w2 w3 w4 {whole[1]}"  # a prompt may contain such a text
    first = generated(lm, longer, **settings)[0].split()[0]
    passes.clear()
    short, _ = generated(lm, "w1 w2", longer, **settings, until=[whole[1], first])
    assert len(passes) == 1 and short.split() == whole[:1]
    assert generated(lm, "w1 w2", **settings, until=[""])[0].split() == whole, "an empty text stops nothing"


def test_arguments_of_the_model_and_of_the_task(folder):
    lm = LoopMDMEvalModel(folder, num_loops=1, max_gen_toks=4, max_denoising_steps=1, unmasking="entropy")
    calls = []
    generate = lm.model.generate
    lm.model.generate = lambda **k: calls.append(k) or generate(**k)
    generated(lm, "w1", until=["x"], max_denoising_steps=2, do_sample=True, temperature=0.7)
    generated(lm, "w1", do_sample=False, temperature=1.0, top_p=0.9)
    assert (calls[0]["unmasking"], calls[0]["max_denoising_steps"], calls[0]["temperature"]) == ("entropy", 2, 0.7)
    assert calls[0]["num_loops"] == 1 and calls[0]["max_new_tokens"] == 4
    assert calls[1]["max_denoising_steps"] == 1 and not {"temperature", "top_p"} & set(calls[1])


def test_a_prompt_asked_twice_gets_two_samples(lm):
    first, second = generated(lm, "w1", "w1", max_gen_toks=8, do_sample=True)
    assert first != second
    assert generated(lm, "w1", "w1", max_gen_toks=8, do_sample=True) == [first, second]


def test_chat_templates(lm):
    chat = [{"role": "user", "content": "w5"}]
    assert lm.apply_chat_template(chat) == "w0 w5 w0 "
    assert lm.apply_chat_template([*chat, {"role": "assistant", "content": "w6"}], add_generation_prompt=False)
    assert lm.chat_template(True) == lm.tokenizer.chat_template
    assert "model" in lm.tokenizer_name and "/" not in lm.tokenizer_name


def test_simple_evaluate_runs_local_tasks(folder, lm, tasks):
    arguments = {"pretrained": folder, "num_loops": 2, "num_samples": 8}
    results = evaluated(tasks, "choose", "go_on", "roll", model="loopmdm", model_args=arguments, batch_size=4)
    # The choice of the highest likelihood, as `nelbo` itself ranks them
    right = 0
    for doc in DOCS:
        ranks = [direct(lm, doc["question"], choice, 2 if " " not in choice else 8) for choice in doc["choices"]]
        right += ranks.index(max(ranks)) == doc["label"]
    assert results["results"]["choose"]["acc,none"] == pytest.approx(right / 3)
    texts = [sample["resps"][0][0] for sample in results["samples"]["go_on"]]
    assert len(texts) == 3 and all("w7" not in text for text in texts)
    rolled = json.loads((tasks / "docs.jsonl").read_text().splitlines()[0])["text"]
    (total,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (rolled,)), disable_tqdm=True)
    assert results["samples"]["roll"][0]["resps"][0][0] == pytest.approx(total, rel=1e-5)
    settings = results["config"]
    assert (settings["num_loops"], settings["num_samples"], settings["seed"]) == (2, 8, 0)
    assert settings["model_num_parameters"] == lm.model.num_parameters() and "loopmdm_version" in settings


def test_chats_reach_the_model(folder, tasks):
    arguments = f"pretrained={folder},num_loops=1,num_samples=2"
    results = evaluated(tasks, "go_on", model="loopmdm", model_args=arguments, apply_chat_template=True)
    assert results["samples"]["go_on"][0]["arguments"][0][0] == "w0 w1 w2 w3 w0 "


def work(rank: int, port: int, folder: str, tasks: Path, output: Path) -> None:
    """A process of two, as torchrun starts them."""
    as_rank(rank, 2, port)
    lm = LoopMDMEvalModel(folder, num_loops=2, num_samples=8, batch_size=4, device="cpu")
    results = evaluated(tasks, "choose", "go_on", model=lm)
    assert (lm.rank, lm.world_size) == (rank, 2) and (results is None) == (rank > 0)
    if rank == 0:
        output.write_text(json.dumps({name: results[name] for name in ("results", "samples")}, default=str))


def test_several_processes_share_the_work(folder, lm, tasks, tmp_path):
    """Two processes give the results of one."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    started = [start(work, rank, port, folder, tasks, tmp_path / "two.json") for rank in range(2)]
    for process in started:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in started] == [0, 0]
    found, alone = json.loads((tmp_path / "two.json").read_text()), evaluated(tasks, "choose", "go_on", model=lm)
    assert found["results"]["choose"]["acc,none"] == alone["results"]["choose"]["acc,none"]
    texts, expected = (
        {sample["doc_id"]: sample["resps"][0][0] for sample in results["samples"]["go_on"]}
        for results in (found, alone)
    )
    assert texts == expected and len(texts) == 3


def test_gsm8k_from_local_files(folder, tmp_path, monkeypatch):
    """The example's task, on data of its own form."""
    rows = [{"question": f"w{i} w2 ?", "answer": f"w{i} is <<1+{i}={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(6)]
    (tmp_path / "gsm8k").mkdir()
    for name, part in (("train", rows[:4]), ("test", rows[4:])):
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    monkeypatch.chdir(tmp_path)
    answers = iter(["it is 5 .", "none"])
    monkeypatch.setattr(LoopMDMEvalModel, "_generate", lambda self, contexts, *a: [next(answers) for _ in contexts])
    files = ",".join(f"{name}=gsm8k/{name}.jsonl" for name in ("train", "test"))
    options = ["--include-path", ROOT / "examples" / "gsm8k", "--data-files", files, "--num-fewshot", 2]
    options += ["--max-gen-toks", 8, "--generate", "max_denoising_steps=2", "--output", "out"]
    run("eval", "lm-eval", folder, "--tasks", "gsm8k_local", *options)
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    values = {row["metric"]: row["value"] for row in record["results"]}
    assert values == {"exact_match": 0.5, "answered": 0.5}
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    prompt = samples[0]["arguments"][0][0]
    assert prompt.endswith("Question: w4 w2 ?\nAnswer:") and prompt.count("#### ") == 2
    assert record["protocol"]["data_test"]["sha256"]["test.jsonl"]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_loops": 0}, "`num_loops` is 0"),
        ({"num_samples": 3}, "`num_samples` is 3; it must be even"),
        ({"batch_size": "auto"}, "`batch_size` is 'auto'; give an integer"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"max_length": 65}, "`max_length` is 65; the model takes 1 to 64"),
        ({"stride": 65}, "stride is 65"),
        ({"max_gen_toks": 0}, "`max_gen_toks` is 0"),
        ({"add_bos_token": True}, "the tokenizer has no start token"),
        ({"unmasking": "best"}, "`unmasking` is 'best'"),
        ({"num_beams": 2}, "`generate` takes no argument `num_beams`"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        LoopMDMEvalModel(folder, **arguments)


def test_bad_generation_arguments_are_named_before_anything_runs(lm, monkeypatch):
    monkeypatch.setattr(lm.model, "generate", lambda **k: pytest.fail("generated"))
    good = ("w1", {"max_gen_toks": 4})
    for arguments, message in (
        ({"max_gen_toks": 64}, "`max_gen_toks` is 64"),
        ({"max_gen_toks": 2, "beams": 2}, "no argument `beams`"),
        ({"do_sample": True, "temperature": 0.0}, "`do_sample` is true, and `temperature` 0, which is greedy"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.generate_until(requests("generate_until", good, ("w1", arguments)), disable_tqdm=True)


def test_other_models_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a 'llama' model, not a LoopMDM"):
        LoopMDMEvalModel(save_judge(tmp_path / "judge"))


@pytest.mark.parametrize("options", [["--model", "hf"], ["-Mhf"], ["--model_args", "pretrained=looped"]], ids=str)
def test_lm_evals_command_says_why_not_hf(monkeypatch, capsys, options):
    """Which is also what it takes if no model type is named."""
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: pytest.fail("too late"))
    monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *options, "--tasks", "x"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert "scores a text as a causal language model does" in capsys.readouterr().err


def test_lm_evals_command_knows_the_model(monkeypatch):
    from lm_eval.api.registry import get_model

    calls = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: calls.append(get_model("loopmdm")))
    for argv in (["lm_eval", "--model", "loopmdm", "--tasks", "x"], ["lm_eval", "run", "--model=loopmdm"]):
        monkeypatch.setattr(sys, "argv", argv)
        main()
    assert calls == [LoopMDMEvalModel] * 2


def test_lm_evals_default_device_is_the_cpu_without_a_gpu(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LoopMDMEvalModel(folder, device="cuda:0").device.type == "cpu"
    with pytest.raises(ValueError, match="cuda:1"):
        LoopMDMEvalModel(folder, device="cuda:1")
