// The CUDA kernel pconv3x3_inplace on the CPU, by cuda_on_host.h: its arithmetic, its indices and its barriers.
#include "testing.h"
// testing.h first
#include "cuda_on_host.h"
// cuda_on_host.h first
#include "cuda/pconv3x3_inplace.cuh"

namespace {

using namespace testing;
namespace cuda = fasternet::cuda;

struct Case {
  Shape shape;
  int64_t c_partial;
  int split;
  Slice slice = {};
};

std::string name_of(const Case& c, bool reversed) {
  return "cuda pconv3x3 " + c.shape.str() + " c_partial " + std::to_string(c.c_partial) + " in " +
         std::to_string(c.split) + " blocks" + (c.slice.stored > 0 ? " of a wider x" : "") +
         (reversed ? ", the last one first" : "");
}

template <int kSteps, int kCopy>
void launch(Tensor<BFloat16>* x, const Filter<BFloat16>& filter, int split, bool reversed) {
  cuda::PConvInPlace args = {};
  args.x = reinterpret_cast<unsigned char*>(x->data());
  args.weight = reinterpret_cast<const uint16_t*>(filter.weight.data());
  args.stride_b = 2 * x->stride()[0], args.stride_h = 2 * x->stride()[2], args.stride_w = 2 * x->stride()[3];
  args.height = static_cast<int>(x->shape().height), args.width = static_cast<int>(x->shape().width);
  args.c_partial = static_cast<int>(filter.n);
  args.split = split, args.rows = (args.height + split - 1) / split;
  cuda::host::run(x->shape().batch * split, split, cuda::kPConvThreads,
                  cuda::pconv_shared(args.c_partial, args.width, args.rows), reversed,
                  [&] { cuda::pconv3x3_inplace<true, kSteps, kCopy>(args); });
}

template <int kSteps, int kCopy>
void test_case(const Case& c) {
  const auto filter = Filter<BFloat16>::random(2, c.c_partial, c.c_partial, 3, 3, false, false);
  Tensor<BFloat16> x(c.shape, Layout::kChannelsLast, c.slice);
  x.fill(1);
  const auto exact = partial_conv<Exact>(x.dense<double>(), c.shape, filter);
  const auto plain = partial_conv<Plain<float>>(x.dense<float>(), c.shape, filter);
  for (bool reversed : {false, true}) {
    Tensor<BFloat16> y = x;
    launch<kSteps, kCopy>(&y, filter, c.split, reversed);
    check_close(name_of(c, reversed), y, exact, plain);
    check(y.neighbours_untouched(), name_of(c, reversed), "wrote outside its channels");
  }
}

void test_non_finite() {
  const Case c{{1, 5, 6, 20}, 10, 2};
  const auto filter = Filter<BFloat16>::random(4, 10, 10, 3, 3, false, false);
  for (double special : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    for (int64_t pixel = 0; pixel < 30; pixel += 7) {
      Tensor<BFloat16> x(c.shape);
      x.fill(3);
      x.at(0, pixel / 6, pixel % 6, 9) = round_to<BFloat16>(special);
      const auto exact = partial_conv<Exact>(x.dense<double>(), c.shape, filter);
      launch<1, 4>(&x, filter, c.split, false);
      check_non_finite(name_of(c, false) + " with " + std::to_string(special), x, exact);
    }
  }
}

void test_split() {
  constexpr int64_t kLimit = 227 * 1024;
  for (int c_partial : {10, 16, 24, 32, 36, 48, 64}) {
    for (int side : {1, 7, 14, 28, 56, 112}) {
      for (int64_t batch : {1, 32, 256}) {
        const std::string name = "split of " + std::to_string(batch) + "x" + std::to_string(c_partial) + "x" +
                                 std::to_string(side) + "x" + std::to_string(side);
        const int split = cuda::pconv_split(batch, side, side, c_partial, kLimit, 132, true);
        check(split <= side, name, "more blocks than rows");
        check(split == 0 || cuda::pconv_shared(c_partial, side, (side + split - 1) / split) <= kLimit, name,
              "too much shared memory");
        check(split > 0 || side == 112, name, "nothing fits");
        check(cuda::pconv_split(batch, side, side, c_partial, kLimit, 132, false) <= 1, name, "needs clusters");
      }
    }
  }
  check(cuda::pconv_split(256, 56, 56, 10, kLimit, 132, true) == 2, "split", "T0 at batch 256: two blocks fit at once");
  check(cuda::pconv_split(1, 56, 56, 10, kLimit, 132, true) == 8, "split", "one image: as many blocks as there may be");
}

}  // namespace

int main() {
  return run_tests("test_cuda_pconv3x3", [] {
    // Channels around the steps of 16, copies of each width, rows that no block is left with, tiles that end in a row.
    test_case<1, 4>({{2, 7, 9, 40}, 10, 1});
    test_case<1, 4>({{1, 7, 9, 40}, 10, 8});
    test_case<1, 4>({{1, 13, 11, 40}, 10, 4});
    test_case<1, 4>({{1, 6, 5, 12}, 2, 2, {2, 20}});
    test_case<1, 16>({{1, 9, 30, 64}, 16, 2});
    test_case<2, 8>({{1, 5, 7, 72}, 20, 2});
    test_case<2, 16>({{1, 6, 8, 32}, 32, 2, {8, 48}});
    test_case<3, 8>({{1, 4, 5, 144}, 36, 4});
    test_case<4, 16>({{1, 3, 4, 64}, 64, 1});
    test_case<1, 4>({{1, 1, 1, 10}, 10, 1});
    test_non_finite();
    test_split();
  });
}
