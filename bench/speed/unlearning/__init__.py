"""`mrd-bench benchmark unlearning`: what unlearning costs, and whether MRD shortens it."""
