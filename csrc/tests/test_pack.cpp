// The packed layout that fasternet_cpu.h promises: panels of one cache line by K rows, K over (row, column, channel).
#include <cstring>

#include "testing.h"

namespace {

using namespace testing;

template <class T>
void test_layout(int64_t n, int64_t c, int64_t kh, int64_t kw, bool with_scale, bool with_shift) {
  using Element = Compute<T>;
  const std::string name = std::string("pack ") + Storage<T>::kName + " " + std::to_string(n) + "x" +
                           std::to_string(c) + "x" + std::to_string(kh) + "x" + std::to_string(kw);
  const auto filter = Filter<T>::random(1, n, c, kh, kw, with_scale, with_shift);
  const Packed<T> packed({&filter});
  const int64_t k = c * kh * kw, line = 64 / static_cast<int64_t>(sizeof(Element));
  const int64_t size = fasternet::packed_size(Storage<T>::kDType, n, k);
  check(size % line == 0, name, "the size is not a multiple of a cache line");

  const std::vector<Element> folded = filter.template folded<Element>();
  const Element* next = packed.data();
  bool weights_right = true, padding_zero = true;
  for (int64_t first = 0; first < n; first += line) {
    const int64_t width = n - first <= line / 2 ? line / 2 : line;
    for (int64_t i = 0; i < kh; ++i) {
      for (int64_t j = 0; j < kw; ++j) {
        for (int64_t channel = 0; channel < c; ++channel) {
          for (int64_t lane = 0; lane < width; ++lane, ++next) {
            if (first + lane < n) {
              const int64_t at = (((first + lane) * c + channel) * kh + i) * kw + j;
              weights_right &= *next == folded[static_cast<size_t>(at)];
            } else {
              padding_zero &= *next == 0;
            }
          }
        }
      }
    }
  }
  bool shift_right = true;
  for (int64_t i = 0; i < n; ++i) shift_right &= next[i] == filter.shift_of(i);
  for (const Element* p = next + n; p < packed.data() + size; ++p) padding_zero &= *p == 0;
  check(next + n <= packed.data() + size, name, "the size has no room for the shift");
  check(weights_right, name, "a weight is not where it belongs, or not weight * scale rounded once");
  check(padding_zero, name, "padding is not zero");
  check(shift_right, name, "the shift is not behind the panels");
}

// PConv's weight: outputs (kernel column, output), K over (kernel row, channel).
template <class T>
void test_pconv_layout(int64_t n) {
  using Element = Compute<T>;
  const std::string name = std::string("pack of PConv ") + Storage<T>::kName + " " + std::to_string(n);
  const auto filter = Filter<T>::random(1, n, n, 3, 3, false, false);
  const Packed<T> packed({&filter}, First::kPConv);
  const int64_t outputs = 3 * n, line = 64 / static_cast<int64_t>(sizeof(Element));
  const std::vector<Element> folded = filter.template folded<Element>();
  const Element* next = packed.data();
  bool right = true, padding_zero = true;
  for (int64_t first = 0; first < outputs; first += line) {
    const int64_t width = outputs - first <= line / 2 ? line / 2 : line;
    for (int64_t i = 0; i < 3; ++i) {
      for (int64_t channel = 0; channel < n; ++channel) {
        for (int64_t lane = 0; lane < width; ++lane, ++next) {
          const int64_t output = first + lane;
          if (output < outputs) {
            right &= *next == folded[static_cast<size_t>(((output % n * n + channel) * 3 + i) * 3 + output / n)];
          } else {
            padding_zero &= *next == 0;
          }
        }
      }
    }
  }
  const int64_t size = fasternet::packed_size(Storage<T>::kDType, outputs, outputs);
  for (const Element* p = next; p < packed.data() + size; ++p) padding_zero &= *p == 0;
  check(right, name, "a weight is not where it belongs");
  check(padding_zero, name, "padding or the shift is not zero");
}

// The same bits of weights in channels-last memory, and with threads.
template <class T>
void test_order(int64_t n, int64_t c, int64_t kh, int64_t kw, First first) {
  const std::string name = std::string("pack of channels-last ") + Storage<T>::kName + " " + std::to_string(n) + "x" +
                           std::to_string(c) + "x" + std::to_string(kh) + "x" + std::to_string(kw);
  const bool pconv = first != First::kOther;
  const auto filter = Filter<T>::random(1, n, c, kh, kw, !pconv, !pconv);
  const auto last = filter.reordered();
  const Packed<T> expected({&filter}, first), packed({&last}, first);
  fasternet::Weight weight;
  weight.data = last.weight.data();
  weight.channels_last = true;
  weight.dtype = Storage<T>::kDType;
  weight.n = n, weight.c = c, weight.kh = kh, weight.kw = kw;
  weight.scale = pconv ? nullptr : last.scale.data();
  weight.shift = pconv ? nullptr : last.shift.data();
  weight.columns_as_outputs = pconv;
  const auto size = static_cast<size_t>(fasternet::packed_size(weight));
  size_t all = size;
  if (first == First::kFastPConv) all += static_cast<size_t>(fasternet::packed_fast_size(weight.dtype, n));
  check(std::memcmp(packed.data(), expected.data(), all * sizeof(Compute<T>)) == 0, name, "other bits");
  Threads three(3);
  std::vector<Compute<T>> shared(size, std::numeric_limits<Compute<T>>::quiet_NaN());
  fasternet::pack(weight, shared.data(), three.parallel());
  check(std::memcmp(shared.data(), expected.data(), size * sizeof(Compute<T>)) == 0, name, "other bits with 3 threads");
}

template <class T>
void test_type() {
  for (First first : {First::kPConv, First::kFastPConv}) {
    for (int64_t n : {1, 10, 16, 24, 36, 64}) test_order<T>(n, n, 3, 3, first);
  }
  test_order<T>(40, 3, 4, 4, First::kOther);
  test_order<T>(37, 21, 2, 3, First::kOther);
  test_order<T>(33, 40, 1, 1, First::kOther);
  for (int64_t n : {1, 2, 5, 8, 10, 16, 36}) test_pconv_layout<T>(n);
  for (int64_t n : {1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 40}) {
    test_layout<T>(n, 3, 3, 3, false, false);
    test_layout<T>(n, 37, 1, 1, true, true);
    test_layout<T>(n, 1, 1, 1, true, false);
  }
  test_layout<T>(600, 300, 1, 1, true, true);
  test_layout<T>(40, 3, 4, 4, true, true);
}

}  // namespace

int main() {
  return run_tests("test_pack", [] {
    test_type<float>();
    test_type<double>();
    test_type<BFloat16>();
  });
}
