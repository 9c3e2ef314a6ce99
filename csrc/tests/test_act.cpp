// The activations, through a pconv_pw that multiplies one channel by one: what comes out is act(x) and nothing else.
#include "testing.h"

namespace {

using namespace testing;

template <class T>
std::vector<T> values_between(double low, double high, int64_t count) {
  std::vector<T> values;
  for (int64_t i = 0; i < count; ++i) {
    const double share = static_cast<double>(i) / static_cast<double>(count - 1);
    values.push_back(round_to<T>(low + (high - low) * share));
  }
  return values;
}

// act of each value, by the kernel.
template <class T>
Tensor<T> apply_act(Act act, const std::vector<T>& values) {
  Filter<T> partial{1, 1, 3, 3, std::vector<T>(9, round_to<T>(0)), {}, {}};
  partial.weight[4] = round_to<T>(1);
  // One output channel would leave all but one lane of each vector idle; 16 equal ones compute the same thing in every
  // lane.
  constexpr int64_t kLanes = 16;
  const Filter<T> pw{kLanes, 1, 1, 1, std::vector<T>(kLanes, round_to<T>(1)), {}, {}};
  const Packed<T> packed({&partial, &pw}, First::kPConv);
  const int64_t count = static_cast<int64_t>(values.size());
  Tensor<T> x({count, 1, 1, 1}), y({count, 1, 1, kLanes}), result({count, 1, 1, 1});
  std::copy(values.begin(), values.end(), x.data());
  fasternet::pconv_pw(
      {Storage<T>::kDType, count, 1, 1, 1, 1, kLanes, x.data(), 1, y.data(), kLanes, packed.data(), act},
      fasternet::serial());
  for (int64_t i = 0; i < count; ++i) {
    const double first = to_double(y.at(i, 0, 0, 0));
    result.at(i, 0, 0, 0) = y.at(i, 0, 0, 0);
    for (int64_t lane = 1; lane < kLanes; ++lane) {
      const double other = to_double(y.at(i, 0, 0, lane));
      if (other == first || (std::isnan(first) && std::isnan(other))) continue;  // a NaN's sign and payload may differ
      char text[128];
      std::snprintf(text, sizeof text, "of %g is %g in lane 0 and %g in lane %d",
                    to_double(values[static_cast<size_t>(i)]), first, other, static_cast<int>(lane));
      check(false, std::string(act_name(act)) + " " + Storage<T>::kName, text);
    }
  }
  return result;
}

template <class T>
void test_type() {
  // The criterion is relative to the largest value, so each range is held to it on its own. Ranges reach as far below
  // zero as above, as a batch norm's do: far below zero alone, x * Phi(x) is all cancellation, in the plain loop as
  // well.
  const std::pair<double, double> ranges[] = {{-100, 100},   {-20, 20}, {-6, 6}, {-3, 3}, {-1, 1},
                                              {-0.01, 0.01}, {0, 1},    {1, 5},  {5, 100}};
  for (Act act : all_acts()) {
    for (const auto& range : ranges) {
      char name[96];
      std::snprintf(name, sizeof name, "%s %s on [%g, %g]", act_name(act), Storage<T>::kName, range.first,
                    range.second);
      const std::vector<T> values = values_between<T>(range.first, range.second, 4001);
      std::vector<double> exact;
      std::vector<Compute<T>> plain;
      for (const T& value : values) {
        exact.push_back(Exact::act(act, to_double(value)));
        plain.push_back(Plain<Compute<T>>::act(act, static_cast<Compute<T>>(to_double(value))));
      }
      check_close(name, apply_act(act, values), exact, plain);
    }
    const double infinity = std::numeric_limits<double>::infinity();
    std::vector<T> special;
    for (double value : {std::nan(""), infinity, -infinity, 1e30, -1e30, 1e4, -1e4, 88.8, -88.8, 104.0, -104.0, 1e-38,
                         -1e-38, 1e-44, 0.0, -0.0}) {
      special.push_back(round_to<T>(value));
    }
    std::vector<double> exact;
    for (const T& value : special) exact.push_back(Exact::act(act, to_double(value)));
    check_non_finite(std::string(act_name(act)) + " " + Storage<T>::kName + " of special values",
                     apply_act(act, special), exact);
  }
}

}  // namespace

int main() {
  return run_tests("test_act", [] {
    test_type<float>();
    test_type<double>();
    test_type<BFloat16>();
  });
}
