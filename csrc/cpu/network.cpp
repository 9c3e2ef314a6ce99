// Runs a network plan: checks it once, then one operator after the other between two scratch buffers of the calling
// thread. A feature map that is an output is computed straight into the caller's memory and read from there by the next
// step.
#include <algorithm>
#include <stdexcept>

#include "kernels.h"

namespace fasternet {
namespace {

using Kind = NetworkStep::Kind;

// What flows between the steps: x, then dense channels-last maps, then a head's (batch, c_out).
struct Shapes {
  std::vector<FeatureShape> after;    // of each step
  std::vector<FeatureShape> outputs;  // what the caller gets
  int64_t largest = 0;                // elements of the largest intermediate
};

Shapes check(const Network& args) {
  Shapes shapes;
  FeatureShape now = {args.channels, args.height, args.width};
  for (int64_t i = 0; i < args.n_steps; ++i) {
    const NetworkStep& step = args.steps[i];
    const std::string where = "step " + std::to_string(i) + " of the network plan ";
    if (i > 0 && args.steps[i - 1].kind == Kind::kHead) throw std::invalid_argument(where + "follows a head");
    switch (step.kind) {
      case Kind::kPatchConv:
        if (step.a < 1 || step.b < 1 || step.c < 1) throw std::invalid_argument(where + "has an empty patch");
        now = {step.a, now.height / step.b, now.width / step.c};
        break;
      case Kind::kBlock:
        if (i == 0) throw std::invalid_argument(where + "is a block, expected a patch convolution first");
        if (step.a < 1 || step.a > now.channels || step.b < 1) {
          throw std::invalid_argument(where + "is a block whose c_partial or c_hidden does not fit");
        }
        break;
      case Kind::kHead:
        if (i == 0 || now.height < 1 || now.width < 1) {
          throw std::invalid_argument(where + "is a head without a feature map");
        }
        now = {step.b, -1, -1};
        shapes.outputs.push_back(now);
        break;
      case Kind::kEmit:
        if (i == 0 || args.steps[i - 1].kind == Kind::kEmit) throw std::invalid_argument(where + "has nothing to emit");
        shapes.outputs.push_back(now);
        break;
      default:
        throw std::invalid_argument(where + "is of an unknown kind");
    }
    shapes.after.push_back(now);
    shapes.largest = std::max(shapes.largest, args.batch * now.channels * std::max<int64_t>(1, now.height * now.width));
  }
  if (args.n_steps == 0 ||
      (args.steps[args.n_steps - 1].kind != Kind::kEmit && args.steps[args.n_steps - 1].kind != Kind::kHead)) {
    throw std::invalid_argument("the network plan ends without an output");
  }
  return shapes;
}

}  // namespace

std::vector<FeatureShape> network_outputs(const Network& args) { return check(args).outputs; }

void network(const Network& args, void* const* outputs, const ParallelFor& parallel) {
  const Shapes shapes = check(args);
  if (args.batch == 0) return;
  const int64_t element = args.dtype == DType::kFloat64 ? 8 : args.dtype == DType::kFloat32 ? 4 : 2;
  const TrimScratch at_end;
  void* const buffers[2] = {scratch(kSlotNetworkA, shapes.largest * element),
                            scratch(kSlotNetworkB, shapes.largest * element)};
  const Kernels& run = kernels();
  const void* x = args.x;
  FeatureShape now = {args.channels, args.height, args.width};
  int64_t output = 0;
  for (int64_t i = 0; i < args.n_steps; ++i) {
    const NetworkStep& step = args.steps[i];
    const FeatureShape& next = shapes.after[i];
    if (step.kind == Kind::kEmit) {
      ++output;  // the step before has written it
      continue;
    }
    const bool emitted = step.kind == Kind::kHead || (i + 1 < args.n_steps && args.steps[i + 1].kind == Kind::kEmit);
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
