#!/usr/bin/env bash
# install.sh - the installed library as other projects use it: a consumer built with the CMake package (shared and static) and
# with pkg-config. TAP lines.
set -uo pipefail
cd "$(dirname "$0")/.."
n=0 bad=0
root=$(mktemp -d); trap 'rm -rf "$root"' EXIT
step() { n=$((n + 1)); local text=$1; shift; if "$@" >"$root/log" 2>&1; then echo "ok $n - $text"; else echo "not ok $n - $text"; tail -15 "$root/log" | sed 's/^/    /'; bad=1; fi; }
step "cmake --install" cmake --install build --prefix "$root/usr"
for want in include/excise.h bin/excise; do step "installed: $want" test -e "$root/usr/$want"; done
step "only one header" bash -c "[ \$(find '$root/usr/include' -type f | wc -l) = 1 ]"
pc=$(dirname "$(find "$root/usr" -name excise.pc | head -1)")
export PKG_CONFIG_PATH=$pc LD_LIBRARY_PATH=$(dirname "$pc")
for kind in shared static; do
    step "CMake package, $kind" bash -c "cmake -S tests/consumer -B '$root/$kind' -DCMAKE_PREFIX_PATH='$root/usr' -DKIND=$kind && cmake --build '$root/$kind'"
    step "it runs, $kind" "$root/$kind/consumer"
done
step "pkg-config" bash -c "${CC:-cc} tests/consumer/consumer.c -o '$root/pc' \$(pkg-config --cflags --libs excise) -lm && '$root/pc'"
step "pkg-config --static" bash -c "${CC:-cc} tests/consumer/consumer.c -o '$root/pcs' \$(pkg-config --cflags excise) '$LD_LIBRARY_PATH/libexcise.a' \$(pkg-config --static --libs-only-l excise | sed 's/-lexcise//') && '$root/pcs'"
step "C++11 consumer compiles" bash -c "echo '#include <excise.h>
int main() { return exc_version()[0] == 0; }' | ${CXX:-c++} -std=c++11 -x c++ - -o '$root/cpp' \$(pkg-config --cflags --libs excise) && '$root/cpp'"
if command -v python3 >/dev/null; then step "Python, by ctypes" python3 python/stream.py "$(find "$root/usr" -name 'libexcise.so' | head -1)"; fi
echo "1..$n"
exit $bad
