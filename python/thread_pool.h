// A small pool of threads for fasternet_runtime: csrc owns no threads, and without torch there is no pool to borrow.
//
// Workers park on a condition variable and never spin: beside other work on the machine, a spinning thread costs whole
// scheduler quanta. A range is cut into one piece per thread and each thread takes the next piece when it is ready, so
// the caller does not wait for a worker that is slow to wake: it does that worker's share itself.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "fasternet_cpu.h"

namespace fasternet {

class ThreadPool {
 public:
  ThreadPool() = default;

  ~ThreadPool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Loops on up to `num_threads` threads. For one caller at a time: whoever shares a pool holds a lock of its own
  // around the calls that get this. The pool grows to the most that was ever asked for; who is not needed stays parked.
  ParallelFor parallel(int num_threads) {
    num_threads_ = num_threads;
    return {&ThreadPool::run, this, num_threads};
  }

 private:
  static void run(void* context, int64_t n, ParallelFor::Body body, void* body_context) {
    ThreadPool& pool = *static_cast<ThreadPool*>(context);
    if (n <= 1 || pool.num_threads_ == 1) {
      if (n > 0) body(body_context, 0, n);
      return;
    }
    pool.start();
    std::unique_lock<std::mutex> lock(pool.mutex_);
    pool.n_ = n;
    pool.pieces_ = n < pool.num_threads_ ? n : pool.num_threads_;
    pool.next_piece_ = 0;
    pool.body_ = body;
    pool.body_context_ = body_context;
    pool.error_ = nullptr;
    for (int64_t piece = 1; piece < pool.pieces_; ++piece) pool.wake_.notify_one();
    pool.take_pieces(lock);
    pool.done_.wait(lock, [&] { return pool.running_ == 0; });
    if (pool.error_) std::rethrow_exception(pool.error_);
  }

  // Threads start with the first loop that needs them: a process that only imports the module, or forks before it
  // computes, has none. Where the system refuses a thread, those there are do its pieces.
  void start() {
    try {
      while (static_cast<int>(workers_.size()) < num_threads_ - 1) workers_.emplace_back([this] { work(); });
    } catch (const std::system_error&) {
    }
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return stop_ || next_piece_ < pieces_; });
      if (stop_) return;
      take_pieces(lock);
      if (running_ == 0) done_.notify_one();
    }
  }

  // Runs pieces until none is left. `lock` is held on entry and on return, and not while a piece runs.
  void take_pieces(std::unique_lock<std::mutex>& lock) {
    while (next_piece_ < pieces_) {
      const int64_t piece = next_piece_++;
      const int64_t begin = n_ / pieces_ * piece + (piece < n_ % pieces_ ? piece : n_ % pieces_);
      const int64_t end = begin + n_ / pieces_ + (piece < n_ % pieces_ ? 1 : 0);
      ++running_;
      lock.unlock();
      std::exception_ptr error;
      try {
        body_(body_context_, begin, end);
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      --running_;
      if (error && !error_) error_ = error;
    }
  }

  int num_threads_ = 1;               // of the loops to come
  std::vector<std::thread> workers_;  // at least num_threads_ - 1 once a loop has run: the caller is the other one
  std::mutex mutex_;                  // guards all below
  std::condition_variable wake_, done_;
  bool stop_ = false;
  int64_t n_ = 0, pieces_ = 0, next_piece_ = 0, running_ = 0;
  ParallelFor::Body body_ = nullptr;
  void* body_context_ = nullptr;
  std::exception_ptr error_;
};

}  // namespace fasternet
