#!/usr/bin/env bash
# gpus.sh - several GPUs do one job, each a process, their data moved by NCCL: on GPUs that the host plays, with a stand-in for
# NCCL between processes (kernels/cuda_on_host). Any number of them gives the bytes of one; a rank that is killed, stops or does
# something else, and a library that is missing, old or failing, end all of them soon with one line. TAP lines.
set -uo pipefail
cd "$(dirname "$0")/.."
excise=$(realpath "${EXCISE:-build/excise}") demo=tests/data/demo n=0 bad=0
build=$(dirname "$excise") models=$(dirname "$excise")/data/models
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
export EXCISE_CUDA_MODULE=$build/libexcise_emulated.so EXCISE_CUDA_LIBRARIES=$build/libraries HC_DEVICES=4
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_btl_vader_single_copy_mechanism=none OMPI_MCA_rmaps_base_oversubscribe=1
result() { # result "text" status "log"
    n=$((n + 1))
    if [ "$2" = 0 ]; then echo "ok $n - $1"; else echo "not ok $n - $1"; bad=1; [ -f "${3:-}" ] && tail -8 "$3" | sed 's/^/    /'; fi
}
skip() { n=$((n + 1)); echo "ok $n - $1 # SKIP $2"; }
mpi() { command -v mpirun >/dev/null && [ -f "$build/libexcise_mpi.so" ]; }

# ---- the same bytes
head -3 "$demo/prompts/neutral.txt" >"$out/n.txt"
common=(--threads 1 --reproducible -q)
forward=(forward "$demo" --prompts "$out/n.txt" --raw --emit logits,hidden,routing --generate 3 "${common[@]}")
"$excise" "${forward[@]}" --gpus 0 -o "$out/f0" >"$out/log" 2>&1; result "one GPU" $? "$out/log"
for list in 0,1 2,0,1 0,1,2,3; do
    timeout 60 "$excise" "${forward[@]}" --gpus $list -o "$out/f$list" >"$out/log" 2>&1 && cmp "$out/f0" "$out/f$list" >>"$out/log" 2>&1
    result "GPUs $list: logits, hidden states, routing and tokens, bit for bit" $? "$out/log"
done
for r in 1 0; do
    RANK=$r WORLD_SIZE=2 LOCAL_RANK=$r timeout 60 "$excise" "${forward[@]}" --backend cuda --rendezvous "$out/meet" -o "$out/fm" >"$out/log$r" 2>&1 &
done
wait
cmp "$out/f0" "$out/fm" >>"$out/log0" 2>&1; result "two processes of any launcher, which met by a file: the same" $? "$out/log0"
HC_GUARD=1 HC_SEED=7 timeout 60 "$excise" "${forward[@]}" --gpus 0,1 -o "$out/guard" >"$out/log" 2>&1 && cmp "$out/f0" "$out/guard" >>"$out/log" 2>&1
result "the same with device memory closed to the host, threads in another order" $? "$out/log"
printf '{"tokens":[3,5,7,11,13,2,9]}\n{"tokens":[4]}\n{"tokens":[1,8,2,6,5,12,20,21,22,23,24]}\n' >"$out/t.jsonl"
for name in deepseek_v3 gpt_oss qwen3_moe_fp8; do
    options=(forward "$models/$name" --prompts "$out/t.jsonl" --emit logits,routing --generate 2 "${common[@]}")
    "$excise" "${options[@]}" --gpus 1 -o "$out/$name.1" >"$out/log" 2>&1 && "$excise" "${options[@]}" --gpus 3,0,2 -o "$out/$name.3" >>"$out/log" 2>&1 &&
        cmp "$out/$name.1" "$out/$name.3" >>"$out/log" 2>&1
    result "3 GPUs, $name: the same logits, routing and tokens" $? "$out/log"
done
printf '{"excise_plan":1,"edits":[{"op":"scale","role":"expert_down","layers":[0],"experts":[1,3],"strength":0.5}]}' >"$out/plan.json"
"$excise" apply "$models/qwen3_moe" "$out/plan.json" "${common[@]}" --backend cpu -o "$out/a1" >"$out/log" 2>&1 &&
    "$excise" apply "$models/qwen3_moe" "$out/plan.json" "${common[@]}" --gpus 0,1 -o "$out/a2" >>"$out/log" 2>&1 && diff -r "$out/a1" "$out/a2" >>"$out/log" 2>&1
result "2 GPUs write the checkpoint that the CPU writes" $? "$out/log"

for kind in decline comply; do head -4 "$demo/prompts/$kind.txt" >"$out/$kind.txt"; done
capture=(capture "$demo" --target "$out/decline.txt" --baseline "$out/comply.txt" --decode 2 "${common[@]}")
"$excise" "${capture[@]}" --gpus 0 -o "$out/s1" >"$out/log" 2>&1
for list in 0,1 0,1,2; do
    timeout 60 "$excise" "${capture[@]}" --gpus $list -o "$out/s$list" >"$out/log" 2>&1 && cmp "$out/s1" "$out/s$list" >>"$out/log" 2>&1
    result "GPUs $list: the stats of one, bit for bit" $? "$out/log"
done

# ---- what is refused or fails: one line, and no output
failing() { # failing TEXT CODE MUST_CONTAIN COMMAND: an output would be $out/x
    local text=$1 code=$2 part=$3 ok=0; shift 3
    timeout 60 "$@" >"$out/log" 2>"$out/err"
    [ $? = "$code" ] && grep -qF -- "$part" "$out/err" && [ "$(wc -l <"$out/err")" = 1 ] && [ -z "$(ls "$out"/x* 2>/dev/null)" ] || ok=1
    result "$text" $ok "$out/err"
}
two=("$excise" "${forward[@]}" --gpus 0,1 -o "$out/x")
failing "a GPU that is not there" 2 "rank 1: GPU: expected 0 to 3, found 7" "$excise" "${forward[@]}" --gpus 0,7 -o "$out/x"
failing "no NCCL" 1 "NCCL, which several GPUs need, cannot be used: libnccl.so.2 was not found in /nowhere" env EXCISE_CUDA_LIBRARIES=/nowhere "${two[@]}"
failing "an old NCCL" 1 "expected version 2.14 or a later 2, found 21300" env HC_NCCL_VERSION=21300 "${two[@]}"
failing "an NCCL of the future" 1 "expected version 2.14 or a later 2, found 30000" env HC_NCCL_VERSION=30000 "${two[@]}"
failing "no id" 1 "ncclGetUniqueId: a system call failed" env HC_LIBRARY_FAILS=ncclGetUniqueId:2 "${two[@]}"
failing "GPUs that cannot join" 1 "ncclCommInitRankConfig: an internal error" env HC_LIBRARY_FAILS=ncclCommInitRankConfig:3 "${two[@]}"
failing "a send that fails" 1 'at "rows to experts": NCCL: ' env HC_LIBRARY_FAILS=ncclSend:1 "${two[@]}"

# ---- ranks that disagree: both say where, in time
tiny=(forward "$models/qwen3_moe" --prompts "$out/t.jsonl" --emit logits --generate 4 "${common[@]}" --backend cuda)
printf '{"excise_plan":1,"edits":[{"op":"scale","role":"expert_down","layers":[0],"experts":[1,3],"strength":0.25}]}' >"$out/other.json"
apart() { # apart TEXT MUST_SAY ARGUMENTS_OF_RANK_0 -- ARGUMENTS_OF_RANK_1
    local text=$1 say=$2 ok=0 one=() r; shift 2
    while [ "$1" != -- ]; do one+=("$1"); shift; done
    shift
    env RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 timeout 60 "$excise" "$@" -o "$out/x" --rendezvous "$out/xmeet" >"$out/log1" 2>&1 &
    env RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 timeout 60 "$excise" "${one[@]}" -o "$out/x" --rendezvous "$out/xmeet" >"$out/log" 2>&1
    [ $? = 1 ] || ok=1
    wait $! && ok=1
    for r in "" 1; do grep -qF -- "$say" "$out/log$r" && [ "$(wc -l <"$out/log$r")" = 1 ] || ok=1; done
    [ -z "$(ls "$out"/x* 2>/dev/null)" ] || ok=1
    result "$text" $ok "$out/log"
}
apart "ranks with models of other shapes" 'at "the model" with other data' "${tiny[@]}" -- forward "$models/olmoe" "${tiny[@]:2}"
apart "ranks with other weights of the same shapes" 'at "the model" with other data' "${tiny[@]}" -- forward "$out/a1" "${tiny[@]:2}"
apart "ranks that compute otherwise" 'at "the model" with other data' "${tiny[@]}" -- "${tiny[@]}" --compute f32
apart "ranks with other plans" 'at "the plan" with other data' "${tiny[@]}" --plan "$out/plan.json" -- "${tiny[@]}" --plan "$out/other.json"
apart "only one rank has a plan" 'at "the plan' "${tiny[@]}" -- "${tiny[@]}" --plan "$out/other.json"
apart "ranks that generate otherwise" 'at "a step of the forward pass"' "${tiny[@]}" -- "${tiny[@]}" --generate 6
apart "ranks that write by other plans" 'at "the plan" with other data' apply "$models/qwen3_moe" "$out/plan.json" --backend cuda -- \
    apply "$models/qwen3_moe" "$out/other.json" --backend cuda
apart "ranks that round otherwise" 'at "options of apply" with other data' apply "$models/qwen3_moe" "$out/plan.json" --backend cuda -- \
    apply "$models/qwen3_moe" "$out/plan.json" --backend cuda --round sr

# ---- ranks of mpirun: who they are and their small numbers by MPI, data by NCCL
if mpi; then
    # MPI never sees device memory: a host that looks into it is ended at once
    few=(capture "$demo" --target "$out/one.txt" --baseline "$out/other.txt" --decode 2 "${common[@]}")
    head -1 "$out/decline.txt" >"$out/one.txt"
    head -1 "$out/comply.txt" >"$out/other.txt"
    "$excise" "${few[@]}" --gpus 0 -o "$out/k1" >"$out/log" 2>&1 && HC_GUARD=1 timeout 100 mpirun -n 2 "$excise" "${few[@]}" --backend cuda -o "$out/k2" >>"$out/log" 2>&1 &&
        cmp "$out/k1" "$out/k2" >>"$out/log" 2>&1
    result "2 GPUs under mpirun, device memory closed to the host: the same stats" $? "$out/log"
    timeout 60 mpirun -n 3 "$excise" "${forward[@]}" --backend cuda -o "$out/m3" >"$out/log" 2>&1 && cmp "$out/f0" "$out/m3" >>"$out/log" 2>&1
    result "3 GPUs under mpirun: the same bytes" $? "$out/log"
    mixed() { # mixed TEXT MUST_CONTAIN FIRST.. : SECOND..
        local text=$1 part=$2 ok=0; shift 2
        timeout 60 mpirun "$@" >"$out/log" 2>&1
        local rc=$?
        [ $rc != 0 ] && [ $rc != 124 ] && grep -qF -- "$part" "$out/log" && [ -z "$(ls "$out"/x* 2>/dev/null)" ] || ok=1
        result "$text" $ok "$out/log"
    }
    mixed "two ranks on one GPU" "expected a GPU for each, found that ranks 0 and 1 have the same one" \
        -n 1 "$excise" "${forward[@]}" --gpus 1,0 -o "$out/x" : -n 1 "$excise" "${forward[@]}" --gpus 0,1 -o "$out/x"
    mixed "ranks with other prompts" "expected all ranks at the same step" \
        -n 1 "$excise" "${forward[@]}" --gpus 0,1 -o "$out/x" : -n 1 "$excise" "${forward[@]}" --prompts "$out/plan.json" --gpus 0,1 -o "$out/x"
    mixed "ranks with other versions of NCCL" 'at "the version of NCCL"' \
        -n 1 "$excise" "${forward[@]}" --gpus 0,1 -o "$out/x" : -n 1 -x HC_NCCL_VERSION=22000 "$excise" "${forward[@]}" --gpus 0,1 -o "$out/x"
    mixed "a GPU and a CPU" "expected all ranks at the same step" \
        -n 1 "$excise" "${forward[@]}" --gpus 0,1 -o "$out/x" : -n 1 "$excise" "${forward[@]}" --backend cpu -o "$out/x"
else
    skip "GPUs under mpirun" "this build has no MPI module"
fi

# ---- a rank that is killed or stops in the middle of a long job
for i in $(seq 400); do echo '{"tokens":[1,8,2,6,5,12,20,21,22,23,24]}'; done >"$out/long.jsonl"
export EXCISE_RANK_SECONDS=3
interrupt() { # interrupt TEXT SIGNAL RANK MUST_CONTAIN
    "$excise" forward "$models/qwen3_moe" --prompts "$out/long.jsonl" --emit logits --generate 200 "${common[@]}" --gpus 0,1,2 -o "$out/x" >"$out/log" 2>&1 &
    local job=$! ok=0 children rc
    sleep 3
    children=$(pgrep -P $job)
    kill -"$2" "$(sed -n "$(($3 + 1))p" <<<"$children")"
    wait $job 2>/dev/null
    rc=$?
    [ $rc = 1 ] && grep -qF -- "$4" "$out/log" && [ -z "$(ls "$out"/x* 2>/dev/null)" ] || ok=1
    for p in $children; do [ ! -d "/proc/$p" ] || ok=1; done
    result "$1" $ok "$out/log"
}
interrupt "a rank that is killed" KILL 1 "rank 1 was ended by signal 9"
interrupt "a rank that only stops" STOP 2 "did not come within the time limit"
echo "1..$n"
exit $bad
