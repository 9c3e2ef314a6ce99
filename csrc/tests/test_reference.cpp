// The reference itself, against values worked out by hand or known in closed form, and the rounding helper of
// testing.h.
#include "testing.h"

namespace {

using namespace testing;

void check_values(const std::string& name, const std::vector<double>& result, const std::vector<double>& expected) {
  check(result == expected, name, "not the values worked out by hand");
}

void test_conv() {
  // One channel, 2x3 image, weights 1..9: each output is the weights' sum over the pixels in reach.
  const std::vector<double> image = {1, 0, 0, 0, 0, 10};
  const std::vector<double> weight = {1, 2, 3, 4, 5, 6, 7, 8, 9};
  check_values("3x3 with padding", fasternet::reference::conv(image, 1, 2, 3, 1, weight, 1, 3, 3, 1, 1, 1),
               {5, 4 + 90, 80, 2, 1 + 60, 50});
  // 2x2 patches of a 3x5 image: the last row and column take no part.
  const std::vector<double> wide = {1, 2, 3, 4, 99, 5, 6, 7, 8, 99, 99, 99, 99, 99, 99};
  check_values("2x2 patches", fasternet::reference::conv(wide, 1, 3, 5, 1, {1, 10, 100, 1000}, 1, 2, 2, 2, 2, 0),
               {1 + 20 + 500 + 6000, 3 + 40 + 700 + 8000});
  // Two channels to three, 1x1, batch 2.
  check_values("1x1", fasternet::reference::conv({1, 2, 3, 4}, 2, 1, 1, 2, {1, 0, 0, 1, 1, 1}, 3, 1, 1, 1, 1, 0),
               {1, 2, 3, 3, 4, 7});
  // Weights are (n, c, kh, kw): 1x2 kernel over two channels.
  check_values("OIHW", fasternet::reference::conv({1, 2, 3, 4}, 1, 1, 2, 2, {1, 10, 100, 1000}, 1, 1, 2, 1, 2, 0),
               {1 + 10 * 3 + 100 * 2 + 1000 * 4});
  check_values("no batch", fasternet::reference::conv({}, 0, 2, 2, 1, {1}, 1, 1, 1, 1, 1, 0), {});
  check_values("smaller than a patch", fasternet::reference::conv({1}, 1, 1, 1, 1, {1, 1, 1, 1}, 1, 2, 2, 2, 2, 0), {});
}

void test_act() {
  struct Known {
    Act act;
    double x, y;
  };
  // erf(1/sqrt 2) = 0.682689492137086, the share of a normal distribution within one deviation.
  const Known known[] = {{Act::kIdentity, -2.5, -2.5},
                         {Act::kRelu, -2.5, 0},
                         {Act::kRelu, 2.5, 2.5},
                         {Act::kGelu, 1, 0.5 * (1 + 0.682689492137086)},
                         {Act::kGelu, -1, -0.5 * (1 - 0.682689492137086)},
                         {Act::kGeluTanh, 1, 0.5 * (1 + std::tanh(0.7978845608028654 * 1.044715))},
                         {Act::kGeluTanh, -1, -0.5 * (1 - std::tanh(0.7978845608028654 * 1.044715))},
                         {Act::kSilu, 2, 2 / (1 + std::exp(-2.0))},
                         {Act::kHardswish, -4, 0},
                         {Act::kHardswish, 1, 4.0 / 6},
                         {Act::kHardswish, 5, 5}};
  for (const Known& k : known) {
    const double y = fasternet::reference::act(k.act, k.x);
    check(std::fabs(y - k.y) < 1e-14, act_name(k.act), "is " + std::to_string(y) + " at " + std::to_string(k.x));
  }
  const double infinity = std::numeric_limits<double>::infinity();
  for (Act act : all_acts()) {
    check(fasternet::reference::act(act, 0) == 0, act_name(act), "not 0 at 0");
    check(std::isnan(fasternet::reference::act(act, std::nan(""))), act_name(act), "loses a NaN");
    check(fasternet::reference::act(act, infinity) == infinity, act_name(act), "not infinite at infinity");
    check(std::fabs(fasternet::reference::act(act, -1e30)) <= (act == Act::kIdentity ? 1e30 : 0), act_name(act),
          "not 0 far below zero");
  }
}

void test_bfloat16_rounding() {
  struct Known {
    double value;
    uint16_t bits;
  };
  const double ulp = std::ldexp(1.0, -7);  // of 1
  const Known known[] = {{1, 0x3f80},
                         {-2, 0xc000},
                         {1 + ulp, 0x3f81},
                         {1 + 0.5 * ulp, 0x3f80},  // ties go to the even neighbour
                         {1 + 1.5 * ulp, 0x3f82},
                         {1 + 0.51 * ulp, 0x3f81},
                         {3.4e38, 0x7f80},
                         {0, 0}};
  for (const Known& k : known) {
    check(round_to<BFloat16>(k.value).bits == k.bits, "bfloat16", "of " + std::to_string(k.value));
  }
  check(std::isnan(to_double(round_to<BFloat16>(std::nan("")))), "bfloat16", "of NaN");
}

}  // namespace

int main() {
  return run_tests("test_reference", [] {
    test_conv();
    test_act();
    test_bfloat16_rounding();
  });
}
