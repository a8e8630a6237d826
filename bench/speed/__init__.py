"""How fast: benchmarks that measure side by side in one run, and the plan of what a job will take."""
