#!/usr/bin/env bash
# ranks.sh - several processes do one job over MPI and get what one process gets: replies, logits, counts and the written
# checkpoint bit for bit; and when a rank dies, stops or does something else, all end soon with a message and no output is
# left. TAP lines.
set -uo pipefail
cd "$(dirname "$0")/.."
excise=$(realpath "${EXCISE:-build/excise}") demo=tests/data/demo n=0 bad=0
models=$(dirname "$excise")/data/models
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_rmaps_base_oversubscribe=1
if ! command -v mpirun >/dev/null || [ ! -f "$(dirname "$excise")/libexcise_mpi.so" ]; then
    echo "ok 1 - ranks # SKIP this build has no MPI module (libopenmpi-dev openmpi-bin)"
    echo 1..1
    exit 0
fi
result() { # result "text" status "log"
    n=$((n + 1))
    if [ "$2" = 0 ]; then echo "ok $n - $1"; else echo "not ok $n - $1"; bad=1; [ -f "${3:-}" ] && tail -8 "$3" | sed 's/^/    /'; fi
}
ranks() { local k=$1; shift; timeout 120 mpirun -n "$k" "$@"; }

head -3 "$demo/prompts/neutral.txt" >"$out/neutral.txt"
for k in 1 2 3 4; do
    sed -E "s#\"out\": *\"[^\"]*\"#\"out\": \"$out/run$k\"#; s#: \"(prompts/|markers|answers)#: \"$PWD/$demo/\1#; s#\"model\": \".\"#\"model\": \"$PWD/$demo\"#" "$demo/job.json" >"$out/job$k.json"
    common=(--threads 1 --reproducible)
    if [ $k = 1 ]; then go=("$excise"); else go=(ranks $k "$excise"); fi
    "${go[@]}" run "$out/job$k.json" "${common[@]}" >"$out/log$k" 2>&1
    rc=$?
    "${go[@]}" forward "$demo" --prompts "$out/neutral.txt" --raw --emit logits,hidden,routing --generate 5 "${common[@]}" -o "$out/f$k" >>"$out/log$k" 2>&1 || rc=1
    "${go[@]}" generate "$demo" --prompts "$demo/prompts/eval_decline.txt" --max-new 8 "${common[@]}" -o "$out/g$k" >>"$out/log$k" 2>&1 || rc=1
    [ $k = 1 ] && { result "one process runs the study" $rc "$out/log1"; continue; }
    result "$k ranks run the study" $rc "$out/log$k"
    cmp "$out/f1" "$out/f$k" >"$out/d" 2>&1; result "$k ranks: logits, hidden states, routing and tokens, bit for bit" $? "$out/d"
    cmp "$out/g1" "$out/g$k" >"$out/d" 2>&1; result "$k ranks: the same replies" $? "$out/d"
    diff <(cut -d, -f1-10 "$out/run1/experts.csv") <(cut -d, -f1-10 "$out/run$k/experts.csv") >"$out/d" 2>&1; result "$k ranks: counts and log-ratios exactly" $? "$out/d"
    diff -r "$out/run1/checkpoint" "$out/run$k/checkpoint" >"$out/d" 2>&1; result "$k ranks: the same checkpoint, byte for byte" $? "$out/d"
    cmp "$out/run1/stats.safetensors" "$out/run$k/stats.safetensors" >"$out/d" 2>&1; result "$k ranks: all sums, bit for bit" $? "$out/d"
    cmp "$out/run1/evaluation.csv" "$out/run$k/evaluation.csv" >"$out/d" 2>&1; result "$k ranks: the same evaluation" $? "$out/d"
done

# ranks with unequal memory take what the one with least can
options=(forward "$demo" --prompts "$out/neutral.txt" --raw --emit logits,hidden,routing --generate 5 --threads 1 --reproducible --backend cpu)
timeout 60 mpirun -n 1 "$excise" "${options[@]}" --memory 40GiB --json -o "$out/less" : -n 1 "$excise" "${options[@]}" --memory 50500KiB -o "$out/less" >"$out/log" 2>&1 &&
    grep -q '"streamed": *true' "$out/log" && cmp "$out/f1" "$out/less" >>"$out/log" 2>&1
result "one rank streams its layers, so both do: the same bits" $? "$out/log"
# rows go through a layer in as many chunks as need be: a pass of the weights for all prompts, and one for each of 4 tokens fed back
for rows in 4 11 400; do
    ranks 3 "$excise" "${options[@]}" --batch-tokens $rows --memory 50500KiB --json -o "$out/rows$rows" >"$out/log" 2>&1 &&
        grep -q '"streamed": *true' "$out/log" && grep -q '"passes": *5[^0-9]' "$out/log" && cmp "$out/f1" "$out/rows$rows" >>"$out/log" 2>&1
    result "3 ranks stream, chunks of $rows rows: five passes, the same bits" $? "$out/log"
done

# every family: shared experts, dense layers, states of any mixer; several shards
printf '{"tokens":[3,5,7,11,13,2,9]}\n{"tokens":[4]}\n{"tokens":[1,8,2,6,5,12,20,21,22,23,24]}\n' >"$out/t.jsonl"
for model in "$models"/*/; do
    [ -f "$model/config.json" ] || continue
    name=$(basename "$model")
    options=(forward "$model" --prompts "$out/t.jsonl" --emit logits,hidden,routing --generate 4 --threads 1 --reproducible)
    "$excise" "${options[@]}" -o "$out/$name.1" >"$out/log" 2>&1 && ranks 3 "$excise" "${options[@]}" -o "$out/$name.3" >>"$out/log" 2>&1 &&
        cmp "$out/$name.1" "$out/$name.3" >>"$out/log" 2>&1
    result "3 ranks, $name: the same logits, routing and tokens" $? "$out/log"
done
model=$models/qwen3_moe
printf '{"excise_plan":1,"edits":[{"op":"scale","role":"expert_down","layers":[0],"experts":[1,3],"strength":0.5}]}' >"$out/plan.json"
"$excise" apply "$model" "$out/plan.json" -o "$out/a1" >"$out/log" 2>&1 && ranks 2 "$excise" apply "$model" "$out/plan.json" -o "$out/a2" >>"$out/log" 2>&1 &&
    diff -r "$out/a1" "$out/a2" >>"$out/log" 2>&1 && "$excise" verify "$model" "$out/a2" >>"$out/log" 2>&1
result "2 ranks share the shards of a checkpoint; verified" $? "$out/log"
for name in qwen3_moe_fp8 gpt_oss; do
    model=$models/$name
    "$excise" apply "$model" "$out/plan.json" --to bf16 -o "$out/$name.wide1" >"$out/log" 2>&1 &&
        ranks 2 "$excise" apply "$model" "$out/plan.json" --to bf16 -o "$out/$name.wide2" >>"$out/log" 2>&1 &&
        diff -r "$out/$name.wide1" "$out/$name.wide2" >>"$out/log" 2>&1
    result "2 ranks write $name as bf16" $? "$out/log"
done

capture=(capture "$demo" --target "$demo/prompts/decline.txt" --baseline "$demo/prompts/comply.txt" --threads 1)
# failing TEXT MUST_CONTAIN OUTPUT COMMAND: ends with an error that says so, within a minute, and leaves nothing behind
failing() {
    local text=$1 part=$2 file=$3; shift 3
    timeout 60 "$@" >"$out/log" 2>&1
    local rc=$?
    local ok=0
    [ $rc != 0 ] && [ $rc != 124 ] && grep -qF -- "$part" "$out/log" && [ -z "$(ls "$file"* 2>/dev/null)" ] || ok=1
    result "$text" $ok "$out/log"
}
once() { # once TEXT COMMAND..: three ranks refuse alike, one line says so
    local text=$1; shift
    timeout 60 mpirun -n 3 "$excise" "$@" >"$out/log" 2>&1
    [ "$(grep -c '^excise ' "$out/log")" = 1 ]
    result "$text is said once" $? "$out/log"
}
once "a wrong option" apply --nonsense
once "a backend that is not there" inspect "$demo" --backend abacus
once "a folder that is not there" merge "$demo" -o "$out/none/s"
failing "ranks with other options are told apart" "expected all ranks at the same step" "$out/s1" \
    mpirun -n 1 "$excise" "${capture[@]}" -o "$out/s1" : -n 1 "$excise" "${capture[@]}" --batch-tokens 64 --decode 4 -o "$out/s1"
failing "more ranks than experts" "one for each expert" "$out/s2" mpirun -n 17 "$excise" "${capture[@]}" -o "$out/s2"
failing "a refused input is said once" "nothere.txt" "$out/s3" mpirun -n 2 "$excise" capture "$demo" --target nothere.txt --baseline nothere.txt -o "$out/s3"
[ "$(grep -c nothere.txt "$out/log")" = 1 ]; result "and not twice" $? "$out/log"
failing "what only another rank refuses is said too" "nothere.txt" "$out/s4" \
    mpirun -n 1 "$excise" "${capture[@]}" -o "$out/s4" : -n 1 "$excise" capture "$demo" --target nothere.txt --baseline nothere.txt -o "$out/s4"
cp -r "$models"/qwen3_moe "$out/nan"
shard=$out/nan/model-00002-of-00003.safetensors
head -c 200000 /dev/zero | tr '\0' '\377' | dd of="$shard" conv=notrunc bs=1 seek=$(($(stat -c %s "$shard") - 200000)) status=none
printf '{"excise_plan":1,"edits":[{"op":"scale","role":"expert_down","layers":["0-3"],"strength":0.5}]}' >"$out/all.json"
failing "the first rank says why another one failed" "excise apply: rank 1: " "$out/s6" mpirun -n 3 "$excise" apply "$out/nan" "$out/all.json" -o "$out/s6"
failing "what one rank's layers are refused for holds all of them up" "expected finite weights" "$out/s7" mpirun -n 3 "$excise" forward "$out/nan" --prompts "$out/t.jsonl" -o "$out/s7"
failing "processes that MPI does not know of" "MPI knows of this one only" "$out/s5" env PMI_SIZE=2 "$excise" "${capture[@]}" -o "$out/s5"

# a rank that is killed, and one that only stops, in the middle of a long job
for signal in KILL STOP; do
    export EXCISE_RANK_SECONDS=3
    for i in $(seq 1500); do cat "$demo/prompts/decline.txt"; done >"$out/long.txt"
    file=$out/long$signal
    timeout 90 mpirun -n 3 "$excise" capture "$demo" --target "$out/long.txt" --baseline "$demo/prompts/comply.txt" --decode 200 --threads 1 -o "$file" >"$out/log" 2>&1 &
    job=$!
    sleep 3
    victim=$(pgrep -f -- "capture $demo .* -o $file" | while read -r p; do [ "$(tr '\0' '\n' </proc/$p/environ 2>/dev/null | sed -n 's/^OMPI_COMM_WORLD_RANK=//p')" = 1 ] && echo "$p"; done | head -1)
    [ -n "$victim" ] && kill -$signal "$victim"
    begun=$SECONDS
    wait $job
    rc=$?
    [ -n "$victim" ] && kill -CONT "$victim" 2>/dev/null
    ok=0
    [ -n "$victim" ] && [ $rc != 0 ] && [ $rc != 124 ] && [ $((SECONDS - begun)) -lt 40 ] && [ -z "$(ls "$file"* 2>/dev/null)" ] || ok=1
    [ $signal = KILL ] || grep -qF "time limit" "$out/log" || ok=1
    result "a rank gets SIG$signal: the others end in time, nothing is left" $ok "$out/log"
done
echo "1..$n"
exit $bad
