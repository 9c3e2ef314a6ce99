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

// S: how the weights are stored, T: how they are packed.
template <class S, class T>
void pack_as(const Weight& weight, T* packed) {
  const int64_t columns = weight.columns_as_outputs ? weight.kw : 1;  // kernel columns that are outputs
  const int64_t outputs = columns * weight.n, taps = weight.kh * weight.kw;
  const int64_t k = weight.c * taps / columns;
  const int64_t width = kPanelBytes / static_cast<int64_t>(sizeof(T));
  const int64_t n_padded = padded_n(outputs, sizeof(T));
  const S* source = static_cast<const S*>(weight.data);
  const T* scale = static_cast<const T*>(weight.scale);
  const T* shift = static_cast<const T*>(weight.shift);
  T* panel = packed;
  for (int64_t n0 = 0; n0 < n_padded; n0 += width) {
    const int64_t lanes = n_padded - n0 < width ? n_padded - n0 : width;
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t output = n0 + lane, n = output % weight.n;
      T* to = panel + lane;
      if (output >= outputs) {
        for (int64_t i = 0; i < k; ++i, to += lanes) *to = 0;
        continue;
      }
      const double factor = scale ? static_cast<double>(scale[n]) : 1.0;
      for (int64_t tap = output / weight.n; tap < taps; tap += columns) {
        const S* from = source + n * weight.c * taps + tap;
        for (int64_t c = 0; c < weight.c; ++c, from += taps, to += lanes) {
          T value;
          if constexpr (sizeof(S) == 2) {
            value = static_cast<T>(widen(*from));
          } else {
            value = *from;
          }
          *to = static_cast<T>(static_cast<double>(value) * factor);
        }
      }
    }
    panel += lanes * k;
  }
  for (int64_t n = 0; n < n_padded; ++n) *panel++ = (shift && n < outputs) ? shift[n % weight.n] : 0;
  T* const end = packed + packed_elements(outputs, k, sizeof(T));
  while (panel < end) *panel++ = 0;
}

}  // namespace

int64_t packed_size(DType dtype, int64_t n, int64_t k) {
  return packed_elements(n, k, dtype == DType::kFloat64 ? sizeof(double) : sizeof(float));
}

int64_t packed_size(const Weight& weight) {
  const int64_t columns = weight.columns_as_outputs ? weight.kw : 1;
  return packed_size(weight.dtype, columns * weight.n, weight.c * weight.kh * weight.kw / columns);
}

void pack(const Weight& weight, void* packed) {
  switch (weight.dtype) {
    case DType::kFloat32:
      return pack_as<float, float>(weight, static_cast<float*>(packed));
    case DType::kFloat64:
      return pack_as<double, double>(weight, static_cast<double*>(packed));
    case DType::kBFloat16:
      return pack_as<uint16_t, float>(weight, static_cast<float*>(packed));
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
  std::vector<float> transformed(static_cast<size_t>(weight.n * weight.c));
  Weight product;
  product.data = transformed.data();
  product.n = weight.n;
  product.c = weight.c;
  float* to = static_cast<float*>(packed);
  for (const auto& row : kRows) {
    for (const auto& column : kColumns) {
      for (size_t i = 0; i < transformed.size(); ++i) {
        double sum = 0;
        for (size_t tap = 0; tap < 9; ++tap) {
          sum += row[tap / 3] * column[tap % 3] * static_cast<double>(filters[9 * i + tap]);
        }
        transformed[i] = static_cast<float>(sum);
      }
      pack(product, to);
      to += packed_size(product);
    }
  }
}

}  // namespace fasternet
