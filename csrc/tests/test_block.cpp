// y = residual + sample_scale * conv1x1(act(conv1x1(u, w_pw1) + shift), w_pw2): a FasterNet block.
#include "testing.h"

namespace {

using namespace testing;

struct Case {
  Shape shape;
  int64_t c_partial, c_hidden;
  Act act = Act::kRelu;
  bool with_bn = true, with_layer_scale = false, with_sample_scale = false;
  bool own_residual = false;  // a tensor that is not x
  Slice x_slice = {}, y_slice = {};
  bool fast = false, fast_pack = false;  // the tier, and whether the pack allows it
};

// T: storage of x and the weights; R: of the residual and the result.
template <class T, class R>
std::string name_of(const Case& c) {
  return std::string("block ") + Storage<T>::kName + (std::is_same<T, R>::value ? "" : " + float32 residual") + " " +
         c.shape.str() + " c_partial " + std::to_string(c.c_partial) + " c_hidden " + std::to_string(c.c_hidden) + " " +
         act_name(c.act) + (c.with_bn ? " bn" : "") + (c.with_layer_scale ? " layer_scale" : "") +
         (c.with_sample_scale ? " sample_scale" : "") + (c.own_residual ? " own residual" : "") +
         (c.x_slice.stored > 0 ? " of a wider x" : "") + (c.fast ? " fast" : "");
}

template <class T, class R>
struct Operation {
  explicit Operation(const Case& c)
      : c(c),
        partial(Filter<T>::random(2, c.c_partial, c.c_partial, 3, 3, false, false)),
        pw1(Filter<T>::random(3, c.c_hidden, c.shape.channels, 1, 1, c.with_bn, c.with_bn)),
        pw2(Filter<T>::random(4, c.shape.channels, c.c_hidden, 1, 1, c.with_layer_scale, false)),
        packed({&partial, &pw1, &pw2}, c.fast_pack ? First::kFastPConv : First::kPConv),
        residual(c.shape) {
    residual.fill(5);
    for (int64_t b = 0; c.with_sample_scale && b < c.shape.batch; ++b) {
      sample_scale.push_back(static_cast<Compute<T>>(b == 1 ? 0.0 : 1.25 + 0.5 * static_cast<double>(b)));
    }
  }

  // x holds the images of the case from first_image on.
  void operator()(const Tensor<T>& x, Tensor<R>* y, const ParallelFor& parallel, int64_t first_image = 0) const {
    fasternet::Block args;
    args.dtype = Storage<T>::kDType, args.residual_dtype = Storage<R>::kDType;
    args.batch = x.shape().batch, args.channels = x.shape().channels;
    args.height = x.shape().height, args.width = x.shape().width;
    args.c_partial = c.c_partial, args.c_hidden = c.c_hidden;
    args.x = x.data(), args.x_pixel_stride = x.pixel_stride();
    args.residual = x.data(), args.residual_pixel_stride = x.pixel_stride();
    if (c.own_residual) {
      args.residual = residual.data() + first_image * residual.stride()[0];
      args.residual_pixel_stride = residual.pixel_stride();
    }
    args.y = y->data(), args.y_pixel_stride = y->pixel_stride();
    args.packed = packed.data();
    args.sample_scale = c.with_sample_scale ? sample_scale.data() + first_image : nullptr;
    args.act = c.act;
    args.fast = c.fast;
    fasternet::block(args, parallel);
  }

  template <class Arithmetic>
  auto expected(const Tensor<T>& x) const {
    using Real = typename Arithmetic::Real;
    const auto dense = x.template dense<Real>();
    const auto u = partial_conv<Arithmetic>(dense, c.shape, partial);
    const auto a = conv_shift_act<Arithmetic>(u, c.shape, pw1, c.act);
    const Shape hidden{c.shape.batch, c.shape.height, c.shape.width, c.c_hidden};
    auto y = conv_shift_act<Arithmetic>(a, hidden, pw2, Act::kIdentity);
    const auto added = c.own_residual ? residual.template dense<Real>() : dense;
    const size_t image = static_cast<size_t>(c.shape.size() / std::max<int64_t>(c.shape.batch, 1));
    for (size_t i = 0; i < y.size(); ++i) {
      if (c.with_sample_scale) y[i] *= sample_scale[i / image];
      y[i] += added[i];
    }
    return y;
  }

  Case c;
  Filter<T> partial, pw1, pw2;
  Packed<T> packed;
  Tensor<R> residual;
  std::vector<Compute<T>> sample_scale;
};

template <class T, class R = T>
void test_case(const Case& c) {
  const Operation<T, R> operation(c);
  Tensor<T> x(c.shape, Layout::kChannelsLast, c.x_slice);
  Tensor<R> y(c.shape, Layout::kChannelsLast, c.y_slice);
  x.fill(1);
  const Tensor<R> residual_before = operation.residual;
  check_properties(name_of<T, R>(c), x, &y, operation);
  check(operation.residual.same_bits(residual_before), name_of<T, R>(c), "the residual changed");
  check_close(name_of<T, R>(c), y, operation.template expected<Exact>(x),
              operation.template expected<Plain<Compute<T>>>(x));
}

template <class T>
void test_non_finite(const Case& c) {
  const Operation<T, T> operation(c);
  for (double special :
       {std::nan(""), std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()}) {
    for (int64_t channel : {int64_t{0}, c.c_partial - 1, c.shape.channels - 1}) {
      for (int64_t pixel = 0; pixel < c.shape.height * c.shape.width; pixel += 7) {
        Tensor<T> x(c.shape, Layout::kChannelsLast, c.x_slice), y(c.shape);
        x.fill(3);
        x.at(c.shape.batch - 1, pixel / c.shape.width, pixel % c.shape.width, channel) = round_to<T>(special);
        operation(x, &y, fasternet::serial());
        const std::string name = name_of<T, T>(c) + " with " + std::to_string(special) + " in channel " +
                                 std::to_string(channel) + " of pixel " + std::to_string(pixel);
        check_non_finite(name, y, operation.template expected<Exact>(x));
        Threads two(2);
        Tensor<T> shared = y.blank();
        operation(x, &shared, two.parallel());
        check(shared.same_bits(y), name, "other bits with 2 threads");
      }
    }
  }
}

template <class T>
void test_type() {
  // Channels and hidden channels around the panels' widths.
  for (int64_t channels : columns_around_tiles()) {
    test_case<T>({{1, 5, 7, channels}, (channels + 3) / 4, 2 * channels});
    test_case<T>({{1, 5, 7, channels}, channels, channels + 1, Act::kGelu});
  }
  for (int64_t c_hidden : columns_around_tiles()) test_case<T>({{1, 5, 7, 20}, 5, c_hidden});
  // Pixels around the micro-kernel's rows.
  for (int64_t width : rows_around_tiles()) {
    test_case<T>({{1, 1, width, 40}, 10, 80, Act::kGelu});
    test_case<T>({{1, 3, width, 24}, 8, 48});
  }
  // Several hidden chunks, several blocks of K.
  for (int64_t c_hidden : {191, 192, 193, 255, 256, 257, 385, 600}) test_case<T>({{1, 5, 7, 36}, 36, c_hidden});
  test_case<T>({{1, 4, 7, 300}, 75, 600});
  test_case<T>({{1, 3, 7, 520}, 130, 600, Act::kGelu});
  test_case<T>({{1, 2, 3, 300}, 300, 1040});
  // Wide, tall, batches, slices, the stages' own sizes.
  for (const Shape& shape : {Shape{3, 7, 9, 40}, Shape{2, 14, 14, 36}, Shape{1, 56, 5, 40}, Shape{1, 5, 56, 40},
                             Shape{1, 3, 300, 40}, Shape{3, 1, 1, 40}, Shape{0, 7, 9, 40}, Shape{1, 7, 7, 320}}) {
    test_case<T>({shape, shape.channels / 4, 2 * shape.channels});
    Case c{shape, 8, 65, Act::kGelu};
    c.with_layer_scale = c.with_sample_scale = c.own_residual = true;
    c.x_slice = {3, shape.channels + 5}, c.y_slice = {1, shape.channels + 2};
    test_case<T>(c);
  }
  for (Act act : all_acts()) {
    for (int options = 0; options < 16; ++options) {
      Case c{{2, 7, 9, 20}, 5, 40, act};
      c.with_bn = options & 1, c.with_layer_scale = options & 2, c.with_sample_scale = options & 4;
      c.own_residual = options & 8;
      test_case<T>(c);
    }
    // 33 hidden channels: the unused lanes of the last panel see inf * 0, which must not reach the second convolution.
    test_non_finite<T>({{2, 5, 7, 20}, 10, 33, act});
  }
  Case wide{{1, 5, 7, 300}, 75, 257, Act::kIdentity};
  wide.x_slice = {2, 305};
  test_non_finite<T>(wide);
}

// Many weights for few pixels: threads share columns instead of tiles, of 2 threads, of 5 or of 8 as shapes and the
// number of hidden channels have it.
template <class T>
void test_columns() {
  for (const Shape& shape :
       {Shape{1, 7, 7, 320}, Shape{1, 5, 7, 300}, Shape{2, 4, 5, 300}, Shape{1, 1, 170, 320}, Shape{1, 14, 14, 256}}) {
    test_case<T>({shape, shape.channels / 4, 2 * shape.channels, Act::kGelu});
    Case c{shape, 8, 257};
    c.with_layer_scale = c.with_sample_scale = c.own_residual = true;
    c.x_slice = {3, shape.channels + 5}, c.y_slice = {1, shape.channels + 2};
    test_case<T>(c);
  }
  test_case<T>({{1, 7, 7, 385}, 96, 385});  // in two and three passes of K
  Case c{{1, 7, 7, 320}, 80, 640, Act::kGelu};
  c.x_slice = {16, 1024};  // rows that compete for the same sets of a cache are copied
  test_case<T>(c);
}

// The fast tier: a block's error is within the same criterion, all rules about bits hold, and its pack is one that the
// default tier reads as ever.
void test_fast() {
  for (int64_t channels : {32, 96, 128, 160}) {  // 8, 24, 32 and 40 convolved ones, the first without a fast tier
    for (const Shape& shape : fast_shapes(channels)) {
      Case c{shape, channels / 4, channels};
      c.x_slice = {8, channels + 16};
      const auto run = [&] {
        const Operation<float, float> operation(c);
        Tensor<float> x(c.shape, Layout::kChannelsLast, c.x_slice), y(c.shape);
        x.fill(1);
        operation(x, &y, fasternet::serial());
        return y;
      };
      const Tensor<float> direct = run();
      c.fast_pack = true;
      check(run().same_bits(direct), name_of<float, float>(c), "other bits with a pack for the fast tier");
      c.fast = true;
      const bool has_fast = channels >= 96 && shape.height >= 14 && shape.width >= 14 && shape.batch > 0;
      check(run().same_bits(direct) != has_fast, name_of<float, float>(c), "runs in the other tier");
      test_case<float>(c);
      c.with_layer_scale = c.with_sample_scale = c.own_residual = true;
      c.act = Act::kGelu;
      test_case<float>(c);
    }
  }
  Case shared{{1, 14, 14, 256}, 64, 256};  // 8 threads share columns
  shared.fast = shared.fast_pack = true;
  test_case<float>(shared);
  Case c{{1, 14, 14, 96}, 24, 96};  // other dtypes ignore it
  c.fast = c.fast_pack = true;
  test_case<double>(c);
  test_case<BFloat16>(c);
}

// Under autocast x is bfloat16 and the residual stream stays float.
void test_float_residual() {
  for (const Shape& shape :
       {Shape{3, 7, 9, 40}, Shape{1, 1, 1, 17}, Shape{1, 3, 300, 33}, Shape{0, 7, 9, 40}, Shape{1, 7, 7, 320}}) {
    Case c{shape, 8, 2 * shape.channels, Act::kGelu};
    c.own_residual = true;
    test_case<BFloat16, float>(c);
    c.with_layer_scale = c.with_sample_scale = true, c.y_slice = {3, shape.channels + 4};
    test_case<BFloat16, float>(c);
  }
}

}  // namespace

int main() {
  return run_tests("test_block", [] {
    test_type<float>();
    test_type<double>();
    test_type<BFloat16>();
    test_columns<float>();
    test_columns<double>();
    test_columns<BFloat16>();
    test_float_residual();
    test_fast();
  });
}
