// y = fc(act(conv1x1(mean of x) + shift)) + bias: pool, 1x1 convolution, activation, classifier.
#include "testing.h"

namespace {

using namespace testing;

struct Case {
  Shape shape;
  int64_t c_mid, c_out;
  Act act = Act::kRelu;
  bool with_scale = false, with_shift = true;
  Slice x_slice = {};
};

template <class T>
std::string name_of(const Case& c) {
  return std::string("head ") + Storage<T>::kName + " " + c.shape.str() + " c_mid " + std::to_string(c.c_mid) +
         " c_out " + std::to_string(c.c_out) + " " + act_name(c.act) + (c.with_scale ? " scale" : "") +
         (c.with_shift ? " shift" : "") + (c.x_slice.stored > 0 ? " of a wider x" : "");
}

template <class T>
struct Operation {
  explicit Operation(const Case& c)
      : c(c),
        conv(Filter<T>::random(2, c.c_mid, c.shape.channels, 1, 1, c.with_scale, c.with_shift)),
        fc(Filter<T>::random(3, c.c_out, c.c_mid, 1, 1, false, c.with_shift)),
        packed({&conv, &fc}) {}

  void operator()(const Tensor<T>& x, Tensor<T>* y, const ParallelFor& parallel, int64_t = 0) const {
    fasternet::Head args;
    args.dtype = Storage<T>::kDType;
    args.batch = x.shape().batch, args.channels = x.shape().channels;
    args.height = x.shape().height, args.width = x.shape().width;
    args.c_mid = c.c_mid, args.c_out = c.c_out;
    args.x = x.data(), args.x_pixel_stride = x.pixel_stride();
    args.y = y->data(), args.packed = packed.data(), args.act = c.act;
    fasternet::head(args, parallel);
  }

  template <class Arithmetic, class Real = typename Arithmetic::Real>
  std::vector<Real> expected(const Tensor<T>& x) const {
    const std::vector<Real> dense = x.template dense<Real>();
    const int64_t pixels = c.shape.height * c.shape.width;
    std::vector<Real> mean;
    for (int64_t b = 0; b < c.shape.batch; ++b) {
      for (int64_t channel = 0; channel < c.shape.channels; ++channel) {
        Real sum = 0;
        for (int64_t p = 0; p < pixels; ++p) {
          sum += dense[static_cast<size_t>((b * pixels + p) * c.shape.channels + channel)];
        }
        mean.push_back(sum / static_cast<Real>(pixels));
      }
    }
    const auto mid = conv_shift_act<Arithmetic>(mean, {c.shape.batch, 1, 1, c.shape.channels}, conv, c.act);
    return conv_shift_act<Arithmetic>(mid, {c.shape.batch, 1, 1, c.c_mid}, fc, Act::kIdentity);
  }

  Case c;
  Filter<T> conv, fc;
  Packed<T> packed;
};

template <class T>
void test_case(const Case& c) {
  const Operation<T> operation(c);
  Tensor<T> x(c.shape, Layout::kChannelsLast, c.x_slice), y({c.shape.batch, 1, 1, c.c_out});
  x.fill(1);
  check_properties(name_of<T>(c), x, &y, operation);
  check_close(name_of<T>(c), y, operation.template expected<Exact>(x),
              operation.template expected<Plain<Compute<T>>>(x));
}

// A NaN or an infinity in one image spoils that image's answer only.
template <class T>
void test_non_finite(const Case& c) {
  const Operation<T> operation(c);
  for (double special :
       {std::nan(""), std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()}) {
    Tensor<T> x(c.shape), y({c.shape.batch, 1, 1, c.c_out});
    x.fill(3);
    x.at(c.shape.batch - 1, c.shape.height - 1, c.shape.width / 2, c.shape.channels - 1) = round_to<T>(special);
    operation(x, &y, fasternet::serial());
    check_non_finite(name_of<T>(c) + " with " + std::to_string(special), y, operation.template expected<Exact>(x));
  }
}

template <class T>
void test_type() {
  for (int64_t n : columns_around_tiles()) {
    test_case<T>({{2, 7, 7, 40}, n, 10});
    test_case<T>({{2, 7, 7, 40}, 24, n, Act::kGelu});
    test_case<T>({{1, 2, 3, n}, 20, 10});
  }
  for (int64_t batch : rows_around_tiles()) test_case<T>({{batch, 3, 3, 40}, 80, 33});
  test_case<T>({{0, 3, 3, 40}, 80, 33});
  for (const Shape& shape :
       {Shape{1, 7, 7, 320}, Shape{3, 7, 9, 520}, Shape{3, 1, 1, 300}, Shape{1, 3, 300, 16}, Shape{1, 40, 50, 9}}) {
    test_case<T>({shape, 640, 100});
    test_case<T>({shape, 65, 100, Act::kSilu, true, false, {3, shape.channels + 5}});
  }
  test_case<T>({{1, 7, 7, 64}, 1280, 1000});
  for (Act act : all_acts()) {
    test_case<T>({{3, 4, 5, 20}, 33, 17, act, true});
    test_non_finite<T>({{3, 4, 5, 20}, 33, 17, act});
  }
}

}  // namespace

int main() {
  return run_tests("test_head", [] {
    test_type<float>();
    test_type<double>();
    test_type<BFloat16>();
  });
}
