// Arena: one block of zeroed memory, for all cores or all new factors of a call.
//
// Small ones come from the heap, which the process has used before. For the others, touching fresh pages costs more
// than the arithmetic that fills them. One private anonymous mapping in huge pages costs a few milliseconds where an
// allocation per tensor costs a hundred, and it is touched here, by all threads, before any work: faults amid the work
// were measured to cost twice as much. Where huge pages are slow to come (a virtual machine whose host takes free ones
// back: 2 ms each), small ones serve.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <vector>

#include "parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define PARA_HAS_MMAP
#endif

namespace para {

class Arena {
  public:
    Arena(size_t bytes, int threads) : bytes_(bytes) {
        if (bytes == 0) return;
        if (bytes < SMALL) {
            heap_ = std::calloc(bytes + PAGE, 1);
            if (!heap_) throw std::bad_alloc();
            data_ = static_cast<char*>(heap_) + (PAGE - reinterpret_cast<uintptr_t>(heap_) % PAGE);
            return;
        }
#ifdef PARA_HAS_MMAP
        void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        data_ = static_cast<char*>(memory);
#ifdef MADV_HUGEPAGE
        madvise(data_, bytes, MADV_HUGEPAGE);  // a hint, as all advice: memory works without it
#endif
#endif
        std::atomic<bool> slow{false};
        const size_t shift = (HUGE_PAGE - reinterpret_cast<uintptr_t>(data_) % HUGE_PAGE) % HUGE_PAGE;
        const std::vector<double> pages((bytes + HUGE_PAGE - 1) / HUGE_PAGE + 1, 1e5);
        parallel_for(pages, threads, [&] {
            return [&](size_t i) {
                const size_t first = i == 0 ? 0 : shift + (i - 1) * HUGE_PAGE;
                const size_t last = std::min(shift + i * HUGE_PAGE, bytes_);
                if (first >= last) return;
#ifdef MADV_NOHUGEPAGE
                if (slow) madvise(data_ + first, last - first, MADV_NOHUGEPAGE);
#endif
                const auto start = std::chrono::steady_clock::now();
                touch(first, last);
                if (std::chrono::steady_clock::now() - start > std::chrono::milliseconds(1)) slow = true;
            };
        });
    }
    ~Arena() {
        std::free(heap_);
#ifdef PARA_HAS_MMAP
        if (data_ && !heap_) munmap(data_, bytes_);
#endif
    }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }

  private:
    static constexpr size_t HUGE_PAGE = size_t{2} << 20, PAGE = 4096;
#ifdef PARA_HAS_MMAP
    static constexpr size_t SMALL = 4 * HUGE_PAGE;
#else
    static constexpr size_t SMALL = ~size_t{0} - PAGE;
#endif

    void touch(size_t first, size_t last) {
#ifdef MADV_POPULATE_WRITE
        const size_t down = first / PAGE * PAGE;
        if (madvise(data_ + down, last - down, MADV_POPULATE_WRITE) == 0) return;
#endif
        for (size_t at = first; at < last; at += PAGE) static_cast<volatile char*>(data_)[at] = 0;
    }

    void* heap_ = nullptr;
    char* data_ = nullptr;
    size_t bytes_;
};

}  // namespace para
