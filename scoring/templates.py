"""Templates: how questions, answers and conversations become the text that a model reads.

"plain" writes a pair as `scoring.records` says. Every other template is a chat template in Jinja, the tokenizer's own
or a file, and transformers renders it, as in training and in use; here is only what a measurement needs beyond that:
the place of the answer in the text, and a date that stays the same.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from scoring.errors import UserError, first_line
from scoring.settings import Doc, named

Turn = dict[str, str]
PLAIN, CHAT = "plain", "chat"
# The date of templates that write today's, unless the variable date_string has another: the one that Llama's own
# template falls back to. With today's the same data would have other tokens tomorrow.
PINNED_DATE = "26 Jul 2024"
DATE_FORMAT = "%d %b %Y"
# Stand-ins that no text has.
ANSWER = "\0answer\0"
LITERAL = re.compile("\0(\\d+)\0")
# What transformers gives every template.
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "date_string"}


@dataclass(frozen=True)
class Template:
    """A chat template and what it is given.

    Attributes:
        name: for messages.
        source: in Jinja; None: the tokenizer's own.
        system: the system turn of conversations that have none; None: they stay without.
        variables: further names in the template, with their values.
    """

    name: str = CHAT
    source: str | None = None
    system: str | None = None
    variables: Mapping[str, str | bool] = field(default_factory=dict)

    def with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns of a conversation, the system turn first if there is one to add."""
        begun = turns and turns[0]["role"] == "system"
        return list(turns) if self.system is None or begun else [{"role": "system", "content": self.system}, *turns]

    def render(self, tokenizer: Any, turns: Sequence[Turn], for_answer: bool = False, unfinished: bool = False) -> str:
        """The text of a conversation.

        Args:
            tokenizer: has the template, and the special tokens that it names.
            turns: of the conversation.
            for_answer: add what an assistant's turn begins with.
            unfinished: leave out what comes after the last turn: it is to be written further.

        Raises:
            UserError: one line: there is no template, or it cannot be rendered with these turns.
        """
        if self.source is None and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                "a conversation needs a chat template and this tokenizer has none: name a file with one as "
                f"{named('template')}, or add chat_template to its tokenizer_config.json"
            )
        date = str(self.variables.get("date_string", PINNED_DATE))
        names = {"date_string": date, "strftime_now": lambda style: _written(date, style)} | dict(self.variables)
        try:
            text = tokenizer.apply_chat_template(
                list(turns),
                chat_template=self.source,
                add_generation_prompt=for_answer,
                tokenize=False,
                continue_final_message=unfinished,
                **names,
            )
        except Exception as error:  # of Jinja, or of whatever a template calls
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            hint = ""
            if turns[0]["role"] == "system":
                hint = f"; it was given a system turn: if it takes none, leave out {named('system')} or the turn"
            raise UserError(f"{self.of_whom}{line}: {first_line(error)}{hint}") from error
        return str(text)

    def digest(self, tokenizer: Any) -> str:
        """A hash of all that decides how a conversation is rendered."""
        source = self.source or getattr(tokenizer, "chat_template", None)
        content = json.dumps([source, self.system, dict(self.variables)], sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def of_whom(self) -> str:
        return "the tokenizer's chat template" if self.source is None else f"template {self.name!r}"


def _written(date: str, style: str) -> str:
    """The pinned date as a template asks for it; as it stands if it is not written as the default one is."""
    try:
        return datetime.strptime(date, DATE_FORMAT).strftime(style)
    except ValueError:
        return date


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: all of it.
        start, end: of the last turn's answer in it; what the template puts around the answer is outside.
        literals: start and end of each special token that stands in what people wrote, and so is none.
    """

    text: str
    start: int
    end: int
    literals: tuple[tuple[int, int], ...]


def rendered(template: Template, tokenizer: Any, turns: Sequence[Turn], special: re.Pattern[str] | None) -> Rendered:
    """A conversation that ends with an assistant's turn, and where that turn's answer stands.

    The answer's place is where a stand-in for it comes out. A template that writes something else for it (the thoughts
    in it, say, in a block of their own) has the answer begin where the assistant's turn does.

    Args:
        template: to render.
        tokenizer: see `Template.render`.
        turns: of the conversation.
        special: matches special tokens in the turns; None: there are none.

    Raises:
        UserError: one line: see `Template.render`; or the answer is not in the text, or more than once.
    """
    written: list[str] = []

    def hidden(match: re.Match[str]) -> str:
        written.append(match[0])
        return f"\0{len(written) - 1}\0"

    turns = template.with_system(turns)
    if special is not None:
        turns = [{**turn, "content": special.sub(hidden, turn["content"])} for turn in turns]
    whole = template.render(tokenizer, turns)
    probe = template.render(tokenizer, [*turns[:-1], {**turns[-1], "content": ANSWER}])
    before, answer, after = probe.partition(ANSWER)
    if not answer or ANSWER in after:
        raise UserError(f"{template.of_whom} writes the assistant's last turn {'twice' if answer else 'nowhere'}")
    start, end = len(before), len(whole) - len(after)
    if not (whole.startswith(before) and whole.endswith(after) and start <= end):
        start = len(asked := template.render(tokenizer, turns[:-1], for_answer=True))
        end = end if whole.endswith(after) else len(whole)
        if not whole.startswith(asked) or start > end:
            raise UserError(f"{template.of_whom} renders the conversation differently with and without its last turn")
    return _restored(whole, start, end, written)


def _restored(whole: str, start: int, end: int, written: Sequence[str]) -> Rendered:
    """The text with the special tokens in it that were hidden from the template."""

    def restore(text: str) -> str:
        return LITERAL.sub(lambda match: written[int(match[1])], text) if written else text

    literals = []
    for match in LITERAL.finditer(whole) if written else ():
        place = len(restore(whole[: match.start()]))
        literals.append((place, place + len(written[int(match[1])])))
    return Rendered(restore(whole), len(restore(whole[:start])), len(restore(whole[:end])), tuple(literals))


# --- Settings -----------------------------------------------------------------------------------------------

Variable = str | bool


@dataclass(frozen=True, kw_only=True)
class TemplateSettings:
    """How questions and answers are put to a model."""

    template: Annotated[
        str,
        Doc(
            "how questions and answers are written: plain ('Question: ...', 'Answer: ...'), chat (the tokenizer's chat "
            "template), or a file with a chat template in Jinja"
        ),
    ] = PLAIN
    system: Annotated[str | None, Doc("system prompt of every conversation that has none, with a chat template")] = None
    template_variables: Annotated[
        dict[str, Variable],
        Doc(f"names in the chat template, such as date_string=10 Apr 2025 (dates are {PINNED_DATE} otherwise)"),
    ] = field(default_factory=dict)

    def chosen_template(self) -> Template | None:
        """The template; None: plain.

        Raises:
            UserError: one line: settings that do not go together, or a file that is no template.
        """
        return chosen_template(self.template, self.system, self.template_variables)


# The fields of TemplateSettings; what they make of the data is in the data's hash.
TEMPLATE_FIELDS = ("template", "system", "template_variables")


def absolute_template(name: str) -> str:
    """A name that means the same template in every process: of a file its absolute path."""
    return str(Path(name).absolute()) if name not in (PLAIN, CHAT) and Path(name).is_file() else name


def chosen_template(name: str, system: str | None, variables: Mapping[str, Variable]) -> Template | None:
    """The template that settings name; see `TemplateSettings.chosen_template`."""
    if name == PLAIN:
        for setting, value in (("system", system), ("template_variables", variables)):
            if value:
                raise UserError(
                    f"{named(setting)} is for chat templates, and {named('template')} is plain: expected chat or a file"
                )
        return None
    if (empty := next((key for key, value in variables.items() if value == ""), None)) is not None:
        raise UserError(f"{named('template_variables')} has {empty!r} without a value: expected name=value")
    truth = {"true": True, "false": False}
    values = {key: truth.get(value, value) if isinstance(value, str) else value for key, value in variables.items()}
    arguments = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    if taken := next((key for key in values if key in arguments or key in GIVEN - {"date_string"}), None):
        raise UserError(f"{named('template_variables')} sets {taken!r}, which every template is given: leave it out")
    if name == CHAT:
        return Template(CHAT, None, system, values)
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{named('template')} is {name!r}: expected plain, chat, or a file with a chat template")
    try:
        source = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{named('template')} {name!r} cannot be read as UTF-8 text: {first_line(error)}") from error
    _check_source(name, source, values)
    return Template(path.name, source, system, values)


def _check_source(name: str, source: str, variables: Mapping[str, Variable]) -> None:
    """Refuse a file that is no Jinja, or that uses a name which nobody gives it: Jinja would write nothing for it."""
    # A tag of transformers, which changes nothing of the text.
    plain_source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
    jinja = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = jinja.parse(plain_source)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{named('template')} {name!r}, line {error.lineno}: not Jinja ({first_line(error)})") from None
    asked = {test.node.name for test in tree.find_all(nodes.Test) if isinstance(test.node, nodes.Name)}
    special = {f"{kind}_token" for kind in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")}
    known = {*GIVEN, *special, *variables, *jinja.globals, *asked}
    if unknown := sorted(jinja2.meta.find_undeclared_variables(tree) - known):
        raise UserError(
            f"{named('template')} {name!r} uses {unknown[0]!r}, which nothing defines: expected messages, "
            f"add_generation_prompt, bos_token and the like, or a value in {named('template_variables')}"
        )
