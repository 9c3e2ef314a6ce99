// A network plan gives the bits of its operators run one after the other, and a plan that makes no sense is refused.
// Its scratch is kept from call to call, and given back when calls no longer need as much.
#include <atomic>
#include <stdexcept>
#include <thread>

#include "testing.h"

// Scratch is the only memory that asks for an alignment: these count it, and all other memory apart. `alignments` is
// the sum of those of the buffers alive: it falls back only if delete is told the alignment that new was.
std::atomic<int> allocations{0}, alive{0}, other_allocations{0};
std::atomic<size_t> alignments{0}, in_small_pages{0};

// Not inlined, or GCC takes free() of what new gave for a mistake.
__attribute__((noinline)) void* operator new(std::size_t bytes) {
  void* const p = std::malloc(bytes > 0 ? bytes : 1);
  if (p == nullptr) throw std::bad_alloc();
  ++other_allocations;
  return p;
}
__attribute__((noinline)) void operator delete(void* p) noexcept { std::free(p); }
__attribute__((noinline)) void operator delete(void* p, std::size_t) noexcept { ::operator delete(p); }

void* operator new(std::size_t bytes, std::align_val_t alignment) {
  const std::size_t line = static_cast<std::size_t>(alignment);
  void* const p = std::aligned_alloc(line, (bytes + line - 1) / line * line);
  if (p == nullptr) throw std::bad_alloc();
  ++allocations, ++alive, alignments += line;
  if (bytes >= size_t{1} << 20 && line < size_t{2} << 20) ++in_small_pages;
  return p;
}
void operator delete(void* p, std::align_val_t alignment) noexcept {
  if (p != nullptr) --alive, alignments -= static_cast<std::size_t>(alignment);
  std::free(p);
}
void operator delete(void* p, std::size_t, std::align_val_t alignment) noexcept { ::operator delete(p, alignment); }

namespace {

using namespace testing;
using Step = fasternet::NetworkStep;
using Kind = Step::Kind;

// A small FasterNet: stem, block, output, merging, two blocks, output, head.
template <class T>
struct Plan {
  static constexpr int64_t kIn = 3, kFirst = 12, kSecond = 24, kMid = 40, kClasses = 10;

  Plan()
      : stem(Filter<T>::random(1, kFirst, kIn, 4, 4, true, true)),
        merging(Filter<T>::random(2, kSecond, kFirst, 2, 2, true, true)),
        head_conv(Filter<T>::random(3, kMid, kSecond, 1, 1, false, true)),
        head_fc(Filter<T>::random(4, kClasses, kMid, 1, 1, false, true)),
        stem_pack({&stem}),
        merging_pack({&merging}),
        head_pack({&head_conv, &head_fc}),
        blocks{block_pack(10, kFirst), block_pack(20, kSecond), block_pack(30, kSecond)} {}

  static Packed<T> block_pack(uint32_t seed, int64_t channels) {
    const int64_t c_partial = channels / 4;
    const auto partial = Filter<T>::random(seed, c_partial, c_partial, 3, 3, false, false);
    const auto pw1 = Filter<T>::random(seed + 1, 2 * channels, channels, 1, 1, true, true);
    const auto pw2 = Filter<T>::random(seed + 2, channels, 2 * channels, 1, 1, false, false);
    return Packed<T>({&partial, &pw1, &pw2}, First::kPConv);
  }

  std::vector<Step> steps() const {
    const auto block = [&](int i, int64_t channels) {
      return Step{Kind::kBlock, channels / 4, 2 * channels, 0, Act::kGelu, blocks[i].data()};
    };
    return {{Kind::kPatchConv, kFirst, 4, 4, Act::kIdentity, stem_pack.data()},
            block(0, kFirst),
            {Kind::kEmit, 0, 0, 0, Act::kIdentity, nullptr},
            {Kind::kPatchConv, kSecond, 2, 2, Act::kIdentity, merging_pack.data()},
            block(1, kSecond),
            block(2, kSecond),
            {Kind::kEmit, 0, 0, 0, Act::kIdentity, nullptr},
            {Kind::kHead, kMid, kClasses, 0, Act::kGelu, head_pack.data()}};
  }

  Filter<T> stem, merging, head_conv, head_fc;
  Packed<T> stem_pack, merging_pack, head_pack;
  Packed<T> blocks[3];
};

template <class T>
fasternet::Network network_of(const Tensor<T>& x, const std::vector<Step>& steps) {
  fasternet::Network args;
  args.dtype = Storage<T>::kDType;
  args.batch = x.shape().batch, args.channels = x.shape().channels;
  args.height = x.shape().height, args.width = x.shape().width;
  args.x = x.data();
  std::copy_n(x.stride(), 4, args.x_stride);
  args.steps = steps.data(), args.n_steps = static_cast<int64_t>(steps.size());
  return args;
}

template <class T>
Tensor<T> patch_conv(const Tensor<T>& x, const Packed<T>& packed, int64_t c_out, int64_t size) {
  const Shape& s = x.shape();
  Tensor<T> y({s.batch, s.height / size, s.width / size, c_out});
  fasternet::PatchConv args = {};
  args.dtype = Storage<T>::kDType;
  args.batch = s.batch, args.channels = s.channels;
  args.height = s.height, args.width = s.width;
  args.c_out = c_out, args.kh = size, args.kw = size;
  args.x = x.data();
  std::copy_n(x.stride(), 4, args.x_stride);
  args.y = y.data(), args.y_pixel_stride = c_out;
  args.packed = packed.data();
  fasternet::patch_conv(args, fasternet::serial());
  return y;
}

template <class T>
Tensor<T> block(const Tensor<T>& x, const Packed<T>& packed) {
  const Shape& s = x.shape();
  Tensor<T> y(s);
  const DType dtype = Storage<T>::kDType;
  fasternet::block(
      {dtype, dtype, s.batch, s.channels, s.height, s.width, s.channels / 4, 2 * s.channels, x.data(), x.pixel_stride(),
       x.data(), x.pixel_stride(), y.data(), y.pixel_stride(), packed.data(), nullptr, Act::kGelu},
      fasternet::serial());
  return y;
}

template <class T>
void test_same_bits_as_operators(const Shape& shape, Layout layout) {
  const std::string name = std::string("network ") + Storage<T>::kName + " " + shape.str() +
                           (layout == Layout::kChannelsFirst ? " NCHW" : " channels-last");
  const Plan<T> plan;
  Tensor<T> x(shape, layout);
  x.fill(7);
  const Tensor<T> before = x;
  const Tensor<T> first = block(patch_conv(x, plan.stem_pack, plan.kFirst, 4), plan.blocks[0]);
  const Tensor<T> second =
      block(block(patch_conv(first, plan.merging_pack, plan.kSecond, 2), plan.blocks[1]), plan.blocks[2]);
  Tensor<T> logits({shape.batch, 1, 1, plan.kClasses});
  const Shape& s = second.shape();
  fasternet::head({Storage<T>::kDType, s.batch, s.channels, s.height, s.width, plan.kMid, plan.kClasses, second.data(),
                   second.pixel_stride(), logits.data(), plan.head_pack.data(), Act::kGelu},
                  fasternet::serial());

  const std::vector<Step> steps = plan.steps();
  const fasternet::Network args = network_of(x, steps);
  const std::vector<fasternet::FeatureShape> outputs = fasternet::network_outputs(args);
  const auto has_shape = [](const fasternet::FeatureShape& f, int64_t channels, int64_t height, int64_t width) {
    return f.channels == channels && f.height == height && f.width == width;
  };
  if (!check(outputs.size() == 3 && has_shape(outputs[0], plan.kFirst, first.shape().height, first.shape().width) &&
                 has_shape(outputs[1], plan.kSecond, s.height, s.width) && has_shape(outputs[2], plan.kClasses, -1, -1),
             name, "other outputs than the plan's")) {
    return;
  }
  Threads two(2), five(5);
  Reversed reversed(257);
  for (const ParallelFor& parallel : {fasternet::serial(), two.parallel(), five.parallel(), reversed.parallel()}) {
    Tensor<T> a = first.blank(), b = second.blank(), c = logits.blank();
    void* const results[] = {a.data(), b.data(), c.data()};
    fasternet::network(args, results, parallel);
    const std::string threads = std::to_string(parallel.num_threads) + " threads";
    check(a.same_bits(first), name, "first output differs from its operators', " + threads);
    check(b.same_bits(second), name, "second output differs from its operators', " + threads);
    check(c.same_bits(logits), name, "logits differ from their operators', " + threads);
  }
  check(x.same_bits(before), name, "the input changed");
}

template <class T>
void test_bad_plans() {
  const Plan<T> plan;
  const std::vector<Step> good = plan.steps();
  Tensor<T> x({1, 32, 32, Plan<T>::kIn});
  const auto refused = [&](const std::string& what, const std::vector<Step>& steps) {
    bool thrown = false;
    try {
      fasternet::network_outputs(network_of(x, steps));
    } catch (const std::invalid_argument& error) {
      thrown = *error.what() != '\0';
    }
    check(thrown, "network", "must refuse a plan that " + what);
  };
  refused("is empty", {});
  refused("has no output", {good[0], good[1]});
  refused("starts with a block", {good[1], good[2]});
  refused("starts with an output", {good[2]});
  refused("goes on after the head", {good[0], good[1], good[7], good[1], good[2]});
  std::vector<Step> wrong = good;
  wrong[1].a = Plan<T>::kFirst + 1;
  refused("convolves more channels than there are", wrong);
  wrong = good;
  wrong[0].kind = static_cast<Kind>(9);
  refused("has a step of no known kind", wrong);
}

// What a call does to the memory: how often it asks for scratch and for other memory, and what is left of it after.
struct Effect {
  int allocated, other, grown;
};

// Calls of a plan whose largest feature map, 16 times x, takes `bytes`; it lives in scratch.
std::vector<Effect> run_with_scratch(int64_t bytes, int calls) {
  const int64_t channels = 16, side = 4 * static_cast<int64_t>(std::sqrt(bytes / (16.0 * channels * sizeof(float))));
  const std::string name = "network with scratch of " + std::to_string(bytes >> 20) + " MB";
  const auto wide = Filter<float>::random(1, channels, 1, 1, 1, true, true);
  const auto narrow = Filter<float>::random(2, 8, channels, 4, 4, true, true);
  const Packed<float> wide_pack({&wide}), narrow_pack({&narrow});
  const std::vector<Step> steps = {{Kind::kPatchConv, channels, 1, 1, Act::kIdentity, wide_pack.data()},
                                   {Kind::kPatchConv, 8, 4, 4, Act::kIdentity, narrow_pack.data()},
                                   {Kind::kEmit, 0, 0, 0, Act::kIdentity, nullptr}};
  Tensor<float> x({1, side, side, 1});
  x.fill(3);
  const Tensor<float> right = patch_conv(patch_conv(x, wide_pack, channels, 1), narrow_pack, 8, 4);
  const fasternet::Network args = network_of(x, steps);
  std::vector<Effect> effects;
  for (int call = 0; call < calls; ++call) {
    Tensor<float> y = right.blank();
    void* const results[] = {y.data()};
    const int allocated_before = allocations, alive_before = alive, other_before = other_allocations;
    fasternet::network(args, results, fasternet::serial());
    const Effect effect = {allocations - allocated_before, other_allocations - other_before, alive - alive_before};
    check(y.same_bits(right), name, "call " + std::to_string(call) + " differs from its operators");
    check(effect.other == 0, name, "a call allocated memory " + std::to_string(effect.other) + " times");
    effects.push_back(effect);
  }
  return effects;
}

// What network() needs of FasterNet-L for 16 images of 224x224 in double is the most that must stay from call to call;
// no buffer above 128 MB outlives its call, and one above 32 MB not the sixth call in a row that needs less than half.
void test_scratch() {
  const int64_t largest_kept = int64_t{16} * 192 * 56 * 56 * 8, small = int64_t{1} << 20;
  for (int64_t bytes : {int64_t{30} << 20, int64_t{36} << 20, largest_kept}) {
    const std::vector<Effect> effects = run_with_scratch(bytes, 3);
    for (size_t call = 1; call < effects.size(); ++call) {
      check(effects[call].allocated == 0, "network", "a call after the first allocated scratch");
    }
  }
  const std::vector<Effect> after = run_with_scratch(small, 8);
  for (size_t call = 0; call < 5; ++call) {
    check(after[call].allocated == 0 && after[call].grown == 0, "network", "large buffers are not kept for a while");
  }
  check(after[5].grown == -2, "network", "large buffers stay, though six small calls followed");
  check(after[6].allocated == 2 && after[7].allocated == 0, "network", "small buffers are not kept");
  const std::vector<Effect> huge = run_with_scratch(int64_t{140} << 20, 2);
  check(huge[0].grown == -2 && huge[1].allocated == 2 && huge[1].grown == 0, "network", "a huge buffer is kept");
}

// Large buffers are made of huge pages, and go with the alignment that they came with.
void test_pages() {
  const size_t before = alignments;
  std::thread([] { run_with_scratch(int64_t{4} << 20, 1); }).join();
  check(alignments == before, "network", "a buffer was deleted with another alignment than it was made with");
  check(in_small_pages == 0, "network", "a large buffer does not begin with a huge page");
}

// A whole network, blocks and head included: no call after the first asks for memory.
template <class T>
void test_no_allocation() {
  const Plan<T> plan;
  const std::vector<Step> steps = plan.steps();
  Tensor<T> x({2, 40, 56, Plan<T>::kIn});
  x.fill(5);
  const fasternet::Network args = network_of(x, steps);
  std::vector<std::vector<T>> outputs;
  std::vector<void*> results;
  for (const fasternet::FeatureShape& f : fasternet::network_outputs(args)) {
    outputs.emplace_back(static_cast<size_t>(2 * f.channels * std::abs(f.height * f.width)));
    results.push_back(outputs.back().data());
  }
  fasternet::network(args, results.data(), fasternet::serial());
  const int before = allocations + other_allocations;
  fasternet::network(args, results.data(), fasternet::serial());
  const int count = allocations + other_allocations - before;
  check(count == 0, std::string("network ") + Storage<T>::kName,
        "a call allocated " + std::to_string(count) + " times");
}

// Threads share the columns of a block with many weights for few pixels: that scratch stays as well.
template <class T>
void test_no_allocation_by_columns() {
  const Shape shape{1, 7, 7, 320};
  const auto partial = Filter<T>::random(2, 80, 80, 3, 3, false, false);
  const auto pw1 = Filter<T>::random(3, 640, 320, 1, 1, true, true);
  const auto pw2 = Filter<T>::random(4, 320, 640, 1, 1, false, false);
  const Packed<T> packed({&partial, &pw1, &pw2}, First::kPConv);
  Tensor<T> x(shape), y(shape);
  x.fill(5);
  fasternet::Block args = {};
  args.dtype = args.residual_dtype = Storage<T>::kDType;
  args.batch = 1, args.channels = 320, args.height = args.width = 7;
  args.c_partial = 80, args.c_hidden = 640;
  args.x = args.residual = x.data(), args.y = y.data();
  args.x_pixel_stride = args.residual_pixel_stride = args.y_pixel_stride = 320;
  args.packed = packed.data();
  args.act = fasternet::Act::kGelu;
  AtOnce two(2);
  fasternet::block(args, two.parallel());
  const int before = allocations + other_allocations;
  fasternet::block(args, two.parallel());
  const int count = allocations + other_allocations - before;
  check(count == 0, std::string("block by columns ") + Storage<T>::kName,
        "a call allocated " + std::to_string(count) + " times");
}

void test_too_large() {
  const Plan<float> plan;
  const std::vector<Step> steps = plan.steps();
  Tensor<float> x({1, 32, 32, Plan<float>::kIn});
  for (int64_t batch : {int64_t{1}, int64_t{1} << 40}) {
    fasternet::Network args = network_of(x, steps);
    args.batch = batch, args.height = args.width = int64_t{1} << (batch == 1 ? 34 : 18);
    bool thrown = false;
    try {
      fasternet::network_outputs(args);
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    check(thrown, "network", "must refuse images whose size in bytes is no int64");
  }
}

template <class T>
void test_type() {
  for (Layout layout : {Layout::kChannelsLast, Layout::kChannelsFirst}) {
    test_same_bits_as_operators<T>({1, 64, 96, Plan<T>::kIn}, layout);
    test_same_bits_as_operators<T>({3, 37, 51, Plan<T>::kIn}, layout);
    test_same_bits_as_operators<T>({1, 8, 8, Plan<T>::kIn}, layout);
    test_same_bits_as_operators<T>({0, 32, 32, Plan<T>::kIn}, layout);
  }
  test_bad_plans<T>();
  test_no_allocation<T>();
  test_no_allocation_by_columns<T>();
}

}  // namespace

int main() {
  return run_tests("test_network", [] {
    test_type<float>();
    test_type<double>();
    test_type<BFloat16>();
    test_too_large();
    test_scratch();
    test_pages();
  });
}
