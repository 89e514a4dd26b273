#!/usr/bin/env bash
# Everything that waits for a GPU, in parts of at most 4 minutes. From the repository root:
#
#   bash benchmarks/gpu_checks.sh PART DATA OUT [PART ...]
#
# Each part prints a table last and leaves JSON in OUT; a later part may run alone. With TINY=1 the
# same commands run at sizes that a CPU can do, to see that they run: figures mean nothing. It needs
# a Python with requirements-gpu.txt (and torch, for that column). DATA is used by `rate` and `train`
# only. It holds tfds/cifar10 (52 MB) and resnet20-12fca82f.npz: carry those two and nothing else.
# The weights are the .th file saved again as .npz, so that torch is not needed there:
#   python -c "import numpy as np; from metamix_jax.networks.torch_weights import read_weights; \
#              np.savez('resnet20-12fca82f.npz', **read_weights('resnet20-12fca82f.th'))"
set -euo pipefail
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/tmp/gpu_checks/cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 PYTHONUNBUFFERED=1
DATA=${2:?usage: gpu_checks.sh PART DATA OUT} OUT=${3:?usage: gpu_checks.sh PART DATA OUT}
mkdir -p "$OUT" "$JAX_COMPILATION_CACHE_DIR"
limit=240 images=$((4000 * 128)) tiny_steps=() tiny_run=() tiny_limits=() tiny_integers=()
if [[ ${TINY:-} ]]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=0"
  # With few positions behind each statistic of batch norm, roundings of bfloat16 tell.
  tiny_steps=(--batch_size=16 --image_size=32 --steps=1 --repetitions=1 --apart=0.5)
  tiny_run=(--config.batch_size=16 --config.eval.batch_size=16 --config.log_every_steps=1)
  tiny_run+=(--config.data.eval_split='test[:64]' --config.eval.bn_reestimate_batches=1)
  for phase in full_precision bit_meta bit_search weight_training; do
    tiny_run+=("--config.$phase.epochs=0.001")
  done
  tiny_run+=(--config.weight_training.act_epochs=0.001 --config.checkpoint_every_steps=100)
  tiny_limits=(--batch_size=2 --image_size=32 --mebibytes=4 --repetitions=2)
  tiny_integers=(--image_size=32 --batch_size=2 --repetitions=2)
  limit=1800 images=$((3 * 16))
fi
flags=${XLA_FLAGS:-} eager='' compiled=''
if python -c "import torch" 2> /dev/null; then eager=,torch compiled=,torch_compiled; fi

steps() {  # name of the results, then options of steps.py
  local name=$1; shift
  timeout --foreground $limit python benchmarks/steps.py --check_images=0 --steps=10 \
    --repetitions=3 --compile_seconds=$((limit - 60)) --json="$OUT/$name.json" "$@" \
    "${tiny_steps[@]}" 2> >(tee "$OUT/$name.log" >&2) \
    | tee "$OUT/$name.txt"
}

with_settings() {  # name, then variables of the environment; nothing is read from the cache
  (
    export JAX_COMPILATION_CACHE_DIR="$(mktemp -d)" "${@:2}"
    steps "settings_$1" --batch_size=512 --frameworks=ours --kinds=weight_training
  )
}

cifar() {  # name, then overrides: a run on CIFAR-10 from the trained weights
  local name=$1; shift
  python main.py --config=cifar10_resnet20 --workdir="/tmp/gpu_checks/$name" \
    --config.data.data_dir="$DATA/tfds" "$@" "${tiny_run[@]}" \
    2> >(tee "$OUT/$name.log" >&2) > "$OUT/$name.out"
  tail -n 1 "$OUT/$name.out" | sed "s/^RESULT //" | tee "$OUT/$name.result"
}

part() {
  case $1 in
    small)  # the four steps of ResNet-20
      steps small --batch_size=512 --frameworks="ours,ours_bfloat16$eager"
      ;;
    batches)
      steps batches --batch_size=128,1024 --frameworks=ours --kinds=full_precision,bit_meta
      ;;
    large)  # the same at 224 pixels; both search epochs of ResNet-18 on ImageNet take
            # 1,281,167 / 3600 * (2 / bit_meta's images a second + 1 / bit_search's) hours
      steps large --networks=resnet18 --image_size=224 \
        --frameworks="ours,ours_bfloat16$eager$compiled"
      ;;
    mobile_v2 | mobile_v3)
      steps "$1" --networks=mb${1#mobile_} --image_size=224 --frameworks=ours,ours_bfloat16 \
        --kinds=full_precision,weight_training,bit_meta
      ;;
    candidates)  # scaling with the number of candidates
      steps candidates --batch_size=512 --frameworks=ours --kinds=bit_meta --act_bits=8,4,3,2
      ;;
    settings)  # of XLA and the allocator; three times without any, for the noise of autotuning
      with_settings none_1
      with_settings none_2
      with_settings none_3
      with_settings no_autotuning XLA_FLAGS="$flags --xla_gpu_autotune_level=0"
      with_settings hidden_latency \
        XLA_FLAGS="$flags --xla_gpu_enable_latency_hiding_scheduler=true"
      with_settings no_command_buffer XLA_FLAGS="$flags --xla_gpu_enable_command_buffer="
      with_settings preallocated XLA_PYTHON_CLIENT_PREALLOCATE=true
      tail -n 1 "$OUT"/settings_*.txt
      ;;
    rate)  # a run's own rate, beside full_precision at batch 128 in `batches`
      cifar rate --config.search.searcher=none --config.full_precision.epochs=10.24 \
        --config.batch_size=128 --config.log_every_steps=100 --config.checkpoint_every_steps=4000
      python -c "import json; seconds = json.load(open('$OUT/rate.result'))['seconds']; \
        print(f'images a second in a run: {$images / seconds:.0f}')" | tee "$OUT/rate.txt"
      ;;
    train)  # the same short schedule in float32 and in bfloat16, side by side
      for type in float32 bfloat16; do
        cifar "train_$type" --config.pretrained="$DATA/resnet20-12fca82f.npz" \
          --config.compute_dtype=$type --config.weight_training.act_epochs=2 \
          --config.weight_training.epochs=6 &
      done
      wait
      ;;
    limits)  # the quantizer against a copy, the step against a matrix product
      python benchmarks/roofline.py --network=resnet18 --batch_size=128 --image_size=224 \
        --mebibytes=1024 "${tiny_limits[@]}" | tee "$OUT/limits.json"
      ;;
    integers)  # an exported network on int8, beside floats
      for batch in 1 32 256; do
        PYTHONPATH=. python benchmarks/integer_speed.py --network=resnet18 --batch_size=$batch \
          "${tiny_integers[@]}" | tee "$OUT/integers_$batch.txt"
      done
      ;;
    *) echo "part $1: expected small, batches, large, mobile_v2, mobile_v3, candidates," \
         "settings, rate, train, limits or integers" >&2
      exit 2 ;;
  esac
}

for name in "$1" "${@:4}"; do
  part "$name"
done
