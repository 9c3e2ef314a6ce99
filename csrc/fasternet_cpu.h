// The C++ API of fasternet_kernels on CPUs: FasterNet's operators (arXiv 2303.03667, section 3) on channels-last
// memory.
//
// Everything here works on plain pointers. Tensors are logically (batch, channels, height, width); `pixel_stride` is
// the distance, in elements, between the channel vectors of neighbouring pixels, so a channel slice of a wider tensor
// needs no copy: element (b, c, h, w) lies at ((b * height + h) * width + w) * pixel_stride + c.
//
// Arithmetic is float for float and bfloat16 storage, double for double storage. Every output element is accumulated in
// one fixed order of K, so results depend neither on the number of threads nor on the batch an image comes in.
//
// The library owns no threads: each call takes a ParallelFor. Scratch is kept per thread and reused between calls; a
// buffer of more than 32 MB, which only head and network at large batches need, is freed when the call returns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fasternet {

// Storage types. Packed weights, scale and shift are in the compute type: float for kFloat32 and kBFloat16, else
// double.
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2 };
enum class Act : int { kIdentity = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4, kHardswish = 5 };
enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kNeon = 3 };

// Parses "relu", "gelu", "gelu_tanh", "silu", "hardswish", "identity". Throws std::invalid_argument.
Act parse_act(const std::string& name);
const char* isa_name(Isa isa);

// ---- Instruction sets -----------------------------------------------------------------------------------------------

std::vector<Isa> available_isas();  // those compiled in that this processor runs, slowest first
// The one in use: the fastest available, or what the environment variable FASTERNET_KERNELS_ISA names (generic, avx2,
// avx512, neon), chosen once. Throws std::runtime_error if that is unknown or not available; the next call then looks
// again.
Isa selected_isa();
std::string compiler();  // name and version of the compiler that built the kernels

// ---- Threads --------------------------------------------------------------------------------------------------------

// `run(context, n, body, body_context)` must call body(body_context, begin, end) on disjoint ranges that cover [0, n),
// from any threads, and return when all are done. num_threads is how many of them run at once; it only guides how work
// is cut.
struct ParallelFor {
  using Body = void (*)(void* body_context, int64_t begin, int64_t end);
  void (*run)(void* context, int64_t n, Body body, void* body_context);
  void* context;
  int num_threads;
};
ParallelFor serial();  // everything on the calling thread

// ---- Packed weights -------------------------------------------------------------------------------------------------

// One GEMM operand in the order the kernels read it, the same on every instruction set: panels of 16 output channels (8
// in double), each laid out as K rows of one cache line, a last panel of half that width where that suffices; then the
// shift. K runs over (kernel row, kernel column, input channel). PConv's weight is packed with its kernel columns as
// outputs of their own, `columns_as_outputs`: kw * n outputs (kernel column, output channel), without scale or shift,
// and K over (kernel row, input channel).
struct Weight {
  const void* data = nullptr;  // (n, c, kh, kw), contiguous
  DType dtype = DType::kFloat32;
  int64_t n = 0, c = 0, kh = 1, kw = 1;
  const void* scale = nullptr;  // (n) or null, compute type: multiplies each output channel's weights, in double
  const void* shift = nullptr;  // (n) or null, compute type
  bool columns_as_outputs = false;
};
int64_t packed_size(DType dtype, int64_t n, int64_t k);  // elements of the compute type; a multiple of a cache line
int64_t packed_size(const Weight& weight);
void pack(const Weight& weight, void* packed);  // weight.dtype kFloat64 packs double, the others float

// ---- Operators ------------------------------------------------------------------------------------------------------

// y[:, :c_partial] = conv3x3(x[:, :c_partial]), stride 1, zero padding 1; y[:, c_partial:] = x[:, c_partial:].
// Any strides (batch, channel, height, width; in elements). In place when y == x with equal strides: the other channels
// are then never touched, and the scratch is a few image rows per thread.
struct PConv3x3 {
  DType dtype;
  int64_t batch, channels, height, width, c_partial;
  const void* x;
  int64_t x_stride[4];
  void* y;
  int64_t y_stride[4];
  const void* packed;  // Weight(c_partial, c_partial, 3, 3) with columns_as_outputs
};
void pconv3x3(const PConv3x3& args, const ParallelFor& parallel);

// y = act(conv1x1(u, w_pw) + shift), u = x with its first c_partial channels replaced by conv3x3(x[:, :c_partial]).
struct PConvPw {
  DType dtype;
  int64_t batch, channels, height, width, c_partial, c_out;
  const void* x;
  int64_t x_pixel_stride;
  void* y;
  int64_t y_pixel_stride;
  const void* packed;  // that of PConv3x3, then Weight(c_out, channels, 1, 1)
  Act act;
};
void pconv_pw(const PConvPw& args, const ParallelFor& parallel);

// y = residual + sample_scale[b] * conv1x1(act(conv1x1(u, w_pw1) + shift), w_pw2): a FasterNet block (Figure 4 of the
// paper).
struct Block {
  DType dtype;           // of x
  DType residual_dtype;  // of residual and y: dtype, or kFloat32 beside a kBFloat16 x
  int64_t batch, channels, height, width, c_partial, c_hidden;
  const void* x;
  int64_t x_pixel_stride;
  const void* residual;  // usually x
  int64_t residual_pixel_stride;
  void* y;  // must not overlap x
  int64_t y_pixel_stride;
  const void* packed;        // that of PConv3x3, Weight(c_hidden, channels, 1, 1), Weight(channels, c_hidden, 1, 1)
  const void* sample_scale;  // (batch) in the compute type, or null
  Act act;
};
void block(const Block& args, const ParallelFor& parallel);

// y = conv(x, kernel = stride = (kh, kw), no padding) + shift: the stem and the merging layers. Rows and columns of x
// that do not fill a patch are ignored. x may have any strides (batch, channel, height, width); y is channels-last.
struct PatchConv {
  DType dtype;
  int64_t batch, channels, height, width, c_out, kh, kw;
  const void* x;
  int64_t x_stride[4];
  void* y;  // (batch, height / kh, width / kw, c_out)
  int64_t y_pixel_stride;
  const void* packed;  // Weight(c_out, channels, kh, kw)
};
void patch_conv(const PatchConv& args, const ParallelFor& parallel);

// y = fc(act(conv1x1(mean over height and width of x) + shift)) + bias.
struct Head {
  DType dtype;
  int64_t batch, channels, height, width, c_mid, c_out;
  const void* x;
  int64_t x_pixel_stride;
  void* y;             // (batch, c_out), contiguous
  const void* packed;  // Weight(c_mid, channels, 1, 1), then Weight(c_out, c_mid, 1, 1)
  Act act;
};
void head(const Head& args, const ParallelFor& parallel);

// A whole network, or the part of it up to some feature maps, as a list of steps run one after the other on
// channels-last intermediates in two scratch buffers of the calling thread. `packed` is each step's own pack.
struct NetworkStep {
  enum class Kind : int { kPatchConv = 0, kBlock = 1, kHead = 2, kEmit = 3 };
  Kind kind;
  // kPatchConv: c_out, kh, kw. kBlock: c_partial, c_hidden. kHead: c_mid, c_out. kEmit: the current feature map is an
  // output.
  int64_t a, b, c;
  Act act;
  const void* packed;
};
struct Network {
  DType dtype;
  int64_t batch, channels, height, width;
  const void* x;
  int64_t x_stride[4];
  const NetworkStep* steps;
  int64_t n_steps;
};
struct FeatureShape {
  int64_t channels, height, width;  // height and width are -1 for the (batch, channels) output of a head
};
// The outputs, in order: each kEmit's, then the head's. A plan that ends in neither a kEmit nor a kHead, starts with a
// kBlock or kEmit, or goes on after a kHead is refused with std::invalid_argument.
std::vector<FeatureShape> network_outputs(const Network& args);
// outputs[i] is dense channels-last memory of the i-th of network_outputs.
void network(const Network& args, void* const* outputs, const ParallelFor& parallel);

// ---- The machine ----------------------------------------------------------------------------------------------------

// What the machine could do at best: operations per second (two for a multiply-add) of independent float multiply-adds
// in registers, on the vectors of selected_isa() and on all of parallel's threads, over about `seconds`.
double fma_peak(double seconds, const ParallelFor& parallel);
// ---- Plan files -----------------------------------------------------------------------------------------------------

// A network plan with its packed weights in one file, as fasternet_kernels.export_plan writes it. Numbers are in the
// writer's byte order, which the mark tells; weights begin at multiples of 64 bytes.
//
//   header   96 bytes   magic "FNETPLAN", u32 mark 0x01020304, u32 version, u64 bytes of the file, u32 dtype (DType),
//                       u32 flags (kPlanSequence), u32 channels of the input, u32 n_steps, u32 n_outputs, u32 bytes of
//                       the writer's name, 40 bytes of zeros, u32 zero, u32 CRC-32 (zlib's) of all bytes but these 4
//   steps    64 each    u32 kind, u32 act, u32 flags (none is known yet), u32 zero, i64 a, b, c as in NetworkStep, u64
//                       offset and u64 bytes of the packed weights in the file, u64 zero
//   outputs  32 each    u32 1 for a head's (batch, channels), 0 for a feature map; u32 zero, i64 channels, i64 rows and
//                       i64 columns of the input per row and column of the map, 0 for a head
//   writer              UTF-8, then zeros up to a multiple of 64 bytes from the beginning of the file
//   weights             each step's pack in the compute type
constexpr uint32_t kPlanVersion = 1;
constexpr uint32_t kPlanSequence = 1;  // the outputs are a sequence even where there is only one

struct PlanOutput {
  int64_t channels, row_stride, column_stride;  // strides are 0 for the (batch, channels) output of a head
};

// A plan read from a file, with its own copy of the weights. Never changes: any number of threads may use it at once.
class Plan {
 public:
  // Reads and checks the whole file; throws std::runtime_error that says what is wrong, where, and what was expected.
  explicit Plan(const std::string& path);
  ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  DType dtype() const { return dtype_; }
  int64_t channels() const { return channels_; }
  bool sequence() const { return sequence_; }
  const std::vector<NetworkStep>& steps() const { return steps_; }
  const std::vector<PlanOutput>& outputs() const { return outputs_; }
  const std::string& writer() const { return writer_; }  // name and version of the library that wrote the file

  // The argument of network(): these images through this plan.
  Network network(int64_t batch, int64_t height, int64_t width, const void* x, const int64_t x_stride[4]) const;

 private:
  DType dtype_ = DType::kFloat32;
  int64_t channels_ = 0;
  bool sequence_ = false;
  std::vector<NetworkStep> steps_;
  std::vector<PlanOutput> outputs_;
  std::string writer_;
  char* data_ = nullptr;  // the file, 64-byte aligned
};

// ---- Reference ------------------------------------------------------------------------------------------------------

// The same operators as plain loops over unpacked weights with double accumulation, for the tests. Contiguous
// (batch, height, width, channels) arrays of double; null scale, shift, sample_scale mean 1, 0, 1.
namespace reference {
std::vector<double> conv(const std::vector<double>& x, int64_t batch, int64_t height, int64_t width, int64_t channels,
                         const std::vector<double>& weight, int64_t c_out, int64_t kh, int64_t kw, int64_t stride_h,
                         int64_t stride_w, int64_t pad);
double act(Act act, double value);
}  // namespace reference

}  // namespace fasternet
