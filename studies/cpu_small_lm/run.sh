#!/usr/bin/env bash
# Everything this study reports, in one run on one machine:
#   studies/cpu_small_lm/run.sh MODEL TEXT UNSEEN_TEXT OUT
# MODEL is a Hugging Face folder, TEXT what the search may see, UNSEEN_TEXT what it may not. Results land in OUT.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
model=$1 text=$2 unseen=$3 out=$4
workload=prefill=128,decode=64
mkdir -p "$out"
db=$out/plan.db
search=(autoquant search "$model" --eval-text "$text" --db "$db" --workload "$workload" --time-budget 7m)

echo "== machine"; { uname -srm; grep -m1 "model name" /proc/cpuinfo; nproc; python --version; pip list 2>/dev/null | grep -E "^(torch|torchao|transformers|optuna|scipy) "; date -u +%F; } | tee "$out/machine.txt"
echo "== help";   for _ in 1 2 3; do /usr/bin/env time -f "%e s" autoquant --help >/dev/null; done 2>&1 | tee "$out/help.txt"
echo "== memory of torch and the compiler alone"; python "$here/memory.py" --baseline | tee "$out/memory_baseline.json"
echo "== search, first time"; start=$(date +%s)
python "$here/memory.py" -- "${search[@]}" --max-ppl-increase 1% | tee "$out/memory_search.json"
echo "first search: $(($(date +%s) - start)) s" | tee "$out/seconds.txt"
rows() { python - "$db" <<'P'
import sqlite3, sys
c = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
print({t: c.execute(f"select count(*) from {t}").fetchone()[0] for t in ("timing", "loss", "plan", "proof")})
P
}
rows | tee "$out/rows.txt"
echo "== search, another limit"; start=$(date +%s)
"${search[@]}" --max-ppl-increase 0.2% 2>&1 | tail -12
echo "second search: $(($(date +%s) - start)) s" | tee -a "$out/seconds.txt"
rows | tee -a "$out/rows.txt"
"${search[@]}" --max-ppl-increase 1% --json >"$out/search.json" 2>/dev/null

echo "== the front"
autoquant pareto "$db" | tee "$out/pareto.txt"
autoquant pareto "$db" --json >"$out/pareto.json"
autoquant pareto "$db" --plot "$out/front.png"
autoquant show "$db" | tee "$out/show.txt"

python - "$db" "$out/timings.csv" <<'P'
import csv, sqlite3, sys
c = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
columns = "n k m format kernel outcome latency_us relative_error reason".split()
with open(sys.argv[2], "w", newline="") as file:
    csv.writer(file).writerows([columns, *c.execute(f"SELECT {','.join(columns)} FROM timing ORDER BY n, k, m, latency_us")])
P

echo "== recommended plan: applied, timed against the original, compiled the same way"
rm -rf "$out"/model-*
autoquant apply "$db" --out "$out/model-recommended"
python "$here/../../demo/compare.py" "$out/model-recommended" --model "$model" --workload "$workload" | tee "$out/compare.txt"

echo "== perplexity by a separate script"
: >"$out/perplexity.jsonl"
check() { python "$here/check_perplexity.py" "$@" | tee -a "$out/perplexity.jsonl"; }
check "$model" --text "$text" --float32
check "$model" --text "$text" --parts
for plan in $(python -c "import json,sys; print(*[r['plan_id'] for r in json.load(open(sys.argv[1])) if r['on_front']][:5])" "$out/pareto.json"); do
    autoquant apply "$db" --plan "$plan" --out "$out/model-$plan" >/dev/null 2>&1
    check "$out/model-$plan" --text "$text" --parts
    rm -rf "$out/model-$plan"
done
echo "== text the search never saw"
check "$model" --text "$unseen" --windows 120 --first-characters 700000
check "$out/model-recommended" --text "$unseen" --windows 120 --first-characters 700000
rm -rf "$out/model-recommended"
