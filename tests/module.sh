#!/usr/bin/env bash
# module.sh - the CUDA module as a user meets it: where it is looked for, and every reason not to use a GPU, in words.
set -uo pipefail
cd "$(dirname "$0")/.."
excise=${EXCISE:-build/excise} build=$(dirname "${EXCISE:-build/excise}") demo=tests/data/demo n=0 bad=0
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
unset EXCISE_CUDA_MODULE
check() { # check "text" expected-exit "must contain" command...
    n=$((n + 1))
    local text=$1 want=$2 part=$3 rc=0; shift 3
    "$@" >"$out/log" 2>&1 || rc=$?
    if [ "$rc" = "$want" ] && grep -qF -- "$part" "$out/log"; then echo "ok $n - $text"
    else bad=1; echo "not ok $n - $text: expected exit $want and \"$part\", found $rc:"; tail -3 "$out/log" | sed 's/^/    /'; fi
}
skip() { n=$((n + 1)); echo "ok $n - $1 # SKIP $2"; }
with() { local module=$1; shift; env EXCISE_CUDA_MODULE="$module" "$@"; }
emulated=$build/libexcise_emulated.so real=$build/libexcise_cuda.so

check "a named module that is not there: version says so" 0 '"usable":false,"why":"/none/module.so: cannot open' with /none/module.so $excise version --json
check "version --json stays JSON" 0 'true' bash -c "EXCISE_CUDA_MODULE='/none/\"quoted\".so' $excise version --json | grep -q '\"usable\":false,\"why\":\"/none/ quoted .so' && echo true"
check "and --backend cuda fails with the reason" 1 "backend cuda cannot be used: /none/module.so" with /none/module.so $excise inspect $demo --backend cuda
check "without --backend the CPU is used" 0 '"backend":"cpu"' with /none/module.so $excise version --json
check "a library that is no module" 1 "was built for another version of Excise" with "$build/libcudaonhost.so" $excise inspect $demo --backend cuda
cp "$excise" "$out/excise"
check "no module beside the program" 1 "libexcise_cuda.so is not installed (looked beside $out" "$out/excise" inspect $demo --backend cuda
mkdir -p "$out/bin" "$out/lib"
cp "$excise" "$out/bin/"
cp "$build/libcudaonhost.so" "$out/lib/libexcise_cuda.so"
check "../lib is looked in" 1 "the CUDA module was built for another version of Excise" "$out/bin/excise" inspect $demo --backend cuda
check "../lib of a program found by PATH" 1 "the CUDA module was built for another version of Excise" env PATH="$out/bin:$PATH" excise inspect $demo --backend cuda
check "no driver" 1 "no NVIDIA driver is installed" env HC_DRIVER=0 EXCISE_CUDA_MODULE="$emulated" $excise inspect $demo --backend cuda
check "a driver that is too old" 1 "the NVIDIA driver supports CUDA 12.4, this build needs 13.0" env HC_DRIVER=12040 EXCISE_CUDA_MODULE="$emulated" $excise inspect $demo --backend cuda
check "a driver, no GPU" 1 "there is a driver, but no NVIDIA GPU" env HC_DEVICES=0 EXCISE_CUDA_MODULE="$emulated" $excise inspect $demo --backend cuda
check "a GPU too small for a layer" 1 "memory: expected at least 2.1 MiB (its largest layer 557.5 KiB" env HC_MEM_MB=65 EXCISE_CUDA_MODULE="$emulated" $excise forward $demo --prompts $demo/prompts/comply.txt -o "$out/f" --backend cuda
check "a GPU too small for all layers" 0 '"streamed":true' env HC_MEM_MB=67 EXCISE_CUDA_MODULE="$emulated" $excise forward $demo --prompts $demo/prompts/comply.txt -o "$out/f" --backend cuda --json
check "version tells that a GPU can be used" 0 '"name":"cuda","usable":true' with "$emulated" $excise version --json
check "the bench of the device's ops" 0 '"row":"project","shape":"Qwen3-30B-A3B' with "$emulated" "$build/excise_gpu" --quick --only project
check "so that it is used without --backend" 0 '"backend":"cuda"' with "$emulated" $excise version --json
check "and the CPU where --backend says so" 0 '"backend":"cpu"' with "$emulated" $excise version --json --backend cpu
small=(env HC_MEM_MB=1 EXCISE_CUDA_MODULE="$emulated")
check "a GPU that is full: the CPU is used, with a warning" 0 "warning: backend cuda is not used: scratch: 64.0 MiB of device memory needed" "${small[@]}" $excise inspect $demo
check "which version tells too" 0 '"usable":false,"why":"scratch: 64.0 MiB of device memory needed' "${small[@]}" $excise version --json
check "but not where the GPU was named" 1 "scratch: 64.0 MiB of device memory needed" "${small[@]}" $excise inspect $demo --backend cuda
check "two ranks, one GPU: both use the CPU" 0 "warning: backend cuda is not used: 1 of 2 ranks cannot use it" with "$emulated" $excise inspect $demo --ranks 2
check "no GPU: -v says why" 0 "backend cuda is not used: /none/module.so: cannot open" with /none/module.so $excise inspect $demo -v
if [ ! -f "$real" ]; then
    skip "the CUDA module needs no CUDA library to load" "it was not built here (no nvcc)"
else
    check "the CUDA module needs no CUDA library to load" 0 "none" bash -c "readelf -d $real | grep NEEDED | grep -E 'cuda|cublas|cusolver|nccl' || echo none"
    if [ -e /proc/driver/nvidia ]; then skip "the CUDA module without a driver" "there is one"
    else check "the CUDA module without a driver" 1 "no NVIDIA driver is installed" with "$real" $excise inspect $demo --backend cuda; fi
fi
check "the program links no CUDA library" 0 "none" bash -c "readelf -d $excise | grep NEEDED | grep -E 'cuda|cublas|cusolver|nccl' || echo none"
echo "1..$n"
exit $bad
