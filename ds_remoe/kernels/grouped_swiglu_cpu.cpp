// Grouped SwiGLU on the CPU, fp32 and fp64: see ds_remoe/kernels/grouped_swiglu.py for what it computes.
//
// Small experts run side by side, one thread each, since a GEMM of few rows gains nothing from several threads; an
// expert with a large share of the pairs runs alone, with all threads inside its GEMMs. Rows go through in blocks that
// stay in cache. Each pair's result stands in a buffer of its own until a row's pairs are summed in the order of the
// experts, so the result does not depend on which thread came first.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t kBlockRows = 512;
constexpr int64_t kGrain = 32768;  // elements a thread takes at least

struct Span {
  int64_t expert, start, count;
};

// Experts that run with all threads, and the others, the largest first so that the last one to end is short.
struct Schedule {
  std::vector<Span> wide, narrow;

  explicit Schedule(at::IntArrayRef counts) {
    const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t{0});
    int64_t start = 0;
    for (size_t e = 0; e < counts.size(); ++e) {
      if (counts[e] > 0) {
        const bool is_wide = counts[e] * at::get_num_threads() * 2 > total;
        (is_wide ? wide : narrow).push_back({static_cast<int64_t>(e), start, counts[e]});
      }
      start += counts[e];
    }
    std::stable_sort(narrow.begin(), narrow.end(), [](const Span& a, const Span& b) { return a.count > b.count; });
  }

  template <typename Work>
  void run(const Work& work) const {
    for (const Span& span : wide) work(span);
    std::atomic<size_t> next{0};
    at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), narrow.size()), 1, [&](int64_t, int64_t) {
      for (size_t i = next++; i < narrow.size(); i = next++) work(narrow[i]);
    });
  }
};

template <typename Work>
void for_each_block(const Span& span, const Work& work) {
  const int64_t blocks = (span.count + kBlockRows - 1) / kBlockRows;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = span.count * b / blocks, last = span.count * (b + 1) / blocks;
    work(span.start + first, last - first, b == 0);
  }
}

int64_t grain(int64_t width) { return std::max<int64_t>(1, kGrain / width); }

template <typename T>
Tensor gather(const Tensor& source, const int64_t* ids, int64_t count) {
  const int64_t width = source.size(1);
  Tensor rows = at::empty({count, width}, source.options());
  const T* from = source.const_data_ptr<T>();
  T* to = rows.mutable_data_ptr<T>();
  at::parallel_for(0, count, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * width, from + ids[i] * width, width * sizeof(T));
  });
  return rows;
}

// target[ids[m]] += values[m], in the order of m within a row.
template <typename T>
void sum_into(Tensor& target, const Tensor& values, const int64_t* ids) {
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
      for (int64_t i = first[row]; i < first[row + 1]; ++i) {
        const T* value = from + pairs[i] * width;
        for (int64_t d = 0; d < width; ++d) sum[d] += value[d];
      }
    }
  });
}

template <typename T>
struct Activation {
  using Vec = at::vec::Vectorized<T>;
  static constexpr int64_t kLanes = Vec::size();

  static Vec sigmoid(const Vec& x) { return Vec(T(1)) / (Vec(T(1)) + x.neg().exp()); }

  // Lanes [h, h + kLanes) of a row, or what is left of it.
  static Vec load(const T* row, int64_t h, int64_t width) {
    return h + kLanes <= width ? Vec::loadu(row + h) : Vec::loadu(row + h, width - h);
  }

  static void store(const Vec& value, T* row, int64_t h, int64_t width) {
    if (h + kLanes <= width) {
      value.store(row + h);
    } else {
      value.store(row + h, width - h);
    }
  }

  static void forward_row(const T* gate_up, T weight, T* hidden, int64_t width) {
    for (int64_t h = 0; h < width; h += kLanes) {
      const Vec gate = load(gate_up, h, width), up = load(gate_up + width, h, width);
      store(gate * sigmoid(gate) * up * Vec(weight), hidden, h, width);
    }
  }

  // Returns the routing weight's gradient; `grad_hidden` is overwritten by the forward value w · silu(gate) · up.
  static T backward_row(T* grad_hidden, const T* gate_up, T weight, T* grad_gate_up, int64_t width) {
    Vec total(T(0));
    for (int64_t h = 0; h < width; h += kLanes) {
      const Vec gate = load(gate_up, h, width), up = load(gate_up + width, h, width), grad = load(grad_hidden, h, width);
      const Vec sig = sigmoid(gate), silu = gate * sig, hidden = silu * up, weighted = grad * Vec(weight);
      total = total + grad * hidden;
      store(weighted * up * (sig + silu * (Vec(T(1)) - sig)), grad_gate_up, h, width);
      store(weighted * silu, grad_gate_up + width, h, width);
      store(hidden * Vec(weight), grad_hidden, h, width);
    }
    T lanes[kLanes], sum = 0;
    total.store(lanes);
    for (T lane : lanes) sum += lane;
    return sum;
  }
};

template <typename T>
Tensor forward_typed(const Tensor& rows, const Tensor& in_ids, const Tensor& out_ids, const Tensor& weights,
                     at::IntArrayRef counts, const Tensor& gate_up, const Tensor& down, Tensor& out) {
  const int64_t num_pairs = in_ids.size(0), width = down.size(2);
  Tensor pre = at::empty({num_pairs, 2 * width}, rows.options());
  Tensor results = at::empty({num_pairs, rows.size(1)}, rows.options());
  const int64_t* in = in_ids.const_data_ptr<int64_t>();
  const T* weight = weights.const_data_ptr<T>();
  Schedule(counts).run([&](const Span& span) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor up_projection = gate_up[span.expert].t(), down_projection = down[span.expert].t();
    for_each_block(span, [&](int64_t start, int64_t count, bool) {
      Tensor block = pre.narrow(0, start, count);
      at::mm_out(block, gather<T>(rows, in + start, count), up_projection);
      Tensor hidden = at::empty({count, width}, rows.options());
      const T* from = block.const_data_ptr<T>();
      T* to = hidden.mutable_data_ptr<T>();
      at::parallel_for(0, count, grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          Activation<T>::forward_row(from + i * 2 * width, weight[start + i], to + i * width, width);
        }
      });
      Tensor result = results.narrow(0, start, count);
      at::mm_out(result, hidden, down_projection);
    });
  });
  sum_into<T>(out, results, out_ids.const_data_ptr<int64_t>());
  return pre;
}

template <typename T>
Tensor up_projection_typed(const Tensor& rows, const Tensor& in_ids, at::IntArrayRef counts, const Tensor& gate_up) {
  Tensor pre = at::empty({in_ids.size(0), gate_up.size(1)}, rows.options());
  const int64_t* in = in_ids.const_data_ptr<int64_t>();
  Schedule(counts).run([&](const Span& span) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor projection = gate_up[span.expert].t();
    for_each_block(span, [&](int64_t start, int64_t count, bool) {
      Tensor block = pre.narrow(0, start, count);
      at::mm_out(block, gather<T>(rows, in + start, count), projection);
    });
  });
  return pre;
}

template <typename T>
Tensor backward_typed(const Tensor& grad_out, const Tensor& rows, const Tensor& in_ids, const Tensor& out_ids,
                      const Tensor& weights, at::IntArrayRef counts, const Tensor& gate_up, const Tensor& down,
                      const Tensor& pre, Tensor& grad_rows, Tensor& grad_gate_up, Tensor& grad_down, bool accumulate) {
  const int64_t num_pairs = in_ids.size(0), width = down.size(2);
  Tensor grad_weights = at::empty({num_pairs}, weights.options());
  Tensor results = at::empty({num_pairs, rows.size(1)}, rows.options());
  const int64_t *in = in_ids.const_data_ptr<int64_t>(), *out = out_ids.const_data_ptr<int64_t>();
  const T *weight = weights.const_data_ptr<T>(), *pre_activation = pre.const_data_ptr<T>();
  T* grad_weight = grad_weights.mutable_data_ptr<T>();
  Schedule(counts).run([&](const Span& span) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor up_projection = gate_up[span.expert], down_projection = down[span.expert];
    Tensor up_gradient = grad_gate_up[span.expert], down_gradient = grad_down[span.expert];
    for_each_block(span, [&](int64_t start, int64_t count, bool is_first) {
      const int beta = accumulate || !is_first;
      const Tensor grad_result = gather<T>(grad_out, out + start, count);
      Tensor hidden = at::mm(grad_result, down_projection);
      Tensor grad_pre = at::empty({count, 2 * width}, rows.options());
      T *h = hidden.mutable_data_ptr<T>(), *g = grad_pre.mutable_data_ptr<T>();
      at::parallel_for(0, count, grain(width), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t m = start + i;
          grad_weight[m] = Activation<T>::backward_row(h + i * width, pre_activation + m * 2 * width, weight[m],
                                                       g + i * 2 * width, width);
        }
      });
      at::addmm_out(down_gradient, down_gradient, grad_result.t(), hidden, beta);
      at::addmm_out(up_gradient, up_gradient, grad_pre.t(), gather<T>(rows, in + start, count), beta);
      Tensor result = results.narrow(0, start, count);
      at::mm_out(result, grad_pre, up_projection);
    });
  });
  if (!accumulate) {
    for (size_t e = 0; e < counts.size(); ++e) {
      if (counts[e] == 0) {
        grad_gate_up[e].zero_();
        grad_down[e].zero_();
      }
    }
  }
  sum_into<T>(grad_rows, results, in);
  return grad_weights;
}

Tensor forward(const Tensor& rows, const Tensor& in_ids, const Tensor& out_ids, const Tensor& weights,
               at::IntArrayRef counts, const Tensor& gate_up, const Tensor& down, Tensor& out) {
  return rows.scalar_type() == at::kFloat
             ? forward_typed<float>(rows, in_ids, out_ids, weights, counts, gate_up, down, out)
             : forward_typed<double>(rows, in_ids, out_ids, weights, counts, gate_up, down, out);
}

Tensor up_projection(const Tensor& rows, const Tensor& in_ids, at::IntArrayRef counts, const Tensor& gate_up) {
  return rows.scalar_type() == at::kFloat ? up_projection_typed<float>(rows, in_ids, counts, gate_up)
                                          : up_projection_typed<double>(rows, in_ids, counts, gate_up);
}

Tensor backward(const Tensor& grad_out, const Tensor& rows, const Tensor& in_ids, const Tensor& out_ids,
                const Tensor& weights, at::IntArrayRef counts, const Tensor& gate_up, const Tensor& down,
                const Tensor& pre, Tensor& grad_rows, Tensor& grad_gate_up, Tensor& grad_down, bool accumulate) {
  return rows.scalar_type() == at::kFloat
             ? backward_typed<float>(grad_out, rows, in_ids, out_ids, weights, counts, gate_up, down, pre, grad_rows,
                                     grad_gate_up, grad_down, accumulate)
             : backward_typed<double>(grad_out, rows, in_ids, out_ids, weights, counts, gate_up, down, pre, grad_rows,
                                      grad_gate_up, grad_down, accumulate);
}

}  // namespace

TORCH_LIBRARY(ds_remoe, library) {
  library.def(
      "grouped_swiglu(Tensor rows, Tensor in_ids, Tensor out_ids, Tensor weights, int[] counts, Tensor gate_up, "
      "Tensor down, Tensor(a!) out) -> Tensor",
      &forward);
  library.def("grouped_up_projection(Tensor rows, Tensor in_ids, int[] counts, Tensor gate_up) -> Tensor", &up_projection);
  library.def(
      "grouped_swiglu_backward(Tensor grad_out, Tensor rows, Tensor in_ids, Tensor out_ids, Tensor weights, "
      "int[] counts, Tensor gate_up, Tensor down, Tensor pre_activation, Tensor(a!) grad_rows, Tensor(b!) grad_gate_up, "
      "Tensor(c!) grad_down, bool accumulate) -> Tensor",
      &backward);
}
