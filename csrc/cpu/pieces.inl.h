// Loops on threads that need not be equally fast: included by kernels.inl.h inside the namespace of an instruction set.

constexpr int kMostThreads = 256;  // that share a loop in pieces; with more, ParallelFor cuts

// body(begin, end) on [0, n), cut by ParallelFor.
template <class Body>
void parallel_ranges(const ParallelFor& parallel, int64_t n, const Body& body) {
  parallel.run(
      parallel.context, n,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// What nobody has taken of a thread's share: begin and end in one word, on a cache line of its own.
struct alignas(64) Rest {
  uint64_t ends;
  static uint64_t of(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
  }
  static int64_t size(uint64_t ends) {
    return static_cast<int64_t>(ends & 0xffffffff) - static_cast<int64_t>(ends >> 32);
  }
  uint64_t load() const { return __atomic_load_n(&ends, __ATOMIC_RELAXED); }

  // Takes a quarter of it, but at least `least`, from its front or its back. False: there is nothing left.
  bool take(int64_t least, bool front, int64_t* begin, int64_t* end) {
    uint64_t seen = load();
    for (;;) {
      const int64_t left = size(seen), first = static_cast<int64_t>(seen >> 32);
      if (left == 0) return false;
      int64_t piece = (left + 3) / 4;
      if (piece < least) piece = least < left ? least : left;
      *begin = front ? first : first + left - piece;
      *end = *begin + piece;
      const uint64_t rest = front ? of(*end, first + left) : of(first, *begin);
      if (__atomic_compare_exchange_n(&ends, &seen, rest, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) return true;
    }
  }
};

// The pieces of a thread that begins with the shares [own, last): one, unless the threads are fewer than promised.
struct Pieces {
  Rest* rests;
  int threads;
  int64_t least, own, last;

  bool take(int64_t* begin, int64_t* end) {
    for (; own < last; ++own) {
      if (rests[own].take(least, true, begin, end)) return true;
    }
    for (;;) {
      int fullest = -1;
      int64_t most = 0;
      for (int t = 0; t < threads; ++t) {
        const int64_t left = Rest::size(rests[t].load());
        if (left > most) most = left, fullest = t;
      }
      if (fullest < 0) return false;
      if (rests[fullest].take(least, false, begin, end)) return true;
    }
  }
};

// f(begin, end, again) on [0, n). Each thread has a share, the same part in every loop of this length, which it may
// have in its caches, and takes a quarter of what is left of it at a time, but at least `least`; with none left, it
// takes from the end of the share that has most. So a thread that is slowed down, because others use its core, holds up
// nobody. Where n is small ParallelFor cuts. `again`: this thread has just run another piece of this loop, and its
// scratch is as it was left.
template <class F>
void parallel_pieces(const ParallelFor& parallel, int64_t n, int64_t least, const F& f) {
  if (n <= 0) return;
  const int threads = parallel.num_threads;
  const bool whole = threads <= 1 || threads > kMostThreads || n <= threads * least || n >> 31;
  Rest rests[kMostThreads];
  for (int t = 0; t < threads && !whole; ++t) rests[t].ends = Rest::of(n * t / threads, n * (t + 1) / threads);
  parallel_ranges(parallel, whole ? n : threads, [&](int64_t first, int64_t last) {
    Pieces pieces = {rests, threads, least, first, last};
    int64_t begin = first, end = last;
    bool again = false, more = whole || pieces.take(&begin, &end);
    while (more) {
      f(begin, end, again);
      again = kScratchStays;
      more = !whole && pieces.take(&begin, &end);
    }
  });
}
template <class F>
void parallel_for(const ParallelFor& parallel, int64_t n, const F& f) {
  parallel_pieces(parallel, n, 1, [&](int64_t begin, int64_t end, bool) { f(begin, end); });
}
