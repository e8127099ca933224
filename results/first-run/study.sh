#!/usr/bin/env bash
# The first real comparison: SmolLM2-135M on snips; see docs/results/first-run.md. Resumable: a run with a summary is skipped.
#   DATA=<folder of the data> OUT=<scratch folder> bash results/first-run/study.sh search|final
# Summaries land beside this script: search-METHOD-RATE.json (25 steps of 8 rows, loss on rows 99%-100% of the training file) and
# final-METHOD.json (80 steps of 8 rows at the best rate of the search, loss and exact match on the first 200 rows of the valid file).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
: "${DATA:?}" "${OUT:?}" "${THRIFTY:=thrifty}"
mkdir -p "$OUT"
train=$DATA/snips_train.jsonl valid=$DATA/snips_valid.jsonl

# LoRA r4 on all linear layers trains 1,221,120 numbers; the block methods get that as their budget, DoRA comes within 3 %.
declare -A method=(
  [smt]="method=smt budget=1221120"
  [random_blocks]="method=random_blocks budget=1221120"
  [smt_per_matrix]="method={smt:{scope:per_matrix}} budget=1221120"
  [lora]="method={peft:{peft_type:LORA,r:4,lora_alpha:8}}"
  [dora]="method={peft:{peft_type:LORA,use_dora:true,r:4,lora_alpha:8,rank_pattern:{gate_proj:3,up_proj:3}}}"
  [full]="method=full"
)
declare -A rates=([smt]="1e-3 3e-3 5e-3 1e-2" [random_blocks]="1e-3 3e-3 1e-2 3e-2" [lora]="1e-3 3e-3 1e-2 3e-2" [dora]="1e-3 3e-3 1e-2" [full]="1e-4 3e-4 1e-3" [smt_per_matrix]="3e-3 1e-2 3e-2")

run() { # name, then key=value ...
  local name=$1; shift
  [ -s "$here/$name.json" ] && return
  rm -rf "${OUT:?}/$name"
  # the YAML of a mapping needs a space behind each colon
  $THRIFTY train model=smollm2-135m per_device_train_batch_size=8 max_length=256 seed=0 logging_steps=10 save_strategy=no \
    output_dir="$OUT/$name" "$@" > "$OUT/$name.log" 2>&1 || { echo "FAILED $name: $(tail -n 1 "$OUT/$name.log")"; return; }
  cp "$OUT/$name/summary.json" "$here/$name.json"
  cp "$OUT/$name/metrics.jsonl" "$here/$name.metrics.jsonl"
  rm -rf "${OUT:?}/$name/delta"
  echo "$name done"
}
settings() { # "method=... budget=..." as an array, spaces behind colons
  local part; args=()
  for part in ${method[$1]}; do args+=("${part//:/: }"); done
}
search() {
  for m in ${METHODS:-smt lora full random_blocks dora smt_per_matrix}; do
    for rate in ${RATES:-${rates[$m]}}; do
      settings "$m"
      run "search-$m-$rate" "${args[@]}" learning_rate="$rate" max_steps=25 \
        data.train="[{path: $train, split: '[:30%]'}]" data.eval="[{path: $train, split: '[99%:]'}]" eval.loss=true
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
  for m in ${METHODS:-smt lora full random_blocks dora smt_per_matrix}; do
    settings "$m"
    local before=false; [ "$m" = smt ] && before=true
    run "final-$m" "${args[@]}" learning_rate="$(best "$m")" max_steps=80 \
      data.train="[{path: $train, split: '[:30%]'}]" data.eval="[{path: $valid, split: '[:200]'}]" eval.loss=true eval.exact_match=200 eval.before=$before
  done
}
"$1"
