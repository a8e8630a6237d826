"""SAFE."""

from bench.tasks.whp import FURTHER, UTILITY

__all__ = ["COMPLETENESS", "FURTHER", "UTILITY"]

COMPLETENESS = ("real_toxicity", "safe_toxicity")
