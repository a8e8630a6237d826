"""The demo: scores and unlearns the embedded task, and writes a page of what came out."""
