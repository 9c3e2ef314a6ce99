// The functions of cuda/warp.cuh on a CPU, so that the CUDA kernels can be tested where there is no GPU. Threads are
// fibers: each runs until a barrier, or an instruction that a warp computes together, holds it up. Then the first
// thread that can go on does, so one block is as far ahead of the others as the barriers let it be. Copies that were
// started happen when they are waited for, as late as they may.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define FASTERNET_DEVICE inline
#define FASTERNET_GLOBAL(threads) void
#define FASTERNET_UNROLL

namespace fasternet::cuda {

namespace host {

constexpr int kWarp = 32;
constexpr size_t kStack = 1 << 16;

// What a number of threads waits for together.
struct Barrier {
  int size = 0, arrived = 0;
  int64_t passed = 0;
};

struct Warp {
  Barrier barrier;
  const void* row[kWarp];
  uint32_t a[kWarp][4], b[kWarp][2];
};

struct Block {
  int64_t index = 0;
  Barrier barrier;
  std::vector<unsigned char> memory;
  unsigned char* shared = nullptr;
  std::vector<Warp> warps;
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  Block* block = nullptr;
  int thread = 0;
  std::vector<Copy> copies;
  Barrier* barrier = nullptr;  // held up until it has passed `target` times
  int64_t target = 0;
  bool done = false;
};

struct State {
  ucontext_t scheduler;
  Fiber* current = nullptr;
  Barrier cluster;
  std::function<void()> kernel;
  std::exception_ptr error;
};

inline State& state() {
  static State one;
  return one;
}

inline void wait(Barrier* barrier) {
  Fiber* const fiber = state().current;
  const int64_t target = barrier->passed + 1;
  if (++barrier->arrived == barrier->size) {
    barrier->arrived = 0;
    ++barrier->passed;
  }
  fiber->barrier = barrier, fiber->target = target;
  swapcontext(&fiber->context, &state().scheduler);
}

inline void fiber_main() {
  try {
    state().kernel();
  } catch (...) {
    state().error = std::current_exception();
  }
  state().current->done = true;
}

// A function of its own: getcontext may return twice.
[[gnu::noinline]] inline void prepare(Fiber* fiber) {
  fiber->stack.reset(new unsigned char[kStack]);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = &state().scheduler;
  makecontext(&fiber->context, fiber_main, 0);
}

// Runs `kernel` as `blocks` blocks of `threads` threads in clusters of `split`. The last blocks run first if
// `reversed`.
inline void run(int64_t blocks, int split, int threads, int64_t shared, bool reversed, std::function<void()> kernel) {
  State& s = state();
  s.kernel = std::move(kernel);
  for (int64_t first = 0; first < blocks; first += split) {
    s.cluster = Barrier{split * threads, 0, 0};
    std::vector<Block> cluster(static_cast<size_t>(split));
    std::vector<Fiber> fibers(static_cast<size_t>(split * threads));
    for (int b = 0; b < split; ++b) {
      Block& block = cluster[static_cast<size_t>(b)];
      block.index = first + b;
      block.barrier.size = threads;
      block.memory.assign(static_cast<size_t>(shared) + 16, 0xff);  // NaN in any 16-bit format
      block.shared = block.memory.data() + (16 - reinterpret_cast<uintptr_t>(block.memory.data()) % 16) % 16;
      block.warps.resize(static_cast<size_t>(threads / kWarp));
      for (Warp& warp : block.warps) warp.barrier.size = kWarp;
    }
    for (size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[i];
      const int index = static_cast<int>(reversed ? fibers.size() - 1 - i : i);
      fiber.block = &cluster[static_cast<size_t>(index / threads)];
      fiber.thread = index % threads;
      prepare(&fiber);
    }
    for (size_t next = 0, done = 0; done < fibers.size();) {
      Fiber& fiber = fibers[next];
      if (fiber.done || (fiber.barrier != nullptr && fiber.barrier->passed < fiber.target)) {
        if (++next == fibers.size()) throw std::runtime_error("all threads wait for one another");
        continue;
      }
      fiber.barrier = nullptr;
      s.current = &fiber;
      swapcontext(&s.scheduler, &fiber.context);
      if (s.error) std::rethrow_exception(std::exchange(s.error, nullptr));
      if (fiber.done) ++done;
      // Only a barrier that has just passed can free a thread before this one.
      if (fiber.done || fiber.barrier->passed >= fiber.target) next = 0;
    }
  }
}

inline Warp& warp() {
  Fiber& fiber = *state().current;
  return fiber.block->warps[static_cast<size_t>(fiber.thread / kWarp)];
}

inline float widen(uint32_t pair, int half) {  // bfloat16
  const uint32_t bits = half == 0 ? pair << 16 : pair & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t narrow(float value) {  // to bfloat16, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return std::isnan(value) ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

}  // namespace host

inline int thread_index() { return host::state().current->thread; }
inline int64_t block_index() { return host::state().current->block->index; }
inline unsigned char* shared_memory() { return host::state().current->block->shared; }

template <int kBytes>
void copy_async(void* shared, const void* global, bool inside) {
  if (reinterpret_cast<uintptr_t>(shared) % kBytes != 0 || reinterpret_cast<uintptr_t>(global) % kBytes != 0) {
    throw std::runtime_error("a copy is not aligned");
  }
  host::state().current->copies.push_back({shared, inside ? global : nullptr, kBytes});
}

inline void copy_wait() {
  for (const host::Copy& copy : host::state().current->copies) {
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, copy.bytes);
    } else {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
  host::state().current->copies.clear();
}

inline void block_barrier() { host::wait(&host::state().current->block->barrier); }
inline void cluster_barrier() { host::wait(&host::state().cluster); }

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  host::Warp& warp = host::warp();
  const int lane = thread_index() % host::kWarp;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) throw std::runtime_error("a matrix row is not aligned");
  warp.row[lane] = row;
  host::wait(&warp.barrier);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const unsigned char* const from = static_cast<const unsigned char*>(warp.row[matrix * 8 + lane / 4]);
    std::memcpy(&to[matrix], from + lane % 4 * 4, 4);
  }
  host::wait(&warp.barrier);
}

template <bool kBFloat16>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(kBFloat16, "float16 differs in one PTX suffix only");
  host::Warp& warp = host::warp();
  const int lane = thread_index() % host::kWarp;
  std::memcpy(warp.a[lane], a, sizeof a);
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  host::wait(&warp.barrier);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t pair_a = warp.a[row % 8 * 4 + k % 8 / 2][k / 8 * 2 + row / 8];
      const uint32_t pair_b = warp.b[column * 4 + k % 8 / 2][k / 8];
      d[i] += host::widen(pair_a, k % 2) * host::widen(pair_b, k % 2);
    }
  }
  host::wait(&warp.barrier);
}

template <bool kBFloat16>
uint32_t round_pair(float low, float high) {
  return host::narrow(low) | host::narrow(high) << 16;
}

}  // namespace fasternet::cuda
