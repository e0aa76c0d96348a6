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

__device__ __forceinline__ Tall tall(const Problem& p, bool is_a) {
    const Matrix& x = is_a ? p.a : p.b;
    const auto* data = static_cast<const char*>(x.data);
    const int columns = static_cast<int>(p.rank());
    if (is_a) return {data, x.cols, x.col_stride, x.row_stride, columns, x.dtype};
    return {data, x.rows, x.row_stride, x.col_stride, columns, x.dtype};
}

// Reads panels of X: so many rows, and two blocks of columns (or one). Threads take chunks: 16 bytes, or one element.
class PanelReader {
  public:
    // The columns from `left` on.
    __device__ PanelReader(const Tall& x, int left, int width) : PanelReader(x, left, width, left, 0) {}

    // The columns from `left` on, and from column `split` of the panel on those from `right` on instead.
    __device__ PanelReader(const Tall& x, int left, int width, int right, int split)
        : x_(x), width_(width), left_(left), jump_(right - left - split), split_(split) {
        const int most = 16 / bytes_of(x.dtype);
        const auto aligned = [&](int64_t stride) { return stride % most == 0; };
        const bool start = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
        if (x.down == 1) {
            order_ = Order::down;
            chunk_ = start && (aligned(x.across) || x.columns == 1) ? most : 1;
        } else if (x.across == 1 && x.down == width && width == x.columns) {
            order_ = Order::flat;
            chunk_ = start ? most : 1;
        } else {
            order_ = Order::across;
            chunk_ = start && x.across == 1 && aligned(x.down) && left % most == 0 && right % most == 0 ? most : 1;
        }
    }

    __device__ bool in_chunks() const { return chunk_ > 1; }

    // How many rows a panel can have whose rows take `apart` doubles; a multiple of 8 (that keeps chunks aligned), but
    // for single elements.
    __device__ int most_rows(int apart) const {
        const int slots = PREFETCH * static_cast<int>(blockDim.x) * chunk_ / width_;
        const int rows = PANEL / apart < slots ? PANEL / apart : slots;
        return rows >= 8 ? rows & ~7 : rows;
    }

    // Starts to load this thread's chunks of the rows from `first` on.
    __device__ void fetch(int64_t first, int count, uint4 (&raw)[PREFETCH]) const {
#pragma unroll
        for (int i = 0; i < PREFETCH; ++i) {
            const Place at = place(count, threadIdx.x + i * blockDim.x);
            if (at.elements > 0) raw[i] = load(first + at.row, at.column, at.elements);
        }
    }

    // panel [count, width], rows `apart` doubles from one to the next ← what was fetched.
    __device__ void put(int count, const uint4 (&raw)[PREFETCH], double* panel, int apart) const {
        with_format(x_.dtype, [&](auto format) {
            using Format = decltype(format);
            constexpr int SIZE = sizeof(typename Format::Storage), ALL = 16 / SIZE;
#pragma unroll
            for (int i = 0; i < PREFETCH; ++i) {
                Place at = place(count, threadIdx.x + i * blockDim.x);
                const uint32_t words[] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
                double* to = panel + at.row * apart + at.column;
#pragma unroll
                for (int e = 0; e < ALL; ++e) {
                    if (e >= at.elements) break;
                    const uint32_t word = words[e * SIZE / 4];
                    *to = Format::load(static_cast<typename Format::Storage>(SIZE == 2 && e % 2 ? word >> 16 : word));
                    if (order_ == Order::down) {
                        to += apart;
                    } else if (++at.column == width_) {
                        at.column = 0;
                        to += apart - width_ + 1;
                    } else {
                        ++to;
                    }
                }
            }
        });
    }

  private:
    enum class Order { down, flat, across };  // elements of a chunk: of a column, of rows without a gap, of a row

    struct Place {
        int row, column, elements;
    };

    // Where the panel's chunk of this number starts, and how much of it there is.
    __device__ Place place(int count, int chunk) const {
        Place at;
        int left;
        if (order_ == Order::down) {
            // Two chunks of a column make a whole sector of 32 bytes; then the next column.
            const int together = chunk_ > 1 ? 2 : count >= 8 ? 8 : 1;
            const int group = chunk / together;
            at.column = group % width_;
            at.row = (group / width_ * together + chunk % together) * chunk_;
            left = count - at.row;
        } else {
            const int length = order_ == Order::flat ? count * width_ : width_;
            const int run = (length + chunk_ - 1) / chunk_;  // chunks
            const int along = (order_ == Order::flat ? chunk : chunk % run) * chunk_;
            at.row = order_ == Order::flat ? along / width_ : chunk / run;
            at.column = order_ == Order::flat ? along % width_ : along;
            left = at.row < count ? length - along : 0;
        }
        at.elements = left < 0 ? 0 : left < chunk_ ? left : chunk_;
        return at;
    }

    __device__ uint4 load(int64_t row, int column, int elements) const {
        const int size = bytes_of(x_.dtype);
        const int64_t first = row * x_.down + (left_ + column + (column >= split_ ? jump_ : 0)) * x_.across;
        const char* from = x_.data + first * size;
        if (elements * size == 16) return read(reinterpret_cast<const uint4*>(from));
        // The end of a run, or single elements; those of a chunk lie side by side.
        uint32_t words[4] = {};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            if (e >= elements) break;
            if (size == 4) {
                if (e < 4) words[e % 4] = read(reinterpret_cast<const uint32_t*>(from) + e);
            } else {
                words[e / 2] |= static_cast<uint32_t>(read(reinterpret_cast<const uint16_t*>(from) + e))
                                << (e % 2 * 16);
            }
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }

    Tall x_;
    int width_, left_, jump_, split_;
    int chunk_ = 1;
    Order order_ = Order::across;
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
