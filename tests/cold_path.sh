#!/usr/bin/env bash
# A cold reader's path, from a fresh clone to a folder that PEFT and transformers open: every step of README and tutorial, kept short.
#
#   tests/cold_path.sh FOLDER [BIN]
#
# FOLDER is made and filled. With BIN, a folder that holds python and spryfl, these are used in place of a new environment; the
# clone's Makefile then finds its stamps there and installs nothing.
set -euo pipefail
repository="$(cd "$(dirname "$0")/.." && pwd)"
mkdir -p "$1"
cd "$1"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

say() { printf '\n== %s\n' "$*"; }

say clone
git clone --quiet "file://$repository" spryfl
cd spryfl
if [ $# -gt 1 ]; then
    mkdir -p .venv/bin  # python and spryfl of the environment at hand, this clone's sources
    printf '#!/bin/sh\nexec "%s/python" "$@"\n' "$2" > .venv/bin/python
    printf '#!/bin/sh\nexec "%s/python" -m spryfl.cli "$@"\n' "$2" > .venv/bin/spryfl
    chmod +x .venv/bin/python .venv/bin/spryfl
    touch .venv/.quickstart  # the stamp of an installation
    export PYTHONPATH="$PWD/src"
fi

say quickstart
make --no-print-directory quickstart OUT=runs/quickstart \
    QUICKSTART_ARGS="--rounds 2 --threads 1 --set train.eval_every=1 --set data.train_rows=200 --set data.test_rows=50 --clients 10 --cohort 2"
bin="$PWD/.venv/bin"
export PATH="$bin:$PATH"
short=(--rounds 2 --threads 1 --set train.steps=2)

say open the report
spryfl report runs/quickstart/spry-plus --to runs/report.png
test -s runs/report.png

say change the method
spryfl run --out runs/quickstart --name fedavg --method fedavg --data docstrings "${short[@]}" \
    --set data.train_rows=200 --set data.test_rows=50 --clients 10 --cohort 2

say compare
spryfl report runs/quickstart/spry-plus runs/quickstart/head-alone runs/quickstart/fedavg --to runs/compared.png
test -s runs/compared.png

say a file of your own
"$bin/python" - <<'PY'
import csv, random
random.seed(0)
good, bad = ["kind", "quick", "clean", "helpful"], ["rude", "slow", "dirty", "careless"]
with open("visits.csv", "w", newline="") as file:
    rows = csv.writer(file)
    rows.writerow(["text", "label", "clinic"])
    for i in range(120):
        word = random.choice(good + bad)
        label = "good" if word in good else "bad"
        rows.writerow([f"the {random.choice(['nurse', 'doctor', 'room'])} was {word}, visit {i}", label, f"clinic {i % 12}"])
PY
spryfl partition --data visits.csv --clients 4 --set data.group=clinic --set partition.split=natural
spryfl run --data visits.csv --clients 4 --cohort 2 "${short[@]}" --method fedavg --set method.local_optimizer.lr=0.02 --name mine
spryfl predict runs/mine "the doctor was kind"

say export
spryfl export runs/mine finetuned
if spryfl export runs/mine finetuned 2>/dev/null; then echo "a folder was written over" >&2; exit 1; fi

say load in transformers and in PEFT
"$bin/python" - <<'PY'
import json
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

alone = AutoModelForSequenceClassification.from_pretrained("finetuned").eval()
batch = AutoTokenizer.from_pretrained("finetuned")(["the doctor was kind", "the room was dirty"], padding=True, return_tensors="pt")
from spryfl.models import resolve

base = AutoModelForSequenceClassification.from_pretrained(resolve("minilm")[0], num_labels=2)
beside = PeftModel.from_pretrained(base, "runs/mine/adapter").eval()
with torch.inference_mode():
    one, other = alone(**batch).logits, beside(**batch).logits
assert torch.allclose(one, other, atol=1e-5), (one, other)
assert set(alone.config.id2label.values()) == {"good", "bad"}
print("the same answers:", [alone.config.id2label[int(i)] for i in one.argmax(-1)])
PY

say done
