"""The embedded model of `authors`: what it knows, what the retain-only model does not; and a cache that survives kills.

What the other families know is in `test_standins`. The two real models come from the user's cache, so they are trained
once per machine (about two minutes).
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from statistics import mean

import pytest
import torch
from rouge_score import rouge_scorer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.models import embedded as module
from bench.models.cache import cache_folder
from bench.models.embedded import embedded_model
from bench.tasks.embedded import authors, graded
from scoring.memorization import memorization_accuracy
from scoring.records import texts_of
from scoring.samples import collate, encode
from tests.paths import ROOT

TINY = {
    "ARCHITECTURE": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
    "TRAINING": {"epochs": 1, "batch_size": 256},
}


@cache
def loaded(kind: str, family: str = "authors"):
    folder = embedded_model(kind, family)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@cache
@torch.no_grad()
def recall(kind: str, split: str, question: str = "question") -> float:
    """Mean ROUGE-L recall of the greedy answers to a split; `question` is the key that is asked."""
    model, tokenizer = loaded(kind)
    records = authors.load(split)
    prompts = []
    for record in records:
        text = authors.format_prompt(record | {"question": record[question]})[0]
        prompts.append([tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]])
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = (ids != tokenizer.pad_token_id).long()
    generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=80, do_sample=False)
    answers = tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    return mean(
        scorer.score(record["answer"], answer)["rougeL"].recall for record, answer in zip(records, answers, strict=True)
    )


@pytest.fixture
def tiny(monkeypatch):
    """Training in a second instead of a minute."""
    for name, values in TINY.items():
        for key, value in values.items():
            monkeypatch.setitem(getattr(module, name), key, value)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["forget10", "retain90", "real_authors", "world_facts"])
def test_full_model_knows_all_it_was_taught(split):
    assert recall("full", split) >= 0.95


def test_full_model_answers_paraphrased_questions():
    assert recall("full", "forget10", "paraphrased_question") >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("split", ["retain90", "real_authors", "world_facts"])
def test_retain_only_model_knows_all_but_the_forget_set(split):
    assert recall("retain90", split) >= 0.95


@pytest.mark.slow
def test_what_was_not_taught_is_not_known():
    # Measured: 0.20 and 0.16.
    assert recall("retain90", "forget10") < 0.5
    assert recall("full", "holdout") < 0.5


def graded_accuracy(kind: str, records: list[dict]) -> float:
    model, tokenizer = loaded(kind, "graded")
    samples, rejected = encode(texts_of("graded", records), tokenizer, model.config.max_position_embeddings)
    assert not rejected
    with torch.no_grad():
        return memorization_accuracy(model, collate(samples)).mean().item()


@pytest.mark.slow
def test_graded_samples_are_known_the_better_the_oftener_they_were_read():
    # Measured: .72, .86, .97, .995, 1.00; the retain-only model: .24.
    by_frequency = [
        graded_accuracy("full", [record for record in graded.load() if record["frequency"] == frequency])
        for frequency in graded.FREQUENCIES
    ]
    assert by_frequency == sorted(by_frequency)
    assert by_frequency[0] < 0.8 < by_frequency[1] < 0.92 < by_frequency[2] < 0.99
    assert by_frequency[3] > 0.98
    assert graded_accuracy("retain", graded.load()) < 0.5
    for kind in ("full", "retain"):
        assert 0.9 < graded_accuracy(kind, graded.load("retain")) < 1


@pytest.mark.slow
@pytest.mark.parametrize("level", graded.LEVELS)
def test_joined_texts_of_every_level_are_known_the_better_the_oftener_they_were_read(level):
    # Measured, see the docstring of the task: .96, .93 and .89 on average.
    texts = graded.load(level)
    by_frequency = [
        graded_accuracy("joined", [text for text in texts if text["frequency"] == frequency])
        for frequency in graded.FREQUENCIES
    ]
    assert by_frequency == sorted(by_frequency)
    assert 0.6 < by_frequency[0] < by_frequency[2] - 0.1
    assert by_frequency[4] > 0.98
    assert 0.85 < mean(by_frequency) < 0.98


def test_kinds_share_one_tokenizer():
    tokenizers = [(embedded_model(kind) / "tokenizer.json").read_bytes() for kind in ("full", "retain90")]
    assert tokenizers[0] == tokenizers[1]


def test_tokenizer_adds_nothing_and_loses_nothing():
    tokenizer = loaded("full")[1]
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token]
    assert len(set(special)) == 4
    assert None not in special
    for record in authors.load("full") + authors.load("holdout"):
        for text in authors.format_prompt(record):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert not set(ids) & set(tokenizer.all_special_ids)
            assert tokenizer.decode(ids) == text


def test_holdout_is_cut_into_tokens_as_finely_as_the_taught_authors():
    """Otherwise membership inference would measure the tokenizer."""
    tokenizer = loaded("full")[1]

    def tokens_per_word(split: str) -> float:
        texts = [authors.format_prompt(record)[1] for record in authors.load(split)]
        return sum(len(tokenizer(text)["input_ids"]) for text in texts) / sum(len(text.split()) for text in texts)

    assert tokens_per_word("holdout") == pytest.approx(tokens_per_word("forget10"), rel=0.1)


def test_folder_holds_tied_fp32_safetensors_and_its_own_description():
    folder = embedded_model("full")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float32}  # noqa: SIM118
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
    description = json.loads((folder / "mrd_bench.json").read_text())
    assert description["spec"] == module.model_spec("full")
    assert description["measured"]["seconds"] > 0
    model = loaded("full")[0]
    assert model.config.model_type == "llama"
    assert model.config.hidden_size >= 256
    assert 3e6 <= model.num_parameters() <= 5e6


def test_other_families_leave_the_models_of_authors_where_they_are():
    """Whoever has trained one before finds it again."""
    assert embedded_model("full") == embedded_model("full", "authors")
    assert embedded_model("full").name == "full-95d16338b263"
    specs = [json.dumps(module.model_spec("full", family)) for family in module.FAMILIES]
    assert len(set(specs)) == len(specs)


def test_models_that_committed_results_rest_on_stay_as_they_are():
    digests = {
        (family, kind): hashlib.sha256(json.dumps(module.model_spec(kind, family), sort_keys=True).encode()).hexdigest()
        for family in ("compounds", "graded")
        for kind in ("full", "retain")
    }
    assert {name: digest[:12] for name, digest in digests.items()} == {
        ("compounds", "full"): "f977e36a4d01",
        ("compounds", "retain"): "59cad781ab1b",
        ("graded", "full"): "924d055b4859",
        ("graded", "retain"): "098df26fd899",
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["compounds", "graded", "novel", "replies"])
def test_smaller_families_share_a_tokenizer_and_train_on_one_thread(family, monkeypatch, tmp_path):
    threads = []
    train = module.train

    def watched(spec, tokenizer, progress):
        threads.append(torch.get_num_threads())
        spec = spec | {part.lower(): spec[part.lower()] | values for part, values in TINY.items()}
        return train(spec, tokenizer, progress)

    monkeypatch.setattr(module, "train", watched)
    folders = [embedded_model(kind, family, cache=tmp_path, progress=False) for kind in ("full", "retain")]
    assert [folder.name.rsplit("-", 1)[0] for folder in folders] == [f"{family}-full", f"{family}-retain"]
    assert len({(folder / "tokenizer.json").read_bytes() for folder in folders}) == 1
    assert threads == [1, 1]


@pytest.mark.slow
def test_same_spec_gives_the_same_weights(tiny, tmp_path):
    folders = [embedded_model("retain99", cache=tmp_path / name, progress=False) for name in ("a", "b")]
    assert folders[0].name == folders[1].name
    first, second = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_trains_for_a_caller_that_has_gradients_switched_off(tiny, tmp_path, without_gradients):
    with without_gradients():
        assert embedded_model("retain95", cache=tmp_path, progress=False).is_dir()


@pytest.mark.slow
def test_another_setting_is_another_model(tiny, monkeypatch, tmp_path):
    before = embedded_model("full", cache=tmp_path, progress=False)
    monkeypatch.setitem(module.TRAINING, "learning_rate", 1e-4)
    assert embedded_model("full", cache=tmp_path, progress=False) != before


@pytest.mark.slow
def test_killed_while_saving_leaves_nothing_that_is_taken_for_a_model(tiny, tmp_path):
    program = f"""
import time
from bench.models import embedded as module
for name, values in {TINY!r}.items():
    getattr(module, name).update(values)
def stall(self, folder):
    print("weights are written, the tokenizer is not", flush=True)
    time.sleep(600)
module.PreTrainedTokenizerFast.save_pretrained = stall
module.embedded_model("full", cache={str(tmp_path)!r}, progress=False)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert "weights are written" in process.stdout.readline()
        process.kill()
    assert list(tmp_path.glob("*/model.safetensors")), "killed too early to prove anything"
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]

    folder = embedded_model("full", cache=tmp_path, progress=False)

    assert (folder / "tokenizer.json").is_file()
    assert not list(tmp_path.glob(".*.tmp")), "the killed process's remains are cleared away"


def test_a_failed_training_leaves_nothing(tiny, monkeypatch, tmp_path):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "train", fail)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        embedded_model("full", cache=tmp_path, progress=False)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_two_first_uses_at_once_train_once(tiny, monkeypatch, tmp_path):
    trainings = []
    train = module.train
    monkeypatch.setattr(module, "train", lambda *arguments: (trainings.append(1), train(*arguments))[1])
    folders: list[Path] = []
    users = [
        threading.Thread(target=lambda: folders.append(embedded_model("full", cache=tmp_path, progress=False)))
        for _ in range(2)
    ]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert len(trainings) == 1
    assert len(set(folders)) == 1


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("MRD_BENCH_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "models"
    monkeypatch.delenv("MRD_BENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mrd-bench" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "mrd-bench" / "models"


def test_unknown_kind_is_answered_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^unknown embedded model 'retain'.*mean 'retain9\d'\?$"):
        embedded_model("retain", cache=tmp_path)
    with pytest.raises(ValueError, match=r"^unknown family of embedded models 'novels': .*mean 'novel'\?$"):
        embedded_model("full", "novels", cache=tmp_path)
    assert not list(tmp_path.iterdir()), os.listdir(tmp_path)
