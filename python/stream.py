"""stream.py - the [stream] calls of libexcise from Python, by ctypes alone: torch (or CuPy) tensors in place, no copies.

    from stream import Excise
    excise = Excise("/usr/lib/libexcise.so", stream=torch.cuda.current_stream().cuda_stream)   # tensors on cuda:0
    excise.route(logits, ids, weights, T, E, 8, renorm=True)
    excise.observe(ids, weights, mid, T, E, 8, I, count, gate_sum, mid_sum)
    excise.edit_experts(down_proj, basis, strength, E, H, I, rank)   # [E,H,I] bf16|f16|f32, in place
    excise.project_output(y, basis, T, H, rank, 0.5)

Everything is enqueued on the stream that was given and returns at once, so it can sit between torch's own kernels or inside a CUDA
graph. Without a stream it is the CPU backend and CPU tensors. Run as a program it does a small edit and checks it: with torch
where it is installed (on the GPU where there is one), else with plain ctypes arrays.
"""
import ctypes as C
import sys

F32, BF16, F16 = 0, 1, 2  # exc_dtype


class Options(C.Structure):  # exc_ctx_options
    _fields_ = [("size", C.c_size_t), ("backend", C.c_char_p), ("threads", C.c_int), ("reproducible", C.c_int), ("on_event", C.c_void_p),
                ("user", C.c_void_p), ("ranks", C.c_char_p), ("device", C.c_int), ("stream", C.c_void_p), ("work_bytes", C.c_size_t)]


class Gate(C.Structure):  # exc_gate
    _fields_ = [("size", C.c_size_t), ("score", C.c_int), ("renorm", C.c_int), ("renorm_eps", C.c_float), ("scale", C.c_float),
                ("groups", C.c_int), ("groups_kept", C.c_int)]


def pointer(x):
    """Address of a tensor's data: torch, CuPy, or a ctypes array. Tensors must be contiguous."""
    if x is None:
        return None
    if hasattr(x, "data_ptr"):
        if not x.is_contiguous():
            raise ValueError("expected a contiguous tensor")
        return C.c_void_p(x.data_ptr())
    if hasattr(x, "__cuda_array_interface__"):
        return C.c_void_p(x.__cuda_array_interface__["data"][0])
    return C.cast(x, C.c_void_p)


def dtype(x):
    name = str(getattr(x, "dtype", "float32"))
    for end, code in (("bfloat16", BF16), ("float16", F16), ("float32", F32)):
        if name.endswith(end):
            return code
    raise TypeError(f"expected bfloat16, float16 or float32, found {name}")


class Excise:
    def __init__(self, library="libexcise.so", stream=None, device=0, reproducible=False, work_bytes=0):
        self.lib = C.CDLL(library)
        self.lib.exc_ctx_error.restype = C.c_char_p
        self.lib.exc_ctx_error.argtypes = [C.c_void_p]
        self.lib.exc_ctx_free.argtypes = [C.c_void_p]
        gpu = stream is not None
        options = Options(C.sizeof(Options), b"cuda" if gpu else b"cpu", 0, int(reproducible), None, None, None, device,
                          C.c_void_p(stream) if gpu else None, work_bytes)
        self.ctx = C.c_void_p()
        self._ok(self.lib.exc_ctx_create(C.byref(options), C.byref(self.ctx)))

    def _ok(self, status):
        if status:
            raise RuntimeError(self.lib.exc_ctx_error(self.ctx).decode())

    def __del__(self):
        if getattr(self, "ctx", None):
            self.lib.exc_ctx_free(self.ctx)

    def route(self, logits, ids, weights, tokens, experts, top_k, bias=None, score=0, renorm=False, scale=0.0, groups=0, groups_kept=0):
        """logits f32 [T,E] -> ids i32 [T,K], weights f32 [T,K], both given."""
        gate = Gate(C.sizeof(Gate), score, int(renorm), 0.0, scale, groups, groups_kept)
        self._ok(self.lib.exc_route(self.ctx, C.byref(gate), pointer(logits), pointer(bias), C.c_int64(tokens), C.c_int64(experts),
                                    C.c_int64(top_k), pointer(ids), pointer(weights)))

    def observe(self, ids, weights, mid, tokens, experts, top_k, intermediate, count=None, gate_sum=None, mid_sum=None):
        """Adds to count i64 [E], gate_sum f64 [E], mid_sum f64 [E,I] what ids [T,K], weights [T,K], mid [T,K,I] did."""
        self._ok(self.lib.exc_observe(self.ctx, pointer(ids), pointer(weights), pointer(mid), dtype(mid) if mid is not None else F32,
                                      C.c_int64(tokens), C.c_int64(experts), C.c_int64(top_k), C.c_int64(intermediate), pointer(count),
                                      pointer(gate_sum), pointer(mid_sum)))

    def edit_experts(self, w, basis, strength, experts, hidden, inner, rank):
        """W [E,H,I] <- W - strength R (R^T W) in place; basis f32 [R,H] with orthonormal rows, strength f32 [E]."""
        self._ok(self.lib.exc_edit_experts(self.ctx, pointer(w), dtype(w), C.c_int64(experts), C.c_int64(hidden), C.c_int64(inner),
                                           pointer(basis), C.c_int64(rank), pointer(strength), 0, None))

    def project_output(self, y, basis, tokens, hidden, rank, strength):
        """y f32 [T,H] <- y - strength R^T (R y)."""
        self._ok(self.lib.exc_project_output(self.ctx, pointer(y), C.c_int64(tokens), C.c_int64(hidden), pointer(basis), C.c_int64(rank),
                                             C.c_float(strength)))


def with_torch(library):
    import torch
    gpu = torch.cuda.is_available()
    where = "cuda" if gpu else "cpu"
    T, E, K, H, I = 64, 16, 4, 128, 48
    torch.manual_seed(1)
    logits, w = torch.randn(T, E, device=where), torch.randn(E, H, I, device=where)
    basis = torch.linalg.qr(torch.randn(H, 2, device=where))[0].T.contiguous()
    ids, weights = torch.empty(T, K, dtype=torch.int32, device=where), torch.empty(T, K, device=where)
    strength = torch.ones(E, device=where)
    strength[3] = 0
    before = w.clone()
    excise = Excise(library, torch.cuda.current_stream().cuda_stream if gpu else None)
    excise.route(logits, ids, weights, T, E, K)
    excise.edit_experts(w, basis, strength, E, H, I, 2)
    want = torch.topk(torch.softmax(logits, -1), K)
    assert torch.equal(ids.long(), want.indices) and torch.allclose(weights, want.values, rtol=1e-5)
    edited = before - strength[:, None, None] * (basis.T @ (basis @ before))
    assert torch.allclose(w, edited, atol=1e-5) and torch.equal(w[3], before[3])
    return f"torch on {where}"


def with_arrays(library):
    H, I = 4, 3
    w = (C.c_float * (H * I))(*range(1, H * I + 1))
    basis = (C.c_float * H)(0, 1, 0, 0)
    Excise(library).edit_experts(w, basis, (C.c_float * 1)(1), 1, H, I, 1)
    assert list(w) == [1, 2, 3, 0, 0, 0, 7, 8, 9, 10, 11, 12]
    return "ctypes arrays"


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else "libexcise.so"
    try:
        print("ok:", with_torch(path))
    except ImportError:
        print("ok:", with_arrays(path))
