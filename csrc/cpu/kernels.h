// Private to csrc: what the objects of the instruction sets, dispatch and packing share. Nothing here is compiled into
// instruction-set dependent code that a linker could merge.
#pragma once

#include "fasternet_cpu.h"

namespace fasternet {

// The kernels of one instruction set.
struct Kernels {
  Isa isa;
  void (*pconv3x3)(const PConv3x3&, const ParallelFor&);
  void (*pconv_pw)(const PConvPw&, const ParallelFor&);
  void (*block)(const Block&, const ParallelFor&);
  void (*patch_conv)(const PatchConv&, const ParallelFor&);
  void (*head)(const Head&, const ParallelFor&);
};
extern const Kernels kKernelsGeneric;
#ifdef FASTERNET_HAVE_X86
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
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

// Memory of the calling thread that grows and is kept until the thread ends: a call after the first allocates nothing.
// 64-byte aligned. Each slot is one buffer; asking again for a slot may move it.
enum Slot { kSlotTile, kSlotShared, kSlotNetworkA, kSlotNetworkB, kSlotCount };
void* scratch(Slot slot, int64_t bytes);

}  // namespace fasternet
