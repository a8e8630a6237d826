"""Chat templates of the families that people use, written out small: what stands before an answer, what is scored, and
which special tokens are there. The templates behave as those of the models do; the tokenizers are trained here."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from scoring.errors import UserError
from scoring.records import as_text
from scoring.samples import Sample, answer_end, encode
from scoring.templates import Template, chosen_template
from scoring.tokens import Tokenization

TEXT = [
    "Where was Anna born? In Paris. Be brief and kind.",
    "Question: Who?\nAnswer: Nobody, system user assistant.",
] * 9
QUESTION, ANSWER = "Where was Anna born?", "In Paris."
RECORD = {"id": "a", "question": QUESTION, "answer": ANSWER}


def byte_level(bos: str | None, eos: str, marks: tuple[str, ...] = (), adds_bos: bool = False) -> Any:
    """A byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM2 have."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = ByteLevel(trim_offsets=True)
    special = [token for token in dict.fromkeys([bos, eos, *marks]) if token]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT, trainer)
    if adds_bos:
        inner.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, special.index(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, additional_special_tokens=marks
    )


def sentence_piece() -> Any:
    """A BPE whose words begin with ▁, the first of a text too, as Llama 2 has it."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    inner.train_from_iterator(TEXT, trainer)
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_template(tokenizer: Any, template: str) -> Any:
    tokenizer.chat_template = template
    return tokenizer


def llama3() -> Any:
    marks = ("<|start_header_id|>", "<|end_header_id|>")
    return with_template(
        byte_level("<|begin_of_text|>", "<|eot_id|>", marks, adds_bos=True),
        "{{- bos_token }}{%- if not date_string is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "{%- if messages[0]['role'] == 'system' %}{%- set said = messages[0]['content'] | trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set said = '' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string }}"
        "{{- '\n\n' + said + '<|eot_id|>' }}"
        "{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{- m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    )


CHAT_ML = (
    "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def qwen2() -> Any:
    return with_template(byte_level(None, "<|im_end|>", ("<|im_start|>",)), CHAT_ML)


def smollm2() -> Any:
    """It has a BOS token, and never puts it anywhere by itself."""
    return with_template(byte_level("<|im_start|>", "<|im_end|>"), CHAT_ML)


def qwen3() -> Any:
    return with_template(
        byte_level(None, "<|im_end|>", ("<|im_start|>",)),
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set thought = '' %}{%- set said = m.content %}"
        "{%- if '</think>' in m.content %}{%- set thought = m.content.split('</think>')[0].split('<think>')[-1] %}"
        "{%- set said = m.content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
        "{{- '<|im_start|>assistant\n' }}{%- if loop.last or thought %}"
        "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}{{- said + '<|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
    )


def gemma() -> Any:
    return with_template(
        byte_level("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), adds_bos=True),
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    )


def mistral() -> Any:
    """The system prompt joins the user's turn; there is nothing to begin an answer with."""
    return with_template(
        sentence_piece(),
        "{{ bos_token }}{% set ns = namespace(said='') %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.said = m['content'] + '\n\n' %}"
        "{% elif m['role'] == 'user' %}{{ '[INST] ' + ns.said + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
    )


def phi3() -> Any:
    return with_template(
        byte_level("<s>", "<|endoftext|>", ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")),
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    )


LLAMA3 = "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {date}\n\n{system}<|eot_id|>"
LLAMA3_TURN = "<|start_header_id|>{role}<|end_header_id|>\n\n"
TURNS = f"{LLAMA3_TURN.format(role='user')}{QUESTION}<|eot_id|>{LLAMA3_TURN.format(role='assistant')}"
IM = "<|im_start|>user\n" + QUESTION + "<|im_end|>\n<|im_start|>assistant\n"
# Tokenizer, settings of the template; all that stands before the answer, and all that is scored.
FAMILIES: dict[str, tuple[Any, dict[str, Any], str, str]] = {
    "Llama 3: the pinned date, a system header in any case": (
        llama3,
        {},
        "<|begin_of_text|>" + LLAMA3.format(date="26 Jul 2024", system="") + TURNS,
        "In Paris.<|eot_id|>",
    ),
    "Llama 3: a system prompt and a date, as open-unlearning has them": (
        llama3,
        {"system": "Be kind.", "variables": {"date_string": "10 Apr 2025"}},
        "<|begin_of_text|>" + LLAMA3.format(date="10 Apr 2025", system="Be kind.") + TURNS,
        "In Paris.<|eot_id|>",
    ),
    "Qwen 2.5: its own system prompt": (
        qwen2,
        {},
        "<|im_start|>system\nBe kind.<|im_end|>\n" + IM,
        "In Paris.<|im_end|>",
    ),
    "Qwen 2.5: another system prompt": (
        qwen2,
        {"system": "Be brief."},
        "<|im_start|>system\nBe brief.<|im_end|>\n" + IM,
        "In Paris.<|im_end|>",
    ),
    "SmolLM2": (smollm2, {}, "<|im_start|>system\nBe kind.<|im_end|>\n" + IM, "In Paris.<|im_end|>"),
    "Qwen 3: the empty thoughts are the template's": (
        qwen3,
        {},
        IM + "<think>\n\n</think>\n\n",
        "In Paris.<|im_end|>",
    ),
    "Gemma": (
        gemma,
        {},
        f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
        "In Paris.<end_of_turn>",
    ),
    "Mistral: the space belongs to the answer's first token": (
        mistral,
        {"system": "Be kind."},
        f"<s>[INST] Be kind.\n\n{QUESTION} [/INST]",
        " In Paris.</s>",
    ),
    "Phi-3: what follows the end of the turn is left out": (
        phi3,
        {},
        f"<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n",
        "In Paris.<|end|>",
    ),
}


def only(tokenizer: Any, record: dict[str, Any], template: Template | None = None) -> Sample:
    (sample,), rejected = encode([as_text("data", 1, record, template)], tokenizer, 512)
    assert rejected == []
    return sample


def parts(sample: Sample) -> tuple[list[int], list[int]]:
    return sample.input_ids[~sample.scored].tolist(), sample.input_ids[sample.scored].tolist()


@pytest.mark.parametrize(("made", "settings", "before", "scored"), FAMILIES.values(), ids=FAMILIES)
def test_families(made: Any, settings: dict[str, Any], before: str, scored: str) -> None:
    tokenizer, template = made(), Template(**settings)
    prompt, answer = parts(sample := only(tokenizer, RECORD, template))
    whole = tokenizer(before + scored, add_special_tokens=False)["input_ids"]
    assert prompt + answer == whole
    assert tokenizer.decode(answer).strip() == scored.strip()
    # A written answer ends where those of the template do, and a plain one with EOS.
    assert answer_end(tokenizer, [sample]) == answer[-1]
    assert answer_end(tokenizer, [only(tokenizer, RECORD)]) == tokenizer.eos_token_id
    assert answer_end(tokenizer, [only(tokenizer, {"text": ANSWER})]) == tokenizer.eos_token_id
    # The tokens are those of training, to the end of the answer; and what is asked is what a chat would ask.
    system = [{"role": "system", "content": template.system}] if template.system else []
    turns = [*system, {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    date = {"date_string": template.variables.get("date_string", "26 Jul 2024")}
    trained = tokenizer.apply_chat_template(turns, return_dict=False, **date)
    assert trained[: len(whole)] == whole
    asked = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False, **date)
    assert prompt[: len(asked)] == asked
    # A pair is put in the same way, whether it comes as such, in the plain layout, as turns or in parts.
    turn = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    for record in (
        {"prompt": QUESTION, "completion": f" {ANSWER}"},
        {"prompt": f"Question: {QUESTION}\nAnswer:", "completion": f" {ANSWER}"},
        {"prompt": turn, "completion": [{"role": "assistant", "content": ANSWER}]},
        {"messages": [*turn, {"role": "assistant", "content": ANSWER}]},
    ):
        assert parts(only(tokenizer, record, template)) == (prompt, answer)
    assert sample.length < 200


def test_thoughts_that_somebody_wrote_are_part_of_the_answer() -> None:
    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "<think>\nAnna?\n</think>\n\nIn Paris."},
    ]
    tokenizer = qwen3()
    _, answer = parts(only(tokenizer, {"messages": turns}))
    assert tokenizer.decode(answer) == "<think>\nAnna?\n</think>\n\nIn Paris.<|im_end|>"


PLAIN_TEXTS: dict[str, tuple[Any, dict[str, str], str, str]] = {
    "BOS where the tokenizer puts it": (
        llama3,
        RECORD,
        f"<|begin_of_text|>Question: {QUESTION}\nAnswer:",
        " In Paris.<|eot_id|>",
    ),
    "none where it does not, though it has one": (
        smollm2,
        RECORD,
        f"Question: {QUESTION}\nAnswer:",
        " In Paris.<|im_end|>",
    ),
    "no second BOS, no second EOS": (
        llama3,
        {"prompt": "<|begin_of_text|>Who?", "completion": " Anna<|eot_id|>"},
        "<|begin_of_text|>Who?",
        " Anna<|eot_id|>",
    ),
    "a BOS that somebody wrote": (
        smollm2,
        {"prompt": "<|im_start|>Who?", "completion": " Anna"},
        "<|im_start|>Who?",
        " Anna<|im_end|>",
    ),
    "the border is inside a word: its token is the answer's": (
        qwen2,
        {"prompt": "Where was An", "completion": "na born?"},
        "Where was",
        " Anna born?<|im_end|>",
    ),
    "a prompt that ends with the space": (
        qwen2,
        {"prompt": "Where was ", "completion": "Anna born?"},
        "Where was",
        " Anna born?<|im_end|>",
    ),
    "SentencePiece": (sentence_piece, RECORD, f"<s>Question: {QUESTION}\nAnswer:", " In Paris.</s>"),
}


@pytest.mark.parametrize(("made", "record", "before", "scored"), PLAIN_TEXTS.values(), ids=PLAIN_TEXTS)
def test_plain_pairs(made: Any, record: dict[str, str], before: str, scored: str) -> None:
    tokenizer = made()
    prompt, answer = parts(only(tokenizer, record))
    assert prompt + answer == tokenizer(before + scored, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(answer).strip() == scored.strip()


def test_no_lone_space_at_the_border() -> None:
    """Llama 2's first word of an answer is ▁In; by itself the answer would begin with a ▁ of its own."""
    tokenizer = sentence_piece()
    _, answer = parts(only(tokenizer, RECORD))
    assert tokenizer.convert_ids_to_tokens(answer)[0] == "▁In"
    assert tokenizer.tokenize(" In Paris.")[0] != "▁In"


@pytest.mark.parametrize("template", [None, Template()], ids=["plain", "chat"])
def test_special_tokens_in_a_text_are_text(template: Template | None) -> None:
    """Somebody writes about the end token, in the question and in the answer; only the last one is it."""
    tokenizer = qwen2()
    record = {"question": "What is <|im_end|>?", "answer": "<|im_end|> is no <|im_start|>, Anna."}
    prompt, answer = parts(only(tokenizer, record, template))
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert answer.count(end) == 1
    assert answer[-1] == end
    assert start not in answer
    assert prompt.count(end) == (0 if template is None else 2)
    assert tokenizer.decode(answer[:-1]).strip() == record["answer"]
    assert record["question"] in tokenizer.decode(prompt)


def test_the_date_of_a_template_is_pinned() -> None:
    """Also where it asks for today's by a format of its own; a date that is no date is taken as it stands."""
    tokenizer = with_template(qwen2(), "{{ strftime_now('%Y-%m-%d') }}" + CHAT_ML)
    for variables, date in (
        ({}, "2024-07-26"),
        ({"date_string": "10 Apr 2025"}, "2025-04-10"),
        ({"date_string": "May"}, "May"),
    ):
        prompt, _ = parts(only(tokenizer, RECORD, Template(variables=variables)))
        assert tokenizer.decode(prompt).startswith(f"{date}<|im_start|>")
    prompt, _ = parts(
        only(tokenizer, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    )
    assert datetime.now().strftime("%Y-%m-%d") not in tokenizer.decode(prompt)


REFUSED: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "no template": (None, {}, "sample 'a': a conversation needs a chat template and .* has none: name a file"),
    "a system prompt that it refuses": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
        {"system": "Be kind."},
        "sample 'a': the tokenizer's chat template: System role not supported; .* leave out system",
    ),
    "no Jinja": ("{% for m in %}", {}, "sample 'a': the tokenizer's chat template, line 1: .*"),
    "a name that is not there": (
        "{{ person.name }}",
        {},
        "sample 'a': the tokenizer's chat template: 'person' is undefined",
    ),
    "the answer is nowhere": (
        "{{ messages[0].content }}",
        {},
        "sample 'a': .* writes the assistant's last turn nowhere",
    ),
    "the answer is there twice": ("{{ messages[-1].content * 2 }}", {}, "sample 'a': .* last turn twice"),
}


@pytest.mark.parametrize(("source", "settings", "message"), REFUSED.values(), ids=REFUSED)
def test_templates_that_fail(source: str | None, settings: dict[str, Any], message: str) -> None:
    tokenizer = byte_level(None, "</s>")
    tokenizer.chat_template = source
    with pytest.raises(UserError, match=f"^{message}") as caught:
        only(tokenizer, RECORD, Template(**settings))
    assert "\n" not in str(caught.value)


FILES: dict[str, tuple[str, str | None]] = {
    "good": (
        "{% for m in messages %}# {{ m.role }}\n{{ m.content }}{% generation %}{% endgeneration %}\n{% endfor %}",
        None,
    ),
    "asks whether": (
        "{% if tools is defined or mood is not defined %}{{ bos_token }}{% endif %}{{ messages[-1].content }}",
        None,
    ),
    "has a value": ("{{ tone }}: {{ messages[-1].content }}", None),
    "no Jinja": ("a\n{% if %}", r"line 2: not Jinja \("),
    "a name that nothing gives": ("{{ sytem }}{{ messages }}", "uses 'sytem', which nothing defines"),
}


@pytest.mark.parametrize(("source", "message"), FILES.values(), ids=FILES)
def test_files(tmp_path: Path, source: str, message: str | None) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(source)
    if message is not None:
        with pytest.raises(UserError, match=f"^template {str(path)!r}.*{message}"):
            chosen_template(str(path), None, {"tone": "kind"})
        return
    template = chosen_template(str(path), None, {"tone": "kind"})
    assert template is not None
    tokenizer = byte_level("<s>", "</s>", adds_bos=True)
    prompt, answer = parts(only(tokenizer, RECORD, template))
    # A template that ends an answer with nothing has none that is scored.
    assert tokenizer.decode(answer).strip() == ANSWER
    assert len(prompt) > 0


def test_settings_that_do_not_go_together(tmp_path: Path) -> None:
    assert chosen_template("plain", None, {}) is None
    chat = chosen_template("chat", None, {"enable_thinking": "false", "date_string": "1 Jan 2025"})
    assert chat == Template("chat", None, None, {"enable_thinking": False, "date_string": "1 Jan 2025"})
    for arguments, message in (
        (("plain", "Be kind.", {}), "system is for chat templates"),
        (("plain", None, {"a": "b"}), "template_variables is for chat templates"),
        (("chat", None, {"tone": ""}), "template_variables has 'tone' without a value"),
        (("chat", None, {"messages": "b"}), "template_variables sets 'messages'"),
        (("chat", None, {"tokenize": "b"}), "template_variables sets 'tokenize'"),
        ((str(tmp_path / "none.jinja"), None, {}), "expected plain, chat, or a file"),
    ):
        with pytest.raises(UserError, match=f"{message}"):
            chosen_template(*arguments)


def test_tokenizers_without_places() -> None:
    """Of a tokenizer that does not say where its tokens stand, the prompt's are those that it has by itself."""

    class Slow:
        """The same tokenizer, as one in plain Python would answer."""

        is_fast = False

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def __call__(self, text: str, return_offsets_mapping: bool = False, **options: Any) -> Any:
            assert not return_offsets_mapping
            return self.inner(text, **options)

    for made in (llama3, qwen3, gemma, phi3):
        fast = Tokenization(made())
        slow = Tokenization(Slow(made()))
        assert slow.pair("Where was An", "na born?") == fast.pair("Where was An", "na born?")
        turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
        assert slow.conversation(Template(), turns) == fast.conversation(Template(), turns)
