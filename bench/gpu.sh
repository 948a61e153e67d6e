#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under ten minutes, without a network: build, tests, benchmarks, report.
#
#   bench/gpu.sh                                 all parts; results in bench/results
#   bench/gpu.sh --out DIR                       results in DIR
#   bench/gpu.sh --only ops,step                 some parts: tests sanitize ops step infer
#   bench/gpu.sh --resume                        go on: parts that are done are left out, cases that are measured too
#   bench/gpu.sh --wheels DIR                    install the wheels in DIR first (pytest, hypothesis, pycocotools)
#   bench/gpu.sh --pack FILE                     records and logs in one archive too
#   bench/gpu.sh --plan                          print the commands and their limits in seconds, run nothing
#   bench/gpu.sh --dry-run                       the same on the CPU, tiny, to test this script
#
# A part that fails does not stop the others; the exit code is 1 when one did. Logs: OUT/logs/PART.log. The numbers of
# passed and failed tests and the names of those that failed: OUT/DEVICE/RUN-tests.json.
set -u

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="$root/bench/results"
only="tests,sanitize,ops,step,infer"
python="${PYTHON:-python3}"
wheels=""
pack=""
dry=0
plan=0
planned=0
resume=0
budget=9.5 # minutes for all parts

usage() { sed -n '2,14p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; }

while [ $# -gt 0 ]; do
  case "$1" in
    --only) only="${2:?--only needs a list}"; shift 2 ;;
    --out) out="${2:?--out needs a folder}"; shift 2 ;;
    --wheels) wheels="${2:?--wheels needs a folder}"; shift 2 ;;
    --budget) budget="${2:?--budget needs minutes}"; shift 2 ;;
    --pack) pack="${2:?--pack needs a file}"; shift 2 ;;
    --plan) plan=1; shift ;;
    --dry-run) dry=1; shift ;;
    --resume) resume=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
done
for part in ${only//,/ }; do
  case "$part" in
    tests | sanitize | ops | step | infer) ;;
    *) echo "unknown part $part; choose from tests, sanitize, ops, step, infer" >&2; exit 2 ;;
  esac
done

if [ $plan = 1 ]; then
  out="$(mktemp -d)" || exit 2
  trap 'rm -rf "$out"' EXIT
fi
mkdir -p "$out/logs" || exit 2
out="$(cd "$out" && pwd)"
cd "$root" || exit 2
done_file="$out/logs/done"
name_file="$out/logs/run_name"
begin=$SECONDS
failed=""

say() { printf '%s %4d s  %s\n' "$(date -u +%H:%M:%S)" $((SECONDS - begin)) "$*" | tee -a "$out/logs/summary.log"; }
allowed="$("$python" -c 'import sys; print(int(60 * float(sys.argv[1])))' "$budget")" || exit 2
left() { echo $((allowed - (SECONDS - begin))); }

if [ $resume = 0 ]; then
  rm -f "$done_file" "$name_file" "$out/logs/summary.log"
fi
touch "$done_file"
[ -s "$name_file" ] || date -u +%Y%m%d-%H%M%S-gpu > "$name_file"
run_name="$(cat "$name_file")"

if [ $dry = 1 ]; then
  device=cpu
  run_name="dry-$run_name"
elif [ $plan = 1 ]; then
  device=0
else
  device=0
  if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> "$out/logs/torch.log"; then
    say "torch sees no GPU here ($(tail -1 "$out/logs/torch.log")); --dry-run tests this script on the CPU"
    exit 2
  fi
  nvidia-smi > "$out/logs/nvidia-smi.log" 2>&1
fi

# part NAME SECONDS COMMAND...: run, log, remember; never longer than what is left of the budget.
part() {
  local name="$1" most="$2"
  shift 2
  if [ "${plan:-0}" = 1 ]; then
    printf '%4d s  %s: %s\n' "$most" "$name" "$*"
    planned=$((planned + most))
    return 0
  fi
  if grep -qx "$name" "$done_file"; then
    say "$name: done before"
    return 0
  fi
  local time_left
  time_left=$(left)
  if [ "$time_left" -lt 5 ]; then
    say "$name: left out, the budget of $budget minutes is spent; go on with --resume"
    failed="$failed $name"
    return 1
  fi
  [ "$time_left" -lt "$most" ] && most=$time_left
  say "$name: $*"
  timeout -s "${signal:-TERM}" -k 10 "$most" "$@" > "$out/logs/$name.log" 2>&1
  local code=$?
  if [ $code = 0 ]; then
    echo "$name" >> "$done_file"
    say "$name: done"
  else
    [ $code = 124 ] || [ $code = 137 ] && say "$name: stopped after $most s; go on with --resume" || say "$name: FAILED, exit code $code: $(tail -1 "$out/logs/$name.log")"
    failed="$failed $name"
  fi
  return $code
}

has() { "$python" -c "import $1" > /dev/null 2>&1; }
wanted() { case ",$only," in *",$1,"*) return 0 ;; *) return 1 ;; esac; }

# Only for this GPU: a minute less of compilation.
if [ $dry = 0 ] && [ $plan = 0 ]; then
  YOLOV9_FAST_CUDA_ARCHS="${YOLOV9_FAST_CUDA_ARCHS:-$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}"
  export YOLOV9_FAST_CUDA_ARCHS
  export MAX_JOBS="${MAX_JOBS:-$(nproc)}"
fi

build() {
  if [ $dry = 1 ]; then
    "$python" -m yolov9_fast info
    return
  fi
  # The image has no wheel of the build's needs besides setuptools; nothing is downloaded.
  "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps -e . && "$python" -m yolov9_fast info
}
export -f build
export python dry

if [ -n "$wheels" ] && [ $plan = 0 ]; then
  "$python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl \
    > "$out/logs/wheels.log" 2>&1 || say "wheels: $(tail -1 "$out/logs/wheels.log")"
fi
part build 90 bash -c build || { say "without a build nothing else can run"; exit 1; }

# tests NAME SECONDS FILE...: the cases on the GPU; what they gave is in RUN-tests.json, also of a part that was stopped.
tests() {
  local name="$1" most="$2"
  shift 2
  local signal=INT # pytest writes its report then
  part "$name" "$most" "$python" -m pytest -q -p no:cacheprovider "${workers[@]}" -m "$cases" -r fE --tb=short \
    --junit-xml "$out/logs/$name.xml" "$@"
  [ $plan = 1 ] || say "$("$python" "$root/bench/junit.py" "$out/logs/$name.xml" "$out/$folder/$run_name-tests.json" 2>&1 | tail -1)"
}

if wanted tests; then
  cases="gpu and not slow"
  workers=()
  folder=.
  [ $plan = 1 ] || folder="$("$python" -c 'import sys, torch; from yolov9_fast.bench.machine import device_slug
print(device_slug(torch.device(sys.argv[1])))' "$([ $dry = 1 ] && echo cpu || echo cuda)")"
  if [ $plan = 0 ] && ! has pytest; then
    say "tests: pytest is not installed; give wheels with --wheels DIR"
    failed="$failed tests"
  elif [ $dry = 1 ]; then
    cases="not slow"
    tests tests-ops 120 tests/ops/test_box_iou.py
  else
    # Processes share the time that compiling Triton's kernels takes.
    [ "$(nproc)" -ge 8 ] && has xdist && workers=(-n 6 --dist worksteal)
    tests tests-ops 70 tests/ops
    tests tests-layers 45 tests/kernels tests/losses tests/nn
    tests tests-engine 30 tests/engine tests/accelerate
  fi
fi

# The operators' smallest shapes, forward and backward, under each tool. memcheck and initcheck see every tensor's own
# memory only where PyTorch does not cache it.
if wanted sanitize; then
  tool="$(command -v compute-sanitizer || true)"
  if [ $dry = 1 ]; then
    part sanitize 60 "$python" "$root/bench/small_shapes.py" cpu
  elif [ -z "$tool" ] && [ $plan = 0 ]; then
    say "sanitize: compute-sanitizer is not on PATH"
    failed="$failed sanitize"
  else
    check=("${tool:-compute-sanitizer}" --error-exitcode 9 --launch-timeout 60)
    shapes=("$python" "$root/bench/small_shapes.py" cuda)
    part memcheck 20 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${check[@]}" --tool memcheck "${shapes[@]}"
    part racecheck 15 "${check[@]}" --tool racecheck "${shapes[@]}"
    part initcheck 10 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${check[@]}" --tool initcheck "${shapes[@]}"
    part synccheck 10 "${check[@]}" --tool synccheck "${shapes[@]}"
  fi
fi

bench=("$python" -m yolov9_fast bench suite --device "$device" --out "$out" --run "$run_name")
if [ $dry = 1 ]; then
  wanted ops && part ops 120 "${bench[@]}" --only ops,nms --match box_iou --quick --budget 1
  wanted step && part step 120 "${bench[@]}" --only blocks --match AConv/yolov9-t.3 --quick --budget 1
  wanted infer && part infer 120 "${bench[@]}" --only infer --match b1/ --quick --budget 1 --no-peers
else
  # Steps first: what a time is most wanted of. Limits are a few seconds more than --budget, which ends between cases;
  # every case is on the disk when it is done. Together at most 5 minutes.
  wanted step && part step 125 "${bench[@]}" --only step,blocks,places --full --budget 1.7
  wanted infer && part infer 50 "${bench[@]}" --only infer --full --no-peers --budget 0.5
  wanted ops && part ops 85 "${bench[@]}" --only ops,loss,nms --full --op-batch 16 --budget 1.1
  # torch.compile takes seconds for each shape: one shape of each operator, in a file of its own.
  wanted ops && part compile 40 "${bench[@]}" --run "$run_name-compile" --only ops --match 80x80 --quick \
    --op-batch 16 --compile default --budget 0.4
fi

if [ $plan = 1 ]; then
  echo "$planned s in all"
  exit 0
fi

if wanted ops || wanted step || wanted infer; then
  # The report is made from what was recorded, also of parts that did not finish.
  records="$(ls "$out"/*/"$run_name"*.jsonl 2> /dev/null | tr '\n' ' ')"
  if [ -z "$records" ]; then
    say "report: no records"
    failed="$failed report"
  elif "$python" -m yolov9_fast bench report --records $records --out "$out/benchmarks.md" > "$out/logs/report.log" 2>&1; then
    say "report: $out/benchmarks.md"
  else
    say "report: FAILED, $(tail -1 "$out/logs/report.log")"
    failed="$failed report"
  fi
fi

if [ -n "$pack" ]; then
  tar -czf "$pack" -C "$out" --exclude "$(basename "$pack")" logs $(cd "$out" && ls -d */"$run_name"* benchmarks.md 2> /dev/null) \
    || failed="$failed pack"
fi

if [ -n "$failed" ]; then
  say "not done:$failed"
  exit 1
fi
say "all done; results in $out"
