// Reads a plan file (fasternet_cpu.h, "Plan files"). Nothing in the file is believed: every number is checked against
// the others and the file's length before it is used, so that a damaged or forged file is a message and never a crash.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>

#include "kernels.h"

namespace fasternet {
namespace {

using Kind = NetworkStep::Kind;

constexpr char kMagic[8] = {'F', 'N', 'E', 'T', 'P', 'L', 'A', 'N'};
constexpr uint32_t kMark = 0x01020304, kForeignMark = 0x04030201;
constexpr int64_t kLine = 64;
constexpr std::align_val_t kAlignment{kLine};
constexpr uint32_t kMaxSteps = 1 << 16, kMaxWriter = 1 << 16;
constexpr int64_t kMaxChannels = 1 << 24, kMaxPatch = 1 << 12;  // so that no product of a few of them overflows
constexpr int64_t kMaxStride = 1 << 16;                         // of a map, in pixels of the input

struct Header {
  char magic[8];
  uint32_t mark, version;
  uint64_t bytes;
  uint32_t dtype, flags, channels, n_steps, n_outputs, writer_bytes;
  char zeros[40];
  uint32_t zero, crc;
};
static_assert(sizeof(Header) == 96, "the header has no padding");

struct StepRecord {
  uint32_t kind, act, flags, zero;
  int64_t a, b, c;
  uint64_t offset, bytes, zero2;
};
static_assert(sizeof(StepRecord) == 64, "a step has no padding");

struct OutputRecord {
  uint32_t is_head, zero;
  int64_t channels, row_stride, column_stride;
};
static_assert(sizeof(OutputRecord) == 32, "an output has no padding");

// CRC-32 as zlib and PNG have it (polynomial 0xEDB88320), eight bytes at a time.
class Crc32 {
 public:
  void add(const char* data, size_t n) {
    static const Tables tables = make_tables();
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(data[i]); };
    for (; n >= 8; data += 8, n -= 8) {
      uint32_t next = 0;
      for (size_t i = 0; i < 8; ++i) {
        const uint32_t with = i < 4 ? byte(i) ^ (value_ >> (8 * i) & 0xFF) : byte(i);
        next ^= tables[7 - i][with];
      }
      value_ = next;
    }
    for (size_t i = 0; i < n; ++i) value_ = tables[0][(value_ ^ byte(i)) & 0xFF] ^ (value_ >> 8);
  }
  uint32_t value() const { return ~value_; }

 private:
  using Tables = std::array<std::array<uint32_t, 256>, 8>;

  static Tables make_tables() {
    Tables tables;
    for (uint32_t n = 0; n < 256; ++n) {
      uint32_t c = n;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1;
      tables[0][n] = c;
    }
    for (uint32_t n = 0; n < 256; ++n) {
      for (size_t t = 1; t < 8; ++t) tables[t][n] = tables[0][tables[t - 1][n] & 0xFF] ^ (tables[t - 1][n] >> 8);
    }
    return tables;
  }

  uint32_t value_ = 0xFFFFFFFF;
};

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete(p, kAlignment); }
};
using Bytes = std::unique_ptr<char, AlignedDelete>;

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};

// What can be wrong with one file; every message begins with its path.
class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path) {}

  [[noreturn]] void refuse(const std::string& what) const { throw std::runtime_error(path_ + ": " + what); }

  // The whole file in 64-byte aligned memory.
  Bytes read(uint64_t* size) const {
    const std::unique_ptr<std::FILE, Close> file(std::fopen(path_.c_str(), "rb"));
    if (file == nullptr) refuse("cannot be opened: " + std::string(std::strerror(errno)));
    Header header;
    const size_t got = std::fread(&header, 1, sizeof(header), file.get());
    if (got < sizeof(header)) {
      if (std::ferror(file.get())) refuse("cannot be read: " + std::string(std::strerror(errno)));
      refuse("is no plan file: it has " + std::to_string(got) + " bytes, expected at least the " +
             std::to_string(sizeof(header)) + " of a header");
    }
    check(header);
    // Only now that this looks like a plan file is its length taken for the memory to ask for; and in pieces, so that a
    // false one is noticed at the end of the file and not at the end of memory.
    uint64_t length = sizeof(header), room = sizeof(header);
    Bytes data(static_cast<char*>(::operator new(room, kAlignment)));
    std::memcpy(data.get(), &header, sizeof(header));
    while (length < header.bytes) {
      room = std::min(header.bytes, std::max<uint64_t>(2 * length, seekable_size(file.get())));
      Bytes larger(static_cast<char*>(::operator new(room, kAlignment)));
      std::memcpy(larger.get(), data.get(), length);
      data = std::move(larger);
      const size_t more = std::fread(data.get() + length, 1, room - length, file.get());
      length += more;
      if (length < room) break;
    }
    if (std::ferror(file.get())) refuse("cannot be read: " + std::string(std::strerror(errno)));
    const bool more = length == header.bytes && std::fgetc(file.get()) != EOF;
    if (length < header.bytes || more) {
      refuse("is " + std::string(more ? "longer" : "cut off") + ": it has " + (more ? "more than " : "") +
             std::to_string(length) + " bytes, its header says " + std::to_string(header.bytes));
    }
    Crc32 crc;
    crc.add(data.get(), sizeof(header) - sizeof(header.crc));
    crc.add(data.get() + sizeof(header), length - sizeof(header));
    if (crc.value() != header.crc) refuse("is damaged: its checksum does not fit its contents");
    *size = length;
    return data;
  }

 private:
  // The length of what can be measured, else 0.
  static uint64_t seekable_size(std::FILE* file) {
    const long here = std::ftell(file);
    if (here < 0 || std::fseek(file, 0, SEEK_END) != 0) return 0;
    const long end = std::ftell(file);
    std::fseek(file, here, SEEK_SET);
    return end < 0 ? 0 : static_cast<uint64_t>(end);
  }

  void check(const Header& header) const {
    if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) {
      refuse("is no plan file: it does not begin with FNETPLAN");
    }
    if (header.mark == kForeignMark) refuse("was written on a machine of the other byte order; export it on this one");
    if (header.mark != kMark) refuse("is damaged: its byte order mark is none");
    if (header.version != kPlanVersion) {
      refuse("has format version " + std::to_string(header.version) + ", this library reads version " +
             std::to_string(kPlanVersion) +
             (header.version > kPlanVersion ? "; a newer fasternet_kernels wrote it" : ""));
    }
  }

  const std::string path_;
};

std::string at_step(uint32_t i, const std::string& what) { return "step " + std::to_string(i) + " " + what; }

template <class Record>
Record record_at(const char* data, uint64_t offset) {
  Record record;
  std::memcpy(&record, data + offset, sizeof(record));
  return record;
}

bool all_zero(const char* data, size_t n) {
  return std::all_of(data, data + n, [](char byte) { return byte == 0; });
}

// Bytes of a pack of the GEMMs (n, k), or -1 where that is more than `limit`. No extent is above 2^49.
int64_t pack_bytes(DType dtype, int64_t limit, std::initializer_list<std::pair<int64_t, int64_t>> gemms) {
  const int64_t element = dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  int64_t bytes = 0;
  for (const auto& [n, k] : gemms) {
    if (k > limit || n > limit / k) return -1;
    bytes += packed_size(dtype, n, k) * element;
    if (bytes > limit) return -1;
  }
  return bytes;
}

}  // namespace

Plan::Plan(const std::string& path) {
  const Reader file(path);
  uint64_t size = 0;
  Bytes data = file.read(&size);
  const auto header = record_at<Header>(data.get(), 0);
  if (header.dtype > 2) file.refuse("has dtype " + std::to_string(header.dtype) + ", expected 0, 1 or 2");
  if ((header.flags & ~kPlanSequence) != 0 || header.zero != 0 || !all_zero(header.zeros, sizeof(header.zeros))) {
    file.refuse("has a header with flags that this library does not know");
  }
  if (header.channels < 1 || header.channels > kMaxChannels) {
    file.refuse("has an input of " + std::to_string(header.channels) + " channels");
  }
  if (header.n_steps < 2 || header.n_steps > kMaxSteps || header.n_outputs > header.n_steps ||
      header.writer_bytes > kMaxWriter) {
    file.refuse("has " + std::to_string(header.n_steps) + " steps, " + std::to_string(header.n_outputs) +
                " outputs and a writer's name of " + std::to_string(header.writer_bytes) + " bytes, which cannot be");
  }
  const uint64_t outputs_at = sizeof(Header) + uint64_t{header.n_steps} * sizeof(StepRecord);
  const uint64_t writer_at = outputs_at + uint64_t{header.n_outputs} * sizeof(OutputRecord);
  const uint64_t tables_end = writer_at + header.writer_bytes;
  if (tables_end > size) {
    file.refuse("has tables of " + std::to_string(tables_end) + " bytes in " + std::to_string(size));
  }
  dtype_ = static_cast<DType>(header.dtype);
  channels_ = header.channels;
  sequence_ = (header.flags & kPlanSequence) != 0;
  writer_.assign(data.get() + writer_at, header.writer_bytes);

  PlanOutput now = {channels_, 1, 1};
  int64_t rows = 1, columns = 1;  // of the input per pixel of the smallest map
  for (uint32_t i = 0; i < header.n_steps; ++i) {
    const auto step = record_at<StepRecord>(data.get(), sizeof(Header) + uint64_t{i} * sizeof(StepRecord));
    if (step.kind > static_cast<uint32_t>(Kind::kEmit)) file.refuse(at_step(i, "is of an unknown kind"));
    if (step.act > static_cast<uint32_t>(Act::kHardswish)) file.refuse(at_step(i, "has an unknown activation"));
    if ((step.flags & ~kPlanFast) != 0 || step.zero != 0 || step.zero2 != 0) {
      file.refuse(at_step(i, "has flags that this library does not know"));
    }
    const Kind kind = static_cast<Kind>(step.kind);
    const bool emits = kind == Kind::kEmit, patch = kind == Kind::kPatchConv;
    const bool fast = (step.flags & kPlanFast) != 0;
    const auto within = [](int64_t value, int64_t most) { return value >= 1 && value <= most; };
    const bool fits = emits   ? step.a == 0 && step.b == 0 && step.c == 0
                      : patch ? within(step.a, kMaxChannels) && within(step.b, kMaxPatch) && within(step.c, kMaxPatch)
                              : within(step.a, kMaxChannels) && within(step.b, kMaxChannels) && step.c == 0;
    if (!fits) file.refuse(at_step(i, "has sizes that cannot be"));
    const int64_t fast_size = fast && kind == Kind::kBlock ? packed_fast_size(dtype_, step.a) : 0;
    if (fast && fast_size == 0) file.refuse(at_step(i, "allows a fast tier that it does not have"));
    const int64_t limit = static_cast<int64_t>(size);
    int64_t bytes = 0;
    switch (kind) {
      case Kind::kPatchConv:
        bytes = pack_bytes(dtype_, limit, {{step.a, now.channels * step.b * step.c}});
        now = {step.a, now.row_stride * step.b, now.column_stride * step.c};
        rows = now.row_stride, columns = now.column_stride;
        if (now.row_stride > kMaxStride || now.column_stride > kMaxStride) {
          file.refuse(at_step(i, "makes maps smaller than any image"));
        }
        break;
      case Kind::kBlock:
        if (step.a > now.channels) file.refuse(at_step(i, "convolves more channels than there are"));
        bytes = pack_bytes(dtype_, limit, {{3 * step.a, 3 * step.a}, {step.b, now.channels}, {now.channels, step.b}});
        if (bytes >= 0) bytes += fast_size * static_cast<int64_t>(sizeof(float));  // no other type has one
        break;
      case Kind::kHead:
        bytes = pack_bytes(dtype_, limit, {{step.a, now.channels}, {step.b, step.a}});
        now = {step.b, 0, 0};
        break;
      case Kind::kEmit:
        break;
    }
    if (emits || kind == Kind::kHead) outputs_.push_back(now);
    if (bytes < 0 || static_cast<uint64_t>(bytes) != step.bytes || step.offset % kLine != 0 || step.offset > size ||
        step.bytes > size - step.offset || (bytes > 0 && step.offset < tables_end)) {
      file.refuse(at_step(i, "has its weights at " + std::to_string(step.offset) + ", " + std::to_string(step.bytes) +
                                 " bytes, expected " + (bytes < 0 ? "fewer than the file has" : std::to_string(bytes)) +
                                 " at a multiple of 64 within the file's " + std::to_string(size)));
    }
    steps_.push_back({kind, step.a, step.b, step.c, static_cast<Act>(step.act),
                      emits ? nullptr : static_cast<const void*>(data.get() + step.offset), fast});
  }
  for (uint32_t i = 0; i < header.n_outputs; ++i) {
    const auto output = record_at<OutputRecord>(data.get(), outputs_at + uint64_t{i} * sizeof(OutputRecord));
    const PlanOutput claimed = {output.channels, output.row_stride, output.column_stride};
    const bool same = i < outputs_.size() && output.zero == 0 && claimed.channels == outputs_[i].channels &&
                      claimed.row_stride == outputs_[i].row_stride &&
                      claimed.column_stride == outputs_[i].column_stride &&
                      output.is_head == (claimed.row_stride == 0 ? 1 : 0);
    if (!same) file.refuse("output " + std::to_string(i) + " is not what the steps make");
  }
  if (header.n_outputs != outputs_.size()) {
    file.refuse("describes " + std::to_string(header.n_outputs) + " outputs, its steps make " +
                std::to_string(outputs_.size()));
  }
  try {  // the order of the steps: the same rules as for every plan, here for the smallest image
    network_outputs(network(1, rows, columns, nullptr, nullptr));
  } catch (const std::invalid_argument& error) {
    file.refuse(error.what());
  }
  data_ = data.release();
}

Plan::~Plan() { ::operator delete(data_, kAlignment); }

Network Plan::network(int64_t batch, int64_t height, int64_t width, const void* x, const int64_t x_stride[4]) const {
  Network args = {};
  args.dtype = dtype_;
  args.batch = batch, args.channels = channels_, args.height = height, args.width = width;
  args.x = x;
  if (x_stride != nullptr) std::copy_n(x_stride, 4, args.x_stride);
  args.steps = steps_.data(), args.n_steps = static_cast<int64_t>(steps_.size());
  return args;
}

}  // namespace fasternet
