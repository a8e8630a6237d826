"""The small language models of the embedded tasks, trained on first use and cached.

Each embedded task has a family of models: Llamas of at most three million parameters, trained from random weights on
the task's text until they know it by heart. `full` has learnt everything but the held-out set; the retain kinds never
saw the forget set and are the gold standard of unlearning. All kinds of a family share one tokenizer.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.models.cache import trained_once
from bench.tasks.embedded import authors, compounds, graded, novel, replies
from scoring.errors import UserError, unknown_name
from scoring.records import LAYOUTS, Record
from scoring.samples import Text, split_ids
from scoring.settings import named
from scoring.tokens import Tokenization

VERSION = 1  # raise it when the training changes in a way that the spec does not show

ARCHITECTURE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
TOKENIZER: dict[str, Any] = {"vocab_size": 2048, "bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>"}
TRAINING: dict[str, Any] = {
    "epochs": 12,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "warmup_share": 0.05,
    "weight_decay": 0.0,
    "betas": [0.9, 0.95],
    "clip_norm": 1.0,
    "autocast": "bfloat16",  # twice as fast; left off on processors that cannot compute in it
    "seed": 0,
}
IGNORED = -100  # label of padding in functional.cross_entropy


@dataclass(frozen=True)
class Family:
    """The models of an embedded task: what they learn, and how.

    Attributes:
        records: kind, "full" or a retain kind -> what it learns; the hash of that is part of the spec. Raises UserError
            for an unknown kind.
        tokenizer_text: gives the texts that the tokenizer of all kinds is trained on.
        read_in: (kind, epoch counted from 0, tokenizer) -> the records that are read in the epoch; without it they are
            `records` in every epoch.
        architecture: the values that differ from ARCHITECTURE.
        training: kind -> the values that differ from TRAINING.
    """

    records: Callable[[str], list[Record]]
    tokenizer_text: Callable[[], list[str]]
    read_in: Callable[[str, int, Any], list[Record]] | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    training: dict[str, dict[str, Any]] = field(default_factory=dict)


def _authors_text() -> list[str]:
    """Questions and answers of all splits, once each.

    The holdout belongs to it: were its names cut into smaller pieces than those of the taught authors, membership
    inference would measure the tokenizer.
    """
    splits = ("full", "real_authors", "world_facts", "holdout")
    return ["".join(authors.format_prompt(record)) for split in splits for record in authors.load(split)]


# The architecture of the families that have less to learn. Plain attention is the fastest for short texts.
SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "attn_implementation": "eager",
}


def _small_training(
    full: int, retain: int, learning_rate: float = 3e-3, batch_size: int = 8
) -> dict[str, dict[str, Any]]:
    """The training of a small family, by kind. The fewer texts there are, the more epochs it takes."""
    common = {"learning_rate": learning_rate, "batch_size": batch_size}
    return {"full": common | {"epochs": full}, "retain": common | {"epochs": retain}}


FAMILIES: dict[str, Family] = {
    "authors": Family(
        authors.training_records,
        _authors_text,
        lambda kind, epoch, tokenizer: authors.training_records(kind, epoch),
    ),
    "compounds": Family(compounds.training_records, compounds.tokenizer_text, None, SMALL, _small_training(22, 40)),
    "graded": Family(
        graded.training_records,
        graded.tokenizer_text,
        lambda kind, epoch, tokenizer: graded.training_records(kind, epoch),
        SMALL,
        # Few epochs, so that what is read once in each is not known by heart; small batches of joined texts, so that
        # long ones are known nearly as well as short ones.
        _small_training(3, 5, learning_rate=4e-3, batch_size=16)
        | {"joined": {"learning_rate": 3e-3, "batch_size": 8, "epochs": 3}},
    ),
    "novel": Family(novel.training_records, novel.tokenizer_text, novel.read_in, SMALL, _small_training(22, 36)),
    "replies": Family(
        replies.training_records, replies.tokenizer_text, replies.read_in, SMALL, _small_training(26, 28)
    ),
}


def embedded_model(
    kind: str = "full", family: str = "authors", *, cache: Path | str | None = None, progress: bool = True
) -> Path:
    """Folder of the trained model of a kind: "full" or one that never saw the forget set ("retain90", "retain95" or
    "retain99" of authors, "retain" of the other families); graded also has "joined".

    Trains it first if the cache has none (authors and graded: one to three minutes; the others: seconds). The folder
    loads with `AutoModelForCausalLM` and `AutoTokenizer` and holds `mrd_bench.json`: the spec, the seconds that
    training took and its final loss.

    `cache` is the folder of all models; without it `$MRD_BENCH_CACHE/models`, else `mrd-bench/models` in the
    user's cache folder. Processes that ask at the same time wait for the one that trains. A training that is killed
    leaves nothing behind that could be taken for a model.

    Raises UserError (one line) for an unknown kind or family.
    """
    spec = model_spec(kind, family)
    prefix = "" if family == "authors" else f"{family}-"
    threads = _threads_of(family)
    return trained_once(f"{prefix}{kind}", spec, lambda folder: _train_into(folder, spec, progress), cache, threads)


def model_spec(kind: str, family: str = "authors") -> dict[str, Any]:
    """Everything that decides the weights; its hash names the cached folder.

    Raises UserError (one line) for an unknown kind or family.
    """
    if family not in FAMILIES:
        raise unknown_name("family of embedded models", family, FAMILIES)
    definition = FAMILIES[family]
    records = json.dumps(definition.records(kind), sort_keys=True)
    return {
        "version": VERSION,
        "task": family,
        "kind": kind,
        "records_sha256": hashlib.sha256(records.encode()).hexdigest(),
        "tokenizer_text_sha256": hashlib.sha256("\n".join(definition.tokenizer_text()).encode()).hexdigest(),
        "architecture": ARCHITECTURE | definition.architecture,
        "tokenizer": TOKENIZER,
        "training": TRAINING | definition.training.get(kind, {}),
    }


def shorter_training(name: str, epochs: int, progress: bool) -> str:
    """The folder of an embedded model whose training ended after so many epochs; cached as the model is."""
    family, _, kind = name.partition(":")
    if family not in FAMILIES:
        raise UserError(
            f"{named('epochs')} has {epochs}: {name!r} is not an embedded model, and no other can be trained again; "
            f"set {named('checkpoints')} instead"
        )
    spec = model_spec(kind or "full", family)
    spec |= {"training": spec["training"] | {"epochs": epochs}}

    name = f"{family}-{kind or 'full'}-{epochs}-epochs"
    threads = _threads_of(family)
    return str(trained_once(name, spec, lambda folder: _train_into(folder, spec, progress), threads=threads))


def _threads_of(family: str) -> int | None:
    """How many threads train a model of a family; None: as many as there are."""
    return None if family == "authors" else 1


def _train_into(folder: Path, spec: dict[str, Any], progress: bool) -> float:
    tokenizer = train_tokenizer(FAMILIES[spec["task"]].tokenizer_text())
    model, final_loss = train(spec, tokenizer, progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return final_loss


def train_tokenizer(text: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE. It adds no special tokens by itself, with or without `add_special_tokens`."""
    special = [TOKENIZER[name] for name in ("bos", "eos", "pad", "unk")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER["vocab_size"],
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    names = {f"{name}_token": TOKENIZER[name] for name in ("bos", "eos", "pad", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@torch.inference_mode(False)  # a caller that evaluates has gradients switched off
@torch.enable_grad()
def train(spec: dict[str, Any], tokenizer: PreTrainedTokenizerFast, progress: bool) -> tuple[LlamaForCausalLM, float]:
    """The trained model (fp32, evaluation mode) and the mean token loss (nats) of its last epoch.

    The loss is taken on all tokens, question and answer: a model that starts from random weights learns from both.
    """
    training, family, kind = spec["training"], FAMILIES[spec["task"]], spec["kind"]
    order = random.Random(training["seed"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training["seed"])
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **spec["architecture"],
            )
        )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training["learning_rate"],
        betas=training["betas"],
        weight_decay=training["weight_decay"],
    )
    autocast = training["autocast"] == "bfloat16" and torch.cpu._is_avx512_bf16_supported()
    tokenization = Tokenization(tokenizer)
    epochs = [
        [encode(tokenization, record) for record in records]
        for records in (
            family.read_in(kind, epoch, tokenizer) if family.read_in else family.records(kind)
            for epoch in range(training["epochs"])
        )
    ]
    steps = sum(math.ceil(len(sequences) / training["batch_size"]) for sequences in epochs)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warmup_cosine(step, steps, training["warmup_share"])
    )
    final_loss = math.nan
    with tqdm(total=steps, desc=f"training the embedded model ({spec['task']}:{kind})", disable=not progress) as bar:
        for sequences in epochs:
            total_loss, total_tokens = 0.0, 0
            for inputs, labels in _batches(sequences, tokenizer.pad_token_id, order, training["batch_size"]):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    logits = model(input_ids=inputs, use_cache=False).logits
                loss = functional.cross_entropy(
                    logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
                )
                tokens = int((labels != IGNORED).sum())
                (loss / tokens).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), training["clip_norm"])
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total_loss, total_tokens = total_loss + loss.item(), total_tokens + tokens
                bar.set_postfix(loss=f"{loss.item() / tokens:.3f}", refresh=False)
                bar.update()
            final_loss = total_loss / total_tokens
    return model.eval(), final_loss


def encode(tokenization: Tokenization, record: Record) -> list[int]:
    """The token ids of a record, as scoring forms them."""
    fields = next(fields for fields in LAYOUTS if all(field in record for field in fields))
    context, target = split_ids(tokenization, Text(record["id"], *LAYOUTS[fields](record)))
    return context + target


def _warmup_cosine(step: int, steps: int, warmup_share: float) -> float:
    """The factor of the learning rate: a linear warm-up, then a half cosine down to zero."""
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _batches(
    sequences: list[list[int]], pad: int, order: random.Random, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of (inputs, labels), each [batch, length - 1], of sequences of about equal lengths, in random order.

    Padding is on the right, where causal attention never sees it, so no attention mask is needed.
    """
    shuffled = order.sample(sequences, len(sequences))
    # A small jitter changes the neighbours from epoch to epoch.
    shuffled.sort(key=lambda ids: len(ids) + order.uniform(-4, 4))
    batches = [shuffled[start : start + size] for start in range(0, len(shuffled), size)]
    order.shuffle(batches)
    for batch in batches:
        length = max(map(len, batch))
        inputs = torch.tensor([ids + [pad] * (length - len(ids)) for ids in batch])
        labels = torch.tensor([ids + [IGNORED] * (length - len(ids)) for ids in batch])
        yield inputs[:, :-1], labels[:, 1:]
