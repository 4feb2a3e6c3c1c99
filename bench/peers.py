#!/usr/bin/env python3
"""peers.py - the same work as excise_bench's rows, done by the tools people use today, on the same machine.

    python3 -m venv venv && venv/bin/pip install torch transformers        (optional: tokenizers, llama-cpp-python)
    venv/bin/python bench/peers.py [--bench build/excise_bench] [--only prefill,decode,..] > peers.jsonl

Not needed by the build or the tests. Every peer gets the best of the settings that it offers (attention and expert
implementations, bf16 and f32, batching); each row names the one that won. Rows are JSON lines with the names of excise_bench.
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time


def emit(row, value, unit, setting, **more):
    print(json.dumps({"row": row, "value": value, "unit": unit, "setting": setting, **more}), flush=True)
    print(f"{row:<26} {value:>12.4g} {unit:<12} {setting}", file=sys.stderr)


def clock(work, rounds=5):
    """median seconds of a call, after one that warms up; a call over 10 s is taken as it is"""
    start = time.perf_counter()
    work()
    first = time.perf_counter() - start
    if first > 10:
        return first
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
        if sum(times) > 15:
            break
    return statistics.median(times)


def best(row, unit, tries, per_call=None, rounds=5):
    """the fastest of [(setting, work)]; a setting that a version does not offer is left out, by name"""
    found = []
    for setting, work in tries:
        try:
            found.append((clock(work, rounds), setting))
        except Exception as e:  # a peer may lack a setting: say so and go on
            print(f"{row}: {setting}: {type(e).__name__}: {str(e)[:120]}", file=sys.stderr)
    if not found:
        return
    seconds, setting = min(found)
    emit(row, per_call / seconds if per_call else seconds, unit, setting, seconds=seconds,
         all={s: (per_call / t if per_call else t) for t, s in found})


# ------------------------------------------------------------------------------------------------ transformers

def load(folder, dtype, **settings):
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **settings).eval()


def implementations(folder, torch, names):
    """(name, model) for each way transformers can run the experts"""
    for experts in names:
        try:
            yield experts, load(folder, torch.bfloat16, attn_implementation="sdpa", experts_implementation=experts)
        except Exception as e:
            print(f"experts_implementation={experts}: {type(e).__name__}: {str(e)[:100]}", file=sys.stderr)


def means_by_hooks(model, torch):
    """The cheapest way to per-expert output means with hooks: recompute the chosen experts from what enters the layer."""
    sums = {}

    def hook(module, args, output):
        x = args[0].reshape(-1, args[0].shape[-1])
        logits = torch.nn.functional.linear(x, module.gate.weight)
        top, ids = logits.softmax(-1).topk(model.config.num_experts_per_tok, -1)
        experts, inner = module.experts, model.config.moe_intermediate_size
        s = sums.setdefault(id(module), torch.zeros(model.config.num_experts, inner, dtype=torch.float64))
        for e in range(model.config.num_experts):
            rows = x[(ids == e).any(-1)]
            gate, up = torch.nn.functional.linear(rows, experts.gate_up_proj[e]).chunk(2, -1)
            s[e] += (torch.nn.functional.silu(gate) * up).double().sum(0)

    return [layer.mlp.register_forward_hook(hook) for layer in model.model.layers]


def prefill(folder, torch):
    ids = torch.randint(2, 8192, (16, 128))
    tries, held = [], []
    for name, model in implementations(folder, torch, ("grouped_mm", "eager")):  # batched_mm copies weights by token
        held.append(model)
        for at_once in (16, 4):
            def work(model=model, at_once=at_once):
                with torch.inference_mode():
                    for i in range(0, 16, at_once):
                        model(ids[i:i + at_once], use_cache=False, logits_to_keep=1)
            tries.append((f"transformers bf16, {name}, {at_once} prompts at once", work))
    best("prefill", "tokens/s", tries, 16 * 128, 3)
    if not held:
        return
    hooks = means_by_hooks(held[0], torch)

    def captured():
        with torch.inference_mode():
            held[0](ids, use_cache=False, logits_to_keep=1)
    best("prefill_captured", "tokens/s", [("transformers bf16, chosen experts recomputed in a hook", captured)], 16 * 128, 3)
    for h in hooks:
        h.remove()


def decode(folder, torch):
    for batch in (1, 16):
        tries = []
        names = ("grouped_mm", "batched_mm", "eager") if batch == 1 else ("grouped_mm", "eager")
        for name, model in implementations(folder, torch, names):
            ids = torch.randint(2, 8192, (batch, 32))

            def work(model=model, ids=ids):
                with torch.inference_mode():
                    out = model(ids, use_cache=True, logits_to_keep=1)
                    start = time.perf_counter()
                    for _ in range(24):
                        token = out.logits[:, -1].argmax(-1, keepdim=True)
                        out = model(token, past_key_values=out.past_key_values, use_cache=True)
                    work.spent.append(time.perf_counter() - start)
            work.spent = []
            tries.append((f"transformers bf16, {name}", work))
        found = []
        for setting, work in tries:
            try:
                for _ in range(4):
                    work()
                found.append((statistics.median(work.spent[1:]), setting))
            except Exception as e:
                print(f"decode: {setting}: {type(e).__name__}: {str(e)[:120]}", file=sys.stderr)
        if found:
            seconds, setting = min(found)
            emit(f"decode_{batch}", batch * 24 / seconds, "tokens/s", setting, all={s: batch * 24 / t for t, s in found})


def demo_sized(folder, torch):
    ids = torch.randint(2, 512, (64, 20))
    tries = []
    for dtype in (torch.float32, torch.bfloat16):
        for experts in ("grouped_mm", "batched_mm", "eager"):
            try:
                model = load(folder, dtype, attn_implementation="sdpa", experts_implementation=experts)
            except Exception as e:
                print(f"demo_sized: {experts}: {str(e)[:100]}", file=sys.stderr)
                continue

            def work(model=model):
                with torch.inference_mode():
                    logits = model(ids, use_cache=False).logits.float()
                    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
                    out = model(ids, use_cache=True, logits_to_keep=1)
                    for _ in range(24):
                        token = out.logits[:, -1].argmax(-1, keepdim=True)
                        out = model(token, past_key_values=out.past_key_values, use_cache=True)
            tries.append((f"transformers {str(dtype)[6:]}, {experts}", work))
    best("demo_sized", "s", tries)


# ------------------------------------------------------------------------------------------------------- torch

def edit(torch):
    w = torch.randn(128, 2048, 768, dtype=torch.float32).mul_(0.02).bfloat16()
    for rank in (1, 3, 8):
        r = torch.linalg.qr(torch.randn(2048, rank))[0].T.contiguous()
        b = r.bfloat16()

        def fused(b=b):
            c = torch.matmul(b, w)
            torch.baddbmm(w, b.T.expand(128, -1, -1), c, alpha=-1, out=w)

        def plain(b=b):
            w.sub_(torch.matmul(b.T, torch.matmul(b, w)))

        def single(r=r):
            for e in range(128):
                x = w[e].float()
                w[e] = (x - r.T @ (r @ x)).bfloat16()
        best(f"edit_rank{rank}", "GB/s", [("torch bf16 arithmetic, baddbmm", fused), ("torch bf16 arithmetic, matmul and sub_", plain),
                                          ("torch f32 arithmetic, one expert at a time", single)], w.numel() * 2 / 1e9, 3)


def route(torch):
    logits = torch.randn(131072, 256) * 1.5

    def whole():
        p = torch.softmax(logits, -1)
        top, ids = torch.topk(p, 8, -1)
        top / top.sum(-1, keepdim=True)

    def chosen():
        top, ids = torch.topk(logits, 8, -1)
        torch.softmax(top, -1)
    best("route", "tokens/s", [("torch softmax, topk, renormalise", whole), ("torch topk, softmax of the chosen", chosen)], 131072)


def moments(torch):
    mid = torch.randn(16384 * 8, 768).bfloat16()
    ids = torch.randint(0, 128, (16384 * 8,))

    def index_add():
        torch.zeros(128, 768).index_add_(0, ids, mid.float())

    def loop():
        out = torch.empty(128, 768)
        for e in range(128):
            out[e] = mid[ids == e].float().sum(0)
    best("moments", "GB/s", [("torch f32 index_add_", index_add), ("torch, one expert at a time", loop)], mid.numel() * 2 / 1e9, 3)


def subspace(torch):
    """48 layers one after the other; the data of one layer serve all, which only helps the caches"""
    n, d = 4096, 2048
    s = 3000 * 0.8 ** torch.arange(32.)
    x = torch.randn(n, d) + (torch.randn(n, 32) / n ** .5 * s) @ (torch.randn(32, d) / d ** .5)
    layers = [x.clone() for _ in range(6)]

    def iteration(rounds):
        for i in range(48):
            a = layers[i % 6]
            q = torch.randn(d, 16)
            for _ in range(rounds):
                q = torch.linalg.qr(a.T @ (a @ q))[0]
            torch.linalg.svd(a @ q, full_matrices=False)

    def lowrank():
        for i in range(48):
            torch.svd_lowrank(layers[i % 6], q=20, niter=6)
    best("subspace_rank8", "s", [("torch subspace iteration, 16 columns, 6 rounds", lambda: iteration(6)), ("torch svd_lowrank, q = 20, 6 rounds", lowrank)],
         rounds=2)


def tokenize(data):
    import tokenizers
    folder = os.path.join(data, "demo")
    t = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    text = open(os.path.join(folder, "prompts", "neutral.txt")).read()
    text *= (1 << 20) // len(text)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    lines = text.splitlines(keepends=True)
    best("tokenize", "MB/s", [("tokenizers, whole text", lambda: t.encode(text, add_special_tokens=False)),
                              ("tokenizers, line by line", lambda: [t.encode(x, add_special_tokens=False) for x in lines])],
         len(text.encode()) / 1e6, 3)


def apply(torch, folder):
    """31 % of the bytes: down_proj and o_proj, by safetensors alone and by transformers"""
    from safetensors import safe_open
    from safetensors.torch import save_file
    r = torch.linalg.qr(torch.randn(2048, 3))[0].T.contiguous()
    out = folder + "-edited"

    def edited(name, x):
        if not name.endswith(("down_proj.weight", "o_proj.weight")):
            return x
        x = x.float()
        return (x - r.T @ (r @ x)).bfloat16()

    def shards():
        shutil.rmtree(out, ignore_errors=True)
        os.mkdir(out)
        for file in sorted(os.listdir(folder)):
            if not file.endswith(".safetensors"):
                shutil.copy(os.path.join(folder, file), out)
                continue
            with safe_open(os.path.join(folder, file), "pt") as f:
                save_file({k: edited(k, f.get_tensor(k)) for k in f.keys()}, os.path.join(out, file), metadata={"format": "pt"})
        os.sync()

    def whole():
        shutil.rmtree(out, ignore_errors=True)
        model = load(folder, torch.bfloat16)
        with torch.no_grad():
            for layer in model.model.layers:
                o = layer.self_attn.o_proj.weight
                o.copy_(edited("o_proj.weight", o))
                w = layer.mlp.experts.down_proj
                for e in range(w.shape[0]):
                    w[e] = edited("down_proj.weight", w[e])
        model.save_pretrained(out)
        os.sync()

    def copy():
        shutil.rmtree(out, ignore_errors=True)
        subprocess.check_call(["cp", "-r", folder, out])
        os.sync()
    best("copy_4gb", "s", [("cp -r and sync", copy)], rounds=2)
    best("apply_4gb", "s", [("safetensors, shard by shard", shards), ("transformers", whole)], rounds=1)
    shutil.rmtree(out, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- main

def main():
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--bench", default=os.path.join(here, "build", "excise_bench"), help="makes the checkpoints")
    p.add_argument("--data", default=os.path.join(here, "tests", "data"))
    p.add_argument("--only", default="", help="comma list of rows")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    a = p.parse_args()
    import torch
    torch.set_num_threads(a.threads)
    import transformers
    transformers.logging.set_verbosity_error()
    print(json.dumps({"row": "machine", "torch": torch.__version__, "transformers": transformers.__version__, "threads": a.threads}))
    tmp = tempfile.mkdtemp(prefix="excise-peers-")

    def make(name):
        folder = os.path.join(tmp, name)
        if not os.path.isdir(folder):
            subprocess.check_call([a.bench, "--make", name, folder])
        return folder
    rows = {
        "edit": lambda: edit(torch), "route": lambda: route(torch), "moments": lambda: moments(torch),
        "subspace": lambda: subspace(torch), "tokenize": lambda: tokenize(a.data),
        "prefill": lambda: prefill(make("random"), torch), "decode": lambda: decode(make("random"), torch),
        "demo_sized": lambda: demo_sized(make("demo"), torch), "apply": lambda: apply(torch, make("large")),
    }
    try:
        for name, work in rows.items():
            if not a.only or name in a.only.split(","):
                work()
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


if __name__ == "__main__":
    main()
