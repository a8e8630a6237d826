"""Evaluating in a chat format gives the numbers that open-unlearning's definitions give of the same model.

The second implementation here follows its documentation: system prompt, question and answer are a conversation that the
tokenizer's chat template renders with a date; labels are all tokens after the rendered question, the end token last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rouge_score.rouge_scorer import RougeScorer
from scipy import stats
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import bench
from bench.jobs.resources import Resources
from tests.tiny_tofu import SHORT, Record, records, write_task

SYSTEM, DATE, NEW_TOKENS = "w0 w1", "10 Apr 2025", 12
MARKS = ["<begin>", "<turn>", "<end>", "<unk>"]
# As Llama 3's is: the date in the system turn, roles between marks, and a mark where a turn ends.
TEMPLATE = (
    "{{ bos_token }}<turn> system <turn> Date: {{ date_string }} "
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<end>"
    "{% for m in messages if m.role != 'system' %}<turn> {{ m.role }} <turn> {{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn> assistant <turn> {% endif %}"
)
METRICS = (
    *("forget_probability", "rr", "forget_truth_ratio", "model_utility", "forget_quality", "priv_leak"),
    *("extraction_strength", "exact_memorization", "mia_min_40_auc", "mia_loss_auc", "mia_zlib_auc"),
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    words = [
        *MARKS,
        "system",
        "user",
        "assistant",
        "Date:",
        "26",
        "Jul",
        "2024",
        *DATE.split(),
        *map("w{}".format, range(88)),
    ]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<begin>",
        eos_token="<end>",
        unk_token="<unk>",
        additional_special_tokens=["<turn>"],
    )
    fast.chat_template = TEMPLATE
    return fast


# --- The second implementation ------------------------------------------------------------------------------


def instance(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """The ids of the rendered question, and of the labels."""
    chat = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    options = {"tokenize": True, "return_dict": False, "date_string": DATE}
    whole = tokenizer.apply_chat_template(chat, add_generation_prompt=False, **options)
    prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, **options)
    if whole[-1] != tokenizer.eos_token_id:
        whole = [*whole, tokenizer.eos_token_id]
    return prompt, whole[len(prompt) :]


@dataclass
class OpenUnlearning:
    """Its metrics of one model."""

    model: Any
    tokenizer: Any

    @torch.no_grad()
    def logits(self, question: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
        prompt, labels = instance(self.tokenizer, question, answer)
        logits = self.model(input_ids=torch.tensor([prompt + labels])).logits[0, len(prompt) - 1 : -1]
        return logits.double(), torch.tensor(labels)

    def average_loss(self, question: str, answer: str) -> float:
        return F.cross_entropy(*self.logits(question, answer)).item()

    def probabilities(self, own: Sequence[Record]) -> list[float]:
        return [math.exp(-self.average_loss(each["question"], each["answer"])) for each in own]

    def wrong_losses(self, each: Record) -> list[float]:
        return [self.average_loss(each["question"], wrong) for wrong in each["perturbed_answer"]]

    def normalised(self, own: Sequence[Record]) -> list[float]:
        wrong = [sum(math.exp(-loss) for loss in self.wrong_losses(each)) for each in own]
        return [p / (p + w + 1e-10) for p, w in zip(self.probabilities(own), wrong, strict=True)]

    def truth_ratios(self, own: Sequence[Record]) -> np.ndarray:
        ratios = []
        for each in own:
            correct = self.average_loss(each["question"], each.get("paraphrased_answer", each["answer"]))
            wrong = float(np.mean(self.wrong_losses(each)))
            ratios.append(math.exp(-wrong) / (math.exp(-correct) + 1e-10))
        return np.array(ratios)

    def rouge(self, own: Sequence[Record]) -> float:
        scorer = RougeScorer(["rougeL"], use_stemmer=True)
        recalls = []
        for each in own:
            prompt, labels = instance(self.tokenizer, each["question"], each["answer"])
            ids = torch.tensor([prompt])
            written = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=self.tokenizer.eos_token_id,
            )[0, len(prompt) :]
            texts = [self.tokenizer.decode(each, skip_special_tokens=True).strip() for each in (labels, written)]
            recalls.append(scorer.score(*texts)["rougeL"].recall)
        return float(np.mean(recalls))

    def memorised(self, own: Sequence[Record]) -> tuple[float, float]:
        """EM and ES, without the prediction of the end token."""
        exact, strength = [], []
        for each in own:
            logits, labels = self.logits(each["question"], each["answer"])
            right = (logits.argmax(-1) == labels)[:-1]
            exact.append(right.double().mean().item())
            k = next((k for k in range(len(right)) if right[k:].all()), len(right) - 1)
            strength.append(1 - k / len(right))
        return float(np.mean(exact)), float(np.mean(strength))

    def attack_auc(self, kind: str) -> float:
        """1 where the forget set is much more likely than the holdout set."""
        import zlib

        def score(each: Record) -> float:
            logits, labels = self.logits(each["question"], each["answer"])
            logprobs = logits.log_softmax(-1)[torch.arange(len(labels)), labels]
            if kind == "min_k":
                return -logprobs[:-1].sort().values[: max(1, int(0.4 * (len(labels) - 1)))].mean().item()
            loss = -logprobs.mean().item()
            return loss / (len(zlib.compress(each["answer"].encode())) if kind == "zlib" else 1)

        forget, holdout = ([score(each) for each in records(name)] for name in ("forget", "holdout"))
        return float(roc_auc_score([0] * len(forget) + [1] * len(holdout), forget + holdout))

    def report(self, retain: OpenUnlearning) -> dict[str, float]:
        forget, ratios = records("forget"), self.truth_ratios(records("forget"))
        parts = [np.mean(self.probabilities(records("retain")))]
        parts += [np.mean(self.normalised(records(name))) for name in SHORT]
        for name in ("retain", *SHORT):
            parts += [self.rouge(records(name)), np.maximum(0, 1 - self.truth_ratios(records(name))).mean()]
        exact, strength = self.memorised(forget)
        leak, gold = 1 - self.attack_auc("min_k"), 1 - retain.attack_auc("min_k")
        return {
            "forget_probability": float(np.mean(self.probabilities(forget))),
            "rr": 1 - self.rouge(forget),
            "forget_truth_ratio": float(np.minimum(ratios, 1 / (ratios + 1e-10)).mean()),
            "model_utility": float(stats.hmean(parts)),
            "forget_quality": float(stats.ks_2samp(ratios, retain.truth_ratios(forget)).pvalue),
            "extraction_strength": strength,
            "exact_memorization": exact,
            "priv_leak": (leak - gold) / (gold + 1e-10) * 100,
            "mia_min_40_auc": self.attack_auc("min_k"),
            "mia_loss_auc": self.attack_auc("loss"),
            "mia_zlib_auc": self.attack_auc("zlib"),
        }


# --- The comparison -----------------------------------------------------------------------------------------


def taught(tokenizer: Any, own: Sequence[Record], steps: int, seed: int) -> Any:
    """A tiny Llama that has learnt answers, and paraphrased ones, to questions in the chat format."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    asked = [(each["question"], each[key]) for each in own for key in ("answer", "paraphrased_answer") if key in each]
    rows = [instance(tokenizer, *pair) for pair in asked]
    longest = max(len(prompt) + len(labels) for prompt, labels in rows)
    ids, targets = (torch.full((len(rows), longest), fill) for fill in (tokenizer.eos_token_id, -100))
    for row, (prompt, labels) in enumerate(rows):
        ids[row, : len(prompt) + len(labels)] = torch.tensor(prompt + labels)
        targets[row, len(prompt) : len(prompt) + len(labels)] = torch.tensor(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def same_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.usefixtures("same_random_numbers")
def test_a_chat_model_has_the_numbers_of_open_unlearnings_definitions(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    kept = [each for name in ("retain", *SHORT) for each in records(name)]
    model = taught(tokenizer, [*records("forget")[::2], *kept], 20, seed=1)
    retain = taught(tokenizer, kept, 20, seed=2)
    result = bench.evaluate(
        model,
        str(write_task(tmp_path)),
        tokenizer=tokenizer,
        retain_model=retain,
        resources=Resources(replicas=0),
        metrics=",".join(METRICS),
        template="chat",
        system=SYSTEM,
        template_variables={"date_string": DATE},
        new_tokens=NEW_TOKENS,
    )
    found = result.metrics.set_index(["model", "name"])["value"]
    theirs = OpenUnlearning(model, tokenizer).report(OpenUnlearning(retain, tokenizer))
    assert set(theirs) == set(METRICS)
    for name, number in theirs.items():
        assert found["model", name] == pytest.approx(number, rel=1e-4, abs=1e-6), name
    # The model knows some and not all: no number is compared at its ends alone.
    assert all(0.02 < theirs[name] < 0.98 for name in METRICS if name not in ("forget_quality", "priv_leak"))
    # The retain-only model itself leaks nothing.
    own = bench.evaluate(
        retain,
        str(tmp_path / "tiny.yaml"),
        tokenizer=tokenizer,
        retain_model=retain,
        metrics="priv_leak",
        template="chat",
    )
    assert own.metrics.set_index("model")["value"]["model"] == 0
