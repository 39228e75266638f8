// Parallel loops without oversubscription.
//
// torch computes on the threads of the OpenMP runtime that it brings, and they spin for a while
// after each loop. A second pool would fight with them for the processors, so products run on that
// runtime's threads where it is loaded: GOMP_parallel is the entry point that GCC's own code calls.

#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace compress::cpu {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() {
#if defined(__linux__)
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

struct Loop {
  size_t count;
  Task task;
  void* context;
  std::atomic<size_t> next{0};

  void work() {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i);
  }
};

void work_on(void* loop) {
  static_cast<Loop*>(loop)->work();
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads that wait for loops: spinning for some microseconds, then asleep. A thread that comes too
// late for a loop is not waited for, so a busy machine costs a loop its help and no more.
class Pool {
 public:
  void run(Loop& loop, int threads) {
    const std::unique_lock<std::mutex> alone(running_, std::try_to_lock);
    if (!alone.owns_lock()) {
      loop.work();
      return;
    }
    const size_t helpers = static_cast<size_t>(threads - 1);
    start(helpers);
    {
      const std::lock_guard<std::mutex> hold(mutex_);
      loop_ = &loop;
      wanted_ = helpers;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    loop.work();
    {
      const std::lock_guard<std::mutex> hold(mutex_);
      loop_ = nullptr;
    }
    for (int turns = 0; busy_.load(std::memory_order_acquire); ++turns) {
      turns < kSpins ? relax() : std::this_thread::yield();
    }
  }

 private:
  static constexpr int kSpins = 5000;

  void start(size_t helpers) {
    try {
      for (; threads_ < helpers; ++threads_) {
        std::thread([this, number = threads_] { serve(number); }).detach();
      }
    } catch (const std::system_error&) {
      // The machine gives no more threads: those that there are will do.
    }
  }

  void serve(size_t number) {
    for (uint64_t seen = 0;;) {
      for (int turns = 0; turns < kSpins; ++turns) {
        if (generation_.load(std::memory_order_acquire) != seen) break;
        relax();
      }
      std::unique_lock<std::mutex> hold(mutex_);
      wake_.wait(hold, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
      seen = generation_.load(std::memory_order_relaxed);
      Loop* loop = loop_;
      if (!loop || number >= wanted_) continue;
      busy_.fetch_add(1, std::memory_order_relaxed);
      hold.unlock();
      loop->work();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex running_, mutex_;
  std::condition_variable wake_;
  size_t threads_ = 0;
  Loop* loop_ = nullptr;
  size_t wanted_ = 0;
  std::atomic<size_t> busy_{0};
  std::atomic<uint64_t> generation_{0};
};

// Never destroyed: its threads outlive every static object. A forked child starts a new one.
std::atomic<Pool*> current_pool{nullptr};

// OpenMP's threads do not survive a fork, and its runtime waits for them for ever.
std::atomic<bool> forked{false};

void forget_threads() {
  current_pool.store(nullptr, std::memory_order_release);
  forked.store(true, std::memory_order_release);
}

void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork(nullptr, nullptr, forget_threads);
  (void)registered;
#endif
}

Pool& pool() {
  Pool* found = current_pool.load(std::memory_order_acquire);
  if (found) return *found;
  Pool* made = new Pool;
  if (current_pool.compare_exchange_strong(found, made, std::memory_order_acq_rel)) return *made;
  delete made;
  return *found;
}

thread_local bool inside = false;

struct Inside {
  Inside() { inside = true; }
  ~Inside() { inside = false; }
};

}  // namespace

void parallel_for(size_t count, int threads, Task task, void* context) {
  Loop loop{count, task, context};
  if (threads <= 1 || count <= 1 || inside) {
    loop.work();
    return;
  }
  watch_forks();
  const Inside here;
  const GompParallel openmp = find_openmp();
  if (openmp && !forked.load(std::memory_order_acquire)) {
    // Always as many threads: OpenMP ends and starts threads where a loop wants another number.
    openmp(work_on, &loop, static_cast<unsigned>(threads), 0);
    return;
  }
  if (static_cast<size_t>(threads) > count) threads = static_cast<int>(count);
  pool().run(loop, threads);
}

const char* pool_name() {
  return find_openmp() ? "openmp" : "own";
}

}  // namespace compress::cpu
