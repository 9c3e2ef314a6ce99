// Measures what the processor could do at best, for the benchmarks.
#include <chrono>

#include "kernels.h"

namespace fasternet {
namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Share {
  alignas(64) float sink;  // of one thread: a cache line of its own
};

struct Job {
  int64_t iterations;
  std::vector<Share> shares;
};

void run_shares(void* context, int64_t begin, int64_t end) {
  Job& job = *static_cast<Job*>(context);
  for (int64_t i = begin; i < end; ++i) {
    kernels().fma_loop(job.iterations, 0.5f, 1.0f, &job.shares[static_cast<size_t>(i)].sink);
  }
}

}  // namespace

double fma_peak(double seconds, const ParallelFor& parallel) {
  // How many iterations take that long on this thread, by doubling until the clock can tell.
  int64_t iterations = 1 << 14;
  float sink;
  double operations, taken;
  for (;;) {
    const double start = seconds_now();
    operations = static_cast<double>(kernels().fma_loop(iterations, 0.5f, 1.0f, &sink));
    taken = seconds_now() - start;
    if (taken >= 1e-3) break;
    iterations *= 2;
  }
  const double per_iteration = operations / static_cast<double>(iterations);
  if (seconds > taken) iterations = static_cast<int64_t>(static_cast<double>(iterations) * (seconds / taken));

  Job job{iterations, std::vector<Share>(static_cast<size_t>(parallel.num_threads))};
  const double start = seconds_now();
  parallel.run(parallel.context, parallel.num_threads, run_shares, &job);
  taken = seconds_now() - start;
  return per_iteration * static_cast<double>(iterations) * parallel.num_threads / taken;
}

}  // namespace fasternet
