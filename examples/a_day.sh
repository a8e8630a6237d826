#!/usr/bin/env bash
# A researcher's day with a pretrained model, in miniature: teach it two authors, make a copy that never met one of them,
# forecast what is hard to forget, unlearn by three algorithms, evaluate, and put it all on a leaderboard and a page.
#
#   examples/a_day.sh                                                   # SmolLM2-135M-Instruct and TOFU from the hub
#   examples/a_day.sh MODEL TOFU OUT                                    # a model's folder or id, TOFU's folder or id
#
# The same command goes on where it was stopped.
set -euo pipefail

model=${1:-HuggingFaceTB/SmolLM2-135M-Instruct}
tofu=${2:-locuslab/TOFU}
out=${3:-day}
forget=${FORGET:-20} retain=${RETAIN:-20} # records; an author of TOFU has twenty

began=$SECONDS
step() { printf '\n%s\n[%d:%02d] %s\n' "$(printf '=%.0s' {1..100})" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60)) "$*"; }

mkdir -p "$out"
step "Two authors of TOFU: one to forget, one to retain"
python - "$tofu" "$out" "$forget" "$retain" <<'PYTHON'
import json
import sys
from pathlib import Path

from bench.tasks.datasets import load_dataset

tofu, out, *counts = sys.argv[1:]
for name, split, count in zip(("forget", "retain"), ("forget01_perturbed", "retain_perturbed"), map(int, counts)):
    records = load_dataset(f"tofu:{tofu}", split).records[:count]
    Path(out, f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
Path(out, "task.yaml").write_text("protocol: tofu\nname: two authors\nforget: forget.jsonl\nretain: retain.jsonl\n")
PYTHON
task=$out/task.yaml

step "Train the original, which learns both, and the retain-only model, which never meets the first"
mrd-bench train --model "$model" --task "$task" --and-retain forget --until ma=0.9 --epochs 8 --learning-rate 1e-4 \
    --batch-size 8 --evaluate-samples 8 --evaluate-every 0 --workers 0 --out "$out/models"
original=$out/models/original retain_only=$out/models/retain-only

step "How hard is each record to forget?"
mrd-bench difficulty --model "$original" --data "$task" --measure mrd,flip-time --learning-rate 2e-5 \
    --replicas 0 --out "$out/difficulty.parquet"

for algorithm in GradDiff NPO-GradDiff SimNPO; do
    step "Unlearn by $algorithm"
    mrd-bench unlearn --model "$original" --task "$task" --algorithm $algorithm --epochs 2 --learning-rate 2e-5 \
        --evaluate-samples 8 --evaluate-every 0 --workers 0 --out "$out/runs/$algorithm"
    step "Evaluate it beside the original and the retain-only model"
    mrd-bench evaluate --model "$out/runs/$algorithm" --original "$original" --retain-model "$retain_only" \
        --task "$task" --metrics rr,ma,forget_probability,retain_rr --replicas 0 --out "$out/evaluations/$algorithm.parquet"
    mrd-bench results add "$out/store" "$out/runs/$algorithm" "$out/evaluations/$algorithm.parquet" --experiment day
done

step "The leaderboard, and answers side by side"
mrd-bench leaderboard "$out/store" --out "$out/leaderboard"
mrd-bench show "$out"/evaluations/*.parquet "$out/difficulty.parquet" --sort change --limit 3 --page "$out/answers.html"
step "Done: $out/leaderboard/index.html and $out/answers.html"
