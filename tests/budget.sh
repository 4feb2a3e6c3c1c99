#!/usr/bin/env bash
# budget.sh - registers and spills of every kernel, as ptxas told them when build/ was made, within kernels/budget.txt.
set -uo pipefail
cd "$(dirname "$0")/.."
if ! ls build/usage/*.txt >/dev/null 2>&1; then
    echo "ok 1 - registers and spills # SKIP the CUDA module was not built here (no nvcc)"
    echo "1..1"
    exit 0
fi
# arch name registers spilled bytes, a line a kernel and architecture (a function that kernels call has 0 registers)
table=$(cat build/usage/*.txt | awk '
    /Compiling entry function/ { split($0, p, "\047"); entry = p[2]; arch = p[4] }
    /Function properties for/ { fn = $NF }
    /bytes spill stores/ { if (fn == entry) spilled = $5 + $9; else print arch, fn, 0, $5 + $9 }
    /Used [0-9]+ registers/ { for (i = 1; i < NF; i++) if ($i == "Used") print arch, entry, $(i + 1), spilled }' |
    c++filt | sed -E 's/\(anonymous namespace\):://g; s/\(.*\)( [0-9]+ [0-9]+)$/\1/; s/^(sm_[0-9a-z]+) (void )?/\1 /; s/ ([0-9]+) ([0-9]+)$/|\1|\2/; s/^(sm_[0-9a-z]+) /\1|/' | sort -u)
n=0 bad=0
say() { n=$((n + 1)); if [ -z "$2" ]; then echo "ok $n - $1"; else echo "not ok $n - $1"; printf '%s\n' "$2" | sed 's/^/    /' | head -20; bad=1; fi; }
lines=$(grep -vE '^ *(#|$)' kernels/budget.txt)
while read -r pattern registers spills; do
    say "$pattern: at most $registers registers, $spills bytes of spills" "$(awk -F'|' -v p="$pattern" -v r="$registers" -v s="$spills" '
        $2 ~ p { seen = 1; if ($3 > r || $4 > s) print $1, $2 ": " $3 " registers, " $4 " bytes spilled" }
        END { if (!seen) print "no such kernel" }' <<<"$table")"
done <<<"$lines"
patterns=$(awk '{ print $1 }' <<<"$lines" | paste -sd'|')
say "kernels without a budget spill nothing" "$(awk -F'|' -v p="$patterns" '$2 !~ p && $4 > 0 { print $1, $2 ": " $4 " bytes" }' <<<"$table")"
echo "# $(wc -l <<<"$table") kernels and architectures"
echo "1..$n"
exit $bad
