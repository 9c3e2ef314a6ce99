// The CPU kernels, once, for every instruction set: kernels_<isa>.cpp defines the FASTERNET_* macros and includes this
// file.
//
// What a block computes, for a tile of consecutive pixels of about kTilePixels (arXiv 2303.03667, section 3.3):
//
//   padded rows of x[:, :c_partial] -> u = conv3x3        K = 3 segments of 3 * c_partial, one per kernel row
//   for each chunk of hidden channels (at most kHiddenChunk):
//     h  = act([u | x[:, c_partial:]] * w_pw1 + shift)    K = 2 segments: no concatenation is ever written
//     y += h * w_pw2                                      the residual joins in the last chunk's epilogue
//
// In the fast tier, float32 only, the convolution is Winograd's where that pays (WinogradTile).
//
// u, h and the partial sums of y are scratch of one thread and stay in its L2 cache; x is read from memory once, but
// for the first c_partial channels of the two rows around a tile, and y is written once: 2 C + 2 C_p / rows elements of
// traffic for 9 C_p^2 + 2 C C_h multiply-adds a pixel. In a tile of 112 pixels a dozen groups of rows read the same
// weights from L1 while h (112 x kHiddenChunk) stays within 112 KB. Where threads would have few pixels each and many
// weights to read, they share the columns of the products instead, for all pixels.
//
// All arithmetic goes through one micro-kernel, `micro`: kRows x kVecs accumulators over a list of K segments. An
// element's sum runs over K in one order whatever the tile, so tiling and threads never change the bits: in order
// within a pass of at most kDepth, then pass by pass, which keeps the rounding error of a long K near that of a short
// one.
#include <math.h>

#include <utility>

#include "kernels.h"

#if defined(__clang__)
#define FASTERNET_UNROLL _Pragma("unroll")
#else
#define FASTERNET_UNROLL _Pragma("GCC unroll 32")
#endif

namespace fasternet {
namespace FASTERNET_ISA_NAMESPACE {

#include "vec.h"

constexpr int64_t kTilePixels = 112;
constexpr int64_t kWholeRows = 160;  // wider images are cut into row segments of about kTilePixels
// K per pass: the weights of a tile's columns, 16 KB in one panel of 256 cache lines or at most 36 KB in three of 192,
// stay in L1 or close to it while the rows go by.
constexpr int64_t kDepth = FASTERNET_PANELS == 1 ? 256 : 192;
// Hidden channels per pass: as many, so a block adds up the same passes whether threads share its tiles or its columns.
constexpr int64_t kHiddenChunk = kDepth;
static_assert(kDepth % (kPanelBytes / sizeof(float)) == 0, "passes are of whole panels");
constexpr int64_t kHeadDepth = 64;  // K per pass of the head: few rows, so passes are cheap and the logits more exact
// Threads share columns where each would have fewer pixels than the first and the weights are at least the second. On 2
// threads, with 24 pixels each, that is faster at the width of every network's last stage, and with 49 it is not
// (builds with one rule and the other, on the chains of `python -m bench blocks --only stage4 --threads 2 --batch
// 1,2`, with tiles of 12 rows x 2 panels on AVX-512); fewer weights cost less than the further forks.
constexpr int64_t kFewPixels = 36;
constexpr int64_t kManyWeights = 64 << 10;
constexpr int64_t kPiecePanels = FASTERNET_PANELS == 1 ? 4 : 6;  // in a piece of columns at least: two wide tiles
constexpr int kMaxSegments = 4;
// Steps of K per turn of the inner loop. With vectors of 64 bytes a step is some 40 instructions: shorter loops are
// faster there, above all where another thread shares the core and its store of decoded instructions.
constexpr int kUnroll = FASTERNET_VECTOR_BYTES == 64 ? 2 : 4;
constexpr int kPrefetchLines = kUnroll / 2;
// FASTERNET_ROWS: the most rows of a tile; FASTERNET_ROWS_OF_3: of one of three panels, where FASTERNET_PANELS is 3.
static_assert(FASTERNET_PANELS == 1 || FASTERNET_PANELS == 3, "column_tile knows no others");
#ifndef FASTERNET_ROWS_OF_3
#define FASTERNET_ROWS_OF_3 FASTERNET_ROWS
#endif
#ifdef FASTERNET_FMA_BY_LANE
constexpr bool kFmaByLane = true;
#else
constexpr bool kFmaByLane = false;
#endif
constexpr int kVectorsPerPanel = kPanelBytes / FASTERNET_VECTOR_BYTES;

inline int64_t clip(int64_t a, int64_t limit) { return a < limit ? a : limit; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
template <class T>
constexpr int64_t panel_width() {
  return kPanelBytes / static_cast<int64_t>(sizeof(T));
}

// ---- Storage types --------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
inline float to_compute(float v) { return v; }
inline double to_compute(double v) { return v; }
inline float to_compute(bf16 v) {
  const uint32_t wide = static_cast<uint32_t>(v.bits) << 16;
  float f;
  __builtin_memcpy(&f, &wide, sizeof(f));
  return f;
}
inline void to_storage(float v, float* out) { *out = v; }
inline void to_storage(double v, double* out) { *out = v; }
inline void to_storage(float v, bf16* out) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  out->bits = static_cast<uint16_t>((v != v ? (bits | 0x400000) : rounded) >> 16);
}
template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

// ---- Micro-kernel ---------------------------------------------------------------------------------------------------

// c[r][j] = epilogue(c_in[r][j] + sum over segments s and k of a[s][r][k] * b[k][j]) for kRows rows and one tile of
// columns.
template <class T>
struct Micro {
  int n_segments;
  const T* a[kMaxSegments];  // null: zeros, which are left out
  int64_t k[kMaxSegments];
  int64_t a_stride[kMaxSegments];  // elements from row to row
  const T* b;                      // at the first k of the first segment
  int64_t b_panel;                 // elements from panel to panel
  const T* c_in;                   // null: zeros
  int64_t c_in_stride;
  T* c;
  int64_t c_stride;
  const T* shift;  // null: none; per column
  bool relu;
  const T* residual;  // null: none
  int64_t residual_stride;
  const char* prefetch;  // weights needed soon: kUnroll steps of K ask for kPrefetchLines cache lines from here on
};

// acc += w * value. On x86 as an instruction of its own: left to choose among its forms, GCC moves accumulators around
// and spills them once the loop is unrolled.
template <class V>
inline __attribute__((always_inline)) void multiply_add(V& acc, const V& w, const V& value) {
#if defined(__FMA__)
  if constexpr (Same<decltype(acc[0] + acc[0]), float>::value) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(value));
  } else {
    asm("vfmadd231pd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(value));
  }
#else
  acc += w * value;
#endif
}

// acc += w * *value. AVX-512 has that as one instruction, where registers would need a load before it. The address
// sanitizer does not see what it reads.
#if FASTERNET_VECTOR_BYTES == 64 && !defined(FASTERNET_GUARD_SCRATCH)
constexpr bool kFmaFromMemory = true;
#else
constexpr bool kFmaFromMemory = false;
#endif
template <class V, class T>
inline __attribute__((always_inline)) void multiply_add_from(V& acc, const V& w, const T* value) {
#if FASTERNET_VECTOR_BYTES == 64
  if constexpr (Same<T, float>::value && sizeof(V) == 64) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*value));
    return;
  } else if constexpr (Same<T, float>::value) {
    asm("vfmadd231ps %2%{1to8%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*value));
    return;
  }
#endif
  multiply_add(acc, w, *value - V{});
}

// kLanes steps of K where an FMA can multiply by one lane of a register: one load brings kLanes values of a row.
template <class V, class T, int kVecsPerPanel, int kRows, int kVecs, int kBases>
inline __attribute__((always_inline)) void steps_by_lane(V (&acc)[kRows][kVecs], const char* const (&base)[kBases],
                                                         int64_t stride,
                                                         const T* const (&panels)[kVecs / kVecsPerPanel]) {
  constexpr int kLanes = sizeof(V) / sizeof(T);
  V a[kRows];
  FASTERNET_UNROLL
  for (int r = 0; r < kRows; ++r) {
    a[r] = load<V>(base[r / 3] + (r % 3) * stride);
#ifdef FASTERNET_FMA_BY_LANE
    asm("" : "+w"(a[r]));  // stay a vector: GCC would load its lanes one by one
#endif
  }
  FASTERNET_UNROLL
  for (int lane = 0; lane < kLanes; ++lane) {
    FASTERNET_UNROLL
    for (int j = 0; j < kVecs; ++j) {
      const V w = load<V>(panels[j / kVecsPerPanel] + (j % kVecsPerPanel + lane * kVecsPerPanel) * kLanes);
      FASTERNET_UNROLL
      for (int r = 0; r < kRows; ++r) acc[r][j] += w * a[r][lane];
    }
  }
}

template <class T, int kBytes, int kRows, int kVecs, int kVecsPerPanel>
void micro(const Micro<T>& m) {
  using V = typename VecOf<T, kBytes>::type;
  constexpr int kLanes = VecOf<T, kBytes>::kLanes;
  V acc[kRows][kVecs];
  FASTERNET_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTERNET_UNROLL
    for (int j = 0; j < kVecs; ++j) acc[r][j] = V{};
  }
  constexpr int kPanels = kVecs / kVecsPerPanel;
  const T* panels[kPanels];
  FASTERNET_UNROLL
  for (int i = 0; i < kPanels; ++i) {
    panels[i] = m.b + i * m.b_panel;
    // Of several panels GCC would keep the address of each load in a register, did it know how they are related.
    if constexpr (kPanels > 1) asm("" : "+r"(panels[i]));
  }
  const char* prefetch = m.prefetch;
  for (int s = 0; s < m.n_segments; ++s) {
    if (!m.a[s]) {
      FASTERNET_UNROLL
      for (int i = 0; i < kPanels; ++i) panels[i] += m.k[s] * kVecsPerPanel * kLanes;
      continue;
    }
    // One pointer for every three rows: x86 addresses base, base + stride and base + 2 * stride without arithmetic.
    constexpr int kBases = (kRows + 2) / 3;
    const int64_t stride = m.a_stride[s] * static_cast<int64_t>(sizeof(T));
    const char* base[kBases];
    FASTERNET_UNROLL
    for (int i = 0; i < kBases; ++i) base[i] = reinterpret_cast<const char*>(m.a[s]) + 3 * i * stride;
    const auto step = [&](int u) __attribute__((always_inline)) {
      V w[kVecs];
      FASTERNET_UNROLL
      for (int j = 0; j < kVecs; ++j) {
        w[j] = load<V>(panels[j / kVecsPerPanel] + (j % kVecsPerPanel + u * kVecsPerPanel) * kLanes);
      }
      FASTERNET_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const T* const value = reinterpret_cast<const T*>(base[r / 3] + (r % 3) * stride) + u;
        // From memory in every third row, whose address needs no index: fewer instructions, which is what counts where
        // two threads share a core, and not so many loads that they are what it waits for.
        const bool from_memory = kFmaFromMemory && r % 3 == 0;
        const V factor = from_memory ? V{} : *value - V{};
        FASTERNET_UNROLL
        for (int j = 0; j < kVecs; ++j) {
          from_memory ? multiply_add_from(acc[r][j], w[j], value) : multiply_add(acc[r][j], w[j], factor);
        }
      }
    };
    const auto advance = [&](int steps) __attribute__((always_inline)) {
      FASTERNET_UNROLL
      for (int i = 0; i < kPanels; ++i) panels[i] += steps * kVecsPerPanel * kLanes;
      FASTERNET_UNROLL
      for (int i = 0; i < kBases; ++i) base[i] += steps * sizeof(T);
    };
    for (int64_t turns = m.k[s] / kUnroll; turns > 0; --turns) {
      FASTERNET_UNROLL
      for (int i = 0; i < kPrefetchLines; ++i) __builtin_prefetch(prefetch + i * kPanelBytes, 0, 2);
      prefetch += kPrefetchLines * kPanelBytes;
      // Not in double, whose two lanes save too little to be worth the registers.
      if constexpr (kFmaByLane && kLanes == kUnroll) {
        steps_by_lane<V, T, kVecsPerPanel>(acc, base, stride, panels);
      } else {
        FASTERNET_UNROLL
        for (int u = 0; u < kUnroll; ++u) step(u);
      }
      advance(kUnroll);
    }
    for (int64_t k = m.k[s] % kUnroll; k > 0; --k) {
      step(0);
      advance(1);
    }
  }
  if (m.c_in) {
    FASTERNET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTERNET_UNROLL
      for (int j = 0; j < kVecs; ++j) acc[r][j] += load<V>(m.c_in + r * m.c_in_stride + j * kLanes);
    }
  }
  if (m.shift) {
    FASTERNET_UNROLL
    for (int j = 0; j < kVecs; ++j) {
      const V shift = load<V>(m.shift + j * kLanes);
      FASTERNET_UNROLL
      for (int r = 0; r < kRows; ++r) acc[r][j] += shift;
    }
  }
  if (m.relu) {
    FASTERNET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTERNET_UNROLL
      for (int j = 0; j < kVecs; ++j) acc[r][j] = max(acc[r][j], V{});  // keeps NaN
    }
  }
  if (m.residual) {
    FASTERNET_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FASTERNET_UNROLL
      for (int j = 0; j < kVecs; ++j) acc[r][j] += load<V>(m.residual + r * m.residual_stride + j * kLanes);
    }
  }
  FASTERNET_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTERNET_UNROLL
    for (int j = 0; j < kVecs; ++j) store(m.c + r * m.c_stride + j * kLanes, acc[r][j]);
  }
}

// The micro-kernels of one column width for 1 .. kMost rows.
template <class T, int kBytes, int kVecs, int kVecsPerPanel, int kMost>
struct MicroTable {
  using Function = void (*)(const Micro<T>&);
  Function rows[kMost + 1];
  constexpr MicroTable() : rows() { fill<1>(); }
  template <int kRows>
  constexpr void fill() {
    rows[kRows] = micro<T, kBytes, kRows, kVecs, kVecsPerPanel>;
    if constexpr (kRows < kMost) fill<kRows + 1>();
  }
};
template <class T, int kPanels>
constexpr MicroTable<T, FASTERNET_VECTOR_BYTES, kPanels * kVectorsPerPanel, kVectorsPerPanel,
                     kPanels == 3 ? FASTERNET_ROWS_OF_3 : FASTERNET_ROWS>
    kMicro{};
constexpr int kHalfBytes = FASTERNET_VECTOR_BYTES < kPanelBytes / 2 ? FASTERNET_VECTOR_BYTES : kPanelBytes / 2;
constexpr int kHalfVecs = kPanelBytes / 2 / kHalfBytes;
template <class T>
constexpr MicroTable<T, kHalfBytes, kHalfVecs, kHalfVecs, FASTERNET_ROWS> kHalf{};

// The tile of the next columns, of which `left` are left: half a panel, one, or where FASTERNET_PANELS is 3 up to
// three. There four panels are two tiles of two and not one of three and one of one.
template <class T>
struct ColumnTile {
  int64_t panels, width;
  int most_rows;
  void (*const* rows)(const Micro<T>&);  // the micro-kernel of so many rows
};
template <class T>
ColumnTile<T> column_tile(int64_t left) {
  constexpr int64_t kWidth = panel_width<T>();
  if (left < kWidth) return {1, kWidth / 2, FASTERNET_ROWS, kHalf<T>.rows};
  if constexpr (FASTERNET_PANELS == 3) {
    const int64_t panels = left / kWidth;
    if (panels == 3 || panels > 4) return {3, 3 * kWidth, FASTERNET_ROWS_OF_3, kMicro<T, 3>.rows};
    if (panels > 1) return {2, 2 * kWidth, FASTERNET_ROWS, kMicro<T, 2>.rows};
  }
  return {1, kWidth, FASTERNET_ROWS, kMicro<T, 1>.rows};
}

// ---- Activation of a finished tile, while it is in L1 ---------------------------------------------------------------

template <Act kAct, class T>
void activate_as(T* c, int64_t stride, int64_t rows, int64_t columns) {
  if constexpr (Same<T, float>::value) {
    constexpr int kBytes = kHalfBytes < FASTERNET_VECTOR_BYTES ? kHalfBytes : FASTERNET_VECTOR_BYTES;
    using VT = VecOf<float, kBytes>;
    using Wide = VecOf<float, FASTERNET_VECTOR_BYTES>;
    for (int64_t r = 0; r < rows; ++r, c += stride) {
      int64_t j = 0;
      for (; j + Wide::kLanes <= columns; j += Wide::kLanes) {
        store(c + j, act_ps<kAct, Wide>(load<typename Wide::type>(c + j)));
      }
      for (; j < columns; j += VT::kLanes) store(c + j, act_ps<kAct, VT>(load<typename VT::type>(c + j)));
    }
  } else {
    for (int64_t r = 0; r < rows; ++r, c += stride) {
      for (int64_t j = 0; j < columns; ++j) c[j] = act_pd<kAct>(c[j]);
    }
  }
}

// columns is a multiple of half a panel.
template <class T>
void activate(Act act, T* c, int64_t stride, int64_t rows, int64_t columns) {
  switch (act) {
    case Act::kIdentity:
      return;
    case Act::kRelu:
      return activate_as<Act::kRelu>(c, stride, rows, columns);
    case Act::kGelu:
      return activate_as<Act::kGelu>(c, stride, rows, columns);
    case Act::kGeluTanh:
      return activate_as<Act::kGeluTanh>(c, stride, rows, columns);
    case Act::kSilu:
      return activate_as<Act::kSilu>(c, stride, rows, columns);
    case Act::kHardswish:
      return activate_as<Act::kHardswish>(c, stride, rows, columns);
  }
}

// ---- Vectors of channels --------------------------------------------------------------------------------------------

// float in vectors; double one by one, which is enough for gradient checks.
template <class T>
struct Lanes {
  using VT = VecOf<float, FASTERNET_VECTOR_BYTES>;
  using V = typename VT::type;
  static constexpr int kLanes = VT::kLanes;
};
template <>
struct Lanes<double> {
  struct VT {};
  using V = double;
  static constexpr int kLanes = 1;
};
template <class T>
using LanesOf = typename Lanes<T>::V;

constexpr int kFloatLanes = Lanes<float>::kLanes;

// Loads and stores of vectors V, or of one value, with the conversion from and to storage.
template <class V, class S>
inline V load_as(const S* p) {
  if constexpr (Same<V, float>::value || Same<V, double>::value) {
    return to_compute(*p);
  } else if constexpr (Same<S, bf16>::value) {
    using Halves = typename VecOf<uint16_t, sizeof(V) / 2>::type;
    using Words = typename VecOf<uint32_t, sizeof(V)>::type;
    const Words bits = __builtin_convertvector(load<Halves>(p), Words) << 16;
    return load<V>(&bits);
  } else {
    return load<V>(p);
  }
}
template <class V, class S>
inline void store_as(V v, S* p) {
  if constexpr (Same<V, float>::value || Same<V, double>::value) {
    to_storage(v, p);
  } else if constexpr (Same<S, bf16>::value) {  // as to_storage
    using Halves = typename VecOf<uint16_t, sizeof(V) / 2>::type;
    using Words = typename VecOf<uint32_t, sizeof(V)>::type;
    Words bits;
    store(&bits, v);
    const Words rounded = bits + 0x7fff + ((bits >> 16) & 1);
    store(p, __builtin_convertvector((v != v ? (bits | 0x400000) : rounded) >> 16, Halves));
  } else {
    store(p, v);
  }
}

// f.template run<V>(j) on vectors that cover [0, columns) and nothing else: whole ones, the last of which may overlap
// the one before it, or where there are too few columns narrower ones. f must not mind being run twice on a column.
template <class T, class F>
inline void for_columns(int64_t columns, const F& f) {
  using V = LanesOf<T>;
  constexpr int64_t kLanes = Lanes<T>::kLanes;
  if constexpr (Same<T, double>::value) {
    for (int64_t j = 0; j < columns; ++j) f.template run<double>(j);
  } else if (columns >= kLanes) {
    for (int64_t j = 0; j < columns - kLanes; j += kLanes) f.template run<V>(j);
    f.template run<V>(columns - kLanes);
  } else {
    using Half = typename VecOf<float, FASTERNET_VECTOR_BYTES / 2>::type;
    if (columns >= kLanes / 2) {
      f.template run<Half>(0);
      f.template run<Half>(columns - kLanes / 2);
    } else {
      for (int64_t j = 0; j < columns; ++j) f.template run<float>(j);
    }
  }
}

// to = from + add, where add is there.
template <class S, class A, class D>
struct Combine {
  const S* from;
  const A* add;
  D* to;
  template <class V>
  void run(int64_t j) const {
    V v = load_as<V>(from + j);
    if (add) v += load_as<V>(add + j);
    store_as(v, to + j);
  }
};
template <class T, class S, class A, class D>
inline void combine(const S* from, const A* add, D* to, int64_t columns) {
  for_columns<T>(columns, Combine<S, A, D>{from, add, to});
}

// ---- GEMM of a tile -------------------------------------------------------------------------------------------------

// Consecutive rows of the output, whose A rows are evenly strided in every segment; a segment without A is zeros.
template <class T>
struct Run {
  const T* a[kMaxSegments];
  int64_t row, rows;
};

// A packed weight: see fasternet_cpu.h.
template <class T>
struct Packed {
  const T* data;
  int64_t n, k, n_padded;
  Packed(const T* packed, int64_t n_, int64_t k_) : data(packed), n(n_), k(k_), n_padded(padded_n(n_, sizeof(T))) {}
  const T* panel(int64_t column) const { return data + column * k; }  // of whole panels before `column`
  int64_t lanes(int64_t column) const { return clip(n_padded - column, panel_width<T>()); }
  int64_t panel_stride() const { return k * panel_width<T>(); }
  const T* shift() const { return data + n_padded * k; }
  const T* next() const { return data + packed_elements(n, k, sizeof(T)); }
};

// Memory that is used after a GEMM, such as the next tile's pixels: the micro-kernels fetch it into L2, a few cache
// lines each. Left to the loops that read it, a tile's misses and its arithmetic would take turns.
struct Ahead {
  static constexpr int kMost = 32;
  static constexpr int64_t kBytes = 256 << 10;  // more would drive out what is in use
  struct {
    const char *begin, *end;
  } ranges[kMost];
  int count = 0, next = 0;
  int64_t bytes = 0;

  // Pixels [pixel, pixel + pixels) of an image whose pixels are `stride` elements apart; null: nothing.
  template <class S>
  void add(const S* image, int64_t stride, int64_t pixel, int64_t pixels) {
    const int64_t size = clip(pixels * stride * static_cast<int64_t>(sizeof(S)), kBytes - bytes);
    if (!image || size <= 0 || count == kMost) return;
    const char* const begin = reinterpret_cast<const char*>(image + pixel * stride);
    ranges[count++] = {begin, begin + size};
    bytes += size;
  }
  // Where the next `size` bytes are; null when all have been taken.
  const char* take(int64_t size) {
    while (next < count && ranges[next].begin >= ranges[next].end) ++next;
    if (next == count) return nullptr;
    const char* const begin = ranges[next].begin;
    ranges[next].begin += size;
    return begin;
  }
};

template <class T>
struct Gemm {
  Run<T> all;          // the rows, where they are one run
  const Run<T>* runs;  // where they are several; null: `all`
  int64_t n_runs;
  int n_segments;
  int64_t segment_k[kMaxSegments];
  int64_t segment_stride[kMaxSegments];
  const Packed<T>* b;
  int64_t k_begin;         // the segments are this part of b's K
  int64_t depth = kDepth;  // the most K per pass
  int64_t n_begin, n_end;  // columns of b; n_begin a multiple of a panel, n_end of a panel or n_padded
  const T* c_in;           // null: zeros
  int64_t c_in_stride;
  T* c;  // column n_begin of row 0
  int64_t c_stride;
  T* sums;  // like c: where passes but the last leave their sums; null: in c
  int64_t sums_stride;
  bool shift;
  Act act;
  const T* residual;  // like c
  int64_t residual_stride;
  const T* next;        // the weights read after this, from the first panel on, or null
  int64_t next_panels;  // of the first tile
  int64_t next_stride;  // elements from panel to panel
  Ahead* ahead;         // fetched before any weights, or null
  void then(const Packed<T>& w, int64_t column, int64_t k_begin) {
    next = w.panel(column) + k_begin * w.lanes(column);
    next_panels = column_tile<T>(w.n_padded - column).panels;
    next_stride = w.panel_stride();
  }
  // The A operand is one segment: `rows` rows of k, `stride` elements apart.
  void set_a(const T* a, int64_t stride, int64_t k, int64_t rows) {
    n_segments = 1;
    segment_k[0] = k;
    segment_stride[0] = stride;
    all = {{a}, 0, rows};
  }
};

// Loops: depth, then column tiles, then groups of rows, so that all groups read the same weights, kDepth deep.
template <class T>
void gemm(const Gemm<T>& g) {
  constexpr int64_t kWidth = panel_width<T>();
  int64_t depth = 0;
  for (int s = 0; s < g.n_segments; ++s) depth += g.segment_k[s];
  // Passes of whole panels, as callers cut K into chunks, so that both add up in the same order.
  const int64_t pass_depth = round_up(ceil_div(depth, ceil_div(depth, g.depth)), kWidth);
  const int64_t passes = ceil_div(depth, pass_depth);
  const Run<T>* const runs = g.runs ? g.runs : &g.all;
  const int64_t n_runs = g.runs ? g.n_runs : 1;
  const bool late_act = g.act != Act::kIdentity && g.act != Act::kRelu;
  for (int64_t pass = 0; pass < passes; ++pass) {
    const int64_t k0 = pass * pass_depth, k1 = clip(k0 + pass_depth, depth);
    const bool first_pass = pass == 0, last = pass == passes - 1;
    // The part of each segment inside [k0, k1).
    Micro<T> m;
    int source[kMaxSegments];
    int64_t offset[kMaxSegments];
    m.n_segments = 0;
    int64_t begin = 0;
    for (int s = 0; s < g.n_segments; ++s) {
      const int64_t end = begin + g.segment_k[s];
      const int64_t from = begin > k0 ? begin : k0, to = end < k1 ? end : k1;
      if (from < to) {
        const int i = m.n_segments++;
        source[i] = s;
        offset[i] = from - begin;
        m.k[i] = to - from;
        m.a_stride[i] = g.segment_stride[s];
      }
      begin = end;
    }
    m.b_panel = g.b->panel_stride();
    T* const sums = g.sums ? g.sums : g.c;
    const int64_t sums_stride = g.sums ? g.sums_stride : g.c_stride;
    m.c_in_stride = first_pass ? g.c_in_stride : sums_stride;
    m.c_stride = last ? g.c_stride : sums_stride;
    m.relu = last && g.act == Act::kRelu;
    m.residual_stride = g.residual_stride;
    for (int64_t n = g.n_begin; n < g.n_end;) {
      const ColumnTile<T> tile = column_tile<T>(g.n_end - n);
      const int64_t width = tile.width;
      m.b = g.b->panel(n) + (g.k_begin + k0) * g.b->lanes(n);
      m.shift = last && g.shift ? g.b->shift() + n : nullptr;
      const int64_t column = n - g.n_begin;
      int64_t groups = 0;
      for (int64_t i = 0; i < n_runs; ++i) groups += ceil_div(runs[i].rows, tile.most_rows);
      // The weights read next, which the groups of rows fetch into L2 in turn: `lines` by each, of one panel after the
      // other.
      const bool same_pass = n + width < g.n_end, same_weight = same_pass || !last;
      const int64_t next_n = same_pass ? n + width : g.n_begin;
      const int64_t next_k = g.k_begin + (same_pass ? k0 : k1);
      const T* const next = same_weight ? g.b->panel(next_n) + next_k * g.b->lanes(next_n) : g.next;
      const int64_t next_stride = same_weight ? g.b->panel_stride() : g.next_stride;
      const int64_t next_panels = same_weight ? column_tile<T>(g.n_end - next_n).panels : next ? g.next_panels : 0;
      const int64_t lines = (k1 - k0) / kUnroll * kPrefetchLines, per_panel = ceil_div(k1 - k0, lines + 1);
      int64_t panel = 0, part = 0;  // what the next group fetches
      if (groups < per_panel * next_panels) {
        for (; panel < next_panels; ++panel) {
          for (int64_t k = 0; k < k1 - k0; ++k) __builtin_prefetch(next + panel * next_stride + k * kWidth, 0, 2);
        }
      }
      for (int64_t i = 0; i < n_runs; ++i) {
        const Run<T>& run = runs[i];
        // Groups of nearly equal size.
        const int64_t count = ceil_div(run.rows, tile.most_rows);
        const int64_t least = count ? run.rows / count : 0, larger = run.rows - count * least;
        for (int64_t group = 0, first = 0; group < count; ++group) {
          const int64_t rows = least + (group < larger);
          m.prefetch = g.ahead ? g.ahead->take(lines * kPanelBytes) : nullptr;
          if (!m.prefetch) {
            m.prefetch = reinterpret_cast<const char*>(
                panel < next_panels ? next + panel * next_stride + part * lines * kWidth : m.b);
            if (++part == per_panel) part = 0, ++panel;
          }
          for (int s = 0; s < m.n_segments; ++s) {
            const T* const a = run.a[source[s]];
            m.a[s] = a ? a + first * m.a_stride[s] + offset[s] : nullptr;
          }
          const int64_t row = run.row + first;
          m.c = (last ? g.c : sums) + row * m.c_stride + column;
          const T* const before = first_pass ? g.c_in : sums;
          m.c_in = before ? before + row * m.c_in_stride + column : nullptr;
          m.residual = last && g.residual ? g.residual + row * g.residual_stride + column : nullptr;
          tile.rows[rows](m);
          if (last && late_act) activate(g.act, m.c, g.c_stride, rows, width);
          first += rows;
        }
      }
      n += width;
    }
  }
}

// ---- Tiles ----------------------------------------------------------------------------------------------------------

// Cuts `rows` image rows (of all images) of `width` pixels into tiles of about kTilePixels consecutive pixels: whole
// rows, or a segment of one row where rows are long. Enough tiles for every thread where there are enough rows.
struct Tiling {
  int64_t rows, width, segments, tiles;
  Tiling(int64_t rows_, int64_t width_, int threads, int64_t tile_pixels = kTilePixels) : rows(rows_), width(width_) {
    segments = width <= kWholeRows ? 1 : ceil_div(width, tile_pixels);
    if (segments > 1) {
      tiles = rows * segments;
      return;
    }
    tiles = ceil_div(rows * width, tile_pixels);
    if (tiles < threads) tiles = threads;
    if (tiles < 8 * threads) tiles = round_up(tiles, threads);  // no thread with one tile more than another's few
    if (tiles > rows) tiles = rows;
  }
  struct Tile {
    int64_t row0, row1, column0, column1;
    int64_t pixel(int64_t width) const { return row0 * width + column0; }
    int64_t columns() const { return column1 - column0; }
    int64_t pixels() const { return (row1 - row0) * columns(); }
  };
  Tile tile(int64_t i) const {
    if (segments > 1) {
      const int64_t row = i / segments, s = i % segments;
      return {row, row + 1, s * width / segments, (s + 1) * width / segments};
    }
    return {i * rows / tiles, (i + 1) * rows / tiles, 0, width};
  }
  int64_t max_rows() const { return segments > 1 ? 1 : tiles ? ceil_div(rows, tiles) : 0; }
  int64_t max_columns() const { return ceil_div(width, segments); }
  int64_t max_pixels() const { return max_rows() * max_columns(); }
};

// Elements between the rows of a scratch matrix of `columns` columns: a cache line more where rows a power of two apart
// would fight for the same few sets of L1.
template <class T>
int64_t spread(int64_t columns) {
  return columns * static_cast<int64_t>(sizeof(T)) % 512 == 0 ? columns + panel_width<T>() : columns;
}

// Whether rows have to be copied before they can be an operand: to convert them, or because rows `stride` apart share
// one set of L1.
template <class S, class T>
bool must_copy(int64_t stride) {
  return !Same<S, T>::value || stride * static_cast<int64_t>(sizeof(T)) % 4096 == 0;
}

#include "pieces.inl.h"

// Pieces of one scratch buffer, each on its own cache line.
struct Carver {
  char* base = nullptr;  // null while sizes are being added up
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    const int64_t end = used + n * static_cast<int64_t>(sizeof(T));
    used = round_up(end, 64) + kScratchGap;
    if (base) forbid(base + end, base + used);
    return piece;
  }
};

// ---- PConv ----------------------------------------------------------------------------------------------------------

template <class S>
struct Image {
  const S* data;
  int64_t batch_stride, channel_stride, row_stride, pixel_stride;
  const S* at(int64_t image, int64_t row, int64_t column) const {
    return data + image * batch_stride + row * row_stride + column * pixel_stride;
  }
};
template <class S>
Image<S> image(const void* data, const int64_t (&stride)[4]) {
  return {static_cast<const S*>(data), stride[0], stride[1], stride[2], stride[3]};
}
template <class S>
Image<S> channels_last(const void* data, int64_t height, int64_t width, int64_t pixel_stride) {
  return {static_cast<const S*>(data), height * width * pixel_stride, 1, width * pixel_stride, pixel_stride};
}

// out[columns][channels]: columns c0 .. c0 + columns - 1 of row `row` (of all images).
template <class S, class T>
void load_row(const Image<S>& x, int64_t height, int64_t row, int64_t c0, int64_t columns, int64_t channels, T* out) {
  const S* source = x.at(row / height, row % height, c0);
  for (int64_t column = 0; column < columns; ++column, source += x.pixel_stride, out += channels) {
    if (x.channel_stride == 1) {
      combine<T>(source, static_cast<const T*>(nullptr), out, channels);
    } else {
      for (int64_t c = 0; c < channels; ++c) out[c] = to_compute(source[c * x.channel_stride]);
    }
  }
}

// A 3x3 convolution as one GEMM and a sum. The GEMM makes, for every pixel, what it contributes to its left neighbour,
// itself and its right neighbour: N = 3 c_partial, K = 3 segments of c_partial, one per kernel row. Three outputs a
// channel fill the vectors where c_partial alone does not (10 channels are 30 of 32 lanes), A is x itself, and zero
// padding costs nothing: a kernel row outside the image is a segment left out, a column a term of the sum.
//
// u[pixel][c] = sums[pixel - 1][right neighbour] + sums[pixel][itself] + sums[pixel + 1][left neighbour], for one row
// of `columns` pixels; `sums` starts at the pixel before the first where `before`, and goes on to the one after the
// last where `after`. Packed outputs are in the order of the kernel's columns: column 0 weighs the pixel to the left.
template <class T>
void add_columns(const T* sums, int64_t sums_stride, int64_t columns, bool before, bool after, int64_t c_partial, T* u,
                 int64_t u_stride) {
  constexpr int kBytes = FASTERNET_VECTOR_BYTES < kPanelBytes / 2 ? FASTERNET_VECTOR_BYTES : kPanelBytes / 2;
  using V = typename VecOf<T, kBytes>::type;
  for (int64_t column = 0; column < columns; ++column, u += u_stride, sums += sums_stride) {
    const T* const middle = sums + (before ? sums_stride : 0);
    const T* const left = column > 0 || before ? middle - sums_stride : nullptr;
    const T* const right = column + 1 < columns || after ? middle + sums_stride : nullptr;
    for (int64_t c = 0; c < c_partial; c += VecOf<T, kBytes>::kLanes) {  // the lanes beyond c_partial are not used
      V sum = load<V>(middle + c_partial + c);
      if (left) sum = load<V>(left + c) + sum;
      if (right) sum += load<V>(right + 2 * c_partial + c);
      store(u + c, sum);
    }
  }
}

// The same convolution by Winograd's F(2, 3) down the rows and F(4, 3) along them (arXiv 1509.09308, with the points 0,
// 1, -1, 2, -2 and infinity): 2 x 4 outputs from 4 x 6 inputs by 24 multiplications in place of 72. The 24 products are
// GEMMs with K = N = c_partial and a row for every 2 x 4 outputs. The patches lie on a grid from the image's corner on,
// so an output's bits depend neither on the tile nor on the batch.
//
// 2 x 4 and not 4 x 4, which needs 36 multiplications for twice the outputs: a tile of two image rows is whole patches,
// and the products have twice the rows for each weight read.
constexpr int kPatchRows = 2, kPatchColumns = 4;
static_assert((kPatchRows + 2) * (kPatchColumns + 2) == kWinogradProducts, "pack.cpp packs other patches");

// The 1-D transforms, in place: of 4 and 6 inputs, to 2 and 4 outputs.
template <class V>
inline __attribute__((always_inline)) void transform_input(V& d0, V& d1, V& d2, V& d3) {
  const V a = d1 + d2, b = d2 - d1;
  d0 -= d2;
  d3 = d1 - d3;
  d1 = a;
  d2 = b;
}
template <class V>
inline __attribute__((always_inline)) void transform_input(V& d0, V& d1, V& d2, V& d3, V& d4, V& d5) {
  const V a = d4 - 4 * d2, b = d3 - 4 * d1, c = d4 - d2, d = 2 * (d3 - d1);
  d0 = 4 * (d0 - d2) + c;
  d5 = 4 * (d1 - d3) + (d5 - d3);
  d1 = a + b;
  d2 = a - b;
  d3 = c + d;
  d4 = c - d;
}
template <class V>
inline __attribute__((always_inline)) void transform_output(V& m0, V& m1, const V& m2, const V& m3) {
  m0 += m1 + m2;
  m1 -= m2 + m3;
}
template <class V>
inline __attribute__((always_inline)) void transform_output(V& m0, V& m1, V& m2, V& m3, const V& m4, const V& m5) {
  const V a = m1 + m2, b = m1 - m2, c = m3 + m4, d = m3 - m4;
  m0 += a + c;
  m1 = b + 2 * d;
  m2 = a + 4 * c;
  m3 = b + 8 * d + m5;
}

template <class T>
struct WinogradTile {
  int64_t c_partial;
  const T* packed;  // null: not used; else 24 packed weights
  T *inputs, *products;
  static constexpr int kProducts = kWinogradProducts;

  int64_t stride() const { return spread<T>(c_partial); }
  static int64_t max_patches(const Tiling& tiling) {
    return (tiling.max_rows() / kPatchRows + tiling.max_rows() + 1) * (tiling.max_columns() / kPatchColumns + 2);
  }
  void carve(Carver* carver, const Tiling& tiling) {
    const int64_t patches = packed ? max_patches(tiling) : 0;
    inputs = carver->take<T>(kProducts * patches * stride());
    products = carver->take<T>(kProducts * patches * stride());
  }

  // f(row, column, patch) of every patch with outputs in the tile, by the row and column of its first output.
  template <class F>
  static int64_t for_patches(const Tiling::Tile& t, int64_t height, const F& f) {
    int64_t patch = 0;
    for (int64_t row = t.row0; row < t.row1;) {
      const int64_t h = row % height, first = row - h % kPatchRows;
      for (int64_t column = t.column0 / kPatchColumns * kPatchColumns; column < t.column1; column += kPatchColumns) {
        f(first, column, patch++);
      }
      row = first + clip(kPatchRows, height - (h - h % kPatchRows));
    }
    return patch;
  }

  template <int kBytes>
  void load_patch(const Image<T>& x, int64_t height, int64_t width, int64_t row, int64_t column, T* out,
                  int64_t out_stride) const {
    using V = typename VecOf<T, kBytes>::type;
    const int64_t h = row % height;
    const T* const corner = x.at(row / height, h, column) - x.row_stride - x.pixel_stride;
    const bool inner = h > 0 && h + 2 < height && column > 0 && column + 4 < width;
    for (int64_t c = 0; c < c_partial; c += VecOf<T, kBytes>::kLanes) {
      V d[kPatchRows + 2][kPatchColumns + 2];
      FASTERNET_UNROLL
      for (int j = 0; j < kPatchColumns + 2; ++j) {
        FASTERNET_UNROLL
        for (int i = 0; i < kPatchRows + 2; ++i) {
          const bool inside = inner || (h + i >= 1 && h + i <= height && column + j >= 1 && column + j <= width);
          d[i][j] = inside ? load<V>(corner + i * x.row_stride + j * x.pixel_stride + c) : V{};
        }
        transform_input(d[0][j], d[1][j], d[2][j], d[3][j]);
      }
      FASTERNET_UNROLL
      for (int i = 0; i < kPatchRows + 2; ++i) {
        transform_input(d[i][0], d[i][1], d[i][2], d[i][3], d[i][4], d[i][5]);
        FASTERNET_UNROLL
        for (int j = 0; j < kPatchColumns + 2; ++j)
          store(out + (i * (kPatchColumns + 2) + j) * out_stride + c, d[i][j]);
      }
    }
  }

  template <int kBytes>
  void store_patch(const T* in, int64_t in_stride, const Tiling::Tile& t, int64_t row, int64_t row1, int64_t column,
                   T* u, int64_t u_stride) const {
    using V = typename VecOf<T, kBytes>::type;
    for (int64_t c = 0; c < c_partial; c += VecOf<T, kBytes>::kLanes) {
      V m[kPatchRows + 2][kPatchColumns + 2];
      FASTERNET_UNROLL
      for (int i = 0; i < kPatchRows + 2; ++i) {
        FASTERNET_UNROLL
        for (int j = 0; j < kPatchColumns + 2; ++j)
          m[i][j] = load<V>(in + (i * (kPatchColumns + 2) + j) * in_stride + c);
        transform_output(m[i][0], m[i][1], m[i][2], m[i][3], m[i][4], m[i][5]);
      }
      FASTERNET_UNROLL
      for (int j = 0; j < kPatchColumns; ++j) {
        transform_output(m[0][j], m[1][j], m[2][j], m[3][j]);
        if (column + j < t.column0 || column + j >= t.column1) continue;
        FASTERNET_UNROLL
        for (int i = 0; i < kPatchRows; ++i) {
          if (row + i < t.row0 || row + i >= row1) continue;
          store(u + ((row + i - t.row0) * t.columns() + column + j - t.column0) * u_stride + c, m[i][j]);
        }
      }
    }
  }

  // The PConv of tile t of x into u; `next` is the weight read after it.
  void run(const Image<T>& x, int64_t height, int64_t width, const Tiling::Tile& t, T* u, int64_t u_stride,
           const Packed<T>* next) const {
    constexpr int kWide = FASTERNET_VECTOR_BYTES, kNarrow = kHalfBytes;
    const bool wide = c_partial % VecOf<T, kWide>::kLanes == 0;
    // Patches are counted first: a product's rows are then dense.
    const int64_t patches = for_patches(t, height, [](int64_t, int64_t, int64_t) {});
    const int64_t matrix = patches * stride();
    for_patches(t, height, [&](int64_t row, int64_t column, int64_t patch) {
      T* const out = inputs + patch * stride();
      wide ? load_patch<kWide>(x, height, width, row, column, out, matrix)
           : load_patch<kNarrow>(x, height, width, row, column, out, matrix);
    });
    const int64_t weight = packed_elements(c_partial, c_partial, sizeof(T));
    for (int p = 0; p < kProducts; ++p) {
      const Packed<T> w(packed + p * weight, c_partial, c_partial), after(w.next(), c_partial, c_partial);
      Gemm<T> g = {};
      g.set_a(inputs + p * matrix, stride(), c_partial, patches);
      g.b = &w;
      g.n_end = w.n_padded;
      g.c = products + p * matrix;
      g.c_stride = stride();
      if (p + 1 < kProducts) {
        g.then(after, 0, 0);
      } else if (next) {
        g.then(*next, 0, 0);
      }
      gemm(g);
    }
    for_patches(t, height, [&](int64_t row, int64_t column, int64_t patch) {
      const int64_t row1 = clip(t.row1, row - row % height + height);
      const T* const in = products + patch * stride();
      wide ? store_patch<kWide>(in, matrix, t, row, row1, column, u, u_stride)
           : store_patch<kNarrow>(in, matrix, t, row, row1, column, u, u_stride);
    });
  }
};

// The buffers of a tile's PConv.
template <class S, class T>
struct PConvTile {
  int64_t c_partial, c_out;  // of x and of u: the same, but where threads share the channels of u
  Packed<T> w;               // 3 c_out outputs of depth 3 c_partial
  int64_t u_stride, sums_stride;
  T *rows, *sums, *u;  // rows: of x, converted where A cannot be x itself
  Run<T>* runs;
  WinogradTile<T> winograd;

  PConvTile(const void* packed, int64_t c_partial_) : PConvTile(packed, c_partial_, c_partial_) {}
  PConvTile(const void* packed, int64_t c_partial_, int64_t c_out_)
      : c_partial(c_partial_), c_out(c_out_), w(static_cast<const T*>(packed), 3 * c_out_, 3 * c_partial_), winograd() {
    u_stride = padded_n(c_out, sizeof(T));
    sums_stride = spread<T>(w.n_padded);
  }
  // Allows the fast tier, whose weights are `packed`.
  void allow_fast(const T* packed, const Image<S>& x, int64_t height, int64_t width) {
    const bool can = Same<S, float>::value && x.channel_stride == 1;
    if (can && fast_tier_pays(c_partial, height, width)) winograd = {c_partial, packed, nullptr, nullptr};
  }
  // A product has a row for eight outputs: with the direct method's tiles it would have too few to pay for its weights.
  int64_t tile_pixels() const { return winograd.packed ? 2 * kTilePixels : kTilePixels; }
  static bool copies(const Image<S>& x) { return x.channel_stride != 1 || must_copy<S, T>(x.pixel_stride); }
  void carve(Carver* carver, const Image<S>& x, const Tiling& tiling) {
    const int64_t columns = tiling.max_columns() + 2, pixels = tiling.max_rows() * columns;
    winograd.carve(carver, tiling);
    rows = carver->take<T>(copies(x) ? pixels * c_partial + 2 * columns * c_partial : 0);
    sums = carver->take<T>(winograd.packed ? 0 : pixels * sums_stride + panel_width<T>());
    u = carver->take<T>(tiling.max_pixels() * u_stride);
    runs = carver->take<Run<T>>(tiling.max_rows());
  }

  // The PConv of tile t of x into u; `then` is the weight read after it, `ahead` what is fetched meanwhile.
  void run(const Image<S>& x, int64_t height, int64_t width, const Tiling::Tile& t, int64_t total_rows,
           const Packed<T>* then, Ahead* ahead = nullptr) {
    if constexpr (Same<S, float>::value) {
      if (winograd.packed) return winograd.run(x, height, width, t, u, u_stride, then);
    }
    const bool before = t.column0 > 0, after = t.column1 < width;
    const int64_t c0 = t.column0 - before, columns = t.column1 + after - c0;
    const bool copy = copies(x);
    const int64_t first = t.row0 > 0 ? t.row0 - 1 : 0;
    const int64_t stride = copy ? c_partial : x.pixel_stride;
    const bool rows_join = copy || x.row_stride == columns * stride;
    if (copy) {
      for (int64_t row = first; row <= clip(t.row1, total_rows - 1); ++row) {
        load_row(x, height, row, c0, columns, c_partial, rows + (row - first) * columns * c_partial);
      }
    }
    const auto at = [&](int64_t row) -> const T* {
      if constexpr (Same<S, T>::value) {
        if (!copy) return x.at(row / height, row % height, c0);
      }
      return rows + (row - first) * columns * c_partial;
    };
    Gemm<T> g = {};
    g.runs = runs;
    g.n_segments = 3;
    for (int s = 0; s < 3; ++s) {
      g.segment_k[s] = c_partial;
      g.segment_stride[s] = stride;
    }
    // Rows inside an image follow each other at one stride: they are one run.
    for (int64_t row = t.row0; row < t.row1;) {
      const int64_t h = row % height;
      const bool inside = rows_join && h > 0 && h + 1 < height;
      const int64_t rows_left = inside ? clip(t.row1 - row, height - 1 - h) : 1;
      runs[g.n_runs++] = {{h > 0 ? at(row - 1) : nullptr, at(row), h + 1 < height ? at(row + 1) : nullptr},
                          (row - t.row0) * columns,
                          rows_left * columns};
      row += rows_left;
    }
    g.b = &w;
    g.n_end = w.n_padded;
    g.c = sums;
    g.c_stride = sums_stride;
    if (then) g.then(*then, 0, 0);
    g.ahead = ahead;
    gemm(g);
    for (int64_t row = 0; row < t.row1 - t.row0; ++row) {
      add_columns(sums + row * columns * sums_stride, sums_stride, t.columns(), before, after, c_out,
                  u + row * t.columns() * u_stride, u_stride);
    }
  }
};

// y[.., :c_partial] of one image row from u.
template <class S, class T>
void store_partial(const T* u, int64_t u_stride, int64_t columns, int64_t c_partial, S* y, int64_t channel_stride,
                   int64_t pixel_stride) {
  for (int64_t column = 0; column < columns; ++column, u += u_stride, y += pixel_stride) {
    if (channel_stride == 1) {
      for (int64_t c = 0; c < c_partial; ++c) to_storage(u[c], y + c);
    } else {
      for (int64_t c = 0; c < c_partial; ++c) to_storage(u[c], y + c * channel_stride);
    }
  }
}

template <class S>
void copy_channels(const S* x, int64_t x_channel, int64_t x_pixel, S* y, int64_t y_channel, int64_t y_pixel,
                   int64_t columns, int64_t channels) {
  if (x_channel == 1 && y_channel == 1) {
    for (int64_t i = 0; i < columns; ++i) {
      __builtin_memcpy(y + i * y_pixel, x + i * x_pixel, static_cast<size_t>(channels) * sizeof(S));
    }
  } else if (x_pixel == 1 && y_pixel == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      __builtin_memcpy(y + c * y_channel, x + c * x_channel, static_cast<size_t>(columns) * sizeof(S));
    }
  } else {
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t c = 0; c < channels; ++c) y[i * y_pixel + c * y_channel] = x[i * x_pixel + c * x_channel];
    }
  }
}

template <class S, class T>
void pconv3x3_out_of_place(const PConv3x3& args, const ParallelFor& parallel) {
  const Image<S> x = image<S>(args.x, args.x_stride), y = image<S>(args.y, args.y_stride);
  const int64_t total_rows = args.batch * args.height;
  const Tiling tiling(total_rows, args.width, parallel.num_threads);
  parallel_for(parallel, tiling.tiles, [&](int64_t begin, int64_t end) {
    PConvTile<S, T> pconv(args.packed, args.c_partial);
    if (args.fast) pconv.allow_fast(pconv.w.next(), x, args.height, args.width);
    Carver carver;
    for (int round = 0; round < 2; ++round) {
      if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
      pconv.carve(&carver, x, tiling);
    }
    for (int64_t i = begin; i < end; ++i) {
      const Tiling::Tile t = tiling.tile(i);
      pconv.run(x, args.height, args.width, t, total_rows, nullptr);
      for (int64_t row = t.row0; row < t.row1; ++row) {
        const S* from = x.at(row / args.height, row % args.height, t.column0);
        S* to = const_cast<S*>(y.at(row / args.height, row % args.height, t.column0));
        store_partial<S, T>(pconv.u + (row - t.row0) * t.columns() * pconv.u_stride, pconv.u_stride, t.columns(),
                            args.c_partial, to, y.channel_stride, y.pixel_stride);
        copy_channels<S>(from + args.c_partial * x.channel_stride, x.channel_stride, x.pixel_stride,
                         to + args.c_partial * y.channel_stride, y.channel_stride, y.pixel_stride, t.columns(),
                         args.channels - args.c_partial);
      }
    }
  });
}

// In place, each thread owns a run of rows and goes down it with a window of three copies, so a row is copied before
// the one above it is overwritten. The rows just outside a run are overwritten by its neighbours at any time; they are
// copied before any thread starts.
template <class S, class T>
void pconv3x3_in_place(const PConv3x3& args, const ParallelFor& parallel) {
  const Image<S> x = image<S>(args.x, args.x_stride);
  S* const y = static_cast<S*>(args.y);
  const int64_t height = args.height, width = args.width, c_partial = args.c_partial;
  const Packed<T> w(static_cast<const T*>(args.packed), 3 * c_partial, 3 * c_partial);
  const int64_t total_rows = args.batch * height;
  const int64_t runs = parallel.num_threads < total_rows ? parallel.num_threads : total_rows;
  if (runs <= 0) return;
  const int64_t row_size = width * c_partial;
  const auto run_begin = [&](int64_t run) { return run * total_rows / runs; };
  T* const outside = static_cast<T*>(scratch(kSlotShared, 2 * runs * row_size * static_cast<int64_t>(sizeof(T))));
  for (int64_t run = 0; run < runs; ++run) {
    const int64_t above = run_begin(run) - 1, below = run_begin(run + 1);
    if (above >= 0) load_row(x, height, above, 0, width, c_partial, outside + 2 * run * row_size);
    if (below < total_rows) load_row(x, height, below, 0, width, c_partial, outside + (2 * run + 1) * row_size);
  }
  const int64_t u_stride = padded_n(c_partial, sizeof(T)), sums_stride = spread<T>(w.n_padded);
  parallel_for(parallel, runs, [&](int64_t begin, int64_t end) {
    T *window, *sums, *u;
    Carver carver;
    for (int round = 0; round < 2; ++round) {
      if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
      window = carver.take<T>(3 * row_size);
      sums = carver.take<T>(width * sums_stride + panel_width<T>());
      u = carver.take<T>(width * u_stride);
    }
    Gemm<T> g = {};
    g.n_segments = 3;
    for (int s = 0; s < 3; ++s) g.segment_k[s] = g.segment_stride[s] = c_partial;
    g.b = &w;
    g.n_end = w.n_padded;
    g.c = sums;
    g.c_stride = sums_stride;
    for (int64_t run = begin; run < end; ++run) {
      const int64_t row0 = run_begin(run), row1 = run_begin(run + 1);
      const auto copy_of = [&](int64_t row) { return window + (row - row0) % 3 * row_size; };
      load_row(x, height, row0, 0, width, c_partial, copy_of(row0));
      for (int64_t row = row0; row < row1; ++row) {
        const int64_t h = row % height;
        if (row + 1 < row1) load_row(x, height, row + 1, 0, width, c_partial, copy_of(row + 1));
        const T* const above = row > row0 ? copy_of(row - 1) : outside + 2 * run * row_size;
        const T* const below = row + 1 < row1 ? copy_of(row + 1) : outside + (2 * run + 1) * row_size;
        g.all = {{h > 0 ? above : nullptr, copy_of(row), h + 1 < height ? below : nullptr}, 0, width};
        gemm(g);
        add_columns(sums, sums_stride, width, false, false, c_partial, u, u_stride);
        store_partial<S, T>(u, u_stride, width, c_partial, y + row / height * x.batch_stride + h * x.row_stride,
                            x.channel_stride, x.pixel_stride);
      }
    }
  });
}

template <class S, class T>
void pconv3x3_as(const PConv3x3& args, const ParallelFor& parallel) {
  if (args.x == args.y) {
    pconv3x3_in_place<S, T>(args, parallel);
  } else {
    pconv3x3_out_of_place<S, T>(args, parallel);
  }
}

// ---- PConv + pointwise, and the block -------------------------------------------------------------------------------

// dst[pixels][channels] = src[pixels][..], converted.
template <class S, class T>
void load_rows(const S* source, int64_t source_stride, int64_t rows, int64_t channels, T* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, source += source_stride, out += out_stride) {
    combine<T>(source, static_cast<const T*>(nullptr), out, channels);
  }
}
template <class S, class T>
void store_rows(const T* values, int64_t stride, int64_t rows, int64_t channels, S* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; ++r, values += stride, out += out_stride) {
    combine<T>(values, static_cast<const T*>(nullptr), out, channels);
  }
}

// The A operand [u | x[:, c_partial:]] of some pixels as rows of two segments.
template <class S, class T>
struct MixedRows {
  int64_t c_partial, channels, u_stride;
  T* rest = nullptr;  // x[:, c_partial:] copied, where it has to be converted or its rows share the same sets of L1

  int64_t rest_stride() const { return spread<T>(channels - c_partial); }
  void carve(Carver* carver, int64_t pixel_stride, int64_t pixels) {
    rest = carver->take<T>(must_copy<S, T>(pixel_stride) ? pixels * rest_stride() : 0);
  }
  // Copies pixels [pixel, pixel + pixels) of x, where they have to be.
  void load(const S* x, int64_t pixel_stride, int64_t pixel, int64_t pixels) const {
    if (!must_copy<S, T>(pixel_stride)) return;
    load_rows<S, T>(x + pixel * pixel_stride + c_partial, pixel_stride, pixels, channels - c_partial,
                    rest + pixel * rest_stride(), rest_stride());
  }
  // After load.
  void fill(Gemm<T>* g, const T* u, const S* x, int64_t pixel_stride, int64_t pixels) const {
    g->set_a(u, u_stride, c_partial, pixels);
    if (channels == c_partial) return;
    g->n_segments = 2;
    g->segment_k[1] = channels - c_partial;
    if (must_copy<S, T>(pixel_stride)) {
      g->all.a[1] = rest;
      g->segment_stride[1] = rest_stride();
    } else if constexpr (Same<S, T>::value) {
      g->all.a[1] = x + c_partial;
      g->segment_stride[1] = pixel_stride;
    }
  }
};

// Columns [n, n + chunk) of an operand with n_padded columns, in nearly equal chunks of whole panels.
template <class T>
int64_t chunk_width(int64_t n_padded, int64_t most) {
  const int64_t chunks = ceil_div(n_padded, most);
  return round_up(ceil_div(n_padded, chunks), panel_width<T>());
}

// Of a small image, tiles would give every thread few pixels, all weights to read for them, and image rows that do not
// divide evenly. Threads share the columns of the product with w instead, unless that gives one of them more to do.
template <class T>
bool shares_columns(const Tiling& tiling, const Packed<T>& w, const ParallelFor& parallel) {
  const int64_t threads = parallel.num_threads, pixels = tiling.rows * tiling.width, width = panel_width<T>();
  if (threads <= 1 || pixels < 1 || pixels >= kFewPixels * threads || w.n * w.k < kManyWeights) return false;
  const int64_t columns = ceil_div(ceil_div(w.n_padded, width), threads) * width;
  return columns * pixels <= tiling.max_pixels() * w.n_padded;
}

// f(n0, n1) on all columns of w.
template <class T, class F>
void share_columns(const ParallelFor& parallel, const Packed<T>& w, const F& f) {
  const int64_t width = panel_width<T>();
  parallel_pieces(parallel, ceil_div(w.n_padded, width), kPiecePanels,
                  [&](int64_t begin, int64_t end, bool) { f(begin * width, clip(end * width, w.n_padded)); });
}
// f(part) on gemms that together are `whole`, of all columns.
template <class T, class F>
void share_gemm(const ParallelFor& parallel, const Gemm<T>& whole, const F& f) {
  share_columns(parallel, *whole.b, [&](int64_t n0, int64_t n1) {
    Gemm<T> part = whole;
    part.n_begin = n0;
    part.n_end = n1;
    if (whole.c) part.c += part.n_begin;
    if (whole.residual) part.residual += part.n_begin;
    f(part);
  });
}

// The A operand [u | x[:, c_partial:]] of all pixels, in memory that threads share.
template <class S, class T>
struct AllRows {
  const Image<S>* x;
  const Tiling* tiling;  // of the PConv
  int64_t height, pixels;
  MixedRows<S, T> mixed;
  T* u = nullptr;

  AllRows(const Image<S>& x_, const Tiling& tiling_, int64_t height_, int64_t channels, const PConvTile<S, T>& pconv)
      : x(&x_),
        tiling(&tiling_),
        height(height_),
        pixels(tiling_.rows * tiling_.width),
        mixed{pconv.c_partial, channels, pconv.u_stride} {}
  void carve(Carver* carver) {
    u = carver->take<T>(pixels * mixed.u_stride);
    mixed.carve(carver, x->pixel_stride, pixels);
  }
  void compute(const PConvTile<S, T>& pconv_of_tiles, const ParallelFor& parallel) const {
    parallel_for(parallel, tiling->tiles, [&](int64_t begin, int64_t end) {
      PConvTile<S, T> pconv = pconv_of_tiles;
      Carver carver;
      for (int round = 0; round < 2; ++round) {
        if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
        pconv.carve(&carver, *x, *tiling);
      }
      for (int64_t i = begin; i < end; ++i) {
        const Tiling::Tile t = tiling->tile(i);
        const int64_t pixel = t.pixel(tiling->width);
        mixed.load(x->data, x->pixel_stride, pixel, t.pixels());
        pconv.u = u + pixel * mixed.u_stride;
        pconv.run(*x, height, tiling->width, t, tiling->rows, nullptr);
      }
    });
  }
  void fill(Gemm<T>* g) const { mixed.fill(g, u, x->data, x->pixel_stride, pixels); }
};

template <class S, class T>
void pconv_pw_by_columns(const PConvPw& args, const Image<S>& x, const Tiling& tiling, const PConvTile<S, T>& pconv,
                         const Packed<T>& w_pw, const ParallelFor& parallel) {
  AllRows<S, T> rows(x, tiling, args.height, args.channels, pconv);
  Carver shared;
  for (int round = 0; round < 2; ++round) {
    if (round) shared = {static_cast<char*>(scratch(kSlotShared, shared.used)), 0};
    rows.carve(&shared);
  }
  rows.compute(pconv, parallel);
  Gemm<T> g = {};
  rows.fill(&g);
  g.b = &w_pw;
  g.shift = true;
  g.act = args.act;
  S* const y = static_cast<S*>(args.y);
  if constexpr (Same<S, T>::value) {
    if (w_pw.n == w_pw.n_padded) {
      g.c = y;
      g.c_stride = args.y_pixel_stride;
    }
  }
  share_gemm(parallel, g, [&](Gemm<T> part) {
    if (part.c) return gemm(part);
    const int64_t n = part.n_begin, stride = part.n_end - n;
    part.c = static_cast<T*>(scratch(kSlotTile, rows.pixels * stride * static_cast<int64_t>(sizeof(T))));
    part.c_stride = stride;
    gemm(part);
    store_rows<S, T>(part.c, stride, rows.pixels, clip(part.n_end, w_pw.n) - n, y + n, args.y_pixel_stride);
  });
}

template <class S, class T>
void pconv_pw_as(const PConvPw& args, const ParallelFor& parallel) {
  const Image<S> x = channels_last<S>(args.x, args.height, args.width, args.x_pixel_stride);
  PConvTile<S, T> pconv_of_tiles(args.packed, args.c_partial);
  const Packed<T> w_pw(pconv_of_tiles.w.next(), args.c_out, args.channels);
  if (args.fast) pconv_of_tiles.allow_fast(w_pw.next(), x, args.height, args.width);
  const int64_t total_rows = args.batch * args.height;
  const Tiling tiling(total_rows, args.width, parallel.num_threads, pconv_of_tiles.tile_pixels());
  if (shares_columns(tiling, w_pw, parallel)) {
    return pconv_pw_by_columns<S, T>(args, x, tiling, pconv_of_tiles, w_pw, parallel);
  }
  const bool direct = Same<S, T>::value && w_pw.n == w_pw.n_padded;  // the micro-kernel's stores are y itself
  const int64_t chunk = chunk_width<T>(w_pw.n_padded, kHiddenChunk);
  parallel_for(parallel, tiling.tiles, [&](int64_t begin, int64_t end) {
    T* out;
    PConvTile<S, T> pconv = pconv_of_tiles;
    MixedRows<S, T> mixed = {args.c_partial, args.channels, pconv.u_stride};
    Carver carver;
    for (int round = 0; round < 2; ++round) {
      if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
      pconv.carve(&carver, x, tiling);
      out = carver.take<T>(direct ? 0 : tiling.max_pixels() * chunk);
      mixed.carve(&carver, args.x_pixel_stride, tiling.max_pixels());
    }
    for (int64_t i = begin; i < end; ++i) {
      const Tiling::Tile t = tiling.tile(i);
      const int64_t pixel = t.pixel(args.width), pixels = t.pixels();
      pconv.run(x, args.height, args.width, t, total_rows, &w_pw);
      Gemm<T> g = {};
      const S* const x_tile = x.data + pixel * args.x_pixel_stride;
      mixed.load(x_tile, args.x_pixel_stride, 0, pixels);
      mixed.fill(&g, pconv.u, x_tile, args.x_pixel_stride, pixels);
      g.b = &w_pw;
      g.shift = true;
      g.act = args.act;
      S* const y = static_cast<S*>(args.y) + pixel * args.y_pixel_stride;
      for (int64_t n = 0; n < w_pw.n_padded; n += chunk) {
        g.n_begin = n;
        g.n_end = clip(n + chunk, w_pw.n_padded);
        g.c = out;
        g.c_stride = chunk;
        if constexpr (Same<S, T>::value) {
          if (direct) {
            g.c = y + n;
            g.c_stride = args.y_pixel_stride;
          }
        }
        gemm(g);
        if (!direct) {
          store_rows<S, T>(out, chunk, pixels, clip(n + chunk, w_pw.n) - n, y + n, args.y_pixel_stride);
        }
      }
    }
  });
}

// to = from + factor * sums.
template <class R, class T>
struct AddScaled {
  const R* from;
  T factor;
  const T* sums;
  R* to;
  template <class V>
  void run(int64_t j) const {
    store_as(load_as<V>(from + j) + factor * load_as<V>(sums + j), to + j);
  }
};
// y = residual + sample_scale * sums, in columns [n, n + columns) of `pixels` pixels from `pixel` on.
template <class R, class T>
void add_residual(const Block& args, int64_t pixel, int64_t pixels, int64_t n, int64_t columns, const T* sums,
                  int64_t stride) {
  const T* const sample_scale = static_cast<const T*>(args.sample_scale);
  for (int64_t p = pixel; p < pixel + pixels; ++p, sums += stride) {
    const R* const from = static_cast<const R*>(args.residual) + p * args.residual_pixel_stride + n;
    R* const to = static_cast<R*>(args.y) + p * args.y_pixel_stride + n;
    const T factor = sample_scale ? sample_scale[p / (args.height * args.width)] : T(1);
    for_columns<T>(columns, AddScaled<R, T>{from, factor, sums, to});
  }
}

template <class S, class R, class T>
void block_by_columns(const Block& args, const Image<S>& x, const Tiling& tiling, const PConvTile<S, T>& pconv,
                      const Packed<T>& w_pw1, const Packed<T>& w_pw2, const ParallelFor& parallel) {
  AllRows<S, T> rows(x, tiling, args.height, args.channels, pconv);
  const int64_t hidden_stride = spread<T>(w_pw1.n_padded);
  const bool direct = Same<R, T>::value && w_pw2.n == w_pw2.n_padded && !args.sample_scale;
  T* hidden;
  Carver shared;
  for (int round = 0; round < 2; ++round) {
    if (round) shared = {static_cast<char*>(scratch(kSlotShared, shared.used)), 0};
    rows.carve(&shared);
    hidden = shared.take<T>(rows.pixels * hidden_stride);
  }
  rows.compute(pconv, parallel);
  Gemm<T> expand = {};
  rows.fill(&expand);
  expand.b = &w_pw1;
  expand.c = hidden;
  expand.c_stride = hidden_stride;
  expand.shift = true;
  expand.act = args.act;
  share_gemm(parallel, expand, [](const Gemm<T>& part) { gemm(part); });
  Gemm<T> project = {};
  // K in passes like the tiles' chunks; not the padding: 0 * inf would be NaN.
  project.set_a(hidden, hidden_stride, args.c_hidden, rows.pixels);
  project.b = &w_pw2;
  if constexpr (Same<R, T>::value) {
    if (direct) {
      project.c = static_cast<R*>(args.y);
      project.c_stride = args.y_pixel_stride;
      project.residual = static_cast<const R*>(args.residual);
      project.residual_stride = args.residual_pixel_stride;
    }
  }
  share_gemm(parallel, project, [&](Gemm<T> part) {
    if (direct) return gemm(part);
    const int64_t n = part.n_begin, stride = part.n_end - n;
    part.c = static_cast<T*>(scratch(kSlotTile, rows.pixels * stride * static_cast<int64_t>(sizeof(T))));
    part.c_stride = stride;
    gemm(part);
    add_residual<R, T>(args, 0, rows.pixels, n, clip(part.n_end, w_pw2.n) - n, part.c, stride);
  });
}

// S: storage of x, R: of residual and y, T: compute type.
template <class S, class R, class T>
void block_as(const Block& args, const ParallelFor& parallel) {
  const Image<S> x = channels_last<S>(args.x, args.height, args.width, args.x_pixel_stride);
  const R* const residual = static_cast<const R*>(args.residual);
  R* const y = static_cast<R*>(args.y);
  PConvTile<S, T> pconv_of_tiles(args.packed, args.c_partial);
  const Packed<T> w_pw1(pconv_of_tiles.w.next(), args.c_hidden, args.channels);
  const Packed<T> w_pw2(w_pw1.next(), args.channels, args.c_hidden);
  if (args.fast) pconv_of_tiles.allow_fast(w_pw2.next(), x, args.height, args.width);
  const int64_t total_rows = args.batch * args.height;
  const Tiling tiling(total_rows, args.width, parallel.num_threads, pconv_of_tiles.tile_pixels());
  if (shares_columns(tiling, w_pw1, parallel) && shares_columns(tiling, w_pw2, parallel)) {
    return block_by_columns<S, R, T>(args, x, tiling, pconv_of_tiles, w_pw1, w_pw2, parallel);
  }
  const int64_t chunk = chunk_width<T>(w_pw1.n_padded, kHiddenChunk);
  const int64_t hidden_stride = spread<T>(chunk), sums_stride = spread<T>(w_pw2.n_padded);
  const bool direct = Same<R, T>::value && w_pw2.n == w_pw2.n_padded && !args.sample_scale;
  const bool needs_sums = !direct || chunk < w_pw1.n_padded;
  parallel_for(parallel, tiling.tiles, [&](int64_t begin, int64_t end) {
    T *hidden, *sums;
    PConvTile<S, T> pconv = pconv_of_tiles;
    MixedRows<S, T> mixed = {args.c_partial, args.channels, pconv.u_stride};
    Carver carver;
    for (int round = 0; round < 2; ++round) {
      if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
      pconv.carve(&carver, x, tiling);
      hidden = carver.take<T>(tiling.max_pixels() * hidden_stride);
      sums = carver.take<T>(needs_sums ? tiling.max_pixels() * sums_stride : 0);
      mixed.carve(&carver, args.x_pixel_stride, tiling.max_pixels());
    }
    for (int64_t i = begin; i < end; ++i) {
      const Tiling::Tile t = tiling.tile(i);
      const int64_t pixel = t.pixel(args.width), pixels = t.pixels();
      Ahead ahead;
      if (i + 1 < end) {
        const int64_t after = tiling.tile(i + 1).pixels();
        ahead.add(x.data, args.x_pixel_stride, pixel + pixels, after);
        ahead.add(y, args.y_pixel_stride, pixel + pixels, after);
      }
      pconv.run(x, args.height, args.width, t, total_rows, &w_pw1);
      Gemm<T> expand = {};
      const S* const x_tile = x.data + pixel * args.x_pixel_stride;
      mixed.load(x_tile, args.x_pixel_stride, 0, pixels);
      mixed.fill(&expand, pconv.u, x_tile, args.x_pixel_stride, pixels);
      expand.b = &w_pw1;
      expand.c = hidden;
      expand.c_stride = hidden_stride;
      expand.shift = true;
      expand.act = args.act;
      expand.ahead = &ahead;
      Gemm<T> project = {};
      project.b = &w_pw2;
      project.n_end = w_pw2.n_padded;
      project.c = sums;
      project.c_stride = sums_stride;
      project.c_in_stride = sums_stride;
      project.ahead = &ahead;
      for (int64_t n = 0; n < w_pw1.n_padded; n += chunk) {
        expand.n_begin = n;
        expand.n_end = clip(n + chunk, w_pw1.n_padded);
        expand.then(w_pw2, 0, n);
        gemm(expand);
        project.k_begin = n;
        // Not the padding: 0 * inf would be NaN.
        project.set_a(hidden, hidden_stride, clip(n + chunk, args.c_hidden) - n, pixels);
        project.c_in = n == 0 ? nullptr : sums;
        if constexpr (Same<R, T>::value) {
          if (direct && n + chunk >= w_pw1.n_padded) {
            project.c = y + pixel * args.y_pixel_stride;
            project.c_stride = args.y_pixel_stride;
            project.residual = residual + pixel * args.residual_pixel_stride;
            project.residual_stride = args.residual_pixel_stride;
          }
        }
        if (n + chunk < w_pw1.n_padded) {
          project.then(w_pw1, n + chunk, 0);
        } else {
          project.then(pconv.w, 0, 0);
        }
        gemm(project);
      }
      if (!direct) add_residual<R, T>(args, pixel, pixels, 0, args.channels, sums, sums_stride);
    }
  });
}

// ---- Patch convolution ----------------------------------------------------------------------------------------------

// One kernel row of `columns` patches, the first at `source`: patches[column][dx][channel], `depth` from patch to
// patch. kWidth and kChannels are width and channels where they are known to the compiler (FasterNet's stem), else 0.
template <int kWidth, int kChannels, class S, class T>
void load_patch_rows(const S* source, const Image<S>& x, int64_t columns, int64_t width, int64_t channels,
                     int64_t depth, T* patches) {
  for (int64_t column = 0; column < columns; ++column, patches += depth) {
    if constexpr (kWidth > 0 && kChannels > 0) {
      FASTERNET_UNROLL
      for (int dx = 0; dx < kWidth; ++dx, source += x.pixel_stride) {
        FASTERNET_UNROLL
        for (int c = 0; c < kChannels; ++c) patches[dx * kChannels + c] = to_compute(source[c * x.channel_stride]);
      }
    } else {  // Clang warns of loops it is told to unroll and cannot
      for (int64_t dx = 0; dx < width; ++dx, source += x.pixel_stride) {
        for (int64_t c = 0; c < channels; ++c) patches[dx * channels + c] = to_compute(source[c * x.channel_stride]);
      }
    }
  }
}

// The patches of tile t of the output as rows of (kernel row, kernel column, channel), `stride` elements apart.
template <class S, class T>
void load_patches(const Image<S>& x, const Tiling::Tile& t, int64_t out_height, int64_t kh, int64_t kw,
                  int64_t channels, int64_t stride, T* patches) {
  const bool dense = x.channel_stride == 1 && x.pixel_stride == channels, stem = kw == 4 && channels == 3;
  for (int64_t row = t.row0; row < t.row1; ++row, patches += t.columns() * stride) {
    for (int64_t dy = 0; dy < kh; ++dy) {
      const S* const source = x.at(row / out_height, row % out_height * kh + dy, t.column0 * kw);
      T* const first = patches + dy * kw * channels;
      if (dense) {
        load_rows<S, T>(source, kw * channels, t.columns(), kw * channels, first, stride);
      } else if (stem) {
        load_patch_rows<4, 3>(source, x, t.columns(), 4, 3, stride, first);
      } else {
        load_patch_rows<0, 0>(source, x, t.columns(), kw, channels, stride, first);
      }
    }
  }
}

// Tiles [begin, end) and columns [n0, n1) of y. finish(i) follows when tile i is written, still in the caches.
template <class S, class T, class F>
void patch_conv_tiles(const PatchConv& args, const Tiling& tiling, int64_t begin, int64_t end, int64_t n0, int64_t n1,
                      const F& finish) {
  const Image<S> x = image<S>(args.x, args.x_stride);
  const int64_t out_height = args.height / args.kh, out_width = args.width / args.kw;
  const int64_t run = args.kw * args.channels, depth = args.kh * run;
  const Packed<T> w(static_cast<const T*>(args.packed), args.c_out, depth);
  const bool direct = Same<S, T>::value && w.n == w.n_padded;
  // In dense channels-last memory a row of a patch is one run of K and neighbouring patches are neighbouring runs.
  const bool in_runs = Same<S, T>::value && (x.channel_stride == 1 || args.channels == 1) &&
                       x.pixel_stride == args.channels && args.kh <= kMaxSegments;
  const int64_t chunk = chunk_width<T>(w.n_padded, kHiddenChunk);
  T *patches, *out;
  Run<T>* runs;
  Carver carver;
  for (int round = 0; round < 2; ++round) {
    if (round) carver = {static_cast<char*>(scratch(kSlotTile, carver.used)), 0};
    patches = carver.take<T>(in_runs ? 0 : tiling.max_pixels() * depth);
    out = carver.take<T>(direct ? 0 : tiling.max_pixels() * chunk);
    runs = carver.take<Run<T>>(in_runs ? tiling.max_rows() : 0);
  }
  for (int64_t i = begin; i < end; ++i) {
    const Tiling::Tile t = tiling.tile(i);
    const int64_t pixels = t.pixels(), columns = t.columns();
    Gemm<T> g = {};
    Ahead ahead;
    if (i + 1 < end) {
      const Tiling::Tile next = tiling.tile(i + 1);
      if (in_runs && next.columns() == out_width) {
        ahead.add(x.at(next.row0 / out_height, next.row0 % out_height * args.kh, 0), args.channels, 0,
                  (next.row1 - next.row0) * args.kh * args.width);
      }
      ahead.add(static_cast<const S*>(args.y), args.y_pixel_stride, next.pixel(out_width), next.pixels());
    }
    g.ahead = &ahead;
    if constexpr (Same<S, T>::value) {
      if (in_runs) {
        g.n_segments = static_cast<int>(args.kh);
        for (int s = 0; s < g.n_segments; ++s) g.segment_k[s] = g.segment_stride[s] = run;
        g.runs = runs;
        for (int64_t row = t.row0; row < t.row1; ++row) {
          Run<T>& of_row = runs[g.n_runs++];
          of_row = {{}, (row - t.row0) * columns, columns};
          for (int s = 0; s < g.n_segments; ++s) {
            of_row.a[s] = x.at(row / out_height, row % out_height * args.kh + s, t.column0 * args.kw);
          }
        }
      }
    }
    if (!in_runs) {
      load_patches(x, t, out_height, args.kh, args.kw, args.channels, depth, patches);
      g.set_a(patches, depth, depth, pixels);
    }
    g.b = &w;
    g.shift = true;
    S* const y = static_cast<S*>(args.y) + t.pixel(out_width) * args.y_pixel_stride;
    for (int64_t n = n0; n < n1; n += chunk) {
      g.n_begin = n;
      g.n_end = clip(n + chunk, n1);
      g.c = out;
      g.c_stride = chunk;
      if constexpr (Same<S, T>::value) {
        if (direct) {
          g.c = y + n;
          g.c_stride = args.y_pixel_stride;
        }
      }
      gemm(g);
      if (!direct) store_rows<S, T>(out, chunk, pixels, clip(g.n_end, w.n) - n, y + n, args.y_pixel_stride);
    }
    finish(i);
  }
}

template <class S, class T>
void patch_conv_as(const PatchConv& args, const ParallelFor& parallel) {
  const auto finish = [](int64_t) {};
  const int64_t rows = args.batch * (args.height / args.kh), columns = args.width / args.kw;
  const Packed<T> w(static_cast<const T*>(args.packed), args.c_out, args.kh * args.kw * args.channels);
  const Tiling tiling(rows, columns, parallel.num_threads);
  if (shares_columns(tiling, w, parallel)) {
    const Tiling together(rows, columns, 1);
    share_columns(parallel, w, [&](int64_t n0, int64_t n1) {
      patch_conv_tiles<S, T>(args, together, 0, together.tiles, n0, n1, finish);
    });
    return;
  }
  parallel_for(parallel, tiling.tiles, [&](int64_t begin, int64_t end) {
    patch_conv_tiles<S, T>(args, tiling, begin, end, 0, w.n_padded, finish);
  });
}

// ---- Head -----------------------------------------------------------------------------------------------------------

// out[rows][out_stride] = act(a[rows][w.k] * w + shift), threads share the columns.
template <class T>
void dense(const T* a, int64_t rows, const Packed<T>& w, Act act, T* out, const ParallelFor& parallel) {
  constexpr int64_t kTileColumns = panel_width<T>() * FASTERNET_PANELS;
  parallel_for(parallel, ceil_div(w.n_padded, kTileColumns), [&](int64_t begin, int64_t end) {
    Gemm<T> g = {};
    g.set_a(a, w.k, w.k, rows);
    g.b = &w;
    g.depth = kHeadDepth;
    g.n_begin = begin * kTileColumns;
    g.n_end = clip(end * kTileColumns, w.n_padded);
    g.c = out + g.n_begin;
    g.c_stride = w.n_padded;
    g.shift = true;
    g.act = act;
    gemm(g);
  });
}

template <class S, class T>
void head_as(const Head& args, const ParallelFor& parallel) {
  if (args.batch <= 0) return;
  const Packed<T> w_mid(static_cast<const T*>(args.packed), args.c_mid, args.channels);
  const Packed<T> w_out(w_mid.next(), args.c_out, args.c_mid);
  const int64_t area = args.height * args.width;
  Carver carver;
  T *pooled, *mid, *out;
  for (int round = 0; round < 2; ++round) {
    if (round) carver = {static_cast<char*>(scratch(kSlotShared, carver.used)), 0};
    pooled = carver.take<T>(args.batch * args.channels);
    mid = carver.take<T>(args.batch * w_mid.n_padded);
    out = carver.take<T>(args.batch * w_out.n_padded);
  }
  const S* const x = static_cast<const S*>(args.x);
  const auto pool = [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      T* const mean = pooled + b * args.channels;
      for (int64_t c = 0; c < args.channels; ++c) mean[c] = 0;
      for (int64_t p = 0; p < area; ++p) {
        const S* source = x + (b * area + p) * args.x_pixel_stride;
        for (int64_t c = 0; c < args.channels; ++c) mean[c] += to_compute(source[c]);
      }
      for (int64_t c = 0; c < args.channels; ++c) mean[c] /= static_cast<T>(area);
    }
  };
  if (args.batch == 1) {
    pool(0, 1);  // a few microseconds: not worth waking a thread
  } else {
    parallel_for(parallel, args.batch, pool);
  }
  dense<T>(pooled, args.batch, w_mid, args.act, mid, parallel);
  // w_out's rows are c_mid long; mid's may be padded.
  if (w_mid.n_padded != w_mid.n) {
    for (int64_t b = 0; b < args.batch; ++b) {
      for (int64_t c = 0; c < w_mid.n; ++c) mid[b * w_mid.n + c] = mid[b * w_mid.n_padded + c];
    }
  }
  dense<T>(mid, args.batch, w_out, Act::kIdentity, out, parallel);
  store_rows<S, T>(out, w_out.n_padded, args.batch, args.c_out, static_cast<S*>(args.y), args.c_out);
}

// ---- The table ------------------------------------------------------------------------------------------------------

template <class Args>
using Operator = void (*)(const Args&, const ParallelFor&);

template <class Args>
void by_dtype(DType dtype, const Args& args, const ParallelFor& parallel, Operator<Args> f32, Operator<Args> f64,
              Operator<Args> bfloat16) {
  switch (dtype) {
    case DType::kFloat32:
      return f32(args, parallel);
    case DType::kFloat64:
      return f64(args, parallel);
    case DType::kBFloat16:
      return bfloat16(args, parallel);
  }
}
void pconv3x3(const PConv3x3& args, const ParallelFor& parallel) {
  by_dtype<PConv3x3>(args.dtype, args, parallel, pconv3x3_as<float, float>, pconv3x3_as<double, double>,
                     pconv3x3_as<bf16, float>);
}
void pconv_pw(const PConvPw& args, const ParallelFor& parallel) {
  by_dtype<PConvPw>(args.dtype, args, parallel, pconv_pw_as<float, float>, pconv_pw_as<double, double>,
                    pconv_pw_as<bf16, float>);
}
void block(const Block& args, const ParallelFor& parallel) {
  const bool wide = args.residual_dtype == DType::kFloat32;
  by_dtype<Block>(args.dtype, args, parallel, block_as<float, float, float>, block_as<double, double, double>,
                  wide ? block_as<bf16, float, float> : block_as<bf16, bf16, float>);
}
void patch_conv(const PatchConv& args, const ParallelFor& parallel) {
  by_dtype<PatchConv>(args.dtype, args, parallel, patch_conv_as<float, float>, patch_conv_as<double, double>,
                      patch_conv_as<bf16, float>);
}
void head(const Head& args, const ParallelFor& parallel) {
  by_dtype<Head>(args.dtype, args, parallel, head_as<float, float>, head_as<double, double>, head_as<bf16, float>);
}

#include "peak.inl.h"
#include "training.inl.h"

}  // namespace FASTERNET_ISA_NAMESPACE

extern const Kernels FASTERNET_KERNELS;
const Kernels FASTERNET_KERNELS = {FASTERNET_ISA,
                                   FASTERNET_ISA_NAMESPACE::pconv3x3,
                                   FASTERNET_ISA_NAMESPACE::pconv_pw,
                                   FASTERNET_ISA_NAMESPACE::block,
                                   FASTERNET_ISA_NAMESPACE::patch_conv,
                                   FASTERNET_ISA_NAMESPACE::head,
                                   FASTERNET_ISA_NAMESPACE::pw_stats,
                                   FASTERNET_ISA_NAMESPACE::pw_stats_backward,
                                   FASTERNET_ISA_NAMESPACE::bn_act,
                                   FASTERNET_ISA_NAMESPACE::act_pw_residual,
                                   FASTERNET_ISA_NAMESPACE::act_pw_residual_backward,
                                   FASTERNET_ISA_NAMESPACE::pconv3x3_backward,
                                   FASTERNET_ISA_NAMESPACE::patch_stats,
                                   FASTERNET_ISA_NAMESPACE::patch_conv_backward,
                                   FASTERNET_ISA_NAMESPACE::fma_loop};

}  // namespace fasternet
