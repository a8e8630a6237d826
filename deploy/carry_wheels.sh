#!/usr/bin/env bash
# Wheels for `make gpu-check` on a machine that has no network: one with CUDA builds of torch and transformers, NumPy,
# SciPy, pyarrow and the like, as images for machine learning have them, and without what only this project needs. Run it
# where there is a network, and take the folder along with the checkout.
#
#     deploy/carry_wheels.sh [PYTHON_VERSION]     # of the machine without a network (default: 3.12)
#
# Ray is left out: its wheel alone has 80 MB. What needs it is skipped, and said to be.
set -euo pipefail
cd "$(dirname "$0")/.."
version=${1:-3.12}
folder=wheels
most=$((40 << 20)) # bytes

rm -rf "$folder"
mkdir "$folder"
# What has no dependencies of its own, or whose dependencies such a machine has.
python3 -m pip download --quiet --no-deps --only-binary=:all: --dest "$folder" \
  --python-version "$version" --implementation cp --platform any \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  datasets dill multiprocess nltk
# With theirs, whose versions have to fit: pydantic names its core exactly.
python3 -m pip download --quiet --only-binary=:all: --dest "$folder" \
  --python-version "$version" --implementation cp \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  pydantic pytest filelock
# Of this one there is only source.
python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder" rouge-score

size=$(du --bytes --summarize "$folder" | cut -f1)
echo "$(find "$folder" -name '*.whl' | wc -l) wheels, $((size >> 20)) MiB, in $folder/"
if [ "$size" -gt "$most" ]; then
  echo "$folder/ has more than $((most >> 20)) MiB" >&2
  exit 1
fi
