// Convolution of non-overlapping patches: the stem (4x4) and the merging layers (2x2).
#include "testing.h"

namespace {

using namespace testing;

struct Case {
  Shape shape;
  int64_t c_out, kh, kw;
  Layout layout = Layout::kChannelsLast;
  bool with_scale = true, with_shift = true;
  Slice x_slice = {}, y_slice = {};
};

template <class T>
std::string name_of(const Case& c) {
  return std::string("patch_conv ") + Storage<T>::kName + " " + c.shape.str() + " by " + std::to_string(c.kh) + "x" +
         std::to_string(c.kw) + " to " + std::to_string(c.c_out) +
         (c.layout == Layout::kChannelsFirst ? " NCHW" : " channels-last") + (c.with_scale ? " scale" : "") +
         (c.with_shift ? " shift" : "") + (c.x_slice.stored > 0 ? " of a wider x" : "");
}

template <class T>
void test_case(const Case& c) {
  const auto filter = Filter<T>::random(2, c.c_out, c.shape.channels, c.kh, c.kw, c.with_scale, c.with_shift);
  const Packed<T> packed({&filter});
  Tensor<T> x(c.shape, c.layout, c.x_slice);
  Tensor<T> y({c.shape.batch, c.shape.height / c.kh, c.shape.width / c.kw, c.c_out}, Layout::kChannelsLast, c.y_slice);
  x.fill(1);
  // Rows and columns that fill no patch are to be ignored, so whatever they hold must not reach y.
  for (int64_t b = 0; b < c.shape.batch; ++b) {
    for (int64_t h = 0; h < c.shape.height; ++h) {
      for (int64_t w = 0; w < c.shape.width; ++w) {
        if (h < c.shape.height / c.kh * c.kh && w < c.shape.width / c.kw * c.kw) continue;
        for (int64_t i = 0; i < c.shape.channels; ++i) x.at(b, h, w, i) = round_to<T>(std::nan(""));
      }
    }
  }
  const auto operation = [&](const Tensor<T>& in, Tensor<T>* out, const ParallelFor& parallel, int64_t) {
    fasternet::PatchConv args;
    args.dtype = Storage<T>::kDType;
    args.batch = in.shape().batch, args.channels = in.shape().channels;
    args.height = in.shape().height, args.width = in.shape().width;
    args.c_out = c.c_out, args.kh = c.kh, args.kw = c.kw;
    args.x = in.data();
    std::copy_n(in.stride(), 4, args.x_stride);
    args.y = out->data(), args.y_pixel_stride = out->pixel_stride();
    args.packed = packed.data();
    fasternet::patch_conv(args, parallel);
  };
  check_properties(name_of<T>(c), x, &y, operation);
  const auto exact = conv_shift_act<Exact>(x.template dense<double>(), c.shape, filter, Act::kIdentity);
  const auto plain = conv_shift_act<Plain<Compute<T>>>(x.template dense<Compute<T>>(), c.shape, filter, Act::kIdentity);
  check_close(name_of<T>(c), y, exact, plain);

  // A NaN or an infinity spoils its own patch only.
  if (c.shape.batch == 0 || y.shape().size() == 0) return;
  for (double special : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    Tensor<T> spoilt = x;
    spoilt.at(c.shape.batch - 1, y.shape().height * c.kh - 1, y.shape().width * c.kw / 2, c.shape.channels - 1) =
        round_to<T>(special);
    Tensor<T> result = y.blank();
    operation(spoilt, &result, fasternet::serial(), 0);
    const std::string name = name_of<T>(c) + " with " + std::to_string(special);
    check_non_finite(name, result,
                     conv_shift_act<Exact>(spoilt.template dense<double>(), c.shape, filter, Act::kIdentity));
    Threads two(2);
    Tensor<T> shared = y.blank();
    operation(spoilt, &shared, two.parallel(), 0);
    check(shared.same_bits(result), name, "other bits with 2 threads");
  }
}

template <class T>
void test_type() {
  for (Layout layout : {Layout::kChannelsLast, Layout::kChannelsFirst}) {
    for (int64_t c_out : columns_around_tiles()) {
      test_case<T>({{1, 20, 12, 3}, c_out, 4, 4, layout});
      test_case<T>({{1, 6, 10, 9}, c_out, 2, 2, layout});
    }
    // Patches in a row around the micro-kernel's rows, with and without a remainder.
    for (int64_t width : rows_around_tiles()) {
      test_case<T>({{1, 4, 4 * width, 3}, 40, 4, 4, layout});
      test_case<T>({{1, 5, 2 * width + 1, 40}, 80, 2, 2, layout, false, true});
    }
    for (const Shape& shape : {Shape{3, 9, 11, 5}, Shape{1, 97, 131, 3}, Shape{2, 8, 620, 3}, Shape{0, 8, 8, 3},
                               Shape{1, 14, 14, 160}, Shape{3, 5, 5, 300}}) {
      test_case<T>({shape, 24, 4, 4, layout});
      test_case<T>({shape, 24, 2, 2, layout, true, false, {3, shape.channels + 4}, {1, 27}});
      test_case<T>({shape, 17, 1, 3, layout, false, false});
      test_case<T>({shape, 17, 3, 2, layout});
    }
    test_case<T>({{1, 10, 8, 5}, 24, 5, 2, layout});
    // Several rows of patches in a tile, each cut into groups by itself.
    for (int64_t width : {10, 15, 19}) test_case<T>({{1, 8, 2 * width, 40}, 80, 2, 2, layout});
    // Many weights for few pixels: threads share columns instead of tiles, of 2 threads, of 5 or of 8.
    test_case<T>({{1, 14, 14, 160}, 320, 2, 2, layout});
    test_case<T>({{1, 24, 24, 40}, 441, 2, 2, layout, true, true, {3, 44}, {1, 443}});  // several tiles
    test_case<T>({{1, 1, 170, 256}, 256, 1, 1, layout});
  }
}

}  // namespace

int main() {
  return run_tests("test_patch_conv", [] {
    test_type<float>();
    test_type<double>();
    test_type<BFloat16>();
  });
}
