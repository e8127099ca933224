#!/usr/bin/env bash
# Free blocks against strip-first and whole columns: SmolLM2-135M on snips, 1 % trained, a share in every matrix.
#   DATA=<folder of the data> OUT=<scratch folder> bash results/strip-first/study.sh [search|final]    (none: both)
# Resumable: a run with a summary is skipped. METHODS, RATES, SEEDS and STEPS change what is run. Summaries land beside this script:
# search-METHOD-RATE.json (seed 0, loss on rows 99%-100% of the training file) and final-METHOD-SEED.json (at the best rate of the
# search, loss on the first 200 rows of the valid file); `kept_columns` is added from the plan that the run prints.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${DATA:?}" "${OUT:?}" "${THRIFTY:=thrifty}" "${STEPS:=40}" "${SEEDS:=0 1 2}"
mkdir -p "$OUT"
train=$DATA/snips_train.jsonl valid=$DATA/snips_valid.jsonl

declare -A method=(
  [blocks]="{smt: {scope: per_matrix, block_size: 64}}"
  [strips]="{smt: {scope: per_matrix, block_size: [64, 16], input_budget: 10%}}"
  [strips_20]="{smt: {scope: per_matrix, block_size: [64, 16], input_budget: 20%}}"
  [strips_fine]="{smt: {scope: per_matrix, block_size: 16, input_budget: 10%}}"
  [columns]="{smt: {scope: per_matrix, block_size: column}}"
)
# 1e-2 was the best of 3e-3, 1e-2 and 3e-2 for blocks in results/first-run
declare -A rates=([blocks]="1e-2" [strips]="3e-3 1e-2" [strips_20]="1e-2" [strips_fine]="3e-3 1e-2" [columns]="3e-3 1e-2")
METHODS=${METHODS:-blocks strips strips_20 strips_fine columns}

run() { # name, then key=value ...
  local name=$1; shift
  [ -s "$here/$name.json" ] && return
  rm -rf "${OUT:?}/$name"
  $THRIFTY train model=smollm2-135m budget=1% max_steps="$STEPS" per_device_train_batch_size=8 max_length=256 bf16=true \
    logging_steps=10 save_strategy=no eval.loss=true eval.before=false output_dir="$OUT/$name" \
    data.train="[{path: $train, split: '[:30%]'}]" "$@" > "$OUT/$name.log" 2>&1 \
    || { echo "FAILED $name: $(tail -n 1 "$OUT/$name.log")"; return; }
  python3 - "$OUT/$name" > "$OUT/$name.json" <<'PY'
import json, re, sys
summary = json.load(open(f"{sys.argv[1]}/summary.json"))
kept, of = re.search(r"inputs: +([\d,]+) of ([\d,]+) distinct columns", open(f"{sys.argv[1]}.log").read()).groups()
print(json.dumps(summary | {"kept_columns": [int(n.replace(",", "")) for n in (kept, of)]}, indent=2))
PY
  mv "$OUT/$name.json" "$here/$name.json"
  rm -rf "${OUT:?}/$name"
  echo "$name done"
}
search() {
  local m rate
  for m in $METHODS; do
    for rate in ${RATES:-${rates[$m]}}; do
      run "search-$m-$rate" method="${method[$m]}" learning_rate="$rate" seed=0 data.eval="[{path: $train, split: '[99%:]'}]"
    done
  done
}
best() { # the rate whose search ended with the lowest loss
  python3 - "$here" "$1" <<'PY'
import glob, json, math, sys
losses = {}
for path in glob.glob(f"{sys.argv[1]}/search-{sys.argv[2]}-*.json"):
    loss = json.load(open(path))["evaluation"]["after"]["loss"]
    losses[path.split(f"search-{sys.argv[2]}-")[1][:-5]] = loss if math.isfinite(loss) else math.inf
print(min(losses, key=losses.get))
PY
}
final() {
  local seed m rate
  for seed in $SEEDS; do
    for m in $METHODS; do
      rate=${rates[$m]}
      [[ $rate == *" "* ]] && rate=$(best "$m")
      run "final-$m-$seed" method="${method[$m]}" learning_rate="$rate" seed="$seed" data.eval="[{path: $valid, split: '[:200]'}]"
    done
  done
}
if [ $# = 0 ]; then
  METHODS=${METHODS/blocks /} search # blocks have one rate
  final
else
  "$1"
fi
