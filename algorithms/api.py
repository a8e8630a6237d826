"""The front door: make a loaded model forget, in this process.

    records -> samples -> the loop of `algorithms.unlearner` -> the model, and the record of how

The command line runs the same loop, on Ray Train workers and from a folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from algorithms.corpus import REFUSALS, Encoder, answers_evaluation, make_corpus
from algorithms.group import ALONE
from algorithms.history import Progress
from algorithms.ray_train import TrainingJob, ensure_reference, unlearner_of
from algorithms.recipe import AnswersMeasured, Execution, Objectives, Recipe, total_updates
from algorithms.tables import tables_of
from scoring.errors import UserError
from scoring.eval_mode import in_eval_mode
from scoring.files import work_folder
from scoring.loaded import check_loaded
from scoring.progress import Bar
from scoring.records import Record, texts_of
from scoring.samples import TextSet, context_length
from scoring.settings import build
from scoring.templates import PLAIN, chosen_template
from scoring.work import LocalPool

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Unlearned:
    """The result of an unlearning run.

    Attributes:
        model: the model that has forgotten: the given one, trained in place; with adapters a copy, with them merged.
        steps: one row per update: loss terms, samples drawn, tokens, seconds.
        epochs: one row per epoch, and row 0 for the initial model: metrics, and how far the weights have moved.
        samples: one row per forget sample: how often it was drawn, and when it was forgotten.
        difficulty: MRD of every sample at every refresh.
        record: recipe, updates, thresholds, seconds, passes, notes, and the samples that were left out.
    """

    model: PreTrainedModel
    steps: pd.DataFrame
    epochs: pd.DataFrame
    samples: pd.DataFrame
    difficulty: pd.DataFrame
    record: dict[str, Any]


def unlearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Iterable[Record | str],
    retain: Iterable[Record | str] | None = None,
    *,
    algorithm: str,
    refusals: Sequence[str] = REFUSALS,
    alternatives: Sequence[Sequence[str]] | None = None,
    evaluate: bool = AnswersMeasured.evaluate,
    evaluate_every: int = AnswersMeasured.evaluate_every,
    evaluate_samples: int = AnswersMeasured.evaluate_samples,
    batch_tokens: int | None = None,
    gradient_checkpointing: bool = False,
    template: str = PLAIN,
    system: str | None = None,
    template_variables: Mapping[str, str | bool] | None = None,
    progress: bool = False,
    **recipe: Any,
) -> Unlearned:
    """Make a loaded model forget records. It is trained in place, and left in eval mode: copy it first if the original
    is still needed.

    Args:
        model: a transformers causal LM in fp32 or fp64.
        tokenizer: its tokenizer.
        forget: the records to forget, as `scoring.score` takes them.
        retain: the records to retain; algorithms with a retain term need them. None evaluates the forget set alone.
        algorithm: a key of `algorithms.objectives.ALGORITHMS`, such as "NPO".
        refusals: the answers that PO and IdkDPO teach, one string each (the setting of the command line names a file).
        alternatives: the answers that AltPO teaches: one or more for each record to forget, in the records' order.
        evaluate: measure ROUGE-L recall and probability of the answers.
        evaluate_every: epochs from one measurement to the next; 0: only of the initial and the last model.
        evaluate_samples: the most samples of each set that are evaluated, evenly spaced.
        batch_tokens: padded tokens in a micro-batch; None: as many as suit the model's device.
        gradient_checkpointing: recompute activations in the backward pass, which takes less memory.
        template, system, template_variables: how pairs and conversations are put, see `scoring.templates`.
        progress: show a bar.
        recipe: further fields of `algorithms.recipe.Recipe`, such as `epochs=4`, `alpha=1` or `seed=1`.

    Returns:
        The model, and the record of the run; samples are in the order of the records.

    Raises:
        UserError: one line: a setting, a record or the model at fault, or training diverged.
    """
    settings = build(Recipe, {"algorithm": algorithm, **recipe})
    settings = dataclasses.replace(settings, **settings.resolved())
    execution = build(
        Execution,
        {"workers": 0, "batch_tokens": batch_tokens, "gradient_checkpointing": gradient_checkpointing},
    )
    measured = build(
        AnswersMeasured,
        {"evaluate": evaluate, "evaluate_every": evaluate_every, "evaluate_samples": evaluate_samples},
    )
    answers = refusals if isinstance(refusals, str) or not isinstance(refusals, Iterable) else list(refusals)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"refusals is {answers!r}: expected a list of answers, at least one")
    check_loaded(model, tokenizer)
    if (dtype := next(model.parameters()).dtype).itemsize < 4:
        raise UserError(f"model is in {str(dtype).removeprefix('torch.')}: its weights must be fp32; use model.float()")
    encoder = Encoder(tokenizer, context_length(model.config), model.config.get_text_config().vocab_size)
    chat = chosen_template(template, system, template_variables or {})
    forget_texts = TextSet("forget", texts_of("forget", forget, chat))
    retain_texts = None if retain is None else TextSet("retain", texts_of("retain", retain, chat))
    taught: Sequence[str] | Mapping[str, Sequence[str]] = answers
    if Objectives.of(settings).teaches == "alternatives":
        taught = _alternatives_of(forget_texts, alternatives)
    corpus, unused = make_corpus(settings, encoder, forget_texts, retain_texts, taught)
    evaluation = None
    if measured.evaluate:
        evaluation = answers_evaluation(
            encoder, corpus, retain_texts, measured.evaluate_samples, measured.evaluate_every
        )
    total = total_updates(len(corpus.forget), settings)
    with (
        ExitStack() as on_error,
        work_folder() as folder,
        Bar(f"unlearning ({settings.algorithm})", total, "update", progress) as bar,
    ):
        on_error.enter_context(in_eval_mode(model))
        job = TrainingJob(
            settings,
            execution,
            corpus,
            source="",
            revision=None,
            folder=folder,
            tokenizer=tokenizer,
            evaluation=evaluation,
            keeps_checkpoints=False,
        )

        def show(progress: Progress) -> None:
            bar.at(progress.step)
            bar.left = progress.seconds_left

        ensure_reference(job, lambda: LocalPool(model), model.device, model.config)
        unlearner = unlearner_of(job, model, ALONE, show)
        history = unlearner.run()
        unlearned_model = unlearner.trained.finished_model()
        on_error.pop_all()  # it stays in eval mode
    tables = {name: table.to_pandas() for name, table in tables_of(history, corpus).items()}
    record = {
        "recipe": dataclasses.asdict(settings),
        "updates": history.step,
        "thresholds": history.known_thresholds,
        "seconds": history.seconds,
        "passes": history.passes,
        "notes": history.notes,
        "rejected": unused,
    }
    return Unlearned(unlearned_model, **tables, record=record)


def _alternatives_of(forget: TextSet, alternatives: Sequence[Sequence[str]] | None) -> dict[str, Sequence[str]]:
    """Sample id -> alternative answers."""
    lists = [] if alternatives is None or isinstance(alternatives, str) else list(alternatives)
    for number, answers in enumerate(lists):
        if isinstance(answers, str) or not answers or not all(isinstance(answer, str) and answer for answer in answers):
            raise UserError(f"alternatives[{number}] is {answers!r}: expected a list of answers, at least one")
    if len(lists) != len(forget.texts):
        raise UserError(
            f"alternatives has {len(lists)} lists for {len(forget.texts)} records: expected a list of answers for each"
        )
    return {text.sample_id: answers for text, answers in zip(forget.texts, lists, strict=True)}
