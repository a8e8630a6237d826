"""TOFU."""

COMPLETENESS = ("ua", "mia", "rr", "relearn", "uc_average")
UTILITY = (
    "retain_acc",
    "retain_rr",
    "real_authors_acc",
    "real_authors_rr",
    "world_facts_acc",
    "world_facts_rr",
    "ut_average",
)
FURTHER = (
    "fa",
    "relearned_share",
    "ma",
    "el",
    "forget_probability",
    "forget_truth_ratio",
    "retain_probability",
    "retain_truth_ratio",
    "real_authors_probability",
    "real_authors_truth_ratio",
    "world_facts_probability",
    "world_facts_truth_ratio",
    "model_utility",
    "forget_quality",
)
