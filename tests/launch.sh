#!/usr/bin/env bash
# launch.sh - several processes on this machine do one job without MPI (--ranks, --gpus): the files of one process, bit for bit;
# a rank that is killed, stops or refuses ends all of them soon, with a message, the first failing rank's exit code and no output
# left. TAP lines.
set -uo pipefail
cd "$(dirname "$0")/.."
excise=$(realpath "${EXCISE:-build/excise}") demo=tests/data/demo n=0 bad=0
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
result() { # result "text" status "log"
    n=$((n + 1))
    if [ "$2" = 0 ]; then echo "ok $n - $1"; else echo "not ok $n - $1"; bad=1; [ -f "${3:-}" ] && tail -8 "$3" | sed 's/^/    /'; fi
}

for k in 1 2 3 4; do
    sed -E "s#\"out\": *\"[^\"]*\"#\"out\": \"$out/run$k\"#; s#: \"(prompts/|markers|answers)#: \"$PWD/$demo/\1#; s#\"model\": \".\"#\"model\": \"$PWD/$demo\"#" "$demo/job.json" >"$out/job$k.json"
    timeout 120 "$excise" run "$out/job$k.json" --threads 1 --reproducible --ranks $k >"$out/log$k" 2>&1
    result "$k ranks run the study" $? "$out/log$k"
    [ $k = 1 ] && continue
    diff -r "$out/run1/checkpoint" "$out/run$k/checkpoint" >"$out/d" 2>&1; result "$k ranks: the same checkpoint, byte for byte" $? "$out/d"
    cmp "$out/run1/stats.safetensors" "$out/run$k/stats.safetensors" >"$out/d" 2>&1; result "$k ranks: all sums, bit for bit" $? "$out/d"
    cmp "$out/run1/evaluation.csv" "$out/run$k/evaluation.csv" >"$out/d" 2>&1; result "$k ranks: the same evaluation" $? "$out/d"
done

# failing TEXT CODE MUST_CONTAIN COMMAND: one line that says so, within a minute; an output would be $out/x
failing() {
    local text=$1 code=$2 part=$3 ok=0; shift 3
    timeout 60 "$@" >"$out/log" 2>"$out/err"
    [ $? = "$code" ] && grep -qF -- "$part" "$out/err" && [ "$(wc -l <"$out/err")" = 1 ] && [ -z "$(ls "$out"/x* 2>/dev/null)" ] || ok=1
    result "$text" $ok "$out/err"
}
capture=(capture "$demo" --target "$demo/prompts/decline.txt" --baseline "$demo/prompts/comply.txt" --threads 1 -o "$out/x")
failing "a refused input is said once, with its exit code" 1 "nothere.txt" "$excise" capture "$demo" --target nothere.txt --baseline nothere.txt --ranks 3 -o "$out/x"
failing "too many ranks" 2 "--ranks: expected at most 16, found 17" "$excise" "${capture[@]}" --ranks 17
failing "no ranks" 2 "--ranks: expected a whole number" "$excise" "${capture[@]}" --ranks 0
for list in 0,0 0, ,1 0,x -1 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16; do
    failing "GPUs $list" 2 "--gpus: expected at most 16 numbers" "$excise" "${capture[@]}" "--gpus=$list"
done
failing "GPUs for the CPU" 2 "for the cuda backend" "$excise" "${capture[@]}" --gpus 0,1 --backend cpu
failing "GPUs and another number of ranks" 2 "--ranks: expected 2" "$excise" "${capture[@]}" --gpus 0,1 --ranks 3
failing "ranks within ranks" 2 "started the ranks already" env OMPI_COMM_WORLD_LOCAL_RANK=0 "$excise" "${capture[@]}" --ranks 2
failing "sockets that are none" 1 "EXCISE_RANK_SOCKETS: expected" env EXCISE_RANK_SOCKETS=1:3 "$excise" "${capture[@]}"
failing "GPUs without the module: said once" 1 "cannot be used" env EXCISE_CUDA_MODULE=/nothere.so "$excise" "${capture[@]}" --gpus 0,1

# a rank that is killed or stops, and a launcher that is asked to end, in the middle of a long job
for i in $(seq 150); do cat "$demo/prompts/decline.txt"; done >"$out/long.txt"
export EXCISE_RANK_SECONDS=3
interrupt() { # interrupt TEXT SIGNAL RANK_OR_PARENT CODE MUST_CONTAIN
    "$excise" capture "$demo" --target "$out/long.txt" --baseline "$demo/prompts/comply.txt" --decode 200 --threads 1 --ranks 3 -o "$out/x" >"$out/log" 2>&1 &
    local job=$! victim=$! rc ok=0 begun
    sleep 1.5
    local children; children=$(pgrep -P $job)
    [ "$3" = parent ] || victim=$(sed -n "$(($3 + 1))p" <<<"$children")
    kill -"$2" "$victim"
    begun=$SECONDS
    wait $job 2>/dev/null
    rc=$?
    for p in $children; do for _ in $(seq 50); do [ -d "/proc/$p" ] || break; sleep 0.1; done; done
    [ $rc = "$4" ] && grep -qF -- "$5" "$out/log" && [ $((SECONDS - begun)) -lt 30 ] && [ -z "$(ls "$out"/x* 2>/dev/null)" ] || ok=1
    for p in $children; do [ ! -d "/proc/$p" ] || ok=1; done
    result "$1" $ok "$out/log"
}
interrupt "a rank that is killed" KILL 1 1 "rank 1 was ended by signal 9"
grep -q "rank 0 of 3, at .*: rank 1 ended" "$out/log"; result "and the first rank says where it was missed" $? "$out/log"
interrupt "the first rank is killed" KILL 0 1 "rank 0 was ended by signal 9"
interrupt "a rank that only stops" STOP 2 1 "rank 2 did not come within the time limit"
interrupt "the launcher is asked to end" TERM parent 130 "interrupted"
interrupt "the launcher is killed" KILL parent 137 ""
echo "1..$n"
exit $bad
