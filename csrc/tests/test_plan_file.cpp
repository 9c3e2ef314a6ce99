// A plan file gives the bits of the plan it was made of; one that is damaged or forged is refused with a message, at
// every byte and at every length.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>

#include "testing.h"

namespace {

using namespace testing;
using Step = fasternet::NetworkStep;
using Kind = Step::Kind;

// The CRC-32 of zlib, a byte at a time.
uint32_t crc32(const std::string& bytes) {
  static const std::vector<uint32_t> table = [] {
    std::vector<uint32_t> of_byte;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t crc = byte;
      for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? 0xEDB88320u ^ (crc >> 1) : crc >> 1;
      of_byte.push_back(crc);
    }
    return of_byte;
  }();
  uint32_t crc = 0xFFFFFFFF;
  for (unsigned char byte : bytes) crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8);
  return ~crc;
}

template <class V>
void put(std::string* out, V value) {
  out->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

constexpr size_t kHeader = 96, kCrcAt = 92;

void seal(std::string* file) {
  const uint32_t crc = crc32(file->substr(0, kCrcAt) + file->substr(kHeader));
  std::memcpy(&(*file)[kCrcAt], &crc, sizeof(crc));
}

// Stem, block, output, block, head, the blocks with a fast tier or without, as the comment in fasternet_cpu.h describes
// the file.
template <class T>
struct Example {
  static constexpr int64_t kIn = 3, kMid = 16, kClasses = 10;

  explicit Example(bool fast = false)
      : channels(fast ? 28 : 12),
        c_partial(fast ? 24 : 3),
        stem(Filter<T>::random(1, channels, kIn, 4, 4, true, true)),
        partial(Filter<T>::random(2, c_partial, c_partial, 3, 3, false, false)),
        pw1(Filter<T>::random(3, 20, channels, 1, 1, true, true)),
        pw2(Filter<T>::random(4, channels, 20, 1, 1, false, false)),
        conv(Filter<T>::random(5, kMid, channels, 1, 1, false, true)),
        fc(Filter<T>::random(6, kClasses, kMid, 1, 1, false, true)),
        stem_pack({&stem}),
        block_pack({&partial, &pw1, &pw2}, fast ? First::kFastPConv : First::kPConv),
        head_pack({&conv, &fc}) {
    const DType dtype = Storage<T>::kDType;
    const int64_t size = dtype == DType::kFloat64 ? 8 : 4;
    const auto bytes = [&](std::initializer_list<std::pair<int64_t, int64_t>> gemms) {
      int64_t total = 0;
      for (const auto& [n, k] : gemms) total += fasternet::packed_size(dtype, n, k) * size;
      return total;
    };
    steps = {{Kind::kPatchConv, channels, 4, 4, Act::kIdentity, stem_pack.data()},
             {Kind::kBlock, c_partial, 20, 0, Act::kGelu, block_pack.data(), fast},
             {Kind::kEmit, 0, 0, 0, Act::kIdentity, nullptr},
             {Kind::kBlock, c_partial, 20, 0, Act::kRelu, block_pack.data(), fast},
             {Kind::kHead, kMid, kClasses, 0, Act::kSilu, head_pack.data()}};
    const int64_t block = bytes({{3 * c_partial, 3 * c_partial}, {20, channels}, {channels, 20}}) +
                          (fast ? fasternet::packed_fast_size(dtype, c_partial) * size : 0);
    const std::vector<int64_t> sizes = {bytes({{channels, kIn * 16}}), block, 0, block,
                                        bytes({{kMid, channels}, {kClasses, kMid}})};
    const std::string writer = "a test";
    std::string tables;
    size_t offset = kHeader + 5 * 64 + 2 * 32 + writer.size();
    offset = (offset + 63) / 64 * 64;
    size_t at = offset;
    for (size_t i = 0; i < steps.size(); ++i) {
      const Step& s = steps[i];
      const uint32_t flags = s.fast ? fasternet::kPlanFast : 0;
      for (uint32_t v : {static_cast<uint32_t>(s.kind), static_cast<uint32_t>(s.act), flags, 0u}) put(&tables, v);
      for (int64_t v : {s.a, s.b, s.c, sizes[i] > 0 ? static_cast<int64_t>(at) : 0, sizes[i], int64_t{0}}) {
        put(&tables, v);
      }
      at += static_cast<size_t>(sizes[i]);
    }
    for (uint32_t v : {0u, 0u}) put(&tables, v);
    for (int64_t v : {channels, int64_t{4}, int64_t{4}}) put(&tables, v);
    for (uint32_t v : {1u, 0u}) put(&tables, v);
    for (int64_t v : {kClasses, int64_t{0}, int64_t{0}}) put(&tables, v);
    tables += writer;
    tables.resize(offset - kHeader);
    file = "FNETPLAN";
    for (uint32_t v : {0x01020304u, fasternet::kPlanVersion}) put(&file, v);
    put(&file, static_cast<uint64_t>(at));
    for (uint32_t v : {static_cast<uint32_t>(dtype), fasternet::kPlanSequence, static_cast<uint32_t>(kIn), 5u, 2u,
                       static_cast<uint32_t>(writer.size())}) {
      put(&file, v);
    }
    file.resize(kHeader);
    file += tables;
    for (size_t i = 0; i < steps.size(); ++i) {
      if (sizes[i] > 0) file.append(static_cast<const char*>(steps[i].packed), static_cast<size_t>(sizes[i]));
    }
    seal(&file);
  }

  const int64_t channels, c_partial;
  Filter<T> stem, partial, pw1, pw2, conv, fc;
  Packed<T> stem_pack, block_pack, head_pack;
  std::vector<Step> steps;
  std::string file;
};

std::string path() {
  const char* const folder = std::getenv("TMPDIR");
  return std::string(folder != nullptr ? folder : "/tmp") + "/fasternet_test_plan_file." +
         std::to_string(static_cast<long>(::getpid())) + ".plan";
}

void write(const std::string& bytes) { std::ofstream(path(), std::ios::binary) << bytes; }

// The message with which the bytes are refused; empty where they are not.
std::string refusal(const std::string& bytes) {
  write(bytes);
  try {
    const fasternet::Plan plan(path());
    return "";
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

template <class T>
void test_same_bits(bool fast = false) {
  const std::string name = std::string("plan file ") + Storage<T>::kName + (fast ? " fast" : "");
  const Example<T> example(fast);
  write(example.file);
  auto plan = std::make_unique<fasternet::Plan>(path());
  std::remove(path().c_str());  // it has been read
  check(plan->dtype() == Storage<T>::kDType && plan->channels() == example.kIn && plan->sequence() &&
            plan->writer() == "a test" && plan->steps().size() == 5 && plan->outputs().size() == 2 &&
            plan->outputs()[0].row_stride == 4 && plan->outputs()[1].row_stride == 0,
        name, "the plan is another than what was written");
  for (const Step& step : plan->steps()) {
    check(step.fast == (fast && step.kind == Kind::kBlock), name, "another tier than what was written");
  }
  for (const Step& step : plan->steps()) {
    check(reinterpret_cast<uintptr_t>(step.packed) % 64 == 0, name, "weights are not aligned");
  }
  const Shape shape = {2, 61, 73, example.kIn};  // maps of 15 by 18
  Tensor<T> x(shape);
  x.fill(7);
  fasternet::Network direct = plan->network(shape.batch, shape.height, shape.width, x.data(), x.stride());
  const fasternet::Network loaded = direct;
  direct.steps = example.steps.data();
  Tensor<T> maps({2, 15, 18, example.channels}), logits({2, 1, 1, example.kClasses});
  Tensor<T> maps2 = maps.blank(), logits2 = logits.blank();
  void* const expected[] = {maps.data(), logits.data()};
  void* const got[] = {maps2.data(), logits2.data()};
  Threads two(2);
  fasternet::network(direct, expected, fasternet::serial());
  fasternet::network(loaded, got, two.parallel());
  check(maps2.same_bits(maps) && logits2.same_bits(logits), name, "other bits than the plan that was written");
  if (!fast) return;
  std::vector<Step> steps = example.steps;
  for (Step& step : steps) step.fast = false;
  direct.steps = steps.data();
  fasternet::network(direct, expected, fasternet::serial());
  check(!maps2.same_bits(maps), name, "runs in the default tier");
}

void test_damage(bool fast) {
  const Example<float> example(fast);
  const std::string& good = example.file;
  check(refusal(good).empty(), "plan file", "a good file is refused: " + refusal(good));
  const auto refused = [&](const std::string& bytes, const std::string& what) {
    const std::string message = refusal(bytes);
    check(message.compare(0, path().size() + 2, path() + ": ") == 0, "plan file", "must refuse " + what);
  };
  for (size_t length = 0; length < good.size(); length += 64) {
    refused(good.substr(0, length), "a file cut off at " + std::to_string(length));
  }
  for (size_t i = 0; i < good.size(); i += i < 1024 ? 1 : 61) {
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ (1 << i % 8));
    refused(bad, "a flipped bit in byte " + std::to_string(i));
  }
  // Forged: the checksum fits. Whatever stands in the header and the tables, the file is refused or can be run.
  for (size_t i = 0; i < kHeader + 5 * 64 + 2 * 32; ++i) {
    for (int value : {0x00, 0x01, 0x7F, 0x80, 0xFF}) {
      if (i >= kCrcAt && i < kHeader) continue;
      std::string forged = good;
      forged[i] = static_cast<char>(value);
      seal(&forged);
      write(forged);
      try {
        const fasternet::Plan plan(path());
        constexpr int64_t kSide = 64;  // so that the fast tier would run
        std::vector<float> x(static_cast<size_t>(plan.channels() * kSide * kSide), 0.5f);
        const int64_t stride[4] = {plan.channels() * kSide * kSide, kSide * kSide, kSide, 1};
        const fasternet::Network args = plan.network(1, kSide, kSide, x.data(), stride);
        if (plan.dtype() != DType::kFloat32) continue;  // refused, or x is of another type
        std::vector<std::vector<float>> outputs;
        std::vector<void*> data;
        for (const fasternet::FeatureShape& f : fasternet::network_outputs(args)) {
          outputs.emplace_back(static_cast<size_t>(f.channels * std::abs(f.height * f.width)));
          data.push_back(outputs.back().data());
        }
        fasternet::network(args, data.data(), fasternet::serial());
      } catch (const std::runtime_error& error) {
        check(*error.what() != '\0', "plan file", "refused without a word");
      } catch (const std::invalid_argument&) {  // too small an image for it
      }
    }
  }
  std::string newer = good;
  newer[12] = 2;
  check(refusal(newer).find("a newer fasternet_kernels wrote it") != std::string::npos, "plan file",
        "a newer version must be called so");
  std::remove(path().c_str());
  check(refusal("").find("0 bytes") != std::string::npos, "plan file", "an empty file must be called so");
  std::remove(path().c_str());
  bool thrown = false;
  try {
    const fasternet::Plan plan(path());
  } catch (const std::runtime_error&) {
    thrown = true;
  }
  check(thrown, "plan file", "must refuse a file that is not there");
}

}  // namespace

int main() {
  return run_tests("test_plan_file", [] {
    test_same_bits<float>();
    test_same_bits<double>();
    test_same_bits<BFloat16>();
    test_same_bits<float>(true);
    for (bool fast : {false, true}) test_damage(fast);
  });
}
