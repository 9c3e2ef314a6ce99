// One forward of FasterNet-T0 (batch 1, 224x224, float, random weights), made to be counted: as a network plan on the
// kernels of the instruction set in FASTERNET_KERNELS_ISA, and as plain loops. count_instructions.py runs it
// under an emulator that counts; as a test, it compares them.
//
//   count_instructions check             all ways give the right logits (exits with 1 if not)
//   count_instructions multiply_adds     prints those of one forward
//   count_instructions WAY RUNS          RUNS forwards; WAY is kernels, dots or rows
//
// dots and rows are the two orders in which one writes a convolution by hand, on channels-last memory with BatchNorm
// folded: the sum over input channels innermost, which no compiler may vectorise without reordering it, or the output
// channels innermost, which compilers do vectorise.
#include <array>

#include "testing.h"

namespace {

using namespace testing;
using fasternet::NetworkStep;
using Kind = NetworkStep::Kind;

constexpr int64_t kImage = 224, kChannels = 40, kStages = 4, kMid = 1280, kClasses = 1000;
constexpr int64_t kBlocks[kStages] = {1, 2, 8, 2};

struct BlockFilters {
  Filter<float> partial, expand, project;
};

// The weights, in the order of the paper's Table 1 (arXiv 2303.03667): stem, stages with merging layers between, head.
struct T0 {
  std::vector<Filter<float>> patches;  // stem, then three merging layers
  std::vector<BlockFilters> blocks[kStages];
  Filter<float> mid = Filter<float>::random(1, kMid, kChannels << (kStages - 1), 1, 1, false, false);
  Filter<float> fc = Filter<float>::random(2, kClasses, kMid, 1, 1, false, true);

  T0() {
    uint32_t seed = 3;
    for (int64_t stage = 0; stage < kStages; ++stage) {
      const int64_t c = kChannels << stage, size = stage == 0 ? 4 : 2;
      patches.push_back(Filter<float>::random(seed++, c, stage == 0 ? 3 : c / 2, size, size, false, true));
      for (int64_t i = 0; i < kBlocks[stage]; ++i, seed += 3) {
        blocks[stage].push_back({Filter<float>::random(seed, c / 4, c / 4, 3, 3, false, false),
                                 Filter<float>::random(seed + 1, 2 * c, c, 1, 1, false, true),
                                 Filter<float>::random(seed + 2, c, 2 * c, 1, 1, false, false)});
      }
    }
  }

  // Products in all sums. Those with the zeros around an image, which a plain loop leaves out, are counted too.
  int64_t multiply_adds() const {
    const auto of = [](const Filter<float>& f) { return f.n * f.c * f.kh * f.kw; };
    int64_t total = of(mid) + of(fc), side = kImage;
    for (int64_t stage = 0; stage < kStages; ++stage) {
      const Filter<float>& patch = patches[static_cast<size_t>(stage)];
      side /= patch.kh;
      total += side * side * of(patch);
      for (const BlockFilters& b : blocks[stage]) total += side * side * (of(b.partial) + of(b.expand) + of(b.project));
    }
    return total;
  }
};

// ---- On the kernels -------------------------------------------------------------------------------------------------

class Kernels {
 public:
  explicit Kernels(const T0& net) : head_({&net.mid, &net.fc}) {
    for (int64_t stage = 0; stage < kStages; ++stage) {
      const Filter<float>& patch = net.patches[static_cast<size_t>(stage)];
      packs_.emplace_back(std::vector<const Filter<float>*>{&patch});
      steps_.push_back({Kind::kPatchConv, patch.n, patch.kh, patch.kw, Act::kIdentity, packs_.back().data()});
      for (const BlockFilters& b : net.blocks[stage]) {
        packs_.emplace_back(std::vector<const Filter<float>*>{&b.partial, &b.expand, &b.project}, First::kPConv);
        steps_.push_back({Kind::kBlock, b.partial.n, b.expand.n, 0, Act::kGelu, packs_.back().data()});
      }
    }
    steps_.push_back({Kind::kHead, kMid, kClasses, 0, Act::kGelu, head_.data()});
  }

  void operator()(const Tensor<float>& x, Tensor<float>* logits) const {
    fasternet::Network args = {};
    args.dtype = DType::kFloat32;
    args.batch = x.shape().batch, args.channels = x.shape().channels;
    args.height = x.shape().height, args.width = x.shape().width;
    args.x = x.data();
    std::copy_n(x.stride(), 4, args.x_stride);
    args.steps = steps_.data(), args.n_steps = static_cast<int64_t>(steps_.size());
    void* const outputs[] = {logits->data()};
    fasternet::network(args, outputs, fasternet::serial());
  }

 private:
  std::vector<Packed<float>> packs_;  // memory stays where it is when the vector grows
  Packed<float> head_;
  std::vector<NetworkStep> steps_;
};

// ---- As plain loops -------------------------------------------------------------------------------------------------

enum class Order { kDots, kRows };

template <class Real, Order kOrder>
class PlainLoops {
 public:
  explicit PlainLoops(const T0& net) : mid_(net.mid), fc_(net.fc) {
    for (int64_t stage = 0; stage < kStages; ++stage) {
      patches_.emplace_back(net.patches[static_cast<size_t>(stage)]);
      for (const BlockFilters& b : net.blocks[stage]) blocks_[stage].push_back({b.partial, b.expand, b.project});
    }
    // The largest of all maps is the hidden one of the first stage.
    for (std::vector<Real>* buffer : {&x_, &y_, &u_, &hidden_}) buffer->resize(kImage / 4 * kImage / 4 * 2 * kChannels);
    logits_.resize(kClasses);
  }

  const std::vector<Real>& operator()(const Real* image) {
    const Real* x = image;
    int64_t side = kImage;
    for (int64_t stage = 0; stage < kStages; ++stage) {
      const Conv& patch = patches_[static_cast<size_t>(stage)];
      conv(patch, x, side, patch.c, patch.size, 0, y_.data(), patch.n);
      side /= patch.size;
      for (const std::array<Conv, 3>& b : blocks_[stage]) block(b, side, patch.n);
      std::swap(x_, y_);
      x = x_.data();
    }
    std::vector<Real>& pooled = u_;
    for (int64_t c = 0; c < mid_.c; ++c) {
      Real sum = 0;
      for (int64_t p = 0; p < side * side; ++p) sum += x[p * mid_.c + c];
      pooled[static_cast<size_t>(c)] = sum / static_cast<Real>(side * side);
    }
    conv(mid_, pooled.data(), 1, mid_.c, 1, 0, hidden_.data(), kMid);
    gelu(hidden_.data(), kMid);
    conv(fc_, hidden_.data(), 1, kMid, 1, 0, logits_.data(), kClasses);
    return logits_;
  }

 private:
  struct Conv {
    int64_t n, c, size;
    std::vector<Real> weight;  // (size, size, n, c) for dots, (size, size, c, n) for rows
    std::vector<Real> shift;
    Conv(const Filter<float>& f) : n(f.n), c(f.c), size(f.kh), weight(f.weight.size()) {
      for (int64_t tap = 0; tap < size * size; ++tap) {
        for (int64_t i = 0; i < n; ++i) {
          for (int64_t k = 0; k < c; ++k) {
            const int64_t to = tap * n * c + (kOrder == Order::kDots ? i * c + k : k * n + i);
            weight[static_cast<size_t>(to)] = f.weight[static_cast<size_t>((i * c + k) * size * size + tap)];
          }
        }
      }
      for (int64_t i = 0; i < n; ++i) shift.push_back(static_cast<Real>(f.shift_of(i)));
    }
  };

  // y = conv(x) + shift of a square image; pixels are x_pixel and y_pixel elements apart.
  static void conv(const Conv& f, const Real* x, int64_t side, int64_t x_pixel, int64_t stride, int64_t pad, Real* y,
                   int64_t y_pixel) {
    for (int64_t top = -pad; top + f.size <= side + pad; top += stride) {
      for (int64_t left = -pad; left + f.size <= side + pad; left += stride, y += y_pixel) {
        Real* __restrict const out = y;
        for (int64_t n = 0; n < f.n; ++n) out[n] = f.shift[static_cast<size_t>(n)];
        const Real* __restrict w = f.weight.data();
        for (int64_t h = top; h < top + f.size; ++h) {
          for (int64_t v = left; v < left + f.size; ++v, w += f.n * f.c) {
            if (h < 0 || h >= side || v < 0 || v >= side) continue;
            const Real* __restrict const in = x + (h * side + v) * x_pixel;
            if constexpr (kOrder == Order::kDots) {
              for (int64_t n = 0; n < f.n; ++n) {
                Real sum = out[n];
                for (int64_t c = 0; c < f.c; ++c) sum += in[c] * w[n * f.c + c];
                out[n] = sum;
              }
            } else {
              for (int64_t c = 0; c < f.c; ++c) {
                for (int64_t n = 0; n < f.n; ++n) out[n] += in[c] * w[c * f.n + n];
              }
            }
          }
        }
      }
    }
  }

  static void gelu(Real* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) x[i] = x[i] / 2 * (1 + std::erf(x[i] * Real(0.70710678118654752440)));
  }

  // y_ += project(gelu(expand([conv3x3(y_[:, :c_partial]) | y_[:, c_partial:]])))
  void block(const std::array<Conv, 3>& b, int64_t side, int64_t channels) {
    const int64_t pixels = side * side, c_partial = b[0].n;
    conv(b[0], y_.data(), side, channels, 1, 1, u_.data(), channels);
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t c = c_partial; c < channels; ++c) u_[index(p * channels + c)] = y_[index(p * channels + c)];
    }
    conv(b[1], u_.data(), side, channels, 1, 0, hidden_.data(), 2 * channels);
    gelu(hidden_.data(), pixels * 2 * channels);
    conv(b[2], hidden_.data(), side, 2 * channels, 1, 0, u_.data(), channels);
    for (int64_t i = 0; i < pixels * channels; ++i) y_[index(i)] += u_[index(i)];
  }
  static size_t index(int64_t i) { return static_cast<size_t>(i); }

  std::vector<Conv> patches_;
  std::vector<std::array<Conv, 3>> blocks_[kStages];
  Conv mid_, fc_;
  std::vector<Real> x_, y_, u_, hidden_, logits_;
};

// ---- The program ----------------------------------------------------------------------------------------------------

void check_all(const T0& net, const Tensor<float>& x) {
  const std::vector<double> exact = PlainLoops<double, Order::kDots>(net)(x.dense<double>().data());
  const std::vector<float> dots = PlainLoops<float, Order::kDots>(net)(x.data());
  const std::vector<float> rows = PlainLoops<float, Order::kRows>(net)(x.data());
  Tensor<float> logits({1, 1, 1, kClasses}), from_rows({1, 1, 1, kClasses});
  const Kernels kernels(net);
  kernels(x, &logits);
  std::copy(rows.begin(), rows.end(), from_rows.data());
  check_close("T0, kernels", logits, exact, dots);
  check_close("T0, plain loops by rows", from_rows, exact, dots);
}

template <class Forward>
void repeat(int runs, const Forward& forward) {
  for (int i = 0; i < runs; ++i) forward();
}

}  // namespace

int main(int argc, char** argv) {
  const std::string way = argc > 1 ? argv[1] : "";
  const int runs = argc > 2 ? std::atoi(argv[2]) : 0;
  const T0 net;
  Tensor<float> x({1, kImage, kImage, 3});
  x.fill(0);
  if (way == "check") return run_tests("count_instructions", [&] { check_all(net, x); });
  if (way == "multiply_adds") {
    std::printf("%lld\n", static_cast<long long>(net.multiply_adds()));
  } else if (way == "kernels" && runs > 0) {
    const Kernels kernels(net);
    Tensor<float> logits({1, 1, 1, kClasses});
    repeat(runs, [&] { kernels(x, &logits); });
  } else if (way == "dots" && runs > 0) {
    PlainLoops<float, Order::kDots> loops(net);
    repeat(runs, [&] { loops(x.data()); });
  } else if (way == "rows" && runs > 0) {
    PlainLoops<float, Order::kRows> loops(net);
    repeat(runs, [&] { loops(x.data()); });
  } else {
    std::fprintf(stderr, "usage: count_instructions check | multiply_adds | kernels RUNS | dots RUNS | rows RUNS\n");
    return 2;
  }
  return 0;
}
