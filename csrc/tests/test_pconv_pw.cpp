// y = act(conv1x1(u, w_pw) + shift), u = x with its first channels convolved.
#include "testing.h"

namespace {

using namespace testing;

struct Case {
  Shape shape;
  int64_t c_partial, c_out;
  Act act = Act::kRelu;
  bool with_scale = true, with_shift = true;
  Slice x_slice = {}, y_slice = {};
  bool fast = false;  // the tier; the pack allows both
};

template <class T>
std::string name_of(const Case& c) {
  return std::string("pconv_pw ") + Storage<T>::kName + " " + c.shape.str() + " c_partial " +
         std::to_string(c.c_partial) + " c_out " + std::to_string(c.c_out) + " " + act_name(c.act) +
         (c.with_scale ? " scale" : "") + (c.with_shift ? " shift" : "") +
         (c.x_slice.stored > 0 ? " of a wider x" : "") + (c.fast ? " fast" : "");
}

template <class T>
struct Operation {
  explicit Operation(const Case& c)
      : c(c),
        partial(Filter<T>::random(2, c.c_partial, c.c_partial, 3, 3, false, false)),
        pw(Filter<T>::random(3, c.c_out, c.shape.channels, 1, 1, c.with_scale, c.with_shift)),
        packed({&partial, &pw}, c.fast ? First::kFastPConv : First::kPConv) {}

  void operator()(const Tensor<T>& x, Tensor<T>* y, const ParallelFor& parallel, int64_t = 0) const {
    fasternet::PConvPw args;
    args.dtype = Storage<T>::kDType;
    args.batch = x.shape().batch, args.channels = x.shape().channels;
    args.height = x.shape().height, args.width = x.shape().width;
    args.c_partial = c.c_partial, args.c_out = c.c_out;
    args.x = x.data(), args.x_pixel_stride = x.pixel_stride();
    args.y = y->data(), args.y_pixel_stride = y->pixel_stride();
    args.packed = packed.data(), args.act = c.act, args.fast = c.fast;
    fasternet::pconv_pw(args, parallel);
  }

  template <class Arithmetic>
  auto expected(const Tensor<T>& x) const {
    const auto u = partial_conv<Arithmetic>(x.template dense<typename Arithmetic::Real>(), c.shape, partial);
    return conv_shift_act<Arithmetic>(u, c.shape, pw, c.act);
  }

  Case c;
  Filter<T> partial, pw;
  Packed<T> packed;
};

Shape output_shape(const Case& c) { return {c.shape.batch, c.shape.height, c.shape.width, c.c_out}; }

template <class T>
void test_case(const Case& c) {
  const Operation<T> operation(c);
  Tensor<T> x(c.shape, Layout::kChannelsLast, c.x_slice), y(output_shape(c), Layout::kChannelsLast, c.y_slice);
  x.fill(1);
  check_properties(name_of<T>(c), x, &y, operation);
  check_close(name_of<T>(c), y, operation.template expected<Exact>(x),
              operation.template expected<Plain<Compute<T>>>(x));
}

template <class T>
void test_non_finite(const Case& c) {
  const Operation<T> operation(c);
  for (double special :
       {std::nan(""), std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()}) {
    for (int64_t channel : {int64_t{0}, c.c_partial - 1, c.shape.channels - 1}) {
      for (int64_t pixel = 0; pixel < c.shape.height * c.shape.width; pixel += 7) {
        Tensor<T> x(c.shape, Layout::kChannelsLast, c.x_slice), y(output_shape(c));
        x.fill(3);
        x.at(c.shape.batch - 1, pixel / c.shape.width, pixel % c.shape.width, channel) = round_to<T>(special);
        operation(x, &y, fasternet::serial());
        const std::string name = name_of<T>(c) + " with " + std::to_string(special) + " in channel " +
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
  for (int64_t c_out : columns_around_tiles()) {
    test_case<T>({{1, 7, 9, 40}, 10, c_out});
    test_case<T>({{1, 1, 5, 9}, 1, c_out, Act::kGelu});
  }
  // Pixels around the micro-kernel's rows.
  for (int64_t width : rows_around_tiles()) {
    for (int64_t c_out : {8, 16, 24, 48, 72, 80}) test_case<T>({{1, 1, width, 40}, 10, c_out});
    test_case<T>({{1, 3, width, 33}, 33, 17, Act::kSilu});
  }
  // Partial channels, up to all of them; K in one and in several blocks.
  for (int64_t c_partial : {1, 7, 8, 9, 10, 16, 36, 40}) {
    for (int64_t others : {0, 1, 40}) test_case<T>({{1, 5, 7, c_partial + others}, c_partial, 24, Act::kHardswish});
  }
  for (int64_t channels : {191, 192, 193, 255, 256, 257, 300, 385, 520}) {
    for (int64_t c_partial : {int64_t{8}, channels / 4}) test_case<T>({{1, 4, 7, channels}, c_partial, 48});
  }
  test_case<T>({{1, 3, 4, 300}, 300, 16});
  // Wide, tall, batches, slices.
  for (const Shape& shape : {Shape{3, 7, 9, 40}, Shape{2, 14, 14, 36}, Shape{1, 56, 5, 40}, Shape{1, 5, 56, 40},
                             Shape{1, 3, 300, 40}, Shape{3, 1, 1, 40}, Shape{0, 7, 9, 40}}) {
    test_case<T>({shape, 10, 33});
    test_case<T>({shape, 8, 40, Act::kGelu, true, true, {3, shape.channels + 5}, {1, 43}});
  }
  for (Act act : all_acts()) {
    for (bool with_scale : {false, true}) {
      for (bool with_shift : {false, true}) test_case<T>({{1, 7, 9, 20}, 5, 33, act, with_scale, with_shift});
    }
    // 33 outputs: the unused lanes of the last panel see inf * 0, which must stay theirs.
    test_non_finite<T>({{2, 5, 7, 20}, 10, 33, act});
  }
  test_non_finite<T>({{1, 5, 7, 300}, 75, 17, Act::kIdentity, true, true, {2, 305}});
  // Many weights for few pixels: threads share columns instead of tiles, of 2 threads, of 5 or of 8 as shapes have it.
  for (const Shape& shape :
       {Shape{1, 7, 7, 320}, Shape{1, 5, 7, 300}, Shape{2, 4, 5, 300}, Shape{1, 1, 170, 320}, Shape{1, 14, 14, 256}}) {
    test_case<T>({shape, shape.channels / 4, 320, Act::kGelu});
    test_case<T>({shape, 8, 257, Act::kRelu, true, true, {3, shape.channels + 5}, {1, 259}});
  }
  test_case<T>({{1, 7, 7, 320}, 80, 640, Act::kGelu, true, true, {16, 1024}, {0, 640}});
  test_non_finite<T>({{1, 5, 7, 300}, 75, 257});
}

// The fast tier: within the bound that fasternet_cpu.h gives, by all rules about bits, where it says that it runs.
template <class T>
void test_fast_case(Case c) {
  Tensor<T> x(c.shape, Layout::kChannelsLast, c.x_slice), fast(output_shape(c), Layout::kChannelsLast, c.y_slice);
  x.fill(1);
  Tensor<T> direct = fast.blank();
  const Operation<T> default_tier(c);
  default_tier(x, &direct, fasternet::serial());
  c.fast = true;
  const Operation<T> operation(c);
  check_properties(name_of<T>(c), x, &fast, operation);
  const bool runs = std::is_same<T, float>::value && c.shape.batch > 0 &&
                    fasternet::fast_tier_pays(c.c_partial, c.shape.height, c.shape.width);
  check(fast.same_bits(direct) != runs, name_of<T>(c), "runs in the other tier");
  if constexpr (std::is_same<T, float>::value) {
    check_fast_close(name_of<T>(c), fast, direct, operation.template expected<Exact>(x));
  }
}

void test_fast() {
  for (int64_t c_partial : {8, 24, 32, 36, 40}) {  // 8 and 36 have no fast tier
    for (const Shape& shape : fast_shapes(c_partial + 21)) {
      test_fast_case<float>({shape, c_partial, 33});
      test_fast_case<float>({shape, c_partial, 40, Act::kGelu, true, true, {3, shape.channels + 5}, {1, 43}});
    }
  }
  test_fast_case<float>({{1, 14, 14, 24}, 24, 24, Act::kIdentity, false, false});  // all channels
  test_fast_case<float>({{1, 14, 14, 256}, 64, 256});                              // 8 threads share columns
  test_fast_case<double>({{1, 14, 14, 96}, 24, 40});
  test_fast_case<BFloat16>({{1, 14, 14, 96}, 24, 40});
}

}  // namespace

int main() {
  return run_tests("test_pconv_pw", [] {
    test_type<float>();
    test_type<double>();
    test_type<BFloat16>();
    test_fast();
  });
}
