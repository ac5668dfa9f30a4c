"""Log-likelihoods under eviction: one parallel pass against decoding token by token, and against lm-eval's own."""

import json
import logging
import random

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from passes import tiny_model

from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.evaluation.lm import EvictionLM
from vkvtrain.evaluation.records import RECORD, records_of
from vkvtrain.evaluation.scoring import Continuation, batches, score
from vkvtrain.events import evictions_by
from vkvtrain.tiny import MODEL_PATH
from vkvtrain.tiny.task import problem

EVICTED = {"policy": "vase_attnv", "budget": 32, "window": 8}


@torch.no_grad()
def decoded(model, config, row, longest):
    """The oracle: the prompt at once, then one token at a time with the evicting cache."""
    tokens, prompt = row.inputs(longest)
    cache = EvictionCache(config, model.config, [row.stream])
    logits = [model(input_ids=torch.tensor([tokens[:prompt]]), past_key_values=cache).logits[0]]
    for token in tokens[prompt:]:
        logits.append(model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0])
    log_probs = torch.cat(logits)[-len(row.target) :].log_softmax(-1)
    chosen = log_probs.gather(-1, torch.tensor(row.target)[:, None]).sum()
    return float(chosen), log_probs.argmax(-1).tolist() == list(row.target), cache.stats()


@pytest.mark.parametrize("policy", ["vase_attnv", "snapkv", "random", "h2o", "keydiff", "streaming"])
def test_scores_equal_decoding(policy):
    """Contexts below, at and above the budget; short and long targets; a rolling window; one cut on the left."""
    model = tiny_model(family="Qwen3")
    config = EvictionConfig(policy=policy, budget=16, window=4, sinks=2)
    rng = random.Random(policy)

    def tokens(count):
        return tuple(rng.randrange(40) for _ in range(count))

    rows = [
        Continuation(tokens(context), tokens(target), (index, 3), prompt)
        for index, (context, target, prompt) in enumerate(
            [(3, 1, None), (5, 40, None), (16, 9, None), (30, 25, None), (1, 50, 1), (20, 30, 1), (60, 17, None)]
        )
    ]
    together = score(model, config, rows, 64)
    assert sum(evictions_by(row.inputs(64)[1], len(row.inputs(64)[0]), 16, 4) > 0 for row in rows) == 6
    for row, (total, greedy) in zip(rows, together, strict=True):
        alone, is_greedy, _ = decoded(model, config, row, 64)
        assert total == pytest.approx(alone, abs=1e-9)
        assert greedy == is_greedy
        assert score(model, config, [row], 64)[0][0] == pytest.approx(total, abs=1e-9)
    full = score(model, EvictionConfig(policy="full"), rows, 64)
    assert full[0] == pytest.approx(together[0], abs=1e-9)  # one target token: nothing is decoded, nothing evicted
    assert all(abs(a[0] - b[0]) > 1e-6 for a, b in zip(full[1:], together[1:], strict=True))


def test_the_greedy_continuation_is_seen_as_such():
    model = tiny_model(family="Llama")
    config = EvictionConfig(policy="snapkv", budget=8, window=4, sinks=1)
    cache = EvictionCache(config, model.config, [7])
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    out = model.generate(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False, eos_token_id=None)
    target = tuple(out[0, 5:].tolist())
    other = (*target[:-1], (target[-1] + 1) % 40)
    rows = [Continuation((3, 1, 4, 1, 5), target, 7), Continuation((3, 1, 4, 1, 5), other, 7)]
    assert [greedy for _, greedy in score(model, config, rows, 100)] == [True, False]


def test_batches_hold_every_row_once_longest_first():
    rows = [Continuation((0,) * length, (0,), 0) for length in (3, 9, 1, 7, 9)]
    assert [[len(rows[place].context) for place in batch] for batch in batches(rows, 2, 100)] == [[9, 9], [7, 3], [1]]


def test_what_cannot_be_scored_is_refused():
    model = tiny_model()
    for row in (Continuation((), (1,), 0), Continuation((1,), (), 0), Continuation((1,), (1,) * 9, 0)):
        with pytest.raises(ValueError, match=r"at most max_length \(8\)"):
            score(model, EvictionConfig(policy="full"), [row], 8)


def lm(batch_size=3, dtype="float64", **arguments):
    return EvictionLM(str(MODEL_PATH), device="cpu", batch_size=batch_size, dtype=dtype, **arguments)


def pairs():
    """Contexts and continuations of the embedded task; one context is empty, one ends in a space."""
    found = [(p.prompt, p.response) for p in (problem("validation", 0, index, 6 + index) for index in range(5))]
    return [*found, ("", "a:3+0=3;b:7+3=0;"), ("a1b2 ", "c3?"), (found[0][0], "<"), (found[0][0], "<think>a")]


def scored(pairs):
    return [Instance("loglikelihood", {}, pair, idx=0, metadata=("tiny", index, 1)) for index, pair in enumerate(pairs)]


def rolling(texts):
    return [
        Instance("loglikelihood_rolling", {}, (text,), idx=0, metadata=("tiny", index, 1))
        for index, text in enumerate(texts)
    ]


TEXTS = ("a1b2c3?", "".join(f"a{i % 10}+{i * 7 % 10}={i * 3 % 10};" for i in range(60)), "", "c")


def test_full_cache_scores_are_lm_evals_own():
    ours, stock = lm(dtype="float32"), HFLM(str(MODEL_PATH), backend="causal", device="cpu", batch_size=3)
    for kind, asked in (("loglikelihood", scored(pairs())), ("loglikelihood_rolling", rolling(TEXTS))):
        stock.add_bos_token = None if kind == "loglikelihood" else False  # its own default scores a second BOS
        expected = getattr(stock, kind)(asked, disable_tqdm=True)
        found = getattr(ours, kind)(asked, disable_tqdm=True)
        if kind == "loglikelihood":
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
            found, expected = [total for total, _ in found], [total for total, _ in expected]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("length", [None, 64])
def test_rolling_windows_equal_decoding(length):
    model = lm(**EVICTED, **({} if length is None else {"max_length": length}))
    found = model.loglikelihood_rolling(asked := rolling(TEXTS), disable_tqdm=True)
    for index, (text, total) in enumerate(zip(TEXTS, found, strict=True)):
        expected, evictions = 0.0, 0
        tokens = model.tok_encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(tokens, model.prefix_token_id, model.max_length, 1)
        for window, (context, target) in enumerate(map(make_disjoint_window, windows)):
            row = Continuation(tuple(context), tuple(target), (index, 0, window), prompt=1)
            one, _, stats = decoded(model.model, model.eviction, row, model.max_length)
            expected += one
            evictions += stats[0]["evictions"]
        assert total == pytest.approx(expected, abs=1e-9)
        records = asked[index].args[1][RECORD] if text else []
        assert sum(record["evictions"] for record in records) == evictions
        assert (evictions > 0) == (len(text) > 100)


def test_requests_are_scored_once_and_recorded():
    """A lagging rank is given its last request again; a repeat draws other noise."""
    model = lm(policy="random", budget=32, window=8)
    one, two = scored(pairs()[:2])
    two.repeats = 2
    found = model.loglikelihood([one, two, two, two], disable_tqdm=True)
    assert found[1] == found[3] != found[2]
    assert [record["stream"] for record in two.args[2][RECORD]] == [[1], [1, 1]]
    assert model.run.scored == 3
    again = lm(policy="random", budget=32, window=8, batch_size=1).loglikelihood(scored(pairs()[:2]), disable_tqdm=True)
    assert [total for total, _ in again] == pytest.approx([found[0][0], found[1][0]], abs=1e-9)


def test_contexts_shorter_than_the_budget_are_loud(caplog):
    model = lm(policy="snapkv", budget=256, window=8)
    with caplog.at_level(logging.WARNING):
        model.loglikelihood(scored(pairs()), disable_tqdm=True)
    assert "NO EVICTION HAPPENED in loglikelihood" in caplog.text
    assert "multiple choice" in caplog.text
    assert "NO EVICTION" in model.get_model_info()["eviction"]["warning"]


def test_thinking_is_refused_where_continuations_are_scored():
    with pytest.raises(ValueError, match="use a task that generates"):
        lm(enable_thinking=True, think_end_token="</think>").loglikelihood(scored(pairs()))


def test_tasks_of_lm_eval_mean_decoding(tmp_path):
    """Multiple choice and perplexity through lm-eval: its aggregates follow from decoding token by token."""
    docs = [problem("validation", 1, index, 10) for index in range(2)]
    rows = [
        {
            "prompt": doc.prompt,
            "choices": [doc.response, doc.response[:-1] + str((int(doc.response[-1]) + 1) % 10)],
            "text": doc.prompt + doc.response,
        }
        for doc in docs
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
    (tmp_path / "choice.yaml").write_text(
        common + "task: choice\noutput_type: multiple_choice\ndoc_to_text: prompt\ndoc_to_choice: choices\n"
        "target_delimiter: ''\ndoc_to_target: 0\n"
    )
    (tmp_path / "rolled.yaml").write_text(
        common + "task: rolled\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    )
    model = lm(**EVICTED)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    out = lm_eval.simple_evaluate(
        model=model, tasks=["choice", "rolled"], task_manager=manager, bootstrap_iters=0, random_seed=0
    )
    right, nats, count = 0, 0.0, 0
    for index, row in enumerate(rows):
        context = tuple(model.tok_encode(row["prompt"]))
        totals = []
        for choice in row["choices"]:
            target = tuple(model.tok_encode(row["prompt"] + choice)[len(context) :])
            one = decoded(model.model, model.eviction, Continuation(context, target, index), model.max_length)
            totals.append(one[0])
        right += totals[0] > totals[1]
        sample = out["samples"]["choice"][index]
        assert [float(resp[0][0][0]) for resp in zip(sample["resps"], strict=True)] == pytest.approx(totals, abs=1e-9)
        target = tuple(model.tok_encode(row["text"], add_special_tokens=False))
        one = decoded(
            model.model, model.eviction, Continuation((model.prefix_token_id,), target, index, 1), model.max_length
        )
        nats, count = nats + one[0], count + len(row["text"].encode())
    assert out["results"]["choice"]["acc,none"] == right / len(rows)
    assert out["results"]["rolled"]["byte_perplexity,none"] == pytest.approx(float(torch.tensor(-nats / count).exp()))
    evictions = out["config"]["eviction"]["by_kind"]
    assert evictions["loglikelihood"] > 0
    assert evictions["loglikelihood_rolling"] > 0
    logged = {**out["samples"]["choice"][0]}
    logged["arguments"] = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(argument)}
        for i, argument in enumerate(logged["arguments"])
    }
    assert [record["evictions"] > 0 for record in records_of(logged)] == [True, True]
