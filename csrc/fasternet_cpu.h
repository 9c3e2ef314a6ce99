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
// The library owns no threads: each call takes a ParallelFor. Scratch is kept per thread and reused, so that a call
// like the one before allocates nothing. What large images and batches need is kept only for a while: a buffer of more
// than 32 MB until a few calls in a row have needed less than half of it, one of more than 128 MB until the call
// returns (calls of blocks, pconv_pw, networks, heads and training, whose buffers grow with the number of threads or
// with the batch; the others' grow with a tile).
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
  const void* data = nullptr;  // (n, c, kh, kw), contiguous, or in memory (n, kh, kw, c) where it is channels_last
  bool channels_last = false;
  DType dtype = DType::kFloat32;
  int64_t n = 0, c = 0, kh = 1, kw = 1;
  const void* scale = nullptr;  // (n) or null, compute type: multiplies each output channel's weights, in double
  const void* shift = nullptr;  // (n) or null, compute type
  bool columns_as_outputs = false;
};
int64_t packed_size(DType dtype, int64_t n, int64_t k);  // elements of the compute type; a multiple of a cache line
int64_t packed_size(const Weight& weight);
// weight.dtype kFloat64 packs double, the others float.
void pack(const Weight& weight, void* packed, const ParallelFor& parallel = serial());

// The fast tier: what an operator's `fast` allows in float32 (ignored for other dtypes), where it pays, and what it
// reads behind the rest of its `packed`: PConv's weight for Winograd's F(2x4, 3x3). A PConv then multiplies a third as
// often; its rounding error is 2 to 5 times the direct one's in the L2 norm, the largest of an output up to 10 times.
// An infinity or NaN in x may reach neighbours two rows and four columns away, and an infinity come out as NaN; finite
// values, and all rules about bits, are as always, but that sums of values near float's largest overflow sooner.
int64_t packed_fast_size(DType dtype, int64_t c_partial);  // 0: this PConv has no fast tier, and `fast` does nothing
void pack_fast(const Weight& weight, void* packed);        // PConv's weight: (c_partial, c_partial, 3, 3)
bool fast_tier_pays(int64_t c_partial, int64_t height, int64_t width);  // whether an operator on such images uses it

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
  bool fast = false;   // not in place, channels-last
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
  bool fast = false;
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
  void* y;  // must overlap neither x nor residual
  int64_t y_pixel_stride;
  const void* packed;        // that of PConv3x3, Weight(c_hidden, channels, 1, 1), Weight(channels, c_hidden, 1, 1)
  const void* sample_scale;  // (batch) in the compute type, or null
  Act act;
  bool fast = false;
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
  bool fast = false;  // of a kBlock
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
//   steps    64 each    u32 kind, u32 act, u32 flags (kPlanFast), u32 zero, i64 a, b, c as in NetworkStep, u64 offset
//                       and u64 bytes of the packed weights in the file, u64 zero
//   outputs  32 each    u32 1 for a head's (batch, channels), 0 for a feature map; u32 zero, i64 channels, i64 rows and
//                       i64 columns of the input per row and column of the map, 0 for a head
//   writer              UTF-8, then zeros up to a multiple of 64 bytes from the beginning of the file
//   weights             each step's pack in the compute type
//
// A flag that a reader does not know is an error; so files without it stay readable for libraries older than the flag.
constexpr uint32_t kPlanVersion = 1;
constexpr uint32_t kPlanSequence = 1;  // the outputs are a sequence even where there is only one
constexpr uint32_t kPlanFast = 1;      // of a block: the fast tier is allowed, and its weights end the pack

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
// ---- Training -------------------------------------------------------------------------------------------------------

// A training step of a block is pw_stats, then the batch norm's vectors (the caller's, who may combine statistics of
// several processes), then act_pw_residual; and backward the other way round. Kept in between are x, z and the vectors
// alone: u, the PConv's output, and a, the activation, are computed again where they are needed.
//
// Weights are plain contiguous arrays of PyTorch's shapes in the storage type, those of 3x3 and patch convolutions also
// channels-last ones, (out, kernel row, kernel column, in), and then so are their gradients; mean, m2, scale, shift and
// their gradients are in the compute type. Tensors with a pixel stride may be channel slices; gradients are written
// dense. A null gradient is one that is not wanted, and is not computed. Sums over pixels are made tile by tile in an
// order that only the shape decides, so results do not depend on the number of threads.

// z = conv1x1(u, w_pw), with the mean of each channel of z as stored and m2, its sum of squared deviations. Without
// pixels mean and m2 are NaN and 0.
struct PwStats {
  DType dtype;
  int64_t batch, channels, height, width, c_partial, c_out;
  const void* x;
  int64_t x_pixel_stride;
  const void* w_partial;  // (c_partial, c_partial, 3, 3)
  const void* w_pw;       // (c_out, channels)
  void* z;                // dense
  void* mean;             // (c_out)
  void* m2;               // (c_out)
  bool w_partial_channels_last = false;
};
void pw_stats(const PwStats& args, const ParallelFor& parallel);

// The gradients of pw_stats, dy added to dx where it is not null (a block's residual).
struct PwStatsBackward {
  DType dtype;
  int64_t batch, channels, height, width, c_partial, c_out;
  const void* dz;
  int64_t dz_pixel_stride;
  const void* dmean;  // (c_out)
  const void* dm2;    // (c_out)
  const void* x;
  int64_t x_pixel_stride;
  const void* z;
  int64_t z_pixel_stride;
  const void* mean;  // (c_out)
  const void* w_partial;
  const void* w_pw;
  const void* dy;  // or null
  int64_t dy_pixel_stride;
  void* dx;
  void* dw_partial;
  void* dw_pw;
  bool w_partial_channels_last = false;
};
void pw_stats_backward(const PwStatsBackward& args, const ParallelFor& parallel);

// y = act((z - mean) * scale + shift).
struct BnAct {
  DType dtype;
  int64_t pixels, channels;
  const void* z;
  int64_t z_pixel_stride;
  const void* mean;
  const void* scale;
  const void* shift;
  Act act;
  void* y;  // dense
};
void bn_act(const BnAct& args, const ParallelFor& parallel);

// y = residual + sample_scale * layer_scale * conv1x1(bn_act(z), w_pw2).
struct ActPwResidual {
  DType dtype;           // of z and w_pw2
  DType residual_dtype;  // of residual and y: dtype, or kFloat32 beside a kBFloat16 z
  int64_t batch, channels, height, width, c_hidden;
  const void* residual;
  int64_t residual_pixel_stride;
  const void* z;
  int64_t z_pixel_stride;
  const void* mean;  // (c_hidden), as scale and shift
  const void* scale;
  const void* shift;
  const void* w_pw2;         // (channels, c_hidden)
  const void* layer_scale;   // (channels) in the compute type, or null
  const void* sample_scale;  // (batch) in the compute type, or null
  Act act;
  void* y;  // dense; must not overlap z
};
void act_pw_residual(const ActPwResidual& args, const ParallelFor& parallel);

// The gradients of act_pw_residual, but for the residual's, which is the incoming one; with a null w_pw2 (and channels
// = c_hidden) those of bn_act.
struct ActPwResidualBackward {
  DType dtype;
  int64_t batch, channels, height, width, c_hidden;
  const void* grad;
  int64_t grad_pixel_stride;
  const void* z;
  int64_t z_pixel_stride;
  const void* mean;
  const void* scale;
  const void* shift;
  const void* w_pw2;
  const void* layer_scale;
  const void* sample_scale;
  Act act;
  void* dz;
  void* dmean;          // (c_hidden): -scale * dshift
  void* dscale;         // (c_hidden)
  void* dshift;         // (c_hidden)
  void* dw_pw2;         // (channels, c_hidden), storage type
  void* dlayer_scale;   // (channels), compute type
  void* dsample_scale;  // (batch), compute type
};
void act_pw_residual_backward(const ActPwResidualBackward& args, const ParallelFor& parallel);

// The gradients of pconv3x3: dx[:, :c_partial] and dweight through the convolution, dx's other channels are grad's.
struct PConv3x3Backward {
  DType dtype;
  int64_t batch, channels, height, width, c_partial;
  const void* grad;
  int64_t grad_pixel_stride;
  const void* x;  // its first c_partial channels
  int64_t x_pixel_stride;
  const void* weight;  // (c_partial, c_partial, 3, 3)
  void* dx;            // dense
  void* dweight;
  bool weight_channels_last = false;
};
void pconv3x3_backward(const PConv3x3Backward& args, const ParallelFor& parallel);

// patch_conv, with the mean of each channel of y as stored and m2, as pw_stats gives them of z.
struct PatchStats {
  PatchConv conv;
  void* mean;  // (c_out), compute type
  void* m2;    // (c_out), compute type
};
void patch_stats(const PatchStats& args, const ParallelFor& parallel);

// The gradients of y = conv(x, weight, stride = kernel) * scale + shift. Pixels of x in no patch have gradient zero.
// With y, mean, dmean and dm2 they are those of patch_stats: what the statistics contribute joins grad.
struct PatchConvBackward {
  DType dtype;
  int64_t batch, channels, height, width, c_out, kh, kw;
  const void* grad;  // (batch, height / kh, width / kw, c_out)
  int64_t grad_pixel_stride;
  const void* x;  // any strides
  int64_t x_stride[4];
  const void* weight;  // (c_out, channels, kh, kw)
  const void* scale;   // (c_out) in the compute type, or null
  const void* y;       // null where the statistics have no gradients
  int64_t y_pixel_stride;
  const void* mean;  // (c_out) in the compute type, as dmean and dm2
  const void* dmean;
  const void* dm2;
  void* dx;  // dense
  void* dweight;
  void* dscale;  // (c_out), compute type
  void* dshift;  // (c_out), compute type
  bool weight_channels_last = false;
};
void patch_conv_backward(const PatchConvBackward& args, const ParallelFor& parallel);

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
