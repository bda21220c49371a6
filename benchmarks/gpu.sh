#!/usr/bin/env bash
# What is worth knowing of one GPU, in ten minutes and one JSON:  benchmarks/gpu.sh [gpu.json]
# The most important stages come first; what the time did not allow is in the JSON as skipped, for a second run with KVQ_GPU_STAGES.
# Needs a Python with kvq's dependencies, torch and jax. kvq itself is taken from this checkout, installed or not.
#   PYTHON=python3          which Python
#   KERAS_BACKEND=jax       what the two networks are trained on; default: what kvq would take
#   KVQ_DATA=FOLDER         cifar10/, and mscoco/ or another folder of photographs named by KVQ_PHOTOGRAPHS
#   KVQ_GPU_SECONDS=570     when to begin nothing more; KVQ_GPU_STAGES="train memory": only stages whose first word is one of these
#   KVQ_QUICK=1             a few steps of everything, to see whether it runs; on a CPU, too
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
# The folders under the names that they have when installed.
ln -s "$root/kvq" "$packages/kvq"; ln -s "$root/cli" "$packages/kvq_cli"; ln -s "$root/configs" "$packages/kvq_configs"
export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"${PYTHON:-python3}" "$root/benchmarks/gpu.py" "${1:-gpu.json}"
