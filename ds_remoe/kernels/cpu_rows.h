// Pairs on the CPU: cut by expert and into blocks of rows, run over the threads, and summed row by row.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

namespace ds_remoe {

using at::Tensor;

constexpr int64_t kBlockRows = 512;
constexpr int64_t kLeastRows = 32;  // of a block, below which its GEMM mostly reads weights
constexpr int64_t kGrain = 32768;  // elements a thread takes at least

struct Span {
  int64_t expert, start, count;
};

// The pairs of each expert that has any; `is_wide` where the expert is to occupy all threads.
struct Spans {
  std::vector<Span> wide, narrow;

  explicit Spans(at::IntArrayRef counts) {
    const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0}), threads = at::get_num_threads();
    int64_t start = 0;
    for (size_t e = 0; e < counts.size(); ++e) {
      if (counts[e] > 0) {
        const bool is_wide = threads > 1 && counts[e] * threads * 2 > total;
        (is_wide ? wide : narrow).push_back({static_cast<int64_t>(e), start, counts[e]});
      }
      start += counts[e];
    }
  }
};

// Even blocks of at most `limit` of the span's pairs.
inline std::vector<Span> blocks_of(const Span& span, int64_t limit) {
  const int64_t blocks = (span.count + limit - 1) / limit;
  std::vector<Span> cut;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = span.count * b / blocks, last = span.count * (b + 1) / blocks;
    cut.push_back({span.expert, span.start + first, last - first});
  }
  return cut;
}

// Blocks of a wide expert's pairs, one or more for every thread as long as they have kLeastRows each.
inline std::vector<Span> shares_of(const Span& span) {
  const int64_t share = (span.count + at::get_num_threads() - 1) / at::get_num_threads();
  return blocks_of(span, std::clamp<int64_t>(share, kLeastRows, kBlockRows));
}

// All experts' blocks of rows.
inline std::vector<Span> row_blocks(at::IntArrayRef counts) {
  const Spans spans(counts);
  std::vector<Span> blocks;
  for (const Span& span : spans.wide) {
    for (const Span& block : shares_of(span)) blocks.push_back(block);
  }
  for (const Span& span : spans.narrow) {
    for (const Span& block : blocks_of(span, kBlockRows)) blocks.push_back(block);
  }
  return blocks;
}

// Runs work(i) for i < number, each on one thread.
template <typename Work>
void run_side_by_side(size_t number, const Work& work) {
  std::atomic<size_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), number), 1, [&](int64_t, int64_t) {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (size_t i = next++; i < number; i = next++) work(i);
  });
}

// Runs work(span) for all, each on one thread, the largest first so that the last one to end is short.
template <typename Work>
void run_largest_first(std::vector<Span> spans, const Work& work) {
  std::stable_sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.count > b.count; });
  run_side_by_side(spans.size(), [&](size_t i) { work(spans[i]); });
}

inline int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrain / width); }

// target[row] = Σ values[m] over the pairs m with ids[m] = row, in their order; `accumulate` adds that to what is there.
template <typename T>
void sum_into(Tensor& target, const Tensor& values, const int64_t* ids, bool accumulate) {
  const int64_t width = target.size(1), num_rows = target.size(0), num_pairs = values.size(0);
  std::vector<int64_t> first(num_rows + 1, 0), pairs(num_pairs);
  for (int64_t m = 0; m < num_pairs; ++m) ++first[ids[m] + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  {
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t m = 0; m < num_pairs; ++m) pairs[next[ids[m]]++] = m;
  }
  const T* from = values.const_data_ptr<T>();
  T* to = target.mutable_data_ptr<T>();
  at::parallel_for(0, num_rows, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* sum = to + row * width;
      int64_t i = first[row];
      if (!accumulate) {
        if (i == first[row + 1]) {
          std::fill_n(sum, width, T(0));
          continue;
        }
        std::memcpy(sum, from + pairs[i++] * width, width * sizeof(T));
      }
      for (; i < first[row + 1]; ++i) {
        const T* value = from + pairs[i] * width;
        for (int64_t d = 0; d < width; ++d) sum[d] += value[d];
      }
    }
  });
}

}  // namespace ds_remoe
