#!/usr/bin/env bash
# layout.sh - the rules of the house that a script can check. Each rule prints one TAP line; a broken one lists the places.
set -uo pipefail
cd "$(dirname "$0")/.."
n=0 bad=0
rule() { # rule "text" <output that must be empty>
    n=$((n + 1))
    if [ -z "$2" ]; then echo "ok $n - $1"; else echo "not ok $n - $1"; printf '%s\n' "$2" | sed 's/^/    /' | head -20; bad=1; fi
}
tracked() { git ls-files "$@" 2>/dev/null || find "$@" -type f; }
sources=$(tracked | grep -E '\.(c|h|cpp|cu|cuh|def)$')
ops=$(sed -nE 's/^EXC_OP\(([a-z0-9]+),.*/\1/p' kernels/ops.def)

rule "every op has its definition kernels/<op>.c" "$(for o in $ops; do [ -f kernels/$o.c ] || echo "kernels/$o.c"; done)"
rule "every op is tested by name" "$(for o in $ops; do grep -lqE "exc_${o}_args|ops->$o\b" tests/*.c || echo "$o"; done)"
rule "file names are single lower-case words" "$(tracked | grep -E '\.(c|h|cpp|cu|cuh|sh)$' | grep -vE '(^|/)[a-z0-9]+\.[a-z]+$')"
rule "file names are unique among sources" "$(tracked host kernels bench include tests | grep -E '\.(c|h)$' | sed 's|.*/||' | sort | uniq -d)"
rule "no file over 800 lines, excise.h under 400" "$(wc -l $sources | awk '$2 != "total" && ($1 > 800 || ($2 == "include/excise.h" && $1 >= 400)) {print $2, $1}')"
rule "files open with a comment" "$(for f in $sources; do head -c 2 "$f" | grep -q '/\*' || echo "$f"; done)"
rule "no tabs, no trailing blanks, no #if 0" "$(grep -nE "$(printf '\t')| +\$|^ *# *if +0\b" $sources /dev/null | grep -v '^Makefile')"
rule "one #ifdef per optional feature" "$(grep -hoE '^ *# *(ifdef|if defined.?) *\(?EXCISE_WITH_[A-Z]+' $sources | grep -oE 'EXCISE_WITH_[A-Z]+' | sort | uniq -d)"
rule "kernels include no host header" "$(grep -nE '#include "' kernels/*.c kernels/*.h kernels/*.def | grep -vE '"(ops|queue|excise|[a-z0-9]+)\.(h|def)"'; for f in kernels/*.c kernels/*.h; do sed -nE 's/.*#include "([a-z0-9.]+)".*/\1/p' "$f" | while read -r h; do [ -f kernels/$h ] || [ -f include/$h ] || echo "$f: $h"; done; done)"
rule "host/cli includes only excise.h, its own headers and system headers" "$(for f in host/cli/*.[ch]; do sed -nE 's/.*#include "([a-z0-9.]+)".*/\1/p' "$f" | while read -r h; do [ -f host/cli/$h ] || [ "$h" = excise.h ] || echo "$f: $h"; done; done)"
rule "base knows nothing above it" "$(grep -nE '#include "(files|model|study)\.h"' host/base/*)"
rule "files knows nothing above it" "$(grep -nE '#include "(model|study)\.h"' host/files/*)"
rule "model knows no studies" "$(grep -nE '#include "study\.h"' host/model/*)"
# kernels/memory.cu, graph.cu, module.cu, libraries.cu, blas.cu and wide.cu are the module's own; every other .cu is the twin of an op
rule "twins have the stems of ops" "$(for f in kernels/*.cu; do n=$(basename "$f" .cu); case " $(echo $ops) memory graph module libraries blas wide requant " in *" $n "*) ;; *) echo "$f" ;; esac; done)"
rule "a .cu includes cuda.cuh or tensor.cuh and nothing of the host" "$(grep -nE '#include' kernels/*.cu | grep -vE '"(cuda|tensor|memory|[a-z0-9]+)\.cuh"|"(ops\.def|module\.h)"|^kernels/(libraries|blas)\.cu:[0-9]+:#include <(cstdarg|dlfcn\.h|mutex|new)>')"
rule "no launch outside the LAUNCH macro, no device memory call outside memory.cu" "$(grep -nE '<<<|cudaMalloc|cudaFree|cudaHostAlloc|cuda[A-Za-z]*Synchronize' $sources | grep -vE '^kernels/(memory\.cu|cuda_on_host/)|^kernels/module\.cu.*StreamSynchronize|^tests/(bugs|cudart)')"
rule "every op has its twin kernels/<op>.cu" "$(for o in $ops; do [ -f kernels/$o.cu ] || echo "kernels/$o.cu"; done)"
library=$(ls build/libexcise.a 2>/dev/null)
if [ -n "$library" ] && command -v nm >/dev/null; then
    rule "library objects reference no printf, puts, stdout, stderr, abort, exit" \
        "$(nm -A --undefined-only "$library" 2>/dev/null | awk '{print $1, $NF}' | grep -E ' (printf|vprintf|puts|putchar|stdout|stderr|abort|exit|_exit|perror)$')"
    declared=$(grep -oE '^EXC_API [^(]*\(' include/excise.h | sed -E 's/.*[ *](exc_[a-z0-9_]+)\(/\1/' | sort)
    exported=$(nm -D --defined-only build/libexcise.so | awk '{print $NF}' | grep -v '^_' | sort)
    rule "exported symbols are exactly those of excise.h" "$(diff <(echo "$declared") <(echo "$exported"))"
else
    rule "the library is built" "build/libexcise.a is missing: run ./run build"
fi
rule "excise.h is clean C11 and C++11" "$(for l in "-x c -std=c11" "-x c++ -std=c++11"; do echo '#include "excise.h"' | ${CC:-cc} $l -pedantic -Wall -Wextra -Werror -Iinclude -fsyntax-only - 2>&1; done)"
rule "the tracked tree is under 30 MiB" "$(git ls-files -z 2>/dev/null | xargs -0 -r du -cb 2>/dev/null | awk '$2 == "total" && $1 > 31457280 {print $1 " bytes"}')"
echo "1..$n"
exit $bad
