// x[:, :c_partial] = conv3x3(x[:, :c_partial], weight) in place, float16 or bfloat16 with float32 accumulation, zero
// padding 1, channels adjacent in memory (channels_last, or a channel slice of it).
//
// In place, no output may be stored while a neighbour still has to read the input under it. Here an image belongs to
// one cluster of blocks, each of which holds `rows` of its rows and one more above and below, first c_partial channels
// only, in shared memory. All blocks of the cluster read; a barrier of the cluster; then each computes and stores its
// rows. No scratch in global memory, no second launch. Without clusters (before sm_90) an image is one block's, where
// it fits.
//
// Per pixel 18 * c_partial^2 FLOPs and, each way, c_partial elements; the rows between two blocks are read twice, the
// second time from L2. The tensor cores see a GEMM of M = pixels, N = c_partial and K = 9 * c_partial, K in steps of
// 16: channels are padded with zeros to a multiple of 16 in shared memory, where a pixel takes 16 bytes more than that,
// an odd multiple of 16 in all, so that the rows of a matrix load lie in different banks. The zero border of the image
// is in shared memory too: a tap is one offset, the same for every pixel.
//
// Including this needs cuda/warp.cuh or csrc/tests/cuda_on_host.h before it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fasternet::cuda {

struct PConvInPlace {
  unsigned char* x;                      // 2 bytes an element
  const uint16_t* weight;                // (c_partial, c_partial, 3, 3), dense
  int64_t stride_b, stride_h, stride_w;  // bytes
  int height, width, c_partial;
  int split, rows;  // blocks of an image, image rows of each
};

constexpr int kPConvThreads = 256;
constexpr int kPConvMaxSteps = 4;  // c_partial <= 64: beyond, nine taps of weights take too much shared memory
constexpr int kPConvMaxSplit = 8;  // the largest cluster that every device can schedule

constexpr int kPConvPadding = 8;  // elements beyond the channels of a pixel, or of a tap's weights, in shared memory

// Bytes of shared memory of one block.
constexpr int64_t pconv_shared(int c_partial, int width, int rows) {
  const int channels = (c_partial + 15) / 16 * 16;
  const int64_t pitch = channels + kPConvPadding;
  return 2 * pitch * (static_cast<int64_t>(rows + 2) * (width + 2) + 9 * channels);
}

// Into how many blocks to cut an image, or 0 if none fits: as few as give every multiprocessor two blocks to work on,
// both resident, so that one's loads overlap with the other's arithmetic; else the most that there may be.
constexpr int pconv_split(int64_t batch, int height, int width, int c_partial, int64_t shared_limit,
                          int multiprocessors, bool clusters) {
  int found = 0;
  for (int split = 1; split <= (clusters ? kPConvMaxSplit : 1) && split <= height; split *= 2) {
    const int64_t shared = pconv_shared(c_partial, width, (height + split - 1) / split);
    if (shared > shared_limit) continue;
    found = split;
    if (2 * shared <= shared_limit && batch * split >= 2 * multiprocessors) break;
  }
  return found;
}

// Grid: batch * split blocks, clusters of `split`. kSteps = ceil(c_partial / 16); kCopy: bytes of one copy, which x,
// its strides and 2 * c_partial are multiples of.
template <bool kBFloat16, int kSteps, int kCopy>
FASTERNET_GLOBAL(kPConvThreads)
pconv3x3_inplace(const PConvInPlace a) {
  constexpr int kWarps = kPConvThreads / 32, kChannels = 16 * kSteps, kPitch = kChannels + kPConvPadding;
  constexpr int kCopies = 2 * kChannels / kCopy;  // of one pixel
  constexpr int kTiles = 2;                       // of 16 pixels that a warp computes at once
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int first_row = static_cast<int>(block_index() % a.split) * a.rows;
  const int left = a.height - first_row;  // a last block may have fewer rows, or none, but joins the barrier
  const int rows = left < 0 ? 0 : left < a.rows ? left : a.rows;
  const int wide = a.width + 2;
  unsigned char* const image = a.x + block_index() / a.split * a.stride_b;
  uint16_t* const weight = reinterpret_cast<uint16_t*>(shared_memory());  // [tap][output channel][input channel]
  uint16_t* const slab = weight + 9 * kChannels * kPitch;                 // [row][column][channel]

  for (int row = warp; rows > 0 && row < rows + 2; row += kWarps) {
    const int y = first_row + row - 1;
    for (int i = lane; i < wide * kCopies; i += 32) {
      const int column = i / kCopies, byte = i % kCopies * kCopy, x = column - 1;
      const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width && byte < 2 * a.c_partial;
      const unsigned char* const from = inside ? image + y * a.stride_h + x * a.stride_w + byte : image;
      copy_async<kCopy>(slab + (row * wide + column) * kPitch + byte / 2, from, inside);
    }
  }
  for (int i = thread_index(); i < kChannels * kChannels; i += kPConvThreads) {
    const int n = i / kChannels, k = i % kChannels;
    const bool inside = n < a.c_partial && k < a.c_partial;
    const uint16_t* const from = a.weight + (static_cast<int64_t>(n) * a.c_partial + k) * 9;
    FASTERNET_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      weight[(tap * kChannels + n) * kPitch + k] = inside ? from[tap] : static_cast<uint16_t>(0);
    }
  }
  copy_wait();
  block_barrier();
  if (a.split > 1) cluster_barrier();  // nobody stores before everybody has read

  // Rows of A are pixels: lane i addresses row i % 16, the second half of the lanes the second 8 channels. Rows of B
  // are output channels: matrices 0 and 1 are the two halves of a step for 8 of them, 2 and 3 for the next 8.
  const int row_a = lane % 16, offset_a = lane / 16 * 8;
  const int row_b = lane % 8 + lane / 16 * 8, offset_b = lane / 8 % 2 * 8;
  const uint16_t* const lane_weight = weight + row_b * kPitch + offset_b;
  const int pixels = rows * a.width;
  for (int first = warp * 16 * kTiles; first < pixels; first += kWarps * 16 * kTiles) {
    const uint16_t* from[kTiles];
    for (int tile = 0; tile < kTiles; ++tile) {
      const int pixel = first + tile * 16 + row_a < pixels ? first + tile * 16 + row_a : pixels - 1;
      from[tile] = slab + (pixel / a.width * wide + pixel % a.width) * kPitch + offset_a;
    }
    float sum[kTiles][2 * kSteps][4] = {};
    FASTERNET_UNROLL
    for (int tap = 0; tap < 9; ++tap) {
      const int offset = (tap / 3 * wide + tap % 3) * kPitch;
      FASTERNET_UNROLL
      for (int step = 0; step < kSteps; ++step) {
        uint32_t fragment[kTiles][4];
        for (int tile = 0; tile < kTiles; ++tile) load_matrices(fragment[tile], from[tile] + offset + 16 * step);
        FASTERNET_UNROLL
        for (int n = 0; n < kSteps; ++n) {
          uint32_t b[4];
          load_matrices(b, lane_weight + (tap * kChannels + 16 * n) * kPitch + 16 * step);
          for (int tile = 0; tile < kTiles; ++tile) {
            multiply_add<kBFloat16>(sum[tile][2 * n], fragment[tile], b[0], b[1]);
            multiply_add<kBFloat16>(sum[tile][2 * n + 1], fragment[tile], b[2], b[3]);
          }
        }
      }
    }
    // A lane has columns 2 * (lane % 4) and the next of rows lane / 4 and lane / 4 + 8.
    for (int part = 0; part < 2 * kTiles; ++part) {
      const int pixel = first + part * 8 + lane / 4;
      if (pixel >= pixels) continue;
      unsigned char* const to =
          image + (first_row + pixel / a.width) * a.stride_h + pixel % a.width * a.stride_w + lane % 4 * 4;
      FASTERNET_UNROLL
      for (int n = 0; n < 2 * kSteps; ++n) {
        if (8 * n + lane % 4 * 2 < a.c_partial) {
          const float* const d = sum[part / 2][n] + part % 2 * 2;
          *reinterpret_cast<uint32_t*>(to + 16 * n) = round_pair<kBFloat16>(d[0], d[1]);
        }
      }
    }
  }
}

}  // namespace fasternet::cuda
