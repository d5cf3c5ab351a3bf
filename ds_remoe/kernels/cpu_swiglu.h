// SwiGLU with the routing weight, w · silu(gate) · up, and its gradients, a vector at a time.

#pragma once

#include <ATen/cpu/vec/vec.h>

namespace ds_remoe {

template <typename T>
struct Activation {
  using Vec = at::vec::Vectorized<T>;
  static constexpr int64_t kLanes = Vec::size();

  struct Gradients {
    Vec gate, up, weight, hidden;  // `hidden` is the forward value
  };

  static Vec sigmoid(const Vec& x) { return Vec(T(1)) / (Vec(T(1)) + x.neg().exp()); }

  static Vec forward(const Vec& gate, const Vec& up, const Vec& weight) { return gate * sigmoid(gate) * up * weight; }

  static Gradients backward(const Vec& grad, const Vec& gate, const Vec& up, const Vec& weight) {
    const Vec sig = sigmoid(gate), silu = gate * sig, hidden = silu * up, weighted = grad * weight;
    return {weighted * up * (sig + silu * (Vec(T(1)) - sig)), weighted * silu, grad * hidden, hidden * weight};
  }

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

  static T sum(const Vec& value) {
    T lanes[kLanes], total = 0;
    value.store(lanes);
    for (T lane : lanes) total += lane;
    return total;
  }

  // Returns the routing weight's gradient; `grad_hidden` is overwritten by the forward value.
  static T backward_row(T* grad_hidden, const T* gates, const T* ups, T weight, T* grad_gates, T* grad_ups,
                        int64_t width) {
    Vec total(T(0));
    for (int64_t h = 0; h < width; h += kLanes) {
      const Gradients gradients =
          backward(load(grad_hidden, h, width), load(gates, h, width), load(ups, h, width), Vec(weight));
      total = total + gradients.weight;
      store(gradients.gate, grad_gates, h, width);
      store(gradients.up, grad_ups, h, width);
      store(gradients.hidden, grad_hidden, h, width);
    }
    return sum(total);
  }
};

}  // namespace ds_remoe
