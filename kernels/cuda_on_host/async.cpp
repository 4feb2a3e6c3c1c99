/* async.cpp - what CUDA threads set going and wait for later: copies, bulk copies with their gates, products of four
 * warps. All of it is done as late as allowed, so that what does not wait sees it (bulk.h, wgmma.h, tensor.h say what is
 * checked). Like fibers.cpp, this file must not be instrumented. */
#include "async.h"
#include "tensor.h"

namespace hc {
void cp_async(void *d, const void *src, int n) {
    if (((uintptr_t)d | (uintptr_t)(n ? src : d)) % 16) fail("cp.async: an address is not 16-byte aligned");
    if (n < 0 || n > 16) fail("cp.async: %d of 16 bytes", n);
    pending().copies.push_back({d, src, n, pending().groups});
}
void cp_async_commit() { pending().groups++; }
void cp_async_wait(int open) {
    Pending *f = &pending();
    size_t left = 0;
    for (auto &c : f->copies) {
        if (c.group >= f->groups - open) {
            f->copies[left++] = c;
            continue;
        }
        if (c.n) memcpy(c.d, c.s, (size_t)c.n);
        f->plain = true;
        if (c.n < 16) memset((char *)c.d + c.n, 0, (size_t)(16 - c.n));
    }
    f->copies.resize(left);
}
// ---------------------------------------------------------------- products of four warps
// element k of row r of an operand, as the hardware finds it
HC_NOTSAN static float operand(const Block &blk, uint64_t descriptor, int r, int k) {
    const uint64_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    uint64_t at = start + (uint64_t)(r / 8) * stride + (uint64_t)(r % 8) * 128 + (uint64_t)k * 2;
    at ^= at >> 3 & 0x70;
    if (at + 2 > blk.dsmem_bytes) fail("wgmma: an operand lies outside of dynamic shared memory");
    unsigned short half;
    memcpy(&half, (const char *)blk.dsmem + at, sizeof half);
    return bf_half(half, 0);
}
HC_NOTSAN static void group_run(unsigned m, const void *const *in, void *const *out, const int *warp) {
    if (m != 0xffffffffu) fail("wgmma needs all 32 lanes (mask %08x)", m);
    const Product &one = *(const Product *)in[0];
    const Block &blk = *(const Block *)out[0];
    float a[16][16], b[16], d[16];
    HC_LANES(l, m) {
        const Product &x = *(const Product *)in[l];
        if (x.a != one.a || x.b != one.b || x.n != one.n) fail("wgmma: lanes differ in their operands");
    }
    for (int r = 0; r < 16; r++)
        for (int k = 0; k < 16; k++) a[r][k] = operand(blk, one.a, warp[0] * 16 + r, k);
    for (int c = 0; c < one.n; c++) {
        float *to[16];
        for (int r = 0; r < 16; r++) {
            to[r] = ((const Product *)in[r % 8 * 4 + c % 8 / 2])->d + c / 8 * 4 + r / 8 * 2 + c % 2;
            d[r] = *to[r];
        }
        for (int k = 0; k < 16; k++) b[k] = operand(blk, one.b, c, k);
        for (int r = 0; r < 16; r++) {
            for (int k = 0; k < 16; k++) d[r] += a[r][k] * b[k];
            *to[r] = d[r];
        }
    }
}
void group_fence() { pending().ordered = true; }
void group_multiply(float *d, uint64_t a, uint64_t b, int n) {
    Pending *f = &pending();
    if (!f->ordered) fail("wgmma: no fence since registers were touched");
    if (f->plain) fail("wgmma: no fence between writing operands and their product");
    for (uint64_t x : {a, b})
        if (x >> 62 != 1 || (x >> 49 & 7)) fail("wgmma: descriptor %016llx: not the 128-byte swizzle from its base", (unsigned long long)x);
    f->products.push_back({a, b, d, n, f->product_groups});
}
void group_commit() { pending().product_groups++; }
void group_wait(int open, Site s) {
    Pending *f = &pending();
    size_t done = 0;
    for (Product &x : f->products) {
        if (x.group >= f->product_groups - open) break;
        collective(~0u, group_run, &x, cur->blk, (int)(cur->warp % 4), false, s);
        done++;
    }
    f->products.erase(f->products.begin(), f->products.begin() + (long)done);
    f->ordered = false;
}

// ---------------------------------------------------------------- gates and bulk copies
static Gate *gate_of(unsigned long long *word) {
    if (!gates().known.count(*word)) fail("this gate was not made by gate_init");
    Gate *g = (Gate *)(uintptr_t)*word;
    if (!g->block) fail("a gate in the shared memory of a block that has ended");
    return g;
}
static bool complete(const Gate &g) { return g.left == 0 && g.under_way == g.announced; }
// the phase ends: bytes land
static void finish_phase(Gate &g) {
    for (Move &x : g.moves) memcpy(x.d, x.s ? x.s : &x.value, x.n);
    g.moves.clear();
    g.announced = g.under_way = 0;
    g.left = g.arrivals;
    g.phase++;
}
void gate_init(unsigned long long *word, int arrivals) {
    if (arrivals < 1) fail("a gate for %d arrivals", arrivals);
    Gates &all = gates();
    std::lock_guard<std::mutex> k(all.m);
    all.all.push_back(Gate{&block(), arrivals, arrivals, 0, 0, 0, {}, 0});
    *word = (unsigned long long)(uintptr_t)&all.all.back();
    all.known.insert(*word);
}
void gate_expect(unsigned long long *word, unsigned bytes) {
    Gates &all = gates();
    std::lock_guard<std::mutex> k(all.m);
    Gate *g = gate_of(word);
    if (complete(*g)) finish_phase(*g);
    if (!g->left) fail("more arrivals at a gate than the %d it was made for", g->arrivals);
    REL(&g->tok);
    g->left--;
    g->announced += bytes;
    if (!g->left && g->under_way > g->announced)
        fail("%llu bytes come to a gate that was told of %llu", g->under_way, g->announced);
    all.happened();
}
// no bulk store may be going to read what a load will write
static void must_be_read(Pending &p, const void *arg) {
    const Move &m = *static_cast<const Move *>(arg);
    for (Store &x : p.stores)
        if (x.read.empty() && (char *)m.d < (const char *)x.s + x.n && (const char *)x.s < (char *)m.d + m.n)
            fail("bulk load over what a bulk store may not have read yet");
}
void gate_bring(unsigned long long *word, void *to, const void *from, unsigned bytes, bool bulk) {
    if (bulk && ((uintptr_t)to | (uintptr_t)from | bytes) % 16)
        fail("bulk load: an address or the size, %u, is no multiple of 16", bytes);
    if (!bytes) fail("a bulk copy of nothing");
    const Move m = {to, bulk ? from : nullptr, bytes, bulk ? 0.0f : *static_cast<const float *>(from)};
    if (bulk) each_pending(must_be_read, &m);
    Gates &all = gates();
    std::lock_guard<std::mutex> k(all.m);
    Gate *g = gate_of(word);
    if (complete(*g)) finish_phase(*g);
    REL(&g->tok);
    g->moves.push_back(m);
    g->under_way += bytes;
    if (!g->left && g->under_way > g->announced)
        fail("%llu bytes come to a gate that was told of %llu", g->under_way, g->announced);
    all.happened();
}
void gate_wait(unsigned long long *word, unsigned parity, Site s) {
    Gates &all = gates();
    for (;;) {
        {
            std::lock_guard<std::mutex> k(all.m);
            Gate *g = gate_of(word);
            if (g->block != &block()) fail("%s:%d: only its own block may wait at a gate", s.file, s.line);
            if ((g->phase & 1) == (parity & 1) && complete(*g)) {
                ACQ(&g->tok);
                finish_phase(*g);
                REL(&g->tok);
                all.happened();
            }
            if ((g->phase & 1) != (parity & 1)) {
                ACQ(&g->tok);
                return;
            }
        }
        sleep_at_gate(s);
    }
}
void bulk_store(void *global, const void *shared, unsigned bytes) {
    Pending *f = &pending();
    if (((uintptr_t)global | (uintptr_t)shared | bytes) % 16)
        fail("bulk store: an address or the size, %u, is no multiple of 16", bytes);
    if (!f->fenced) fail("bulk store: no fence after what was written before");
    f->stores.push_back({global, shared, bytes, f->store_groups, {}});
}
void bulk_fence() {
    pending().fenced = true;
    pending().plain = false;
}
void bulk_commit() {
    pending().store_groups++;
    pending().fenced = false;
}
void bulk_wait(int open, bool read_only) {
    Pending *f = &pending();
    size_t left = 0;
    for (size_t i = 0; i < f->stores.size(); i++) {
        Store &x = f->stores[i];
        const bool due = x.group < f->store_groups - open;
        if (due && x.read.empty()) x.read.assign((const char *)x.s, (const char *)x.s + x.n);
        if (due && !read_only)
            memcpy(x.d, x.read.data(), x.n);
        else if (left++ != i)
            f->stores[left - 1] = std::move(x);
    }
    f->stores.resize(left);
}

// ---------------------------------------------------------------- ends
void end_thread(Pending &p) {
    for (Store &x : p.stores) {
        if (x.read.empty()) fail("a thread ends, but its bulk stores may not have been read");
        memcpy(x.d, x.read.data(), x.n);
    }
    if (!p.products.empty()) fail("a thread ends, but its products were not waited for");
    p.stores.clear();
    p.fenced = p.ordered = p.plain = false;
}
void end_block(Gates &g, const void *block_ended) {
    std::lock_guard<std::mutex> k(g.m);
    for (Gate &x : g.all) {
        if (x.block != block_ended) continue;
        if (!x.moves.empty() && (x.left || x.under_way != x.announced))
            fail("a block ends with %llu bytes on the way to its shared memory", x.under_way);
        x.block = nullptr;
    }
}
void describe_gates(Gates &g, Site s) {
    for (Gate &x : g.all)
        if (x.block && (x.left != x.arrivals || x.announced || x.under_way))
            fprintf(stderr, "hc: a gate waits for %d of %d arrivals; %llu bytes were announced, %llu are there\n",
                    x.left, x.arrivals, x.announced, x.under_way);
    fail("%s:%d: threads wait at gates for what nobody sends", s.file, s.line);
}
} // namespace hc
