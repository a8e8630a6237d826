"""Attacks against brute force, hand-made vectors and a plain training loop; and the verb end to end."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from bench.attacks.prompts import most, read_families
from bench.attacks.relearn import Relearn
from bench.attacks.weights import Noise, Prune, Quantise, prune_, put_back, quantised
from bench.cli import main
from bench.files.parts import Parts
from bench.jobs.attack import AttackResult, attack_spec
from bench.jobs.attack_spec import AttackSpec
from bench.jobs.attack_table import UNTAUGHT
from bench.jobs.evaluate import evaluate_spec
from bench.jobs.evaluation_spec import EvaluateSpec
from bench.jobs.probe import Questions, probe_of
from bench.jobs.resources import Resources
from bench.metrics.leakage import best_of
from bench.metrics.values import Missing, Scores
from bench.models.find import find_model
from bench.tasks.datasets import find_task
from scoring.errors import UserError
from scoring.generation import Drawn, drawn_continuations, greedy_continuations
from scoring.load import load_model
from scoring.perturbation import fill_gaussian_
from tests.paths import ROOT
from tests.processes import wait_for
from tests.tiny_models import tiny_model
from tests.tiny_tofu import SHORT, answer_ids, pairs_of, prompt_ids, records, taught, write_task

HERE = Resources(replicas=0)
STRENGTHS: dict[str, Any] = {
    "shares": [0.5, 1.0],
    "learning_rates": [5e-3],
    "updates": [2, 6],
    "answers": 8,
    "sigmas": [0.02],
    "pruned": [0.3],
    "prefixes": [0.5],
}


# --- Weights ------------------------------------------------------------------------------------------------


def test_integers_by_hand_and_by_a_loop() -> None:
    row = torch.zeros(2, 130)
    row[0, :4] = torch.tensor([-7.0, 3.4, 0.6, 0.49])  # one group, whose scale is 1 in int4
    row[0, 128:] = torch.tensor([0.7, -0.36])  # the rest of the row, of scale 0.1
    found = quantised(row, "int4")
    assert found[0, :4].tolist() == [-7.0, 3.0, 1.0, 0.0]
    assert found[0, 128:].tolist() == pytest.approx([0.7, -0.4])
    assert not found[1].any()
    weight = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    for bits, name in ((8, "int8"), (4, "int4")):
        largest, made = 2 ** (bits - 1) - 1, quantised(weight, name)  # type: ignore[arg-type]
        for out, start in itertools.product(range(3), (0, 128)):
            group = weight[out, start : start + 128].double()
            scale = group.abs().max() / largest
            levels = torch.arange(-largest, largest + 1) * scale
            nearest = levels[(group[:, None] - levels).abs().argmin(1)]
            assert torch.allclose(made[out, start : start + 128].double(), nearest, atol=1e-6)


def test_fp8_is_the_nearest_of_all_its_numbers() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = codes[codes.isfinite()].unique()
    weight = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    for out, row in enumerate(weight.double()):
        scale = row.abs().max() / 448
        distance = (row[:, None] / scale - numbers).abs()
        found = quantised(weight, "fp8")[out].double() / scale
        assert torch.allclose((row / scale - found).abs(), distance.min(1).values, atol=1e-4)


def test_the_smallest_weights_are_pruned() -> None:
    weight = torch.tensor([[0.5, -0.1, 0.2], [-0.3, 0.1, 0.0]])
    prune_(weight, 0.5)
    assert weight.tolist() == [[0.5, 0.0, pytest.approx(0.2)], [pytest.approx(-0.3), 0.0, 0.0]]
    prune_(weight, 0.1)  # less than one weight
    assert weight.count_nonzero() == 3


class _SeesWeights:
    """A probe that keeps the weights that it is shown."""

    encoder: Any = None

    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def columns(self, model: Any, asked: Any = None) -> dict[Any, Any]:
        self.seen = {name: p.detach().clone() for name, p in model.named_parameters()}
        return {}


def test_what_is_changed_and_put_back() -> None:
    model = tiny_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    head = model.get_output_embeddings().weight
    for attack in (Quantise("int4"), Noise(0.1, 3), Prune(0.5)):
        probe = _SeesWeights()
        assert len(list(attack.under(model, probe))) == 1  # type: ignore[arg-type]
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name])
            changed = not torch.equal(probe.seen[name], before[name])
            if isinstance(attack, Noise):
                noise = fill_gaussian_(torch.empty_like(p), 0.1, 3, 0, name)
                assert torch.equal(probe.seen[name], noise + before[name])
            else:
                assert changed == (p.dim() == 2 and "embed" not in name and p is not head)
    with pytest.raises(ZeroDivisionError):
        _fails_with_zeros(model, head)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def _fails_with_zeros(model: Any, weight: torch.Tensor) -> None:
    with put_back(model), torch.no_grad():
        weight.zero_()
        raise ZeroDivisionError


# --- Drawn answers ------------------------------------------------------------------------------------------


def test_the_best_of_k_against_all_choices() -> None:
    scores = np.random.default_rng(0).random((3, 7))
    for k in (1, 2, 5, 7):
        brute = [np.mean([max(chosen) for chosen in itertools.combinations(row, k)]) for row in scores]
        np.testing.assert_allclose(best_of(scores, k), brute)
    # Of 64 answers 4 leak: 1 - C(60, 16) / C(64, 16).
    made = np.array([1.0] * 4 + [0.0] * 60)
    missed = np.prod([(60 - i) / (64 - i) for i in range(16)])
    assert best_of(made, 16) == pytest.approx(1 - missed)


def test_drawn_tokens_follow_the_model() -> None:
    model: Any = tiny_model("llama").eval()
    prompt, count = np.array([1, 5, 9]), 4000
    levels = (np.arange(count) + 0.5) / count
    drawn = Drawn([np.array([level, level]) for level in levels], 0.7)
    written = drawn_continuations(model, [prompt] * count, [2] * count, drawn, None)
    first = np.bincount([tokens[0] for tokens in written], minlength=model.config.vocab_size) / count
    with torch.no_grad():
        expected = (model(torch.from_numpy(prompt)[None]).logits[0, -1].double() / 0.7).softmax(-1).numpy()
    assert np.abs(first - expected).max() <= 1 / count + 1e-6  # the levels are evenly spread
    # What a row gets does not depend on what stands beside it; near 0 the most likely token is drawn.
    prompts, limits = [prompt, np.array([1, 7]), np.array([1, 2, 3, 4, 5])], [6, 4, 5]
    uniforms = [np.random.default_rng(i).random(limit) for i, limit in enumerate(limits)]
    together = drawn_continuations(model, prompts, limits, Drawn(uniforms), None)
    for i, tokens in enumerate(together):
        (alone,) = drawn_continuations(model, [prompts[i]], [limits[i]], Drawn([uniforms[i]]), None)
        assert tokens.tolist() == alone.tolist()
    cold = drawn_continuations(model, prompts, limits, Drawn(uniforms, 1e-3), None)
    greedy = greedy_continuations(model, prompts, limits, None)
    assert [tokens.tolist() for tokens in cold] == [tokens.tolist() for tokens in greedy]


# --- Questions ----------------------------------------------------------------------------------------------


def test_families_and_the_most_of_them(tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Mine: {question}\n---\n{question} Please.\n")
    families = read_families(tmp_path)
    assert families["system"] == ("Mine: {question}", "{question} Please.")
    assert {"role_play", "jailbreak", "language"} <= set(families)
    (tmp_path / "bad.txt").write_text("no place for it\n")
    with pytest.raises(UserError, match=r"bad\.txt, template 1: expected \{question\}"):
        read_families(tmp_path)
    one = {("forget", "ma"): Scores(("a", "b"), np.array([0.1, 0.9]), ("x", "y"))}
    two = {("forget", "ma"): Scores(("a", "b"), np.array([0.2, 0.3]), ("z", "w"))}
    best = most([one, two, {("forget", "ma"): Missing("too long")}])[("forget", "ma")]
    assert isinstance(best, Scores)
    assert (best.values.tolist(), best.texts) == ([0.2, 0.9], ("z", "y"))
    first, second = ({("forget", "ma"): Scores(("a",), np.array([value]))} for value in (np.nan, 0.3))
    for both in ([first, second], [second, first]):
        best = most(both)[("forget", "ma")]
        assert isinstance(best, Scores)
        assert best.values.tolist() == [0.3]


# --- The verb -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    forget, kept = records("forget"), [each for name in ("retain", *SHORT) for each in records(name)]
    wrong = [each | {"answer": each["perturbed_answer"][0]} for each in forget]
    original = taught(folder / "original", pairs_of(*forget, *kept), 26)
    return {
        "original": original,
        "retain_model": taught(folder / "retain-only", pairs_of(*kept), 16, seed=1),
        "model": taught(folder / "model", [(each["question"], each["answer"]) for each in wrong], 6, original),
    }


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


def spec_of(models: Mapping[str, Path], task: Path, **settings: Any) -> AttackSpec:
    return AttackSpec(task=str(task), **{role: str(path) for role, path in models.items()}, **(STRENGTHS | settings))


@pytest.fixture(scope="module")
def attacked(models: dict[str, Path], task: Path, tmp_path_factory: pytest.TempPathFactory) -> AttackResult:
    out = tmp_path_factory.mktemp("attacks") / "attacks.parquet"
    return attack_spec(spec_of(models, task), out, HERE, progress=False)


def rows(result: AttackResult, **wanted: Any) -> pd.DataFrame:
    frame = result.table.to_pandas()
    for name, value in wanted.items():
        frame = frame[frame[name] == value]
    return frame


def values(result: AttackResult, model: str, attack: str, name: str, updates: int | None = None) -> np.ndarray:
    found = rows(result, level="sample", model=model, attack=attack, name=name, set="forget")
    return found[found["updates"].isna() if updates is None else found["updates"] == updates]["value"].to_numpy()


def test_no_attack_is_the_evaluation(
    attacked: AttackResult, models: dict[str, Path], task: Path, tmp_path: Path
) -> None:
    named = {role: str(path) for role, path in models.items()}
    evaluation = evaluate_spec(
        EvaluateSpec(task=str(task), metrics="rr,ma,forget_probability", **named),
        tmp_path / "e.parquet",
        HERE,
        progress=False,
    ).table.to_pandas()
    metrics = evaluation[evaluation["level"] == "metric"]
    for _, row in metrics.iterrows():
        (mine,) = rows(attacked, level="metric", attack="none", model=row["model"], name=row["name"])["value"]
        assert mine == row["value"]
        if row["name"] == "rr":
            (without,) = rows(attacked, level="metric", attack="prompt prefix 0.5", model=row["model"], name="rr")[
                "value"
            ]
            assert without != mine


def test_relearning_is_a_plain_training_run(attacked: AttackResult, models: dict[str, Path], task: Path) -> None:
    """One record, so that every batch is the same; then the record's MA and probability by a loop of AdamW."""
    spec = spec_of(models, task)
    probe = probe_of(Questions(spec.checked().evaluation(), find_model(str(models["model"]))), "cpu")
    model = load_model(str(models["model"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    attack = Relearn("forget", 1e-9, 5e-3, (2, 6), 0)
    (taught_record,) = attack.records(probe.records("forget"))
    points = dict(attack.under(model, probe))
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    plain: Any = AutoModelForCausalLM.from_pretrained(models["model"])
    optimizer = torch.optim.AdamW(plain.parameters(), lr=5e-3, weight_decay=0.0)
    prompt, answer = prompt_ids(taught_record["question"]), answer_ids(taught_record["answer"])
    ids = torch.tensor([prompt + answer])

    def loss() -> torch.Tensor:
        logits = plain(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        return F.cross_entropy(logits, torch.tensor(answer))

    for update in range(1, 7):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        if update in points:
            scores = points[update]["forget", "probability"]
            assert isinstance(scores, Scores)
            place = scores.ids.index(taught_record["id"])
            assert scores.values[place] == pytest.approx(float((-loss().detach()).exp()), rel=1e-4)


def test_small_steps_are_not_lost_in_bf16(models: dict[str, Path], task: Path) -> None:
    spec = spec_of(models, task, metrics="forget_probability", samples=4)
    probe = probe_of(Questions(spec.checked().evaluation(), find_model(str(models["model"]))), "cpu")
    known: dict[str, float] = {}
    for dtype in ("float32", "bfloat16"):
        model = load_model(str(models["model"]), dtype)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        (_, columns), (_, later) = Relearn("forget", 1.0, 2e-5, (1, 9), 0).under(model, probe)
        for name, p in model.named_parameters():
            assert p.dtype == before[name].dtype
            assert torch.equal(p, before[name])
        first, last = columns["forget", "probability"], later["forget", "probability"]
        assert isinstance(first, Scores)
        assert isinstance(last, Scores)
        known[dtype] = float((last.values - first.values).mean())
    assert known["float32"] > 0
    assert known["bfloat16"] == pytest.approx(known["float32"], rel=0.2)


def test_what_goes_wrong_with_one_is_said_of_it_alone(models: dict[str, Path], task: Path, tmp_path: Path) -> None:
    """A rate at which training diverges; a model that has lost nothing; a retain-only model with a short context."""
    short = shutil.copytree(models["retain_model"], tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 15}))
    named = {"model": models["original"], "original": models["original"], "retain_model": short}
    settings = {"attacks": ["relearn"], "taught": ["forget"], "shares": [1.0], "metrics": "rr,ma,retain_rr"}
    spec = spec_of(named, task, **settings, learning_rates=[5e-3, 1e6], updates=[1, 2, 6])
    result = attack_spec(spec, tmp_path / "attacks.parquet", HERE, progress=False)
    assert 0 < len(values(result, "model", "none", "ma")) < len(records("forget"))
    of_all = rows(result, level="metric", model="model", name="ma", attack="relearn forget 1, rate 1e+06")
    assert of_all["missing"].isna().tolist()[0]
    assert of_all["missing"].tolist()[-1].startswith("training diverged at update")
    for name in ("rr", "ma"):
        (half,) = rows(result, level="half", model="model", name=name, attack="relearn forget 1, rate 0.005")["missing"]
        assert half == "nothing was lost"
    # More is known where more of the retain set is answered, though that is better.
    known = rows(result, level="metric", model="model", name="retain_rr")["value"]
    assert rows(result, level="worst", model="model", name="retain_rr")["value"].item() == known.max() > known.min()


@pytest.mark.parametrize(
    ("task_name", "expected"),
    [
        ("authors", ["rr", "ma", "forget_probability"]),
        ("authors-muse", ["verbmem_f", "knowmem_f"]),
        ("authors-rwku", ["rwku_fb", "rwku_qa", "rwku_aa", "rwku_forget"]),
        ("authors-lume", ["lume_forget_regurgitation", "lume_forget_knowledge"]),
        ("compounds", ["wmdp_cyber", "wmdp_chem", "wmdp_bio", "wmdp_average"]),
        ("replies", ["real_toxicity", "safe_toxicity"]),
        ("novel", ["seen_rouge", "unseen_rouge"]),
    ],
)
def test_what_is_attacked_unless_it_is_said(task_name: str, expected: list[str]) -> None:
    found = AttackSpec(model="m", task=task_name).metrics_of(find_task(task_name)[0])
    assert sorted(found) == sorted(expected)


def test_the_table_against_its_own_samples(attacked: AttackResult) -> None:
    name = "relearn forget 0.5, rate 0.005"
    model, never, original = (values(attacked, role, "none", "ma") for role in ("model", "retain-only", "original"))
    after, after_never = (values(attacked, role, name, "ma", 6) for role in ("model", "retain-only"))

    def value(level: str, of: str, attack: str = name, updates: int = 6) -> float:
        (found,) = rows(attacked, level=level, model=of, attack=attack, name="ma", updates=updates)["value"]
        return float(found)

    pair = "model - retain-only"
    assert value("metric", "model") == pytest.approx(after.mean())
    assert value("difference", pair) == pytest.approx((after - after_never).mean())
    assert value("recovered", "model") == pytest.approx((after - model).mean())
    assert value("excess", pair) == pytest.approx((after - model - after_never + never).mean())
    # The samples that were not taught are the others of the half that was drawn.
    kept = Relearn("forget", 0.5, 5e-3, (2, 6), 0).records([{"id": each["id"]} for each in records("forget")])
    untaught = [place for place, each in enumerate(records("forget")) if each["id"] not in {one["id"] for one in kept}]
    assert len(untaught) == 18
    assert value("metric", "model", name + UNTAUGHT) == pytest.approx(after[untaught].mean())
    forgotten = (model < 0.5) & (original >= 0.5)
    assert forgotten.any()
    assert value("back", "model") == pytest.approx((after[forgotten] >= 0.5).mean())
    at_two = values(attacked, "model", name, "ma", 2).mean()
    assert value("area", "model") == pytest.approx(
        (2 * (model.mean() + at_two) / 2 + 4 * (at_two + after.mean()) / 2) / 6
    )
    (half,) = rows(attacked, level="half", model="model", attack="relearn forget 1, rate 0.005", name="ma").to_dict(
        "records"
    )
    curve = [model.mean(), *(values(attacked, "model", "relearn forget 1, rate 0.005", "ma", u).mean() for u in (2, 6))]
    middle = (model.mean() + original.mean()) / 2
    if max(curve) < middle:
        assert half["missing"] == "not within 6 updates"
    else:
        assert half["value"] == pytest.approx(np.interp(middle, curve, [0, 2, 6]))
    (worst,) = rows(attacked, level="worst", model="model", name="ma").to_dict("records")
    known = rows(attacked, level="metric", model="model", name="ma")
    assert worst["value"] == known[~known["attack"].str.endswith(UNTAUGHT)]["value"].max()
    # What cannot be asked says why; and leaks grow with k.
    (missing,) = rows(attacked, level="metric", model="model", attack="prompt translated", name="ma")["missing"]
    assert missing == "'f0' has no 'translated_question'"
    leaks = [rows(attacked, level="metric", model="model", name=f"leak_at_{k}")["value"].item() for k in (1, 2, 4, 8)]
    assert leaks == sorted(leaks)
    assert leaks[0] < leaks[-1]


def test_a_model_that_is_the_retain_only_one_recovers_nothing_more(
    models: dict[str, Path], task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--attacks", "quantise,noise", "--metrics", "ma", "--replicas", "0", "--out", str(tmp_path / "a.parquet")]
    names = ["--model", str(models["retain_model"]), "--retain-model", str(models["retain_model"]), "--task", str(task)]
    assert main(["attack", *names, *flags, "--dry-run"]) == 0
    assert "6 attacks" in capsys.readouterr().out
    assert main(["attack", *names, *flags]) == 0
    frame = pd.read_parquet(tmp_path / "a.parquet")
    assert set(frame[frame["level"].isin(["difference", "excess"])]["value"]) == {0.0}
    assert main(["attack", *names, *flags]) == 0
    assert "already done" in capsys.readouterr().err
    assert main(["spec", str(tmp_path / "a.parquet")]) == 0
    assert "attacks: [quantise, noise]" in capsys.readouterr().out


def test_a_dry_run_of_questions_of_the_harness_alone(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(models["model"]), "--task", "compounds", "--out", str(tmp_path / "a.parquet"), "--dry-run"]
    assert main(["attack", *flags]) == 0
    assert "not planned: all that is asked are questions of lm-evaluation-harness" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--attacks", "bribe"], "--attacks is 'bribe'"),
        (["--updates", "0"], "--updates: 0 cannot be"),
        (["--shares", "0.5,2"], "--shares: 2 cannot be; expected a number above 0 and at most 1"),
        (["--sigmas", "0.1,0.1"], "--sigmas: 0.1 stands there twice"),
        (["--metrics", "forget_truth_ratio"], "cannot be attacked"),
        (["--engine", "vllm", "--replicas", "1"], "--engine is vllm"),
        (["--benign", "authors"], "expected a data file"),
        (["--prompts", "nowhere"], "no .txt file"),
    ],
)
def test_what_is_refused(
    flags: list[str], said: str, models: dict[str, Path], task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.parquet"
    assert main(["attack", "--model", str(models["model"]), "--task", str(task), "--out", str(out), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.ray
def test_killed_and_continued_by_replicas(
    attacked: AttackResult, models: dict[str, Path], task: Path, tmp_path: Path
) -> None:
    out = tmp_path / "attacks.parquet"
    flags = [
        f"--{name.replace('_', '-')}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in STRENGTHS.items()
    ]
    named = [f"--{role.replace('_', '-')}={path}" for role, path in models.items()]
    few = ["relearn", "quantise"]
    given = ["--attacks", ",".join(few), f"--task={task}", f"--out={out}"]
    command = [sys.executable, "-m", "bench.cli", "attack", *named, *flags, *given]
    process = subprocess.Popen([*command, "--replicas=0"], cwd=ROOT, env=os.environ, stderr=subprocess.DEVNULL)
    folder = out.with_name(out.name + ".parts")
    wait_for(lambda: len(list(folder.glob("*.parquet"))) >= 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    result = attack_spec(spec_of(models, task, attacks=few), out, Resources(replicas=2), progress=False)
    found, expected = (
        frame[frame["family"].isin(["none", *few]) & (frame["level"] != "worst")].reset_index(drop=True)
        for frame in (result.table.to_pandas(), attacked.table.to_pandas())
    )
    for name in ("attack", "model", "name", "updates", "sample_id", "missing"):
        assert found[name].equals(expected[name])
    np.testing.assert_allclose(found["value"], expected["value"], atol=2e-3)
    assert not Parts(out, result.record["spec"]).folder.exists()
