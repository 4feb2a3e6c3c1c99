#!/usr/bin/env python3
"""eager.py - the rows of excise_gpu done by PyTorch in eager mode, on the same GPU.

    build/excise_gpu > rows.jsonl
    python3 bench/eager.py rows.jsonl >> rows.jsonl          (needs torch with CUDA; says so and ends where there is none)

Reads the rows that excise_gpu wrote, and for every one whose work it knows prints a row of the same name and shape, by "torch": the
work as a program without kernels of its own would do it. Where there is more than one way, the fastest counts and `note` names it.
Work that torch has no few-line form of (latent attention, the delta rule, fp4, exact and stochastic rounding) has no such row.
Shares are of the copy and the matmul that excise_gpu measured. --device cpu is for trying the program itself.
"""
import argparse
import json
import math
import re
import statistics
import sys
import time


class Skip(Exception):
    pass


class Run:
    def __init__(self, torch, device, quick):
        self.torch, self.device, self.quick = torch, device, quick

    def randn(self, *shape, dtype=None, scale=1.0):
        return (self.torch.randn(*shape, device=self.device, dtype=self.torch.float32) * scale).to(dtype or self.torch.float32)

    def bf16(self, *shape, scale=1.0):
        """large arrays in slices, so that no f32 copy of all of it is needed"""
        x = self.torch.empty(*shape, device=self.device, dtype=self.torch.bfloat16)
        x.normal_(0, scale)
        return x

    def ints(self, below, *shape, dtype=None):
        return self.torch.randint(0, below, shape, device=self.device, dtype=dtype or self.torch.int64)

    def wait(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def seconds(self, work):
        """of one call: median of 11 batches of 20 ms, as excise_gpu does it"""
        for _ in range(1 if self.quick else 3):
            work()
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        each = time.perf_counter() - start
        calls = 1 if self.quick else int(2e-2 / each) + 1
        times = []
        for _ in range(1 if self.quick else 11):
            start = time.perf_counter()
            for _ in range(calls):
                work()
            self.wait()
            times.append((time.perf_counter() - start) / calls)
        return statistics.median(times)


# --------------------------------------------------------------------------------- each gives {note: function without arguments}

def copy(r, m):
    x = r.bf16(int(float(m["size"]) * {"K": 2 ** 10, "M": 2 ** 20, "G": 2 ** 30}[m["unit"]]) // 2)
    y = r.torch.empty_like(x)
    return {"copy_": lambda: y.copy_(x)}


def peak(r, m):
    n = int(m["n"])
    a, b = r.bf16(n, n), r.bf16(n, n)
    return {"matmul": lambda: a @ b}


def bases(r, rank, width):
    return r.torch.linalg.qr(r.torch.randn(width, rank, device=r.device))[0].T.contiguous()


def without(x, R, inward):
    return x - (x @ R.T) @ R if inward else x - R.T @ (R @ x)


def project(r, m):
    E, rows, cols, k, inward = int(m["E"]), int(m["r"]), int(m["c"]), int(m["k"]), m["side"] is not None
    w = r.bf16(E, rows, cols, scale=0.02)
    R = bases(r, k, cols if inward else rows)
    b = R.bfloat16()

    def narrow():
        if inward:
            r.torch.baddbmm(w, r.torch.matmul(w, b.T), b.expand(E, -1, -1), alpha=-1, out=w)
        else:
            r.torch.baddbmm(w, b.T.expand(E, -1, -1), r.torch.matmul(b, w), alpha=-1, out=w)

    def plain():
        w.sub_(r.torch.matmul(r.torch.matmul(w, b.T), b) if inward else r.torch.matmul(b.T, r.torch.matmul(b, w)))

    def wide():
        for e in range(E):
            w[e] = without(w[e].float(), R, inward).bfloat16()
    if m["norm"]:
        axis = -2 if m["norm"] == "column" and not inward else -1

        def normed():
            for e in range(E):
                x = w[e].float()
                y = without(x, R, inward)
                w[e] = (y * (x.norm(dim=axis, keepdim=True) / y.norm(dim=axis, keepdim=True).clamp_min(1e-30))).bfloat16()
        return {"f32, one expert at a time": normed}
    return {"bf16 baddbmm": narrow, "bf16 matmul and sub_": plain, "f32, one expert at a time": wide}


def project_fp8(r, m):
    """widened to f32, edited, a scale for every block of 128 x 128 anew"""
    E, rows, cols, k, inward = int(m["E"]), int(m["r"]), int(m["c"]), int(m["k"]), m["side"] is not None
    up, across, f8 = -(-rows // 128), -(-cols // 128), r.torch.float8_e4m3fn
    codes = r.torch.empty(E, rows, cols, device=r.device, dtype=f8)
    for e in range(E):
        codes[e] = r.randn(rows, cols).to(f8)
    s, R = r.torch.full((E, up, across), 0.01, device=r.device), bases(r, k, cols if inward else rows)

    def spread(x):
        return x.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]

    def work():
        for e in range(E):
            y = without(codes[e].float() * spread(s[e]), R, inward)
            whole = r.torch.nn.functional.pad(y.abs(), (0, across * 128 - cols, 0, up * 128 - rows))
            s[e] = whole.view(up, 128, across, 128).amax((1, 3)).clamp_min(1e-30) / 448
            codes[e] = (y / spread(s[e])).to(f8)
    return {"f32, one expert at a time, scales anew": work}


def edit_model(r, m):
    L, E, H, I, k = (int(m[x]) for x in ("L", "E", "H", "I", "k"))
    need = 2 * L * E * H * I
    if r.device == "cuda" and need > 0.9 * r.torch.cuda.mem_get_info()[0]:
        raise Skip(f"{need / 1e9:.1f} GB of device memory needed")
    w = [r.bf16(E, H, I, scale=0.02) for _ in range(L)]
    R = [bases(r, k, H).bfloat16() for _ in range(L)]

    def all_layers():
        for x, b in zip(w, R):
            r.torch.baddbmm(x, b.T.expand(E, -1, -1), r.torch.matmul(b, x), alpha=-1, out=x)
    return {"bf16 baddbmm, a call a layer": all_layers}


def matmul(r, m):
    T, n, k = int(m["T"]), int(m["n"]), int(m["k"])
    turns = 1 if r.quick or T > 64 else min(512, (256 << 20) // (2 * n * k) + 1)
    x, w, at = r.bf16(T, k), [r.bf16(n, k, scale=k ** -0.5) for _ in range(turns)], [0]

    def work():
        at[0] = (at[0] + 1) % turns
        return r.torch.nn.functional.linear(x, w[at[0]])
    return {"linear, result in bf16": work}


def norm(r, m):
    T, H = int(m["T"]), int(m["H"])
    x, w = r.randn(T, H), r.randn(H)
    return {"rms_norm, to bf16": lambda: r.torch.nn.functional.rms_norm(x, (H,), w, 1e-6).bfloat16()}


def embed(r, m):
    T, H = int(m["T"]), int(m["H"])
    V = 100 if r.quick else 151936
    table, ids = r.bf16(V, H), r.ints(V, T)
    return {"embedding, to f32": lambda: r.torch.nn.functional.embedding(ids, table).float()}


def rope(r, m):
    T, Q, KV, D = (int(m[x]) for x in ("T", "Q", "KV", "D"))
    F = r.torch.nn.functional
    qkv, wq, wk = r.randn(T, (Q + 2 * KV) * D), r.randn(D), r.randn(D)
    angle = r.randn(T, 1, D // 2)
    cos, sin = angle.cos(), angle.sin()
    keys, values = (r.torch.empty(T, KV, D, device=r.device, dtype=r.torch.bfloat16) for _ in range(2))

    def turn(x):
        a, b = x[..., :D // 2], x[..., D // 2:]
        return r.torch.cat((a * cos - b * sin, b * cos + a * sin), -1).bfloat16()

    def work():
        q, k, v = qkv.split((Q * D, KV * D, KV * D), -1)
        out = turn(F.rms_norm(q.view(T, Q, D), (D,), wq, 1e-6))
        keys.copy_(turn(F.rms_norm(k.view(T, KV, D), (D,), wk, 1e-6)))
        values.copy_(v.view(T, KV, D))
        return out
    return {"rms_norm, cos and sin at hand": work}


def attend(r, m):
    T, Q, KV, D, L = (int(m[x]) for x in ("T", "Q", "KV", "D", "L"))
    each = 1 if m["decode"] else L
    S = T // each
    q, k, v = r.bf16(S, Q, each, D), r.bf16(S, KV, L, D), r.bf16(S, KV, L, D)
    f = r.torch.nn.functional.scaled_dot_product_attention
    wide_k, wide_v = k.repeat_interleave(Q // KV, 1), v.repeat_interleave(Q // KV, 1)
    return {"scaled_dot_product_attention, gqa": lambda: f(q, k, v, is_causal=each > 1, enable_gqa=True),
            "scaled_dot_product_attention, keys and values repeated before": lambda: f(q, wide_k, wide_v, is_causal=each > 1)}


def route(r, m):
    T, E, K = (int(m[x]) for x in ("T", "E", "K"))
    logits, count, gates = r.randn(T, E), r.torch.zeros(E, device=r.device), r.torch.zeros(E, device=r.device, dtype=r.torch.float64)

    def tail(top, ids):
        if m["captured"]:
            count.add_(r.torch.bincount(ids.flatten(), minlength=E))
            gates.index_add_(0, ids.flatten(), top.flatten().double())
        return top, ids

    def whole():
        top, ids = r.torch.softmax(logits, -1).topk(K, -1)
        return tail(top / top.sum(-1, keepdim=True), ids)

    def chosen():
        top, ids = logits.topk(K, -1)
        return tail(top.softmax(-1), ids)
    return {"softmax, topk, renormalise": whole, "topk, softmax of the chosen": chosen}


def permute(r, m):
    T, E, K = (int(m[x]) for x in ("T", "E", "K"))
    ids = r.ints(E, T * K)

    def work():
        order = r.torch.argsort(ids, stable=True)
        back = r.torch.empty_like(order)
        back[order] = r.torch.arange(T * K, device=r.device)
        return back, r.torch.bincount(ids, minlength=E).cumsum(0)
    return {"stable argsort, bincount": work}


def grouped(r, m):
    T, E, K, n, k = (int(m[x]) for x in ("T", "E", "K", "n", "k"))
    first = m["row"] == "glu"
    ids = r.ints(E, T * K).sort()[0]
    ends = r.torch.bincount(ids, minlength=E).cumsum(0)
    x = r.bf16(T * K, k)
    w = [r.bf16(E, n, k, scale=k ** -0.5) for _ in range(2 if first else 1)]
    F = r.torch.nn.functional
    sums = r.torch.zeros(E, n, device=r.device, dtype=r.torch.float64)

    def tail(y):
        if m["captured"]:
            sums.index_add_(0, ids, y.double())
        return y

    def together():
        y = [r.torch._grouped_mm(x, a.transpose(1, 2), offs=ends.to(r.torch.int32)) for a in w]
        return tail(F.silu(y[0]) * y[1] if first else y[0].float())

    def loop():
        out, begin = [], 0
        for e, end in enumerate(ends.tolist()):
            y = [F.linear(x[begin:end], a[e]) for a in w]
            out.append(F.silu(y[0]) * y[1] if first else y[0].float())
            begin = end
        return tail(r.torch.cat(out))
    return {"_grouped_mm, rows in order": together, "one expert at a time, rows in order": loop}


def combine(r, m):
    T, K, H = (int(m[x]) for x in ("T", "K", "H"))
    y, h, w, at = r.randn(T * K, H), r.randn(T, H), r.randn(T, K), r.torch.randperm(T * K, device=r.device)
    return {"index, multiply, sum": lambda: h.add_((y[at].view(T, K, H) * w[..., None]).sum(1))}


def lens(r, m):
    T, H = int(m["T"]), int(m["H"])
    h, B = r.randn(T, H), bases(r, 3, H)
    return {"two matmuls": lambda: h.sub_((h @ B.T) @ B)}


def gather(r, m):
    T, K, H = (int(m[x]) for x in ("T", "K", "H"))
    x, at = r.bf16(T, H), r.torch.randperm(T * K, device=r.device) // K
    return {"index_select": lambda: x.index_select(0, at)}


def moments(r, m):
    T, K, I = (int(m[x]) for x in ("T", "K", "I"))
    mid, ids, E = r.bf16(T * K, I), r.ints(128, T * K), 128
    gates, total = r.randn(T * K), r.torch.zeros(E, device=r.device, dtype=r.torch.float64)
    sums = r.torch.zeros(E, I, device=r.device)

    def work():
        total.index_add_(0, ids, gates.double())
        sums.index_add_(0, ids, mid.float())
        return r.torch.bincount(ids, minlength=E)
    return {"f32 index_add_": work}


def sample(r, m):
    n, V = int(m["n"]), int(m["V"])
    logits = r.randn(n, V, scale=2)
    if m["greedy"]:
        return {"argmax": lambda: logits.argmax(-1)}

    def nucleus():
        p, ids = (logits / 0.7).softmax(-1).sort(-1, descending=True)
        p[p.cumsum(-1) - p >= 0.9] = 0
        return ids.gather(-1, p.multinomial(1))
    return {"softmax, sort, cumsum, multinomial": nucleus}


def compare(r, m):
    n, V = int(m["n"]), int(m["V"])
    p, q = r.randn(n, V, scale=2), r.randn(n, V, scale=2)

    def work():
        a, b = p.log_softmax(-1), q.log_softmax(-1)
        return (a.exp() * (a - b)).sum(-1), p.argmax(-1) == q.argmax(-1)
    return {"log_softmax twice": work}


def contrast(r, m):
    P, E, n = (int(m[x]) for x in ("P", "E", "n"))
    counts = [r.ints(40, P, E).double() for _ in range(2)]

    def work():
        logs = []
        for c in counts:
            draws = r.torch.randint(0, P, (n, P), device=r.device)
            times = r.torch.zeros(n, P, device=r.device, dtype=r.torch.float64).scatter_add_(1, draws, r.torch.ones_like(draws, dtype=r.torch.float64))
            sums = times @ c
            logs.append(((sums + 0.5) / (sums.sum(-1, keepdim=True) + 0.5 * E)).log())
        return (logs[0] - logs[1]).std(0)
    return {"multiplicities times counts, f64": work}


def matvec(r, m):
    rows, n, k = (int(m[x]) for x in ("rows", "n", "k"))
    w, x = r.bf16(n, k), r.randn(rows, k).double()
    return {"w.double()": lambda: x @ w.double().T}


def samples_of(r, m):
    return r.randn(int(m["L"]), int(m["n"]), int(m["d"]))


def gram(r, m):
    x = samples_of(r, m)

    def work():
        wide = x.double()
        return wide @ wide.transpose(1, 2)
    return {"f64 matmul": work}


def subspace(r, m):
    x, k = samples_of(r, m), int(m["k"])

    def eigen():
        wide = x.double()
        values, vectors = r.torch.linalg.eigh(wide @ wide.transpose(1, 2))
        return (vectors[..., -k:].transpose(1, 2) @ wide) / values[..., -k:, None].sqrt()
    return {"f64 Gram and eigh": eigen, "svd_lowrank": lambda: r.torch.svd_lowrank(x, q=k + 12, niter=6)}


def convert(r, m):
    n, k = int(m["n"]), int(m["k"])
    x = r.bf16(n, k)
    if m["widens"]:
        return {"float and isfinite": lambda: (x.float(), x.isfinite().all())}
    y = x.float()
    return {"bfloat16": lambda: y.bfloat16()}


def view(r, m):
    x = r.bf16(int(m["k"]), int(m["n"]))
    return {"contiguous": lambda: x.T.contiguous()}


def noise(r, m):
    x = r.torch.empty(int(m["n"]), int(m["k"]), device=r.device, dtype=r.torch.bfloat16)
    return {"uniform_": lambda: x.uniform_(-1, 1)}


def scale(r, m):
    x, f = r.bf16(int(m["E"]), int(m["n"])), r.randn(int(m["E"]), 1).bfloat16()
    return {"mul_": lambda: x.mul_(f)}


def widen(r, m):
    n, k = int(m["n"]), int(m["k"])
    rows, cols = -(-n // 128), -(-k // 128)
    codes, s = r.randn(n, k).to(r.torch.float8_e4m3fn), r.randn(rows, cols)

    def work():
        wide = s.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        return (codes.float() * wide).bfloat16()
    return {"float, scales repeated": work}


def conv(r, m):
    S, each, C = (int(m[x]) for x in ("S", "each", "C"))
    x, w = r.randn(S, C, each + 3), r.randn(C, 1, 4)
    F = r.torch.nn.functional
    return {"conv1d of each channel, silu": lambda: F.silu(F.conv1d(x, w, groups=C))}


def gate(r, m):
    T, h, d = (int(m[x]) for x in ("T", "h", "d"))
    x, g, w = r.randn(T, h, d), r.randn(T, h, d), r.randn(d)
    F = r.torch.nn.functional
    return {"rms_norm, silu": lambda: (F.rms_norm(x, (d,), w, 1e-6) * F.silu(g)).bfloat16()}


DECODE = r"(?P<decode>decode )?T=(?P<T>\d+) "
EXPERTS = r"E=(?P<E>\d+) K=(?P<K>\d+) (?P<n>\d+)x(?P<k>\d+) bf16(?P<captured> captured)?"
MATRIX = r"(?P<n>\d+)x(?P<k>\d+) "
FORMS = [  # row, what its shape must look like, work
    ("copy", r"(?P<size>\S+) (?P<unit>.)iB", copy),
    ("peak", r"(?P<n>\d+) x .*", peak),
    ("project", r"\S+ (?P<E>\d+)x(?P<r>\d+)x(?P<c>\d+) bf16 k=(?P<k>\d+)( (?P<norm>row|column) norms)?(?P<side> \[E,I,H\])?", project),
    ("project", r"\S+ (?P<E>\d+)x(?P<r>\d+)x(?P<c>\d+) fp8 k=(?P<k>\d+)(?P<side> \[E,I,H\])?", project_fp8),
    ("edit_model", r"(?P<L>\d+)x(?P<E>\d+) \[(?P<H>\d+),(?P<I>\d+)\] bf16 k=(?P<k>\d+)", edit_model),
    ("matmul", DECODE + r".*?(?P<n>\d+)x(?P<k>\d+) bf16", matmul),
    ("norm", DECODE + r"H=(?P<H>\d+)", norm),
    ("embed", DECODE + r"H=(?P<H>\d+) bf16", embed),
    ("rope", DECODE + r"(?P<Q>\d+)\+(?P<KV>\d+) heads of (?P<D>\d+)", rope),
    ("attend", DECODE + r"(?P<Q>\d+)\+(?P<KV>\d+) heads of (?P<D>\d+), (?P<L>\d+) keys", attend),
    ("route", DECODE + r"E=(?P<E>\d+) K=(?P<K>\d+)(?P<captured> captured)?", route),
    ("permute", DECODE + r"E=(?P<E>\d+) K=(?P<K>\d+)", permute),
    ("glu", DECODE + EXPERTS, grouped),
    ("down", DECODE + EXPERTS, grouped),
    ("combine", DECODE + r"K=(?P<K>\d+) H=(?P<H>\d+)", combine),
    ("lens", DECODE + r"H=(?P<H>\d+) rank 3", lens),
    ("gather", DECODE + r"K=(?P<K>\d+) H=(?P<H>\d+) bf16.*", gather),
    ("moments", DECODE + r"K=(?P<K>\d+) I=(?P<I>\d+) bf16", moments),
    ("sample", r"(?P<n>\d+)x(?P<V>\d+) f32 (?P<greedy>greedy)?.*", sample),
    ("compare", r"(?P<n>\d+)x(?P<V>\d+) f32", compare),
    ("contrast", r"2x(?P<P>\d+) prompts, E=(?P<E>\d+), (?P<n>\d+) resamples", contrast),
    ("matvec", r"(?P<rows>\d+) f64 rows, (?P<n>\d+)x(?P<k>\d+) bf16", matvec),
    ("gram", r"(?P<L>\d+) layers of (?P<n>\d+)x(?P<d>\d+) .*", gram),
    ("subspace", r"(?P<L>\d+) layers of (?P<n>\d+)x(?P<d>\d+) f32 k=(?P<k>\d+)", subspace),
    ("convert", MATRIX + r"(?P<widens>bf16 to f32)?.*", convert),
    ("view", MATRIX + r"bf16 transposed", view),
    ("noise", MATRIX + r"bf16", noise),
    ("scale", r"(?P<E>\d+)x(?P<n>\d+) bf16 in place", scale),
    ("widen", MATRIX + r"fp8 to bf16", widen),
    ("conv", r"(decode )?(?P<S>\d+)x(?P<each>\d+), (?P<C>\d+) channels, 4 taps", conv),
    ("gate", DECODE + r"(?P<h>\d+) heads of (?P<d>\d+), normed", gate),
]


def emit(row, seconds, note, best, gpu, quick):
    """with the bytes and FLOP that excise_gpu counts: from its own figures of the row"""
    out = {"row": row["row"], "shape": row["shape"], "by": "torch", "us": round(seconds * 1e6, 3)}
    for rate, share, unit in (("gb_s", "of_copy", 1e9), ("tflop_s", "of_peak", 1e12)):
        if row.get(rate):
            work = row[rate] * unit * row["us"] * 1e-6
            out[rate] = round(work / seconds / unit, 3)
            if best[share]:
                out[share] = round(work / seconds / best[share], 4)
    out.update(note=note, gpu=gpu, quick=quick)
    print(json.dumps(out, separators=(",", ":")), flush=True)
    print(f"{row['row']:<18} {row['shape']:<58} torch     {seconds * 1e6:11.1f} us  {note}", file=sys.stderr)


def skipped(row, why, gpu, quick):
    print(json.dumps({"row": row["row"], "shape": row["shape"], "by": "torch", "skipped": why, "gpu": gpu, "quick": quick}, separators=(",", ":")), flush=True)
    print(f"{row['row']:<18} {row['shape']:<58} torch     skipped: {why}", file=sys.stderr)


def measure(r, row, best, limit):
    for name, pattern, work in FORMS:
        m = re.fullmatch(pattern, row["shape"]) if name == row["row"] else None
        if not m:
            continue
        found = []
        fields = dict(m.groupdict(), row=name)
        try:
            with r.torch.inference_mode():
                for note, fn in work(r, fields).items():
                    try:
                        found.append((r.seconds(fn), note))
                    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as e:  # a version may lack a way
                        print(f"{name}: {note}: {type(e).__name__}: {str(e)[:100]}", file=sys.stderr)
                    if time.monotonic() > limit:
                        break
        except Skip as e:
            return skipped(row, str(e), row["gpu"], row["quick"])
        except r.torch.cuda.OutOfMemoryError:
            return skipped(row, "out of memory", row["gpu"], row["quick"])
        if r.device == "cuda":
            r.torch.cuda.empty_cache()
        if not found:
            return skipped(row, "this torch has no way to do it", row["gpu"], row["quick"])
        seconds, note = min(found)
        return emit(row, seconds, note, best, row["gpu"], row["quick"])


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("rows", help="what excise_gpu wrote")
    p.add_argument("--only", default="", help="comma list of row names")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--seconds", type=float, default=math.inf, help="begins no row after so long")
    a = p.parse_args()
    rows = [json.loads(line) for line in open(a.rows) if line.startswith("{")]
    try:
        import torch
    except ImportError:
        torch = None
    if not torch or (a.device == "cuda" and not torch.cuda.is_available()):
        why = "no torch with CUDA"
        print(json.dumps({"row": "torch", "shape": "", "by": "torch", "skipped": why}, separators=(",", ":")))
        print(f"torch: skipped: {why}", file=sys.stderr)
        return
    best = {"of_copy": 0, "of_peak": 0}
    for row in rows:
        if row["row"] == "copy":
            best["of_copy"] = max(best["of_copy"], row["gb_s"] * 1e9)
        if row["row"] == "peak" and "tflop_s" in row:
            best["of_peak"] = row["tflop_s"] * 1e12
    r, limit, seen = Run(torch, a.device, any(x.get("quick") for x in rows)), time.monotonic() + a.seconds, set()
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name() if a.device == 'cuda' else 'the CPU'}", file=sys.stderr)
    for row in rows:
        key = (row["row"], row["shape"])
        if "us" not in row or row["by"] == "torch" or key in seen or (a.only and row["row"] not in a.only.split(",")):
            continue
        seen.add(key)
        if time.monotonic() > limit:
            skipped(row, "no time left", row["gpu"], row["quick"])
            continue
        measure(r, row, best, limit)


if __name__ == "__main__":
    main()
