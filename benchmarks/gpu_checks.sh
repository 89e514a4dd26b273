#!/usr/bin/env bash
# Everything that waits for a GPU, in one go. Run from the repository root on the GPU machine.
#
#   bash benchmarks/gpu_checks.sh DATA OUT
#
# DATA holds tfds/cifar10 (52 MB) and resnet20-12fca82f.npz: carry those two and nothing else. The
# weights are the .th file saved again as .npz, so that torch is not needed there:
#   python -c "import numpy as np; from metamix_jax.pretrained import read_weights; \
#              np.savez('resnet20-12fca82f.npz', **read_weights('resnet20-12fca82f.th'))"
# OUT gets the results. Needs a Python with requirements-gpu.txt. Record date, device and versions
# (results.json has them) beside every number taken from here.
set -euo pipefail
DATA=$1 OUT=$2
mkdir -p "$OUT"
python -c "import jax; print(jax.__version__, jax.devices())"

cifar() {  # name, then overrides: the full schedule on CIFAR-10 from the trained weights
  local name=$1; shift
  python main.py --config=configs/cifar10_resnet20.py --workdir="/tmp/gpu_checks/$name" \
    --config.pretrained="$DATA/resnet20-12fca82f.npz" --config.data.data_dir="$DATA/tfds" "$@" \
    2> >(tee "$OUT/$name.log" >&2) | tee "$OUT/$name.result"
  cp "/tmp/gpu_checks/$name/results.json" "$OUT/$name.json"
}

# 1. MetaMix, full schedule, against uniform 4/4 and full precision trained as long.
cifar metamix
cifar uniform --config.search.searcher=uniform
cifar full_precision --config.search.searcher=none --config.full_precision.epochs=90 \
  --config.full_precision.learning_rate=5e-4
# 2. Below the uniform 4/4 network, where a search has more to decide.
cifar metamix_075 --config.budget.value=0.75
# 3. All methods at three budgets, three seeds: one workdir each, so it resumes where it was cut.
python main.py --config=configs/cifar10_resnet20.py --mode=compare --workdir=/tmp/gpu_checks/compare \
  --config.pretrained="$DATA/resnet20-12fca82f.npz" --config.data.data_dir="$DATA/tfds" \
  --config.compare.methods="('metamix','metamix_spent','joint','asga','ompq','hessian','random','uniform')" \
  --config.compare.budgets="(1.0,0.8,0.65)" 2> >(tee "$OUT/compare.log" >&2) | tee "$OUT/compare.result"
cp /tmp/gpu_checks/compare/comparison.{json,png} "$OUT"
# 4. Images per second, compile time and memory of the ImageNet networks' steps, float32; there is
#    no bfloat16 yet.
python benchmarks/steps.py | tee "$OUT/step_rates.txt"
