// Arena: one block of fresh memory for all new factors of a call.
//
// Touching fresh pages costs more than the arithmetic that fills them; one private anonymous mapping with huge pages
// costs a few milliseconds where an allocation per tensor costs a hundred. It is touched here, by all threads, before
// any work: faults amid the work were measured to cost twice as much.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

#include "parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#else
#include <cstdlib>
#endif

namespace para {

class Arena {
  public:
    Arena(size_t bytes, int threads) : bytes_(bytes) {
        if (bytes == 0) return;
#if defined(__unix__) || defined(__APPLE__)
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        data_ = memory;
#ifdef MADV_HUGEPAGE
        madvise(data_, bytes, MADV_HUGEPAGE);  // a hint: memory works without it
#endif
#else
        data_ = std::calloc(bytes, 1);
        if (!data_) throw std::bad_alloc();
#endif
        constexpr size_t SHARE = size_t{2} << 20, PAGE = 4096;
        const std::vector<double> shares((bytes + SHARE - 1) / SHARE, 1.0);
        parallel_for(shares, threads, [&] {
            return [&](size_t i) {
                for (size_t at = i * SHARE; at < bytes_ && at < (i + 1) * SHARE; at += PAGE) {
                    static_cast<volatile char*>(data_)[at] = 0;
                }
            };
        });
    }
    ~Arena() {
        if (!data_) return;
#if defined(__unix__) || defined(__APPLE__)
        munmap(data_, bytes_);
#else
        std::free(data_);
#endif
    }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    void* data_ = nullptr;
    size_t bytes_;
};

}  // namespace para
