// y[:, :c_partial] = conv3x3(x[:, :c_partial]), the other channels copied, or in place.
#include "testing.h"

namespace {

using namespace testing;

template <class T>
void pconv3x3(const Tensor<T>& x, Tensor<T>* y, const Packed<T>& packed, int64_t c_partial, const ParallelFor& parallel,
              bool fast = false) {
  fasternet::PConv3x3 args;
  args.dtype = Storage<T>::kDType;
  args.batch = x.shape().batch, args.channels = x.shape().channels;
  args.height = x.shape().height, args.width = x.shape().width, args.c_partial = c_partial;
  args.x = x.data();
  std::copy_n(x.stride(), 4, args.x_stride);
  args.y = y->data();
  std::copy_n(y->stride(), 4, args.y_stride);
  args.packed = packed.data();
  args.fast = fast;
  fasternet::pconv3x3(args, parallel);
}

struct Case {
  Shape shape;
  int64_t c_partial;
  Layout x_layout = Layout::kChannelsLast, y_layout = Layout::kChannelsLast;
  Slice x_slice = {}, y_slice = {};
};

template <class T>
std::string name_of(const Case& c) {
  const auto letter = [](Layout layout) { return layout == Layout::kChannelsLast ? "channels-last" : "NCHW"; };
  return std::string("pconv3x3 ") + Storage<T>::kName + " " + c.shape.str() + " c_partial " +
         std::to_string(c.c_partial) + " " + letter(c.x_layout) + " to " + letter(c.y_layout) +
         (c.x_slice.stored > 0 ? " of a wider x" : "") + (c.y_slice.stored > 0 ? " into a wider y" : "");
}

template <class T>
void test_case(const Case& c) {
  const std::string name = name_of<T>(c);
  const auto filter = Filter<T>::random(2, c.c_partial, c.c_partial, 3, 3, false, false);
  const Packed<T> packed({&filter}, First::kPConv);
  Tensor<T> x(c.shape, c.x_layout, c.x_slice), y(c.shape, c.y_layout, c.y_slice);
  x.fill(1);

  check_properties(name, x, &y, [&](const Tensor<T>& in, Tensor<T>* out, const ParallelFor& parallel, int64_t) {
    pconv3x3(in, out, packed, c.c_partial, parallel);
  });
  const auto exact = partial_conv<Exact>(x.template dense<double>(), c.shape, filter);
  const auto plain = partial_conv<Plain<Compute<T>>>(x.template dense<Compute<T>>(), c.shape, filter);
  check_close(name, y, exact, plain);

  // In place: the same bits in the convolved channels, and no other bit of the memory changed.
  Tensor<T> expected = x;
  expected.assign(y);
  Threads two(2), five(5);
  Reversed reversed(257);
  for (const ParallelFor& parallel : {fasternet::serial(), two.parallel(), five.parallel(), reversed.parallel()}) {
    Tensor<T> in_place = x;
    pconv3x3(in_place, &in_place, packed, c.c_partial, parallel);
    check(in_place.same_bits(expected), name, "in place differs, " + std::to_string(parallel.num_threads) + " threads");
  }
}

// A NaN and an infinity in one pixel each, in convolved and in untouched channels: they must reach their neighbourhood
// and nothing else, at corners, edges, and on both sides of any cut the kernel makes.
template <class T>
void test_non_finite(const Shape& shape, int64_t c_partial, Layout layout) {
  const Case c{shape, c_partial, layout, layout, {}, {}};
  const auto filter = Filter<T>::random(4, c_partial, c_partial, 3, 3, false, false);
  const Packed<T> packed({&filter}, First::kPConv);
  for (double special :
       {std::nan(""), std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()}) {
    for (int64_t channel : {int64_t{0}, c_partial - 1, shape.channels - 1}) {
      for (int64_t pixel = 0; pixel < shape.height * shape.width; pixel += 5) {
        Tensor<T> x(shape, layout), y(shape, layout);
        x.fill(3);
        x.at(shape.batch - 1, pixel / shape.width, pixel % shape.width, channel) = round_to<T>(special);
        const auto exact = partial_conv<Exact>(x.template dense<double>(), shape, filter);
        pconv3x3(x, &y, packed, c_partial, fasternet::serial());
        const std::string name = name_of<T>(c) + " with " + std::to_string(special) + " in channel " +
                                 std::to_string(channel) + " of pixel " + std::to_string(pixel);
        check_non_finite(name, y, exact);
        pconv3x3(x, &x, packed, c_partial, fasternet::serial());
        check_non_finite(name + " in place", x, exact);
      }
    }
  }
}

template <class T>
void test_type() {
  const Layout last = Layout::kChannelsLast, first = Layout::kChannelsFirst;
  // Numbers of channels around the panels' widths.
  for (int64_t c_partial : {1, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 36, 40}) {
    for (int64_t others : {0, 1, 30}) {
      test_case<T>({{1, 7, 9, c_partial + others}, c_partial, last, last, {}, {}});
    }
    test_case<T>({{1, 7, 9, c_partial + 4}, c_partial, first, first, {}, {}});
  }
  // Widths around the micro-kernel's rows.
  for (int64_t width : rows_around_tiles()) {
    for (Layout layout : {last, first}) {
      test_case<T>({{1, 1, width, 40}, 10, layout, layout, {}, {}});
      test_case<T>({{1, 2, width, 40}, 10, layout, layout, {}, {}});
      test_case<T>({{1, 9, width, 9}, 9, layout, layout, {}, {}});
    }
  }
  // Wide, tall, batches, slices, and all pairs of layouts.
  for (const Shape& shape : {Shape{3, 7, 9, 40}, Shape{2, 14, 14, 36}, Shape{1, 56, 5, 40}, Shape{1, 5, 56, 40},
                             Shape{1, 3, 300, 40}, Shape{1, 3, 700, 12}, Shape{0, 7, 9, 40}}) {
    for (Layout x_layout : {last, first}) {
      for (Layout y_layout : {last, first}) {
        test_case<T>({shape, 10, x_layout, y_layout, {}, {}});
        test_case<T>({shape, 8, x_layout, y_layout, {3, shape.channels + 5}, {1, shape.channels + 2}});
      }
    }
  }
  test_case<T>({{1, 4, 7, 600}, 300, last, last, {}, {}});
  for (Layout layout : {last, first}) {
    test_non_finite<T>({2, 7, 9, 20}, 10, layout);
    test_non_finite<T>({1, 3, 70, 9}, 9, layout);
  }
}

// The fast tier: within its own bound, by all rules about bits, where fasternet_cpu.h says that it runs and nowhere
// else.
template <class T>
void test_fast_case(const Case& c) {
  const std::string name = name_of<T>(c) + " fast";
  const auto filter = Filter<T>::random(2, c.c_partial, c.c_partial, 3, 3, false, false);
  const Packed<T> packed({&filter}, First::kFastPConv);
  Tensor<T> x(c.shape, c.x_layout, c.x_slice), fast(c.shape, c.y_layout, c.y_slice);
  x.fill(1);
  Tensor<T> direct = fast.blank();
  pconv3x3(x, &direct, packed, c.c_partial, fasternet::serial());
  check_properties(name, x, &fast, [&](const Tensor<T>& in, Tensor<T>* out, const ParallelFor& parallel, int64_t) {
    pconv3x3(in, out, packed, c.c_partial, parallel, true);
  });
  Tensor<T> in_place = x;  // never fast
  pconv3x3(in_place, &in_place, packed, c.c_partial, fasternet::serial(), true);
  Tensor<T> expected = x;
  expected.assign(direct);
  check(in_place.same_bits(expected), name, "in place is not the default tier");

  const bool runs = std::is_same<T, float>::value && c.shape.batch > 0 && c.x_layout == Layout::kChannelsLast &&
                    fasternet::fast_tier_pays(c.c_partial, c.shape.height, c.shape.width);
  check(fast.same_bits(direct) != runs, name, "runs in the other tier");
  if constexpr (std::is_same<T, float>::value) {
    check_fast_close(name, fast, direct, partial_conv<Exact>(x.template dense<double>(), c.shape, filter));
  }
}

// A NaN or an infinity reaches at most two rows and four columns away, and leaves the bits of all else.
void test_fast_non_finite() {
  const int64_t c_partial = 24;
  const Shape shape = {2, 15, 22, 40};
  const auto filter = Filter<float>::random(4, c_partial, c_partial, 3, 3, false, false);
  const Packed<float> packed({&filter}, First::kFastPConv);
  const auto run = [&](const Tensor<float>& x) {
    Tensor<float> y(shape);
    pconv3x3(x, &y, packed, c_partial, fasternet::serial(), true);
    return y;
  };
  Tensor<float> x(shape);
  x.fill(3);
  const Tensor<float> finite = run(x);
  for (float special : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (int64_t pixel = 0; pixel < shape.height * shape.width; ++pixel) {
      const int64_t row = pixel / shape.width, column = pixel % shape.width;
      Tensor<float> with = x;
      with.at(1, row, column, 5) = special;
      Tensor<float> y = run(with);
      bool reached = true;  // the pixels that it must reach
      for (int64_t h = std::max<int64_t>(row - 2, 0); h <= std::min(row + 2, shape.height - 1); ++h) {
        for (int64_t w = std::max<int64_t>(column - 4, 0); w <= std::min(column + 4, shape.width - 1); ++w) {
          const bool neighbour = std::abs(h - row) <= 1 && std::abs(w - column) <= 1;
          for (int64_t c = 0; c < c_partial; ++c) {
            reached = reached && (!neighbour || !std::isfinite(y.at(1, h, w, c)));
            y.at(1, h, w, c) = finite.at(1, h, w, c);
          }
        }
      }
      const std::string name = "pconv3x3 fast with " + std::to_string(special) + " in pixel " + std::to_string(pixel);
      check(reached, name, "a neighbour is finite");
      check(y.same_bits(finite), name, "reaches further than two rows and four columns");
    }
  }
}

void test_fast() {
  const Layout last = Layout::kChannelsLast, first = Layout::kChannelsFirst;
  for (int64_t c_partial : {8, 24, 32, 36, 40, 96}) {  // 8 and 36 have no fast tier
    for (const Shape& shape : fast_shapes(c_partial + 5)) {
      test_fast_case<float>({shape, c_partial, last, last, {}, {}});
      test_fast_case<float>({shape, c_partial, last, first, {3, shape.channels + 5}, {1, shape.channels + 2}});
    }
  }
  test_fast_case<float>({{1, 14, 14, 24}, 24, last, last, {}, {}});  // all channels
  test_fast_case<float>({{1, 14, 14, 30}, 24, first, last, {}, {}});
  test_fast_case<double>({{1, 14, 14, 30}, 24, last, last, {}, {}});
  test_fast_case<BFloat16>({{1, 14, 14, 30}, 24, last, last, {}, {}});
  test_fast_non_finite();
}

}  // namespace

int main() {
  return run_tests("test_pconv3x3", [] {
    test_type<float>();
    test_type<double>();
    test_type<BFloat16>();
    test_fast();
  });
}
