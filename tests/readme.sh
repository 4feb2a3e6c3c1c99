#!/usr/bin/env bash
# readme.sh - the README keeps its word: the tour's commands run, in order, and the program of 25 lines compiles and works.
# TAP lines.
set -uo pipefail
cd "$(dirname "$0")/.."
n=0 bad=0
root=$(mktemp -d); trap 'rm -rf "$root"' EXIT
step() { n=$((n + 1)); local text=$1; shift; if "$@" >"$root/log" 2>&1; then echo "ok $n - $text"; else echo "not ok $n - $text"; tail -5 "$root/log" | sed 's/^/    /'; bad=1; fi; }

# commands are the lines that begin with "$ ", with their continuation lines; outputs go to a folder of our own
commands=$(awk '/^    \$ / {on = 1; sub(/^    \$ /, "")} on {line = $0; more = sub(/\\$/, "", line); sub(/^ +/, " ", line); printf "%s", line; if (!more) {print ""; on = 0}}' README.md | sed "s|T=build/tour|T=$root/tour|")
[ "$(wc -l <<<"$commands")" -ge 8 ] || { echo "not ok 1 - README.md has its tour"; exit 1; }
settings=$(head -1 <<<"$commands")
while read -r command; do step "${command:0:60}" bash -c "$settings; $command"; done < <(tail -n +2 <<<"$commands")
rates() { grep -E '^ *(target|baseline) \(n=80\)|right answers' | sed 's/^ *//; s/ *$//' | tr -s ' '; }
bash -c "$settings; $(tail -1 <<<"$commands")" 2>/dev/null | rates >"$root/got"
sed -n 's/^      //p' README.md | rates >"$root/printed"
step "the rates it prints are the rates one gets" diff "$root/printed" "$root/got"

awk '/^```c$/ {on = 1; next} /^```$/ {on = 0} on' README.md >"$root/app.c"
step "25 lines of C" bash -c "cmake --install build --prefix '$root/usr' && cd '$root' && export PKG_CONFIG_PATH=\$(dirname \$(find '$root/usr' -name excise.pc)) &&
    \${CC:-cc} -Wall -Werror app.c -o app \$(pkg-config --cflags --libs excise)"
step "they make a checkpoint" bash -c "mkdir -p '$root/tests' && ln -s '$PWD/tests/data' '$root/tests/data' && cd '$root' && LD_LIBRARY_PATH=\$(dirname \$(find usr -name libexcise.so | head -1)) ./app"
step "which verifies" build/excise verify tests/data/demo "$root/edited"
echo "1..$n"
exit $bad
