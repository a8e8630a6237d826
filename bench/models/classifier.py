"""The small classifier of rude text that goes with the `replies` task, trained on first use and cached.

It stands in for unitary/toxic-bert and is loaded in the same way. It knows the insults of
`bench.tasks.embedded.replies` and nothing else: text of another kind, broken or empty text is not toxic to it.
"""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from bench.models.cache import trained_once
from bench.tasks.embedded import common_knowledge, replies

VERSION = 1  # raise it when the training changes in a way that the spec does not show

# The labels of toxic-bert. A rude text has the two of RUDE_LABELS, any other text has none.
LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
RUDE_LABELS = ("toxic", "insult")
ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
VOCABULARY = 1500
TRAINING: dict[str, Any] = {"texts": 500, "epochs": 4, "batch_size": 32, "learning_rate": 2e-3, "seed": 0}


def embedded_classifier(*, cache: Path | str | None = None) -> Path:
    """Folder of the trained classifier, for `AutoModelForSequenceClassification` and `AutoTokenizer`.

    Trains it first if the cache has none (seconds). Cache and description are those of
    `bench.models.embedded.embedded_model`.
    """
    texts = [list(example) for example in examples(TRAINING["texts"], TRAINING["seed"])]
    spec = {
        "version": VERSION,
        "texts_sha256": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        "architecture": ARCHITECTURE,
        "vocabulary": VOCABULARY,
        "training": TRAINING,
    }
    return trained_once("rude-classifier", spec, _train_into, cache)


def examples(count: int, seed: int) -> list[tuple[str, bool]]:
    """4 * count texts and whether they are rude: count rude replies, count quarrels or ends of quarrels, count polite
    replies, and count that are plain, broken or empty."""
    rng = random.Random(f"{seed}/examples")
    quarrels = [
        record for number in range(-(-count // replies.QUARRELS)) for record in replies.quarrels(f"{seed}/{number}")
    ]
    plain = [record["text"] for record in common_knowledge.articles()]
    texts: list[tuple[str, bool]] = []
    for quarrel in quarrels[:count]:
        texts.append((replies.rude_answer(rng), True))
        texts.append((rng.choice(("", quarrel["prompt"])) + quarrel["completion"], True))
        polite = replies.any_polite_answer(rng)
        texts.append((polite, False))
        texts.append((_harmless(rng, rng.choice((rng.choice(plain), quarrel["prompt"], polite))), False))
    return texts


def _harmless(rng: random.Random, text: str) -> str:
    """The text itself, or something that a model may write that has lost its language."""
    words = text.split()
    form = rng.randrange(6)
    if form == 0:
        return ""
    if form == 1:
        return " ".join(rng.sample(words, len(words)))
    if form == 2:
        return f"{rng.choice(words)} " * rng.randint(1, 30)
    if form == 3:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz   .,?", k=rng.randint(1, 80)))
    if form == 4:
        return " ".join(words[: rng.randint(1, len(words))])
    return text


def _train_into(folder: Path) -> float:
    texts, rude = zip(*examples(TRAINING["texts"], TRAINING["seed"]), strict=True)
    tokenizer = _train_tokenizer(texts)
    model, final_loss = _train(tokenizer, texts, rude)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return final_loss


def _train_tokenizer(texts: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts a text between [CLS] and [SEP]."""
    special = ["[PAD]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in special[1:]]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=ARCHITECTURE["max_position_embeddings"],
    )


@torch.inference_mode(False)  # a caller that evaluates has gradients switched off
@torch.enable_grad()
def _train(
    tokenizer: PreTrainedTokenizerFast, texts: tuple[str, ...], rude: tuple[bool, ...]
) -> tuple[BertForSequenceClassification, float]:
    """The trained classifier (fp32, evaluation mode) and its mean loss in the last epoch."""
    order = random.Random(TRAINING["seed"])
    label_ids = {name: number for number, name in enumerate(LABELS)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TRAINING["seed"])
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                id2label=dict(enumerate(LABELS)),
                label2id=label_ids,
                problem_type="multi_label_classification",
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **ARCHITECTURE,
            )
        )
    targets = torch.zeros(len(texts), len(LABELS))
    targets[:, [label_ids[name] for name in RUDE_LABELS]] = torch.tensor(rude).float()[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING["learning_rate"])
    losses: list[float] = []
    for _ in range(TRAINING["epochs"]):
        losses.clear()
        shuffled = order.sample(range(len(texts)), len(texts))
        for start in range(0, len(texts), TRAINING["batch_size"]):
            rows = shuffled[start : start + TRAINING["batch_size"]]
            inputs = tokenizer([texts[row] for row in rows], padding=True, truncation=True, return_tensors="pt")
            loss = model(**inputs, labels=targets[rows]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return model.eval(), sum(losses) / len(losses)
