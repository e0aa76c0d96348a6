// Panels: rows of a factor on their way to shared memory, and of a new one on their way back, 16 bytes at a time where
// the layout allows it.
#pragma once

#include "formats.cuh"
#include "work.h"

namespace para::cuda {

// A factor as X [rows, columns], tall: B, or Aᵀ.
struct Tall {
    const char* data;
    int64_t rows;
    int64_t down, across;  // strides in elements
    int columns;
    DType dtype;
};

// Member by member: a reference to one of two matrices would put both in local memory.
__device__ __forceinline__ Tall tall(const Problem& p, bool is_a) {
    return {static_cast<const char*>(is_a ? p.a.data : p.b.data),
            is_a ? p.a.cols : p.b.rows,
            is_a ? p.a.col_stride : p.b.row_stride,
            is_a ? p.a.row_stride : p.b.col_stride,
            static_cast<int>(p.rank()),
            is_a ? p.a.dtype : p.b.dtype};
}

// How X's elements are read: in chunks of 16 bytes where the layout allows it, else one by one.
enum class Order { down, flat, across };  // a chunk is of a column, of rows without a gap between them, of a row

struct Layout {
    Order order;
    int chunk;  // elements
};

// `all`: panels have all columns of X; otherwise their blocks of columns start at multiples of 8.
__device__ __forceinline__ Layout layout_of(const Tall& x, bool all) {
    const int most = 16 / bytes_of(x.dtype);
    const auto aligned = [&](int64_t stride) { return (stride & (most - 1)) == 0; };
    const bool start = (reinterpret_cast<uintptr_t>(x.data) & 15) == 0;
    if (x.down == 1) return {Order::down, start && (aligned(x.across) || x.columns == 1) ? most : 1};
    const bool rows = start && x.across == 1;
    // Rows without gaps become a panel without gaps; its rows must still start at 16 bytes.
    if (rows && all && !aligned(x.down) && x.down == x.columns && x.columns % 2 == 0) return {Order::flat, most};
    return {Order::across, rows && aligned(x.down) ? most : 1};
}

// Doubles from row to row of a panel: an odd number of 16 bytes where that is free, so that rows don't share banks.
__device__ __forceinline__ int apart_of(Layout layout, int width) {
    return layout.order == Order::flat ? width : (width + 1) / 2 * 2 + (width / 2 % 2 ? 0 : 2);
}

// How many rows a panel can have in memory, and in what a block's threads load at a time. A multiple of 8, which keeps
// chunks aligned; of single elements there may be fewer.
__device__ __forceinline__ int most_rows(Layout layout, int width, int apart, int memory) {
    const int slots = PREFETCH * static_cast<int>(blockDim.x), run = (width + layout.chunk - 1) / layout.chunk;
    const int loads = layout.order == Order::across ? slots / run : slots * layout.chunk / width;
    const int rows = min(memory / apart, loads);
    return rows >= 8 ? rows & ~7 : rows;
}

// x, of which the compiler knows nothing: what is made of it in a loop is not made ahead and kept in registers.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Reads panels of up to [height, width]. Each thread has the same PREFETCH chunks of every panel.
class PanelReader {
  public:
    // The panel's columns from `split` on are `jump` further to the right in X.
    __device__ __forceinline__ PanelReader(const Tall& x, Layout layout, int height, int width, int split, int jump)
        : data_(x.data),
          down_(x.down),
          across_(x.across),
          dtype_(x.dtype),
          layout_(layout),
          width_(width),
          split_(split),
          jump_(jump) {
        const auto size = static_cast<unsigned>(layout.chunk), wide = static_cast<unsigned>(width);
#pragma unroll
        for (int i = 0; i < PREFETCH; ++i) {
            const unsigned chunk = threadIdx.x + static_cast<unsigned>(i) * blockDim.x;
            unsigned row, column;
            if (layout.order == Order::down) {
                // Two chunks of a column make a whole sector of 32 bytes; then the next column.
                const unsigned together = size > 1 ? 2 : height >= 8 ? 8 : 1, group = chunk / together;
                column = group % wide;
                row = (group / wide * together + chunk % together) * size;
            } else if (layout.order == Order::flat) {
                row = chunk * size / wide;
                column = chunk * size % wide;
            } else {
                const unsigned run = (wide + size - 1) / size;
                row = chunk / run;
                column = chunk % run * size;
            }
            place_[i] = static_cast<int>(min(row, static_cast<unsigned>(height)) << 16 | column);
        }
    }

    // Starts to load this thread's part of `count` rows from `first` on and `width` columns from `left` on.
    __device__ __forceinline__ void fetch(int64_t first, int count, int left, int width, uint4 (&raw)[PREFETCH]) const {
        const int size = bytes_of(dtype_);
#pragma unroll
        for (int i = 0; i < PREFETCH; ++i) {
            const Chunk chunk = chunk_of(i, count, width);
            if (chunk.elements == 0) continue;
            const int column = left + chunk.column + (chunk.column >= split_ ? jump_ : 0);
            raw[i] = load(data_ + ((first + chunk.row) * down_ + column * across_) * size, chunk.elements);
        }
    }

    // panel [count, width], rows `apart` doubles from one to the next ← what was fetched.
    __device__ __forceinline__ void put(int count, int width, const uint4 (&raw)[PREFETCH], double* panel,
                                        int apart) const {
        switch (dtype_) {
            case DType::f32:
                return put_as<F32>(count, width, raw, panel, apart);
            case DType::f16:
                return put_as<F16>(count, width, raw, panel, apart);
            case DType::bf16:
                return put_as<BF16>(count, width, raw, panel, apart);
        }
    }

  private:
    struct Chunk {
        int row, column, elements;
    };

    // This thread's chunk number i of a panel [count, width].
    __device__ __forceinline__ Chunk chunk_of(int i, int count, int width) const {
        const int place = opaque(place_[i]), row = place >> 16, column = place & 0xffff;
        int left = layout_.order == Order::down   ? count - row
                   : layout_.order == Order::flat ? (count - row) * width_ - column
                                                  : width - column;
        if (row >= count || column >= width) left = 0;
        return {row, column, min(left, layout_.chunk)};
    }

    template <class Format>
    __device__ __forceinline__ void put_as(int count, int width, const uint4 (&raw)[PREFETCH], double* panel,
                                           int apart) const {
        constexpr int SIZE = sizeof(typename Format::Storage), ALL = 16 / SIZE;
        apart = opaque(apart);
        const int next = layout_.order == Order::down ? apart : 1;
#pragma unroll
        for (int i = 0; i < PREFETCH; ++i) {
            const Chunk chunk = chunk_of(i, count, width);
            const uint32_t words[] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
            double* to = panel + chunk.row * apart + chunk.column;
#pragma unroll
            for (int e = 0; e < ALL; ++e, to += next) {
                if (e >= chunk.elements) continue;
                const uint32_t word = words[e * SIZE / 4];
                *to = Format::load(static_cast<typename Format::Storage>(SIZE == 2 && e % 2 ? word >> 16 : word));
            }
        }
    }

    __device__ __forceinline__ uint4 load(const char* from, int elements) const {
        const int size = bytes_of(dtype_);
        if (elements * size == 16) return read(reinterpret_cast<const uint4*>(from));
        // The end of a run, or single elements; those of a chunk lie side by side.
        uint32_t words[4] = {};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            if (e >= elements) {
            } else if (size == 2) {
                const uint32_t half = read(reinterpret_cast<const uint16_t*>(from) + e);
                words[e / 2] |= half << (e % 2 * 16);
            } else if (e < 4) {
                words[e % 4] = read(reinterpret_cast<const uint32_t*>(from) + e);
            }
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }

    const char* data_;
    int64_t down_, across_;
    DType dtype_;
    Layout layout_;
    int width_, split_, jump_;
    int place_[PREFETCH];  // row and column of each chunk, in 16 bits
};

// Column i of a strip, of so many: strips are made of pairs of columns, I, I + strips, I + 2·strips …, so that
// neighbouring threads read neighbouring 16 bytes.
__device__ __forceinline__ int column_of(int strip, int strips, int i) {
    return (i / 2 * strips + strip) * 2 + i % 2;
}

// Where a panel of outputs goes: runs of elements side by side, in shared memory `stage` elements from one to the next,
// `apart` in global memory.
struct Runs {
    char* out;
    int runs, length, stage;
    int64_t apart;
};

template <class Storage>
__device__ __forceinline__ void write_runs(const Runs& to, const Storage* staged) {
    constexpr int SIZE = sizeof(Storage), ALL = 16 / SIZE;
    const bool aligned = reinterpret_cast<uintptr_t>(to.out) % 16 == 0 && (to.runs == 1 || to.apart % ALL == 0);
    const int chunk = aligned ? ALL : 1, chunks = (to.length + chunk - 1) / chunk;
    for (int c = static_cast<int>(threadIdx.x); c < to.runs * chunks; c += static_cast<int>(blockDim.x)) {
        const int run = c / chunks, at = c % chunks * chunk;
        const Storage* const from = staged + run * to.stage + at;
        auto* const out = reinterpret_cast<Storage*>(to.out) + run * to.apart + at;
        if (aligned && at + chunk <= to.length) {
            write(reinterpret_cast<uint4*>(out), *reinterpret_cast<const uint4*>(from));
        } else {
            for (int e = 0; e < chunk && at + e < to.length; ++e) write(out + e, from[e]);
        }
    }
}

}  // namespace para::cuda
