"""One template for all verbs: the same answers get the same probabilities, and data are known by their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from bench.files.score_file import read_scores
from bench.jobs.evaluate import evaluate
from bench.jobs.evaluation_sets import end_of_answers
from bench.jobs.resources import Resources, SweepResources
from bench.jobs.score import ScoreSpec, score
from bench.jobs.sweep import sweep
from bench.jobs.sweep_plan import SweepSpec
from bench.jobs.unlearn import UnlearnSpec, unlearn
from bench.metrics.values import Missing
from bench.tasks.datasets import load_dataset, open_texts
from scoring.errors import UserError
from scoring.records import as_text
from scoring.samples import answer_end, encode
from scoring.settings import build
from scoring.templates import Template
from tests.tiny_folders import CHAT_TEMPLATE, CONTEXT, pairs, save_model, token_id, tokenizer, write_jsonl
from tests.tiny_tofu import write_task

HERE = Resources(replicas=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("chat") / "model", chat=True))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.mark.slow
def test_all_verbs_put_a_question_in_the_same_way(model: str, task: Path, tmp_path: Path) -> None:
    """The mean probability of the forget set's answers, by way of each verb."""
    chat: dict[str, Any] = {"template": "chat", "system": "w90 w91", "template_variables": {"date_string": "w92"}}
    found = {}
    for name, settings in {"plain": {}, "chat": chat}.items():
        spec = ScoreSpec(model=model, data=str(task), **settings)
        table = score(spec, tmp_path / f"{name}.parquet", HERE, progress=False).table.to_pandas()
        found[name] = float(np.exp(-table["nll"] / table["num_tokens"]).mean())
    assert abs(found["chat"] / found["plain"] - 1) > 0.01

    metrics = evaluate(model, str(task), metrics="forget_probability", resources=HERE, **chat).metrics
    assert metrics["value"].tolist() == pytest.approx([found["chat"]], rel=1e-6)

    run = UnlearnSpec(
        model=model, task=str(task), algorithm="GradDiff", max_steps=1, workers=0, evaluate_samples=100, **chat
    )
    unlearned = unlearn(run, tmp_path / "run", progress=False)
    assert unlearned.epochs["forget_probability"][0].as_py() == pytest.approx(found["chat"], rel=1e-6)

    base = {"model": model, "task": str(task), "algorithm": "GA", "max_steps": 1, "evaluate_samples": 100, **chat}
    swept = SweepSpec(base=base, evaluate={"metrics": "forget_probability"})
    result = sweep(swept, tmp_path / "sweep", None, SweepResources(concurrent=0), progress=False)
    assert result.trials["status"].to_pylist() == ["finished"]
    assert result.epochs["forget_probability"][0].as_py() == pytest.approx(found["chat"], rel=1e-6)
    before = pq.read_table(tmp_path / "sweep" / "reference.parquet").to_pandas()
    value = before[(before["level"] == "metric") & (before["name"] == "forget_probability")]["value"]
    assert value.tolist() == pytest.approx([found["chat"]] * len(value), rel=1e-6)
    assert len(value) == 2


def test_what_a_template_makes_of_data_is_their_identity(model: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", pairs(3))
    own = tmp_path / "own.jinja"
    own.write_text(CHAT_TEMPLATE)
    longer = tmp_path / "longer.jinja"
    longer.write_text("w1 " + CHAT_TEMPLATE)
    chat = {"template": "chat"}
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "chat": chat,
        "system": chat | {"system": "w1"},
        "own": {"template": str(own)},
        "longer": {"template": str(longer)},
        "unused variable": chat | {"template_variables": {"tone": "w1"}},
    }
    hashes = {}
    for name, settings in kinds.items():
        out = tmp_path / f"{name}.parquet"
        score(ScoreSpec(model=model, data=str(data), **settings), out, HERE, progress=False)
        _, spec, _ = read_scores(out)
        hashes[name] = spec["spec_hash"]
        # Files without a template are those of before there were any.
        assert ("template" in spec) == (name != "plain")
    assert hashes["own"] == hashes["unused variable"] == hashes["chat"]
    assert len(set(hashes.values())) == 4


def test_data_are_others_where_their_tokens_are(tmp_path: Path) -> None:
    """Earlier versions put BOS before every text, and a template's line feed among what was scored."""
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    records = [{"question": "w1 w2", "answer": "w3"}, {"text": "w4 w5"}, {"messages": turns}]
    data = str(write_jsonl(tmp_path / "d.jsonl", records))
    words = load_dataset(data).sha256
    adds, adds_none, date = tokenizer(chat=True), tokenizer(chat=True, bos=False), tokenizer(chat=True)
    date.chat_template = "w{{ strftime_now('%y') }} " + CHAT_TEMPLATE
    assert load_dataset(data, None, adds).sha256 == words
    others = [load_dataset(data, None, one).sha256 for one in (adds_none, date)]
    others.append(load_dataset(data, None, adds, Template()).sha256)
    assert len({words, *others}) == 4
    assert open_texts(data, None, date).checked_sha256() == others[1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vary": {"template": ["plain", "chat"]}}, "template is the same for all trials"),
        ({"arms": {"a": {"system": "w1"}}}, "system is the same for all arms"),
        ({"evaluate": {"template": "chat"}}, "template is that of the trials"),
    ],
    ids=str,
)
def test_a_sweep_has_one_template(changed: dict[str, Any], message: str) -> None:
    spec = {"base": {"model": "authors", "task": "authors", "algorithm": "GA"}} | changed
    with pytest.raises(UserError, match=message):
        build(SweepSpec, spec).checked()


def test_half_a_template_is_refused_before_anything_is_done(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench.cli.main import main

    bad = tmp_path / "bad.jinja"
    bad.write_text("{% for m in messages %}{{ m.contents }}")
    data = write_jsonl(tmp_path / "d.jsonl", pairs(2))
    command = ["score", "--model", model, "--data", str(data), "--replicas", "0", "--out", str(tmp_path / "x.parquet")]
    for flags, words in (
        (["--template", str(bad)], "line 1: not Jinja"),
        (["--system", "w1"], "--system is for chat templates"),
        (["--template", "chat", "--template-variables", "tone"], "--template-variables has 'tone' without a value"),
    ):
        assert main([*command, *flags]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jinja", "d.jsonl"]


def test_evaluate_lets_answers_end_where_unlearn_does() -> None:
    """At the end of a turn for conversations, whether or not a template is asked for; of pairs at EOS."""
    words = tokenizer(chat=True)
    words.add_special_tokens({"additional_special_tokens": ["<end>"]})
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    conversation, pair = {"id": "a", "messages": turns}, {"id": "b", "question": "w1", "answer": "w2"}
    for record, template, ending in (
        (conversation, None, "<end>"),
        (pair, None, "</s>"),
        (pair, Template(), "<end>"),
    ):
        samples, _ = encode([as_text("forget", 1, record, template)], words, CONTEXT)
        sets = {"forget": [record], "retain": Missing("none")}
        assert answer_end(words, samples) == end_of_answers(sets, words, template) == token_id(ending)
