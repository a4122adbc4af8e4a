#!/bin/bash
# run.sh NAME SEED LR [LR ...]: trains adapter NAME at each rate, and scores the one that is best on the held-out
# training rows on SST-2's 872 test rows. Adds a line to runs/adapters/table.txt.
set -euo pipefail
declare -A adapters
ff='"intermediate.dense","0.output.dense","1.output.dense","2.output.dense","3.output.dense","4.output.dense","5.output.dense"'
four="targets=[\"query\",\"value\",$ff]" # query, value and both feed-forward maps; the others have query and value
adapters[head]='kind="head"'
adapters[lora-1]='kind="lora", r=1'
adapters[lora_fa-1]='kind="lora_fa", r=1'
adapters[lora_xs-8]="kind=\"lora_xs\", r=8, alpha=8, $four"
adapters[lora_xs-16]="kind=\"lora_xs\", r=16, alpha=16, $four"
adapters[vera-256]='kind="vera", r=256'
adapters[tiny_lora-16]="kind=\"tiny_lora\", u=16, $four"
adapters[uni_lora-256]='kind="uni_lora", d=256'
adapters[vb_lora-16]='kind="vb_lora", vectors=16'
adapters[fourierft-100]='kind="fourierft", n=100'
name=$1 seed=$2 out=runs/adapters best=""
shift 2
mkdir -p "$out"
accuracy() { python -c 'import sys; from pathlib import Path; from spryfl import report
print(report.scored(report.read(Path(sys.argv[1])))[-1]["accuracy"])' "$1"; }
tried=""
for lr in "$@"; do
  run="$out/$name-lr$lr-$seed"
  [ -d "$run/adapter" ] || spryfl run --config experiments/adapters/adapters.toml --seed "$seed" --set "adapter={${adapters[$name]}}" \
    --set method.local_optimizer.lr="$lr" --name "$name-lr$lr-$seed" --out "$out" | tee "$out/$name-lr$lr-$seed.log"
  reached=$(accuracy "$run")
  tried="$tried $lr:$reached"
  if [ -z "$best" ] || python -c "import sys; sys.exit(not $reached > $(accuracy "$best"))"; then best=$run; fi
done
d=$(grep -o '[0-9]* adapter values' "$best"/../"$(basename "$best")".log | head -1)
echo "$name seed $seed | $d | held out$tried | $(basename "$best") | $(spryfl evaluate "$best" ../shared/data/sst2/test.parquet | tr '\n' ' ')" \
  | tee -a "$out/table.txt"
