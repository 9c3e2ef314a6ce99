// Private to csrc: what the objects of the instruction sets, dispatch and packing share. Nothing here is compiled into
// instruction-set dependent code that a linker could merge.
#pragma once

#include "fasternet_cpu.h"
#ifdef FASTERNET_GUARD_SCRATCH
#include <sanitizer/asan_interface.h>
#endif

namespace fasternet {

// The kernels of one instruction set.
struct Kernels {
  Isa isa;
  void (*pconv3x3)(const PConv3x3&, const ParallelFor&);
  void (*pconv_pw)(const PConvPw&, const ParallelFor&);
  void (*block)(const Block&, const ParallelFor&);
  void (*patch_conv)(const PatchConv&, const ParallelFor&);
  void (*head)(const Head&, const ParallelFor&);
  void (*pw_stats)(const PwStats&, const ParallelFor&);
  void (*pw_stats_backward)(const PwStatsBackward&, const ParallelFor&);
  void (*bn_act)(const BnAct&, const ParallelFor&);
  void (*act_pw_residual)(const ActPwResidual&, const ParallelFor&);
  void (*act_pw_residual_backward)(const ActPwResidualBackward&, const ParallelFor&);
  void (*pconv3x3_backward)(const PConv3x3Backward&, const ParallelFor&);
  void (*patch_stats)(const PatchStats&, const ParallelFor&);
  void (*patch_conv_backward)(const PatchConvBackward&, const ParallelFor&);
  int64_t (*fma_loop)(int64_t iterations, float a, float b, float* sink);  // peak.inl.h
};
extern const Kernels kKernelsGeneric;
#ifdef FASTERNET_HAVE_X86
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif
#ifdef FASTERNET_HAVE_NEON
extern const Kernels kKernelsNeon;
#endif
const Kernels& kernels();  // those of selected_isa()

// Width of a panel of packed weights: one cache line. A last panel may be half as wide.
constexpr int64_t kPanelBytes = 64;

// Output channels rounded up to half panels, and the elements a packed weight takes.
static inline int64_t padded_n(int64_t n, int64_t element_size) {
  const int64_t half = kPanelBytes / 2 / element_size;
  return (n + half - 1) / half * half;
}
static inline int64_t packed_elements(int64_t n, int64_t k, int64_t element_size) {
  const int64_t line = kPanelBytes / element_size;
  return (padded_n(n, element_size) * (k + 1) + line - 1) / line * line;
}

// The fast tier's weights of a PConv: kWinogradProducts packed weights with n = k = c_partial. The vectors of its
// transforms are of 8 channels. Where it is allowed it is worth a few percent of a block: PConv is an eighth of it, and
// small images have more of a patch in the padding. On 7x7 it is slower. `python -m bench blocks` sets both tiers
// beside each other, and bench/results has the rows.
constexpr int kWinogradProducts = 24;
static inline bool has_winograd(int64_t c_partial) { return c_partial >= 24 && c_partial % 8 == 0; }
static inline bool winograd_pays(int64_t height, int64_t width) { return height >= 14 && width >= 14; }

// Memory of the calling thread, 64-byte aligned, kept for its next call: a call like one before allocates nothing. Each
// slot is one buffer; asking for more than before may move it.
enum Slot { kSlotTile, kSlotShared, kSlotProducts, kSlotNetworkA, kSlotNetworkB, kSlotCount };
void* scratch(Slot slot, int64_t bytes);

// The pieces that a buffer is cut into lie side by side, where the address sanitizer sees no end of any. Built for it,
// a gap that may not be touched follows each, as does what a buffer has beyond what was asked for; and scratch comes
// full of NaN, so that what is read before it is written shows in the result.
#ifdef FASTERNET_GUARD_SCRATCH
constexpr int64_t kScratchGap = 1024;
constexpr bool kScratchStays = false;  // NaN again at each request
static inline void forbid(const char* begin, const char* end) {
  __asan_poison_memory_region(begin, static_cast<size_t>(end - begin));
}
#else
constexpr int64_t kScratchGap = 0;
constexpr bool kScratchStays = true;  // a slot that is asked for again for as many bytes holds what it held
static inline void forbid(const char*, const char*) {}
#endif

// At its end, frees the buffers of the calling thread that are out of proportion. For the operators whose scratch grows
// with the batch or the threads: what one large call needed must not stay for the life of the thread, and yet a call
// like the one before must not allocate. dispatch.cpp has the rule.
struct TrimScratch {
  TrimScratch() = default;
  TrimScratch(const TrimScratch&) = delete;
  ~TrimScratch();
};

}  // namespace fasternet
