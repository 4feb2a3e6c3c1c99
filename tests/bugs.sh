#!/usr/bin/env bash
# bugs.sh - every deliberate bug of tests/bugs.cpp is found by its mode, and correct code passes in all modes.
set -uo pipefail
cd "$(dirname "$0")/.."
n=0 bad=0
say() { # say found|missed wanted "text"
    n=$((n + 1))
    if [ "$1" = "$2" ]; then echo "ok $n - $3"; else echo "not ok $n - $3: $1, expected $2"; bad=1; fi
}
run() { # run MODE NUMBER
    local folder=build
    case $1 in address) folder=build-asan ;; thread) folder=build-tsan ;; esac
    [ -x $folder/bugs ] || { echo "no $folder/bugs"; return; }
    if HC_GUARD=$([ "$1" = guard ] && echo 1 || echo 0) TSAN_OPTIONS=halt_on_error=1 ASAN_OPTIONS=detect_leaks=0 \
        timeout 60 $folder/bugs "$2" >/dev/null 2>&1; then echo missed; else echo found; fi
}
while read -r number mode what; do
    case $mode in
    none) for m in plain guard address thread; do say "$(run $m "$number")" missed "$what passes ($m)"; done ;;
    *) say "$(run "$mode" "$number")" found "$what ($mode)" ;;
    esac
done < <(build/bugs)
[ $n -gt 20 ] || { echo "not ok - build/bugs lists $n bugs"; bad=1; }
echo "1..$n"
exit $bad
