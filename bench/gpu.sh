#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under ten minutes, without a network: build, tests, benchmarks, report.
#
#   bench/gpu.sh                                 all parts; results in bench/results
#   bench/gpu.sh --out DIR                       results in DIR
#   bench/gpu.sh --only ops,step                 some parts: tests ops step infer sanitize
#   bench/gpu.sh --resume                        go on: parts that are done are left out, cases that are measured too
#   bench/gpu.sh --wheels DIR                    install what is missing (pytest, hypothesis) from wheels in DIR
#   bench/gpu.sh --dry-run                       the same on the CPU, tiny, to test this script
#
# A part that fails does not stop the others; the exit code is 1 when one did. Logs: OUT/logs/PART.log.
set -u

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="$root/bench/results"
only="tests,ops,step,infer,sanitize"
python="${PYTHON:-python3}"
wheels=""
dry=0
resume=0
budget=9.5 # minutes for all parts

usage() { sed -n '2,12p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; }

while [ $# -gt 0 ]; do
  case "$1" in
    --only) only="${2:?--only needs a list}"; shift 2 ;;
    --out) out="${2:?--out needs a folder}"; shift 2 ;;
    --wheels) wheels="${2:?--wheels needs a folder}"; shift 2 ;;
    --budget) budget="${2:?--budget needs minutes}"; shift 2 ;;
    --dry-run) dry=1; shift ;;
    --resume) resume=1; shift ;;
    -h | --help) usage; exit 0 ;;
    *) echo "unknown option $1" >&2; usage >&2; exit 2 ;;
  esac
done
for part in ${only//,/ }; do
  case "$part" in
    tests | ops | step | infer | sanitize) ;;
    *) echo "unknown part $part; choose from tests, ops, step, infer, sanitize" >&2; exit 2 ;;
  esac
done

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
  timeout -k 10 "$most" "$@" > "$out/logs/$name.log" 2>&1
  local code=$?
  if [ $code = 0 ]; then
    echo "$name" >> "$done_file"
    say "$name: done"
  else
    [ $code = 124 ] && say "$name: stopped after $most s; go on with --resume" || say "$name: FAILED, exit code $code: $(tail -1 "$out/logs/$name.log")"
    failed="$failed $name"
  fi
  return $code
}

has() { "$python" -c "import $1" > /dev/null 2>&1; }
wanted() { case ",$only," in *",$1,"*) return 0 ;; *) return 1 ;; esac; }

# Only for this GPU: a minute less of compilation.
if [ $dry = 0 ]; then
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

if [ -n "$wheels" ]; then
  "$python" -m pip install --quiet --no-index --find-links "$wheels" pytest hypothesis tqdm pyyaml safetensors \
    > "$out/logs/wheels.log" 2>&1 || say "wheels: $(tail -1 "$out/logs/wheels.log")"
fi
part build 240 bash -c build || { say "without a build nothing else can run"; exit 1; }

if wanted tests; then
  if has pytest; then
    if [ $dry = 1 ]; then
      part tests 120 "$python" -m pytest -q -x -p no:cacheprovider tests/ops/test_box_iou.py
    else
      part tests 200 "$python" -m pytest -q -p no:cacheprovider -m "not slow" tests/ops tests/nn tests/losses
    fi
  else
    say "tests: pytest is not installed; give wheels with --wheels DIR"
    failed="$failed tests"
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

if wanted sanitize; then
  tool="$(command -v compute-sanitizer || true)"
  if [ $dry = 1 ]; then
    part sanitize 60 "$python" "$root/bench/small_shapes.py" cpu
  elif [ -z "$tool" ]; then
    say "sanitize: compute-sanitizer is not on PATH"
    failed="$failed sanitize"
  else
    part sanitize 120 bash -c "for check in memcheck racecheck; do
      $tool --tool \$check --error-exitcode 9 --launch-timeout 60 $python '$root/bench/small_shapes.py' cuda || exit 9; done"
  fi
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

if [ -n "$failed" ]; then
  say "not done:$failed"
  exit 1
fi
say "all done; results in $out"
