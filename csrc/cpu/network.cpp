// Runs a network plan: checks it once, then one operator after the other between two scratch buffers of the calling
// thread. A feature map that is an output is computed straight into the caller's memory and read from there by the next
// step. Nothing is allocated but the scratch, and that is kept.
#include <algorithm>
#include <stdexcept>

#include "kernels.h"

namespace fasternet {
namespace {

using Kind = NetworkStep::Kind;

[[noreturn]] void refuse(int64_t step, const char* what) {
  throw std::invalid_argument("step " + std::to_string(step) + " of the network plan " + what);
}

// What flows between the steps: x, then dense channels-last maps, then a head's (batch, c_out).
FeatureShape after(const Network& args, int64_t i, const FeatureShape& now) {
  const NetworkStep& step = args.steps[i];
  if (i > 0 && args.steps[i - 1].kind == Kind::kHead) refuse(i, "follows a head");
  switch (step.kind) {
    case Kind::kPatchConv:
      if (step.a < 1 || step.b < 1 || step.c < 1) refuse(i, "has an empty patch");
      return {step.a, now.height / step.b, now.width / step.c};
    case Kind::kBlock:
      if (i == 0) refuse(i, "is a block, expected a patch convolution first");
      if (step.a < 1 || step.a > now.channels || step.b < 1) {
        refuse(i, "is a block whose c_partial or c_hidden does not fit");
      }
      return now;
    case Kind::kHead:
      if (i == 0 || now.height < 1 || now.width < 1) refuse(i, "is a head without a feature map");
      return {step.b, -1, -1};
    case Kind::kEmit:
      if (i == 0 || args.steps[i - 1].kind == Kind::kEmit) refuse(i, "has nothing to emit");
      return now;
  }
  refuse(i, "is of an unknown kind");
}

bool is_output(const NetworkStep& step) { return step.kind == Kind::kEmit || step.kind == Kind::kHead; }

// Elements of one image; throws if the whole batch has more than an int64_t counts in bytes.
int64_t elements(const Network& args, const FeatureShape& shape) {
  int64_t n = shape.channels, all;
  if (shape.height >= 0 &&
      (__builtin_mul_overflow(n, shape.height, &n) || __builtin_mul_overflow(n, shape.width, &n))) {
    throw std::invalid_argument("a feature map of the network has more elements than an int64 counts");
  }
  if (__builtin_mul_overflow(n, std::max<int64_t>(args.batch, 1) * 8, &all)) {
    throw std::invalid_argument("a feature map of the network has more elements than an int64 counts");
  }
  return n;
}

void check_end(const Network& args) {
  if (args.n_steps == 0 || !is_output(args.steps[args.n_steps - 1])) {
    throw std::invalid_argument("the network plan ends without an output");
  }
}

// Elements of the largest map of one image. Checks the whole plan.
int64_t largest_map(const Network& args) {
  FeatureShape now = {args.channels, args.height, args.width};
  int64_t largest = 0;
  for (int64_t i = 0; i < args.n_steps; ++i) {
    now = after(args, i, now);
    largest = std::max(largest, elements(args, now));
  }
  check_end(args);
  return largest;
}

int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace

std::vector<FeatureShape> network_outputs(const Network& args) {
  std::vector<FeatureShape> outputs;
  FeatureShape now = {args.channels, args.height, args.width};
  for (int64_t i = 0; i < args.n_steps; ++i) {
    now = after(args, i, now);
    elements(args, now);
    if (is_output(args.steps[i])) outputs.push_back(now);
  }
  check_end(args);
  return outputs;
}

// One loop over the steps: each works on the whole batch, whose images its own parallel loop shares out.
void network(const Network& args, void* const* outputs, const ParallelFor& parallel) {
  const int64_t bytes = largest_map(args) * args.batch * element_size(args.dtype);
  if (args.batch == 0) return;
  const TrimScratch at_end;
  void* const buffers[2] = {scratch(kSlotNetworkA, bytes), scratch(kSlotNetworkB, bytes)};
  const Kernels& run = kernels();
  const void* x = args.x;
  FeatureShape now = {args.channels, args.height, args.width};
  int64_t output = 0;
  for (int64_t i = 0; i < args.n_steps; ++i) {
    const NetworkStep& step = args.steps[i];
    const FeatureShape next = after(args, i, now);
    if (step.kind == Kind::kEmit) {
      ++output;  // the step before has written it
      continue;
    }
    // The last step is an output: after any other there is a next one.
    const bool emitted = step.kind == Kind::kHead || args.steps[i + 1].kind == Kind::kEmit;
    void* const y = emitted ? outputs[output] : buffers[x == buffers[0]];
    switch (step.kind) {
      case Kind::kPatchConv: {
        const int64_t dense[4] = {now.height * now.width * now.channels, 1, now.width * now.channels, now.channels};
        PatchConv op = {};
        op.dtype = args.dtype;
        op.batch = args.batch;
        op.channels = now.channels;
        op.height = now.height;
        op.width = now.width;
        op.c_out = step.a;
        op.kh = step.b;
        op.kw = step.c;
        op.x = x;
        for (int s = 0; s < 4; ++s) op.x_stride[s] = i == 0 ? args.x_stride[s] : dense[s];
        op.y = y;
        op.y_pixel_stride = step.a;
        op.packed = step.packed;
        run.patch_conv(op, parallel);
        break;
      }
      case Kind::kBlock:
        run.block({args.dtype, args.dtype, args.batch, now.channels, now.height, now.width, step.a, step.b, x,
                   now.channels, x, now.channels, y, now.channels, step.packed, nullptr, step.act, step.fast},
                  parallel);
        break;
      case Kind::kHead:
        run.head({args.dtype, args.batch, now.channels, now.height, now.width, step.a, step.b, x, now.channels, y,
                  step.packed, step.act},
                 parallel);
        break;
      case Kind::kEmit:
        break;
    }
    x = y;
    now = next;
  }
}

}  // namespace fasternet
