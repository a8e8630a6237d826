"""lm-evaluation-harness: the pool against the harness's own transformers model; loading, by models that are a rule."""

from __future__ import annotations

import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from bench.metrics.harness import HarnessScores, pool_model, run_harness
from bench.metrics.values import Missing
from scoring.cluster import Footprint
from scoring.errors import UserError
from scoring.pool import ReplicaPool
from scoring.readings import Reader
from scoring.samples import Sample
from scoring.templates import chosen_template
from scoring.work import LocalPool, ReplicaSpec
from tests.paths import SHARED
from tests.tiny_folders import CONTEXT, EOS, WORDS, save_model, tokenizer, write_jsonl
from tests.tiny_models import VOCABULARY, random_samples, tiny_model

pytest.importorskip("lm_eval")

STORIES = SHARED / "models" / "stories260K-hf"
needs_shared = pytest.mark.skipif(not STORIES.is_dir(), reason="development data are not here")

CHOICE = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 7},
}
ROLLING = {
    "dataset_path": "json",
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{page}}",
    "metric_list": [{"metric": "word_perplexity"}],
}


@pytest.fixture(scope="module", autouse=True)
def dataset_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the data library caches is gone with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def task_file(folder: Path, name: str, records: list[dict[str, Any]], base: dict[str, Any], **changes: Any) -> None:
    data = write_jsonl(folder / f"{name}.jsonl", records)
    config = {"task": name, **base, "dataset_kwargs": {"data_files": {"test": str(data)}}, **changes}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def words(rng: random.Random, shortest: int, longest: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(shortest, longest)))


def questions(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Contexts from none to longer than the window; choices of one token and of several, some of them alike."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        longest = 1 if number % 2 else 6
        choices = [words(rng, 1, longest) for _ in range(4)]
        choices[3] = choices[0] if number % 5 == 0 else choices[3]
        question = words(rng, *((0, 0) if number % 8 == 0 else (58, 90) if number % 3 == 0 else (1, 20)))
        records.append({"question": question, "choices": choices, "answer": rng.randrange(3)})
    return records


def instance(kind: Any, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def theirs(folder: Path) -> Any:
    """The harness's own model."""
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=16)


def their_results(lm: Any, folder: Path, names: list[str], limit: int | None = None, **how: Any) -> Any:
    """The harness by itself: its loading, its evaluation, its aggregates."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=folder, include_defaults=False).load(names)
    return evaluate(lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=0, log_samples=True, **how)


@pytest.fixture(scope="module")
def pair(cluster, model_folder) -> Iterator[tuple[Any, Any]]:
    """The tiny model: on the pool, and the harness's own."""
    with ReplicaPool(ReplicaSpec(str(model_folder)), Footprint(cpus=1), 2) as pool:
        ours = pool_model(Reader(pool, EOS, batch_tokens=512), AutoTokenizer.from_pretrained(model_folder), CONTEXT)
        yield ours, theirs(model_folder)


def assert_same_loglikelihoods(pair: tuple[Any, Any], requests: list[Any]) -> None:
    ours, own = (lm.loglikelihood(requests, disable_tqdm=True) for lm in pair)
    np.testing.assert_allclose([value for value, _ in ours], [value for value, _ in own], rtol=2e-5, atol=2e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in own]


def test_loglikelihoods_are_those_of_the_harness(pair):
    requests = [
        instance("loglikelihood", record["question"], f" {choice}")
        for record in questions(40)
        for choice in record["choices"]
    ]
    lengths = [len(f"{question}{choice}".split()) for question, choice in (each.args for each in requests)]
    assert min(lengths) == 1
    assert max(lengths) > CONTEXT + 1
    # The window's ends: one token is predicted without being read.
    requests += [instance("loglikelihood", " ".join(WORDS[:n]), " w3 w5") for n in range(CONTEXT - 3, CONTEXT + 3)]
    # Spaces at the end of a context, a context that has its BOS token, a text that begins with it, a full window.
    requests += [
        instance("loglikelihood", *each)
        for each in (
            ("w1 w2  ", "w3"),
            ("<s> w1 w2", " w3 w4"),
            ("", "<s> w7 w8"),
            ("", "</s> w7"),
            ("w1", " " + " ".join(["w2"] * CONTEXT)),
        )
    ]
    # What the model would say, so that some are greedy.
    written = pair[0].generate_until([instance("generate_until", "w1 w2", {"until": [], "max_gen_toks": 3})])
    requests += [instance("loglikelihood", "w1 w2", f" {written[0]}")]
    assert pair[0].loglikelihood(requests[-1:])[0][1]
    assert_same_loglikelihoods(pair, requests)


def test_loglikelihoods_with_bos_added(cluster, model_folder, pair):
    from lm_eval.models.huggingface import HFLM

    # A tokenizer that puts BOS first, as Llama's does.
    from tokenizers.processors import TemplateProcessing

    adds = tokenizer()
    adds.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    requests = [
        instance("loglikelihood", *each)
        for each in (("w1 w2", " w3"), ("", " w3 w4"), ("<s> w1", " w2"), ("w1 w2 ", "w3"), (" ".join(WORDS), " w1"))
    ]
    ours = [pool_model(pair[0]._reader, adds, CONTEXT, bos) for bos in (None, False, True)]
    own = [
        HFLM(pretrained=pair[1].model, tokenizer=adds, max_length=CONTEXT, batch_size=4, add_bos_token=bos)
        for bos in (None, False, True)
    ]
    for mine, other in zip(ours, own, strict=True):
        assert_same_loglikelihoods((mine, other), requests)
    assert ours[0].loglikelihood(requests)[0] != ours[1].loglikelihood(requests)[0]
    texts = [instance("loglikelihood_rolling", text) for text in ("w1 w2 w3", " ".join(WORDS))]
    np.testing.assert_allclose(
        ours[0].loglikelihood_rolling(texts), own[0].loglikelihood_rolling(texts, disable_tqdm=True), rtol=1e-5
    )


def test_rolling_loglikelihoods_are_those_of_the_harness(pair):
    rng = random.Random(3)
    lengths = (0, 1, 2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 2 * CONTEXT + 1, 300)
    requests = [instance("loglikelihood_rolling", words(rng, n, n)) for n in lengths]
    ours, own = (lm.loglikelihood_rolling(requests, disable_tqdm=True) for lm in pair)
    np.testing.assert_allclose(ours, own, rtol=1e-5)


def test_accuracy_and_perplexity_of_tasks(pair, tmp_path):
    rng = random.Random(5)
    task_file(tmp_path, "first", questions(30, 1), CHOICE)
    task_file(tmp_path, "second", questions(20, 2), CHOICE)
    task_file(tmp_path, "book", [{"page": words(rng, 5, 200)} for _ in range(12)], ROLLING)
    wanted: dict[str, Any] = {"both": ["first", "second"], "one": ["second"], "book": ["book"]}
    ours = run_harness(pair[0], wanted, tmp_path)
    own = their_results(pair[1], tmp_path, ["first", "second", "book"])
    both, one, book = (ours[name] for name in wanted)
    for scores, names in ((both, ("first", "second")), (one, ("second",))):
        assert isinstance(scores, HarnessScores)
        records = [(name, record) for name in names for record in own["samples"][name]]
        assert scores.ids == [f"{name}/{record['doc_id']}" for name, record in records]
        assert scores.values.tolist() == [record["acc"] for _, record in records]
        assert 0 < scores.values.mean() < 1
        assert scores.weights.tolist() == [1.0] * len(records)
        assert scores.metric == "acc"
        assert scores.tasks == {name: {"version": 7, "n": {"first": 30, "second": 20}[name]} for name in names}
    assert isinstance(book, HarnessScores)
    assert book.metric == "word_perplexity"
    expected = own["results"]["book"]["word_perplexity,none"]
    assert math.exp(-book.values.sum() / book.weights.sum()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@needs_shared
def test_a_real_model_on_real_questions(tmp_path):
    def records(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (SHARED / "eval" / name).read_text(encoding="utf-8").splitlines()]

    target = "{{choices.label.index(answerKey)}}"
    shape = {"doc_to_choice": "{{choices.text}}", "doc_to_target": target}
    arc, book = records("arc/ARC-Easy-validation.jsonl"), records("openbookqa/validation.jsonl")
    letters = {"doc_to_choice": ["A", "B", "C", "D"], "doc_to_text": "{{question}}\nA B C D\nAnswer:"}
    four = [record for record in arc if record["choices"]["label"] == ["A", "B", "C", "D"]]
    lines = (SHARED / "eval" / "wikitext" / "wiki.test.raw").read_text(encoding="utf-8").split("\n")
    task_file(tmp_path, "arc", arc[:50], CHOICE, doc_to_text="Question: {{question}}\nAnswer:", **shape)
    task_file(tmp_path, "book", book[:50], CHOICE, doc_to_text="question_stem", **shape)
    task_file(tmp_path, "letters", four[:50], CHOICE, **{**shape, **letters})
    task_file(tmp_path, "wiki", [{"page": " \n".join(lines[n : n + 12])} for n in (0, 12, 24)], ROLLING)
    names = ["arc", "book", "letters", "wiki"]
    with LocalPool(ReplicaSpec(str(STORIES))) as pool:
        lm = pool_model(Reader(pool, 2), AutoTokenizer.from_pretrained(STORIES), 512)
        ours = run_harness(lm, {name: [name] for name in names}, tmp_path)
        hflm = theirs(STORIES)
        own = their_results(hflm, tmp_path, names)
        prompts = ["Once upon a time, there was a", "Lily and Tom went to the park. " * 60]
        asked = {"until": ["."], "max_gen_toks": 40, "do_sample": False}
        requests = [instance("generate_until", prompt, asked) for prompt in prompts]
        # One by one: padding of theirs alters what a prompt follows on.
        assert lm.generate_until(requests) == [hflm.generate_until([each], disable_tqdm=True)[0] for each in requests]
    for name in names[:3]:
        scores = ours[name]
        assert isinstance(scores, HarnessScores)
        assert scores.values.tolist() == [record["acc"] for record in own["samples"][name]]
        assert own["results"][name]["acc,none"] == scores.values.mean()
    wiki = ours["wiki"]
    assert isinstance(wiki, HarnessScores)
    np.testing.assert_allclose(wiki.values, [record["word_perplexity"][0] for record in own["samples"]["wiki"]], 1e-5)
    expected = own["results"]["wiki"]["word_perplexity,none"]
    assert math.exp(-wiki.values.sum() / wiki.weights.sum()) == pytest.approx(expected, rel=1e-5)


def test_generation_is_that_of_the_harness(pair):
    rng = random.Random(7)
    # The last two are cut on the left.
    contexts = [words(rng, n, n) for n in (1, 5, 20, 40, 54, 55, 90)]
    free = [instance("generate_until", each, {"until": [], "max_gen_toks": 10}) for each in contexts]
    ours, own = (lm.generate_until(free, disable_tqdm=True) for lm in pair)
    assert ours == own
    # A word of each continuation ends it; the earliest of several counts; one string does for a list.
    ends: list[Any] = [[text.split()[-1], text.split()[len(text.split()) // 2]] for text in own]
    ends[0] = ends[0][1]
    cut = [
        instance("generate_until", each, {"until": end, "max_gen_toks": 10, "temperature": 0.0})
        for each, end in zip(contexts, ends, strict=True)
    ]
    ours, own = (lm.generate_until(cut, disable_tqdm=True) for lm in pair)
    assert ours == own
    assert all(len(short) < len(long) for short, long in zip(ours, pair[0].generate_until(free), strict=True))


@pytest.mark.parametrize(
    "asked",
    [{"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}, {"num_beams": 4}, {"repetition_penalty": 1.2}],
)
def test_generation_is_greedy_or_refused(pair, asked):
    with pytest.raises(UserError, match="greedy"):
        pair[0].generate_until([instance("generate_until", "w1", {"until": [], "max_gen_toks": 5, **asked})])


@pytest.mark.parametrize("prefix", [{}, {"gen_prefix": "w7 w8"}], ids=["", "begun answer"])
@pytest.mark.parametrize("system", [None, "w5 w6"])
def test_questions_as_conversations(tmp_path, system, prefix):
    """As the harness itself puts them through the tokenizer's template."""
    folder = save_model(tmp_path / "chat", chat=True)
    records = [record | {"question": record["question"][:60]} for record in questions(40, 3)]
    task_file(tmp_path, "asked", records, CHOICE, **prefix)
    wanted = {"asked": ["asked"]}
    with LocalPool(ReplicaSpec(str(folder))) as pool:
        reader, words = Reader(pool, EOS, batch_tokens=512), AutoTokenizer.from_pretrained(folder)
        chat, plain = (
            run_harness(
                pool_model(reader, words, CONTEXT, template=template),
                wanted,
                tmp_path,
                conversations=template is not None,
            )["asked"].values
            for template in (chosen_template("chat", system, {}), None)
        )
    hflm = theirs(folder)
    own = their_results(hflm, tmp_path, ["asked"], apply_chat_template=True, system_instruction=system)
    assert chat.tolist() == [document["acc"] for document in own["samples"]["asked"]]
    assert chat.tolist() != plain.tolist()


def test_what_the_window_cannot_hold(pair):
    with pytest.raises(UserError, match="64 new tokens, the model's context holds 64"):
        pair[0].generate_until([instance("generate_until", "w1", {"until": [], "max_gen_toks": CONTEXT})])
    with pytest.raises(UserError, match="2 tokens of context and 65 to be scored"):
        pair[0].loglikelihood([instance("loglikelihood", "w1", " w2" * (CONTEXT + 1))])
    with pytest.raises(UserError, match="2 tokens of context and 0 to be scored"):
        pair[0].loglikelihood([instance("loglikelihood", "w1", " ")])


def test_embedded_models_read_what_they_were_trained_on():
    """Their tokenizers add nothing, and every text that they have learnt begins with BOS."""
    from bench.models.embedded import train_tokenizer
    from scoring.tokens import Tokenization

    embedded = train_tokenizer(["Where was Anna born?"])
    bare = embedded("Anna")["input_ids"]
    lm = pool_model(SimpleNamespace(), embedded, CONTEXT)
    assert lm.tok_encode("Anna") == [0, *bare]
    assert lm.tok_encode("<s>Anna") == [0, *bare]
    assert lm.tok_encode("Anna", add_special_tokens=False) == bare
    context, answer = Tokenization(embedded).pair("An", "na")
    assert context + answer == [0, *bare, embedded.eos_token_id]


def test_a_tokenizer_with_neither_bos_nor_eos():
    bare = tokenizer(bos=False)
    bare.bos_token = bare.eos_token = None
    with pytest.raises(UserError, match="neither a BOS nor an EOS"):
        pool_model(SimpleNamespace(), bare, CONTEXT)


def test_samples_that_share_a_text_are_read_once_and_scored_each(tmp_path):
    """Learned positions: one token more than the context would have none."""
    rng = np.random.default_rng(0)
    samples = random_samples(20) + random_samples(4, seed=1)
    for length in (CONTEXT + 1, 12, 12):
        ids = rng.integers(0, VOCABULARY, length)
        for scored_from in (length - 1, length - 3):
            for last in rng.choice(VOCABULARY, 4, replace=False):
                own = np.append(ids[:-1], last)
                samples.append(Sample("s", own, np.arange(length) >= scored_from))
    samples += samples[:3] + samples[-5:]
    folder = save_model(tmp_path / "gpt2", "gpt2")
    read = 0

    def run(works: Any, shards: Any) -> Any:
        nonlocal read
        read += sum(len(batch) for shard in shards for batch in shard)
        return pool.run(works, shards)

    with LocalPool(ReplicaSpec(str(folder))) as pool:
        reader = Reader(SimpleNamespace(run=run), EOS, batch_tokens=200)
        scores = reader.likelihoods(samples)
        # 24 texts, and the three that 24 samples share; the copies cost nothing.
        assert read == 24 + 3
        order = rng.permutation(len(samples))
        shuffled = reader.likelihoods([samples[i] for i in order])
    for place, i in enumerate(order):
        assert shuffled[place].logprobs.tolist() == scores[i].logprobs.tolist()
    model: Any = tiny_model("gpt2")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
        for sample, score in zip(samples, scores, strict=True):
            logits = model(torch.from_numpy(sample.input_ids[None, :-1])).logits[0].double()
            where = np.flatnonzero(sample.scored)
            expected = logits.log_softmax(-1)[where - 1, sample.input_ids[where]]
            np.testing.assert_allclose(score.logprobs, expected, rtol=1e-4, atol=1e-5)
            assert score.hits.tolist() == (logits.argmax(-1)[where - 1].numpy() == sample.input_ids[where]).tolist()


class Rule:
    """A model of the harness whose log-likelihoods are a rule's; remembers what it was asked."""

    def __new__(cls, rule: Callable[[str, str], float]) -> Any:
        from lm_eval.api.model import LM

        class Model(LM):
            asked: list[tuple[str, ...]]

            def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
                self.asked = [request.args for request in requests]
                return [(rule(*request.args), False) for request in requests]

            def loglikelihood_rolling(self, requests: Any) -> list[float]:
                return [-float(len(request.args[0])) for request in requests]

            def generate_until(self, requests: Any) -> list[str]:
                raise NotImplementedError

        return Model()


def shortest(context: str, continuation: str) -> float:
    return -float(len(continuation))


EASY = [
    {"question": "Which is short?", "choices": {"text": ["a", "long"], "label": ["A", "B"]}, "answerKey": "A"},
    {"question": "Which is long?", "choices": {"text": ["a", "long"], "label": ["A", "B"]}, "answerKey": "B"},
    {"question": "And this?", "choices": {"text": ["bbb", "cc", "d"], "label": ["1", "2", "3"]}, "answerKey": "3"},
]
RIGHT_IF_SHORTEST = [1.0, 0.0, 1.0]
HERE = {"training_split": None, "validation_split": None, "dataset_path": "json", "dataset_name": None}


def dataset(records: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(records)


def scores_of(result: HarnessScores | Missing) -> HarnessScores:
    assert isinstance(result, HarnessScores), result
    return result


@pytest.mark.slow
def test_what_cannot_be_loaded_is_missing_and_the_rest_stands(tmp_path):
    task_file(tmp_path, "good", questions(4), CHOICE)
    task_file(tmp_path, "page", [{"page": "a b"}], ROLLING)
    task_file(tmp_path, "exact", questions(2), {**CHOICE, "metric_list": [{"metric": "exact_match"}]})
    task_file(tmp_path, "empty", [], CHOICE)
    task_file(tmp_path, "no_such_field", questions(2), CHOICE, doc_to_text="{{nothing}}")
    task_file(tmp_path, "no_such_key", questions(2), CHOICE, sparkle=1)
    task_file(tmp_path, "no_data", questions(2), CHOICE)
    (tmp_path / "no_data.jsonl").unlink()
    # A file that claims a name of the harness's own, which must not be taken in its place, and one with an odd name.
    (tmp_path / "mine.yaml").write_text("task: openbookqa\ndoc_to_text: [unclosed\n")
    (tmp_path / "torn.yaml").write_text("{")
    # Neither broken nor a task: what others include.
    (tmp_path / "template.yaml").write_text("test_split: test\n")
    reasons = {
        "arc_esy": "no such task, group or tag; did you mean 'arc_easy'",
        "arc_easy": "Couldn't reach 'allenai/ai2_arc' on the Hub",
        "mmlu_stem": "Couldn't reach 'cais/mmlu' on the Hub",
        "openbookqa": "mine.yaml",
        "torn": "torn.yaml",
        "exact": "gives exact_match: expected 'acc'",
        "empty": "cannot be loaded: StopIteration",
        "no_such_field": "'nothing' is undefined",
        "no_such_key": "sparkle",
        "no_data": "no_data.jsonl",
    }
    wanted: dict[str, list[Any]] = {name: [name] for name in reasons}
    wanted |= {"good": ["good"], "partly": ["good", "no_such"], "mixed": ["good", "page"], "last": ["good"]}
    wanted |= {"nameless": [{"dataset_path": "json"}], "group": [{"task": "mmlu_stem", "test_split": "test"}]}
    results = run_harness(Rule(shortest), wanted, tmp_path)
    assert list(results) == list(wanted)
    for name, reason in reasons.items():
        result = results[name]
        assert isinstance(result, Missing)
        assert result.reason.startswith(f"lm-eval task '{name}': ")
        assert reason in result.reason
        assert "\n" not in result.reason
    for name, reason in (
        ("partly", "lm-eval task 'no_such': no such task, group or tag"),
        ("mixed", "different metrics"),
        ("nameless", "a configuration without 'task'"),
        ("group", "the name of several tasks"),
    ):
        result = results[name]
        assert isinstance(result, Missing)
        assert reason in result.reason
    for name in ("good", "last"):
        assert scores_of(results[name]).ids == [f"good/{n}" for n in range(4)]


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch):
    # A port on this machine that nobody listens to.
    nowhere = "http://127.0.0.1:9"
    for name in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{name}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", nowhere)
    run_harness(Rule(shortest), {"warm-up": ["arc_esy"]})
    start = time.monotonic()
    results = run_harness(Rule(shortest), {name: [name] for name in ("arc_easy", "mmlu_stem", "wikitext", "piqa")})
    assert time.monotonic() - start < 5
    assert all(isinstance(result, Missing) for result in results.values())
    assert not sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE
    assert not sys.modules["datasets.config"].HF_HUB_OFFLINE


def test_a_folder_comes_before_the_harness_itself(tmp_path):
    """arc_easy is the harness's; with the same tag, which keeps its other task."""
    from lm_eval.tasks import TaskManager

    builtin = {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices.text}}", "tag": "ai2_arc"}
    target = {"doc_to_target": "{{choices.label.index(answerKey)}}"}
    task_file(tmp_path, "arc_easy", EASY, CHOICE, **builtin, **target)
    lm = Rule(shortest)
    results = run_harness(lm, {"easy": ["arc_easy"], "arc": ["ai2_arc"]}, tmp_path)
    assert scores_of(results["easy"]).values.tolist() == RIGHT_IF_SHORTEST
    assert scores_of(results["easy"]).tasks == {"arc_easy": {"version": 7, "n": 3}}
    assert {context for context, _ in lm.asked} == {record["question"] for record in EASY}
    # arc_challenge is still one of ai2_arc, and cannot be had: not a smaller set.
    assert isinstance(results["arc"], Missing)
    assert "ai2_arc" in results["arc"].reason
    # And the folder of one run is not that of the next.
    assert isinstance(run_harness(lm, {"easy": ["arc_easy"]})["easy"], Missing)
    assert TaskManager(include_path=tmp_path, include_defaults=False).all_tags == ["ai2_arc"]


def test_a_configuration_changes_the_task_whose_name_it_has(tmp_path):
    data = write_jsonl(tmp_path / "easy.jsonl", EASY)
    lm = Rule(shortest)
    change = {"task": "arc_easy", **HERE, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    longer = {**change, "doc_to_text": "Q: {{question}}"}
    results = run_harness(lm, {"as_it_is": [change], "other_text": [longer], "again": [dict(change)]})
    for result in results.values():
        assert scores_of(result).values.tolist() == RIGHT_IF_SHORTEST
        assert scores_of(result).ids == ["arc_easy/0", "arc_easy/1", "arc_easy/2"]
        assert scores_of(result).tasks["arc_easy"]["version"] == 1.0
    # What it leaves to the harness's task is the harness's.
    own = [f"Question: {record['question']}\nAnswer:" for record in EASY for _ in record["choices"]["text"]]
    others = [f"Q: {record['question']}" for record in EASY for _ in record["choices"]["text"]]
    # Equal configurations are one task.
    assert [context for context, _ in lm.asked] == own + others
    twice = run_harness(lm, {"set": [change, longer]})["set"]
    assert isinstance(twice, Missing)
    assert "twice" in twice.reason


def test_a_configuration_with_data_of_its_own():
    records = [{"question": f"{n} and 1", "choices": ["xx", "y"], "answer": n % 2} for n in range(5)]
    asked: dict[str, Any] = {}

    def make(**arguments: Any) -> dict[str, Any]:
        asked.update(arguments)
        return {"test": dataset(records)}

    # The harness takes the last one out.
    own = {"digits": 1, "trust_remote_code": False}
    config = {"task": "sums", **CHOICE, "dataset_path": None, "custom_dataset": make, "dataset_kwargs": own}
    result = scores_of(run_harness(Rule(shortest), {"sums": [config]}, limit=4)["sums"])
    assert result.ids == ["sums/0", "sums/1", "sums/2", "sums/3"]
    assert result.values.tolist() == [0, 1, 0, 1]
    assert result.tasks == {"sums": {"version": 7, "n": 4}}
    assert asked["digits"] == 1
    assert own == {"digits": 1, "trust_remote_code": False}


def test_no_examples_are_shown_whatever_a_task_says(tmp_path):
    data = write_jsonl(tmp_path / "examples.jsonl", questions(3, 9))
    both = {"data_files": {"test": str(data), "train": str(data)}}
    shots = {"num_fewshot": 2, "training_split": "train", "fewshot_split": "train"}
    task_file(tmp_path, "shots", questions(3, 9), {**CHOICE, **shots})
    config = yaml.safe_load((tmp_path / "shots.yaml").read_text())
    (tmp_path / "shots.yaml").write_text(yaml.safe_dump({**config, "dataset_kwargs": both}))
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({"group": "all_shots", "task": ["shots"]}))
    changed = {"task": "shots", "num_fewshot": 3, "description": "Answer! "}
    lm = Rule(shortest)
    run_harness(lm, {"name": ["shots"], "group": ["all_shots"], "configuration": [changed]}, tmp_path)
    plain = [record["question"] for record in questions(3, 9) for _ in range(4)]
    # A name and a group that holds it are one task.
    assert [context for context, _ in lm.asked] == plain + [f"Answer! {question}" for question in plain]


def test_words_are_counted_as_the_task_does():
    """Wikitext's own rule: words of the page as it is, log-likelihood of the page put right."""
    pages = ["The year 1 @,@ 000 ( circa ) .", "a  b\nc"]
    change = {"task": "wikitext", **HERE, "custom_dataset": lambda **_: {"test": dataset([{"page": p} for p in pages])}}
    result = scores_of(run_harness(Rule(shortest), {"perplexity": [change]})["perplexity"])
    assert result.metric == "word_perplexity"
    assert result.weights.tolist() == [len(re.split(r"\s+", page)) for page in pages] == [9, 3]
    # "The year 1,000 (circa)." has one character for each nat that the rule takes; the rest is left alone.
    assert result.values.tolist() == [-len("The year 1,000 (circa) ."), -len("a  b\nc")]


def test_an_accuracy_that_is_no_mean_is_another_metric(tmp_path):
    task_file(tmp_path, "odd", questions(2), CHOICE)
    change = {"task": "odd", "metric_list": [{"metric": "acc", "aggregation": max, "higher_is_better": True}]}
    result = run_harness(Rule(shortest), {"odd": [change]}, tmp_path)["odd"]
    assert isinstance(result, Missing)
    assert "expected 'acc', a mean over documents" in result.reason


def test_the_harness_is_silent_unless_something_is_wrong(tmp_path, capfd, caplog):
    # It would say that it forms a mean, as nobody says what to form.
    task_file(tmp_path, "good", questions(4), {**CHOICE, "metric_list": [{"metric": "acc"}]})
    run_harness(Rule(shortest), {"good": ["good"], "none": ["arc_easy"]}, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize(
    ("answer", "words"),
    [(5, "the answer 5"), (-1, "the answer '-1'"), ("B", "the answer 'B'")],
    ids=str,
)
def test_answers_that_are_none_of_the_choices(tmp_path, answer, words):
    """The harness would count them as answered wrongly, whatever the model says."""
    records = questions(3)
    records[2]["answer"] = answer
    if isinstance(answer, str):
        records = [{**record, "answer": answer} for record in records]
    task_file(tmp_path, "bad", records, CHOICE)
    result = run_harness(Rule(shortest), {"bad": ["bad"]}, tmp_path)["bad"]
    assert isinstance(result, Missing)
    assert words in result.reason
    assert "4 choices: expected a number from 0 to 3, or one of" in result.reason


def test_no_folder_and_no_harness(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is no folder"):
        run_harness(Rule(shortest), {"good": ["good"]}, tmp_path / "none")
    lm = Rule(shortest)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=re.escape("pip install 'mrd-bench[harness]'")):
        run_harness(lm, {"good": ["good"]})
    with pytest.raises(UserError, match=re.escape("pip install 'mrd-bench[harness]'")):
        pool_model(SimpleNamespace(), tokenizer(), CONTEXT)
