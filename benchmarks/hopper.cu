// The exact branch's forward for Hopper (sm_90a): bf16, heads of 128 channels, four query heads a key head, blocks of 16 in a
// window of 64, up to 16 sinks and 128 slots. An experiment: docs/performance.md says what it taught, nothing uses it.
//
// A warp group takes one block of 16 queries in all four heads, 64 rows: which keys they see is then a matter of columns,
// but for the block itself. A program walks along the tiles of one KV head. A fourth group loads: holders stay where
// they are in shared memory while they hold their place, so that only those that changed are read again.
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64;
#include "wgmma.inc"
#define DI __device__ __forceinline__
constexpr int TILE = 64, BLOCK = 16, SP = 16, HOLD = 128, NA = SP + HOLD, N1 = 80, N2 = 64, NW = 80, KEYS = NA + 128;
constexpr int HROWS = NA, WROWS = 128, HHALF = HROWS * 128, WHALF = WROWS * 128, QHALF = 64 * 128, GROUPS = 3;
constexpr int OFF_HK = 0, OFF_HV = 2 * HHALF, OFF_WK = 4 * HHALF, OFF_WV = OFF_WK + 4 * WHALF, OFF_Q = OFF_WV + 2 * WHALF;
constexpr int OFF_U = OFF_Q + GROUPS * 16384, OFF_I = OFF_U + 2 * KEYS * 4, OFF_B = OFF_I + 2 * HROWS * 4, SMEM = OFF_B + 256;
constexpr int UF = 0, KWF = 16, VWF = 32, KHF = 40, VHF = 48, KWE = 56, VWE = 72, KHE = 80, VHE = 88;  // two by item: UF, KWF, KWE
static_assert(HHALF % 1024 == 0 && SMEM <= 232448);
struct Place { int row, tile; };
struct P {
  const char *Q, *K, *V; const int *Table, *Death, *Bounds; char* Out; float* Lse;
  int64 sqb, sqh, sqt, skb, skh, skt, svb, svh, svt;
  int W, X, front, n, kv_heads, width, sinks, items; float unit;
};
DI uint32_t smem_u32(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
DI void bar_init(uint32_t b, int n) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(b), "r"(n)); }
DI void bar_arrive(uint32_t b) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(b) : "memory"); }
DI void bar_copies(uint32_t b) { asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(b) : "memory"); }
DI void bar_wait(uint32_t b, int parity) {
  asm volatile("{ .reg .pred p; W: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @p bra D; bra W; D: }" ::"r"(b), "r"(parity) : "memory");
}
DI void copy16(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DI void sync_group(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }
DI void wg_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DI void wg_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> DI void wg_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// a matrix of rows of 128 bytes, swizzled, at `at`: groups of 8 rows 1024 bytes apart; columns beyond 64 `lead` bytes further
DI uint64_t desc(uint32_t at, int lead) { return (uint64_t)(at >> 4) | ((uint64_t)(lead >> 4) << 16) | (64ull << 32) | (1ull << 62); }
DI uint64_t ahead(uint64_t d, int bytes) {
  uint32_t lo, hi; uint64_t y;
  asm("mov.b64 {%0, %1}, %2;" : "=r"(lo), "=r"(hi) : "l"(d));
  asm("mov.b64 %0, {%1, %2};" : "=l"(y) : "r"(lo + (bytes >> 4)), "r"(hi));
  return y;
}
DI float ex2(float x) { float y; asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DI uint32_t pack(float lo, float hi) { uint32_t y; asm volatile("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo)); return y; }
template <int R> DI void fence_regs(float (&d)[R]) {
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N, int HALF> DI void scores(float (&s)[N / 2], uint64_t q, uint64_t keys) {
  wg_fence();
#pragma unroll
  for (int k = 0; k < 8; k++) {
    uint64_t a = ahead(q, (k / 4) * QHALF + (k % 4) * 32), b = ahead(keys, (k / 4) * HALF + (k % 4) * 32);
    if constexpr (N == 48) wgmma_ss_n48(s, a, b, k > 0);
    if constexpr (N == 64) wgmma_ss_n64(s, a, b, k > 0);
    if constexpr (N == 80) wgmma_ss_n80(s, a, b, k > 0);
  }
  wg_commit();
}
template <int N> DI void read(float (&acc)[64], const uint32_t (&p)[N / 4], uint64_t values, bool fresh) {
  wg_fence();
#pragma unroll
  for (int k = 0; k < N / 16; k++) wgmma_rs_n128(acc, p + 4 * k, ahead(values, k * 2048), !fresh || k > 0);
  wg_commit();
}
DI void hide_at(float& a, float& b, float& c, float& d, const int* until, int block, int lane) {
  int2 u = *reinterpret_cast<const int2*>(until + 2 * (lane & 3));
  if (block >= u.x) a = c = -1e30f;
  if (block >= u.y) b = d = -1e30f;
}
// hides the columns that a block does not see
template <int N, int FROM> DI void hide(float (&s)[N / 2], const int* until, int block, int lane) {
  bool all = true;
#pragma unroll
  for (int i = 0; i < (N + 31) / 32; i++) {
    int c = i * 32 + lane;
    if (c >= FROM && c < N) all = all && block < until[c];
  }
  bool hidden = !__all_sync(~0u, all);
#pragma unroll
  for (int i = 0; i < FROM / 8; i++) hide_at(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3], until + 8 * i, block, lane);
  if (hidden) {
    __syncwarp();  // a branch, not instructions that do nothing
#pragma unroll
    for (int i = FROM / 8; i < N / 8; i++) hide_at(s[4 * i], s[4 * i + 1], s[4 * i + 2], s[4 * i + 3], until + 8 * i, block, lane);
  }
}
template <int R> DI void largest(const float (&s)[R], float& m0, float& m1) {
#pragma unroll
  for (int i = 0; i < R / 4; i++) {
    m0 = fmaxf(m0, fmaxf(s[4 * i], s[4 * i + 1])); m1 = fmaxf(m1, fmaxf(s[4 * i + 2], s[4 * i + 3]));
  }
}
template <int R> DI void powers(float (&s)[R], uint32_t (&p)[R / 2], float unit, float m0, float m1, float& l0, float& l1) {
#pragma unroll
  for (int i = 0; i < R / 4; i++) {
    float a = ex2(fmaf(s[4 * i], unit, -m0)), b = ex2(fmaf(s[4 * i + 1], unit, -m0));
    float c = ex2(fmaf(s[4 * i + 2], unit, -m1)), d = ex2(fmaf(s[4 * i + 3], unit, -m1));
    l0 += a + b; l1 += c + d;
    p[2 * i] = pack(a, b); p[2 * i + 1] = pack(c, d);
  }
}
DI float quad_max(float x) { x = fmaxf(x, __shfl_xor_sync(~0u, x, 1)); return fmaxf(x, __shfl_xor_sync(~0u, x, 2)); }
DI float quad_sum(float x) { x += __shfl_xor_sync(~0u, x, 1); return x + __shfl_xor_sync(~0u, x, 2); }

// one step of an online softmax; what was read is rescaled only where the largest score has grown by more than 2^8
template <int R> DI void absorb(float (&s)[R], uint32_t (&p)[R / 2], float (&acc)[64], float unit, float& m0, float& m1, float& l0, float& l1) {
  float n0 = -1e30f, n1 = -1e30f;
  largest(s, n0, n1);
  n0 = quad_max(n0) * unit; n1 = quad_max(n1) * unit;
  if (__any_sync(~0u, fmaxf(n0 - m0, n1 - m1) > 8.f)) {
    __syncwarp();  // a branch, not instructions that do nothing
    n0 = fmaxf(m0, n0); n1 = fmaxf(m1, n1);
    float f0 = ex2(m0 - n0), f1 = ex2(m1 - n1);
    m0 = n0; m1 = n1; l0 *= f0; l1 *= f1;
#pragma unroll
    for (int i = 0; i < 16; i++) { acc[4 * i] *= f0; acc[4 * i + 1] *= f0; acc[4 * i + 2] *= f1; acc[4 * i + 3] *= f1; }
  }
  powers(s, p, unit, m0, m1, l0, l1);
}
// of 16 columns from group FROM on: column c is not seen by token t where c > start + t
template <int FROM, int R> DI void causal(float (&s)[R], int start, int lane) {
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (8 * i + 2 * (lane & 3) + (e & 1) > start + lane / 4 + (e >> 1) * 8) s[4 * (FROM + i) + e] = -1e30f;
}
// the 16 queries of a block of one head: a warp's rows
DI void load_q(const P& p, uint32_t q, Place x, int j, int warp, int lane) {
  int b = x.row / p.kv_heads, h = x.row % p.kv_heads, at = x.tile * TILE + j * BLOCK + lane / 16, c = lane % 16;
  const char* from = p.Q + 2 * (b * p.sqb + (h * 4 + warp) * p.sqh + at * p.sqt) + c * 16;
  int R = warp * 16 + lane / 16;
  q += (c / 8) * QHALF + R * 128;
#pragma unroll
  for (int i = 0; i < 8; i++) copy16(q + i * 256 + (((c & 7) ^ ((R + 2 * i) & 7)) << 4), from + 4 * i * p.sqt, at + 2 * i < p.W);
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// 16 rows of a warp, through where its queries stood
DI void store(const P& p, const float (&acc)[64], float i0, float i1, const char* staged, uint32_t stage, int64 out, int at0, int lane) {
  int r = (lane & 7) + ((lane >> 3) & 1) * 8;
#pragma unroll
  for (int i = 0; i < 16; i += 2)
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(stage + (i / 8) * QHALF + r * 128 + (((i % 8 + (lane >> 4)) ^ (r & 7)) << 4)),
      "r"(pack(acc[4 * i] * i0, acc[4 * i + 1] * i0)), "r"(pack(acc[4 * i + 2] * i1, acc[4 * i + 3] * i1)),
      "r"(pack(acc[4 * i + 4] * i0, acc[4 * i + 5] * i0)), "r"(pack(acc[4 * i + 6] * i1, acc[4 * i + 7] * i1)) : "memory");
  __syncwarp();
  int c = lane % 16, s = lane / 16;
  char* to = p.Out + (out + s) * 256 + c * 16;
  const char* from = staged + (c / 8) * QHALF + s * 128;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    if (at0 + 2 * i + s < p.W)
      *reinterpret_cast<uint4*>(to + i * 512) = *reinterpret_cast<const uint4*>(from + i * 256 + (((c & 7) ^ ((2 * i + s) & 7)) << 4));
  }
  __syncwarp();
}
DI void fetch_q(const P& p, Place x, int j, int warp, int lane) {
  int b = x.row / p.kv_heads, h = x.row % p.kv_heads, at = x.tile * TILE + j * BLOCK + lane / 2;
  const char* from = p.Q + 2 * (b * p.sqb + (h * 4 + warp) * p.sqh + at * p.sqt) + lane % 2 * 128;
  if (at < p.W) asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}
DI void unit(const P& p, char* smem, uint32_t base, Place at, int number, int group, int J, int warp, int lane,
             bool more, Place next, int next_j) {
  uint32_t bars = base + OFF_B;
  int row = at.row, tile = at.tile, block = tile * 4 + J, parity = number & 1, turn = number / 2 & 1;
  uint64_t q = desc(base + OFF_Q + group * 16384, 16), keys = desc(base + OFF_HK, 16), values = desc(base + OFF_HV, HHALF);
  uint64_t old_keys = desc(base + OFF_WK + parity * 2 * WHALF, 16), old_values = desc(base + OFF_WV, WHALF);
  const int* until = reinterpret_cast<const int*>(smem + OFF_U) + parity * KEYS;
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  sync_group(1 + group);
  float sw[NW / 2], acc[64], m0 = -1e30f, m1 = -1e30f, l0 = 0, l1 = 0;
  if (more) fetch_q(p, next, next_j, warp, lane);
  bar_wait(bars + UF + 8 * parity, turn);
  bar_wait(bars + KWF + 8 * parity, turn);
  scores<NW, WHALF>(sw, q, ahead(old_keys, J * 2048));
  bool joined = J > 0 && __any_sync(~0u, (lane < 16 * J && block < until[NA + lane]) | (lane + 32 < 16 * J && block < until[NA + 32 + lane]));
  wg_wait<0>();
  fence_regs(sw);
  if (!joined && lane == 0) bar_arrive(bars + KWE + 8 * parity);
  hide<NW, 0>(sw, until + NA + 16 * J, block, lane);
  causal<8>(sw, 0, lane);
  largest(sw, m0, m1);
  m0 = quad_max(m0) * p.unit; m1 = quad_max(m1) * p.unit;
  uint32_t pw[NW / 4];
  powers(sw, pw, p.unit, m0, m1, l0, l1);
  bar_wait(bars + VWF, parity);
  read<NW>(acc, pw, ahead(old_values, J * 2048), true);
  bar_wait(bars + KHF, parity);
  float s1[N1 / 2];
  scores<N1, HHALF>(s1, q, keys);
  wg_wait<0>();
  fence_regs(s1); fence_regs(acc);
  if (!joined && lane == 0) bar_arrive(bars + VWE);
  hide<N1, SP>(s1, until, block, lane);
  if (block == 0) causal<0>(s1, p.Bounds[row / p.kv_heads * 4 + 3], lane);
  uint32_t p1[N1 / 4];
  absorb(s1, p1, acc, p.unit, m0, m1, l0, l1);
  bar_wait(bars + VHF, parity);
  read<N1>(acc, p1, values, false);
  float s2[N2 / 2];
  scores<N2, HHALF>(s2, q, ahead(keys, N1 * 128));
  wg_wait<0>();
  fence_regs(s2); fence_regs(acc);
  if (lane == 0) bar_arrive(bars + KHE);
  hide<N2, 0>(s2, until + N1, block, lane);
  uint32_t p2[N2 / 4];
  absorb(s2, p2, acc, p.unit, m0, m1, l0, l1);
  read<N2>(acc, p2, ahead(values, N1 * 128), false);
  if (joined) {  // who has left the window within the tile and holds a slot
    float sj[24];
    uint32_t pj[12];
    scores<48, WHALF>(sj, q, old_keys);
    wg_wait<0>();
    fence_regs(sj); fence_regs(acc);
    if (lane == 0) bar_arrive(bars + KWE + 8 * parity);
    hide<48, 48>(sj, until + NA, block, lane);
#pragma unroll
    for (int i = 0; i < 6; i++) if (i >= 2 * J) sj[4 * i] = sj[4 * i + 1] = sj[4 * i + 2] = sj[4 * i + 3] = -1e30f;
    absorb(sj, pj, acc, p.unit, m0, m1, l0, l1);
    read<48>(acc, pj, old_values, false);
    wg_wait<0>();
    if (lane == 0) bar_arrive(bars + VWE);
  }
  sync_group(1 + group);  // all have read their queries
  l0 = quad_sum(l0); l1 = quad_sum(l1);
  bool see0 = m0 > -1e29f * p.unit, see1 = m1 > -1e29f * p.unit;
  float i0 = see0 ? 1.f / l0 : 0.f, i1 = see1 ? 1.f / l1 : 0.f;
  wg_wait<0>();
  fence_regs(acc);
  if (lane == 0) bar_arrive(bars + VHE);
  int at0 = tile * TILE + J * BLOCK, mine = OFF_Q + group * 16384 + warp * 2048;
  int64 out = (int64)(row * 4 + warp) * p.W + at0;
  store(p, acc, i0, i1, smem + mine, base + mine, out, at0, lane);
  if (more) load_q(p, base + OFF_Q + group * 16384, next, next_j, warp, lane);
  if ((lane & 3) == 0) {
    int r = lane / 4;
    if (at0 + r < p.W) p.Lse[out + r] = see0 ? (m0 + __log2f(l0)) * 0.6931471805599453f : 0.f;
    if (at0 + r + 8 < p.W) p.Lse[out + r + 8] = see1 ? (m1 + __log2f(l1)) * 0.6931471805599453f : 0.f;
  }
}

// who stands where for an item: index of the holders, and until when each column is seen
DI void columns(const P& p, Place at, int* index, int* until, int t) {
  int b = at.row / p.kv_heads, x = -1, c = (at.tile - 1) * TILE + t, u = 0, w = 0;
  const int *death = p.Death + (int64)at.row * p.X, *bounds = p.Bounds + b * 4;
  if (t < p.width) x = p.Table[((int64)at.row * p.n + at.tile) * p.width + t];
  if (c >= bounds[0] && c < bounds[1]) w = death[p.front + c];
  if (x >= 0) u = death[x];
  index[SP + t] = x;
  until[SP + t] = u;
  until[NA + t] = w;
  if (t < SP) {
    bool sink = t < p.sinks && t < p.X;
    index[t] = sink ? t : -1;
    until[t] = sink ? 1 << 24 : 0;
  }
}
// which rows 8i + 2 warp and the next have changed, as bits i
DI uint32_t changed(const int* index, const int* old, bool fresh, int warp, int lane) {
  int r = 8 * lane + 2 * warp;
  return __ballot_sync(~0u, lane < HROWS / 8 && (fresh || index[r] != old[r] || index[r + 1] != old[r + 1]));
}
// keys or values of the holders that have changed
DI void copy_held(const char* from, int64 stride, const int* index, uint32_t bits, uint32_t to, int warp, int lane) {
  int c = lane % 16;
  from += c * 16;
  to += (c / 8) * HHALF;
  while (bits) {
    int i = __ffs(bits) - 1;
    bits &= bits - 1;
    int r = i * 8 + 2 * warp + lane / 16, x = index[r];
    copy16(to + r * 128 + (((c & 7) ^ (r & 7)) << 4), from + 2 * (x < 0 ? 0 : x) * stride, x >= 0);
  }
}
// the window of a tile: its 64 tokens and as many before
DI void copy_near(const P& p, const char* from, int64 stride, Place at, uint32_t to, int t) {
  int b = at.row / p.kv_heads, c = t % 16, r = t / 16, x = (at.tile - 1) * TILE + r;
  int lo = p.Bounds[b * 4], hi = p.Bounds[b * 4 + 1];
  from += 2 * (int64)(p.front + x) * stride + c * 16;
  to += (c / 8) * WHALF + r * 128 + (((c & 7) ^ (r & 7)) << 4);
#pragma unroll
  for (int i = 0; i < 16; i++) copy16(to + i * 1024, from + 16 * i * stride, x + 8 * i >= lo && x + 8 * i < hi);
}
DI Place step(const P& p, Place at) { return at.tile + 1 < p.n ? Place{at.row, at.tile + 1} : Place{at.row + 1, 0}; }

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1) exact_hopper(const __grid_constant__ P p) {
  extern __shared__ __align__(1024) char smem[];
  uint32_t base = smem_u32(smem), bars = base + OFF_B;
  if (base & 1023) __trap();
  int t = threadIdx.x % 128, lane = t % 32;
  int warp = __shfl_sync(~0u, t / 32, 0), group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 7; i++) bar_init(bars + 8 * i, 128);
    for (int i = 7; i < 12; i++) bar_init(bars + 8 * i, 16);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  int begin = (int64)p.items * blockIdx.x / gridDim.x, count = (int64)p.items * (blockIdx.x + 1) / gridDim.x - begin;
  if (!count) return;
  Place at = {begin / p.n, begin % p.n};
  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    int* index = reinterpret_cast<int*>(smem + OFF_I);
    int* until = reinterpret_cast<int*>(smem + OFF_U);
    auto keys = [&](Place x) { return p.K + 2 * (x.row / p.kv_heads * p.skb + x.row % p.kv_heads * p.skh); };
    auto values = [&](Place x) { return p.V + 2 * (x.row / p.kv_heads * p.svb + x.row % p.kv_heads * p.svh); };
    auto near_keys = [&](Place x, int number) {
      copy_near(p, keys(x), p.skt, x, base + OFF_WK + (number & 1) * 2 * WHALF, t);
      bar_copies(bars + KWF + 8 * (number & 1));
    };
    near_keys(at, 0);
    if (count > 1) near_keys(step(p, at), 1);
    columns(p, at, index, until, t);
    bar_arrive(bars + UF);
    for (int number = 0; number < count; number++) {
      int parity = number & 1;
      if (number) bar_wait(bars + VWE, 1 - parity);
      copy_near(p, values(at), p.svt, at, base + OFF_WV, t);
      bar_copies(bars + VWF);
      sync_group(GROUPS + 1);  // the index is there
      uint32_t bits = changed(index + parity * HROWS, index + (1 - parity) * HROWS, !number || !at.tile, warp, lane);
      if (number) bar_wait(bars + KHE, 1 - parity);
      copy_held(keys(at), p.skt, index + parity * HROWS, bits, base + OFF_HK, warp, lane);
      bar_copies(bars + KHF);
      if (number) bar_wait(bars + VHE, 1 - parity);
      copy_held(values(at), p.svt, index + parity * HROWS, bits, base + OFF_HV, warp, lane);
      bar_copies(bars + VHF);
      if (number + 1 == count) break;
      at = step(p, at);
      sync_group(GROUPS + 1);  // all have read the index before
      columns(p, at, index + (1 - parity) * HROWS, until + (1 - parity) * KEYS, t);
      bar_arrive(bars + UF + 8 * (1 - parity));
      if (number + 2 < count) {
        bar_wait(bars + KWE + 8 * parity, number / 2 & 1);
        near_keys(step(p, at), number + 2);
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    int number = 0, J = group;  // of the blocks, each group takes every third
    load_q(p, base + OFF_Q + group * 16384, at, J, warp, lane);
    while (number < count) {
      Place here = at;
      int now = number, j = J;
      J += GROUPS;
      if (J >= 4) { J -= 4; number++; at = step(p, at); }
      unit(p, smem, base, here, now, group, j, warp, lane, number < count, at, J);
    }
  }
}
