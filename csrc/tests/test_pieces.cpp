// Loops in pieces: everything once, whatever the threads do.
#include <atomic>
#include <chrono>

#include "../cpu/kernels.h"
#include "testing.h"

namespace {

using namespace testing;
using fasternet::kScratchStays;

#include "../cpu/pieces.inl.h"

// How often each index of [0, n) was run, and the smallest piece but for those that end a share.
void test_loop(const std::string& how, const ParallelFor& parallel, int64_t n, int64_t least) {
  const std::string name = "loop of " + std::to_string(n) + ", least " + std::to_string(least) + ", " + how;
  std::vector<std::atomic<int>> runs(static_cast<size_t>(n));
  std::atomic<int> first_pieces{0}, small{0}, pieces{0};
  std::atomic<bool> inside{true};
  parallel_pieces(parallel, n, least, [&](int64_t begin, int64_t end, bool again) {
    if (begin < 0 || end > n || begin >= end) {
      inside = false;
      return;
    }
    for (int64_t i = begin; i < end; ++i) ++runs[static_cast<size_t>(i)];
    ++pieces;
    if (!again) ++first_pieces;
    if (end - begin < least) ++small;
  });
  check(inside, name, "a piece is empty or outside");
  check(std::all_of(runs.begin(), runs.end(), [](const auto& r) { return r == 1; }), name, "not every index ran once");
  const int threads = parallel.num_threads;
  if (threads > 1 && threads <= kMostThreads && n > threads * least) {
    check(small <= threads, name, "more than one piece of a share is smaller than asked for");
    check(!kScratchStays || first_pieces <= threads, name, "a thread's later piece does not know of the earlier one");
  } else if (n > 0) {
    check(first_pieces == pieces, name, "a piece that ParallelFor cut thinks of another");
  }
}

// The thread of the first index stays in its first piece until the other one has done all the rest.
void test_slow_thread() {
  constexpr int64_t kAll = 1000, kFirst = 125;  // a quarter of a half
  Threads two(2);
  std::atomic<bool> begun{false};
  std::atomic<int64_t> of_slow{0}, of_other{0};
  const auto wait_for = [](const auto& happened) {
    while (!happened()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  parallel_pieces(two.parallel(), kAll, 1, [&](int64_t begin, int64_t end, bool) {
    if (begin == 0) {
      begun = true;
      wait_for([&] { return of_other >= kAll - (end - begin); });
      of_slow += end - begin;
    } else {
      wait_for([&] { return begun.load(); });  // or it might take the first index too
      of_other += end - begin;
    }
  });
  check(of_slow == kFirst && of_other == kAll - kFirst, "a slow thread", "another did not take over its share");
}

}  // namespace

int main() {
  return run_tests("test_pieces", [] {
    for (int threads : {1, 2, 3, 7, 64, 256, 257}) {
      Threads some(threads);
      Reversed reversed(threads);
      AtOnce at_once(threads);
      const std::string count = std::to_string(threads) + " threads";
      for (int64_t n : {0, 1, 2, 3, 5, 8, 13, 64, 100, 257, 1000}) {
        for (int64_t least : {1, 3, 10}) {
          test_loop(count, some.parallel(), n, least);
          test_loop(count + ", reversed", reversed.parallel(), n, least);
          test_loop(count + " that are one", at_once.parallel(), n, least);
        }
      }
    }
    for (int round = 0; round < 200; ++round) {
      Threads five(5);
      test_loop("5 threads", five.parallel(), 500, 1);
    }
    test_slow_thread();
  });
}
