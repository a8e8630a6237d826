"""Specs from files and flags: what each value becomes, and the one line that each mistake gets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.files.spec import make_spec, read_spec
from scoring.errors import UserError


@dataclass(frozen=True)
class Training:
    model: str
    learning_rate: float
    epochs: int = 5
    warm: bool = False
    split: str | None = None
    max_steps: int | None = None
    draws: int | str | None = None
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    derived: int = dataclasses.field(default=0, init=False)


FIELDS = "model, learning_rate, epochs, warm, split, max_steps, draws, weights"
REQUIRED = "model: authors\nlearning_rate: 5e-5\n"


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that messages name the file as it was named: spec.yaml."""
    monkeypatch.chdir(tmp_path)


def read(text: str | bytes, **given: Any) -> Training:
    Path("spec.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_spec("spec.yaml", Training, given)


def message(text: str | bytes, **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(text, **given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_type_of_field():
    spec = read(
        """
        # a comment
        model: ./models/small
        learning_rate: 5e-5
        epochs: 3
        warm: yes
        split: forget10
        max_steps: 100
        draws: auto
        weights: {forget: 1, retain: 2.5e-1}
        """
    )
    assert spec == Training("./models/small", 5e-5, 3, True, "forget10", 100, "auto", {"forget": 1.0, "retain": 0.25})
    assert isinstance(spec.weights["forget"], float)


def test_fields_left_out_take_their_defaults():
    assert read(REQUIRED) == Training("authors", 5e-5)
    assert read(REQUIRED + "max_steps: null\nsplit:\ndraws: ~\n") == Training("authors", 5e-5)


@pytest.mark.parametrize(
    ("written", "number"),
    [("5e-5", 5e-5), ("5E-5", 5e-5), ("1e3", 1e3), (".5e-1", 0.05), ("-1.e+2", -100.0), ("0.1", 0.1), ("2", 2.0)],
)
def test_numbers_as_people_write_them(written, number):
    value = read(f"model: m\nlearning_rate: {written}").learning_rate
    assert value == number
    assert isinstance(value, float)


def test_a_quoted_number_is_text():
    assert read("model: '5e-5'\nlearning_rate: 1").model == "5e-5"
    assert message("model: m\nlearning_rate: '5e-5'") == "spec.yaml: learning_rate is '5e-5': expected a number"


@pytest.mark.parametrize("field", ["epochs", "max_steps", "draws"])
def test_a_float_without_a_fraction_is_a_whole_number(field):
    for written, number in (("5.0", 5), ("1e2", 100)):
        value = getattr(read(f"{REQUIRED}{field}: {written}"), field)
        assert value == number
        assert isinstance(value, int)


def test_flags_come_before_the_file():
    assert read(REQUIRED + "epochs: 3\n", epochs=7, split="forget05") == Training(
        "authors", 5e-5, epochs=7, split="forget05"
    )
    # A flag that says what the default is overrides too, and a required field may come from a flag.
    assert read("model: m\nepochs: 3\n", epochs=5, learning_rate=0.1) == Training("m", 0.1, epochs=5)
    # What is overridden need not be right.
    assert read(REQUIRED + "epochs: many\n", epochs=2).epochs == 2


def test_flags_alone():
    assert make_spec(Training, {"model": "m", "learning_rate": 1}, "command line") == Training("m", 1.0)
    with pytest.raises(UserError) as caught:
        make_spec(Training, {"epochs": 1}, "command line")
    assert str(caught.value) == (
        "command line: missing model, learning_rate: expected in a spec file, or as --model, --learning-rate"
    )


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("learning_rate: fast", "learning_rate is 'fast': expected a number"),
        ("learning_rate: true", "learning_rate is true: expected a number"),
        ("learning_rate:", "learning_rate is empty: expected a number"),
        ("epochs: 5.5", "epochs is 5.5: expected a whole number"),
        ("epochs: true", "epochs is true: expected a whole number"),
        ("epochs: .inf", "epochs is inf: expected a whole number"),
        ("epochs: [5, 6]", "epochs is a list: expected a whole number"),
        ("max_steps: 1.5", "max_steps is 1.5: expected a whole number"),
        ("draws: [1]", "draws is a list: expected a whole number or text"),
        ("warm: 1", "warm is 1: expected true or false"),
        ("warm: 'yes'", "warm is 'yes': expected true or false"),
        ("split: 10", "split is 10: expected text; put it in quotes"),
        ("split: 12e5", "split is 1200000.0: expected text; put it in quotes"),
        ("split: 2024-01-31", "split is 2024-01-31: expected text; put it in quotes"),
        ("split: {a: b}", "split is a mapping: expected text"),
        ("model:", "model is empty: expected text"),
        ("weights: 1", "weights is 1: expected a mapping, one 'name: value' a line"),
        ("weights: {forget: high}", "weights['forget'] is 'high': expected a number"),
        ("weights: {5: 0.1}", "weights[5] is 5: expected text; put it in quotes"),
        (f"learning_rate: {'a' * 100}", f"learning_rate is '{'a' * 56}...: expected a number"),
    ],
)
def test_values_of_the_wrong_type(line, complaint):
    name = line.split(":")[0]
    rest = "".join(f"{other}\n" for other in REQUIRED.splitlines() if not other.startswith(f"{name}:"))
    assert message(rest + line) == f"spec.yaml: {complaint}"


@pytest.mark.parametrize("field", ["model", "split"])
@pytest.mark.parametrize(("word", "read_as"), [("no", "false"), ("off", "false"), ("Yes", "true"), ("on", "true")])
def test_words_that_yaml_takes_for_truth_values(field, word, read_as):
    rest = REQUIRED if field == "split" else "learning_rate: 1\n"
    assert message(f"{rest}{field}: {word}") == (
        f"spec.yaml: {field} is {read_as}: expected text; YAML reads yes, no, on and off as true and false: put them "
        "in quotes"
    )
    assert getattr(read(f"{rest}{field}: '{word}'"), field) == word


def test_a_flag_of_the_wrong_type_is_not_the_file_s_fault():
    assert message(REQUIRED, weights={"a": "b"}) == "command line: weights['a'] is 'b': expected a number"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("learning_rte", "; did you mean 'learning_rate'?"),
        ("learning-rate", "; did you mean 'learning_rate'?"),
        ("xyz", ""),
        ("derived", "; did you mean 'learning_rate'?"),  # a field, but not for the user to set
        ("7", ""),
    ],
)
def test_unknown_fields(name, hint):
    assert message(f"{REQUIRED}{name}: 1") == f"spec.yaml: unknown field '{name}': expected one of {FIELDS}{hint}"


def test_missing_fields():
    assert message("learning_rate: 1") == "spec.yaml: missing model: expected in a spec file, or as --model"
    assert message("model: m") == ("spec.yaml: missing learning_rate: expected in a spec file, or as --learning-rate")


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (REQUIRED + "epochs: 1\nmodel: other\n", 4, "'model' occurs twice"),
        (REQUIRED + "weights:\n  a: 1\n  b: 2\n  'a': 3\n", 6, "'a' occurs twice"),
        (REQUIRED + "epochs: 1: 2\n", 3, "mapping values are not allowed here"),
        (REQUIRED + "\tepochs: 1\n", 3, "while scanning for the next token found character '\\t' that cannot start"),
        (REQUIRED + "weights: {a: 1\n", 4, "while parsing a flow mapping expected ',' or '}', but got"),
        (REQUIRED + "split: a\x00b\n", 3, "special characters are not allowed"),
        (REQUIRED + "---\nepochs: 1\n", 3, "expected a single document in the stream but found another document"),
        # A safe loader makes plain values only.
        (
            REQUIRED + "split: !!python/object/apply:os.getcwd []\n",
            3,
            "could not determine a constructor for the tag",
        ),
    ],
)
def test_not_yaml(text, line, problem):
    assert message(text).startswith(f"spec.yaml, line {line}: not valid YAML ({problem}")


def test_what_yaml_cannot_hold_has_no_line():
    assert message(REQUIRED + "split: 2024-13-45\n").startswith("spec.yaml: not valid YAML (month must be in 1..12")


def test_the_same_key_in_two_mappings_is_no_duplicate():
    assert read(REQUIRED + "weights: {model: 1, epochs: 2}\n").weights == {"model": 1.0, "epochs": 2.0}


@pytest.mark.parametrize(
    ("text", "found"), [("", "empty"), ("# only this\n", "empty"), ("- model: m\n", "a list"), ("model", "'model'")]
)
def test_not_a_mapping(text, found):
    assert message(text) == f"spec.yaml is {found}: expected a mapping, one 'name: value' a line"


def test_files_that_cannot_be_read():
    with pytest.raises(UserError, match=r"^spec file 'none\.yaml' cannot be read \(No such file or directory\): expec"):
        read_spec("none.yaml", Training, {})
    Path("folder").mkdir()
    with pytest.raises(
        UserError, match=r"^spec file 'folder' cannot be read \(Is a directory\): expected a YAML file$"
    ):
        read_spec(Path("folder"), Training, {})
    assert message(b"model: \xff\n") == "spec.yaml: not UTF-8 text at byte 7; expected a YAML file"


def test_a_byte_order_mark_is_skipped():
    assert read(b"\xef\xbb\xbf" + REQUIRED.encode()) == Training("authors", 5e-5)


def test_the_spec_s_own_checks_are_left_alone():
    @dataclass(frozen=True)
    class Checked:
        epochs: int

        def __post_init__(self) -> None:
            raise UserError(f"--epochs {self.epochs}: expected at least 1")

    with pytest.raises(UserError, match=r"^--epochs 0: expected at least 1$"):
        make_spec(Checked, {"epochs": 0}, "command line")
