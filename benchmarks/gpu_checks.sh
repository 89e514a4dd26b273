#!/usr/bin/env bash
# Everything that waits for a GPU, in one go. Run from the repository root on the GPU machine.
#
#   bash benchmarks/gpu_checks.sh DATA OUT
#
# DATA holds tfds/cifar10 (52 MB) and resnet20-12fca82f.npz: carry those two and nothing else. The
# weights are the .th file saved again as .npz, so that torch is not needed there:
#   python -c "import numpy as np; from metamix_jax.networks.torch_weights import read_weights; \
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
cifar metamix_bfloat16 --config.compute_dtype=bfloat16
# 2. Below the uniform 4/4 network, where a search has more to decide.
cifar metamix_075 --config.budget.value=0.75
# 3. All methods at three budgets, three seeds: one workdir each, so it resumes where it was cut.
python main.py --config=configs/cifar10_resnet20.py --mode=compare --workdir=/tmp/gpu_checks/compare \
  --config.pretrained="$DATA/resnet20-12fca82f.npz" --config.data.data_dir="$DATA/tfds" \
  --config.compare.methods="('metamix','metamix_spent','joint','asga','ompq','hessian','random','uniform')" \
  --config.compare.budgets="(1.0,0.8,0.65)" 2> >(tee "$OUT/compare.log" >&2) | tee "$OUT/compare.result"
cp /tmp/gpu_checks/compare/comparison.{json,png} "$OUT"
# 4. Time, compile time and memory of the steps, float32 and with config.compute_dtype=bfloat16,
#    beside PyTorch's where torch is installed; hours of ResNet-18's two search epochs on
#    ImageNet = 1,281,167 / 3600 times (2 / bit_meta's images per second + 1 / bit_search's).
frameworks=ours,ours_bfloat16
python -c "import torch" 2> /dev/null && frameworks=$frameworks,torch,torch_compiled
python benchmarks/steps.py --frameworks=$frameworks --batch_size=512 --steps=20 \
  --json="$OUT/steps_resnet20.json" | tee "$OUT/steps_resnet20.txt"
for network in resnet18 mbv2 mbv3; do
  python benchmarks/steps.py --networks=$network --frameworks=$frameworks --batch_size=128 \
    --image_size=224 --steps=10 --json="$OUT/steps_$network.json" | tee "$OUT/steps_$network.txt"
done
# 5. Scaling with the number of candidates and the batch.
for bits in 8,4 8,4,3,2; do
  python benchmarks/steps.py --frameworks=ours --act_bits=$bits --kinds=full_precision,bit_meta \
    --batch_size=512 --steps=20 | tee "$OUT/steps_bits_$bits.txt"
done
for batch in 128 2048; do
  python benchmarks/steps.py --frameworks=ours --batch_size=$batch --steps=20 \
    | tee "$OUT/steps_batch_$batch.txt"
done
# 6. The quantizer against a copy, the step against a matrix product.
python benchmarks/roofline.py --network=resnet18 --batch_size=128 --image_size=224 \
  --mebibytes=1024 | tee "$OUT/roofline.json"
# 7. From the start of Python to the first step.
for kind in full_precision bit_meta; do
  python benchmarks/first_step.py --kind=$kind | tee "$OUT/first_step_$kind.txt"
done
