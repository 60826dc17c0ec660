#!/usr/bin/env bash
# Makes an environment for the tests with another LeRobot than the index has:
#   tests/lerobot_environment.sh <directory to make> <checkout of LeRobot> [requirement that overrules LeRobot's …]

set -euo pipefail
environment=$1 lerobot=$2
shift 2
cd "$(dirname "$0")/.."
uv venv -q --clear --python 3.12 "$environment"
printf '%s\n' "$@" >"$environment/overrides.txt"
# The versions the tests ran with, but for LeRobot's and the ones overruled; tokenizers follow transformers.
given=$(printf '|%s' $(printf '%s\n' "$@" | sed 's/[^A-Za-z0-9_.-].*//'))
cp constraints.txt "$environment/constraints.txt"
sed -Ei "/^(lerobot${given%|}${*:+|tokenizers})==/d" "$environment/constraints.txt"
# LeRobot's own sources name an index of PyTorch's, which not everyone reaches.
uv pip install -q --python "$environment/bin/python" --no-sources -c "$environment/constraints.txt" \
  --override "$environment/overrides.txt" -e ".[dev]" "$lerobot"
