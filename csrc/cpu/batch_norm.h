// Batch statistics, normalise + SiLU and their gradient over one or two feature maps, for bn_silu and rep_bn_silu.
//
// out = act(sum_b (x_b - mean_b) scale_b + shift) (+ residual), scale = weight * rstd. Forward: every x is read twice,
// out written once. Backward: dz and every x are read twice and dx is written; in float32 and float64 the first pass
// leaves act' dz in dx, so that the second needs no e^x. Measured on two cores, float32, channels_last, both passes
// with dy kept against recomputed: 44 and 54 us for 8 x 16 x 40 x 40, 314 and 411 us for 8 x 128 x 40 x 40; no
// difference for 8 x 16 x 160 x 160 (917 and 921 us).
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "cpu/tiling.h"

namespace yolov9_fast {

// The statistics and parameters of one input, vectors [C]; weight and bias null where there are none.
template <typename A>
struct Norm {
  const A* mean;
  const A* rstd;
  const A* weight;
  const A* bias;
};

// Per-channel factors of the loops, repeated for folded rows and padded to full registers.
template <typename A, int B>
struct Factors {
  Factors(const std::array<Norm<A>, B>& norms, const Tiling& tiling) {
    const int64_t padded = tiling.width + 4 * kLanes<A>;
    values.assign((2 * B + 1) * padded, A(0));
    for (int b = 0; b < B; ++b) {
      mean[b] = values.data() + (2 * b) * padded;
      scale[b] = values.data() + (2 * b + 1) * padded;
    }
    shift = values.data() + 2 * B * padded;
    for (int64_t i = 0, c = 0; i < tiling.width; ++i, c = c + 1 == tiling.channels ? 0 : c + 1) {
      for (int b = 0; b < B; ++b) {
        mean[b][i] = norms[b].mean[c];
        scale[b][i] = norms[b].weight ? norms[b].weight[c] * norms[b].rstd[c] : norms[b].rstd[c];
        shift[i] += norms[b].bias ? norms[b].bias[c] : A(0);
      }
    }
  }

  // K registers of each from column c.
  template <int K>
  void take(int64_t c, Vector<A> (&means)[B][K], Vector<A> (&scales)[B][K], Vector<A> (&shifts)[K]) const {
    for (int k = 0; k < K; ++k) {
      const int64_t i = c + k * kLanes<A>;
      shifts[k] = load(shift + i, AllLanes{});
      for (int b = 0; b < B; ++b)
        means[b][k] = load(mean[b] + i, AllLanes{}), scales[b][k] = load(scale[b] + i, AllLanes{});
    }
  }

  std::array<A*, B> mean, scale;
  A* shift;

 private:
  std::vector<A> values;
};

// In pairs: the mean of equal values is then exactly that value.
template <typename V>
V mean_of_8(const V (&x)[8]) {
  return (((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))) / 8;
}

// Mean and sum of squared deviations [C] of x. Each tile sums x - centre and its square, the centre being the mean of a
// few of its own values: no cancellation for a mean far from zero. Tiles are combined in float64.
template <typename T>
struct Statistics {
  using A = Compute<T>;

  explicit Statistics(const FeatureMap& x) : values(x.all_pixels()), channels(x.channels) {
    const Tiling tiling(x, x.pixel == channels, kLanes<A>);
    const int64_t size = tiling.entries * channels;
    const std::unique_ptr<A[]> table(new A[3 * size + kLanes<A>]);
    A *centre = table.get(), *sum = centre + size, *square = sum + size;
    over_tiles(
        tiling, kWithout,
        [&](int64_t first, int64_t rows, int64_t entry) {
          const int64_t at = entry * channels, row = tiling.fold * x.pixel;
          sum_rows(x.at<const T>(0, 0, 0) + first * row, row, rows, tiling.width, centre + at, sum + at, square + at);
        },
        [&](int64_t n, int64_t c, int64_t first, int64_t length, int64_t entry) {
          const int64_t at = entry * channels + c;
          sum_run(x.at<const T>(n, c, first), length, centre + at, sum + at, square + at);
        });
    combine(tiling, centre, sum, square);
  }

  std::vector<double> mean, m2;
  int64_t values, channels;

 private:
  static void sum_rows(const T* x, int64_t row, int64_t rows, int64_t width, A* centre, A* sum, A* square) {
    const int64_t step = rows >= 8 ? rows / 8 * row : 0;
    over_columns<A>(width, [=](auto lanes, auto registers, int64_t c) {
      constexpr int K = registers.value, L = kLanes<A>;
      Vector<A> middle[K], s[K]{}, q[K]{};
      for (int k = 0; k < K; ++k) {
        Vector<A> sample[8];
        for (int i = 0; i < 8; ++i) sample[i] = load(x + i * step + c + k * L, lanes);
        middle[k] = mean_of_8(sample);
      }
      const T* place = x + c;
      int64_t r = 0;
      for (; r + 2 <= rows; r += 2, place += 2 * row) {
        for (int k = 0; k < K; ++k) {
          const Vector<A> d = load(place + k * L, lanes) - middle[k], e = load(place + row + k * L, lanes) - middle[k];
          s[k] += d + e;
          q[k] = multiply_add(d, d, multiply_add(e, e, q[k]));
        }
      }
      if (r < rows) {
        for (int k = 0; k < K; ++k) {
          const Vector<A> d = load(place + k * L, lanes) - middle[k];
          s[k] += d;
          q[k] = multiply_add(d, d, q[k]);
        }
      }
      for (int k = 0; k < K; ++k) {
        store(centre + c + k * L, middle[k], lanes);
        store(sum + c + k * L, s[k], lanes);
        store(square + c + k * L, q[k], lanes);
      }
    });
  }

  static void sum_run(const T* x, int64_t length, A* centre, A* sum, A* square) {
    A sample[8];
    for (int i = 0; i < 8; ++i) sample[i] = static_cast<A>(x[length >= 8 ? i * (length / 8) : 0]);
    const A middle = mean_of_8(sample);
    constexpr int L = kLanes<A>;
    Vector<A> s{}, q{}, s1{}, q1{};
    int64_t i = 0;
    for (; i + 2 * L <= length; i += 2 * L) {
      const Vector<A> d = load(x + i, AllLanes{}) - middle, d1 = load(x + i + L, AllLanes{}) - middle;
      s += d, s1 += d1;
      q = multiply_add(d, d, q), q1 = multiply_add(d1, d1, q1);
    }
    if (i + L <= length) {
      const Vector<A> d = load(x + i, AllLanes{}) - middle;
      s += d, q = multiply_add(d, d, q), i += L;
    }
    s += s1, q += q1;
    A rest_sum = 0, rest_square = 0;
    for (; i < length; ++i) {
      const A d = static_cast<A>(x[i]) - middle;
      rest_sum += d;
      rest_square += d * d;
    }
    *centre = middle;
    *sum = sum_of_lanes<A>(s) + rest_sum;
    *square = sum_of_lanes<A>(q) + rest_square;
  }

  void combine(const Tiling& tiling, const A* centre, const A* sum, const A* square) {
    mean.assign(channels, 0.0), m2.assign(channels, 0.0);
    if (values == 0) return;
    for (int64_t e = 0; e < tiling.entries; ++e) {
      const double n = static_cast<double>(tiling.values_of_entry(e));
      for (int64_t c = 0; c < channels; ++c) mean[c] += n * centre[e * channels + c] + sum[e * channels + c];
    }
    for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<double>(values);
    for (int64_t e = 0; e < tiling.entries; ++e) {
      const double n = static_cast<double>(tiling.values_of_entry(e)), inverse = 1 / n;
      for (int64_t c = 0; c < channels; ++c) {
        const double s = sum[e * channels + c], apart = centre[e * channels + c] + s * inverse - mean[c];
        m2[c] += square[e * channels + c] - s * s * inverse + n * apart * apart;
      }
    }
    // Rounding may leave a constant channel below zero; written so that NaN stays.
    for (int64_t c = 0; c < channels; ++c) m2[c] = m2[c] < 0 ? 0 : m2[c];
  }
};

template <typename T, bool Silu>
Vector<Compute<T>> activated(Vector<Compute<T>> y) {
  if constexpr (Silu) return silu<T>(y);
  return y;
}

// The normalised and scaled sum of the B inputs at one register's place.
template <int B, typename V>
V normalised(const std::array<V, B>& x, const std::array<V, B>& mean, const std::array<V, B>& scale, V shift) {
  for (int b = 0; b < B; ++b) shift = multiply_add(x[b] - mean[b], scale[b], shift);
  return shift;
}

template <int B>
using FeatureMaps = std::array<FeatureMap, B>;

// Row r of each map.
template <typename T, int B>
std::array<T*, B> rows_at(const FeatureMaps<B>& maps, int64_t r) {
  std::array<T*, B> all;
  for (int b = 0; b < B; ++b) all[b] = static_cast<T*>(maps[b].data) + r * maps[b].pixel;
  return all;
}

template <int B>
bool all_dense(const FeatureMaps<B>& x, const FeatureMap& other) {
  return std::all_of(x.begin(), x.end(), [](const FeatureMap& map) { return map.pixel == map.channels; }) &&
         other.pixel == other.channels;
}

// out = act(y) (+ residual); residual.data may be null.
template <typename T, int B, bool Silu>
void apply(const FeatureMaps<B>& x, const std::array<Norm<Compute<T>>, B>& norms, const FeatureMap& residual,
           const FeatureMap& out) {
  using A = Compute<T>;
  using V = Vector<A>;
  constexpr int L = kLanes<A>;
  const bool dense = all_dense<B>(x, out) && (!residual.data || residual.pixel == residual.channels);
  const Tiling tiling(out, dense, L);
  const Factors<A, B> factors(norms, tiling);
  over_tiles(
      tiling, Silu ? kWithExponential : kWithout,
      [&](int64_t first, int64_t rows, int64_t) {
        const int64_t begin = first * tiling.fold, end = (first + rows) * tiling.fold, step = tiling.fold;
        over_columns<A>(tiling.width, [&](auto lanes, auto registers, int64_t c) {
          constexpr int K = registers.value;
          V mean[B][K], scale[B][K], shift[K];
          factors.template take<K>(c, mean, scale, shift);
          for (int64_t r = begin; r < end; r += step) {
            const std::array<const T*, B> source = rows_at<const T, B>(x, r);
            const T* added = residual.data ? static_cast<const T*>(residual.data) + r * residual.pixel : nullptr;
            T* target = static_cast<T*>(out.data) + r * out.pixel;
            for (int k = 0; k < K; ++k) {
              const int64_t i = c + k * L;
              V y = shift[k];
              for (int b = 0; b < B; ++b) y = multiply_add(load(source[b] + i, lanes) - mean[b][k], scale[b][k], y);
              V z = activated<T, Silu>(y);
              if (added) z += load(added + i, lanes);
              store(target + i, z, lanes);
            }
          }
        });
      },
      [&](int64_t n, int64_t c, int64_t first, int64_t length, int64_t) {
        std::array<V, B> mean, scale;
        std::array<const T*, B> source;
        for (int b = 0; b < B; ++b) {
          mean[b] = broadcast(factors.mean[b][c]), scale[b] = broadcast(factors.scale[b][c]);
          source[b] = x[b].template at<const T>(n, c, first);
        }
        const V shift = broadcast(factors.shift[c]);
        const T* added = residual.data ? residual.at<const T>(n, c, first) : nullptr;
        T* target = out.at<T>(n, c, first);
        over_run<A>(length, [=](auto lanes, int64_t i) {
          std::array<V, B> values;
          for (int b = 0; b < B; ++b) values[b] = load(source[b] + i, lanes);
          V z = activated<T, Silu>(normalised<B, V>(values, mean, scale, shift));
          if (added) z += load(added + i, lanes);
          store(target + i, z, lanes);
        });
      });
}

// Sums over the batch, [1 + B, C]: of dy and of dy x̂_b, where dy = act'(y) dz. With Keep, dy goes into `kept` as well,
// in the type of the computation.
template <typename T, int B, bool Silu, bool Keep>
void gradient_sums(const FeatureMap& dz, const FeatureMaps<B>& x, const std::array<Norm<Compute<T>>, B>& norms,
                   const FeatureMap& kept, Compute<T>* sums) {
  using A = Compute<T>;
  using V = Vector<A>;
  constexpr int L = kLanes<A>;
  const int64_t channels = dz.channels;
  const Tiling tiling(dz, all_dense<B>(x, dz), L);
  const Factors<A, B> factors(norms, tiling);
  const int64_t size = tiling.entries * channels;
  const std::unique_ptr<A[]> table(new A[(1 + B) * size + L]);
  over_tiles(
      tiling, Silu ? kWithExponential : kWithout,
      [&](int64_t first, int64_t rows, int64_t entry) {
        const int64_t begin = first * tiling.fold, end = (first + rows) * tiling.fold, step = tiling.fold;
        A* sums_of = table.get() + entry * channels;
        over_columns<A>(tiling.width, [&](auto lanes, auto registers, int64_t c) {
          constexpr int K = registers.value;
          V mean[B][K], scale[B][K], shift[K], sum[K]{}, product[B][K]{};
          factors.template take<K>(c, mean, scale, shift);
          for (int64_t r = begin; r < end; r += step) {
            const std::array<const T*, B> source = rows_at<const T, B>(x, r);
            const T* gradient = static_cast<const T*>(dz.data) + r * dz.pixel;
            A* target = Keep ? static_cast<A*>(kept.data) + r * kept.pixel : nullptr;
            for (int k = 0; k < K; ++k) {
              const int64_t i = c + k * L;
              V dy = load(gradient + i, lanes), y = shift[k];
              std::array<V, B> apart;
              for (int b = 0; b < B; ++b) {
                apart[b] = load(source[b] + i, lanes) - mean[b][k];
                y = multiply_add(apart[b], scale[b][k], y);
              }
              if constexpr (Silu) dy *= silu_slope<T>(y);
              if constexpr (Keep) store(target + i, dy, lanes);
              sum[k] += dy;
              for (int b = 0; b < B; ++b) product[b][k] = multiply_add(dy, apart[b], product[b][k]);
            }
          }
          for (int k = 0; k < K; ++k) {
            store(sums_of + c + k * L, sum[k], lanes);
            for (int b = 0; b < B; ++b) store(sums_of + (1 + b) * size + c + k * L, product[b][k], lanes);
          }
        });
      },
      [&](int64_t n, int64_t c, int64_t first, int64_t length, int64_t entry) {
        std::array<V, B> mean, scale, product;
        std::array<const T*, B> source;
        for (int b = 0; b < B; ++b) {
          mean[b] = broadcast(factors.mean[b][c]), scale[b] = broadcast(factors.scale[b][c]);
          source[b] = x[b].template at<const T>(n, c, first);
          product[b] = V{};
        }
        const V shift = broadcast(factors.shift[c]);
        const T* gradient = dz.at<const T>(n, c, first);
        A* target = Keep ? kept.at<A>(n, c, first) : nullptr;
        V sum{};
        over_run<A>(length, [&](auto lanes, int64_t i) {
          // Lanes beyond the run's end read dz = 0 and so add nothing.
          V dy = load(gradient + i, lanes), y = shift;
          std::array<V, B> apart;
          for (int b = 0; b < B; ++b) {
            apart[b] = load(source[b] + i, lanes) - mean[b];
            y = multiply_add(apart[b], scale[b], y);
          }
          if constexpr (Silu) dy *= silu_slope<T>(y);
          if constexpr (Keep) store(target + i, dy, lanes);
          sum += dy;
          for (int b = 0; b < B; ++b) product[b] = multiply_add(dy, apart[b], product[b]);
        });
        A* entry_of_channel = table.get() + entry * channels + c;
        entry_of_channel[0] = sum_of_lanes<A>(sum);
        for (int b = 0; b < B; ++b) entry_of_channel[(1 + b) * size] = sum_of_lanes<A>(product[b]);
      });
  std::vector<double> total(channels);
  for (int k = 0; k <= B; ++k) {
    total.assign(channels, 0.0);
    const A* part = table.get() + k * size;
    for (int64_t e = 0; e < tiling.entries; ++e) {
      for (int64_t c = 0; c < channels; ++c) total[c] += part[e * channels + c];
    }
    for (int64_t c = 0; c < channels; ++c) {
      sums[k * channels + c] = static_cast<A>(k ? total[c] * norms[k - 1].rstd[c] : total[c]);
    }
  }
}

// dx_b = scale_b (dy - mean(dy) - x̂_b mean(dy x̂_b)); means: [1 + B, C]. With Kept, `dz` is already dy, in the type of
// the computation.
template <typename T, int B, bool Silu, bool Kept>
void input_gradient(const FeatureMap& dz, const FeatureMaps<B>& x, const std::array<Norm<Compute<T>>, B>& norms,
                    const Compute<T>* means, const FeatureMaps<B>& dx) {
  using A = Compute<T>;
  using V = Vector<A>;
  using D = std::conditional_t<Kept, A, T>;
  constexpr int L = kLanes<A>;
  const int64_t channels = dz.channels;
  const Tiling tiling(dz, all_dense<B>(x, dz), L);
  const Factors<A, B> factors(norms, tiling);
  // dx = scale dy + slope (x - mean) + offset, slope and offset in two more tables laid out like the factors.
  const int64_t padded = tiling.width + 4 * L;
  std::vector<A> more(2 * B * padded, A(0));
  for (int64_t i = 0, c = 0; i < tiling.width; ++i, c = c + 1 == channels ? 0 : c + 1) {
    for (int b = 0; b < B; ++b) {
      const A scale = factors.scale[b][i];
      more[2 * b * padded + i] = -scale * norms[b].rstd[c] * means[(1 + b) * channels + c];
      more[(2 * b + 1) * padded + i] = -scale * means[c];
    }
  }
  const auto slope = [&](int b, int64_t i) { return more.data() + 2 * b * padded + i; };
  const auto offset = [&](int b, int64_t i) { return more.data() + (2 * b + 1) * padded + i; };
  // A dy kept in 16-bit passes is in the caches of the cores that computed it: the same shares, so the same least count.
  const bool same_shares = Kept && sizeof(T) == 2;
  over_tiles(
      tiling, Silu && (!Kept || same_shares) ? kWithExponential : kWithout,
      [&](int64_t first, int64_t rows, int64_t) {
        const int64_t begin = first * tiling.fold, end = (first + rows) * tiling.fold, step = tiling.fold;
        over_columns<A>(tiling.width, [&](auto lanes, auto registers, int64_t c) {
          constexpr int K = registers.value;
          V mean[B][K], scale[B][K], shift[K], steep[B][K], apart_by[B][K];
          factors.template take<K>(c, mean, scale, shift);
          for (int b = 0; b < B; ++b) {
            for (int k = 0; k < K; ++k) {
              steep[b][k] = load(slope(b, c + k * L), AllLanes{}),
              apart_by[b][k] = load(offset(b, c + k * L), AllLanes{});
            }
          }
          for (int64_t r = begin; r < end; r += step) {
            const std::array<const T*, B> source = rows_at<const T, B>(x, r);
            const std::array<T*, B> target = rows_at<T, B>(dx, r);
            const D* gradient = static_cast<const D*>(dz.data) + r * dz.pixel;
            for (int k = 0; k < K; ++k) {
              const int64_t i = c + k * L;
              V dy = load(gradient + i, lanes), y = shift[k];
              std::array<V, B> apart;
              for (int b = 0; b < B; ++b) {
                apart[b] = load(source[b] + i, lanes) - mean[b][k];
                if constexpr (Silu && !Kept) y = multiply_add(apart[b], scale[b][k], y);
              }
              if constexpr (Silu && !Kept) dy *= silu_slope<T>(y);
              for (int b = 0; b < B; ++b) {
                const V shifted = multiply_add(apart[b], steep[b][k], apart_by[b][k]);
                store(target[b] + i, multiply_add(dy, scale[b][k], shifted), lanes);
              }
            }
          }
        });
      },
      [&](int64_t n, int64_t c, int64_t first, int64_t length, int64_t) {
        std::array<V, B> mean, scale, steep, apart_by;
        std::array<const T*, B> source;
        std::array<T*, B> target;
        for (int b = 0; b < B; ++b) {
          mean[b] = broadcast(factors.mean[b][c]), scale[b] = broadcast(factors.scale[b][c]);
          steep[b] = broadcast(*slope(b, c)), apart_by[b] = broadcast(*offset(b, c));
          source[b] = x[b].template at<const T>(n, c, first), target[b] = dx[b].template at<T>(n, c, first);
        }
        const V shift = broadcast(factors.shift[c]);
        const D* gradient = dz.at<const D>(n, c, first);
        over_run<A>(length, [=](auto lanes, int64_t i) {
          V dy = load(gradient + i, lanes), y = shift;
          std::array<V, B> apart;
          for (int b = 0; b < B; ++b) {
            apart[b] = load(source[b] + i, lanes) - mean[b];
            if constexpr (Silu && !Kept) y = multiply_add(apart[b], scale[b], y);
          }
          if constexpr (Silu && !Kept) dy *= silu_slope<T>(y);
          for (int b = 0; b < B; ++b) {
            const V shifted = multiply_add(apart[b], steep[b], apart_by[b]);
            store(target[b] + i, multiply_add(dy, scale[b], shifted), lanes);
          }
        });
      });
}

}  // namespace yolov9_fast
