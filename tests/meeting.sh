#!/usr/bin/env bash
# meeting.sh - ranks that no launcher of ours started meet by a file (--rendezvous): the files of one process, bit for bit; stale
# files, strangers, ranks that are missing, doubled, of another job, killed or interrupted: one line, the right exit code, no file
# left. Cases wait for time limits, so they run side by side, each in a folder of its own. TAP lines.
set -uo pipefail
cd "$(dirname "$0")/.."
excise=$(realpath "${EXCISE:-build/excise}") demo=$PWD/tests/data/demo n=0 bad=0
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
result() { # result "text" status "log"..
    n=$((n + 1))
    if [ "$2" = 0 ]; then echo "ok $n - $1"; else echo "not ok $n - $1"; bad=1; tail -n 4 "${@:3}" 2>/dev/null | sed 's/^/    /'; fi
}
capture=(capture "$demo" --target "$demo/prompts/decline.txt" --baseline "$demo/prompts/comply.txt" --threads 1 --reproducible)

# rank CASE RANK RANKS [VAR=VALUE..] -- ARGS: starts one; its log is CASE/log.RANK, its exit code CASE/rc.RANK. RANKS -: by VARs alone
rank() {
    local at=$out/$1 me=$2 of=$3 set=()
    [ "$of" = - ] || set=(RANK="$me" WORLD_SIZE="$of" LOCAL_RANK="$me")
    shift 3
    while [ "$1" != -- ]; do set+=("$1"); shift; done
    mkdir -p "$at"
    {
        env ${set[@]:+"${set[@]}"} timeout 100 "$excise" "${@:2}" --rendezvous "$at/file" >"$at/log.$me" 2>&1 &
        echo $! >"$at/pid.$me"
        wait $!
        echo $? >"$at/rc.$me"
    } 2>/dev/null &
}
signal() { kill -"$1" "$(pgrep -P "$(cat "$out/$2/pid.$3")")"; } # signal NAME CASE RANK
said() { grep -qF -- "$3" "$out/$1/log.$2" && [ "$(wc -l <"$out/$1/log.$2")" = 1 ]; } # said CASE RANK TEXT: and nothing else
code() { [ "$(cat "$out/$1/rc.$2" 2>/dev/null)" = "$3" ]; }
clean() { [ -z "$(find "$out/$1" -type f \( -name 'file*' -o -name 'x*' \))" ]; } # CASE: neither the file nor an output is left
refused() { # refused TEXT CASE RANK CODE MUST_SAY
    local ok=0
    said "$2" "$3" "$5" && code "$2" "$3" "$4" && clean "$2" || ok=1
    result "$1" $ok "$out/$2/log.$3"
}

# --------------------------------------------------------------------------------------------- the same files as one process
"$excise" "${capture[@]}" -o "$out/alone" >/dev/null 2>&1
# also as torchrun starts them under an srun of two tasks: the innermost launcher counts
for k in 2 3 4; do for r in $(seq 0 $((k - 1))); do rank same$k "$r" $k SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=$((r / 2)) SLURM_LOCALID=0 -- "${capture[@]}" -o "$out/stats$k"; done; done
for k in 1 2; do
    sed -E "s#\"out\": *\"[^\"]*\"#\"out\": \"$out/run$k\"#; s#: \"(prompts/|markers|answers)#: \"$demo/\1#; s#\"model\": \".\"#\"model\": \"$demo\"#" "$demo/job.json" >"$out/job$k.json"
done
"$excise" run "$out/job1.json" --threads 1 --reproducible >/dev/null 2>&1
for r in 1 0; do rank slurm $r - SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=$r SLURM_LOCALID=$r EXCISE_ADDRESS=localhost -- run "$out/job2.json" --threads 1 --reproducible; done
wait
for k in 2 3 4; do cmp "$out/alone" "$out/stats$k" >"$out/d" 2>&1 && clean same$k; result "$k ranks: the sums of one, bit for bit" $? "$out/d" "$out/same$k"/log.*; done
diff -r "$out/run1/checkpoint" "$out/run2/checkpoint" >"$out/d" 2>&1; result "two tasks as srun starts them, by a named address: the checkpoint of one, byte for byte" $? "$out/d" "$out/slurm"/log.*

# ------------------------------------------------------------------------------------------------------------- bad meetings
export EXCISE_RANK_SECONDS=3
job() { rank "$1" "$2" "$3" "${@:4}" -- "${capture[@]}" -o "$out/$1/x"; } # job CASE RANK RANKS [VAR=VALUE..]
long=(EXCISE_RANK_SECONDS=30)
mkdir -p "$out"/{stale,stranger,folder/file}
printf 'excise ranks 1\nword 000102030405060708090a0b0c0d0e0f\nport 9\naddress 127.0.0.1\nend\n' >"$out/stale/file"
job stale 1 2 "${long[@]}"
job other 0 2 EXCISE_RANK_SECONDS=8
job missing 0 3; job missing 1 3
job nobody 1 2
job counts 0 2; job counts 1 3
job double 0 3 "${long[@]}"; job double 1 3 "${long[@]}"
job folder 0 2; job folder 1 2
job killed 0 3 "${long[@]}"; job killed 1 3 "${long[@]}"
job stopped 0 2 "${long[@]}"
job slow 0 2 EXCISE_RANK_SECONDS=60
for _ in $(seq 100); do [ -f "$out/other/file" ] && [ -f "$out/double/file" ] && [ -f "$out/stopped/file" ] && [ -f "$out/slow/file" ] && break; sleep 0.1; done
sed -E 's/^word .*/word 000102030405060708090a0b0c0d0e0f/' "$out/other/file" >"$out/stranger/file" # another rank 0 listens there
job stranger 1 2 "${long[@]}"
signal STOP slow 0; job slow 1 2 EXCISE_RANK_SECONDS=60 # which comes again after 15 s
sleep 1.5
job stale 0 2 "${long[@]}"; job stranger 0 2 "${long[@]}"
env RANK=1 WORLD_SIZE=3 timeout 60 "$excise" "${capture[@]}" -o "$out/double/x" --rendezvous "$out/double/file" >"$out/double/log.again" 2>&1 &
signal KILL killed 1; signal INT stopped 0
sleep 16; signal CONT slow 0
wait
for case in stale stranger slow; do
    ok=0
    for r in 0 1; do code $case $r 0 || ok=1; done
    cmp -s "$out/alone" "$out/$case/x" && [ ! -e "$out/$case/file" ] || ok=1
    case $case in
    stale) text="the file of an earlier run is waited out" ;;
    stranger) text="a file that leads to somebody else's rank 0 is waited out" ;;
    slow) text="a rank that comes again, because nobody heard it for 15 s, is one rank" ;;
    esac
    result "$text" $ok "$out/$case"/log.*
done
refused "a rank that never comes: rank 0 names it" missing 0 1 "expected 3 ranks within 3 s, missing: 2"
refused "and the others repeat it" missing 1 1 "expected 3 ranks within 3 s, missing: 2"
refused "rank 0 never comes" nobody 1 1 "expected rank 0 to write this file within 3 s, found none"
refused "ranks of jobs of other sizes: rank 0" counts 0 2 "found rank 1 of 3 and rank 0 of 2"
refused "and the rank that is too many" counts 1 1 "found rank 1 of 3 and rank 0 of 2"
refused "two processes with one number" double 0 2 "expected each rank once, found a second rank 1"
grep -qF "found a second rank 1" "$out/double/log.again"; result "and the second is told" $? "$out/double/log.again"
refused "a file that cannot be written" folder 0 1 "folder/file: Is a directory"
refused "a rank that is killed while others are waited for" killed 0 1 "rank 1 ended before all had come"
refused "an interrupt while waiting" stopped 0 130 "interrupted"

# ------------------------------------------------------------------------------------------ what the command line alone shows
usage() { # usage TEXT MUST_SAY [VAR=VALUE..] -- ARGS
    local text=$1 say=$2 set=() ok=0
    shift 2
    while [ "$1" != -- ]; do set+=("$1"); shift; done
    env ${set[@]:+"${set[@]}"} timeout 60 "$excise" "${capture[@]}" -o "$out/x" "${@:2}" >"$out/log" 2>&1
    [ $? = 2 ] && grep -qF -- "$say" "$out/log" && [ "$(wc -l <"$out/log")" = 1 ] && [ ! -e "$out/x" ] || ok=1
    result "$text" $ok "$out/log"
}
usage "nobody says which rank this is" "expected this process's number in RANK" -- --rendezvous "$out/f"
usage "a number that is too large" "found rank 2 of 2" RANK=2 WORLD_SIZE=2 -- --rendezvous "$out/f"
usage "too many ranks" "expected at most 64 ranks" RANK=0 WORLD_SIZE=65 -- --rendezvous "$out/f"
usage "a launch within a meeting" "started the ranks already" RANK=0 WORLD_SIZE=2 -- --rendezvous "$out/f" --ranks 2
RANK=0 WORLD_SIZE=1 "$excise" "${capture[@]}" -o "$out/one" --rendezvous "$out/f" >"$out/log" 2>&1 && cmp -s "$out/alone" "$out/one" && [ ! -e "$out/f" ]
result "one rank meets nobody" $? "$out/log"

# ------------------------------------------------------------------------------------------------- a rank that is killed at work
for i in $(seq 150); do cat "$demo/prompts/decline.txt"; done >"$out/long.txt"
long_job=(capture "$demo" --target "$out/long.txt" --baseline "$demo/prompts/comply.txt" --decode 200 --threads 1)
for r in 0 1 2; do rank busy $r 3 -- "${long_job[@]}" -o "$out/busy/x"; done
for _ in $(seq 100); do [ -f "$out/busy/file" ] && break; sleep 0.05; done
for _ in $(seq 100); do [ -f "$out/busy/file" ] || break; sleep 0.05; done
sleep 1
signal KILL busy 2
wait
refused "a rank that is killed at work: rank 0" busy 0 1 ": rank 2 ended"
refused "and another" busy 1 1 ": rank 2 ended"
echo "1..$n"
exit $bad
