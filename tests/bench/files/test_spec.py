"""Specs from files and flags: what each value becomes, and the one line that each mistake gets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from bench.files.spec import spec_file
from scoring.errors import UserError
from scoring.settings import Doc, FlagText, Ge, Gt, Known, Le, Naming, build, check, named, naming, settings_of


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
FLAGS = Naming(flags=True)


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that messages name the file as it was named: spec.yaml."""
    monkeypatch.chdir(tmp_path)


def read(text: str | bytes, **given: Any) -> Training:
    Path("spec.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with naming(FLAGS), spec_file("spec.yaml", given, Training) as spec:
        return spec


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
    assert message("model: m\nlearning_rate: '5e-5'") == "spec.yaml, line 2: learning_rate is '5e-5': expected a number"


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
    with naming(FLAGS):
        assert build(Training, {"model": FlagText("m"), "learning_rate": FlagText("1")}) == Training("m", 1.0)
        with pytest.raises(UserError) as caught:
            build(Training, {"epochs": FlagText("1")})
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
        ("draws: [1]", "draws is a list: expected a whole number, or text"),
        ("warm: 1", "warm is 1: expected true or false"),
        ("warm: 'yes'", "warm is 'yes': expected true or false"),
        ("split: 10", "split is 10: expected text; put it in quotes"),
        ("split: 12e5", "split is 1200000.0: expected text; put it in quotes"),
        ("split: 2024-01-31", "split is a date: expected text; put it in quotes"),
        ("split: {a: b}", "split is a mapping: expected text"),
        ("model:", "model is empty: expected text"),
        ("weights: 1", "weights is 1: expected a mapping, one 'name: value' a line"),
        ("weights: {forget: high}", "weights['forget'] is 'high': expected a number"),
        ("weights: {5: 0.1}", "the key '5' is no text: put it in quotes"),
        (f"learning_rate: {'a' * 100}", f"learning_rate is '{'a' * 56}...: expected a number"),
    ],
)
def test_values_of_the_wrong_type(line, complaint):
    name = line.split(":")[0]
    rest = "".join(f"{other}\n" for other in REQUIRED.splitlines() if not other.startswith(f"{name}:"))
    place = rest.count("\n") + 1
    assert message(rest + line) == f"spec.yaml, line {place}: {complaint}"


@pytest.mark.parametrize("field", ["model", "split"])
@pytest.mark.parametrize(("word", "read_as"), [("no", "false"), ("off", "false"), ("Yes", "true"), ("on", "true")])
def test_words_that_yaml_takes_for_truth_values(field, word, read_as):
    rest = REQUIRED if field == "split" else "learning_rate: 1\n"
    place = rest.count("\n") + 1
    assert message(f"{rest}{field}: {word}") == (
        f"spec.yaml, line {place}: {field} is {read_as}: expected text; YAML reads yes, no, on and off as true and "
        "false: put them in quotes"
    )
    assert getattr(read(f"{rest}{field}: '{word}'"), field) == word


def test_a_flag_of_the_wrong_type_is_not_the_file_s_fault():
    assert message(REQUIRED + "epochs: 3\n", epochs=FlagText("many")) == "--epochs is 'many': expected a whole number"
    assert message(REQUIRED, weights={"a": "b"}) == "--weights['a'] is 'b': expected a number"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("learning_rte", "; did you mean 'learning_rate'?"),
        ("learning-rate", "; did you mean 'learning_rate'?"),
        ("xyz", ""),
        ("derived", "; did you mean 'learning_rate'?"),  # a field, but not for the user to set
    ],
)
def test_unknown_fields(name, hint):
    assert (
        message(f"{REQUIRED}{name}: 1") == f"spec.yaml, line 3: unknown field '{name}': expected one of {FIELDS}{hint}"
    )


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
    assert message("a: &a [*a]\n") == "spec.yaml: not valid YAML (an alias contains itself)"


def test_the_same_key_in_two_mappings_is_no_duplicate():
    assert read(REQUIRED + "weights: {model: 1, epochs: 2}\n").weights == {"model": 1.0, "epochs": 2.0}


@pytest.mark.parametrize(
    ("text", "found"), [("", "empty"), ("# only this\n", "empty"), ("- model: m\n", "a list"), ("model", "'model'")]
)
def test_not_a_mapping(text, found):
    assert message(text) == f"spec.yaml is {found}: expected a mapping, one 'name: value' a line"


def test_files_that_cannot_be_read():
    def read_file(path: str | Path) -> None:
        with spec_file(path, {}, Training):
            pass

    with pytest.raises(UserError, match=r"^spec file 'none\.yaml' cannot be read \(No such file or directory\): expec"):
        read_file("none.yaml")
    Path("folder").mkdir()
    with pytest.raises(
        UserError, match=r"^spec file 'folder' cannot be read \(Is a directory\): expected a YAML file$"
    ):
        read_file(Path("folder"))
    assert message(b"model: \xff\n") == "spec.yaml: not UTF-8 text at byte 7; expected a YAML file"


def test_a_byte_order_mark_is_skipped():
    assert read(b"\xef\xbb\xbf" + REQUIRED.encode()) == Training("authors", 5e-5)


# --- Settings with bounds, names and documentation ----------------------------------------------------------


def _colours() -> list[str]:
    return ["Red", "Green"]


@dataclass(frozen=True, kw_only=True)
class Paint:
    layers: Annotated[int, Ge(1), Doc("of paint")] = 2
    thickness: Annotated[float, Gt(0), Le(1), Doc("of a layer")] = 0.5
    colour: Annotated[str, Known(_colours), Doc("of them")] = "Red"
    drying: Annotated[Annotated[int, Ge(0)] | Literal["auto"] | None, Doc("hours")] = None
    finish: Annotated[Literal["matt", "gloss"], Doc("of the last")] = "matt"
    parts: Annotated[dict[str, float], Doc("of a mixture")] = dataclasses.field(default_factory=dict)
    coats: Annotated[tuple[int, ...], Doc("one after the other")] = (1,)


@pytest.mark.parametrize(
    ("values", "as_flag", "as_argument"),
    [
        ({"layers": "0"}, "--layers is 0: expected a whole number of at least 1", None),
        ({"layers": "two"}, "--layers is 'two': expected a whole number of at least 1", None),
        ({"layers": 0}, None, "layers is 0: expected a whole number of at least 1"),
        ({"thickness": 1.5}, None, "thickness is 1.5: expected a number greater than 0 and at most 1"),
        ({"thickness": "nan"}, "--thickness is nan: expected a finite number greater than 0 and at most 1", None),
        ({"thickness": math.nan}, None, "thickness is nan: expected a finite number greater than 0 and at most 1"),
        ({"colour": "gren"}, "--colour is 'gren': expected one of Red, Green; did you mean 'Green'?", None),
        ({"colour": 3}, None, "colour is 3: expected one of Red, Green"),
        ({"drying": "-1"}, "--drying is -1: expected a whole number of at least 0, or auto", None),
        ({"drying": 2.5}, None, "drying is 2.5: expected a whole number of at least 0, or auto"),
        ({"finish": "glos"}, "--finish is 'glos': expected one of matt, gloss; did you mean 'gloss'?", None),
        ({"parts": "a"}, "--parts is 'a': expected name=number, with commas between several", None),
        ({"parts": "a=1,b=x"}, "--parts b=x: expected a number", None),
        ({"parts": "a=inf"}, "--parts a=inf: expected a finite number", None),
        ({"coats": [1, 2.5]}, None, "coats[1] is 2.5: expected a whole number"),
        ({"coats": 1}, None, "coats is 1: expected a list"),
        ({"parts": "a=1,a=2"}, "--parts is 'a=1,a=2': expected name=number, with commas between several", None),
        ({"parts": {"a": "b"}}, None, "parts['a'] is 'b': expected a number"),
        ({"coats": "1,x"}, "--coats[1] is 'x': expected a whole number", None),
        (
            {"layer": 1},
            None,
            "unknown field 'layer': expected one of layers, thickness, colour, drying, finish, parts, "
            "coats; did you mean 'layers'?",
        ),
    ],
)
def test_a_message_names_the_setting_as_it_was_set(values, as_flag, as_argument):
    expected = as_flag or as_argument
    given = {name: FlagText(value) for name, value in values.items()} if as_flag else values
    with naming(FLAGS if as_flag else Naming()), pytest.raises(UserError) as caught:
        build(Paint, given)
    assert str(caught.value) == expected


def test_what_can_be_is_taken_in_the_type_of_its_setting():
    with naming(FLAGS):
        texts = {"layers": "3", "colour": "green", "drying": "auto", "parts": "a=1, b=0.5", "coats": "1,2"}
        found = build(Paint, {name: FlagText(value) for name, value in texts.items()})
    assert found == Paint(layers=3, colour="Green", drying="auto", parts={"a": 1.0, "b": 0.5}, coats=(1, 2))
    assert build(Paint, {"coats": [2, 3]}) == Paint(coats=(2, 3))
    assert build(Paint, {"layers": np.int64(3), "thickness": np.float32(0.5)}) == Paint(layers=3, thickness=0.5)


def test_settings_made_in_python_are_checked_as_well():
    check(Paint())
    with pytest.raises(UserError, match=r"^layers is 0: expected a whole number of at least 1$"):
        check(Paint(layers=0))


def test_the_checks_of_a_class_itself_are_left_alone():
    @dataclass(frozen=True)
    class Checked:
        epochs: int

        def __post_init__(self) -> None:
            raise UserError(f"{named('epochs')} {self.epochs}: expected at least 1")

    with naming(FLAGS), pytest.raises(UserError, match=r"^--epochs 0: expected at least 1$"):
        build(Checked, {"epochs": 0})


def test_a_message_from_the_depth_speaks_as_the_user_does():
    Path("spec.yaml").write_text("model: m\nlearning_rate: 1\nepochs: 3\n")
    assert named("epochs") == "epochs"
    with naming(FLAGS):
        assert named("max_steps") == "--max-steps"
        with spec_file("spec.yaml", {"learning_rate": FlagText("2")}, Training):
            assert named("epochs") == "spec.yaml, line 3: epochs"
            assert named("learning_rate") == "--learning-rate"  # the flag has replaced what the file says
            assert named("max_steps") == "--max-steps"
    names = Naming(file="sweep.yaml", lines={("base", "epochs"): 2, ("selections", 1, "size"): 7})
    assert names.under("base")("epochs") == "sweep.yaml, line 2: base: epochs"
    assert names.under("selections", 1)("size") == "sweep.yaml, line 7: selections: entry 2: size"


def test_a_setting_says_what_it_is():
    found = {setting.name: setting for setting in settings_of(Paint)}
    assert found["layers"].doc == "of paint"
    assert found["drying"].expected == "a whole number of at least 0, or auto"
    assert found["colour"].choices == ("Red", "Green")
    assert found["finish"].flag == "--finish"
    assert found["parts"].default == {}


def test_two_kinds_of_settings_share_a_file():
    Path("spec.yaml").write_text("model: m\nlearning_rate: 1\nlayers: 4\n")
    with spec_file("spec.yaml", {"epochs": 2}, Training, Paint) as (training, paint):
        assert training == Training("m", 1.0, epochs=2)
        assert paint == Paint(layers=4)
    Path("spec.yaml").write_text("model: m\nlayer: 4\n")
    with (
        pytest.raises(UserError, match=r"^spec.yaml, line 2: unknown field 'layer': .*; did you mean 'layers'\?$"),
        spec_file("spec.yaml", {}, Training, Paint),
    ):
        pass
