// Arena: one block of fresh memory for all new factors of a call.
//
// Touching fresh pages costs more than the arithmetic that fills them; one private anonymous mapping with huge pages
// costs a few milliseconds where an allocation per tensor costs a hundred.
#pragma once

#include <cstddef>
#include <new>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#else
#include <cstdlib>
#endif

namespace para {

class Arena {
  public:
    explicit Arena(size_t bytes) : bytes_(bytes) {
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
