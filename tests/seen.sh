#!/usr/bin/env bash
# seen.sh - every __global__ function of kernels/ has run: `seen.sh FILE`, where FILE is what the emulator wrote to HC_SEEN, a
# line for every launch's kernel. Without FILE: what ran under ThreadSanitizer in `./run tests`, skipped where nothing has.
set -uo pipefail
cd "$(dirname "$0")/.."
file=${1:-build-tsan/seen}
[ -f "$file" ] || { echo "ok 1 - kernels seen by ThreadSanitizer # SKIP no $file: ./run tests makes it"; exit 0; }
n=0 bad=0 known=
ran=$(sed -E 's/^\(//; s/[<)].*//' "$file" | sort -u) # (clustered<T, K>) is clustered
for source in $(grep -l '__global__' kernels/*.cu kernels/*.cuh | grep -v '/cuda\.cuh$'); do # cuda.cuh has one in its text
    for kernel in $(tr '\n' ' ' <"$source" | grep -oE '__global__ [^;{]*\{' |
        sed -E 's/__launch_bounds__\([^()]*(\([^()]*\)[^()]*)*\)//; s/.*void +([A-Za-z_0-9]+) *\(.*/\1/'); do
        n=$((n + 1))
        if grep -qx "$kernel" <<<"$known"; then echo "not ok $n - $kernel of $source has the name of another kernel"; bad=1
        elif grep -qx "$kernel" <<<"$ran"; then echo "ok $n - $kernel of $source"
        else echo "not ok $n - $kernel of $source did not run"; bad=1; fi
        known+=$'\n'$kernel
    done
done
[ $n -gt 50 ] || { echo "not ok - only $n kernels were found in kernels/"; bad=1; }
echo "1..$n"
exit $bad
