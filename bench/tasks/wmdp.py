"""WMDP."""

COMPLETENESS = ("wmdp_cyber", "wmdp_chem", "wmdp_bio", "wmdp_average")
UTILITY = ("mmlu_humanities", "mmlu_social_sciences", "mmlu_stem", "mmlu_other", "mmlu")
FURTHER = ("ma",)
