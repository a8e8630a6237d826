"""What unlearning is judged by."""
