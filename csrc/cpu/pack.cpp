// Packs weights into the panels that the micro-kernels stream (fasternet_cpu.h, "Packed weights").
#include <cstring>
#include <vector>

#include "kernels.h"

namespace fasternet {
namespace {

float widen(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// One weight that is to be packed: S is how it is stored, T how it is packed.
template <class S, class T>
struct Packing {
  static constexpr int64_t kWidth = kPanelBytes / static_cast<int64_t>(sizeof(T));
  const Weight& weight;
  T* packed;
  int64_t columns = weight.columns_as_outputs ? weight.kw : 1;  // kernel columns that are outputs
  int64_t outputs = columns * weight.n, taps = weight.kh * weight.kw, k = weight.c * taps / columns;
  int64_t tap_stride = weight.channels_last ? weight.c : 1, channel_stride = weight.channels_last ? 1 : taps;

  static T load(const S* from) {
    if constexpr (sizeof(S) == 2) {
      return static_cast<T>(widen(*from));
    } else {
      return *from;
    }
  }

  // The panel of the outputs from n0 on. Of each output a cache line is read at a time, if its channels are together.
  void panel(int64_t n0, int64_t lanes) const {
    constexpr int64_t kRun = 16;
    const S* source[kWidth];  // each lane's output, or null
    double factor[kWidth];
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t output = n0 + lane, n = output % weight.n;
      source[lane] = output < outputs
                         ? static_cast<const S*>(weight.data) + n * weight.c * taps + output / weight.n * tap_stride
                         : nullptr;
      factor[lane] = weight.scale && source[lane] ? static_cast<double>(static_cast<const T*>(weight.scale)[n]) : 1.0;
    }
    T* to = packed + n0 * k;
    for (int64_t row = 0; row < taps; row += columns) {
      for (int64_t c0 = 0; c0 < weight.c; c0 += kRun) {
        const int64_t run = weight.c - c0 < kRun ? weight.c - c0 : kRun;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          if (!source[lane]) {
            for (int64_t i = 0; i < run; ++i) to[i * lanes + lane] = 0;
            continue;
          }
          const S* const from = source[lane] + row * tap_stride + c0 * channel_stride;
          if (weight.scale) {
            for (int64_t i = 0; i < run; ++i) {
              to[i * lanes + lane] =
                  static_cast<T>(static_cast<double>(load(from + i * channel_stride)) * factor[lane]);
            }
          } else {
            for (int64_t i = 0; i < run; ++i) to[i * lanes + lane] = load(from + i * channel_stride);
          }
        }
        to += run * lanes;
      }
    }
  }

  static void panels(void* context, int64_t begin, int64_t end) {
    const Packing& self = *static_cast<const Packing*>(context);
    const int64_t n_padded = padded_n(self.outputs, sizeof(T));
    for (int64_t n0 = begin * kWidth; n0 < end * kWidth && n0 < n_padded; n0 += kWidth) {
      self.panel(n0, n_padded - n0 < kWidth ? n_padded - n0 : kWidth);
    }
  }

  void run(const ParallelFor& parallel) {
    constexpr int64_t kAlone = 32 << 10;  // elements that no thread is woken for
    const int64_t n_padded = padded_n(outputs, sizeof(T)), count = (n_padded + kWidth - 1) / kWidth;
    if (n_padded * k <= kAlone) {
      panels(this, 0, count);
    } else {
      parallel.run(parallel.context, count, panels, this);
    }
    const T* const shift = static_cast<const T*>(weight.shift);
    T* to = packed + n_padded * k;
    for (int64_t n = 0; n < n_padded; ++n) *to++ = (shift && n < outputs) ? shift[n % weight.n] : 0;
    T* const end = packed + packed_elements(outputs, k, sizeof(T));
    while (to < end) *to++ = 0;
  }
};

}  // namespace

int64_t packed_size(DType dtype, int64_t n, int64_t k) {
  return packed_elements(n, k, dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
}

int64_t packed_size(const Weight& weight) {
  const int64_t columns = weight.columns_as_outputs ? weight.kw : 1;
  return packed_size(weight.dtype, columns * weight.n, weight.c * weight.kh * weight.kw / columns);
}

void pack(const Weight& weight, void* packed, const ParallelFor& parallel) {
  switch (weight.dtype) {
    case DType::kFloat32:
      return Packing<float, float>{weight, static_cast<float*>(packed)}.run(parallel);
    case DType::kFloat64:
      return Packing<double, double>{weight, static_cast<double*>(packed)}.run(parallel);
    case DType::kBFloat16:
      return Packing<uint16_t, float>{weight, static_cast<float*>(packed)}.run(parallel);
  }
}

int64_t packed_fast_size(DType dtype, int64_t c_partial) {
  if (dtype != DType::kFloat32 || !has_winograd(c_partial)) return 0;
  return kWinogradProducts * packed_size(dtype, c_partial, c_partial);
}

bool fast_tier_pays(int64_t c_partial, int64_t height, int64_t width) {
  return has_winograd(c_partial) && winograd_pays(height, width);
}

void pack_fast(const Weight& weight, void* packed) {
  if (packed_fast_size(weight.dtype, weight.n) == 0) return;
  // The transforms of a filter's column and row: the points 0, 1, -1, infinity, and 0, 1, -1, 2, -2, infinity.
  constexpr double kRows[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
  constexpr double kColumns[6][3] = {{1. / 4, 0, 0},
                                     {-1. / 6, -1. / 6, -1. / 6},
                                     {-1. / 6, 1. / 6, -1. / 6},
                                     {1. / 24, 1. / 12, 1. / 6},
                                     {1. / 24, -1. / 12, 1. / 6},
                                     {0, 0, 1}};
  const float* const filters = static_cast<const float*>(weight.data);
  const auto tap_stride = static_cast<size_t>(weight.channels_last ? weight.c : 1);
  std::vector<float> transformed(static_cast<size_t>(weight.n * weight.c));
  Weight product;
  product.data = transformed.data();
  product.n = weight.n;
  product.c = weight.c;
  float* to = static_cast<float*>(packed);
  for (const auto& row : kRows) {
    for (const auto& column : kColumns) {
      for (size_t i = 0; i < transformed.size(); ++i) {
        const float* const filter = filters + (weight.channels_last ? i + i / tap_stride * 8 * tap_stride : 9 * i);
        double sum = 0;
        for (size_t tap = 0; tap < 9; ++tap) {
          sum += row[tap / 3] * column[tap % 3] * static_cast<double>(filter[tap * tap_stride]);
        }
        transformed[i] = static_cast<float>(sum);
      }
      pack(product, to);
      to += packed_size(product);
    }
  }
}

}  // namespace fasternet
