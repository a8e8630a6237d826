"""What is true of one sample under one model: MRD and its estimators, training difficulty, memorization."""
