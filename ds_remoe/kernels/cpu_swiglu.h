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
};

}  // namespace ds_remoe
