// The operators' arithmetic in the most obvious loops, with double accumulation: what the kernels are judged against.
// Nothing here is fast, and nothing here shares code with the kernels.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "fasternet_cpu.h"

namespace fasternet {
namespace reference {

std::vector<double> conv(const std::vector<double>& x, int64_t batch, int64_t height, int64_t width, int64_t channels,
                         const std::vector<double>& weight, int64_t c_out, int64_t kh, int64_t kw, int64_t stride_h,
                         int64_t stride_w, int64_t pad) {
  const int64_t padded_height = height + 2 * pad, padded_width = width + 2 * pad;
  // Division truncates towards zero, so an image smaller than the kernel needs its own answer: no output.
  const int64_t out_height = padded_height < kh ? 0 : (padded_height - kh) / stride_h + 1;
  const int64_t out_width = padded_width < kw ? 0 : (padded_width - kw) / stride_w + 1;
  // The output channels of a pixel side by side, which compilers turn into vectors; each sum is in the order of K.
  std::vector<double> taps;  // (kh, kw, channels, c_out)
  taps.reserve(weight.size());
  for (int64_t i = 0; i < kh * kw; ++i) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t n = 0; n < c_out; ++n) taps.push_back(weight[static_cast<size_t>((n * channels + c) * kh * kw + i)]);
    }
  }
  std::vector<double> y(static_cast<size_t>(batch * out_height * out_width * c_out));
  double* sums = y.data();
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t oh = 0; oh < out_height; ++oh) {
      for (int64_t ow = 0; ow < out_width; ++ow, sums += c_out) {
        for (int64_t i = 0; i < kh; ++i) {
          const int64_t h = oh * stride_h + i - pad;
          if (h < 0 || h >= height) continue;
          for (int64_t j = 0; j < kw; ++j) {
            const int64_t w = ow * stride_w + j - pad;
            if (w < 0 || w >= width) continue;
            for (int64_t c = 0; c < channels; ++c) {
              const double value = x[static_cast<size_t>(((b * height + h) * width + w) * channels + c)];
              const double* const tap = taps.data() + ((i * kw + j) * channels + c) * c_out;
              for (int64_t n = 0; n < c_out; ++n) sums[n] += value * tap[n];
            }
          }
        }
      }
    }
  }
  return y;
}

double act(Act act, double value) {
  constexpr double kSqrtHalf = 0.70710678118654752440;
  constexpr double kSqrtTwoOverPi = 0.79788456080286535588;
  switch (act) {
    case Act::kIdentity:
      return value;
    case Act::kRelu:
      return value <= 0 ? 0.0 : value;  // this way round a NaN stays one
    case Act::kGelu:
      return 0.5 * value * std::erfc(-value * kSqrtHalf);  // erfc, because 1 + erf cancels for negative values
    case Act::kGeluTanh: {
      // 0.5 (1 + tanh t) is the logistic function of 2t, which does not cancel either.
      const double t = kSqrtTwoOverPi * (value + 0.044715 * value * value * value);
      return value / (1 + std::exp(-2 * t));
    }
    case Act::kSilu:
      return value / (1 + std::exp(-value));
    case Act::kHardswish:
      // Written so that a NaN fails both comparisons and reaches the product.
      return value * (value + 3 < 0 ? 0.0 : value + 3 > 6 ? 6.0 : value + 3) / 6;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

}  // namespace reference
}  // namespace fasternet
