// Grouped SwiGLU on the CPU, fp32 and fp64: see ds_remoe/kernels/grouped_swiglu.py for what it computes.
//
// Every GEMM runs on one thread, as threads that share a small GEMM mostly wait for each other. Forward the pairs go
// through in blocks of rows that stay in cache, whichever thread is free taking the next. Backward an expert's blocks
// add to one weight gradient, so small experts run side by side, and an expert with a large share of the pairs alone,
// its rows and then its weight gradients divided among all threads. Each pair's result stands in a buffer of its own
// until a row's pairs are summed in the order of the experts, so the result does not depend on which thread came first.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "cpu_expert.h"
#include "cpu_rows.h"

namespace {

using namespace ds_remoe;

constexpr int64_t kParts = 4;  // of a wide expert's weight gradients for each thread, so that none waits long

// `down` may be null where only the up-projection is wanted.
template <typename T>
Expert<T> expert_of(const Tensor& gate_up, const T* down, int64_t index) {
  const int64_t width = gate_up.size(1) / 2, hidden = gate_up.size(2);
  return {gate_up.const_data_ptr<T>() + index * 2 * width * hidden, down ? down + index * hidden * width : nullptr,
          hidden, width};
}

template <typename T>
Tensor forward_typed(const Tensor& rows, const Tensor& row_ids, const Tensor& weights, at::IntArrayRef counts,
                     const Tensor& gate_up, const Tensor& down, Tensor& out, bool accumulate) {
  const int64_t num_pairs = row_ids.size(0), width = down.size(2), hidden = rows.size(1);
  Tensor pre = at::empty({num_pairs, 2 * width}, rows.options());
  Tensor results = at::empty({num_pairs, hidden}, rows.options());
  const int64_t* ids = row_ids.const_data_ptr<int64_t>();
  run_largest_first(row_blocks(counts), [&](const Span& block) {
    expert_of<T>(gate_up, down.const_data_ptr<T>(), block.expert)
        .forward(rows.const_data_ptr<T>(), ids + block.start, block.count, weights.const_data_ptr<T>() + block.start,
                 pre.mutable_data_ptr<T>() + block.start * 2 * width,
                 results.mutable_data_ptr<T>() + block.start * hidden);
  });
  sum_into<T>(out, results, ids, accumulate);
  return pre;
}

template <typename T>
Tensor up_projection_typed(const Tensor& rows, const Tensor& row_ids, at::IntArrayRef counts, const Tensor& gate_up) {
  Tensor pre = at::empty({row_ids.size(0), gate_up.size(1)}, rows.options());
  const int64_t* ids = row_ids.const_data_ptr<int64_t>();
  run_largest_first(row_blocks(counts), [&](const Span& block) {
    expert_of<T>(gate_up, nullptr, block.expert)
        .up_projection(rows.const_data_ptr<T>(), ids + block.start, block.count,
                       pre.mutable_data_ptr<T>() + block.start * pre.size(1), [](auto...) {});
  });
  return pre;
}

// Backward of one call: what all its experts share, and its two ways through an expert.
template <typename T>
struct Backward {
  const Tensor &grad_out, &rows, &gate_up, &down;
  const int64_t* ids;
  const T *weight, *pre;
  Tensor &grad_gate_up, &grad_down;
  bool accumulate;
  Tensor results, grad_weights;

  // One expert on the calling thread.
  void narrow(const Span& span) const {
    for (const Span& block : blocks_of(span, kBlockRows)) {
      const WeightFactors<T> factors = rows_backward(block);
      weights_backward(factors, block, 0, 1, accumulate || block.start != span.start);
    }
  }

  // One expert on all threads: first each takes some rows, then some of the weights.
  void wide(const Span& span) const {
    const int64_t threads = at::get_num_threads();
    for (const Span& block : blocks_of(span, kBlockRows * threads)) {
      const std::vector<Span> shares = shares_of(block);
      std::vector<std::optional<WeightFactors<T>>> factors(shares.size());
      run_side_by_side(shares.size(), [&](size_t i) { factors[i].emplace(rows_backward(shares[i])); });
      run_side_by_side(threads * kParts, [&](size_t part) {
        for (size_t i = 0; i < shares.size(); ++i) {
          const bool add = accumulate || block.start != span.start || i > 0;
          weights_backward(*factors[i], block, part, threads * kParts, add);
        }
      });
    }
  }

 private:
  WeightFactors<T> rows_backward(const Span& block) const {
    const int64_t start = block.start, hidden = rows.size(1);
    return expert_of<T>(gate_up, down.const_data_ptr<T>(), block.expert)
        .backward(grad_out.const_data_ptr<T>(), rows.const_data_ptr<T>(), ids + start, block.count, weight + start,
                  pre + start * gate_up.size(1), grad_weights.mutable_data_ptr<T>() + start,
                  results.mutable_data_ptr<T>() + start * hidden);
  }

  // Share `part` of `parts` of the gradients of the block's expert.
  void weights_backward(const WeightFactors<T>& factors, const Span& block, int64_t part, int64_t parts,
                        bool add) const {
    T* to_gate_up = grad_gate_up.mutable_data_ptr<T>() + block.expert * gate_up.size(1) * gate_up.size(2);
    T* to_down = grad_down.mutable_data_ptr<T>() + block.expert * down.size(1) * down.size(2);
    add ? factors.template multiply<true>(part, parts, to_gate_up, to_down)
        : factors.template multiply<false>(part, parts, to_gate_up, to_down);
  }
};

template <typename T>
Tensor backward_typed(const Tensor& grad_out, const Tensor& rows, const Tensor& row_ids, const Tensor& weights,
                      at::IntArrayRef counts, const Tensor& gate_up, const Tensor& down, const Tensor& pre,
                      Tensor& grad_rows, Tensor& grad_gate_up, Tensor& grad_down, bool accumulate_rows,
                      bool accumulate_weights) {
  const int64_t num_pairs = row_ids.size(0);
  Backward<T> backward{grad_out,
                       rows,
                       gate_up,
                       down,
                       row_ids.const_data_ptr<int64_t>(),
                       weights.const_data_ptr<T>(),
                       pre.const_data_ptr<T>(),
                       grad_gate_up,
                       grad_down,
                       accumulate_weights,
                       at::empty({num_pairs, rows.size(1)}, rows.options()),
                       at::empty({num_pairs}, weights.options())};
  const Spans spans(counts);
  for (const Span& span : spans.wide) backward.wide(span);
  run_largest_first(spans.narrow, [&](const Span& span) { backward.narrow(span); });
  if (!accumulate_weights) {
    for (size_t e = 0; e < counts.size(); ++e) {
      if (counts[e] == 0) {
        grad_gate_up[e].zero_();
        grad_down[e].zero_();
      }
    }
  }
  sum_into<T>(grad_rows, backward.results, backward.ids, accumulate_rows);
  return backward.grad_weights;
}

Tensor forward(const Tensor& rows, const Tensor& row_ids, const Tensor& weights, at::IntArrayRef counts,
               const Tensor& gate_up, const Tensor& down, Tensor& out, bool accumulate) {
  return rows.scalar_type() == at::kFloat
             ? forward_typed<float>(rows, row_ids, weights, counts, gate_up, down, out, accumulate)
             : forward_typed<double>(rows, row_ids, weights, counts, gate_up, down, out, accumulate);
}

Tensor up_projection(const Tensor& rows, const Tensor& row_ids, at::IntArrayRef counts, const Tensor& gate_up) {
  return rows.scalar_type() == at::kFloat ? up_projection_typed<float>(rows, row_ids, counts, gate_up)
                                          : up_projection_typed<double>(rows, row_ids, counts, gate_up);
}

Tensor backward(const Tensor& grad_out, const Tensor& rows, const Tensor& row_ids, const Tensor& weights,
                at::IntArrayRef counts, const Tensor& gate_up, const Tensor& down, const Tensor& pre, Tensor& grad_rows,
                Tensor& grad_gate_up, Tensor& grad_down, bool accumulate_rows, bool accumulate_weights) {
  TORCH_CHECK(grad_gate_up.is_contiguous() && grad_down.is_contiguous(), "the weights' gradients must be contiguous");
  const auto typed = rows.scalar_type() == at::kFloat ? backward_typed<float> : backward_typed<double>;
  return typed(grad_out, rows, row_ids, weights, counts, gate_up, down, pre, grad_rows, grad_gate_up, grad_down,
               accumulate_rows, accumulate_weights);
}

}  // namespace

TORCH_LIBRARY(ds_remoe, library) {
  library.def(
      "grouped_swiglu(Tensor rows, Tensor row_ids, Tensor weights, int[] counts, Tensor gate_up, Tensor down, "
      "Tensor(a!) out, bool accumulate) -> Tensor");
  library.def("grouped_up_projection(Tensor rows, Tensor row_ids, int[] counts, Tensor gate_up) -> Tensor");
  library.def(
      "grouped_swiglu_backward(Tensor grad_out, Tensor rows, Tensor row_ids, Tensor weights, int[] counts, "
      "Tensor gate_up, Tensor down, Tensor pre_activation, Tensor(a!) grad_rows, Tensor(b!) grad_gate_up, "
      "Tensor(c!) grad_down, bool accumulate_rows, bool accumulate_weights) -> Tensor");
}

// Under the CPU's key and not for all, so that a dispatch mode such as torch's FlopCounterMode sees the call.
TORCH_LIBRARY_IMPL(ds_remoe, CPU, library) {
  library.impl("grouped_swiglu", &forward);
  library.impl("grouped_up_projection", &up_projection);
  library.impl("grouped_swiglu_backward", &backward);
}
