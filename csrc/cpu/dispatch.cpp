// Chooses the instruction set once, forwards the public operators to its kernels, and owns what is per process or per
// thread: the selection and the scratch.
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace fasternet {
namespace {

struct IsaEntry {
  Isa isa;
  const char* name;
  const Kernels* kernels;  // null where not compiled in
};

const IsaEntry kIsas[] = {
    {Isa::kGeneric, "generic", &kKernelsGeneric},
#ifdef FASTERNET_HAVE_X86
    {Isa::kAvx2, "avx2", &kKernelsAvx2},
    {Isa::kAvx512, "avx512", &kKernelsAvx512},
#else
    {Isa::kAvx2, "avx2", nullptr},
    {Isa::kAvx512, "avx512", nullptr},
#endif
#ifdef FASTERNET_HAVE_NEON
    {Isa::kNeon, "neon", &kKernelsNeon},
#else
    {Isa::kNeon, "neon", nullptr},
#endif
};

bool runs_here(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
    case Isa::kNeon:  // compiled in on AArch64 alone, where it is part of the baseline
      return true;
#ifdef FASTERNET_HAVE_X86
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
#endif
    default:
      return false;
  }
}

const Kernels& select() {
  const Kernels* fastest = nullptr;
  std::string available;
  const char* wanted = std::getenv("FASTERNET_KERNELS_ISA");
  for (const IsaEntry& entry : kIsas) {
    if (!entry.kernels || !runs_here(entry.isa)) continue;
    if (wanted && *wanted && std::string(wanted) == entry.name) return *entry.kernels;
    fastest = entry.kernels;
    available += available.empty() ? entry.name : std::string(", ") + entry.name;
  }
  if (wanted && *wanted) {
    throw std::runtime_error("FASTERNET_KERNELS_ISA is '" + std::string(wanted) +
                             "', expected one that this machine has: " + available);
  }
  return *fastest;
}

// A buffer of at most kSmall bytes stays. A larger one stays while it is at most twice what calls have needed lately, a
// maximum that fades by an eighth with each call: after one large call among small ones, it goes with the sixth of
// these. Above kLarge, where FasterNet-L in double on 16 images of 224x224 is not yet, it goes with the call: there may
// be no next one, and giving the memory to the process anew costs little beside computing on so much.
constexpr int64_t kSmall = int64_t{32} << 20, kLarge = int64_t{128} << 20;

// A buffer that fills half a huge page is made of whole ones, where Linux grants them: kernels go through rows that are
// kilobytes apart, in more pages of the usual size than the processor keeps addresses of.
constexpr int64_t kHugePage = int64_t{2} << 20;
int64_t size_of_buffer(int64_t bytes) { return bytes < kHugePage / 2 ? bytes : (bytes + kHugePage - 1) & -kHugePage; }
std::align_val_t alignment(int64_t size) { return std::align_val_t(size >= kHugePage ? kHugePage : 64); }
void* new_buffer(int64_t size) {
  void* const data = ::operator new(static_cast<size_t>(size), alignment(size));
#ifdef MADV_HUGEPAGE
  if (size >= kHugePage) madvise(data, static_cast<size_t>(size), MADV_HUGEPAGE);  // refused, it is slower
#endif
  return data;
}

struct ThreadScratch {
  void* data[kSlotCount] = {};
  int64_t bytes[kSlotCount] = {};
  int64_t needed[kSlotCount] = {};  // lately
  void trim() {
    for (int slot = 0; slot < kSlotCount; ++slot) {
      if (bytes[slot] > kLarge || (bytes[slot] > kSmall && bytes[slot] > 2 * needed[slot])) release(slot);
      needed[slot] -= needed[slot] / 8;
    }
  }
  void release(int slot) {
    ::operator delete(data[slot], alignment(bytes[slot]));
    data[slot] = nullptr;
    bytes[slot] = 0;
  }
  ~ThreadScratch() {
    for (int slot = 0; slot < kSlotCount; ++slot) release(slot);
  }
};
thread_local ThreadScratch thread_scratch;

void run_serially(void*, int64_t n, ParallelFor::Body body, void* body_context) {
  if (n > 0) body(body_context, 0, n);
}

}  // namespace

Act parse_act(const std::string& name) {
  static const char* const kNames[] = {"identity", "relu", "gelu", "gelu_tanh", "silu", "hardswish"};
  for (int i = 0; i < 6; ++i) {
    if (name == kNames[i]) return static_cast<Act>(i);
  }
  throw std::invalid_argument("act is '" + name +
                              "', expected one of identity, relu, gelu, gelu_tanh, silu, hardswish");
}

const char* isa_name(Isa isa) { return kIsas[static_cast<int>(isa)].name; }

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const IsaEntry& entry : kIsas) {
    if (entry.kernels && runs_here(entry.isa)) isas.push_back(entry.isa);
  }
  return isas;
}

const Kernels& kernels() {
  static const Kernels& selected = select();  // a throwing initialisation is tried again at the next call
  return selected;
}

Isa selected_isa() { return kernels().isa; }

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

ParallelFor serial() { return {run_serially, nullptr, 1}; }

void* scratch(Slot slot, int64_t bytes) {
  ThreadScratch& mine = thread_scratch;
  if (mine.needed[slot] < bytes) mine.needed[slot] = bytes;
  if (mine.bytes[slot] < bytes) {
    mine.release(slot);
    const int64_t size = size_of_buffer(bytes);
    mine.data[slot] = new_buffer(size);
    mine.bytes[slot] = size;
  }
#ifdef FASTERNET_GUARD_SCRATCH
  char* const data = static_cast<char*>(mine.data[slot]);
  __asan_unpoison_memory_region(data, static_cast<size_t>(bytes));
  if (bytes > 0) std::memset(data, 0xFF, static_cast<size_t>(bytes));  // NaN in every type
  forbid(data + bytes, data + mine.bytes[slot]);
#endif
  return mine.data[slot];
}

TrimScratch::~TrimScratch() { thread_scratch.trim(); }

void pconv3x3(const PConv3x3& args, const ParallelFor& parallel) { kernels().pconv3x3(args, parallel); }
void pconv_pw(const PConvPw& args, const ParallelFor& parallel) {
  const TrimScratch at_end;
  kernels().pconv_pw(args, parallel);
}
void block(const Block& args, const ParallelFor& parallel) {
  const TrimScratch at_end;
  kernels().block(args, parallel);
}
void patch_conv(const PatchConv& args, const ParallelFor& parallel) { kernels().patch_conv(args, parallel); }
void head(const Head& args, const ParallelFor& parallel) {
  const TrimScratch at_end;
  kernels().head(args, parallel);
}
void pw_stats(const PwStats& args, const ParallelFor& parallel) {
  const TrimScratch at_end;
  kernels().pw_stats(args, parallel);
}
void pw_stats_backward(const PwStatsBackward& args, const ParallelFor& parallel) {
  const TrimScratch at_end;
  kernels().pw_stats_backward(args, parallel);
}
void bn_act(const BnAct& args, const ParallelFor& parallel) { kernels().bn_act(args, parallel); }
void act_pw_residual(const ActPwResidual& args, const ParallelFor& parallel) {
  const TrimScratch at_end;
  kernels().act_pw_residual(args, parallel);
}
void act_pw_residual_backward(const ActPwResidualBackward& args, const ParallelFor& parallel) {
  const TrimScratch at_end;
  kernels().act_pw_residual_backward(args, parallel);
}
void pconv3x3_backward(const PConv3x3Backward& args, const ParallelFor& parallel) {
  const TrimScratch at_end;
  kernels().pconv3x3_backward(args, parallel);
}
void patch_stats(const PatchStats& args, const ParallelFor& parallel) {
  const TrimScratch at_end;
  kernels().patch_stats(args, parallel);
}
void patch_conv_backward(const PatchConvBackward& args, const ParallelFor& parallel) {
  const TrimScratch at_end;
  kernels().patch_conv_backward(args, parallel);
}

}  // namespace fasternet
