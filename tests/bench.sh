#!/usr/bin/env bash
# bench.sh - excise_gpu on the GPU that the host plays, at its tiny sizes: every op, every way to edit, cuBLASLt beside them, the whole
# model with capture on and off, each as a row with sane fields; what is skipped says why; the summary and the torch column. No
# time is looked at. TAP lines.
set -uo pipefail
cd "$(dirname "$0")/.."
build=$(dirname "$(realpath "${EXCISE:-build/excise}")") n=0 bad=0
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
export EXCISE_CUDA_MODULE=$build/libexcise_emulated.so EXCISE_CUDA_LIBRARIES=$build/libraries
result() { # result "text" <output that must be empty>
    n=$((n + 1))
    if [ -z "$2" ]; then echo "ok $n - $1"; else echo "not ok $n - $1"; printf '%s\n' "$2" | head -8 | sed 's/^/    /'; bad=1; fi
}
has() { grep -qF -- "$1" "$rows" || echo "missing: $1"; }

rows=$out/rows.jsonl
"$build/excise_gpu" --quick >"$rows" 2>"$out/log" || echo "exit $?" >>"$out/exit"
result "it runs, and its checks hold" "$(cat "$out/exit" 2>/dev/null && tail -3 "$out/log")"
result "every row has a name, a shape, who did it and where" "$(grep -vE '^\{"row":"[a-z_]+","shape":"[^"]+","by":"(excise|driver|cuBLASLt|cuSOLVER)",.*"gpu":"[^"]+","quick":true\}$' "$rows")"
result "a positive time with its spread, or an overhead" "$(grep -vE '"row":"machine"|"us":[0-9]+\.[0-9]+,"low_us":[0-9.]+,"high_us":[0-9.]+[,}]|"overhead_percent":-?[0-9.]+,"low_percent":-?[0-9.]+,"high_percent":' "$rows"; grep -E '"us":0\.000|nan|inf' "$rows")"
result "nothing is skipped here" "$(grep '"skipped"' "$rows")"
result "no row stands twice" "$(sed -E 's/"us".*//' "$rows" | sort | uniq -d)"
result "every op has a row" "$(for op in $(sed -nE 's/^EXC_OP\(([a-z0-9]+),.*/\1/p' kernels/ops.def); do grep -q "\"row\":\"$op\",.*\"by\":\"excise\"" "$rows" || echo "$op"; done)"
result "the machine and its libraries" "$(grep -q '"row":"machine","shape":"compute capability 8.0, 4 processors.*cuBLASLt: 13.1.0' "$rows" || head -1 "$rows")"
result "the limits: two copies, reading, writing, a matmul" "$(
    has '"row":"copy","shape":"256.0 KiB","by":"driver"'; has '"row":"copy","shape":"256.0 KiB","by":"excise"'; has '"row":"read"'; has '"row":"write"'; has '"row":"peak"')"
result "rates beside the copy and the peak" "$(grep -E '"gb_s"' "$rows" | grep -vE '"of_copy":[0-9.]+|"row":"copy"'; grep -E '"tflop_s"' "$rows" | grep -vE '"of_peak":[0-9.]+|"row":"peak"')"
result "edits: four models, two layouts, six ranks, cuBLASLt beside each" "$(
    for model in Qwen3-30B-A3B GLM-4.5-Air gpt-oss-120b DeepSeek-V3; do
        for k in 1 2 3 4 8 16; do
            for by in excise cuBLASLt; do
                has "\"row\":\"project\",\"shape\":\"$model 2x128x64 bf16 k=$k\",\"by\":\"$by\""
                has "\"row\":\"project\",\"shape\":\"$model 2x64x128 bf16 k=$k [E,I,H]\",\"by\":\"$by\""
            done
        done
        for way in "bf16 k=3 column norms" "bf16 k=3 row norms" "bf16 k=1 stochastic" "bf16 k=1 exact" "fp8 k=1" "fp8 k=3" "fp8 k=1 exact" "mxfp4 k=1" "mxfp4 k=3"; do
            has "\"shape\":\"$model 2x128x64 $way\",\"by\":\"excise\""
            has "\"shape\":\"$model 2x64x128 $way [E,I,H]\",\"by\":\"excise\""
        done
    done)"
result "products and spectra by NVIDIA's libraries too" "$(has '"row":"matmul","shape":"T=72 q|k|v 96x64 bf16","by":"cuBLASLt"'; grep -q '"row":"gram",.*"by":"cuBLASLt"' "$rows" || echo gram; grep -q '"row":"subspace",.*"by":"cuSOLVER"' "$rows" || echo subspace)"
result "experts with quantised weights" "$(for of in fp8 mxfp4; do for op in glu down; do grep -q "\"row\":\"$op\",.* $of captured\"" "$rows" || echo "$op $of"; done; done)"
result "the edit of all experts beside its floor" "$(for way in "bf16 k=1" "bf16 k=3" "fp8 k=1" "fp8 k=3"; do grep "\"row\":\"edit_model\",.*$way" "$rows" | grep -qE '"floor_us":[0-9.]+' || echo "$way"; done)"
result "the whole model: prefill and decode, with capture and without" "$(
    for name in "prefill 16x" "decode batch 1 " "decode batch 16 " "decode batch 64 "; do
        for kind in "" _captured; do grep "\"row\":\"${name%% *}$kind\",\"shape\":\"${name#* }" "$rows" | grep -qE '"tokens_s":[0-9.]+' || echo "$name$kind"; done
        grep "\"row\":\"${name%% *}_overhead\",\"shape\":\"${name#* }" "$rows" | grep -q overhead_percent || echo "$name overhead"
    done)"
result "the table of the run has a line for each row" "$(grep -oE '"row":"[a-z_]+"' "$rows" | cut -d'"' -f4 | sort -u | grep -v machine | while read -r name; do grep -q "^$name " "$out/log" || echo "$name"; done)"
awk -f bench/summary.awk "$rows" >"$out/summary"
result "the summary has a line for each op and shape" "$([ "$(sed '1,/^row /d' "$out/summary" | wc -l)" = "$(grep -v '"machine"' "$rows" | sed -E 's/,"by".*//' | sort -u | wc -l)" ] || echo "found $(wc -l <"$out/summary") lines")"
result "and tells how long cuBLASLt takes" "$(grep -E '^project .*bf16 k=3 +[0-9.]+ +[0-9.]+ +[0-9.]+ +[0-9]+\.[0-9]{2} *$' "$out/summary" | grep -q . || head -8 "$out/summary")"
rows=$out/few.jsonl
EXCISE_CUDA_LIBRARIES=/nowhere "$build/excise_gpu" --quick --only gram,subspace >"$rows" 2>"$out/log" || echo "exit $?" >>"$out/log"
result "without NVIDIA's libraries: their rows are skipped, ours are not" "$(grep -q '"by":"cuSOLVER","skipped":"cuSOLVER: not used, neither' "$rows" && grep -q '"row":"gram",.*"by":"excise","us"' "$rows" && grep -q '"row":"peak",.*"skipped"' "$rows" ||
    cat "$rows" "$out/log")"
HC_MEM_MB=65 "$build/excise_gpu" --quick --only prefill,edit >"$rows" 2>"$out/log" || echo "exit $?" >>"$out/log"
result "a model that does not fit: skipped, with what it needs" "$(grep -qE '"row":"model",.*"skipped":"[0-9.]+ [KM]iB of device memory needed, [0-9.]+ KiB are free"' "$rows" || cat "$rows" "$out/log")"
mkdir "$out/tmp"
TMPDIR=$out/tmp "$build/excise_gpu" --quick --only prefill >"$rows" 2>"$out/log" || echo "exit $?" >>"$out/log"
result "a model that does: no folder of it is left" "$(grep -q '"row":"prefill_captured"' "$rows" || cat "$out/log"; ls "$out/tmp")"
TMPDIR=/nowhere "$build/excise_gpu" --quick --only prefill >"$rows" 2>"$out/log" || echo "exit $?" >>"$out/log"
result "no folder for its headers: skipped" "$(grep -q '"row":"model",.*"skipped":"a temporary folder: No such file' "$rows" || cat "$rows" "$out/log")"
"$build/excise_gpu" --fast >/dev/null 2>"$out/log"; rc=$?
result "wrong usage is exit 2" "$([ $rc = 2 ] || echo "exit $rc")"
HC_DEVICES=0 "$build/excise_gpu" --quick >/dev/null 2>"$out/log"; rc=$?
result "no GPU is exit 1, with the reason" "$([ $rc = 1 ] && grep -q "there is a driver, but no NVIDIA GPU" "$out/log" || cat "$out/log")"
if ! command -v python3 >/dev/null; then
    n=$((n + 1)); echo "ok $n - the torch column # SKIP no python3"
else
    CUDA_VISIBLE_DEVICES= python3 bench/eager.py "$out/rows.jsonl" >"$out/torch" 2>"$out/log"; rc=$?
    result "the torch column without CUDA says that it is skipped" "$([ $rc = 0 ] && grep -q '"skipped":"no torch with CUDA"' "$out/torch" || cat "$out/torch" "$out/log")"
fi
echo "1..$n"
exit $bad
