"""Samples and batches: token ids with a mask of the scored tokens, padded and grouped by length.

A *scored* token is one that the unlearning loss sees: a token of the answer of a question-answer pair, or any token
but the first of a plain text (the first has no context to be predicted from).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from scoring.errors import UserError
from scoring.templates import Template
from scoring.tokens import Tokenization

T = TypeVar("T")
Tokens = Literal["answer", "all"]
# The default number of padded tokens in a batch: on a GPU, and on a CPU, whose caches hold the activations of fewer.
BATCH_TOKENS, CPU_BATCH_TOKENS = 4096, 1024
BATCH_TOKENS_ARE = f"(default: {CPU_BATCH_TOKENS} on a CPU, {BATCH_TOKENS} on a GPU)"
# The share of a batch that may be padding. A small batch may have more, as another forward costs as much by itself as
# some tokens do: these are a share of the most that a batch may have.
MOST_PADDING, FREE_PADDING = 0.2, 0.125
# The context length of a model that states no limit.
NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class Sample:
    """One tokenized sample.

    Attributes:
        sample_id: unique name within a data set.
        input_ids: token ids, int64, shape (T,).
        scored: which tokens are scored, bool, shape (T,); scored[0] is always False.
        index: position in the data set, so that results can be put back in input order.
    """

    sample_id: str
    input_ids: np.ndarray
    scored: np.ndarray
    index: int = 0

    @property
    def length(self) -> int:
        return len(self.input_ids)

    @property
    def num_scored(self) -> int:
        return int(self.scored.sum())


@dataclass(frozen=True)
class Text:
    """A record before tokenization: the prompt that is conditioned on, and the completion that is scored.

    `completion` None means plain text: everything after the first token is scored. `messages` (a list of
    {"role", "content"}) is rendered by a chat template; its last, assistant, turn is scored. `template` None is the
    tokenizer's own, with nothing added.
    """

    sample_id: str
    prompt: str = ""
    completion: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    template: Template | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is neither a pair nor a conversation."""
        return self.completion is None and self.messages is None

    @property
    def is_empty(self) -> bool:
        """Whether nothing is said that could be scored."""
        said = self.messages[-1]["content"] if self.messages else self.completion
        return not self.prompt if said is None else not said.strip()

    @property
    def words(self) -> str:
        """All that it says, for counts that look at words alone."""
        turns = [turn["content"] for turn in self.messages or ()]
        return " ".join(part.strip() for part in (self.prompt, self.completion, *turns) if part)


@dataclass(frozen=True)
class TextSet:
    """The texts of a data set, and its name.

    Attributes:
        name: name of the data set, for messages.
        texts: the texts in order, each with its own id.
    """

    name: str
    texts: Sequence[Text]


@dataclass(frozen=True)
class Rejected:
    """A sample that cannot be scored, and why."""

    sample_id: str
    reason: str


def split_ids(tokenization: Tokenization, text: Text) -> tuple[list[int], list[int]]:
    """Token ids of the context and of the part to be scored, see `scoring.tokens`.

    Raises:
        UserError: one line that names the sample: a chat template cannot render it.
    """
    if text.messages is not None:
        try:
            return tokenization.conversation(text.template or Template(), text.messages)
        except UserError as error:
            raise UserError(f"sample {text.sample_id!r}: {error}") from error
    if text.completion is None:
        return tokenization.text(text.prompt)
    return tokenization.pair(text.prompt, text.completion)


def encode(
    texts: Iterable[Text], tokenizer: Any, max_length: int, tokens: Tokens = "answer"
) -> tuple[list[Sample], list[Rejected]]:
    """Tokenize texts: the samples, and the texts that cannot be scored, with the reason.

    Args:
        texts: the texts, in data-set order.
        tokenizer: a Hugging Face tokenizer.
        max_length: the model's context length in tokens; longer samples are rejected, never cut.
        tokens: "answer" scores the completion; "all" scores every token after the first.
    """
    samples: list[Sample] = []
    rejected: list[Rejected] = []
    for result in iter_encoded(texts, tokenizer, max_length, tokens):
        if isinstance(result, Sample):
            samples.append(result)
        else:
            rejected.append(result)
    return samples, rejected


def encode_checked(
    texts: TextSet, tokenizer: Any, max_length: int, vocabulary: int, tokenizer_name: str, tokens: Tokens = "answer"
) -> tuple[list[Sample], list[Rejected]]:
    """The results of `encode`, for a model that embeds `vocabulary` tokens.

    Raises:
        UserError: there is no sample, or one has a token that the model does not know.
    """
    samples, rejected = encode(texts.texts, tokenizer, max_length, tokens)
    largest = max((int(sample.input_ids.max()) for sample in samples), default=-1)
    check_tokens(len(samples), largest, rejected, vocabulary, tokenizer_name, texts.name)
    return samples, rejected


def iter_encoded(
    texts: Iterable[Text], tokenizer: Any, max_length: int, tokens: Tokens = "answer"
) -> Iterator[Sample | Rejected]:
    """The results of `encode` one at a time, in the order of the texts."""
    tokenization = Tokenization(tokenizer)
    for index, text in enumerate(texts):
        if text.is_empty:
            yield Rejected(text.sample_id, "empty text" if text.is_plain else "empty answer")
            continue
        context, target = split_ids(tokenization, text)
        ids = np.asarray(context + target, dtype=np.int64)
        scored = np.zeros(len(ids), dtype=bool)
        if tokens == "all":
            scored[1:] = True
        else:
            scored[max(1, len(context)) :] = True
        if len(ids) > max_length:
            yield Rejected(text.sample_id, f"{len(ids)} tokens, the model's context holds {max_length}")
        elif not scored.any():
            yield Rejected(text.sample_id, "no scored token")
        else:
            yield Sample(text.sample_id, ids, scored, index)


def answer_end(tokenizer: Any, samples: Sequence[Sample]) -> int | None:
    """The token that ends a written answer: the special token that the samples' answers end with, such as a chat
    template's end of a turn; else the tokenizer's EOS token, None if it has none."""
    last = {int(sample.input_ids[-1]) for sample in samples}
    return last.pop() if len(last) == 1 and last <= set(tokenizer.added_tokens_decoder) else tokenizer.eos_token_id


def check_tokens(
    count: int, largest: int, rejected: Sequence[Rejected], vocabulary: int, tokenizer: str, name: str
) -> None:
    """Refuse samples that a model cannot take.

    Args:
        count: number of samples.
        largest: the largest token id in them.
        rejected: the texts that are not among the samples.
        vocabulary: number of tokens that the model embeds.
        tokenizer: name of the tokenizer, for messages.
        name: name of the data set, for messages.

    Raises:
        UserError: there is no sample, or one has a token that the model does not know.
    """
    if not count:
        raise nothing_scored(name, rejected)
    if largest >= vocabulary:
        raise UserError(
            f"vocabulary mismatch: {tokenizer} gives token id {largest}, the model embeds {vocabulary}; use the "
            "tokenizer that the model was trained with"
        )


def nothing_scored(name: str, rejected: Sequence[Rejected]) -> UserError:
    """The error for a data set in which no sample can be scored."""
    if not rejected:
        return UserError(f"{name}: there is no record; expected at least one")
    first = rejected[0]
    return UserError(
        f"{name}: none of {len(rejected)} samples can be scored; the first, {first.sample_id!r}: {first.reason}"
    )


def context_length(config: Any) -> int:
    """Tokens that a model of this configuration can read."""
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit or NO_LIMIT


def sent(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Values on a device. A GPU gets them when it has done what it was asked to before, and nobody waits for that; from
    a GPU they are there when this returns."""
    return values.to(device, non_blocking=torch.device(device).type == "cuda")


@dataclass(frozen=True)
class Batch:
    """Right-padded samples. B samples, T tokens in the longest, at most S scored tokens in one.

    Attributes:
        input_ids: (B, T) int64. Padding repeats a sample's last token: causal attention never looks at it.
        positions: (B, S) int64, where the scored tokens are predicted: one before the token itself.
        targets: (B, S) int64, the scored tokens.
        mask: (B, S) bool, False where a row has fewer than S scored tokens.
        lengths: (B,) int64, tokens per sample.
        indices: (B,) int64, positions in the data set.
        sample_ids: B names.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor
    indices: torch.Tensor
    sample_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sample_ids)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            sent(self.input_ids, device),
            sent(self.positions, device),
            sent(self.targets, device),
            sent(self.mask, device),
            sent(self.lengths, device),
            sent(self.indices, device),
            self.sample_ids,
        )

    def rows(self, start: int, stop: int) -> Batch:
        """The samples start..stop-1 of this batch, re-padded to their own lengths."""
        return collate([self.sample(i) for i in range(start, stop)])

    def select(self, rows: torch.Tensor) -> Batch:
        """The samples in these rows, re-padded to their own lengths, on the same device."""
        return collate([self.sample(i) for i in rows.tolist()]).to(self.input_ids.device)

    def sample(self, row: int) -> Sample:
        """The sample in a row, without padding."""
        ids = self.input_ids[row, : int(self.lengths[row])].cpu().numpy()
        scored = np.zeros(len(ids), dtype=bool)
        scored[self.positions[row][self.mask[row]].cpu().numpy() + 1] = True
        return Sample(self.sample_ids[row], ids, scored, int(self.indices[row]))


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad samples to one batch."""
    rows = len(samples)
    longest = max(sample.length for sample in samples)
    most_scored = max(sample.num_scored for sample in samples)
    input_ids = np.empty((rows, longest), dtype=np.int64)
    positions = np.zeros((rows, most_scored), dtype=np.int64)
    targets = np.zeros((rows, most_scored), dtype=np.int64)
    mask = np.zeros((rows, most_scored), dtype=bool)
    for row, sample in enumerate(samples):
        input_ids[row, : sample.length] = sample.input_ids
        input_ids[row, sample.length :] = sample.input_ids[-1]
        places = np.flatnonzero(sample.scored)
        positions[row, : len(places)] = places - 1
        targets[row, : len(places)] = sample.input_ids[places]
        mask[row, : len(places)] = True
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(positions),
        torch.from_numpy(targets),
        torch.from_numpy(mask),
        torch.tensor([sample.length for sample in samples]),
        torch.tensor([sample.index for sample in samples]),
        tuple(sample.sample_id for sample in samples),
    )


def default_batch_tokens(device: torch.device | str) -> int:
    """Padded tokens in a batch, where nobody has said how many."""
    return CPU_BATCH_TOKENS if torch.device(device).type == "cpu" else BATCH_TOKENS


def make_batches(samples: Sequence[Sample], batch_tokens: int) -> list[Batch]:
    """Group samples of similar length into batches of at most `batch_tokens` padded tokens, and little padding.

    The grouping depends on the samples' tokens alone, not on their order in the data set, nor on how many replicas
    share the work; so scores do not depend on these either, to the bit. A sample longer than `batch_tokens` gets a
    batch of its own.
    """
    groups = group_samples(
        np.array([sample.length for sample in samples], dtype=np.int64),
        np.array([sample.num_scored for sample in samples], dtype=np.int64),
        np.array([token_digest(sample.input_ids) for sample in samples], dtype=np.uint64),
        np.array([sample.index for sample in samples], dtype=np.int64),
        batch_tokens,
    )
    return [collate([samples[i] for i in group.tolist()]) for group in groups]


def token_digest(input_ids: np.ndarray) -> int:
    """Eight bytes, as a number, that tell samples of equal length apart by their tokens."""
    return int.from_bytes(hashlib.blake2b(input_ids.astype(np.int64).tobytes(), digest_size=8).digest(), "little")


def group_samples(
    lengths: np.ndarray, num_scored: np.ndarray, digests: np.ndarray, indices: np.ndarray, batch_tokens: int
) -> list[np.ndarray]:
    """The positions of the samples of each batch; see `make_batches`. All arrays are (N,); `digests` holds each
    sample's `token_digest`."""
    order = np.lexsort((indices, digests, num_scored, lengths))
    starts: list[int] = []
    tokens = 0  # of the batch, without padding
    for place, length in enumerate(lengths[order].tolist()):
        padded = (place + 1 - starts[-1]) * length if starts else 0
        padding = padded - tokens - length
        wasteful = padding > max(MOST_PADDING * padded, FREE_PADDING * batch_tokens)
        if not starts or padded > batch_tokens or wasteful:
            starts.append(place)
            tokens = 0
        tokens += length
    return [order[first:last] for first, last in pairwise([*starts, len(order)])]


def evenly_spaced(items: Sequence[T], most: int | None) -> list[T]:
    """At most `most` of the items, evenly spaced from the first to the last; None: all."""
    places = np.linspace(0, len(items) - 1, min(most or len(items), len(items))).round().astype(int)
    return [items[i] for i in places.tolist()]
