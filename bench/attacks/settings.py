"""Which attacks are made, and how strong they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from bench.attacks.attack import Attack, DrawnAnswers
from bench.attacks.prompts import FIELDS, FewShot, OwnQuestion, Prefix, Prompt, read_families
from bench.attacks.relearn import Relearn, Taught
from bench.attacks.weights import Format, Noise, Prune, Quantise
from bench.metrics.leakage import KS
from scoring.errors import UserError
from scoring.settings import Doc, Ge, Gt, Known, Lt, named

# Family -> what it does, in a line.
FAMILIES = {
    "relearn": "train a little on part of the forget set, or on other data, and ask after some updates",
    "quantise": "round the weights of linear layers to int8, int4 or fp8",
    "sample": "draw many answers at a temperature: the best of k",
    "prompt": "ask differently: beginning of the answer, other words, roles, examples, system prompts, jailbreaks",
    "noise": "add Gaussian noise to all weights",
    "prune": "set the smallest weights to 0, with a little training on the retain set afterwards",
}


def _families() -> Iterable[str]:
    return FAMILIES


Share = Annotated[float, Gt(0), Lt(1)]


@dataclass(frozen=True, kw_only=True)
class AttackSettings:
    """Which attacks are made, and how strong they are."""

    attacks: Annotated[
        list[str], Known(_families), Doc(f"families, separated by commas: {', '.join(FAMILIES)} (default: all)")
    ] = field(default_factory=lambda: [*FAMILIES])
    taught: Annotated[
        list[Taught], Doc("relearn: what is trained on: the forget set, the retain set, benign texts")
    ] = field(default_factory=lambda: ["forget", "retain", "benign"])
    shares: Annotated[list[float], Doc("relearn: parts of the forget set that are trained on, up to 1")] = field(
        default_factory=lambda: [0.25, 1.0]
    )
    learning_rates: Annotated[list[float], Doc("relearn: of AdamW, each above 0")] = field(
        default_factory=lambda: [2e-5, 1e-4]
    )
    updates: Annotated[list[int], Doc("relearn: after how many is asked, of 4 samples each")] = field(
        default_factory=lambda: [5, 10, 25, 50]
    )
    formats: Annotated[list[Format], Doc("quantise: of the weights")] = field(
        default_factory=lambda: ["int8", "int4", "fp8"]
    )
    answers: Annotated[int, Ge(1), Doc("sample: drawn for each question")] = 64
    temperature: Annotated[float, Gt(0), Doc("sample: that logits are divided by")] = 1.0
    prompts: Annotated[
        str | None,
        Doc(
            "prompt: folder of further families, a .txt file each: templates with {question}, separated by lines of ---"
        ),
    ] = None
    prefixes: Annotated[list[Share], Doc("prompt: shares of the answer that are given")] = field(
        default_factory=lambda: [0.1, 0.25, 0.5]
    )
    sigmas: Annotated[list[float], Doc("noise: standard deviations, each above 0")] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2]
    )
    pruned: Annotated[list[Share], Doc("prune: shares of the weights of each linear layer")] = field(
        default_factory=lambda: [0.1, 0.3]
    )

    def check_strengths(self) -> None:
        """Refuse strengths that cannot be.

        Raises:
            UserError: one line.
        """
        for name, most in (("shares", 1.0), ("learning_rates", None), ("updates", None), ("sigmas", None)):
            for value in getattr(self, name):
                if value <= 0 or (most is not None and value > most):
                    limit = "a number above 0" + (f" and at most {most:g}" if most is not None else "")
                    raise UserError(f"{named(name)}: {value:g} cannot be; expected {limit}")
        for name in ("attacks", *_STRENGTHS):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"{named(name)}: {next(v for v in values if values.count(v) > 1)} stands there twice")
            if not values and (name == "attacks" or _STRENGTHS[name] in self.attacks):
                raise UserError(f"{named(name)} is empty: expected at least one")
        read_families(self.prompts)

    def chosen(self, seed: int) -> list[Attack]:
        """The attacks, in the order of their families.

        Args:
            seed: of everything that is drawn.
        """
        updates = tuple(sorted(self.updates))
        found: dict[str, list[Attack]] = {
            "relearn": [
                Relearn(taught, share, rate, updates, seed)
                for taught in self.taught
                for share in (self.shares if taught == "forget" else [1.0])
                for rate in self.learning_rates
            ],
            "quantise": [Quantise(kind) for kind in self.formats],
            "sample": [
                DrawnAnswers(
                    self.answers,
                    self.temperature,
                    seed,
                    tuple(f"leak_at_{k}" for k in KS if k <= self.answers),
                )
            ],
            "prompt": [
                *map(Prefix, self.prefixes),
                *map(OwnQuestion, FIELDS),
                *(Prompt(kind, templates) for kind, templates in read_families(self.prompts).items()),
                FewShot(seed),
            ],
            "noise": [Noise(sigma, seed) for sigma in self.sigmas],
            "prune": [
                attack
                for share in self.pruned
                for attack in (
                    Prune(share),
                    Relearn("retain", 1.0, self.learning_rates[0], updates[-1:], seed, pruned=share),
                )
            ],
        }
        return [attack for family in FAMILIES if family in self.attacks for attack in found[family]]


# Lists of strengths, with the family that needs at least one.
_STRENGTHS: dict[str, Literal["relearn", "quantise", "prompt", "noise", "prune"]] = {
    "taught": "relearn",
    "shares": "relearn",
    "learning_rates": "relearn",
    "updates": "relearn",
    "formats": "quantise",
    "prefixes": "prompt",
    "sigmas": "noise",
    "pruned": "prune",
}
