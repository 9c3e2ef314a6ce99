// The launcher of pconv3x3_inplace.cuh, for ctypes: plain C, a stream, no torch. Nothing is allocated and nothing
// waits, so a launch can be captured in a CUDA graph.
#include <cuda_runtime.h>

#include <cstdint>

#include "warp.cuh"
// warp.cuh first
#include "pconv3x3_inplace.cuh"

namespace fasternet::cuda {
namespace {

using Kernel = void (*)(PConvInPlace);

template <bool kBFloat16, int kCopy>
Kernel kernel_for_steps(int steps) {
  switch (steps) {
    case 1:
      return pconv3x3_inplace<kBFloat16, 1, kCopy>;
    case 2:
      return pconv3x3_inplace<kBFloat16, 2, kCopy>;
    case 3:
      return pconv3x3_inplace<kBFloat16, 3, kCopy>;
    case 4:
      return pconv3x3_inplace<kBFloat16, 4, kCopy>;
    default:
      return nullptr;
  }
}

template <bool kBFloat16>
Kernel kernel_for(int steps, int copy) {
  return copy == 16  ? kernel_for_steps<kBFloat16, 16>(steps)
         : copy == 8 ? kernel_for_steps<kBFloat16, 8>(steps)
         : copy == 4 ? kernel_for_steps<kBFloat16, 4>(steps)
                     : nullptr;
}

cudaError_t launch(Kernel kernel, const PConvInPlace& args, int64_t batch, int64_t shared, cudaStream_t stream) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  const cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(args.split);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(batch * args.split));
  config.blockDim = dim3(kPConvThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = args.split > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace
}  // namespace fasternet::cuda

#define FASTERNET_EXPORT extern "C" __attribute__((visibility("default")))

// Runs on the current device. stride: of x's dimensions B, H, W in elements; its channels are adjacent. weight: dense.
// Returns a cudaError_t: 0; cudaErrorNotSupported, with nothing launched, where another kernel has to do it (c_partial
// odd or above 64, an alignment below 4 bytes, an image that does not fit); or what went wrong.
FASTERNET_EXPORT int fasternet_cuda_pconv3x3_inplace(void* x, const void* weight, int is_bfloat16, int64_t batch,
                                                     int64_t height, int64_t width, int64_t c_partial,
                                                     const int64_t* stride, void* stream) {
  using namespace fasternet::cuda;
  constexpr int64_t kMaxSide = 1 << 14;  // pixels, and with them offsets in shared memory, fit an int
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  if (c_partial < 1 || c_partial > 16 * kPConvMaxSteps || height > kMaxSide || width > kMaxSide ||
      batch > kMaxBlocks / kPConvMaxSplit) {
    return cudaErrorNotSupported;
  }
  if (batch <= 0 || height <= 0 || width <= 0) return cudaSuccess;
  // The widest copy that everything is a multiple of.
  const uint64_t bits = reinterpret_cast<uint64_t>(x) | static_cast<uint64_t>(2 * c_partial) |
                        static_cast<uint64_t>(2 * stride[0]) | static_cast<uint64_t>(2 * stride[1]) |
                        static_cast<uint64_t>(2 * stride[2]) | 16;
  const int steps = static_cast<int>(c_partial + 15) / 16, copy = static_cast<int>(bits & (~bits + 1));
  const Kernel kernel = is_bfloat16 != 0 ? kernel_for<true>(steps, copy) : kernel_for<false>(steps, copy);
  if (kernel == nullptr) return cudaErrorNotSupported;

  int device = 0, major = 0, limit = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  PConvInPlace args = {};
  args.x = static_cast<unsigned char*>(x);
  args.weight = static_cast<const uint16_t*>(weight);
  args.stride_b = 2 * stride[0], args.stride_h = 2 * stride[1], args.stride_w = 2 * stride[2];
  args.height = static_cast<int>(height), args.width = static_cast<int>(width);
  args.c_partial = static_cast<int>(c_partial);
  args.split = pconv_split(batch, args.height, args.width, args.c_partial, limit, multiprocessors, major >= 9);
  if (args.split == 0) return cudaErrorNotSupported;
  args.rows = (args.height + args.split - 1) / args.split;
  const int64_t shared = pconv_shared(args.c_partial, args.width, args.rows);
  error = launch(kernel, args, batch, shared, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) cudaGetLastError();  // not left for whoever asks next
  return error;
}

FASTERNET_EXPORT const char* fasternet_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
