// The Python module fasternet_runtime: the kernels of csrc on NumPy arrays, without torch.
//
// Each function checks its arguments once, here, while it holds the GIL, and fills a plain job of pointers and sizes;
// then it releases the GIL, packs the weights and runs the kernel. So nothing is allocated or written before all is
// checked.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#ifdef __linux__
#include <sched.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fasternet_cpu.h"
#include "thread_pool.h"
#include "unchanged.h"

// The version of the package; the build defines it.
#ifndef FASTERNET_KERNELS_VERSION
#define FASTERNET_KERNELS_VERSION "unknown"
#endif

namespace py = pybind11;

namespace fasternet {
namespace {

// ---- Threads --------------------------------------------------------------------------------------------------------

constexpr int kMaxThreads = 1024;

// One for each processor that this process may use.
int default_num_threads() {
  int processors = static_cast<int>(std::thread::hardware_concurrency());
#ifdef __linux__
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) processors = CPU_COUNT(&allowed);
#endif
  return std::clamp(processors, 1, kMaxThreads);
}

// One pool for the process. The object is never destroyed: workers are parked on it until the process ends.
struct Runtime {
  explicit Runtime(int num_threads) : num_threads(num_threads) {}

  std::atomic<int> num_threads;  // what a call uses that does not say otherwise
  std::mutex busy;               // held by the call that has the pool
  ThreadPool pool;
};
Runtime* runtime = new Runtime(default_num_threads());

// A child process has only the thread that forked; the parent's pool, and whatever state its locks were in, is left
// behind.
void forget_threads_after_fork() { runtime = new Runtime(runtime->num_threads); }

// Calls function(parallel) without the GIL. Of calls at the same time, one has the pool and the others run on their own
// thread alone: the machine is busy anyway, and the results have the same bits. num_threads is 0 for the process's.
template <class Function>
void run_without_gil(const Function& function, int num_threads = 0) {
  py::gil_scoped_release release;
  std::unique_lock<std::mutex> lock(runtime->busy, std::try_to_lock);
  if (!lock) return function(serial());
  function(runtime->pool.parallel(num_threads > 0 ? num_threads : runtime->num_threads.load()));
}

// A number of threads that a caller gave; complaints name it.
int thread_count(const char* name, const py::object& n) {
  if (!PyIndex_Check(n.ptr())) {
    throw py::type_error(std::string(name) + " is a " + Py_TYPE(n.ptr())->tp_name + ", expected an int");
  }
  const Py_ssize_t value = PyNumber_AsSsize_t(n.ptr(), nullptr);  // clips what does not fit
  if (value < 1 || value > kMaxThreads) {
    throw py::value_error(std::string(name) + " is " + std::string(py::str(n)) + ", expected 1 to " +
                          std::to_string(kMaxThreads));
  }
  return static_cast<int>(value);
}

void set_num_threads(const py::object& n) { runtime->num_threads = thread_count("set_num_threads: n", n); }

// ---- Arguments ------------------------------------------------------------------------------------------------------

// An array argument that has been checked: a view of the caller's memory, or a contiguous copy where the kernels could
// not read it in place. Strides are in elements; `array` keeps the memory alive.
struct Array {
  py::object array;  // null where data is: an empty py::array would be a NumPy array of its own
  const void* data = nullptr;
  std::vector<int64_t> shape, stride;

  int64_t size() const {
    int64_t n = 1;
    for (int64_t extent : shape) n *= extent;
    return n;
  }
};

std::string describe(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

// The door of one function: every complaint names the function and the argument, what came, and what was expected.
class Arguments {
 public:
  explicit Arguments(const char* function) : function_(function) {}

  DType dtype() const { return dtype_; }
  ssize_t element_size() const { return dtype_ == DType::kFloat64 ? 8 : 4; }

  // The images, (B, H, W, C). Their dtype decides that of all other arguments. Comes first.
  Array images(const char* name, const py::object& value) {
    require_array(name, value, "float32 or float64");
    const py::array array = py::reinterpret_borrow<py::array>(value);
    if (py::isinstance<py::array_t<float>>(array)) {
      dtype_ = DType::kFloat32;
    } else if (py::isinstance<py::array_t<double>>(array)) {
      dtype_ = DType::kFloat64;
    } else {
      throw type_error(name, "has dtype " + dtype_name(array), "float32 or float64 in native byte order");
    }
    const Array result = addressable(array) ? view_of(array) : contiguous(array);
    if (result.shape.size() != 4 || result.shape[3] == 0) {
      refuse_shape(name, result, "4 dimensions (B, H, W, C) with at least one channel");
    }
    return result;
  }

  // A convolution's weights, (N, C, kh, kw), contiguous. Where an extent is given as 0, any from 1 on will do.
  Array weight(const char* name, const py::object& value, const std::array<int64_t, 4>& expected, const char* wanted) {
    return parameter(name, value, {expected.begin(), expected.end()}, wanted);
  }

  // One value per channel, contiguous; None stays without data.
  Array vector(const char* name, const py::object& value, int64_t n, const char* wanted) {
    if (value.is_none()) return {};
    return parameter(name, value, {n}, wanted);
  }

  Array matrix(const char* name, const py::object& value, int64_t columns, const char* wanted) {
    return parameter(name, value, {0, columns}, wanted);
  }

  Array partial_weight(const char* name, const py::object& value, const Array& x) {
    const Array result = weight(name, value, {0, 0, 3, 3}, "(C_partial, C_partial, 3, 3)");
    if (result.shape[0] != result.shape[1]) refuse_shape(name, result, "(C_partial, C_partial, 3, 3)");
    if (result.shape[0] > x.shape[3]) {
      throw value_error(name, "has C_partial = " + std::to_string(result.shape[0]),
                        "at most the " + std::to_string(x.shape[3]) + " channels of x");
    }
    return result;
  }

  Act act(const char* name, const py::object& value) const {
    if (!py::isinstance<py::str>(value)) throw type_error(name, "is a " + type_name(value), "a str");
    const std::string text = py::cast<std::string>(value);
    try {
      return parse_act(text);
    } catch (const std::invalid_argument&) {
      throw value_error(name, "is '" + text + "'", "one of relu, gelu, gelu_tanh, silu, hardswish, identity");
    }
  }

  py::type_error type_error(const char* name, const std::string& came, const std::string& expected) const {
    return py::type_error(complaint(name, came, expected));
  }
  py::value_error value_error(const char* name, const std::string& came, const std::string& expected) const {
    return py::value_error(complaint(name, came, expected));
  }

  // True if the elements of `array` lie where the kernels can address them: aligned, and whole elements apart.
  bool addressable(const py::array& array) const {
    if (reinterpret_cast<uintptr_t>(array.data()) % static_cast<uintptr_t>(element_size()) != 0) return false;
    for (ssize_t i = 0; i < array.ndim(); ++i) {
      if (array.strides(i) % element_size() != 0) return false;
    }
    return true;
  }

  Array contiguous(const py::array& array) const {
    if ((array.flags() & py::array::c_style) && addressable(array)) return view_of(array);
    return view_of(array.attr("copy")("C").cast<py::array>());
  }

 private:
  static std::string type_name(const py::object& value) { return Py_TYPE(value.ptr())->tp_name; }
  static std::string dtype_name(const py::array& array) { return py::str(array.dtype()); }

  std::string complaint(const char* name, const std::string& came, const std::string& expected) const {
    return std::string(function_) + ": " + name + " " + came + ", expected " + expected;
  }

  void require_array(const char* name, const py::object& value, const char* dtypes) const {
    if (!py::isinstance<py::array>(value)) {
      throw type_error(name, "is a " + type_name(value), std::string("a NumPy array of ") + dtypes);
    }
  }

  [[noreturn]] void refuse_shape(const char* name, const Array& array, const std::string& wanted) const {
    throw value_error(name, "has shape " + describe(array.shape), wanted);
  }

  Array parameter(const char* name, const py::object& value, const std::vector<int64_t>& expected,
                  const char* wanted) const {
    const char* dtype = dtype_ == DType::kFloat64 ? "float64" : "float32";
    require_array(name, value, dtype);
    const py::array array = py::reinterpret_borrow<py::array>(value);
    const bool same = dtype_ == DType::kFloat64 ? py::isinstance<py::array_t<double>>(array)
                                                : py::isinstance<py::array_t<float>>(array);
    if (!same) throw type_error(name, "has dtype " + dtype_name(array), std::string(dtype) + ", the dtype of x");
    bool fits = array.ndim() == static_cast<ssize_t>(expected.size());
    for (size_t i = 0; fits && i < expected.size(); ++i) {
      const int64_t extent = array.shape(static_cast<ssize_t>(i));
      fits = expected[i] == 0 ? extent >= 1 : extent == expected[i];
    }
    if (!fits) {
      bool open = false;  // where an extent is the caller's choice, only the names in `wanted` can say it
      for (int64_t extent : expected) open |= extent == 0;
      refuse_shape(name, shape_of(array), std::string(wanted) + (open ? "" : " = " + describe(expected)));
    }
    return contiguous(array);
  }

  static Array shape_of(const py::array& array) {
    Array result;
    result.shape.assign(array.shape(), array.shape() + array.ndim());
    return result;
  }

  Array view_of(const py::array& array) const {
    Array result = shape_of(array);
    result.array = array;
    result.data = array.data();
    for (ssize_t i = 0; i < array.ndim(); ++i) result.stride.push_back(array.strides(i) / element_size());
    return result;
  }

  const char* function_;
  DType dtype_ = DType::kFloat32;
};

// The distance between the channel vectors of neighbouring pixels, or 0 if there is no such single distance. The stride
// of a dimension of extent 1 is never used and may be anything.
int64_t uniform_pixel_stride(const Array& x) {
  const int64_t batch = x.shape[0], height = x.shape[1], width = x.shape[2], channels = x.shape[3];
  if (x.size() == 0) return channels;
  if (channels > 1 && x.stride[3] != 1) return 0;
  const int64_t pixel = width > 1 ? x.stride[2] : height > 1 ? x.stride[1] : batch > 1 ? x.stride[0] : channels;
  const bool uniform =
      (height == 1 || x.stride[1] == width * pixel) && (batch == 1 || x.stride[0] == height * width * pixel);
  return uniform && pixel >= channels ? pixel : 0;
}

// Images whose pixels are evenly spaced, a contiguous copy if need be; and their spacing.
std::pair<Array, int64_t> channels_last(const Arguments& arguments, const Array& x) {
  const int64_t stride = uniform_pixel_stride(x);
  if (stride > 0) return {x, stride};
  return {arguments.contiguous(py::reinterpret_borrow<py::array>(x.array)), x.shape[3]};
}

// In the order the kernels want them: (batch, channel, height, width).
void copy_strides(const Array& x, int64_t* stride) {
  stride[0] = x.stride[0], stride[1] = x.stride[3], stride[2] = x.stride[1], stride[3] = x.stride[2];
}

// False only if no two indices share memory: each stride, from the smallest up, steps over all that the smaller ones
// reach. Views that interleave without sharing, which slicing does not make, are taken for overlapping ones.
bool overlaps_itself(const Array& x) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, extent
  for (size_t i = 0; i < x.shape.size(); ++i) {
    if (x.shape[i] == 0) return false;
    if (x.shape[i] > 1) dims.push_back({std::abs(x.stride[i]), x.shape[i]});
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;
  for (const auto& [stride, extent] : dims) {
    if (stride <= reach) return true;
    reach += stride * (extent - 1);
  }
  return false;
}

py::array new_array(DType dtype, const std::vector<int64_t>& shape) {
  if (dtype == DType::kFloat64) return py::array_t<double>(shape);
  return py::array_t<float>(shape);
}

// ---- Weights --------------------------------------------------------------------------------------------------------

Weight as_weight(DType dtype, const Array& w, const Array* scale = nullptr, const Array* shift = nullptr) {
  Weight weight;
  weight.data = w.data, weight.dtype = dtype;
  weight.n = w.shape[0], weight.c = w.shape[1];
  if (w.shape.size() == 4) weight.kh = w.shape[2], weight.kw = w.shape[3];
  weight.scale = scale == nullptr ? nullptr : scale->data;
  weight.shift = shift == nullptr ? nullptr : shift->data;
  return weight;
}

Weight as_pconv_weight(DType dtype, const Array& w) {
  Weight weight = as_weight(dtype, w);
  weight.columns_as_outputs = true;
  return weight;
}

// Weights packed one behind the other for the length of a call.
class Packed {
 public:
  Packed(std::initializer_list<Weight> weights, const ParallelFor& parallel) {
    int64_t bytes = 0;
    for (const Weight& weight : weights) bytes += size_in_bytes(weight);
    data_ = static_cast<char*>(::operator new(static_cast<size_t>(bytes), kAlignment));
    char* next = data_;
    for (const Weight& weight : weights) {
      pack(weight, next, parallel);
      next += size_in_bytes(weight);
    }
  }
  ~Packed() { ::operator delete(data_, kAlignment); }
  Packed(const Packed&) = delete;
  Packed& operator=(const Packed&) = delete;

  const void* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};

  static int64_t size_in_bytes(const Weight& weight) {
    const int64_t element = weight.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
    return packed_size(weight) * element;
  }

  char* data_;
};

// ---- The functions --------------------------------------------------------------------------------------------------

void run_pconv3x3(const Arguments& arguments, const Array& x, const Array& weight, void* y, const int64_t* y_stride) {
  PConv3x3 job{};
  job.dtype = arguments.dtype();
  job.batch = x.shape[0], job.height = x.shape[1], job.width = x.shape[2], job.channels = x.shape[3];
  job.c_partial = weight.shape[0];
  job.x = x.data;
  copy_strides(x, job.x_stride);
  job.y = y;
  std::copy_n(y_stride, 4, job.y_stride);
  if (x.size() == 0) return;
  run_without_gil([&](const ParallelFor& parallel) {
    const Packed packed({as_pconv_weight(job.dtype, weight)}, parallel);
    job.packed = packed.data();
    pconv3x3(job, parallel);
  });
}

py::array numpy_pconv3x3(const py::object& x_value, const py::object& weight_value) {
  Arguments arguments("pconv3x3");
  const Array x = arguments.images("x", x_value);
  const Array weight = arguments.partial_weight("weight", weight_value, x);
  py::array y = new_array(arguments.dtype(), x.shape);
  const int64_t width = x.shape[2], channels = x.shape[3];
  const int64_t y_stride[4] = {x.shape[1] * width * channels, 1, width * channels, channels};
  run_pconv3x3(arguments, x, weight, y.mutable_data(), y_stride);
  return y;
}

py::object numpy_pconv3x3_in_place(const py::object& x_value, const py::object& weight_value) {
  Arguments arguments("pconv3x3_");
  const Array x = arguments.images("x", x_value);
  const Array weight = arguments.partial_weight("weight", weight_value, x);
  const py::array own = py::reinterpret_borrow<py::array>(x_value);
  if (!own.writeable()) throw arguments.value_error("x", "is read-only", "a writable array");
  if (!arguments.addressable(own)) {
    throw arguments.value_error("x", "is not aligned", "elements aligned and spaced by multiples of their size");
  }
  if (overlaps_itself(x)) {
    throw arguments.value_error("x", "overlaps itself", "an array in which no two indices share memory");
  }
  int64_t stride[4];
  copy_strides(x, stride);
  run_pconv3x3(arguments, x, weight, const_cast<void*>(x.data), stride);
  return x_value;
}

py::array numpy_pconv_pw(const py::object& x_value, const py::object& w_partial_value, const py::object& w_pw_value,
                         const py::object& scale_value, const py::object& shift_value, const py::object& act_value) {
  Arguments arguments("pconv_pw");
  const Array images = arguments.images("x", x_value);
  const Array w_partial = arguments.partial_weight("w_partial", w_partial_value, images);
  const Array w_pw = arguments.weight("w_pw", w_pw_value, {0, images.shape[3], 1, 1},
                                      ("(C_out, " + std::to_string(images.shape[3]) + ", 1, 1)").c_str());
  const int64_t c_out = w_pw.shape[0];
  const Array scale = arguments.vector("scale", scale_value, c_out, "(C_out,)");
  const Array shift = arguments.vector("shift", shift_value, c_out, "(C_out,)");
  const Act act = arguments.act("act", act_value);
  const auto [x, pixel_stride] = channels_last(arguments, images);
  py::array y = new_array(arguments.dtype(), {x.shape[0], x.shape[1], x.shape[2], c_out});
  if (y.size() == 0) return y;

  PConvPw job{};
  job.dtype = arguments.dtype();
  job.batch = x.shape[0], job.height = x.shape[1], job.width = x.shape[2], job.channels = x.shape[3];
  job.c_partial = w_partial.shape[0], job.c_out = c_out;
  job.x = x.data, job.x_pixel_stride = pixel_stride;
  job.y = y.mutable_data(), job.y_pixel_stride = c_out;
  job.act = act;
  run_without_gil([&](const ParallelFor& parallel) {
    const Packed packed({as_pconv_weight(job.dtype, w_partial), as_weight(job.dtype, w_pw, &scale, &shift)}, parallel);
    job.packed = packed.data();
    pconv_pw(job, parallel);
  });
  return y;
}

py::array numpy_block(const py::object& x_value, const py::object& w_partial_value, const py::object& w_pw1_value,
                      const py::object& w_pw2_value, const py::object& scale_value, const py::object& shift_value,
                      const py::object& act_value, const py::object& layer_scale_value) {
  Arguments arguments("fasternet_block");
  const Array images = arguments.images("x", x_value);
  const int64_t channels = images.shape[3];
  const Array w_partial = arguments.partial_weight("w_partial", w_partial_value, images);
  const Array w_pw1 = arguments.weight("w_pw1", w_pw1_value, {0, channels, 1, 1},
                                       ("(C_hidden, " + std::to_string(channels) + ", 1, 1)").c_str());
  const int64_t c_hidden = w_pw1.shape[0];
  const Array w_pw2 = arguments.weight("w_pw2", w_pw2_value, {channels, c_hidden, 1, 1}, "(C, C_hidden, 1, 1)");
  const Array scale = arguments.vector("scale", scale_value, c_hidden, "(C_hidden,)");
  const Array shift = arguments.vector("shift", shift_value, c_hidden, "(C_hidden,)");
  const Act act = arguments.act("act", act_value);
  const Array layer_scale = arguments.vector("layer_scale", layer_scale_value, channels, "(C,)");
  const auto [x, pixel_stride] = channels_last(arguments, images);
  py::array y = new_array(arguments.dtype(), x.shape);
  if (y.size() == 0) return y;

  Block job{};
  job.dtype = job.residual_dtype = arguments.dtype();
  job.batch = x.shape[0], job.height = x.shape[1], job.width = x.shape[2], job.channels = channels;
  job.c_partial = w_partial.shape[0], job.c_hidden = c_hidden;
  job.x = job.residual = x.data, job.x_pixel_stride = job.residual_pixel_stride = pixel_stride;
  job.y = y.mutable_data(), job.y_pixel_stride = channels;
  job.act = act;
  run_without_gil([&](const ParallelFor& parallel) {
    const Packed packed({as_pconv_weight(job.dtype, w_partial), as_weight(job.dtype, w_pw1, &scale, &shift),
                         as_weight(job.dtype, w_pw2, &layer_scale)},
                        parallel);
    job.packed = packed.data();
    block(job, parallel);
  });
  return y;
}

py::array numpy_patch_conv(const py::object& x_value, const py::object& weight_value, const py::object& scale_value,
                           const py::object& shift_value) {
  Arguments arguments("patch_conv");
  const Array x = arguments.images("x", x_value);
  const int64_t channels = x.shape[3];
  const Array weight = arguments.weight("weight", weight_value, {0, channels, 0, 0},
                                        ("(C_out, " + std::to_string(channels) + ", kh, kw)").c_str());
  const int64_t c_out = weight.shape[0], kh = weight.shape[2], kw = weight.shape[3];
  if (x.shape[1] < kh || x.shape[2] < kw) {
    throw arguments.value_error("x",
                                "is " + std::to_string(x.shape[1]) + " by " + std::to_string(x.shape[2]) + " pixels",
                                "at least one patch of " + std::to_string(kh) + " by " + std::to_string(kw));
  }
  const Array scale = arguments.vector("scale", scale_value, c_out, "(C_out,)");
  const Array shift = arguments.vector("shift", shift_value, c_out, "(C_out,)");
  py::array y = new_array(arguments.dtype(), {x.shape[0], x.shape[1] / kh, x.shape[2] / kw, c_out});
  if (y.size() == 0) return y;

  PatchConv job{};
  job.dtype = arguments.dtype();
  job.batch = x.shape[0], job.height = x.shape[1], job.width = x.shape[2], job.channels = channels;
  job.c_out = c_out, job.kh = kh, job.kw = kw;
  job.x = x.data;
  copy_strides(x, job.x_stride);
  job.y = y.mutable_data(), job.y_pixel_stride = c_out;
  run_without_gil([&](const ParallelFor& parallel) {
    const Packed packed({as_weight(job.dtype, weight, &scale, &shift)}, parallel);
    job.packed = packed.data();
    patch_conv(job, parallel);
  });
  return y;
}

py::array numpy_head(const py::object& x_value, const py::object& w_conv_value, const py::object& b_conv_value,
                     const py::object& w_fc_value, const py::object& b_fc_value, const py::object& act_value) {
  Arguments arguments("head");
  const Array images = arguments.images("x", x_value);
  const int64_t channels = images.shape[3];
  if (images.shape[1] == 0 || images.shape[2] == 0) {
    throw arguments.value_error("x", "has shape " + describe(images.shape), "at least one pixel to average");
  }
  const Array w_conv = arguments.weight("w_conv", w_conv_value, {0, channels, 1, 1},
                                        ("(C_mid, " + std::to_string(channels) + ", 1, 1)").c_str());
  const int64_t c_mid = w_conv.shape[0];
  const Array b_conv = arguments.vector("b_conv", b_conv_value, c_mid, "(C_mid,)");
  const Array w_fc = arguments.matrix("w_fc", w_fc_value, c_mid, ("(C_out, " + std::to_string(c_mid) + ")").c_str());
  const int64_t c_out = w_fc.shape[0];
  const Array b_fc = arguments.vector("b_fc", b_fc_value, c_out, "(C_out,)");
  const Act act = arguments.act("act", act_value);
  const auto [x, pixel_stride] = channels_last(arguments, images);
  py::array y = new_array(arguments.dtype(), {x.shape[0], c_out});
  if (y.size() == 0) return y;

  Head job{};
  job.dtype = arguments.dtype();
  job.batch = x.shape[0], job.height = x.shape[1], job.width = x.shape[2], job.channels = channels;
  job.c_mid = c_mid, job.c_out = c_out;
  job.x = x.data, job.x_pixel_stride = pixel_stride;
  job.y = y.mutable_data();
  job.act = act;
  run_without_gil([&](const ParallelFor& parallel) {
    const Packed packed({as_weight(job.dtype, w_conv, nullptr, &b_conv), as_weight(job.dtype, w_fc, nullptr, &b_fc)},
                        parallel);
    job.packed = packed.data();
    head(job, parallel);
  });
  return y;
}

double numpy_fma_peak(double seconds) {
  if (!(seconds > 0 && seconds <= 10)) {
    throw py::value_error("fma_peak: seconds is " + std::to_string(seconds) + ", expected more than 0 and at most 10");
  }
  double peak = 0;
  run_without_gil([&](const ParallelFor& parallel) { peak = fma_peak(seconds, parallel); });
  return peak;
}

// ---- Plans ----------------------------------------------------------------------------------------------------------

// NumPy has no bfloat16: such a plan takes and gives the dtype of ml_dtypes, or its bits as uint16.
const char* dtype_names(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kBFloat16:
      return "bfloat16 (of ml_dtypes) or its bits as uint16";
  }
  return "";
}

class LoadedPlan {
 public:
  LoadedPlan(const std::string& path, int num_threads) : plan_(path), num_threads_(num_threads) {}

  const Plan& plan() const { return plan_; }

  std::string dtype() const {
    return plan_.dtype() == DType::kFloat32 ? "float32" : plan_.dtype() == DType::kFloat64 ? "float64" : "bfloat16";
  }

  py::object call(const py::object& value) const {
    if (!py::isinstance<py::array>(value)) {
      throw py::type_error(std::string("plan: x is a ") + Py_TYPE(value.ptr())->tp_name +
                           ", expected a NumPy array of " + dtype_names(plan_.dtype()));
    }
    py::array x = py::reinterpret_borrow<py::array>(value);
    if (!has_dtype(x)) {
      throw py::type_error("plan: x has dtype " + std::string(py::str(x.dtype())) + ", expected " +
                           dtype_names(plan_.dtype()) + " in native byte order");
    }
    const ssize_t element = x.itemsize();
    std::vector<int64_t> shape(x.shape(), x.shape() + x.ndim());
    if (x.ndim() != 4 || shape[1] != plan_.channels()) {
      throw py::value_error("plan: x has shape " + describe(shape) + ", expected 4 dimensions (B, " +
                            std::to_string(plan_.channels()) + ", H, W)");
    }
    int64_t rows = 1, columns = 1;
    for (const NetworkStep& step : plan_.steps()) {
      if (step.kind == NetworkStep::Kind::kPatchConv) rows *= step.b, columns *= step.c;
    }
    if (shape[2] < rows || shape[3] < columns) {
      throw py::value_error("plan: x is " + std::to_string(shape[2]) + " by " + std::to_string(shape[3]) +
                            " pixels, expected at least " + std::to_string(rows) + " by " + std::to_string(columns));
    }
    if (!in_place(x, element)) x = x.attr("copy")("C").cast<py::array>();
    int64_t stride[4];
    for (int d = 0; d < 4; ++d) stride[d] = x.strides(d) / element;
    const Network job = plan_.network(shape[0], shape[2], shape[3], x.data(), stride);
    py::tuple results(plan_.outputs().size());
    std::vector<void*> data;
    size_t i = 0;
    for (const FeatureShape& output : network_outputs(job)) {
      py::array y =
          output.height < 0
              ? py::array(x.dtype(), std::vector<int64_t>{shape[0], output.channels})
              : py::array(x.dtype(), std::vector<int64_t>{shape[0], output.height, output.width, output.channels});
      data.push_back(y.mutable_data());
      results[i++] = output.height < 0 ? py::object(y) : y.attr("transpose")(0, 3, 1, 2);
    }
    run_without_gil([&](const ParallelFor& parallel) { network(job, data.data(), parallel); }, num_threads_);
    return plan_.sequence() ? py::object(results) : py::object(results[0]);
  }

  std::string repr() const {
    return "<fasternet_runtime.Plan: " + dtype() + " (B, " + std::to_string(plan_.channels()) + ", H, W), " +
           std::to_string(plan_.steps().size()) + " steps, " + std::to_string(plan_.outputs().size()) +
           (plan_.outputs().size() == 1 ? " output" : " outputs") + ", written by " + plan_.writer() + ">";
  }

  // (kind, sizes, act) of each step, under the names that csrc gives them.
  py::tuple steps() const {
    static const char* const kActs[] = {"identity", "relu", "gelu", "gelu_tanh", "silu", "hardswish"};
    py::tuple result(plan_.steps().size());
    size_t i = 0;
    for (const NetworkStep& step : plan_.steps()) {
      py::dict row;
      switch (step.kind) {
        case NetworkStep::Kind::kPatchConv:
          row["kind"] = "patch_conv", row["c_out"] = step.a, row["kh"] = step.b, row["kw"] = step.c;
          break;
        case NetworkStep::Kind::kBlock:
          row["kind"] = "block", row["c_partial"] = step.a, row["c_hidden"] = step.b;
          row["act"] = kActs[static_cast<int>(step.act)], row["fast"] = step.fast;
          break;
        case NetworkStep::Kind::kHead:
          row["kind"] = "head", row["c_mid"] = step.a, row["c_out"] = step.b;
          row["act"] = kActs[static_cast<int>(step.act)];
          break;
        case NetworkStep::Kind::kEmit:
          row["kind"] = "emit";
          break;
      }
      result[i++] = row;
    }
    return result;
  }

 private:
  bool has_dtype(const py::array& x) const {
    switch (plan_.dtype()) {
      case DType::kFloat32:
        return py::isinstance<py::array_t<float>>(x);
      case DType::kFloat64:
        return py::isinstance<py::array_t<double>>(x);
      case DType::kBFloat16:
        return py::isinstance<py::array_t<uint16_t>>(x) ||
               (x.itemsize() == 2 && std::string(py::str(x.dtype())) == "bfloat16");
    }
    return false;
  }

  // Whether the kernels can read the array where it is.
  static bool in_place(const py::array& x, ssize_t element) {
    bool aligned = reinterpret_cast<uintptr_t>(x.data()) % static_cast<size_t>(element) == 0;
    for (ssize_t d = 0; d < x.ndim(); ++d) aligned = aligned && x.strides(d) % element == 0;
    return aligned;
  }

  const Plan plan_;
  const int num_threads_;  // 0: the process's
};

std::unique_ptr<LoadedPlan> load(const py::object& path, const py::object& threads) {
  const int num_threads = threads.is_none() ? 0 : thread_count("load: threads", threads);
  const py::object name = py::reinterpret_steal<py::object>(PyOS_FSPath(path.ptr()));
  if (!name) throw py::error_already_set();
  const py::module_ os = py::module_::import("os");
  os.attr("stat")(name);  // says in Python's own words that there is no such file
  const auto bytes = os.attr("fsencode")(name).cast<std::string>();
  py::gil_scoped_release release;
  return std::make_unique<LoadedPlan>(bytes, num_threads);
}

py::dict build_info() {
  py::list isas;
  for (Isa isa : available_isas()) isas.append(isa_name(isa));
  py::dict info;
  info["version"] = FASTERNET_KERNELS_VERSION;
  info["compiler"] = compiler();
  info["available_isas"] = isas;
  info["isa"] = isa_name(selected_isa());
  return info;
}

}  // namespace
}  // namespace fasternet

// Docstrings begin with a line from which inspect.signature reads the signature, as in CPython's own C functions.
PYBIND11_MODULE(fasternet_runtime, m) {
  using namespace fasternet;
  py::options options;
  options.disable_function_signatures();

  m.doc() =
      R"(FasterNet's operators (arXiv 2303.03667) on NumPy arrays, by the kernels of fasternet_kernels, without torch.

Images are (B, H, W, C), channels last, float32 or float64. A channel slice of a wider array, a[..., 3:19], is read in
place; views the kernels cannot read in place are copied. Weights have PyTorch's shapes (N, C, kh, kw) and, as scale, shift
and the like, the dtype of x. Results are new C-contiguous arrays. Weights are packed anew in every call.

A wrong argument raises TypeError (not an array, or the wrong dtype) or ValueError (the wrong shape or value), and then
nothing has been written. RuntimeError: FASTERNET_KERNELS_ISA names an instruction set this machine lacks.

The GIL is released while a kernel runs. Any number of Python threads may call at once: one has the pool of threads, the
others compute on their own thread, with the same bits. After os.fork() the child starts threads of its own.)";

  m.def("pconv3x3", &numpy_pconv3x3, py::arg("x"), py::arg("weight"),
        R"(pconv3x3(x, weight)
--

Partial convolution (section 3.2 of the paper): a 3x3 convolution, stride 1, zero padding 1, of the first C_partial
channels; the others are copied.

x: (B, H, W, C), any strides. weight: (C_partial, C_partial, 3, 3), C_partial <= C. Returns (B, H, W, C).)");
  m.def("pconv3x3_", &numpy_pconv3x3_in_place, py::arg("x"), py::arg("weight"),
        R"(pconv3x3_(x, weight)
--

pconv3x3 in place: writes the first C_partial channels of x and never touches the others. Returns x.

x: (B, H, W, C), any strides, but writable and with no two indices sharing memory; else ValueError.)");
  m.def("pconv_pw", &numpy_pconv_pw, py::arg("x"), py::arg("w_partial"), py::arg("w_pw"), py::arg("scale") = py::none(),
        py::arg("shift") = py::none(), py::arg("act") = "relu",
        R"(pconv_pw(x, w_partial, w_pw, scale=None, shift=None, act='relu')
--

Partial convolution, then 1x1 convolution, norm and activation (section 3.3 of the paper):
act(scale * conv1x1(pconv3x3(x, w_partial), w_pw) + shift).

x: (B, H, W, C). w_partial: (C_partial, C_partial, 3, 3). w_pw: (C_out, C, 1, 1). scale, shift: (C_out,), a folded
batch norm. act: relu, gelu, gelu_tanh, silu, hardswish or identity. Returns (B, H, W, C_out).)");
  m.def("fasternet_block", &numpy_block, py::arg("x"), py::arg("w_partial"), py::arg("w_pw1"), py::arg("w_pw2"),
        py::arg("scale") = py::none(), py::arg("shift") = py::none(), py::arg("act") = "relu",
        py::arg("layer_scale") = py::none(),
        R"(fasternet_block(x, w_partial, w_pw1, w_pw2, scale=None, shift=None, act='relu', layer_scale=None)
--

A FasterNet block (section 3.4 and Figure 4 of the paper):
x + layer_scale * conv1x1(pconv_pw(x, w_partial, w_pw1, scale, shift, act), w_pw2).

x: (B, H, W, C). w_partial: (C_partial, C_partial, 3, 3). w_pw1: (C_hidden, C, 1, 1). w_pw2: (C, C_hidden, 1, 1).
scale, shift: (C_hidden,). layer_scale: (C,). act as in pconv_pw. Returns (B, H, W, C).)");
  m.def("patch_conv", &numpy_patch_conv, py::arg("x"), py::arg("weight"), py::arg("scale") = py::none(),
        py::arg("shift") = py::none(),
        R"(patch_conv(x, weight, scale=None, shift=None)
--

Convolution of patches that do not overlap, kernel = stride = (kh, kw), no padding, and norm: the embedding and merging
layers (section 3.4 of the paper). Rows and columns that do not fill a patch are ignored.

x: (B, H, W, C), any strides, H >= kh and W >= kw. weight: (C_out, C, kh, kw). scale, shift: (C_out,).
Returns (B, H // kh, W // kw, C_out).)");
  m.def("head", &numpy_head, py::arg("x"), py::arg("w_conv"), py::arg("b_conv"), py::arg("w_fc"), py::arg("b_fc"),
        py::arg("act") = "relu",
        R"(head(x, w_conv, b_conv, w_fc, b_fc, act='relu')
--

The classifier (section 3.4 of the paper): global average pool, 1x1 convolution, activation, fully connected layer.

x: (B, H, W, C), at least one pixel. w_conv: (C_mid, C, 1, 1). b_conv: (C_mid,) or None. w_fc: (C_out, C_mid).
b_fc: (C_out,) or None. act as in pconv_pw. Returns (B, C_out).)");
  py::class_<LoadedPlan>(m, "Plan", R"(A network in one file, as fasternet_kernels.export_plan writes it; see load().

plan(x): x (B, C, H, W) of the plan's dtype, any strides, any B, H and W that leave a pixel to every layer. Returns the
network's output: the logits (B, classes), a feature map (B, C, H, W), channels last in memory, or a tuple of them.
TypeError or ValueError name what is wrong with x. Any number of threads may call one plan at a time.)")
      .def("__call__", &LoadedPlan::call, py::arg("x"))
      .def("__repr__", &LoadedPlan::repr)
      .def_property_readonly(
          "input_channels", [](const LoadedPlan& p) { return p.plan().channels(); }, "Channels of x.")
      .def_property_readonly("dtype", &LoadedPlan::dtype, "'float32', 'float64' or 'bfloat16'.")
      .def_property_readonly("steps", &LoadedPlan::steps, "What is computed: a dict for each step.")
      .def_property_readonly(
          "writer", [](const LoadedPlan& p) { return p.plan().writer(); }, "What wrote the file, with its version.");
  m.def("load", &load, py::arg("path"), py::arg("threads") = py::none(),
        R"(load(path, threads=None)
--

Reads a file that fasternet_kernels.export_plan wrote, and checks it; returns a Plan, to be called with arrays.

threads: how many threads its calls use, 1 to 1024; None: as many as set_num_threads says. A bfloat16 plan takes and gives
arrays of ml_dtypes' bfloat16, or its bits as uint16. RuntimeError: the file is damaged, of another version
or no plan at all.)");
  m.def("build_info", &build_info,
        R"(build_info()
--

A dict: version, compiler, available_isas (what this processor runs, slowest first) and isa (the one in use).)");
  m.def("fma_peak", &numpy_fma_peak, py::arg("seconds") = 0.02,
        R"(fma_peak(seconds=0.02)
--

Operations per second, two for a multiply-add, that this machine reaches now on get_num_threads() threads: independent
float32 multiply-adds in registers, on the vectors of build_info()["isa"], for about that many seconds. The clock of a
processor moves, so a share of this peak is only meaningful when both were measured side by side.)");
  m.def("set_num_threads", &set_num_threads, py::arg("n"),
        R"(set_num_threads(n)
--

The number of threads a call uses, 1 to 1024, the calling one included. At first: one per processor this process may
use. Results do not depend on it.)");
  m.def(
      "get_num_threads", [] { return runtime->num_threads.load(); },
      R"(get_num_threads()
--

The number of threads a call uses.)");

  // Not through pybind11, whose dispatch and conversion of arguments would take as long as the function.
  static PyMethodDef functions[] = {
      {"_unchanged", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&unchanged)), METH_FASTCALL,
       "Whether Python objects are still what they were; for fasternet_kernels/watch.py."},
      {nullptr, nullptr, 0, nullptr}};
  if (PyModule_AddFunctions(m.ptr(), functions) != 0) throw py::error_already_set();

  const py::module_ os = py::module_::import("os");
  if (py::hasattr(os, "register_at_fork")) {
    os.attr("register_at_fork")(py::arg("after_in_child") = py::cpp_function(&forget_threads_after_fork));
  }
}
