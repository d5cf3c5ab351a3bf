// GEMMs of a block of tokens with an expert's weights, on one thread.
//
// A library's GEMM first copies the weights into an order of its own, which for the few tokens of one expert among many
// takes as long as the products. Here the tokens are put in order instead, and weights and their gradients are read and
// written once, where they stand. In that order, "panels", a matrix is [columns / kWidth][rows][kWidth], the last panel
// filled up with zeros.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu_transpose.h"

namespace ds_remoe {

// Memory of one thread for a while.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : tensor_(at::empty({size}, c10::CppTypeToScalarType<T>::value)) {}
  T* get() { return tensor_.mutable_data_ptr<T>(); }
  operator T*() { return get(); }
  operator const T*() const { return tensor_.const_data_ptr<T>(); }

 private:
  at::Tensor tensor_;
};

template <typename T>
struct Panels {
  using Vec = at::vec::Vectorized<T>;
  static constexpr int64_t kWidth = 2 * Vec::size();
  // Rows of a tile of kWidth columns, 6 of which fill AVX2's registers; and the depth of the sums that a tile adds at
  // once where weights are in rows, a multiple of both.
#ifdef CPU_CAPABILITY_AVX512
  static constexpr int64_t kRows = 8, kDepth = 64;
#else
  static constexpr int64_t kRows = 6, kDepth = 96;
#endif
  static_assert(kDepth % kRows == 0 && kDepth % kWidth == 0);

  static int64_t count(int64_t columns) { return (columns + kWidth - 1) / kWidth; }
  static int64_t size(int64_t rows, int64_t columns) { return count(columns) * rows * kWidth; }

  // A matrix [rows, columns] in blocks of kDepth columns, [columns / kDepth][rows][kDepth]: where column `k` of row 0
  // stands, and how far apart the rows of its block are.
  static int64_t block_start(int64_t k, int64_t rows) { return k / kDepth * kDepth * rows + k % kDepth; }
  static int64_t block_stride(int64_t k, int64_t columns) { return std::min(kDepth, columns - k / kDepth * kDepth); }

  // c[R, kWidth] (+)= a[R, depth] · panel[depth, kWidth], the entries of `a` being a_row and a_column apart.
  template <int R, bool add>
  static inline __attribute__((always_inline)) void tile(const T* a, int64_t a_row, int64_t a_column, const T* panel,
                                                         int64_t depth, T* c, int64_t c_row) {
    constexpr int64_t kLanes = Vec::size();
    Vec left[R], right[R];
    for (int i = 0; i < R; ++i) {
      left[i] = add ? Vec::loadu(c + i * c_row) : Vec(T(0));
      right[i] = add ? Vec::loadu(c + i * c_row + kLanes) : Vec(T(0));
    }
    for (int64_t k = 0; k < depth; ++k) {
      const Vec first = Vec::loadu(panel + k * kWidth), second = Vec::loadu(panel + k * kWidth + kLanes);
      for (int i = 0; i < R; ++i) {
        const Vec factor(a[i * a_row + k * a_column]);
        left[i] = at::vec::fmadd(factor, first, left[i]);
        right[i] = at::vec::fmadd(factor, second, right[i]);
      }
    }
    for (int i = 0; i < R; ++i) {
      left[i].store(c + i * c_row);
      right[i].store(c + i * c_row + kLanes);
    }
  }

  // work(R) with the number of a tile's rows as a constant.
  template <typename Work>
  static void for_rows(int64_t rows, const Work& work) {
    static_assert(kRows <= 8);
    switch (rows) {
      case 8: return work(std::integral_constant<int, 8>());
      case 7: return work(std::integral_constant<int, 7>());
      case 6: return work(std::integral_constant<int, 6>());
      case 5: return work(std::integral_constant<int, 5>());
      case 4: return work(std::integral_constant<int, 4>());
      case 3: return work(std::integral_constant<int, 3>());
      case 2: return work(std::integral_constant<int, 2>());
      default: return work(std::integral_constant<int, 1>());
    }
  }

  // Row `row` of panels with `rows` rows, from memory.
  static void put(const T* from, int64_t columns, T* panels, int64_t rows, int64_t row) {
    int64_t j = 0;
    for (; (j + 1) * kWidth <= columns; ++j) {
      std::memcpy(panels + (j * rows + row) * kWidth, from + j * kWidth, kWidth * sizeof(T));
    }
    if (const int64_t left = columns - j * kWidth; left > 0) {
      T* last = panels + (j * rows + row) * kWidth;
      std::memcpy(last, from + j * kWidth, left * sizeof(T));
      std::fill(last + left, last + kWidth, T(0));
    }
  }

  // And back.
  static void take(const T* panels, int64_t rows, int64_t row, T* to, int64_t columns) {
    for (int64_t j = 0; j * kWidth < columns; ++j) {
      const int64_t width = std::min(kWidth, columns - j * kWidth);
      std::memcpy(to + j * kWidth, panels + (j * rows + row) * kWidth, width * sizeof(T));
    }
  }

  // Panels of the transpose of [tokens, columns]; `row_of(i)` is where token i stands.
  template <typename RowOf>
  static void put_transposed(const RowOf& row_of, int64_t tokens, int64_t columns, T* panels) {
    for (int64_t first = 0; first < tokens; first += kWidth, panels += columns * kWidth) {
      const int64_t width = std::min(kWidth, tokens - first);
      transpose([&](int64_t q) { return row_of(first + q); }, width, columns, panels, kWidth);
      if (width < kWidth) {
        for (int64_t k = 0; k < columns; ++k) std::fill(panels + k * kWidth + width, panels + (k + 1) * kWidth, T(0));
      }
    }
  }

  // And back: rows [tokens, columns], `stride` apart.
  static void take_transposed(const T* panels, int64_t tokens, int64_t columns, T* to, int64_t stride) {
    for (int64_t first = 0; first < tokens; first += kWidth, panels += columns * kWidth) {
      const int64_t width = std::min(kWidth, tokens - first);
      transpose([&](int64_t k) { return panels + k * kWidth; }, columns, width, to + first * stride, stride);
    }
  }

  // Panels of matrix[rows, depth] · (panels of [depth, tokens]): the matrix is read row by row.
  static void matrix_times(const T* matrix, int64_t rows, int64_t depth, const T* panels, int64_t tokens, T* out) {
    for (int64_t i = 0; i < rows; i += kRows) {
      for_rows(std::min(kRows, rows - i), [&](auto some) {
        for (int64_t j = 0; j < count(tokens); ++j) {
          tile<some, false>(matrix + i * depth, depth, 1, panels + j * depth * kWidth, depth,
                            out + (j * rows + i) * kWidth, kWidth);
        }
      });
    }
  }

  // Panels of (blocks of [tokens, depth]) · matrix[depth, columns], added to what `out` holds where `add` says so: the
  // matrix is read in blocks of kDepth rows.
  static void times_matrix(const T* blocks, int64_t tokens, int64_t depth, const T* matrix, int64_t columns, T* out,
                           bool add) {
    const int64_t groups = (tokens + kRows - 1) / kRows;
    T panel[kDepth * kWidth];
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t rows = block_stride(k, depth);
      const T* block = blocks + block_start(k, tokens);
      for (int64_t j = 0; j < count(columns); ++j) {
        const T* from = matrix + k * columns + j * kWidth;
        const int64_t width = std::min(kWidth, columns - j * kWidth);
        if (width == kWidth) {
          for (int64_t q = 0; q < rows; ++q, from += columns) {
            __builtin_prefetch(from + kWidth);
            std::memcpy(panel + q * kWidth, from, kWidth * sizeof(T));
          }
        } else {
          for (int64_t q = 0; q < rows; ++q, from += columns) put(from, width, panel, rows, q);
        }
        T* to = out + j * tokens * kWidth;
        for (int64_t g = 0; g < groups; ++g) {  // even ones, as a tile of few rows waits for its own sums
          const int64_t first = tokens * g / groups, some = tokens * (g + 1) / groups - first;
          for_rows(some, [&](auto r) {
            const T* left = block + first * rows;
            if (add || k > 0) {
              tile<r, true>(left, rows, 1, panel, rows, to + first * kWidth, kWidth);
            } else {
              tile<r, false>(left, rows, 1, panel, rows, to + first * kWidth, kWidth);
            }
          });
        }
      }
    }
  }

  // Rows [first, last) of matrix[rows, columns] (+)= (blocks of [tokens, rows])ᵀ · (panels of [tokens, columns]): they
  // are written row by row. `first` is a multiple of kRows.
  template <bool add>
  static void add_outer(const T* blocks, int64_t rows, int64_t first, int64_t last, int64_t tokens, const T* panels,
                        int64_t columns, T* matrix) {
    const int64_t whole = columns / kWidth, left = columns - whole * kWidth;
    for (int64_t i = first; i < last; i += kRows) {
      for_rows(std::min(kRows, last - i), [&](auto some) {
        const T *factors = blocks + block_start(i, tokens), *part = panels + whole * tokens * kWidth;
        const int64_t step = block_stride(i, rows);
        T* to = matrix + i * columns;
        for (int64_t j = 0; j < whole; ++j) {
          tile<some, add>(factors, 1, step, panels + j * tokens * kWidth, tokens, to + j * kWidth, columns);
        }
        if (left > 0) {
          T sums[some * kWidth];
          tile<some, false>(factors, 1, step, part, tokens, sums, kWidth);
          for (int64_t r = 0; r < some; ++r) {
            T* row = to + r * columns + whole * kWidth;
            for (int64_t q = 0; q < left; ++q) row[q] = sums[r * kWidth + q] + (add ? row[q] : T(0));
          }
        }
      });
    }
  }
};

}  // namespace ds_remoe
