#!/usr/bin/env bash
# Everything that needs a CUDA device, within nine minutes, what tells most first: build, smoke, benchmarks, tests,
# a training step, sanitizers. $OUT gets a table (summary.txt), the plots, and one archive of all logs and results, all of
# them renewed after every stage, so that a run that is cut leaves what it has. Installs nothing: it takes the packages of
# $PYTHON, where torch and triton must be. Without a device it builds, and checks the CPU's kernels. Called by `make gpu`.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-runs/gpu} work=build/gpu
rm -rf $work && mkdir -p "$out" $work
rm -f "$out"/{summary.txt,gpu.tar.gz,*.png}  # of an earlier run
export PYTHONPATH=$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
capability=$($python -c 'import torch
if torch.cuda.is_available(): print(*torch.cuda.get_device_capability(), sep=".")')
deadline=520 failed=0

# Adds lines to the table and renews what is left in $OUT.
tell() {
  printf '%s\n' "$@" | tee -a $work/summary.txt
  cp $work/summary.txt "$out"
  tar -czf "$out/gpu.tar.gz.part" -C $work . && mv "$out/gpu.tar.gz.part" "$out/gpu.tar.gz"
}

# stage NAME SECONDS COMMAND...: runs the command within its time and the deadline, its output in NAME.log. The
# seconds of all stages are 520 together. Interrupted, and only then killed, a command says what it has so far.
stage() {
  local name=$1 limit=$2 started=$SECONDS code=124 note=
  shift 2
  limit=$((limit < deadline - SECONDS ? limit : deadline - SECONDS))
  if [ $limit -gt 0 ]; then
    timeout --signal=INT --kill-after=5 "$limit" "$@" >"$work/$name.log" 2>&1
    code=$?
  fi
  [ $code = 0 ] || failed=1
  [ $code = 124 ] || [ $code = 137 ] && note="  stopped: out of time"
  tell "$(printf '%-16s exit %-3s %4d s%s' "$name" $code $((SECONDS - started)) "$note")"
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

bench() { stage "bench_$1" "$2" "$python" -m benchmarks "${@:3}" --device cuda --out "$work/$1.json"; }

"$python" -c 'from benchmarks import harness; import json, torch
print(json.dumps(harness.machine("cuda" if torch.cuda.is_available() else "cpu"), indent=1))' \
  >$work/machine.json 2>$work/machine.log
stage build 75 env DGS_KERNELS_BUILD=cuda TORCH_CUDA_ARCH_LIST="${capability:-9.0+PTX}" \
  "$python" setup.py build_ext --inplace || { tail -n 20 $work/build.log; exit 1; }
stage smoke 30 "$python" -m benchmarks.smoke || grep -E 'wrong|failed|Error' $work/smoke.log | head -n 20

if [ -n "$capability" ]; then
  bench rows 48 project_align surgery_head surgery_head_forward surgery_head_backward --rows 8192 --seconds 1 --dtype float32 bfloat16
  bench layers 39 project_align_ surgery_adamw_ gramian --rows 395520 --seconds 2
  bench lora 25 project_align_ surgery_adamw_ gramian --rows 144 --seconds 1
  bench sizes 35 project_align surgery_head --rows 65536 512 32 --seconds 1
  # By mark.gpu and on_backends tests are marked as needing a GPU; most of their time is Triton's compiler.
  tests=$(importable $(grep -rlE 'mark\.gpu|on_backends' tests --include 'test_*.py') 2>$work/left_out.log)
  [ -s $work/left_out.log ] && tell "$(cat $work/left_out.log)"
  processes=$("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)
  stage tests 80 "$python" -m pytest -m gpu -p no:cacheprovider -o addopts=-q --tb=short $processes $tests
  # A whole training step needs the detector's packages too.
  if "$python" -c 'import benchmarks.train_step' 2>$work/train_step.log; then
    for batch in 32 256; do
      stage "train_step_$batch" 29 "$python" -m benchmarks train_step --model ViT-L-14-quickgelu --batch $batch \
        --seconds 8 --out "$work/train_step_$batch.json"
    done
    bench whole_run 34 training_run
    bench scoring 40 scoring --parts rates --models ViT-L-14 --seconds 3
  else
    tell "left out: benchmarks/train_step.py: $(tail -n 1 $work/train_step.log)"
  fi
  # The sanitizer sees an allocation's end only where torch does not pool its memory.
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      stage $tool 20 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
        "$python" -m pytest -p no:cacheprovider -o addopts=-q $tests \
        -k "cuda-cuda and (layouts or deterministic or twice_alike)"
    done
  else
    tell "left out: compute-sanitizer is not on the PATH"
  fi
  bench more 20 spectral_entropy optimizer_step --rows 144 --seconds 1
  deadline=535
  stage plots 10 "$python" -m benchmarks.plots "$out" --results \
    $(grep -l '"results"' $work/*.json)
  cat $work/train_step*.log $work/bench_whole_run.log $work/plots.log
else
  tell "no CUDA device: benchmarks, tests, training step and sanitizers skipped"
fi
tell "$([ $failed = 0 ] && echo "all stages passed" || echo "not all stages passed"); logs and results: $out/gpu.tar.gz"
exit $failed
