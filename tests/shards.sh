#!/usr/bin/env bash
# shards.sh - edits that keep row lengths, with the experts shared out over 1, 2, 3 and 4 processes, on the CPU and on GPUs that the host
# plays: written by the ranks together, or made when each rank loads its part, they are the bytes and the bits of one process.
# TAP lines.
set -uo pipefail
cd "$(dirname "$0")/.."
excise=$(realpath "${EXCISE:-build/excise}") n=0 bad=0
build=$(dirname "$excise") models=$(dirname "$excise")/data/models
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
export EXCISE_CUDA_MODULE=$build/libexcise_emulated.so EXCISE_CUDA_LIBRARIES=$build/libraries HC_DEVICES=4
result() { # result "text" status
    n=$((n + 1))
    if [ "$2" = 0 ]; then echo "ok $n - $1"; else echo "not ok $n - $1"; bad=1; tail -8 "$out/log" | sed 's/^/    /'; fi
}
quiet=(--threads 1 -q)
printf '{"tokens":[3,5,7,11,13,2,9]}\n{"tokens":[4,8]}\n{"tokens":[1,8,2,6,5,12,20]}\n' >"$out/t.jsonl"
printf '{"tokens":[2,15,8,9,1]}\n{"tokens":[14,3]}\n{"tokens":[11,18,22,6,15,17,21]}\n' >"$out/b.jsonl"
look=(--prompts "$out/t.jsonl" --emit logits,hidden,routing --generate 3 --reproducible "${quiet[@]}")
rows() { printf ',{"op":"project","role":"%s","norm":"row","strength":%s}' "$1" "$2"; }

for name in qwen3_moe glm4_moe gpt_oss qwen3_moe_fp8 deepseek_v3; do
    model=$models/$name plan=$out/$name.json extra=
    case $name in glm4_moe | deepseek_v3) extra=$(rows shared_down 1)$(rows dense_down 1) ;; esac
    "$excise" capture "$model" --target "$out/t.jsonl" --baseline "$out/b.jsonl" --backend cpu "${quiet[@]}" -o "$out/$name.s" >"$out/log" 2>&1 &&
        "$excise" directions "$out/$name.s" --method svd --rank 2 "${quiet[@]}" --backend cpu -o "$out/$name.dirs" >>"$out/log" 2>&1
    result "$name: directions" $?
    edits=$(rows expert_down 1)$(rows attn_out 0.5)$extra
    printf '{"excise_plan":1,"directions":"%s","edits":[%s]}' "$name.dirs" "${edits#,}" >"$plan"
    for where in "--backend cpu --ranks" --gpus; do
        : >"$out/log"
        for k in 1 2 3 4; do
            [ "$where" = --gpus ] && who="--gpus $(seq -s, 0 $((k - 1)))" at=gpu$k || who="$where $k" at=cpu$k
            written=$out/$name.w.$at seen=$out/$name.f.$at
            "$excise" apply "$model" "$plan" $who "${quiet[@]}" -o "$written" >>"$out/log" 2>&1 &&
                "$excise" forward "$model" --plan "$plan" $who "${look[@]}" -o "$seen" >>"$out/log" 2>&1 &&
                diff -r "$out/$name.w.cpu1" "$written" >>"$out/log" 2>&1 && cmp "$out/$name.f.${at%?}1" "$seen" >>"$out/log" 2>&1
            result "$name, row lengths kept, $k on ${at%?}: the same checkpoint, the same logits, states and tokens" $?
        done
    done
    ! cmp -s <(cat "$model"/*.safetensors) <(cat "$out/$name.w.cpu1"/*.safetensors) && "$excise" verify "$model" "$out/$name.w.gpu4" --backend cpu "${quiet[@]}" >>"$out/log" 2>&1
    result "$name: it was edited, and only where the plan says" $?
done
echo "1..$n"
exit $bad
