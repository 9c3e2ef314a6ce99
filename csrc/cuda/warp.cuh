// The instructions of NVIDIA GPUs (sm_80 and later) that the kernels here are made of. csrc/tests/cuda_on_host.h has
// the same functions for the CPU, so that the kernels' tests need no GPU.
#pragma once

#include <cstdint>

#define FASTERNET_DEVICE __device__ __forceinline__
#define FASTERNET_GLOBAL(threads) __global__ void __launch_bounds__(threads)
#define FASTERNET_UNROLL _Pragma("unroll")

namespace fasternet::cuda {

FASTERNET_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTERNET_DEVICE int64_t block_index() { return blockIdx.x; }

// The block's dynamic shared memory, aligned to 16 bytes.
FASTERNET_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

FASTERNET_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts to copy kBytes (4, 8 or 16, and both pointers multiples of it) from global to shared memory; with `inside`
// false, zeros are written and nothing is read.
template <int kBytes>
FASTERNET_DEVICE void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(kBytes),
               "r"(inside ? kBytes : 0)
               : "memory");
}

// Waits for the copies that this thread has started.
FASTERNET_DEVICE void copy_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

FASTERNET_DEVICE void block_barrier() { __syncthreads(); }

// All threads of the cluster have arrived, and what they read and wrote before is done. For sm_90 and later; before
// that there are no clusters.
FASTERNET_DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8 and gets, of each matrix,
// elements 2 * (lane % 4) and the next of row lane / 4.
FASTERNET_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8, float32) += a (16x16) * b (16x8), a and b 16 bits wide.
template <bool kBFloat16>
FASTERNET_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two values rounded to nearest, the first in the low half.
template <bool kBFloat16>
FASTERNET_DEVICE uint32_t round_pair(float low, float high) {
  uint32_t pair;
  if constexpr (kBFloat16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

}  // namespace fasternet::cuda
