"""WHP."""

COMPLETENESS = ("seen_rouge", "unseen_rouge")
UTILITY = ("perplexity", "zero_shot", "truthfulqa")
FURTHER = (
    "boolq",
    "rte",
    "hellaswag",
    "winogrande",
    "arc_challenge",
    "arc_easy",
    "openbookqa",
    "piqa",
    "ma",
    "el",
)
