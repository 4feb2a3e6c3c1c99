#!/usr/bin/env bash
# device.sh - the study on the CUDA backend (its kernels' sources on the host, kernels/cuda_on_host) and on the CPU: sums, tables,
# directions and written checkpoints are the same files, whatever the family, format and rounding, and each backend verifies
# what the other one wrote. Then what a device can refuse, in one line each. TAP lines.
set -uo pipefail
cd "$(dirname "$0")/.."
excise=$(realpath "${EXCISE:-build/excise}") demo=tests/data/demo n=0 bad=0
models=$(dirname "$excise")/data/models
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
export EXCISE_CUDA_MODULE=${EXCISE_CUDA_MODULE:-$(dirname "$excise")/libexcise_emulated.so}
result() { # result "text" status
    n=$((n + 1))
    if [ "$2" = 0 ]; then echo "ok $n - $1"; else echo "not ok $n - $1"; bad=1; tail -8 "$out/log" | sed 's/^/    /'; fi
}
both() { # both OUTPUT ARGUMENTS..: the same call on both backends into OUTPUT.cpu and OUTPUT.cuda
    local to=$1 b; shift
    for b in cpu cuda; do "$excise" "$@" -o "$to.$b" --backend $b -q --threads 2 >>"$out/log" 2>&1 || return 1; done
}
same() { diff -r "$1.cpu" "$1.cuda" >>"$out/log" 2>&1; }

# ---- without a forward pass: tables, directions, plans
"$excise" capture "$demo" --target "$demo/prompts/decline.txt" --baseline "$demo/prompts/comply.txt" --decode 4 -o "$out/s" --backend cpu -q >"$out/log" 2>&1
result "stats to start from" $?
for method in mean projected svd whitened; do
    : >"$out/log"
    both "$out/d.$method" directions "$out/s" --method $method && same "$out/d.$method"
    result "directions, $method: the same file" $?
done
for b in cpu cuda; do "$excise" contrast "$out/s" --directions "$out/d.svd.cpu" -o "$out/x.$b.csv" --backend $b -q >"$out/log" 2>&1; done
cmp "$out/x.cpu.csv" "$out/x.cuda.csv" >>"$out/log" 2>&1
result "the table of experts: the same file" $?
both "$out/plan" plan "$demo" "$out/s" "$out/d.svd.cpu" --select logratio:8 && same "$out/plan"
result "a plan: the same file" $?

# ---- every family: all writers, inputs, routers, lengths, in every rounding; checked by the other backend
printf '{"tokens":[3,5,7,11,13,2,9]}\n{"tokens":[4,8]}\n{"tokens":[1,8,2,6,5,12,20]}\n' >"$out/t.jsonl"
printf '{"tokens":[2,15,8,9,1]}\n{"tokens":[14,3]}\n{"tokens":[11,18,22,6,15,17,21]}\n' >"$out/b.jsonl"
others='{"op":"project","role":"expert_down","norm":"column","experts":[0,2],"strength":0.75},{"op":"project","role":"attn_out","norm":"row"},
 {"op":"project_input","role":"expert_gate"},{"op":"scale","role":"expert_up","experts":[1],"strength":0.3},{"op":"mask","role":"expert_down","experts":[1]},
 {"op":"router_project","role":"router"},{"op":"project","role":"embed"}'
for model in "$models"/*/; do
    [ -f "$model/config.json" ] || continue
    name=$(basename "$model")
    : >"$out/log"
    "$excise" capture "$model" --target "$out/t.jsonl" --baseline "$out/b.jsonl" --backend cpu -q -o "$out/$name.s" >>"$out/log" 2>&1 &&
        "$excise" directions "$out/$name.s" --method svd --rank 2 -q -o "$out/$name.dirs" >>"$out/log" 2>&1
    rc=$?
    for round in rn sr exact; do
        printf '{"excise_plan":1,"directions":"%s","rounding":"%s","edits":[%s]}' "$name.dirs" $round "$others" >"$out/$name.json"
        [ $rc = 0 ] && both "$out/$name.$round" apply "$model" "$out/$name.json" && same "$out/$name.$round" || rc=1
    done
    [ $rc = 0 ] && "$excise" verify "$model" "$out/$name.exact.cpu" --backend cuda -q >>"$out/log" 2>&1 &&
        "$excise" verify "$model" "$out/$name.exact.cuda" --backend cpu -q >>"$out/log" 2>&1
    result "$name edited, rn, sr and exact: the same checkpoint; verified crosswise" $?
    rm -rf "$out/$name."{rn,sr}.*
done
for name in qwen3_moe_fp8 gpt_oss; do
    : >"$out/log"
    both "$out/$name.wide" apply "$models/$name" "$out/$name.json" --to bf16 && same "$out/$name.wide" && "$excise" verify "$models/$name" "$out/$name.wide.cpu" --backend cuda -q >>"$out/log" 2>&1
    result "$name written as bf16: the same checkpoint; verified" $?
done

# ---- the whole job
for part in decline comply eval_decline eval_comply; do head -3 "$demo/prompts/$part.txt" >"$out/$part.txt"; done
head -1 "$demo/prompts/neutral.txt" >"$out/neutral.txt"
: >"$out/log"
for b in cpu cuda; do
    printf '{"model":"%s","target":"decline.txt","baseline":"comply.txt","out":"run.%s","capture":{"decode":1},"plan":{"roles":"expert_down,attn_out"},
        "evaluate":{"target":"eval_decline.txt","baseline":"eval_comply.txt","neutral":"neutral.txt","markers":"%s","max_new":2}}' \
        "$PWD/$demo" $b "$PWD/$demo/markers.txt" >"$out/job.$b.json"
    "$excise" run "$out/job.$b.json" --backend $b --reproducible -q >>"$out/log" 2>&1
    result "the whole job on $b" $?
done
diff <(cut -d, -f1-6 "$out/run.cpu/experts.csv") <(cut -d, -f1-6 "$out/run.cuda/experts.csv") >>"$out/log" 2>&1
result "the job: the same counts" $?
cmp "$out/run.cpu/evaluation.csv" "$out/run.cuda/evaluation.csv" >>"$out/log" 2>&1
result "the job: the same replies and verdicts" $?
"$excise" apply "$demo" "$out/run.cuda/plan.json" -o "$out/again" --backend cpu -q >>"$out/log" 2>&1 && cmp "$out/again/model.safetensors" "$out/run.cuda/checkpoint/model.safetensors" >>"$out/log" 2>&1
result "the job: its checkpoint is what the CPU makes of its plan" $?
capture=(capture "$demo" --target "$out/decline.txt" --baseline "$out/comply.txt" --decode 1 --backend cuda --reproducible -q)
"$excise" "${capture[@]}" -o "$out/c1" >"$out/log" 2>&1 && "$excise" "${capture[@]}" --batch-tokens 20 -o "$out/c2" >>"$out/log" 2>&1 && cmp "$out/c1" "$out/c2" >>"$out/log" 2>&1
result "sums on the device do not depend on the batching, bit for bit" $?

# ---- what a device can refuse
refused() { # refused "text" "must contain" OUTPUT COMMAND..: exit 1, one line that says so, nothing left behind
    local text=$1 part=$2 file=$3; shift 3
    "$@" >"$out/log" 2>&1
    [ $? = 1 ] && [ "$(grep -c '^excise ' "$out/log")" = 1 ] && grep -qF -- "$part" "$out/log" && [ -z "$(ls "$file"* 2>/dev/null)" ]
    result "$text" $?
}
case $EXCISE_CUDA_MODULE in
*emulated*)
    "$excise" merge "$out"/s "$out"/s "$out"/s "$out"/s "$out"/s "$out"/s "$out"/s "$out"/s -q -o "$out/s8" --backend cpu >"$out/log" 2>&1
    refused "a GPU too small for the states of prompts" "target.resid_last: 2.3 MiB of device memory needed, " "$out/e1" \
        env HC_MEM_MB=65 "$excise" directions "$out/s8" --method svd -o "$out/e1" --backend cuda -q
    ;;
*) n=$((n + 1)); echo "ok $n - a GPU too small for the states of prompts # SKIP a real GPU is as large as it is" ;;
esac
echo "1..$n"
exit $bad
