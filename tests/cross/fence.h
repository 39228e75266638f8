// Memory for one array between pages that fault, with guard bytes in what is left of its own.

#pragma once

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <new>

class Fence {
 public:
  // residue < 64: the address modulo 64. 64: the array ends where the faulting page begins.
  Fence(size_t size, size_t residue) : size_(size) {
    page_ = (size_t)sysconf(_SC_PAGESIZE);
    room_ = (size + 64 + page_ - 1) / page_ * page_;
    void* p = mmap(nullptr, room_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    body_ = (uint8_t*)p + page_;
    if (mprotect(body_, room_, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
    memset(body_, kGuard, room_);
    before_ = room_ - size;
    if (residue < 64) before_ -= (before_ - residue) % 64;
  }
  ~Fence() { munmap(body_ - page_, room_ + 2 * page_); }
  Fence(const Fence&) = delete;
  Fence& operator=(const Fence&) = delete;

  uint8_t* data() const { return body_ + before_; }

  void forbid_writes() {
    writable_ = false;
    mprotect(body_, room_, PROT_READ);
  }
  bool writable() const { return writable_; }
  size_t size() const { return size_; }

  bool intact() const {
    for (size_t i = 0; i < room_; ++i) {
      const bool own = i >= before_ && i < before_ + size_;
      if (!own && body_[i] != kGuard) return false;
    }
    return true;
  }

 private:
  static constexpr uint8_t kGuard = 0xA5;
  size_t size_, page_, room_, before_;
  uint8_t* body_;
  bool writable_ = true;
};
