#!/usr/bin/env bash
# Everything that needs a CUDA device, within eight minutes, what tells most first: build, smoke, benchmarks, tests,
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

# What each stage may take, in seconds; no stage has another limit. A kernel that fails takes its process along, so
# each backend has its own.
declare -A seconds=(
  [build]=65 [smoke]=24
  [rows_cuda]=34 [rows_triton]=20 [layers_cuda]=24 [layers_triton]=16
  [lora_cuda]=15 [lora_triton]=12 [sizes_cuda]=20 [sizes_triton]=14
  [tests_cuda]=28 [tests_triton]=30
  [train_step_32]=20 [train_step_256]=20 [whole_run]=24 [scoring]=24
  [sanitizer]=12 [memcheck]=20 [racecheck]=20
  [optimizer_step]=10 [images_cuda]=12 [images_triton]=8 [plots]=8
)
total=480 failed=0
[ -n "$capability" ] || seconds[build]=1200 seconds[smoke]=300 total=1500  # nothing is lent, and cores are few

# Adds lines to the table and renews what is left in $OUT.
tell() {
  printf '%s\n' "$@" | tee -a $work/summary.txt
  cp $work/summary.txt "$out"
  tar -czf "$out/gpu.tar.gz.part" -C $work . && mv "$out/gpu.tar.gz.part" "$out/gpu.tar.gz"
}

# stage NAME COMMAND...: runs the command within its time, and all within the total, its output in NAME.log.
# Interrupted, and only then killed, a command says what it has so far.
stage() {
  local name=$1 limit=${seconds[$1]} left=$((total - SECONDS)) started=$SECONDS code=124 note=
  shift
  [ "$name" = plots ] || left=$((left - seconds[plots]))
  limit=$((limit < left ? limit : left))
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

bench() { stage "$1" "$python" -m benchmarks "${@:2}" --device cuda --out "$work/$1.json"; }

# The same for each backend of ours; what else can be compared is measured beside the first.
bench_each() {
  local backend others=
  for backend in $backends; do
    bench "$1_$backend" "${@:2}" --without $(printf '(%s) ' ${all/$backend/}) $others
    others="torch. closed"
  done
}

"$python" -c 'from benchmarks import harness; import json, torch
print(json.dumps(harness.machine("cuda" if torch.cuda.is_available() else "cpu"), indent=1))' \
  >$work/machine.json 2>$work/machine.log
all="cuda triton" backends=$all
if ! stage build env DGS_KERNELS_BUILD=cuda TORCH_CUDA_ARCH_LIST="${capability:-9.0+PTX}" \
  "$python" setup.py build_ext --inplace; then
  tail -n 20 $work/build.log
  backends=triton
  tell "left out: CUDA, since it was not built"
fi
stage smoke "$python" -m benchmarks.smoke ${capability:+$backends} \
  || grep -E 'wrong|failed|Error' $work/smoke.log | head -n 20

if [ -n "$capability" ]; then
  bench_each rows project_align surgery_head surgery_head_forward surgery_head_backward --rows 8192 --seconds 1 --dtype float32 bfloat16
  bench_each layers project_align_ surgery_adamw_ gramian --rows 395520 --seconds 2
  bench_each lora project_align_ surgery_adamw_ gramian --rows 144 --seconds 1
  bench_each sizes project_align surgery_head --rows 65536 512 32 --seconds 1
  # By mark.gpu and on_backends tests are marked as needing a GPU; most of their time is Triton's compiler.
  tests=$(importable $(grep -rlE 'mark\.gpu|on_backends' tests --include 'test_*.py') 2>$work/left_out.log)
  [ -s $work/left_out.log ] && tell "$(cat $work/left_out.log)"
  processes=$("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)
  for backend in $backends; do
    [ $backend = cuda ] && those="not triton-cuda" || those="triton-cuda"
    stage tests_$backend "$python" -m pytest -m gpu -k "$those" -p no:cacheprovider -o addopts=-q --tb=short \
      $processes $tests
  done
  # A whole training step needs the detector's packages too.
  if "$python" -c 'import benchmarks.train_step' 2>$work/train_step.log; then
    for batch in 32 256; do
      stage "train_step_$batch" "$python" -m benchmarks train_step --model ViT-L-14-quickgelu --batch $batch \
        --seconds 6 --out "$work/train_step_$batch.json"
    done
    bench whole_run training_run
    bench scoring scoring --parts rates --models ViT-L-14 --seconds 2
  else
    tell "left out: benchmarks/train_step.py: $(tail -n 1 $work/train_step.log)"
  fi
  # Our CUDA kernels alone are looked at. The sanitizer sees an allocation's end only where torch does not pool its
  # memory. Some machines refuse it.
  if [ "$backends" = triton ]; then
    : # nothing to look at
  elif ! command -v compute-sanitizer >/dev/null; then
    tell "left out: compute-sanitizer is not on the PATH"
  elif ! timeout "${seconds[sanitizer]}" compute-sanitizer --kernel-name kernel_substring=dgs \
    "$python" -c 'import torch; torch.zeros(1, device="cuda").item()' >$work/sanitizer.log 2>&1; then
    tell "left out: compute-sanitizer does not work on this machine: $(grep -m 1 -iE 'error|not supported' $work/sanitizer.log)"
  else
    for tool in memcheck racecheck; do
      stage $tool env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
        --kernel-name kernel_substring=dgs "$python" -m pytest -p no:cacheprovider -o addopts=-q $tests \
        -k "cuda-cuda and (layouts or deterministic or twice_alike)"
    done
  fi
  bench optimizer_step optimizer_step --rows 144 --seconds 1
  bench_each images spectral_entropy --rows 65536 --dim 1024 --seconds 1
  stage plots "$python" -m benchmarks.plots "$out" --results $(grep -l '"results"' $work/*.json)
  cat $work/train_step*.log $work/whole_run.log $work/plots.log 2>/dev/null
else
  tell "no CUDA device: benchmarks, tests, training step and sanitizers skipped"
fi
tell "$([ $failed = 0 ] && echo "all stages passed" || echo "not all stages passed"); logs and results: $out/gpu.tar.gz"
exit $failed
