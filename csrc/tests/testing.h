// What the C++ tests share: checks, tensors inside wider tensors, parallel loops that misbehave on purpose, and the
// criterion by which a kernel's result is right.
//
// Each test is one executable for one instruction set, the one in the environment variable FASTERNET_KERNELS_ISA. It
// exits with 0 if all is well, 1 if a check failed and 77 ("skipped", to CTest and Automake) if this machine lacks that
// set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fasternet_cpu.h"

namespace testing {

using fasternet::Act;
using fasternet::DType;
using fasternet::Isa;
using fasternet::ParallelFor;

// ---- Checks ---------------------------------------------------------------------------------------------------------

inline int& failures() {
  static int count = 0;
  return count;
}

inline int& checks() {
  static int count = 0;
  return count;
}

// Records one check of the case `name`; a failure is printed and the test goes on.
inline bool check(bool ok, const std::string& name, const std::string& what) {
  ++checks();
  if (ok) return true;
  constexpr int kPrinted = 40;  // a broken kernel fails everywhere; the first failures say enough
  if (++failures() <= kPrinted) std::printf("FAIL %s: %s\n", name.c_str(), what.c_str());
  return false;
}

// Runs `body` and turns what it recorded into the exit status. Call it as the whole of main().
template <class Body>
int run_tests(const char* test, Body body) {
  const char* wanted = std::getenv("FASTERNET_KERNELS_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    bool known = false, available = false;
    for (Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kNeon}) {
      known |= wanted == std::string(fasternet::isa_name(isa));
    }
    for (Isa isa : fasternet::available_isas()) available |= wanted == std::string(fasternet::isa_name(isa));
    if (known && !available) {
      std::printf("SKIP: %s: this build or this processor has no %s\n", test, wanted);
      return 77;
    }
  }
  try {
    std::printf("%s on %s\n", test, fasternet::isa_name(fasternet::selected_isa()));
    body();
  } catch (const std::exception& error) {
    check(false, test, std::string("unexpected exception: ") + error.what());
  }
  std::printf("%s: %d checks, %d failed\n", test, checks(), failures());
  return failures() == 0 ? 0 : 1;
}

// ---- Storage types --------------------------------------------------------------------------------------------------

struct BFloat16 {
  uint16_t bits;
};

inline double to_double(double value) { return value; }
inline double to_double(float value) { return value; }
inline double to_double(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// Rounds to the nearest value, ties to even.
template <class T>
T round_to(double value) {
  return static_cast<T>(value);
}
template <>
inline BFloat16 round_to<BFloat16>(double value) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  if (std::isnan(single))
    return {static_cast<uint16_t>((bits >> 16) | 0x40)};  // carrying into the exponent would lose it
  bits += 0x7fff + ((bits >> 16) & 1);
  return {static_cast<uint16_t>(bits >> 16)};
}

template <class T>
struct Storage;
template <>
struct Storage<float> {
  using Compute = float;
  static constexpr DType kDType = DType::kFloat32;
  static constexpr int kMantissaBits = 23;
  static constexpr const char* kName = "float32";
};
template <>
struct Storage<double> {
  using Compute = double;
  static constexpr DType kDType = DType::kFloat64;
  static constexpr int kMantissaBits = 52;
  static constexpr const char* kName = "float64";
};
template <>
struct Storage<BFloat16> {
  using Compute = float;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr int kMantissaBits = 7;
  static constexpr const char* kName = "bfloat16";
};
template <class T>
using Compute = typename Storage<T>::Compute;

// Numbers of rows around the micro-kernels' tiles, of at most 3, 6, 9, 12 and 14 rows, and around two of them.
inline std::vector<int64_t> rows_around_tiles() {
  return {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 18, 19, 24, 25, 27, 28, 29};
}
// Numbers of columns around one to five panels of 8 and of 16 and the tiles that they are cut into.
inline std::vector<int64_t> columns_around_tiles() {
  return {1, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 47, 48, 49, 64, 65, 72, 80, 81, 112};
}

inline const std::vector<Act>& all_acts() {
  static const std::vector<Act> acts = {Act::kIdentity, Act::kRelu, Act::kGelu,
                                        Act::kGeluTanh, Act::kSilu, Act::kHardswish};
  return acts;
}

inline const char* act_name(Act act) {
  static const char* const kNames[] = {"identity", "relu", "gelu", "gelu_tanh", "silu", "hardswish"};
  return kNames[static_cast<int>(act)];
}

// ---- Tensors --------------------------------------------------------------------------------------------------------

enum class Layout { kChannelsLast, kChannelsFirst };

struct Shape {
  int64_t batch, height, width, channels;
  int64_t size() const { return batch * height * width * channels; }
  std::string str() const {
    return std::to_string(batch) + "x" + std::to_string(height) + "x" + std::to_string(width) + "x" +
           std::to_string(channels);
  }
};

// Where a tensor's channels lie inside a wider one: channels [first, first + channels) of `stored`. stored 0: dense.
struct Slice {
  int64_t first = 0, stored = 0;
};

// An image tensor, possibly a channel slice of a wider one. All storage starts as NaN, so that an element a kernel
// forgets to write, or a neighbouring channel it reads, shows in the result. The storage ends where the tensor does, so
// that the address sanitizer sees a read or a write beyond it.
template <class T>
class Tensor {
 public:
  Tensor(const Shape& shape, Layout layout = Layout::kChannelsLast, Slice slice = {}) : shape_(shape) {
    const int64_t stored = slice.stored > 0 ? slice.stored : shape.channels;
    const int64_t pixels = shape.height * shape.width;
    if (layout == Layout::kChannelsLast) {
      set_stride(pixels * stored, 1, shape.width * stored, stored);
      first_ = slice.first;
    } else {
      set_stride(stored * pixels, pixels, shape.width, 1);
      first_ = slice.first * pixels;
    }
    data_.assign(static_cast<size_t>(shape.batch * pixels * stored), poison());
  }

  const Shape& shape() const { return shape_; }
  const int64_t* stride() const { return stride_; }
  int64_t pixel_stride() const { return stride_[3]; }
  T* data() { return data_.data() + first_; }
  const T* data() const { return data_.data() + first_; }

  T& at(int64_t b, int64_t h, int64_t w, int64_t c) { return data_[index(b, h, w, c)]; }
  const T& at(int64_t b, int64_t h, int64_t w, int64_t c) const { return data_[index(b, h, w, c)]; }

  // Normally distributed values, the same ones for the same seed in every layout.
  void fill(uint32_t seed, double scale = 1) {
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal;
    for_each([&](T& value, int64_t) { value = round_to<T>(scale * normal(engine)); });
  }

  // The elements in the order (batch, height, width, channels).
  template <class Real>
  std::vector<Real> dense() const {
    std::vector<Real> result(static_cast<size_t>(shape_.size()));
    const_cast<Tensor*>(this)->for_each(
        [&](T& value, int64_t i) { result[static_cast<size_t>(i)] = static_cast<Real>(to_double(value)); });
    return result;
  }

  // Takes the elements of another tensor of the same shape, whatever its layout.
  void assign(const Tensor& other) {
    std::vector<T> values;
    const_cast<Tensor&>(other).for_each([&](T& value, int64_t) { values.push_back(value); });
    for_each([&](T& value, int64_t i) { value = values[static_cast<size_t>(i)]; });
  }

  bool same_bits(const Tensor& other) const {
    return data_.size() == other.data_.size() &&
           (data_.empty() || std::memcmp(data_.data(), other.data_.data(), data_.size() * sizeof(T)) == 0);
  }

  // True if everything outside the slice is as it was made.
  bool neighbours_untouched() const {
    Tensor copy = *this;
    copy.for_each([](T& value, int64_t) { value = poison(); });
    const T expected = poison();
    for (const T& value : copy.data_) {
      if (std::memcmp(&value, &expected, sizeof(T)) != 0) return false;
    }
    return true;
  }

  // One image of the batch, in the same layout and slice.
  Tensor image(int64_t b) const {
    Tensor result = *this;
    const size_t size = data_.size() / static_cast<size_t>(shape_.batch);
    result.shape_.batch = 1;
    const auto begin = data_.begin() + static_cast<std::ptrdiff_t>(size) * b;
    result.data_.assign(begin, begin + static_cast<std::ptrdiff_t>(size));
    return result;
  }

  // A tensor of this shape and layout with nothing written yet.
  Tensor blank() const {
    Tensor result = *this;
    std::fill(result.data_.begin(), result.data_.end(), poison());
    return result;
  }

 private:
  static T poison() { return round_to<T>(std::numeric_limits<double>::quiet_NaN()); }

  void set_stride(int64_t b, int64_t c, int64_t h, int64_t w) {
    stride_[0] = b, stride_[1] = c, stride_[2] = h, stride_[3] = w;
  }

  size_t index(int64_t b, int64_t h, int64_t w, int64_t c) const {
    return static_cast<size_t>(first_ + b * stride_[0] + c * stride_[1] + h * stride_[2] + w * stride_[3]);
  }

  template <class Function>
  void for_each(Function function) {
    int64_t i = 0;
    for (int64_t b = 0; b < shape_.batch; ++b) {
      for (int64_t h = 0; h < shape_.height; ++h) {
        for (int64_t w = 0; w < shape_.width; ++w) {
          for (int64_t c = 0; c < shape_.channels; ++c) function(at(b, h, w, c), i++);
        }
      }
    }
  }

  Shape shape_;
  int64_t stride_[4];
  int64_t first_;
  std::vector<T> data_;
};

// ---- Weights --------------------------------------------------------------------------------------------------------

// A convolution's weights (n, c, kh, kw) of storage type T with an optional scale and shift per output channel.
template <class T>
struct Filter {
  int64_t n, c, kh, kw;
  std::vector<T> weight;
  std::vector<Compute<T>> scale, shift;  // empty: absent
  bool channels_last = false;            // the weights lie as (n, kh, kw, c)

  // The same filter in the other order.
  Filter reordered() const {
    Filter last = *this;
    last.weight = to_channels_last(weight);
    last.channels_last = true;
    return last;
  }
  // Values of the weights' shape, (n, c, kh, kw), as (n, kh, kw, c).
  template <class Value>
  std::vector<Value> to_channels_last(const std::vector<Value>& values) const {
    std::vector<Value> result;
    const int64_t taps = kh * kw;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t channel = 0; channel < c; ++channel) {
          result.push_back(values[static_cast<size_t>((i * c + channel) * taps + tap)]);
        }
      }
    }
    return result;
  }

  // Weights of a size that keeps the variance of what they are applied to.
  static Filter random(uint32_t seed, int64_t n, int64_t c, int64_t kh, int64_t kw, bool with_scale, bool with_shift) {
    Filter filter{n, c, kh, kw, {}, {}, {}, false};
    std::mt19937 engine(seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform(0.5, 1.5);
    const double size = 1 / std::sqrt(static_cast<double>(c * kh * kw));
    for (int64_t i = 0; i < n * c * kh * kw; ++i) filter.weight.push_back(round_to<T>(size * normal(engine)));
    for (int64_t i = 0; with_scale && i < n; ++i) {
      filter.scale.push_back(static_cast<Compute<T>>(uniform(engine) * (i % 3 == 0 ? -1 : 1)));
    }
    for (int64_t i = 0; with_shift && i < n; ++i) filter.shift.push_back(static_cast<Compute<T>>(0.3 * normal(engine)));
    return filter;
  }

  // weight * scale, multiplied in double and rounded once to Real.
  template <class Real>
  std::vector<Real> folded() const {
    std::vector<Real> result;
    const int64_t k = c * kh * kw;
    for (int64_t i = 0; i < n * k; ++i) {
      const double factor = scale.empty() ? 1.0 : static_cast<double>(scale[static_cast<size_t>(i / k)]);
      result.push_back(static_cast<Real>(to_double(weight[static_cast<size_t>(i)]) * factor));
    }
    return result;
  }

  double shift_of(int64_t channel) const { return shift.empty() ? 0.0 : shift[static_cast<size_t>(channel)]; }
};

// Filters packed one after the other into memory that is aligned to a cache line and ends where they do; the first one
// PConv's or not.
enum class First { kPConv, kFastPConv, kOther };  // kFastPConv: the fast tier's weights follow the others
template <class T>
class Packed {
 public:
  explicit Packed(const std::vector<const Filter<T>*>& filters, First first = First::kOther) {
    const DType dtype = Storage<T>::kDType;
    std::vector<fasternet::Weight> weights;
    int64_t size = 0;
    for (const Filter<T>* f : filters) {
      fasternet::Weight weight;
      weight.data = f->weight.data();
      weight.channels_last = f->channels_last;
      weight.dtype = dtype;
      weight.n = f->n, weight.c = f->c, weight.kh = f->kh, weight.kw = f->kw;
      weight.scale = f->scale.empty() ? nullptr : f->scale.data();
      weight.shift = f->shift.empty() ? nullptr : f->shift.data();
      weight.columns_as_outputs = weights.empty() && first != First::kOther;
      weights.push_back(weight);
      size += fasternet::packed_size(weight);
    }
    const bool fast = first == First::kFastPConv;
    if (fast) size += fasternet::packed_fast_size(dtype, weights[0].n);
    constexpr size_t kCacheLine = 64;
    const size_t bytes = (static_cast<size_t>(size) * sizeof(Compute<T>) + kCacheLine - 1) / kCacheLine * kCacheLine;
    data_.reset(static_cast<Compute<T>*>(std::aligned_alloc(kCacheLine, std::max(bytes, kCacheLine))));
    if (data_ == nullptr) throw std::bad_alloc();
    std::fill_n(data_.get(), size, std::numeric_limits<Compute<T>>::quiet_NaN());
    Compute<T>* next = data_.get();
    for (const fasternet::Weight& weight : weights) {
      fasternet::pack(weight, next);
      next += fasternet::packed_size(weight);
    }
    if (fast) fasternet::pack_fast(weights[0], next);
  }

  const Compute<T>* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<Compute<T>, Free> data_;
};

// ---- Parallel loops -------------------------------------------------------------------------------------------------

// Contiguous ranges, one thread each.
class Threads {
 public:
  explicit Threads(int count) : count_(count) {}
  ParallelFor parallel() { return {&Threads::run, this, count_}; }

 private:
  static void run(void* context, int64_t n, ParallelFor::Body body, void* body_context) {
    const int64_t count = static_cast<Threads*>(context)->count_;
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = n * i / count, end = n * (i + 1) / count;
      if (begin < end) threads.emplace_back([=] { body(body_context, begin, end); });
    }
    for (std::thread& thread : threads) thread.join();
  }

  int count_;
};

// Claims to have `count` threads, then runs the indices one by one from the last to the first: the worst order that a
// kernel whose iterations are not independent could meet. (With up to 256 threads the last one, which runs first, may
// take over all of a loop.)
class Reversed {
 public:
  explicit Reversed(int count) : count_(count) {}
  ParallelFor parallel() { return {&Reversed::run, this, count_}; }

 private:
  static void run(void*, int64_t n, ParallelFor::Body body, void* body_context) {
    for (int64_t i = n; i > 0; --i) body(body_context, i - 1, i);
  }

  int count_;
};

// Claims to have `count` threads and runs everything at once, as torch does inside of a parallel region.
class AtOnce {
 public:
  explicit AtOnce(int count) : count_(count) {}
  ParallelFor parallel() { return {&AtOnce::run, this, count_}; }

 private:
  static void run(void*, int64_t n, ParallelFor::Body body, void* body_context) { body(body_context, 0, n); }

  int count_;
};

// ---- The criterion --------------------------------------------------------------------------------------------------

// Two ways to compute the same thing. Exact is the reference in double; Plain<Real> is what a plain loop in Real makes
// of it, and so says how much error is normal.
struct Exact {
  using Real = double;
  static std::vector<double> conv(const std::vector<double>& x, const Shape& s, const std::vector<double>& weight,
                                  int64_t c_out, int64_t kh, int64_t kw, int64_t stride_h, int64_t stride_w,
                                  int64_t pad) {
    return fasternet::reference::conv(x, s.batch, s.height, s.width, s.channels, weight, c_out, kh, kw, stride_h,
                                      stride_w, pad);
  }
  static double act(Act act, double value) { return fasternet::reference::act(act, value); }
};

template <class T>
struct Plain {
  using Real = T;

  // In order of K, one rounded multiplication and one rounded addition at a time.
  static std::vector<Real> conv(const std::vector<Real>& x, const Shape& s, const std::vector<Real>& weight,
                                int64_t c_out, int64_t kh, int64_t kw, int64_t stride_h, int64_t stride_w,
                                int64_t pad) {
    std::vector<Real> taps;  // output channels side by side, as in the reference
    taps.reserve(weight.size());
    for (int64_t i = 0; i < kh * kw; ++i) {
      for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t n = 0; n < c_out; ++n) {
          taps.push_back(weight[static_cast<size_t>((n * s.channels + c) * kh * kw + i)]);
        }
      }
    }
    std::vector<Real> y;
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t top = -pad; top + kh <= s.height + pad; top += stride_h) {
        for (int64_t left = -pad; left + kw <= s.width + pad; left += stride_w) {
          y.resize(y.size() + static_cast<size_t>(c_out));
          Real* const sums = y.data() + y.size() - c_out;
          for (int64_t i = 0; i < kh; ++i) {
            for (int64_t j = 0; j < kw; ++j) {
              const int64_t h = top + i, w = left + j;
              if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
              const Real* pixel = x.data() + ((b * s.height + h) * s.width + w) * s.channels;
              const Real* tap = taps.data() + (i * kw + j) * s.channels * c_out;
              for (int64_t c = 0; c < s.channels; ++c, tap += c_out) {
                for (int64_t n = 0; n < c_out; ++n) sums[n] += pixel[c] * tap[n];
              }
            }
          }
        }
      }
    }
    return y;
  }

  static Real act(Act act, Real value) {
    switch (act) {
      case Act::kIdentity:
        return value;
      case Act::kRelu:
        return value <= 0 ? Real(0) : value;
      case Act::kGelu:
        return Real(0.5) * value * (1 + std::erf(value * Real(0.70710678118654752440)));
      case Act::kGeluTanh:
        return Real(0.5) * value *
               (1 + std::tanh(Real(0.79788456080286535588) * (value + Real(0.044715) * value * value * value)));
      case Act::kSilu:
        return value / (1 + std::exp(-value));
      case Act::kHardswish:
        return value * std::min(std::max(value + 3, Real(0)), Real(6)) / 6;
    }
    return value;
  }
};

// x with its first channels replaced by their 3x3 convolution.
template <class Arithmetic, class T, class Real = typename Arithmetic::Real>
std::vector<Real> partial_conv(const std::vector<Real>& x, const Shape& s, const Filter<T>& filter) {
  const int64_t pixels = s.batch * s.height * s.width;
  std::vector<Real> first;
  for (int64_t p = 0; p < pixels; ++p) {
    const auto pixel = x.begin() + static_cast<std::ptrdiff_t>(p * s.channels);
    first.insert(first.end(), pixel, pixel + static_cast<std::ptrdiff_t>(filter.c));
  }
  const std::vector<Real> convolved = Arithmetic::conv(first, {s.batch, s.height, s.width, filter.c},
                                                       filter.template folded<Real>(), filter.n, 3, 3, 1, 1, 1);
  std::vector<Real> u = x;
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; c < filter.n; ++c) {
      u[static_cast<size_t>(p * s.channels + c)] = convolved[static_cast<size_t>(p * filter.n + c)];
    }
  }
  return u;
}

// act(conv(x) + shift) with a stride as large as the kernel: a 1x1 convolution or a patch convolution.
template <class Arithmetic, class T, class Real = typename Arithmetic::Real>
std::vector<Real> conv_shift_act(const std::vector<Real>& x, const Shape& s, const Filter<T>& filter, Act act) {
  std::vector<Real> y =
      Arithmetic::conv(x, s, filter.template folded<Real>(), filter.n, filter.kh, filter.kw, filter.kh, filter.kw, 0);
  for (size_t i = 0; i < y.size(); ++i) {
    const Real shift = static_cast<Real>(filter.shift_of(static_cast<int64_t>(i) % filter.n));
    y[i] = Arithmetic::act(act, y[i] + shift);
  }
  return y;
}

// The distance from x's binade to its next value in storage type T.
template <class T>
double ulp(double x) {
  if (x == 0) return 0;
  return std::ldexp(1.0, std::ilogb(x) - Storage<T>::kMantissaBits);
}

struct Error {
  double norm = 0;     // L2, not divided by the reference's: both sides of a comparison have the same one
  double largest = 0;  // absolute
};

inline Error error_of(const std::vector<double>& result, const std::vector<double>& exact) {
  Error error;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double difference = std::fabs(result[i] - exact[i]);
    if (std::isnan(difference)) return {difference, difference};
    error.norm += difference * difference;
    error.largest = std::max(error.largest, difference);
  }
  error.norm = std::sqrt(error.norm);
  return error;
}

// The result is right if its L2 error and its largest error are each at most twice those of the plain loop (rounded to
// storage at the end, as the result is), plus one ulp of the largest value; in double, 1e-13 relative to the exact
// result.
template <class T, class Real>
void check_close(const std::string& name, const Tensor<T>& result, const std::vector<double>& exact,
                 const std::vector<Real>& plain) {
  const std::vector<double> values = result.template dense<double>();
  if (!check(values.size() == exact.size() && plain.size() == exact.size(), name, "sizes differ")) return;
  double largest = 0, norm = 0;
  for (double value : exact) largest = std::max(largest, std::fabs(value)), norm += value * value;
  norm = std::sqrt(norm);
  Error bound;
  if (Storage<T>::kDType == DType::kFloat64) {
    bound = {1e-13 * norm, 1e-13 * largest};
  } else {
    std::vector<double> stored;
    for (Real value : plain) stored.push_back(to_double(round_to<T>(static_cast<double>(value))));
    const Error normal = error_of(stored, exact);
    bound = {2 * normal.norm + ulp<T>(largest), 2 * normal.largest + ulp<T>(largest)};
  }
  const Error error = error_of(values, exact);
  char text[256];
  std::snprintf(text, sizeof text, "L2 error %.3g (at most %.3g of %.3g), largest error %.3g (at most %.3g of %.3g)",
                error.norm, bound.norm, norm, error.largest, bound.largest, largest);
  // Written so that a NaN error fails.
  check(error.norm <= bound.norm && error.largest <= bound.largest, name, text);
}

// The fast tier of an operator alone: its L2 error is at most five times the default tier's, its largest ten times, as
// fasternet_cpu.h says.
inline void check_fast_close(const std::string& name, const Tensor<float>& fast, const Tensor<float>& direct,
                             const std::vector<double>& exact) {
  const Error error = error_of(fast.dense<double>(), exact), normal = error_of(direct.dense<double>(), exact);
  char text[256];
  std::snprintf(text, sizeof text, "L2 error %.3g, %.3g in the default tier; largest error %.3g, %.3g there",
                error.norm, normal.norm, error.largest, normal.largest);
  check(error.norm <= 5 * normal.norm && error.largest <= 10 * normal.largest, name, text);
}

// The shapes that tests of the fast tier run: images it pays on, whole patches or not, and some it does not pay on.
inline std::vector<Shape> fast_shapes(int64_t channels) {
  return {{1, 14, 14, channels}, {2, 17, 15, channels}, {3, 28, 14, channels}, {1, 15, 173, channels},
          {1, 28, 28, channels}, {1, 16, 56, channels}, {0, 14, 14, channels}, {2, 7, 9, channels},
          {1, 13, 28, channels}, {1, 28, 13, channels}};
}

// NaN where the reference has NaN, the same infinity where it has one, finite elsewhere.
template <class T>
void check_non_finite(const std::string& name, const Tensor<T>& result, const std::vector<double>& exact) {
  const std::vector<double> values = result.template dense<double>();
  if (!check(values.size() == exact.size(), name, "sizes differ")) return;
  for (size_t i = 0; i < exact.size(); ++i) {
    const bool same = std::isnan(exact[i])   ? std::isnan(values[i])
                      : std::isinf(exact[i]) ? values[i] == exact[i]
                                             : std::isfinite(values[i]);
    if (!same) {
      char text[128];
      std::snprintf(text, sizeof text, "element %zu is %g, the reference has %g", i, values[i], exact[i]);
      check(false, name, text);
      return;
    }
  }
  check(true, name, "");
}

// Runs `operation(x, y, parallel)` in every way that must not change a bit of y: again, on 2, 5 and 8 threads, in
// reverse order, and image by image. Also: x unchanged, nothing written beside the slice. `y` is the serial result on
// return.
template <class T, class U, class Operation>
void check_properties(const std::string& name, const Tensor<T>& x, Tensor<U>* y, const Operation& operation) {
  const Tensor<T> before = x;
  const Tensor<U> blank = *y;
  operation(x, y, fasternet::serial(), 0);
  check(y->neighbours_untouched(), name, "wrote outside its channels");
  Threads two(2), five(5), eight(8);
  Reversed reversed(5);
  const std::pair<const char*, ParallelFor> ways[] = {{"a second run", fasternet::serial()},
                                                      {"2 threads", two.parallel()},
                                                      {"5 threads", five.parallel()},
                                                      {"8 threads", eight.parallel()},
                                                      {"reversed ranges", reversed.parallel()}};
  for (const auto& way : ways) {
    Tensor<U> again = blank;
    operation(x, &again, way.second, 0);
    check(again.same_bits(*y), name, std::string("other bits with ") + way.first);
  }
  if (x.shape().batch > 1) {
    for (int64_t b = 0; b < x.shape().batch; ++b) {
      Tensor<U> alone = blank.image(b);
      operation(x.image(b), &alone, fasternet::serial(), b);
      check(alone.same_bits(y->image(b)), name, "other bits when image " + std::to_string(b) + " is alone");
    }
  }
  check(x.same_bits(before), name, "the input changed");
}

}  // namespace testing
