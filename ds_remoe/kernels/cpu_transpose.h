// Transposes of matrices that stay in cache.

#pragma once

#include <cstdint>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#define DS_REMOE_AVX2
#endif

namespace ds_remoe {

#ifdef DS_REMOE_AVX2
// to[c * stride + r] = from[r][c] for 8 rows and columns.
inline void transpose_8x8(const float* const* from, int64_t column, float* to, int64_t stride) {
  __m256 row[8], pair[8], four[8];
  for (int r = 0; r < 8; ++r) row[r] = _mm256_loadu_ps(from[r] + column);
  for (int r = 0; r < 8; r += 2) {
    pair[r] = _mm256_unpacklo_ps(row[r], row[r + 1]);
    pair[r + 1] = _mm256_unpackhi_ps(row[r], row[r + 1]);
  }
  for (int r = 0; r < 8; r += 4) {
    four[r] = _mm256_shuffle_ps(pair[r], pair[r + 2], 0x44);
    four[r + 1] = _mm256_shuffle_ps(pair[r], pair[r + 2], 0xee);
    four[r + 2] = _mm256_shuffle_ps(pair[r + 1], pair[r + 3], 0x44);
    four[r + 3] = _mm256_shuffle_ps(pair[r + 1], pair[r + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(to + c * stride, _mm256_permute2f128_ps(four[c], four[c + 4], 0x20));
    _mm256_storeu_ps(to + (c + 4) * stride, _mm256_permute2f128_ps(four[c], four[c + 4], 0x31));
  }
}
#endif

// to[c * stride + r] = row_of(r)[c] for c < columns.
template <typename T, typename RowOf>
void transpose(const RowOf& row_of, int64_t rows, int64_t columns, T* to, int64_t stride) {
  int64_t r = 0;
#ifdef DS_REMOE_AVX2
  if constexpr (std::is_same_v<T, float>) {
    for (; r + 8 <= rows; r += 8) {
      const float* from[8];
      for (int q = 0; q < 8; ++q) from[q] = row_of(r + q);
      int64_t c = 0;
      for (; c + 8 <= columns; c += 8) transpose_8x8(from, c, to + c * stride + r, stride);
      for (; c < columns; ++c) {
        for (int q = 0; q < 8; ++q) to[c * stride + r + q] = from[q][c];
      }
    }
  }
#endif
  for (; r < rows; ++r) {
    const T* from = row_of(r);
    for (int64_t c = 0; c < columns; ++c) to[c * stride + r] = from[c];
  }
}

}  // namespace ds_remoe
