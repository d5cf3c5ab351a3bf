// RMSNorm and rotary positions on the CPU, fp32 and fp64, one pass over memory each way: see rms_norm.py and rope.py.
// The sum of the norm's weight gradient is cut over the threads in one way, so it is always the same.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

namespace {

using at::Tensor;

constexpr int64_t kGrain = 32768;  // elements a thread takes at least

template <typename T>
struct Lanes {
  using Vec = at::vec::Vectorized<T>;
  static constexpr int64_t kCount = Vec::size();

  static Vec load(const T* row, int64_t i, int64_t width) {
    return i + kCount <= width ? Vec::loadu(row + i) : Vec::loadu(row + i, width - i);
  }

  static void store(const Vec& value, T* row, int64_t i, int64_t width) {
    value.store(row + i, std::min(kCount, width - i));
  }

  // Lanes beyond the width were loaded as zeros.
  static T sum(const Vec& value) {
    T lanes[kCount], total = 0;
    value.store(lanes);
    for (T lane : lanes) total += lane;
    return total;
  }
};

template <typename T>
void norm_rows(const Tensor& x, const Tensor& weight, double eps, Tensor& y, Tensor& factors) {
  using L = Lanes<T>;
  using Vec = typename L::Vec;
  const int64_t width = weight.numel(), rows = factors.numel();
  const T *from = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
  T *to = y.mutable_data_ptr<T>(), *factor = factors.mutable_data_ptr<T>();
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = from + r * width;
      Vec squares(T(0));
      for (int64_t i = 0; i < width; i += L::kCount) {
        const Vec value = L::load(row, i, width);
        squares = squares + value * value;
      }
      factor[r] = T(1) / std::sqrt(L::sum(squares) / T(width) + T(eps));
      const Vec scale(factor[r]);
      for (int64_t i = 0; i < width; i += L::kCount) {
        L::store(L::load(row, i, width) * scale * L::load(w, i, width), to + r * width, i, width);
      }
    }
  });
}

template <typename T>
void norm_rows_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& factors,
                        Tensor& grad_x, Tensor& grad_weight) {
  using L = Lanes<T>;
  using Vec = typename L::Vec;
  const int64_t width = weight.numel(), rows = factors.numel();
  const int64_t parts = std::clamp<int64_t>(rows * width / kGrain, 1, at::get_num_threads());
  Tensor partial = at::zeros({parts, width}, weight.options());
  const T *g = grad.const_data_ptr<T>(), *from = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
  const T* factor = factors.const_data_ptr<T>();
  T *to = grad_x.mutable_data_ptr<T>(), *sums = partial.mutable_data_ptr<T>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      T* sum = sums + p * width;
      for (int64_t r = rows * p / parts; r < rows * (p + 1) / parts; ++r) {
        const T *grad_row = g + r * width, *row = from + r * width;
        const Vec scale(factor[r]);
        Vec product(T(0));
        for (int64_t i = 0; i < width; i += L::kCount) {
          const Vec along = L::load(grad_row, i, width) * L::load(row, i, width) * scale;
          L::store(L::load(sum, i, width) + along, sum, i, width);
          product = product + along * L::load(w, i, width);
        }
        const Vec mean(L::sum(product) / T(width));
        for (int64_t i = 0; i < width; i += L::kCount) {
          const Vec normed = L::load(row, i, width) * scale;
          const Vec grad_normed = L::load(grad_row, i, width) * L::load(w, i, width);
          L::store(scale * (grad_normed - normed * mean), to + r * width, i, width);
        }
      }
    }
  });
  T* result = grad_weight.mutable_data_ptr<T>();
  for (int64_t i = 0; i < width; ++i) {
    T total = 0;
    for (int64_t p = 0; p < parts; ++p) total += sums[p * width + i];
    result[i] = total;
  }
}

// x [B, H, S, h], any strides but the last; the pairs (i, i + h/2) turned by the angles of s, or by their negatives.
template <typename T>
void rotate_typed(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back, Tensor& y) {
  using L = Lanes<T>;
  using Vec = typename L::Vec;
  const int64_t heads = x.size(1), length = x.size(2), half = x.size(3) / 2;
  const T *from = x.const_data_ptr<T>(), *c = cos.const_data_ptr<T>(), *s = sin.const_data_ptr<T>();
  T* to = y.mutable_data_ptr<T>();
  const auto xs = x.strides(), ys = y.strides();
  const Vec sign(back ? T(-1) : T(1));
  const int64_t grain = std::max<int64_t>(1, kGrain / (2 * half * heads));
  at::parallel_for(0, x.size(0) * length, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / length, position = row % length;
      for (int64_t head = 0; head < heads; ++head) {
        const T* in = from + b * xs[0] + head * xs[1] + position * xs[2];
        T* out = to + b * ys[0] + head * ys[1] + position * ys[2];
        for (int64_t i = 0; i < half; i += L::kCount) {
          const Vec first = L::load(in, i, half), second = L::load(in + half, i, half);
          const Vec cosine = L::load(c + position * half, i, half), sine = L::load(s + position * half, i, half) * sign;
          L::store(first * cosine - second * sine, out, i, half);
          L::store(second * cosine + first * sine, out + half, i, half);
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  Tensor y = at::empty_like(x), factors = at::empty({x.numel() / weight.numel()}, x.options());
  if (x.scalar_type() == at::kFloat) {
    norm_rows<float>(x, weight, eps, y, factors);
  } else {
    norm_rows<double>(x, weight, eps, y, factors);
  }
  return {y, factors};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& factors) {
  Tensor grad_x = at::empty_like(x), grad_weight = at::empty_like(weight);
  if (x.scalar_type() == at::kFloat) {
    norm_rows_backward<float>(grad, x, weight, factors, grad_x, grad_weight);
  } else {
    norm_rows_backward<double>(grad, x, weight, factors, grad_x, grad_weight);
  }
  return {grad_x, grad_weight};
}

void rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back, Tensor& out) {
  if (x.scalar_type() == at::kFloat) {
    rotate_typed<float>(x, cos, sin, back, out);
  } else {
    rotate_typed<double>(x, cos, sin, back, out);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ds_remoe, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", &rms_norm);
  library.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor factors) -> (Tensor, Tensor)",
              &rms_norm_backward);
  library.def("rotate(Tensor x, Tensor cos, Tensor sin, bool back, Tensor(a!) out) -> ()", &rotate);
}
