#!/usr/bin/env bash
# Everything that needs a CUDA device, within nine minutes: builds, tests, sanitizes, benchmarks, and leaves logs,
# results and plots in $OUT. Installs nothing: it takes the packages of $PYTHON, where torch and triton must be.
# Without a device the build is made and the rest is skipped. Called by `make gpu`.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-runs/gpu}
mkdir -p "$out"
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
capability=$($python -c 'import torch
if torch.cuda.is_available(): print(*torch.cuda.get_device_capability(), sep=".")')
failed=0 summary=""

# stage NAME SECONDS COMMAND...: runs the command within its time, keeps its output in $OUT/NAME.log.
stage() {
  local name=$1 limit=$2 started=$SECONDS code
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  [ $code = 0 ] || failed=1
  summary+=$(printf '%-12s exit %-3s %4d s' "$name" $code $((SECONDS - started)))$'\n'
  return $code
}

stage build 150 env DGS_KERNELS_BUILD=cuda TORCH_CUDA_ARCH_LIST="${capability:-9.0}" \
  "$python" setup.py build_ext --inplace || { tail -n 20 "$out/build.log"; exit 1; }

if [ -n "$capability" ]; then
  tests="tests/test_project_align.py tests/test_surgery_head.py tests/test_gradient_surgery.py
    tests/test_project_align_.py tests/test_surgery_adamw_.py tests/test_spectral_entropy.py"
  stage tests 160 "$python" -m pytest -m gpu -p no:cacheprovider -o addopts=-q $tests
  # The sanitizer sees an allocation's end only where torch does not pool its memory.
  for tool in memcheck racecheck; do
    stage $tool 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
      "$python" -m pytest -p no:cacheprovider -o addopts=-q $tests \
      -k "cuda-cuda and (layouts or deterministic or twice_alike)"
  done
  bench() { stage "bench_$1" 45 "$python" -m benchmarks "${@:2}" --device cuda --out "$out/$1.json"; }
  bench rows project_align surgery_head --rows 65536 --dtype float32 bfloat16 --seconds 3
  bench small project_align surgery_head --rows 32 --seconds 2
  bench layers project_align_ surgery_adamw_ --rows 395520 --seconds 3
  bench lora project_align_ surgery_adamw_ --rows 144 --seconds 2
  bench entropy spectral_entropy --rows 16384 --seconds 2
  stage plots 30 "$python" -m benchmarks.plots "$out" --results "$out"/*.json
  cat "$out/plots.log"
else
  summary+="no CUDA device: tests, sanitizer and benchmarks skipped"$'\n'
fi
printf '%s' "$summary" | tee "$out/summary.txt"
exit $failed
