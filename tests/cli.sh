#!/usr/bin/env bash
# cli.sh - the program as a user meets it: help, usage errors, exit codes, text and JSON, outputs that exist. TAP lines.
set -uo pipefail
cd "$(dirname "$0")/.."
excise=${EXCISE:-build/excise} demo=tests/data/demo n=0 bad=0
out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
check() { # check "text" expected-exit "must contain" command...
    n=$((n + 1))
    local text=$1 want=$2 part=$3 rc=0; shift 3
    "$@" >"$out/stdout" 2>"$out/stderr" || rc=$?
    if [ "$rc" = "$want" ] && { [ -z "$part" ] || grep -qF -- "$part" "$out/stdout" "$out/stderr"; } &&
        { [ "$rc" = 0 ] || [ "$(wc -l <"$out/stderr")" = 1 ] || [ "$#" -lt 2 ]; }; then echo "ok $n - $text"
    else
        bad=1
        echo "not ok $n - $text: expected exit $want and \"$part\", found $rc:"
        { tail -3 "$out/stdout"; tail -5 "$out/stderr"; } | sed 's/^/    /'
    fi
}
verbs=$("$excise" -h | awk '/^  [a-z]/ {print $1}')
[ -n "$verbs" ] || { echo "not ok 1 - excise -h lists verbs"; exit 1; }
for v in $verbs; do check "$v -h is one screen" 0 "usage" bash -c "'$excise' $v -h | tee /dev/stderr | head -1 | grep -q 'excise $v' && [ \$('$excise' $v -h | wc -l) -le 45 ] && echo usage"; done
check "no verb" 2 "usage: excise VERB" bash -c "$excise 2>&1 | grep 'usage: excise VERB' >&2; exit \${PIPESTATUS[0]}"
check "unknown verb" 2 "unknown verb" $excise frobnicate
check "unknown option gets a guess" 2 "did you mean --target" $excise capture $demo --tarket x
check "a number that is none" 2 "expected a whole number" $excise capture $demo --decode many
check "missing value" 2 "expected N" $excise capture $demo --decode
check "too few arguments" 2 "usage: excise plan" $excise plan $demo
check "wrong compute" 2 "expected bf16 or f32" $excise forward $demo --prompts $demo/prompts/comply.txt -o "$out/x" --compute int8
check "absent backend" 1 "cuda" env EXCISE_CUDA_MODULE=/none $excise inspect $demo --backend cuda
check "unknown backend" 2 "abacus" $excise inspect $demo --backend abacus
check "missing model" 1 "no/such" $excise inspect no/such
check "not a model folder" 3 "config.json" $excise inspect "$out"
check "version" 0 "cpu" $excise version
check "inspect" 0 "qwen3_moe" $excise inspect $demo
one() { # one "text" command...: --json prints exactly one object, on one line, and nothing else
    n=$((n + 1))
    local text="$1 --json is one object"; shift
    "$@" --json >"$out/stdout" 2>"$out/stderr"
    if [ $? = 0 ] && [ "$(wc -l <"$out/stdout")" = 1 ] && grep -q '^{.*}$' "$out/stdout" &&
        { ! command -v python3 >/dev/null || python3 -m json.tool "$out/stdout" >/dev/null; }; then echo "ok $n - $text"
    else bad=1; echo "not ok $n - $text:"; head -c 300 "$out/stdout" "$out/stderr" | sed 's/^/    /'; fi
}
one inspect $excise inspect $demo
one version $excise version
check "missing prompts" 1 "nothere.txt" $excise generate $demo --prompts nothere.txt -o "$out/g.jsonl"
: >"$out/empty.txt"
check "empty prompts" 3 "empty.txt" $excise generate $demo --prompts "$out/empty.txt" -o "$out/g.jsonl"
printf 'fine\nbad \xff byte\n' >"$out/bad.txt"
check "bad UTF-8 names the line" 3 "bad.txt:2" $excise generate $demo --prompts "$out/bad.txt" -o "$out/g.jsonl"
head -8 $demo/prompts/decline.txt >"$out/t.txt"; head -8 $demo/prompts/comply.txt >"$out/b.txt"
printf 'fine\nbad \0 byte\n' >"$out/nul.txt"
printf 'short\n\n' >"$out/long.txt"; printf 'word %.0s' {1..2000} >>"$out/long.txt"
check "a prompt longer than the context names the line" 3 "long.txt:3: expected at most 512" $excise generate $demo --prompts "$out/long.txt" -o "$out/g.jsonl"
check "a NUL byte names the line" 3 "nul.txt:2" $excise generate $demo --prompts "$out/nul.txt" -o "$out/g.jsonl"
check "generate" 0 "" $excise generate $demo --prompts "$out/t.txt" --max-new 8 -o "$out/g.jsonl" -q
check "output exists" 2 "--force" $excise generate $demo --prompts "$out/t.txt" --max-new 8 -o "$out/g.jsonl"
check "--force" 0 "" $excise generate $demo --prompts "$out/t.txt" --max-new 8 -o "$out/g.jsonl" --force
check "forward" 0 "" $excise forward $demo --prompts "$out/t.txt" --emit logits,hidden,routing --generate 4 -o "$out/f.safetensors"
check "a size that is none" 2 "expected a size such as 8GiB" $excise forward $demo --prompts "$out/t.txt" -o "$out/none" --memory 8Gb
check "a budget too small for a layer" 3 "memory: expected at least" $excise forward $demo --prompts "$out/t.txt" -o "$out/none" --memory 1MB --backend cpu
check "what a run took" 0 '"peak_memory":' $excise forward $demo --prompts "$out/t.txt" -o "$out/took" --memory=4GiB --json
check "capture" 0 "" $excise capture $demo --target "$out/t.txt" --baseline "$out/b.txt" --decode 4 -o "$out/s.safetensors"
check "an output that exists is told before the work" 2 "--force" timeout 20 $excise capture $demo --target "$out/none.txt" --baseline "$out/b.txt" -o "$out/s.safetensors"
check "an output in no folder" 1 "its folder" $excise capture $demo --target "$out/none.txt" --baseline "$out/b.txt" -o "$out/no/s"
check "a folder where a file should go" 2 "found a folder" $excise capture $demo --target "$out/t.txt" --baseline "$out/b.txt" -o "$out" --force
check "a folder where replies should go" 2 "found a folder" $excise generate $demo --prompts "$out/t.txt" -o "$out" --force
mkfifo "$out/pipe"
check "a pipe where a file should go" 2 "device, pipe" $excise generate $demo --prompts "$out/t.txt" -o "$out/pipe" --force
check "a pipe where a table should go" 2 "device, pipe" $excise contrast "$out/s.safetensors" -o "$out/pipe" --force
check "and it stays a pipe" 0 "" test -p "$out/pipe"
check "help to a full disk" 1 "write failed" bash -c "exec $excise -h >/dev/full"
check "results to a full disk" 1 "write failed" bash -c "exec $excise inspect $demo >/dev/full"
check "sets that are equal" 3 "" $excise capture $demo --target "$out/t.txt" --baseline "$out/t.txt" -o "$out/s2.safetensors"
check "contrast" 0 "" $excise contrast "$out/s.safetensors" -o "$out/e.csv"
check "directions" 0 "" $excise directions "$out/s.safetensors" -o "$out/d.safetensors"
check "rank larger than the samples" 3 "rank" $excise directions "$out/s.safetensors" --method svd --rank 60 -o "$out/d2.safetensors"
check "merge" 0 "" $excise merge "$out/s.safetensors" "$out/s.safetensors" -o "$out/m.safetensors"
check "plan" 0 "" $excise plan $demo "$out/s.safetensors" "$out/d.safetensors" -o "$out/p.json"
check "apply --dry-run writes nothing" 0 "" $excise apply $demo "$out/p.json" --dry-run -o "$out/new"
check "apply" 0 "" $excise apply $demo "$out/p.json" -o "$out/new"
check "apply again: output exists" 2 "--force" $excise apply $demo "$out/p.json" -o "$out/new"
check "verify" 0 "" $excise verify $demo "$out/new"
printf '{"text":"Hi"}\n{"messages":[{"role":"user","content":"Hi"}]}\n' >"$out/in.jsonl"
one tokenize $excise tokenize $demo --prompts "$out/in.jsonl" -o "$out/ids.jsonl"
one generate $excise generate $demo --prompts "$out/t.txt" --max-new 2 -o "$out/g.jsonl" --force
one forward $excise forward $demo --prompts "$out/t.txt" -o "$out/f.safetensors" --force
one capture $excise capture $demo --target "$out/t.txt" --baseline "$out/b.txt" -o "$out/s1.safetensors"
one merge $excise merge "$out/s.safetensors" "$out/s.safetensors" -o "$out/m.safetensors" --force
one contrast $excise contrast "$out/s.safetensors" -o "$out/e.csv" --force
one directions $excise directions "$out/s.safetensors" -o "$out/d.safetensors" --force
one plan $excise plan $demo "$out/s.safetensors" "$out/d.safetensors" -o "$out/p.json" --force
one apply $excise apply $demo "$out/p.json" --dry-run
one verify $excise verify $demo "$out/new"
one evaluate $excise evaluate "$out/new" --against $demo --target "$out/t.txt" --max-new 2
printf '{"model":"%s","target":"t.txt","baseline":"b.txt","out":"run"}' "$PWD/$demo" >"$out/job.json"
one run $excise run "$out/job.json"
one report $excise report "$out/run" -o "$out/again.html"
check "an empty text names the line" 3 "void.jsonl:2: text" bash -c "printf '{\"text\":\"x\"}\n{\"text\":\"\"}\n' >'$out/void.jsonl'; exec $excise generate $demo --prompts '$out/void.jsonl' -o '$out/v.jsonl'"
check "a NUL in a text names the line" 3 "zero.jsonl:1: text" bash -c "printf '{\"text\":\"a\\\\u0000b\"}\n' >'$out/zero.jsonl'; exec $excise generate $demo --prompts '$out/zero.jsonl' -o '$out/v.jsonl'"
# 2: the command line alone shows it to be wrong. 3: only the files show it.
plan() { local want=$1 part=$2; shift 2; check "plan $*: $want" "$want" "$part" $excise plan $demo "$out/s.safetensors" "$out/d.safetensors" -o "$out/none.json" "$@"; }
plan 2 'found "foo"' --roles foo
plan 2 'found "router"' --roles router
plan 2 'found ""' --roles attn_out,,expert_down
plan 3 'found shared_down' --roles shared_down
plan 2 'found "abc"' --layers abc
plan 2 '1 twice' --layers 1,1
plan 3 '0..3' --layers 99
plan 2 'top:0' --select top:0
plan 3 'at least one expert' --select q:1e-300
plan 2 'strength' --strength strong
plan 3 '(4)' --strength 1,2
plan 2 'basis' --basis last
plan 3 '0..4' --basis 99
plan 2 'found "rows"' --norm rows
forward() { local want=$1 part=$2; shift 2; check "forward $*: $want" "$want" "$part" $excise forward $demo --prompts "$out/t.txt" -o "$out/none" "$@"; }
forward 2 '--plan FILE' --virtual
forward 2 'no --system' --raw --system x
forward 2 'no --template' --raw --template qwen3
forward 2 'klingon' --template klingon
forward 3 'marker' --template deepseek_v3
forward 2 'found nothing' --emit ''
forward 2 'from 1' --batch-tokens 0
forward 2 'from 1' --limit 0
forward 3 '512' --generate 100000
forward 3 'expected a regular file' --prompts "$out"
forward 2 'empty name' --prompts ''
forward 1 'none.json' --plan "$out/absent/none.json"
check "generate --max-new 0: 2" 2 "from 1" $excise generate $demo --prompts "$out/t.txt" --max-new 0 -o "$out/none"
check "generate --temperature -1: 2" 2 "temperature" $excise generate $demo --prompts "$out/t.txt" --temperature -1 -o "$out/none"
check "contrast --alpha 0: 2" 2 "above 0" $excise contrast "$out/s.safetensors" --alpha 0 -o "$out/none.csv"
check "contrast to a name without a meaning: 2" 2 ".csv or .jsonl" $excise contrast "$out/s.safetensors" -o "$out/none.txt"
check "directions --rank 2 --method mean: 2" 2 "one vector" $excise directions "$out/s.safetensors" --rank 2 -o "$out/none"
check "evaluate --markers without replies: 2" 2 "--target" $excise evaluate $demo --neutral "$out/t.txt" --markers $demo/markers.txt
check "evaluate --virtual without a plan: 2" 2 "--plan" $excise evaluate $demo --neutral "$out/t.txt" --virtual
check "apply onto its source: 2" 2 "apart from the source" $excise apply $demo "$out/p.json" -o $demo --force
check "merge with directions: 3" 3 "mid_sum" $excise merge "$out/s.safetensors" "$out/d.safetensors" -o "$out/none"
check "an empty model name: 2" 2 "empty word" $excise inspect ""
printf '{"model":"%s","target":"t.txt","baseline":"b.txt","out":"other","plan":{"roles":"foo"}}' "$PWD/$demo" >"$out/foo.json"
check "what would be 2 for the verb is 3 in a job file" 3 "foo.json: plan: roles" $excise run "$out/foo.json"
printf '{"model":"%s","target":"t.txt","baseline":"b.txt","out":"other","raw":true,"system":"x"}' "$PWD/$demo" >"$out/raw.json"
check "a job that contradicts itself" 3 "raw: expected no system" $excise run "$out/raw.json"
check "none of these wrote anything" 0 "" bash -c "! ls '$out' | grep none | grep -v none.json"
cp -r $demo "$out/bigger"; sed -i 's/"id": 511/"id": 700/' "$out/bigger/tokenizer.json"
check "a tokenizer with ids beyond the model's" 3 "expected ids below 512" $excise generate "$out/bigger" --prompts "$out/t.txt" -o "$out/none"
check "evaluate" 0 "perplexity" $excise evaluate "$out/new" --against $demo --neutral $demo/prompts/neutral.txt
check "evaluate through a plan" 0 "perplexity" $excise evaluate $demo --plan "$out/p.json" --neutral $demo/prompts/neutral.txt --virtual
printf '{"excise_plan":1,"edits":[]}' >"$out/none.json"
check "a plan that touches nothing" 3 "" $excise apply $demo "$out/none.json" -o "$out/never"
printf '{"excise_plan":1,"edits":[{"op":"projekt"}]}' >"$out/odd.json"
check "an unknown op" 3 "projekt" $excise apply $demo "$out/odd.json" -o "$out/never"
check "nothing half-written" 0 "" bash -c "[ ! -e '$out/never' ] && ! ls '$out' | grep -q partial"
check "a full disk" 1 "" bash -c "ulimit -f 100; exec $excise apply $demo '$out/p.json' -o '$out/full'"
check "and nothing is left of it" 0 "" bash -c "[ ! -e '$out/full' ] && ! ls '$out' | grep -q partial"
for i in {1..150}; do cat $demo/prompts/decline.txt; done >"$out/many.txt" # some seconds of work
check "interrupt" 130 "" timeout --preserve-status -s INT 1 $excise capture $demo --target "$out/many.txt" --baseline $demo/prompts/comply.txt --decode 400 --threads 1 -o "$out/i.safetensors"
echo "1..$n"
exit $bad
