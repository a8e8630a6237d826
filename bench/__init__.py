"""What is run, measured, stored and shown: tasks, metrics, experiments and their results."""
