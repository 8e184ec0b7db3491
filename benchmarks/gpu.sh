#!/usr/bin/env bash
# Everything that needs a CUDA device, within nine minutes: builds, tests, sanitizes, benchmarks, and leaves logs,
# results and plots in $OUT. Installs nothing: it takes the packages of $PYTHON, where torch and triton must be.
# Without a device the build is made and the rest is skipped. Called by `make gpu`.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-runs/gpu}
mkdir -p "$out"
rm -f "$out"/*.json  # of an earlier run: the table and the plots are of this one
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
capability=$($python -c 'import torch
if torch.cuda.is_available(): print(*torch.cuda.get_device_capability(), sep=".")')
deadline=525 failed=0 summary=""

# stage NAME SECONDS COMMAND...: runs the command within its time and the deadline, its output in $OUT/NAME.log.
stage() {
  local name=$1 limit=$2 started=$SECONDS code
  shift 2
  limit=$((limit < deadline - SECONDS ? limit : deadline - SECONDS))
  if [ $limit -gt 0 ]; then
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
  else
    code=124
  fi
  [ $code = 0 ] || failed=1
  summary+=$(printf '%-16s exit %-3s %4d s' "$name" $code $((SECONDS - started)))
  [ $code = 124 ] && summary+="  stopped: out of time"
  summary+=$'\n'
  return $code
}

# Prints those of the test files that can be imported here; says of the others what they lack.
importable() {
  "$python" - "$@" <<'END'
import importlib, sys
for file in sys.argv[1:]:
    try:
        importlib.import_module(file.removesuffix(".py").replace("/", "."))
        print(file)
    except ModuleNotFoundError as error:
        print(f"left out: {file} needs {error.name}", file=sys.stderr)
END
}

stage build 150 env DGS_KERNELS_BUILD=cuda TORCH_CUDA_ARCH_LIST="${capability:-9.0}" \
  "$python" setup.py build_ext --inplace || { tail -n 20 "$out/build.log"; exit 1; }

if [ -n "$capability" ]; then
  # By mark.gpu and on_backends tests are marked as needing a GPU; most of their time is Triton's compiler.
  tests=$(importable $(grep -rlE 'mark\.gpu|on_backends' tests --include 'test_*.py') 2>"$out/left_out.log")
  [ -s "$out/left_out.log" ] && summary+=$(cat "$out/left_out.log")$'\n'
  processes=$("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)
  stage tests 130 "$python" -m pytest -m gpu -p no:cacheprovider -o addopts=-q $processes $tests
  # The sanitizer sees an allocation's end only where torch does not pool its memory.
  for tool in memcheck racecheck; do
    stage $tool 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
      "$python" -m pytest -p no:cacheprovider -o addopts=-q $tests \
      -k "cuda-cuda and (layouts or deterministic or twice_alike)"
  done
  bench() { stage "bench_$1" "$2" "$python" -m benchmarks "${@:3}" --device cuda --out "$out/$1.json"; }
  bench rows 80 project_align surgery_head --rows 65536 --dtype float32 bfloat16 --seconds 3
  bench sizes 80 project_align surgery_head --rows 32 512 8192 --seconds 2
  bench layers 60 project_align_ surgery_adamw_ gramian --rows 395520 --seconds 3
  bench lora 40 project_align_ surgery_adamw_ gramian --rows 144 --seconds 2
  bench steps 20 optimizer_step --rows 144 --seconds 2
  bench conflict 20 conflict --rows 1 --dim 50331648 --seconds 2
  bench entropy 20 spectral_entropy --rows 16384 --seconds 2
  # A whole training step needs the detector's packages too, and takes the time that is left.
  if "$python" -c 'import benchmarks.train_step' 2>"$out/train_step.log"; then
    for batch in 32 128 256 512; do
      stage "train_step_$batch" 60 "$python" -m benchmarks train_step --model ViT-L-14-quickgelu --batch $batch \
        --seconds 15 --out "$out/train_step_$batch.json"
    done
  else
    summary+="left out: benchmarks/train_step.py: $(tail -n 1 "$out/train_step.log")"$'\n'
  fi
  deadline=540
  stage plots 15 "$python" -m benchmarks.plots "$out" --results "$out"/*.json
  cat "$out"/train_step*.log "$out/plots.log"
else
  summary+="no CUDA device: tests, sanitizer and benchmarks skipped"$'\n'
fi
printf '%s' "$summary" | tee "$out/summary.txt"
exit $failed
