"""Attacks on models that have forgotten: does it stay forgotten?

bench.attacks.settings    which attacks, and how strong -> Attack, ...
bench.attacks.attack      what an attack is: model, probe -> per-sample values
bench.attacks.weights, .relearn, .prompts    the families
"""

from bench.attacks.attack import KNOWLEDGE, PLAINLY, Asked, Attack, NoAttack, Probe
from bench.attacks.settings import FAMILIES, AttackSettings

__all__ = ["FAMILIES", "KNOWLEDGE", "PLAINLY", "Asked", "Attack", "AttackSettings", "NoAttack", "Probe"]
