// The CPU implementations of the fasternet_kernels ops: check, fill the struct of csrc, call. Schemas, fakes, autograd
// and the reference live in fasternet_kernels/ops.py. LibTorch stable ABI (target 2.10): one binary is meant to serve
// every later torch.
//
// An output follows the memory format that the input suggests. The kernels work on channels-last memory: another input
// is copied to it, and the output back. float16 is computed in float32.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "fasternet_cpu.h"

namespace {

using fasternet::DType;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- Threads --------------------------------------------------------------------------------------------------------

fasternet::ParallelFor torch_threads() {
  const auto run = [](void*, int64_t n, fasternet::ParallelFor::Body body, void* context) {
    if (n == 1) return body(context, 0, 1);
    torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return {run, nullptr, static_cast<int>(torch::stable::get_num_threads())};
}

// ---- Types and layouts ----------------------------------------------------------------------------------------------

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "fasternet_kernels: unsupported dtype, expected float32, float64, bfloat16 or float16");
  }
}
ScalarType compute_type(ScalarType type) { return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

// torch.promote_types of two floating-point types.
ScalarType wider_type(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor cast(const Tensor& t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }
// Tensor.contiguous(format) of 4 dimensions or, in the usual format, of any number; without its way through the
// dispatcher where nothing is to do, as with most of what a layer of training takes.
Tensor dense(const Tensor& t, MemoryFormat format) {
  bool done = format == MemoryFormat::Contiguous && t.is_contiguous();
  if (format == MemoryFormat::ChannelsLast) {
    const auto size = t.sizes(), stride = t.strides();
    int64_t expected = 1;
    done = true;
    for (int d : {1, 3, 2, 0}) {
      done = done && (size[d] == 1 || stride[d] == expected);
      expected *= size[d];
    }
  }
  return done ? t : torch::stable::contiguous(t, format);
}
Tensor dense(const Tensor& t, ScalarType type) { return dense(cast(t, type), MemoryFormat::Contiguous); }
OptionalTensor dense(const OptionalTensor& t, ScalarType type) {
  return t ? OptionalTensor(dense(*t, type)) : std::nullopt;
}

// Tensor.suggest_memory_format(): strides ordered batch >= height >= width >= channels.
MemoryFormat format_of(const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  if (stride[1] == 0) return MemoryFormat::Contiguous;
  int64_t least = 0;
  for (int d : {1, 3, 2, 0}) {
    if (size[d] == 0 || stride[d] < least || (d == 0 && least == stride[1])) return MemoryFormat::Contiguous;
    least = stride[d] * size[d];
  }
  return MemoryFormat::ChannelsLast;
}

// A convolution's weight in the memory format that it suggests, as its gradient will be.
struct ConvWeight {
  MemoryFormat format;
  Tensor tensor;
  ConvWeight(const Tensor& weight, ScalarType type)
      : format(format_of(weight)), tensor(dense(cast(weight, type), format)) {}
  bool channels_last() const { return format == MemoryFormat::ChannelsLast; }
  const void* data() const { return tensor.const_data_ptr(); }
};

// What a kernel stores: float16 is widened, the other types are stored as they are.
ScalarType stored_type(ScalarType type) { return type == ScalarType::Half ? ScalarType::Float : type; }

// x rounded to the weights' type (autocast), in a type the kernels store.
Tensor operand(const Tensor& x, ScalarType weight_type) { return cast(cast(x, weight_type), stored_type(weight_type)); }

Tensor empty_image(const Tensor& like, int64_t channels, int64_t height, int64_t width, ScalarType type,
                   MemoryFormat format) {
  const int64_t size[4] = {like.size(0), channels, height, width};
  return torch::stable::empty({size, 4}, type, std::nullopt, like.device(), std::nullopt, format);
}

// A tensor whose element (b, c, h, w) lies at ((b * H + h) * W + w) * stride + c: x itself, or a copy.
struct Pixels {
  Tensor tensor;
  int64_t stride;
  explicit Pixels(const Tensor& x) : tensor(x), stride(x.size(1)) {
    const auto size = x.sizes(), s = x.strides();
    const int64_t pixel = size[3] > 1 ? s[3] : size[2] > 1 ? s[2] : size[0] > 1 ? s[0] : size[1];
    const bool uniform = (size[1] <= 1 || s[1] == 1) && pixel >= size[1] && (size[2] <= 1 || s[2] == size[3] * pixel) &&
                         (size[0] <= 1 || s[0] == size[2] * size[3] * pixel);
    if (uniform) {
      stride = pixel;
    } else {
      tensor = torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
    }
  }
  const void* data() const { return tensor.const_data_ptr(); }
};

// What the caller gets of a kernel's dense channels-last output: the asked type and format, with the strides that
// torch.empty gives it and the fakes promise. contiguous() would not do: where a dimension of size 1 makes both formats
// the same memory, it keeps the strides of the other one.
Tensor finish(const Tensor& y, ScalarType type, MemoryFormat format) {
  if (y.scalar_type() == type && format == MemoryFormat::ChannelsLast) return y;
  Tensor result = empty_image(y, y.size(1), y.size(2), y.size(3), type, format);
  torch::stable::copy_(result, y);
  return result;
}

void check_image(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "fasternet_kernels: x has ", x.dim(), " dimensions, expected 4 (B, C, H, W)");
}
void check_size(const Tensor& t, const char* name, std::initializer_list<int64_t> size) {
  bool same = t.dim() == static_cast<int64_t>(size.size());
  int d = 0;
  for (int64_t expected : size) same = same && t.size(d++) == expected;
  if (same) return;
  std::string message = std::string("fasternet_kernels: ") + name + " has the wrong shape, expected (";
  for (int64_t expected : size) message += std::to_string(expected) + ", ";
  STD_TORCH_CHECK(false, message, ")");
}
void check_size(const OptionalTensor& t, const char* name, std::initializer_list<int64_t> size) {
  if (t) check_size(*t, name, size);
}
void check_c_partial(int64_t c_partial, const Tensor& x) {
  STD_TORCH_CHECK(c_partial >= 1 && c_partial <= x.size(1), "fasternet_kernels: c_partial is ", c_partial,
                  ", expected 1 to x's ", x.size(1), " channels");
}
// A pack of the GEMMs (n, k), in x's compute type. Returns whether the fast tier can run: x is float32, and the weights
// for it, of a PConv of c_partial channels, follow.
bool check_pack(const Tensor& pack, const Tensor& x, std::initializer_list<std::pair<int64_t, int64_t>> gemms,
                int64_t c_partial = 0) {
  const ScalarType type = compute_type(x.scalar_type());
  int64_t elements = 0;
  for (const auto& [n, k] : gemms) {
    STD_TORCH_CHECK(n >= 1 && k >= 1, "fasternet_kernels: a channel count is below 1");
    elements += fasternet::packed_size(dtype_of(type), n, k);
  }
  const int64_t more = fasternet::packed_fast_size(dtype_of(type), c_partial);
  const bool fast = more > 0 && pack.numel() == elements + more;
  STD_TORCH_CHECK(
      pack.dim() == 1 && pack.scalar_type() == type && (pack.numel() == elements || fast) && pack.is_contiguous(),
      "fasternet_kernels: pack does not fit: it has ", pack.numel(), " elements, expected ", elements,
      " in x's compute type");
  return fast && x.scalar_type() == ScalarType::Float;
}

// ---- Packing --------------------------------------------------------------------------------------------------------

// Weights (N, C, kh, kw) or (N, C), with a scale and a shift each or none, one after the other; the first one PConv's
// or not. `fast`: then PConv's weights of the fast tier, if it has one.
Tensor pack_weights(const std::vector<Tensor>& weights, const std::vector<OptionalTensor>& scales,
                    const std::vector<OptionalTensor>& shifts, bool pconv, bool fast) {
  STD_TORCH_CHECK(!weights.empty() && scales.size() == weights.size() && shifts.size() == weights.size(),
                  "fasternet_kernels: pack takes as many scales and shifts as weights, at least one");
  const ScalarType type = weights[0].scalar_type(), compute = compute_type(type);
  std::vector<fasternet::Weight> items;
  std::vector<Tensor> keep;  // what the items point to
  int64_t elements = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(weights[i].scalar_type() == type, "fasternet_kernels: pack takes weights of one dtype");
    const int64_t dims = weights[i].dim();
    STD_TORCH_CHECK(dims == 2 || dims == 4, "fasternet_kernels: pack takes weights of 2 or 4 dimensions");
    STD_TORCH_CHECK(weights[i].numel() > 0, "fasternet_kernels: a weight has no elements");
    fasternet::Weight item;
    if (dims == 4) {
      const ConvWeight kernel(weights[i], stored_type(type));
      keep.push_back(kernel.tensor);
      item.channels_last = kernel.channels_last();
    } else {
      keep.push_back(dense(weights[i], stored_type(type)));
    }
    item.data = keep.back().const_data_ptr();
    item.dtype = dtype_of(stored_type(type));
    item.n = weights[i].size(0);
    item.c = weights[i].size(1);
    if (dims == 4) {
      item.kh = weights[i].size(2);
      item.kw = weights[i].size(3);
    }
    item.columns_as_outputs = pconv && i == 0;
    check_size(scales[i], "scale", {item.n});
    check_size(shifts[i], "shift", {item.n});
    if (scales[i]) {
      keep.push_back(dense(*scales[i], compute));
      item.scale = keep.back().const_data_ptr();
    }
    if (shifts[i]) {
      keep.push_back(dense(*shifts[i], compute));
      item.shift = keep.back().const_data_ptr();
    }
    items.push_back(item);
    elements += fasternet::packed_size(item);
  }
  fast = fast && pconv && type == ScalarType::Float && items[0].n == items[0].c;
  if (fast) elements += fasternet::packed_fast_size(items[0].dtype, items[0].n);
  Tensor packed = torch::stable::empty({&elements, 1}, compute, std::nullopt, weights[0].device());
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  for (const fasternet::Weight& item : items) {
    fasternet::pack(item, to, torch_threads());
    to += fasternet::packed_size(item) * static_cast<int64_t>(packed.element_size());
  }
  if (fast) fasternet::pack_fast(items[0], to);
  return packed;
}

// The op: of several weights, a first one that is 3x3 is PConv's.
Tensor pack(std::vector<Tensor> weights, std::vector<OptionalTensor> scales, std::vector<OptionalTensor> shifts,
            bool fast) {
  const bool pconv = weights.size() > 1 && weights[0].dim() == 4 && weights[0].size(2) == 3 && weights[0].size(3) == 3;
  return pack_weights(weights, scales, shifts, pconv, fast);
}

// ---- PConv ----------------------------------------------------------------------------------------------------------

fasternet::PConv3x3 pconv_args(const Tensor& x, const Tensor& y, int64_t c_partial, const Tensor& packed) {
  fasternet::PConv3x3 args = {};
  args.dtype = dtype_of(x.scalar_type());
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.c_partial = c_partial;
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  for (int d = 0; d < 4; ++d) {
    args.x_stride[d] = x.stride(d);
    args.y_stride[d] = y.stride(d);
  }
  args.packed = packed.const_data_ptr();
  return args;
}

void check_pconv(const Tensor& x, const Tensor& weight) {
  check_image(x);
  STD_TORCH_CHECK(weight.dim() == 4, "fasternet_kernels: weight has ", weight.dim(), " dimensions, expected 4");
  const int64_t c_partial = weight.size(0);
  check_size(weight, "weight", {c_partial, c_partial, 3, 3});
  check_c_partial(c_partial, x);
}

// Whether the operators on raw weights run the fast tier: in float32, where a PConv has one, and on enough pixels to be
// worth transforming its weights in the call.
bool fast_tier(const Tensor& x, const Tensor& w_partial) {
  constexpr int64_t kPixels = 16384;
  return x.scalar_type() == ScalarType::Float && w_partial.scalar_type() == ScalarType::Float && x.stride(1) == 1 &&
         x.size(0) * x.size(2) * x.size(3) >= kPixels &&
         fasternet::fast_tier_pays(w_partial.size(0), x.size(2), x.size(3));
}

// The first c_partial channels of y from x, in a type that the kernels store.
void pconv_into(const Tensor& x, const Tensor& weight, const Tensor& y, bool fast) {
  fast = fast && fast_tier(x, weight);
  const Tensor packed = pack_weights({weight}, {std::nullopt}, {std::nullopt}, true, fast);
  fasternet::PConv3x3 args = pconv_args(x, y, weight.size(0), packed);
  args.fast = fast;
  fasternet::pconv3x3(args, torch_threads());
}

Tensor pconv3x3(Tensor x, Tensor weight, bool fast) {
  check_pconv(x, weight);
  const MemoryFormat format = format_of(x);
  const ScalarType type = weight.scalar_type();
  if (x.scalar_type() == type && type != ScalarType::Half) {
    Tensor y = empty_image(x, x.size(1), x.size(2), x.size(3), type, format);
    pconv_into(x, weight, y, fast);
    return y;
  }
  // Autocast or float16: the convolved channels go through the kernel's type, the others are copied as they are.
  Tensor y = empty_image(x, x.size(1), x.size(2), x.size(3), x.scalar_type(), format);
  torch::stable::copy_(y, x);
  Tensor partial = operand(torch::stable::narrow(x, 1, 0, weight.size(0)), type);
  Tensor convolved =
      empty_image(x, weight.size(0), x.size(2), x.size(3), stored_type(type), MemoryFormat::ChannelsLast);
  pconv_into(partial, weight, convolved, false);
  Tensor target = torch::stable::narrow(y, 1, 0, weight.size(0));
  torch::stable::copy_(target, cast(convolved, type));
  return y;
}

void pconv3x3_(Tensor x, Tensor weight) {
  check_pconv(x, weight);
  for (int d = 0; d < 4; ++d) {
    STD_TORCH_CHECK(x.size(d) <= 1 || x.stride(d) > 0,
                    "fasternet_kernels: x overlaps itself, it cannot be written in place");
  }
  if (x.numel() == 0) return;
  if (x.scalar_type() == weight.scalar_type() && x.scalar_type() != ScalarType::Half) {
    pconv_into(x, weight, x, false);
    return;
  }
  Tensor target = torch::stable::narrow(x, 1, 0, weight.size(0));
  torch::stable::copy_(target, pconv3x3(target, weight, false));
}

// ---- PConv + pointwise ----------------------------------------------------------------------------------------------

Tensor run_pconv_pw(const Tensor& x, ScalarType weight_type, const Tensor& packed, int64_t c_partial, int64_t c_out,
                    const std::string& act, bool fast) {
  const Pixels in(operand(x, weight_type));
  const ScalarType type = in.tensor.scalar_type();
  Tensor y = empty_image(x, c_out, x.size(2), x.size(3), type, MemoryFormat::ChannelsLast);
  fasternet::pconv_pw(
      {dtype_of(type), x.size(0), x.size(1), x.size(2), x.size(3), c_partial, c_out, in.data(), in.stride,
       y.mutable_data_ptr(), c_out, packed.const_data_ptr(), fasternet::parse_act(act), fast},
      torch_threads());
  return finish(y, weight_type, format_of(x));
}

Tensor pconv_pw(Tensor x, Tensor w_partial, Tensor w_pw, OptionalTensor scale, OptionalTensor shift, std::string act,
                bool fast) {
  check_pconv(x, w_partial);
  check_size(w_pw, "w_pw", {w_pw.size(0), x.size(1), 1, 1});
  fast = fast && fast_tier(x, w_partial);
  const Tensor packed = pack({w_partial, w_pw}, {std::nullopt, scale}, {std::nullopt, shift}, fast);
  return run_pconv_pw(x, w_pw.scalar_type(), packed, w_partial.size(0), w_pw.size(0), act, fast);
}

Tensor pconv_pw_packed(Tensor x, Tensor packed, int64_t c_partial, int64_t c_out, std::string act, bool fast) {
  check_image(x);
  check_c_partial(c_partial, x);
  fast &= check_pack(packed, x, {{3 * c_partial, 3 * c_partial}, {c_out, x.size(1)}}, c_partial);
  return run_pconv_pw(x, x.scalar_type(), packed, c_partial, c_out, act, fast);
}

// ---- Block ----------------------------------------------------------------------------------------------------------

// The convolutions take x in the weights' type, the residual is x as it came, and the output has the wider of the two
// types.
Tensor run_block(const Tensor& x, ScalarType weight_type, const Tensor& packed, int64_t c_partial, int64_t c_hidden,
                 const OptionalTensor& sample_scale, const std::string& act, bool fast) {
  const bool mixed = x.scalar_type() != weight_type;
  const Pixels in(operand(x, weight_type));
  const ScalarType type = in.tensor.scalar_type();
  check_size(sample_scale, "sample_scale", {x.size(0)});
  const OptionalTensor factors = dense(sample_scale, compute_type(type));
  // Beside bfloat16 operands the kernel also takes a float32 residual; else both have one type.
  const ScalarType residual_type = mixed && type == ScalarType::BFloat16 ? ScalarType::Float : type;
  const Pixels residual = mixed ? Pixels(cast(x, residual_type)) : in;
  Tensor y = empty_image(x, x.size(1), x.size(2), x.size(3), residual_type, MemoryFormat::ChannelsLast);
  fasternet::block(
      {dtype_of(type), dtype_of(residual_type), x.size(0), x.size(1), x.size(2), x.size(3), c_partial, c_hidden,
       in.data(), in.stride, residual.data(), residual.stride, y.mutable_data_ptr(), x.size(1), packed.const_data_ptr(),
       factors ? factors->const_data_ptr() : nullptr, fasternet::parse_act(act), fast},
      torch_threads());
  return finish(y, wider_type(x.scalar_type(), weight_type), format_of(x));
}

Tensor block(Tensor x, Tensor w_partial, Tensor w_pw1, Tensor w_pw2, OptionalTensor scale, OptionalTensor shift,
             OptionalTensor layer_scale, OptionalTensor sample_scale, std::string act, bool fast) {
  check_pconv(x, w_partial);
  const int64_t channels = x.size(1), c_hidden = w_pw1.size(0);
  check_size(w_pw1, "w_pw1", {c_hidden, channels, 1, 1});
  check_size(w_pw2, "w_pw2", {channels, c_hidden, 1, 1});
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double || w_pw1.scalar_type() == ScalarType::Double,
                  "fasternet_kernels: a float64 x needs float64 weights, or its residual would be rounded");
  fast = fast && fast_tier(x, w_partial);
  const Tensor packed =
      pack({w_partial, w_pw1, w_pw2}, {std::nullopt, scale, layer_scale}, {std::nullopt, shift, std::nullopt}, fast);
  return run_block(x, w_pw1.scalar_type(), packed, w_partial.size(0), c_hidden, sample_scale, act, fast);
}

Tensor block_packed(Tensor x, Tensor packed, int64_t c_partial, int64_t c_hidden, OptionalTensor sample_scale,
                    std::string act, bool fast) {
  check_image(x);
  check_c_partial(c_partial, x);
  const int64_t channels = x.size(1);
  fast &=
      check_pack(packed, x, {{3 * c_partial, 3 * c_partial}, {c_hidden, channels}, {channels, c_hidden}}, c_partial);
  return run_block(x, x.scalar_type(), packed, c_partial, c_hidden, sample_scale, act, fast);
}

// ---- Patch convolution ----------------------------------------------------------------------------------------------

// The arguments of a patch convolution of x, and y, which it writes: dense channels-last memory.
struct PatchCall {
  Tensor x, y;
  fasternet::PatchConv args;
  PatchCall(const Tensor& image, ScalarType weight_type, const Tensor& packed, int64_t c_out, int64_t kh, int64_t kw)
      : x(operand(image, weight_type)),
        y(empty_image(x, c_out, x.size(2) / kh, x.size(3) / kw, x.scalar_type(), MemoryFormat::ChannelsLast)),
        args() {
    args.dtype = dtype_of(x.scalar_type());
    args.batch = x.size(0);
    args.channels = x.size(1);
    args.height = x.size(2);
    args.width = x.size(3);
    args.c_out = c_out;
    args.kh = kh;
    args.kw = kw;
    args.x = x.const_data_ptr();
    for (int d = 0; d < 4; ++d) args.x_stride[d] = x.stride(d);
    args.y = y.mutable_data_ptr();
    args.y_pixel_stride = c_out;
    args.packed = packed.const_data_ptr();
  }
};

void check_patch_weight(const Tensor& x, const Tensor& weight) {
  check_image(x);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.numel() > 0 && weight.size(1) == x.size(1),
                  "fasternet_kernels: weight does not fit x, expected (C_out, ", x.size(1), ", kh, kw)");
}

Tensor run_patch_conv(const Tensor& image, ScalarType weight_type, const Tensor& packed, int64_t c_out, int64_t kh,
                      int64_t kw, bool channels_last) {
  const PatchCall call(image, weight_type, packed, c_out, kh, kw);
  fasternet::patch_conv(call.args, torch_threads());
  return finish(call.y, weight_type, channels_last ? MemoryFormat::ChannelsLast : format_of(image));
}

Tensor patch_conv(Tensor x, Tensor weight, OptionalTensor scale, OptionalTensor shift, bool channels_last) {
  check_patch_weight(x, weight);
  const Tensor packed = pack({weight}, {scale}, {shift}, false);
  return run_patch_conv(x, weight.scalar_type(), packed, weight.size(0), weight.size(2), weight.size(3), channels_last);
}

Tensor patch_conv_packed(Tensor x, Tensor packed, int64_t c_out, int64_t kh, int64_t kw, bool channels_last) {
  check_image(x);
  STD_TORCH_CHECK(kh >= 1 && kw >= 1, "fasternet_kernels: kh and kw must be at least 1");
  check_pack(packed, x, {{c_out, x.size(1) * kh * kw}});
  return run_patch_conv(x, x.scalar_type(), packed, c_out, kh, kw, channels_last);
}

// ---- Head -----------------------------------------------------------------------------------------------------------

Tensor run_head(const Tensor& image, ScalarType weight_type, const Tensor& packed, int64_t c_mid, int64_t c_out,
                const std::string& act) {
  const Tensor x = operand(image, weight_type);
  STD_TORCH_CHECK(x.size(2) > 0 && x.size(3) > 0, "fasternet_kernels: x has no pixels to pool");
  const Pixels in(x);
  const int64_t size[2] = {x.size(0), c_out};
  Tensor y = torch::stable::empty({size, 2}, x.scalar_type(), std::nullopt, x.device());
  fasternet::head({dtype_of(x.scalar_type()), x.size(0), x.size(1), x.size(2), x.size(3), c_mid, c_out, in.data(),
                   in.stride, y.mutable_data_ptr(), packed.const_data_ptr(), fasternet::parse_act(act)},
                  torch_threads());
  return cast(y, weight_type);
}

Tensor head(Tensor x, Tensor w_conv, OptionalTensor b_conv, Tensor w_fc, OptionalTensor b_fc, std::string act) {
  check_image(x);
  STD_TORCH_CHECK(w_conv.dim() == 4 && w_fc.dim() == 2, "fasternet_kernels: w_conv or w_fc has the wrong rank");
  check_size(w_conv, "w_conv", {w_conv.size(0), x.size(1), 1, 1});
  check_size(w_fc, "w_fc", {w_fc.size(0), w_conv.size(0)});
  const Tensor packed = pack({w_conv, w_fc}, {std::nullopt, std::nullopt}, {b_conv, b_fc}, false);
  return run_head(x, w_conv.scalar_type(), packed, w_conv.size(0), w_fc.size(0), act);
}

Tensor head_packed(Tensor x, Tensor packed, int64_t c_mid, int64_t c_out, std::string act) {
  check_image(x);
  check_pack(packed, x, {{c_mid, x.size(1)}, {c_out, c_mid}});
  return run_head(x, x.scalar_type(), packed, c_mid, c_out, act);
}

// ---- Network --------------------------------------------------------------------------------------------------------

// plan: five integers a step, (kind, a, b, c, act) of fasternet::NetworkStep; packs: one a step that has weights.
std::vector<Tensor> network(Tensor x, std::vector<Tensor> packs, std::vector<int64_t> plan, bool fast) {
  using Kind = fasternet::NetworkStep::Kind;
  check_image(x);
  STD_TORCH_CHECK(plan.size() % 5 == 0, "fasternet_kernels: plan has ", plan.size(), " integers, expected 5 a step");
  const Tensor in = cast(x, stored_type(x.scalar_type()));
  fasternet::Network args = {};
  args.dtype = dtype_of(in.scalar_type());
  args.batch = in.size(0);
  args.channels = in.size(1);
  args.height = in.size(2);
  args.width = in.size(3);
  args.x = in.const_data_ptr();
  for (int d = 0; d < 4; ++d) args.x_stride[d] = in.stride(d);
  std::vector<fasternet::NetworkStep> steps;
  size_t next_pack = 0;
  int64_t channels = args.channels;
  for (size_t i = 0; i < plan.size(); i += 5) {
    STD_TORCH_CHECK(plan[i + 4] >= 0 && plan[i + 4] <= 5, "fasternet_kernels: plan has an unknown activation");
    const Kind kind = static_cast<Kind>(plan[i]);
    const auto step_act = static_cast<fasternet::Act>(plan[i + 4]);
    fasternet::NetworkStep step = {kind, plan[i + 1], plan[i + 2], plan[i + 3], step_act, nullptr, false};
    if (step.kind != Kind::kEmit) {
      STD_TORCH_CHECK(next_pack < packs.size(), "fasternet_kernels: plan needs more packs than the ", packs.size(),
                      " given");
      const Tensor& packed = packs[next_pack++];
      if (step.kind == Kind::kPatchConv) {
        check_pack(packed, in, {{step.a, channels * step.b * step.c}});
        channels = step.a;
      } else if (step.kind == Kind::kBlock) {
        const bool has_fast =
            check_pack(packed, in, {{3 * step.a, 3 * step.a}, {step.b, channels}, {channels, step.b}}, step.a);
        step.fast = fast && has_fast;
      } else {
        check_pack(packed, in, {{step.a, channels}, {step.b, step.a}});
        channels = step.b;
      }
      step.packed = packed.const_data_ptr();
    }
    steps.push_back(step);
  }
  STD_TORCH_CHECK(next_pack == packs.size(), "fasternet_kernels: plan uses ", next_pack, " packs, ", packs.size(),
                  " given");
  args.steps = steps.data();
  args.n_steps = static_cast<int64_t>(steps.size());
  std::vector<Tensor> outputs;
  std::vector<void*> data;
  for (const fasternet::FeatureShape& shape : fasternet::network_outputs(args)) {
    if (shape.height < 0) {
      const int64_t size[2] = {in.size(0), shape.channels};
      outputs.push_back(torch::stable::empty({size, 2}, in.scalar_type(), std::nullopt, in.device()));
    } else {
      outputs.push_back(
          empty_image(in, shape.channels, shape.height, shape.width, in.scalar_type(), MemoryFormat::ChannelsLast));
    }
    data.push_back(outputs.back().mutable_data_ptr());
  }
  fasternet::network(args, data.data(), torch_threads());
  for (Tensor& output : outputs) {
    output =
        output.dim() == 4 ? finish(output, x.scalar_type(), MemoryFormat::ChannelsLast) : cast(output, x.scalar_type());
  }
  return outputs;
}

// ---- Training -------------------------------------------------------------------------------------------------------

// Which gradients are wanted, and an empty tensor of the incoming one's type for each that is not.
Tensor no_gradient(const Tensor& grad) {
  const int64_t none = 0;
  return torch::stable::empty({&none, 1}, grad.scalar_type(), std::nullopt, grad.device());
}
Tensor empty_like(const Tensor& t, ScalarType type) {
  return torch::stable::empty(t.sizes(), type, std::nullopt, t.device());
}
// A tensor for the kernel to write, or none; and the pointer it takes.
OptionalTensor wanted(bool want, const Tensor& like, ScalarType type) {
  return want ? OptionalTensor(empty_like(like, type)) : std::nullopt;
}
OptionalTensor wanted(bool want, const ConvWeight& kernel, ScalarType type) {
  if (!want) return std::nullopt;
  return torch::stable::empty(kernel.tensor.sizes(), type, std::nullopt, kernel.tensor.device(), std::nullopt,
                              kernel.format);
}
void* pointer(const OptionalTensor& t) { return t ? t->mutable_data_ptr() : nullptr; }
const void* const_pointer(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
// The gradient of a parameter as the op returns it.
Tensor gradient(const OptionalTensor& t, ScalarType type, const Tensor& grad) {
  return t ? cast(*t, type) : no_gradient(grad);
}
void check_mask(const std::vector<bool>& mask, size_t size) {
  STD_TORCH_CHECK(mask.size() == size, "fasternet_kernels: output_mask has ", mask.size(), " entries, expected ", size);
}
Tensor filled(int64_t size, double value, const Tensor& like, ScalarType type) {
  Tensor t = torch::stable::empty({&size, 1}, type, std::nullopt, like.device());
  return torch::stable::fill_(t, value);
}

// The batch norm's vectors in the compute type.
struct NormVectors {
  Tensor mean, scale, shift;
  NormVectors(const Tensor& mean_, const Tensor& scale_, const Tensor& shift_, int64_t channels, ScalarType type)
      : mean(dense(mean_, type)), scale(dense(scale_, type)), shift(dense(shift_, type)) {
    check_size(mean, "mean", {channels});
    check_size(scale, "scale", {channels});
    check_size(shift, "shift", {channels});
  }
};

// The statistics of z as stored: of float16 values, which the kernel has not seen. z is dense channels-last float.
void statistics_of(const Tensor& z, const Tensor& mean, const Tensor& m2) {
  const int64_t channels = z.size(1), pixels = z.numel() / channels;
  if (pixels == 0) return;
  const float* const values = static_cast<const float*>(z.const_data_ptr());
  std::vector<double> centre(channels), squares(channels);
  for (int64_t i = 0; i < pixels * channels; ++i) centre[i % channels] += values[i];
  for (double& c : centre) c /= static_cast<double>(pixels);
  for (int64_t i = 0; i < pixels * channels; ++i) {
    const double off = values[i] - centre[i % channels];
    squares[i % channels] += off * off;
  }
  for (int64_t c = 0; c < channels; ++c) {
    static_cast<float*>(mean.mutable_data_ptr())[c] = static_cast<float>(centre[c]);
    static_cast<float*>(m2.mutable_data_ptr())[c] = static_cast<float>(squares[c]);
  }
}

// What a kernel returned of z, which it stored in another type where the weights are float16, and its statistics.
std::tuple<Tensor, Tensor, Tensor> with_statistics(const Tensor& z, const Tensor& mean, const Tensor& m2,
                                                   ScalarType type, MemoryFormat format) {
  if (type != ScalarType::Half) return {finish(z, type, format), mean, m2};
  const Tensor stored = cast(z, type);
  statistics_of(cast(stored, z.scalar_type()), mean, m2);
  return {finish(stored, type, format), mean, m2};
}

std::tuple<Tensor, Tensor, Tensor> pw_stats(Tensor x, Tensor w_partial, Tensor w_pw) {
  check_pconv(x, w_partial);
  const int64_t c_out = w_pw.size(0);
  check_size(w_pw, "w_pw", {c_out, x.size(1), 1, 1});
  const ScalarType weight_type = w_pw.scalar_type();
  const Pixels in(operand(x, weight_type));
  const ScalarType type = in.tensor.scalar_type();
  const ConvWeight partial(w_partial, type), pw(w_pw, type);
  Tensor z = empty_image(x, c_out, x.size(2), x.size(3), type, MemoryFormat::ChannelsLast);
  Tensor mean = filled(c_out, 0, x, compute_type(type)), m2 = filled(c_out, 0, x, compute_type(type));
  fasternet::pw_stats({dtype_of(type), x.size(0), x.size(1), x.size(2), x.size(3), w_partial.size(0), c_out, in.data(),
                       in.stride, partial.data(), pw.data(), z.mutable_data_ptr(), mean.mutable_data_ptr(),
                       m2.mutable_data_ptr(), partial.channels_last()},
                      torch_threads());
  return with_statistics(z, mean, m2, weight_type, format_of(x));
}

std::tuple<Tensor, Tensor, Tensor> pw_stats_backward(Tensor dz, Tensor dmean, Tensor dm2, Tensor x, Tensor z,
                                                     Tensor mean, Tensor w_partial, Tensor w_pw,
                                                     std::vector<bool> output_mask, OptionalTensor dy) {
  check_pconv(x, w_partial);
  check_mask(output_mask, 3);
  const int64_t c_out = w_pw.size(0), c_partial = w_partial.size(0);
  check_size(w_pw, "w_pw", {c_out, x.size(1), 1, 1});
  check_size(z, "z", {x.size(0), c_out, x.size(2), x.size(3)});
  check_size(dz, "dz", {x.size(0), c_out, x.size(2), x.size(3)});
  check_size(dy, "dy", {x.size(0), x.size(1), x.size(2), x.size(3)});
  check_size(dmean, "dmean", {c_out});
  check_size(dm2, "dm2", {c_out});
  check_size(mean, "mean", {c_out});
  const ScalarType weight_type = w_pw.scalar_type();
  const Pixels in(operand(x, weight_type));
  const ScalarType type = in.tensor.scalar_type(), compute = compute_type(type);
  const Pixels gradient_of_z(operand(dz, weight_type)), hidden(operand(z, weight_type));
  // Beside bfloat16 weights the gradient of the residual may be wider: it is then added afterwards.
  const bool fuse_dy = dy && dy->scalar_type() == x.scalar_type() && stored_type(x.scalar_type()) == type;
  const std::optional<Pixels> residual =
      fuse_dy ? std::optional<Pixels>(Pixels(cast(*dy, type))) : std::optional<Pixels>();
  const ConvWeight partial(w_partial, type), pw(w_pw, type);
  const Tensor centre = dense(mean, compute), mean_grad = dense(dmean, compute), m2_grad = dense(dm2, compute);
  OptionalTensor dx;
  if (output_mask[0]) dx = empty_image(x, x.size(1), x.size(2), x.size(3), type, MemoryFormat::ChannelsLast);
  const OptionalTensor dw_partial = wanted(output_mask[1], partial, type), dw_pw = wanted(output_mask[2], pw, type);
  fasternet::PwStatsBackward args = {};
  args.dtype = dtype_of(type);
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.height = x.size(2);
  args.width = x.size(3);
  args.c_partial = c_partial;
  args.c_out = c_out;
  args.dz = gradient_of_z.data();
  args.dz_pixel_stride = gradient_of_z.stride;
  args.dmean = mean_grad.const_data_ptr();
  args.dm2 = m2_grad.const_data_ptr();
  args.x = in.data();
  args.x_pixel_stride = in.stride;
  args.z = hidden.data();
  args.z_pixel_stride = hidden.stride;
  args.mean = centre.const_data_ptr();
  args.w_partial = partial.data();
  args.w_partial_channels_last = partial.channels_last();
  args.w_pw = pw.data();
  if (residual) {
    args.dy = residual->data();
    args.dy_pixel_stride = residual->stride;
  }
  args.dx = pointer(dx);
  args.dw_partial = pointer(dw_partial);
  args.dw_pw = pointer(dw_pw);
  fasternet::pw_stats_backward(args, torch_threads());
  if (dx && dy && !fuse_dy) dx = torch::stable::subtract(cast(*dx, dy->scalar_type()), *dy, -1.0);
  return {dx ? finish(*dx, x.scalar_type(), format_of(x)) : no_gradient(dz),
          gradient(dw_partial, w_partial.scalar_type(), dz), gradient(dw_pw, weight_type, dz)};
}

Tensor bn_act(Tensor z, Tensor mean, Tensor scale, Tensor shift, std::string act) {
  check_image(z);
  const Pixels in(operand(z, z.scalar_type()));
  const ScalarType type = in.tensor.scalar_type();
  const NormVectors norm(mean, scale, shift, z.size(1), compute_type(type));
  Tensor y = empty_image(z, z.size(1), z.size(2), z.size(3), type, MemoryFormat::ChannelsLast);
  fasternet::bn_act(
      {dtype_of(type), z.size(0) * z.size(2) * z.size(3), z.size(1), in.data(), in.stride, norm.mean.const_data_ptr(),
       norm.scale.const_data_ptr(), norm.shift.const_data_ptr(), fasternet::parse_act(act), y.mutable_data_ptr()},
      torch_threads());
  return finish(y, z.scalar_type(), format_of(z));
}

Tensor act_pw_residual(Tensor x, Tensor z, Tensor mean, Tensor scale, Tensor shift, Tensor w_pw2,
                       OptionalTensor layer_scale, OptionalTensor sample_scale, std::string act) {
  check_image(x);
  const int64_t channels = x.size(1), c_hidden = w_pw2.size(1);
  check_size(w_pw2, "w_pw2", {channels, c_hidden, 1, 1});
  check_size(z, "z", {x.size(0), c_hidden, x.size(2), x.size(3)});
  check_size(layer_scale, "layer_scale", {channels});
  check_size(sample_scale, "sample_scale", {x.size(0)});
  const Pixels hidden(operand(z, z.scalar_type()));
  const ScalarType type = hidden.tensor.scalar_type(), compute = compute_type(type);
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double || type == ScalarType::Double,
                  "fasternet_kernels: a float64 x needs a float64 z, or its residual would be rounded");
  const ScalarType result_type = wider_type(x.scalar_type(), z.scalar_type());
  // Beside bfloat16 operands the kernel also takes a float32 residual; else both have one type.
  const ScalarType residual_type = type == ScalarType::BFloat16 && x.scalar_type() != type ? ScalarType::Float : type;
  const Pixels residual(cast(x, residual_type));
  const NormVectors norm(mean, scale, shift, c_hidden, compute);
  const ConvWeight weight(w_pw2, type);
  const OptionalTensor layer = dense(layer_scale, compute), sample = dense(sample_scale, compute);
  Tensor y = empty_image(x, channels, x.size(2), x.size(3), residual_type, MemoryFormat::ChannelsLast);
  fasternet::act_pw_residual(
      {dtype_of(type), dtype_of(residual_type), x.size(0), channels, x.size(2), x.size(3), c_hidden, residual.data(),
       residual.stride, hidden.data(), hidden.stride, norm.mean.const_data_ptr(), norm.scale.const_data_ptr(),
       norm.shift.const_data_ptr(), weight.data(), const_pointer(layer), const_pointer(sample),
       fasternet::parse_act(act), y.mutable_data_ptr()},
      torch_threads());
  return finish(y, result_type, format_of(x));
}

// Of bn_act where w_pw2 is absent.
struct ActGradients {
  Tensor dz, dmean, dscale, dshift, dw_pw2, dlayer_scale, dsample_scale;
};
ActGradients act_gradients(const Tensor& grad, const Tensor& z, const Tensor& mean, const Tensor& scale,
                           const Tensor& shift, const OptionalTensor& w_pw2, const OptionalTensor& layer_scale,
                           const OptionalTensor& sample_scale, const std::string& act, const std::vector<bool>& mask) {
  check_image(z);
  const int64_t c_hidden = z.size(1), channels = w_pw2 ? w_pw2->size(0) : c_hidden;
  check_size(w_pw2, "w_pw2", {channels, c_hidden, 1, 1});
  check_size(grad, "grad", {z.size(0), channels, z.size(2), z.size(3)});
  check_size(layer_scale, "layer_scale", {channels});
  check_size(sample_scale, "sample_scale", {z.size(0)});
  const Pixels hidden(operand(z, z.scalar_type())), incoming(operand(grad, z.scalar_type()));
  const ScalarType type = hidden.tensor.scalar_type(), compute = compute_type(type);
  const NormVectors norm(mean, scale, shift, c_hidden, compute);
  const std::optional<ConvWeight> weight = w_pw2 ? std::optional<ConvWeight>(ConvWeight(*w_pw2, type)) : std::nullopt;
  const OptionalTensor layer = dense(layer_scale, compute), sample = dense(sample_scale, compute);
  OptionalTensor dz;
  if (mask[0]) dz = empty_image(z, c_hidden, z.size(2), z.size(3), type, MemoryFormat::ChannelsLast);
  const OptionalTensor dmean = wanted(mask[1], norm.mean, compute), dscale = wanted(mask[2], norm.scale, compute),
                       dshift = wanted(mask[3], norm.shift, compute);
  OptionalTensor dw, dlayer, dsample;
  if (mask[4]) dw = wanted(true, *weight, type);
  if (mask[5]) dlayer = empty_like(*layer, compute);
  if (mask[6]) dsample = empty_like(*sample, compute);
  fasternet::ActPwResidualBackward args = {};
  args.dtype = dtype_of(type);
  args.batch = z.size(0);
  args.channels = channels;
  args.height = z.size(2);
  args.width = z.size(3);
  args.c_hidden = c_hidden;
  args.grad = incoming.data();
  args.grad_pixel_stride = incoming.stride;
  args.z = hidden.data();
  args.z_pixel_stride = hidden.stride;
  args.mean = norm.mean.const_data_ptr();
  args.scale = norm.scale.const_data_ptr();
  args.shift = norm.shift.const_data_ptr();
  args.w_pw2 = weight ? weight->data() : nullptr;
  args.layer_scale = const_pointer(layer);
  args.sample_scale = const_pointer(sample);
  args.act = fasternet::parse_act(act);
  args.dz = pointer(dz);
  args.dmean = pointer(dmean);
  args.dscale = pointer(dscale);
  args.dshift = pointer(dshift);
  args.dw_pw2 = pointer(dw);
  args.dlayer_scale = pointer(dlayer);
  args.dsample_scale = pointer(dsample);
  fasternet::act_pw_residual_backward(args, torch_threads());
  const auto type_of = [&](const OptionalTensor& t) { return t ? t->scalar_type() : compute; };
  return {dz ? finish(*dz, z.scalar_type(), format_of(z)) : no_gradient(grad),
          gradient(dmean, mean.scalar_type(), grad),
          gradient(dscale, scale.scalar_type(), grad),
          gradient(dshift, shift.scalar_type(), grad),
          gradient(dw, type_of(w_pw2), grad),
          gradient(dlayer, type_of(layer_scale), grad),
          gradient(dsample, type_of(sample_scale), grad)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(Tensor grad, Tensor z, Tensor mean, Tensor scale,
                                                           Tensor shift, std::string act,
                                                           std::vector<bool> output_mask) {
  check_mask(output_mask, 4);
  output_mask.resize(7, false);
  const ActGradients g =
      act_gradients(grad, z, mean, scale, shift, std::nullopt, std::nullopt, std::nullopt, act, output_mask);
  return {g.dz, g.dmean, g.dscale, g.dshift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> act_pw_residual_backward(
    Tensor grad, Tensor z, Tensor mean, Tensor scale, Tensor shift, Tensor w_pw2, OptionalTensor layer_scale,
    OptionalTensor sample_scale, std::string act, std::vector<bool> output_mask) {
  check_mask(output_mask, 7);
  const ActGradients g = act_gradients(grad, z, mean, scale, shift, w_pw2, layer_scale, sample_scale, act, output_mask);
  return {g.dz, g.dmean, g.dscale, g.dshift, g.dw_pw2, g.dlayer_scale, g.dsample_scale};
}

// ---- Gradients of the inference operators ---------------------------------------------------------------------------

std::tuple<Tensor, Tensor> pconv3x3_backward(Tensor grad, Tensor x_partial, Tensor weight,
                                             std::vector<bool> output_mask) {
  check_pconv(grad, weight);
  check_mask(output_mask, 2);
  const int64_t c_partial = weight.size(0);
  check_size(x_partial, "x_partial", {grad.size(0), c_partial, grad.size(2), grad.size(3)});
  const ScalarType weight_type = weight.scalar_type(), type = stored_type(weight_type);
  // Autocast or float16: the convolved channels alone go through the kernel.
  const bool all = grad.scalar_type() == type;
  const Pixels incoming(all ? grad : operand(torch::stable::narrow(grad, 1, 0, c_partial), weight_type));
  const Pixels x(operand(x_partial, weight_type));
  const ConvWeight w(weight, type);
  OptionalTensor dx;
  if (output_mask[0]) {
    dx =
        empty_image(grad, all ? grad.size(1) : c_partial, grad.size(2), grad.size(3), type, MemoryFormat::ChannelsLast);
  }
  const OptionalTensor dw = wanted(output_mask[1], w, type);
  fasternet::pconv3x3_backward(
      {dtype_of(type), grad.size(0), all ? grad.size(1) : c_partial, grad.size(2), grad.size(3), c_partial,
       incoming.data(), incoming.stride, x.data(), x.stride, w.data(), pointer(dx), pointer(dw), w.channels_last()},
      torch_threads());
  Tensor dx_result = no_gradient(grad);
  if (dx && all) dx_result = finish(*dx, type, format_of(grad));
  if (dx && !all) {
    dx_result = empty_image(grad, grad.size(1), grad.size(2), grad.size(3), grad.scalar_type(), format_of(grad));
    torch::stable::copy_(dx_result, grad);
    Tensor target = torch::stable::narrow(dx_result, 1, 0, c_partial);
    torch::stable::copy_(target, cast(*dx, weight_type));
  }
  return {dx_result, gradient(dw, weight_type, grad)};
}

// With running statistics the batch norm is (z - 0) * scale + shift: z is computed again, then the two halves of
// training follow, without gradients of the statistics.
struct FrozenNorm {
  Tensor zero, scale, shift;
  FrozenNorm(const OptionalTensor& scale_, const OptionalTensor& shift_, const Tensor& w)
      : zero(filled(w.size(0), 0, w, compute_type(w.scalar_type()))),
        scale(scale_ ? *scale_ : filled(w.size(0), 1, w, compute_type(w.scalar_type()))),
        shift(shift_ ? *shift_ : zero) {}
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> pconv_pw_backward(Tensor grad, Tensor x, Tensor w_partial,
                                                                     Tensor w_pw, OptionalTensor scale,
                                                                     OptionalTensor shift, std::string act,
                                                                     std::vector<bool> output_mask) {
  check_mask(output_mask, 5);
  const bool inner = output_mask[0] || output_mask[1] || output_mask[2];
  const Tensor z = std::get<0>(pw_stats(x, w_partial, w_pw));
  const FrozenNorm norm(scale, shift, w_pw);
  const ActGradients g =
      act_gradients(grad, z, norm.zero, norm.scale, norm.shift, std::nullopt, std::nullopt, std::nullopt, act,
                    {inner, false, output_mask[3], output_mask[4], false, false, false});
  Tensor dx = no_gradient(grad), dw_partial = dx, dw_pw = dx;
  if (inner) {
    std::tie(dx, dw_partial, dw_pw) = pw_stats_backward(g.dz, norm.zero, norm.zero, x, z, norm.zero, w_partial, w_pw,
                                                        {output_mask[0], output_mask[1], output_mask[2]}, std::nullopt);
  }
  return {output_mask[0] ? dx : no_gradient(grad), output_mask[1] ? dw_partial : no_gradient(grad),
          output_mask[2] ? dw_pw : no_gradient(grad), g.dscale, g.dshift};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> block_backward(
    Tensor grad, Tensor x, Tensor w_partial, Tensor w_pw1, Tensor w_pw2, OptionalTensor scale, OptionalTensor shift,
    OptionalTensor layer_scale, OptionalTensor sample_scale, std::string act, std::vector<bool> output_mask) {
  check_mask(output_mask, 8);
  const bool inner = output_mask[0] || output_mask[1] || output_mask[2];
  const Tensor z = std::get<0>(pw_stats(x, w_partial, w_pw1));
  const FrozenNorm norm(scale, shift, w_pw1);
  const ActGradients g =
      act_gradients(grad, z, norm.zero, norm.scale, norm.shift, w_pw2, layer_scale, sample_scale, act,
                    {inner, false, output_mask[4], output_mask[5], output_mask[3], output_mask[6], output_mask[7]});
  Tensor dx = no_gradient(grad), dw_partial = dx, dw_pw1 = dx;
  if (inner) {
    std::tie(dx, dw_partial, dw_pw1) = pw_stats_backward(g.dz, norm.zero, norm.zero, x, z, norm.zero, w_partial, w_pw1,
                                                         {output_mask[0], output_mask[1], output_mask[2]}, grad);
  }
  return {output_mask[0] ? dx : no_gradient(grad),
          output_mask[1] ? dw_partial : no_gradient(grad),
          output_mask[2] ? dw_pw1 : no_gradient(grad),
          g.dw_pw2,
          g.dscale,
          g.dshift,
          g.dlayer_scale,
          g.dsample_scale};
}

// The statistics of patch_stats with their gradients.
struct PatchStatistics {
  Pixels z;
  Tensor mean, dmean, dm2;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_gradients(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                           const OptionalTensor& scale, const OptionalTensor& shift,
                                                           const std::vector<bool>& mask,
                                                           const std::optional<PatchStatistics>& statistics) {
  check_patch_weight(x, weight);
  const int64_t c_out = weight.size(0), kh = weight.size(2), kw = weight.size(3);
  check_size(grad, "grad", {x.size(0), c_out, x.size(2) / kh, x.size(3) / kw});
  check_size(scale, "scale", {c_out});
  check_size(shift, "shift", {c_out});
  const Tensor in = operand(x, weight.scalar_type());
  const ScalarType type = in.scalar_type(), compute = compute_type(type);
  const Pixels incoming(operand(grad, weight.scalar_type()));
  const ConvWeight w(weight, type);
  const OptionalTensor factor = dense(scale, compute);
  OptionalTensor dx, dscale, dshift;
  if (mask[0]) dx = empty_image(x, x.size(1), x.size(2), x.size(3), type, MemoryFormat::ChannelsLast);
  const OptionalTensor dw = wanted(mask[1], w, type);
  if (mask[2]) dscale = empty_like(*scale, compute);
  if (mask[3]) dshift = empty_like(*shift, compute);
  fasternet::PatchConvBackward args = {};
  args.dtype = dtype_of(type);
  args.batch = in.size(0);
  args.channels = in.size(1);
  args.height = in.size(2);
  args.width = in.size(3);
  args.c_out = c_out;
  args.kh = kh;
  args.kw = kw;
  args.grad = incoming.data();
  args.grad_pixel_stride = incoming.stride;
  args.x = in.const_data_ptr();
  for (int d = 0; d < 4; ++d) args.x_stride[d] = in.stride(d);
  args.weight = w.data();
  args.weight_channels_last = w.channels_last();
  args.scale = const_pointer(factor);
  if (statistics) {
    args.y = statistics->z.data();
    args.y_pixel_stride = statistics->z.stride;
    args.mean = statistics->mean.const_data_ptr();
    args.dmean = statistics->dmean.const_data_ptr();
    args.dm2 = statistics->dm2.const_data_ptr();
  }
  args.dx = pointer(dx);
  args.dweight = pointer(dw);
  args.dscale = pointer(dscale);
  args.dshift = pointer(dshift);
  fasternet::patch_conv_backward(args, torch_threads());
  return {dx ? finish(*dx, x.scalar_type(), format_of(x)) : no_gradient(grad), gradient(dw, weight.scalar_type(), grad),
          gradient(dscale, scale ? scale->scalar_type() : compute, grad),
          gradient(dshift, shift ? shift->scalar_type() : compute, grad)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> patch_conv_backward(Tensor grad, Tensor x, Tensor weight,
                                                               OptionalTensor scale, OptionalTensor shift,
                                                               std::vector<bool> output_mask) {
  check_mask(output_mask, 4);
  return patch_gradients(grad, x, weight, scale, shift, output_mask, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> patch_stats(Tensor x, Tensor weight) {
  check_patch_weight(x, weight);
  const ScalarType weight_type = weight.scalar_type();
  const int64_t c_out = weight.size(0);
  const Tensor packed = pack({weight}, {std::nullopt}, {std::nullopt}, false);
  const PatchCall call(x, weight_type, packed, c_out, weight.size(2), weight.size(3));
  const ScalarType compute = compute_type(call.x.scalar_type());
  const Tensor mean = filled(c_out, 0, x, compute), m2 = filled(c_out, 0, x, compute);
  fasternet::patch_stats({call.args, mean.mutable_data_ptr(), m2.mutable_data_ptr()}, torch_threads());
  return with_statistics(call.y, mean, m2, weight_type, MemoryFormat::ChannelsLast);
}

std::tuple<Tensor, Tensor> patch_stats_backward(Tensor dz, Tensor dmean, Tensor dm2, Tensor x, Tensor z, Tensor mean,
                                                Tensor weight, std::vector<bool> output_mask) {
  check_patch_weight(x, weight);
  check_mask(output_mask, 2);
  const int64_t c_out = weight.size(0);
  check_size(z, "z", {x.size(0), c_out, x.size(2) / weight.size(2), x.size(3) / weight.size(3)});
  check_size(dmean, "dmean", {c_out});
  check_size(dm2, "dm2", {c_out});
  check_size(mean, "mean", {c_out});
  const ScalarType compute = compute_type(stored_type(weight.scalar_type()));
  const PatchStatistics statistics = {Pixels(operand(z, weight.scalar_type())), dense(mean, compute),
                                      dense(dmean, compute), dense(dm2, compute)};
  const auto [dx, dw, no_scale, no_shift] = patch_gradients(dz, x, weight, std::nullopt, std::nullopt,
                                                            {output_mask[0], output_mask[1], false, false}, statistics);
  return {dx, dw};
}

// ---- A layer of training as one op ----------------------------------------------------------------------------------

// f(T()) for the compute type T of t.
template <class F>
void with_compute_type(const Tensor& t, const F& f) {
  t.scalar_type() == ScalarType::Double ? f(double()) : f(float());
}
template <class T>
const T* elements(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// The batch norm of a layer: (z - mean) * scale + shift, scale = weight * invstd. Every vector in m2's type.
struct BatchNorm {
  double pixels;
  Tensor invstd, scale, shift;

  BatchNorm(const Tensor& z, const Tensor& m2, double eps, const OptionalTensor& weight, const OptionalTensor& bias)
      : pixels(static_cast<double>(std::max<int64_t>(z.size(0) * z.size(2) * z.size(3), 1))),
        invstd(empty_like(m2, m2.scalar_type())),
        scale(invstd),
        shift(bias ? dense(*bias, m2.scalar_type()) : filled(m2.size(0), 0, m2, m2.scalar_type())) {
    check_size(m2, "m2", {z.size(1)});
    check_size(weight, "weight", {z.size(1)});
    check_size(bias, "bias", {z.size(1)});
    const OptionalTensor factors = dense(weight, m2.scalar_type());
    if (factors) scale = empty_like(m2, m2.scalar_type());
    with_compute_type(m2, [&](auto zero) {
      using T = decltype(zero);
      const T *const sums = elements<T>(m2), *const factor = factors ? elements<T>(*factors) : nullptr;
      T *const to = static_cast<T*>(invstd.mutable_data_ptr()), *const scaled =
                                                                    static_cast<T*>(scale.mutable_data_ptr());
      for (int64_t c = 0, n = m2.numel(); c < n; ++c) {
        to[c] = static_cast<T>(1 / std::sqrt(static_cast<double>(sums[c]) / pixels + eps));
        if (factor) scaled[c] = to[c] * factor[c];
      }
    });
  }
  // The gradients of weight and of m2 from that of scale.
  void gradients(const Tensor& dscale, Tensor* dweight, Tensor* dm2) const {
    *dweight = empty_like(dscale, dscale.scalar_type());
    *dm2 = empty_like(dscale, dscale.scalar_type());
    with_compute_type(dscale, [&](auto zero) {
      using T = decltype(zero);
      const T *const from = elements<T>(dscale), *const inverse = elements<T>(invstd),
                     *const factor = elements<T>(scale);
      T *const to_weight = static_cast<T*>(dweight->mutable_data_ptr()), *const to_m2 =
                                                                             static_cast<T*>(dm2->mutable_data_ptr());
      const T share = static_cast<T>(-0.5 / pixels);
      for (int64_t c = 0, n = dscale.numel(); c < n; ++c) {
        to_weight[c] = from[c] * inverse[c];
        to_m2[c] = to_weight[c] * inverse[c] * factor[c] * share;
      }
    });
  }
};

void check_layer(const OptionalTensor& w_partial, const OptionalTensor& w_pw2) {
  STD_TORCH_CHECK(w_partial || !w_pw2, "fasternet_kernels: w_pw2 needs w_partial: a layer of patches has no residual");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_layer(Tensor x, OptionalTensor w_partial, Tensor w_conv,
                                                            OptionalTensor weight, OptionalTensor bias,
                                                            OptionalTensor w_pw2, OptionalTensor layer_scale,
                                                            OptionalTensor sample_scale, double eps, std::string act) {
  check_layer(w_partial, w_pw2);
  const auto [z, mean, m2] = w_partial ? pw_stats(x, *w_partial, w_conv) : patch_stats(x, w_conv);
  const BatchNorm norm(z, m2, eps, weight, bias);
  const Tensor y = w_pw2 ? act_pw_residual(x, z, mean, norm.scale, norm.shift, *w_pw2, layer_scale, sample_scale, act)
                         : bn_act(z, mean, norm.scale, norm.shift, act);
  return {y, z, mean, m2};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_layer_backward(
    Tensor grad, Tensor x, OptionalTensor w_partial, Tensor w_conv, OptionalTensor weight, OptionalTensor bias,
    OptionalTensor w_pw2, OptionalTensor layer_scale, OptionalTensor sample_scale, OptionalTensor kept_z, Tensor mean,
    Tensor m2, double eps, std::string act, std::vector<bool> output_mask) {
  check_mask(output_mask, 8);
  check_layer(w_partial, w_pw2);
  const OptionalTensor parameters[] = {w_partial, w_conv, weight, bias, w_pw2, layer_scale, sample_scale};
  for (size_t i = 0; i < 7; ++i) {
    STD_TORCH_CHECK(!output_mask[i + 1] || parameters[i], "fasternet_kernels: output_mask asks for entry ", i + 1,
                    ", a parameter that is not there");
  }
  const Tensor z = kept_z      ? *kept_z
                   : w_partial ? std::get<0>(pw_stats(x, *w_partial, w_conv))
                               : patch_conv(x, w_conv, std::nullopt, std::nullopt, true);
  check_image(z);
  const bool inner = output_mask[0] || output_mask[1] || output_mask[2];
  const bool sums = inner || output_mask[3] || output_mask[4];
  const BatchNorm norm(z, dense(m2, compute_type(m2.scalar_type())), eps, weight, bias);
  const ActGradients g = act_gradients(grad, z, mean, norm.scale, norm.shift, w_pw2, layer_scale, sample_scale, act,
                                       {inner, inner, sums, sums, output_mask[5], output_mask[6], output_mask[7]});
  Tensor dx = no_gradient(grad), dw_partial = dx, dw_conv = dx, dweight = dx, dm2 = dx;
  if (sums) norm.gradients(g.dscale, &dweight, &dm2);
  if (inner) {
    if (w_partial) {
      std::tie(dx, dw_partial, dw_conv) = pw_stats_backward(g.dz, g.dmean, dm2, x, z, mean, *w_partial, w_conv,
                                                            {output_mask[0], output_mask[1], output_mask[2]},
                                                            w_pw2 ? OptionalTensor(grad) : std::nullopt);
    } else {
      std::tie(dx, dw_conv) =
          patch_stats_backward(g.dz, g.dmean, dm2, x, z, mean, w_conv, {output_mask[0], output_mask[2]});
    }
  }
  return {output_mask[0] ? dx : no_gradient(grad),
          output_mask[1] ? dw_partial : no_gradient(grad),
          output_mask[2] ? dw_conv : no_gradient(grad),
          output_mask[3] ? cast(dweight, weight->scalar_type()) : no_gradient(grad),
          output_mask[4] ? cast(g.dshift, bias->scalar_type()) : no_gradient(grad),
          g.dw_pw2,
          g.dlayer_scale,
          g.dsample_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fasternet_kernels, CPU, m) {
  m.impl("pconv3x3", TORCH_BOX(&pconv3x3));
  m.impl("pconv3x3_", TORCH_BOX(&pconv3x3_));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("pconv_pw", TORCH_BOX(&pconv_pw));
  m.impl("pconv_pw_packed", TORCH_BOX(&pconv_pw_packed));
  m.impl("block", TORCH_BOX(&block));
  m.impl("block_packed", TORCH_BOX(&block_packed));
  m.impl("patch_conv", TORCH_BOX(&patch_conv));
  m.impl("patch_conv_packed", TORCH_BOX(&patch_conv_packed));
  m.impl("head", TORCH_BOX(&head));
  m.impl("head_packed", TORCH_BOX(&head_packed));
  m.impl("network", TORCH_BOX(&network));
  m.impl("pw_stats", TORCH_BOX(&pw_stats));
  m.impl("pw_stats_backward", TORCH_BOX(&pw_stats_backward));
  m.impl("bn_act", TORCH_BOX(&bn_act));
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward));
  m.impl("act_pw_residual", TORCH_BOX(&act_pw_residual));
  m.impl("act_pw_residual_backward", TORCH_BOX(&act_pw_residual_backward));
  m.impl("pconv3x3_backward", TORCH_BOX(&pconv3x3_backward));
  m.impl("pconv_pw_backward", TORCH_BOX(&pconv_pw_backward));
  m.impl("block_backward", TORCH_BOX(&block_backward));
  m.impl("patch_conv_backward", TORCH_BOX(&patch_conv_backward));
  m.impl("patch_stats", TORCH_BOX(&patch_stats));
  m.impl("patch_stats_backward", TORCH_BOX(&patch_stats_backward));
  m.impl("batch_norm_layer", TORCH_BOX(&batch_norm_layer));
  m.impl("batch_norm_layer_backward", TORCH_BOX(&batch_norm_layer_backward));
}

// What library.py asks once torch has loaded this library and registered its operators: whether they can run, and as
// what. Plain C, so that a failure is a message and not an exception.
#if defined(_WIN32)
#define FASTERNET_EXPORT extern "C" __declspec(dllexport)
#else
#define FASTERNET_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// "isa;available,...;compiler", or "!reason" where no instruction set can be selected: the next call then tries again.
FASTERNET_EXPORT const char* fasternet_kernels_build() {
  static thread_local std::string failure;
  try {
    static const std::string text = [] {
      std::string line = fasternet::isa_name(fasternet::selected_isa());
      line += ';';
      for (fasternet::Isa isa : fasternet::available_isas()) {
        if (line.back() != ';') line += ',';
        line += fasternet::isa_name(isa);
      }
      return line + ';' + fasternet::compiler();
    }();
    return text.c_str();
  } catch (const std::exception& error) {
    failure = std::string("!") + error.what();
    return failure.c_str();
  }
}
