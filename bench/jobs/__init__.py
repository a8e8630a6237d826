"""What is run: scoring, unlearning, evaluating, sweeping, each from a spec to what it leaves on disk."""
