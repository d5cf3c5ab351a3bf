// One expert's SwiGLU on a block of rows, each function on the calling thread. In each of the six GEMMs the weights or
// their gradients pass through memory once.

#pragma once

#include "cpu_panels.h"
#include "cpu_swiglu.h"

namespace ds_remoe {

// The gradients of an expert's weights over a block of rows, as factors whose products they are.
template <typename T>
struct WeightFactors {
  using P = Panels<T>;

  int64_t count, hidden, width;
  Buffer<T> grad_out, gates, ups;  // blocks of [count, hidden], [count, width]
  Buffer<T> activation, tokens;    // panels of [count, width], [count, hidden]

  WeightFactors(int64_t count, int64_t hidden, int64_t width)
      : count(count),
        hidden(hidden),
        width(width),
        grad_out(count * hidden),
        gates(count * width),
        ups(count * width),
        activation(P::size(count, width)),
        tokens(P::size(count, hidden)) {}

  // Share `part` of `parts` of the rows of both gradients, added to what is there or instead of it.
  template <bool add>
  void multiply(int64_t part, int64_t parts, T* grad_gate_up, T* grad_down) const {
    P::template add_outer<add>(grad_out, hidden, from(part, parts, hidden), from(part + 1, parts, hidden), count,
                               activation, width, grad_down);
    const int64_t first = from(part, parts, width), last = from(part + 1, parts, width);
    P::template add_outer<add>(gates, width, first, last, count, tokens, hidden, grad_gate_up);
    P::template add_outer<add>(ups, width, first, last, count, tokens, hidden, grad_gate_up + width * hidden);
  }

 private:
  // Where a share begins: at a whole tile.
  static int64_t from(int64_t part, int64_t parts, int64_t rows) {
    const int64_t tiles = (rows + P::kRows - 1) / P::kRows;
    return std::min(rows, tiles * part / parts * P::kRows);
  }
};

template <typename T>
struct Expert {
  using P = Panels<T>;
  using Act = Activation<T>;
  using Vec = typename Act::Vec;
  static constexpr int64_t kUnits = 8 * P::kRows;  // outputs at a time that stay in cache

  const T *gate_up, *down;  // [2 width, hidden], [hidden, width]
  int64_t hidden, width;

  // pre[count, 2 width] of the rows `ids` of `rows`; `each(first, units, gates, ups)` gets panels of [units, count].
  template <typename Each>
  void up_projection(const T* rows, const int64_t* ids, int64_t count, T* pre, const Each& each) const {
    Buffer<T> tokens(P::size(hidden, count)), gates(P::size(kUnits, count)), ups(P::size(kUnits, count));
    P::put_transposed([&](int64_t i) { return rows + ids[i] * hidden; }, count, hidden, tokens);
    for (int64_t h = 0; h < width; h += kUnits) {
      const int64_t units = std::min(kUnits, width - h);
      P::matrix_times(gate_up + h * hidden, units, hidden, tokens, count, gates);
      P::matrix_times(gate_up + (width + h) * hidden, units, hidden, tokens, count, ups);
      P::take_transposed(gates, count, units, pre + h, 2 * width);
      P::take_transposed(ups, count, units, pre + width + h, 2 * width);
      each(h, units, gates.get(), ups.get());
    }
  }

  // pre[count, 2 width] and result[count, hidden].
  void forward(const T* rows, const int64_t* ids, int64_t count, const T* weight, T* pre, T* result) const {
    Buffer<T> activation(P::size(width, count)), weights(P::size(1, count)), out(P::size(kUnits, count));
    P::put(weight, count, weights, 1, 0);
    up_projection(rows, ids, count, pre, [&](int64_t first, int64_t units, const T* gates, const T* ups) {
      for (int64_t j = 0; j < P::count(count); ++j) {
        const T *gate = gates + j * units * P::kWidth, *up = ups + j * units * P::kWidth;
        T* to = activation + (j * width + first) * P::kWidth;
        for (int64_t q = 0; q < P::kWidth; q += Act::kLanes) {
          const Vec by = Vec::loadu(weights + j * P::kWidth + q);
          for (int64_t at = q; at < units * P::kWidth; at += P::kWidth) {
            Act::forward(Vec::loadu(gate + at), Vec::loadu(up + at), by).store(to + at);
          }
        }
      }
    });
    for (int64_t d = 0; d < hidden; d += kUnits) {
      const int64_t units = std::min(kUnits, hidden - d);
      P::matrix_times(down + d * width, units, width, activation, count, out);
      P::take_transposed(out, count, units, result + d, hidden);
    }
  }

  // Gradients of the rows into result[count, hidden] and of the routing weights into grad_weight[count]; returns what
  // the expert's own are made of.
  WeightFactors<T> backward(const T* grad_out, const T* rows, const int64_t* ids, int64_t count, const T* weight,
                            const T* pre, T* grad_weight, T* result) const {
    WeightFactors<T> factors(count, hidden, width);
    gather_blocks(grad_out, ids, count, factors.grad_out);
    P::times_matrix(factors.grad_out, count, hidden, down, width, factors.activation, false);
    activate(weight, pre, count, factors.activation, factors.gates, factors.ups, grad_weight);

    T* panels = factors.tokens;  // not in use yet
    P::times_matrix(factors.gates, count, width, gate_up, hidden, panels, false);
    P::times_matrix(factors.ups, count, width, gate_up + width * hidden, hidden, panels, true);
    for (int64_t i = 0; i < count; ++i) P::take(panels, count, i, result + i * hidden, hidden);
    for (int64_t i = 0; i < count; ++i) P::put(rows + ids[i] * hidden, hidden, panels, count, i);
    return factors;
  }

 private:
  void gather_blocks(const T* source, const int64_t* ids, int64_t count, T* blocks) const {
    for (int64_t k = 0; k < hidden; k += P::kDepth) {
      const int64_t depth = P::block_stride(k, hidden);
      T* to = blocks + P::block_start(k, count);
      for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * depth, source + ids[i] * hidden + k, depth * sizeof(T));
    }
  }

  // Panels `activation` hold the gradient of the activation and then its value; `gates` and `ups` are blocks.
  void activate(const T* weight, const T* pre, int64_t count, T* activation, T* gates, T* ups, T* grad_weight) const {
    for (int64_t i = 0; i < count; ++i) {
      const T *gate = pre + i * 2 * width, *up = gate + width;
      Vec total(T(0));
      for (int64_t h = 0; h < width; h += Act::kLanes) {
        T* value = activation + (h / P::kWidth * count + i) * P::kWidth + h % P::kWidth;
        const auto gradients =
            Act::backward(Vec::loadu(value), Act::load(gate, h, width), Act::load(up, h, width), Vec(weight[i]));
        total = total + gradients.weight;
        gradients.hidden.store(value);
        const int64_t at = P::block_start(h, count) + i * P::block_stride(h, width) - h;
        Act::store(gradients.gate, gates + at, h, width);
        Act::store(gradients.up, ups + at, h, width);
      }
      grad_weight[i] = Act::sum(total);
    }
  }
};

}  // namespace ds_remoe
