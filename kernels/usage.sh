#!/bin/sh
# usage.sh FOLDER COMPILER ARGUMENTS.. - runs nvcc and keeps what ptxas tells of registers and spills in FOLDER/<file>.txt,
# for tests/budget.sh. Everything else that nvcc says goes on to stderr.
folder=$1; shift
name=nothing
for a in "$@"; do case $a in *.cu) name=$(basename "$a" .cu) ;; esac; done
mkdir -p "$folder"
"$@" 2>"$folder/$name.log"
code=$?
grep -E '^ptxas info|bytes stack frame' "$folder/$name.log" >"$folder/$name.txt"
grep -vE '^ptxas info|bytes stack frame' "$folder/$name.log" >&2
rm -f "$folder/$name.log"
exit $code
