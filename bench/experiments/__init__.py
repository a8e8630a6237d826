"""The experiments: one file for each question of the paper, and the statistics they share."""
