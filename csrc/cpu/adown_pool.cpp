// adown_pool on the CPU: a 2×2 average pool of stride 1 of the first half of the channels; for the second half a 3×3
// max pool of stride 2 and padding 1 of that average, which is never stored. Forward reads x once and writes the two
// results; backward reads the second half of x and the two gradients and writes dx.
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/channel_blocks.h"
#include "cpu/tiling.h"

namespace {

using namespace yolov9_fast;

constexpr char kOp[] = "adown_pool";

// The channels [first, first + count).
template <class T>
FeatureMap slice(const FeatureMap& map, int64_t first, int64_t count) {
  FeatureMap part = map;
  part.channels = count;
  part.data = map.at<T>(0, first, 0);
  return part;
}

template <class T>
void average(const FeatureMap& x, const FeatureMap& out) {
  using A = Compute<T>;
  if (out.empty()) return;
  const int64_t right = x.pixel, below = x.pixel * x.width;
  const auto line = [&](const T* from, T* to, int64_t count) {
    over_run<A>(count, [=](auto lanes, int64_t i) {
      const Vector<A> sum = load(from + i, lanes) + load(from + i + right, lanes) + load(from + i + below, lanes) +
                            load(from + i + below + right, lanes);
      store(to + i, sum * A(0.25), lanes);
    });
  };
  const int64_t outer = x.channels_last() ? 1 : x.channels;
  torch::stable::parallel_for(0, x.batch * outer * out.height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / (outer * out.height), c = i / out.height % outer, h = i % out.height;
      if (!x.channels_last()) {
        line(x.at<const T>(n, c, h * x.width), out.at<T>(n, c, h * out.width), out.width);
        continue;
      }
      for (int64_t w = 0; w < out.width; ++w) {
        line(x.at<const T>(n, 0, h * x.width + w), out.at<T>(n, 0, h * out.width + w), x.channels);
      }
    }
  });
}

template <class T>
void average_backward(const FeatureMap& d, const FeatureMap& dx) {
  using A = Compute<T>;
  const int64_t outer = dx.channels_last() ? 1 : dx.channels, inner = dx.channels_last() ? dx.channels : 1;
  torch::stable::parallel_for(0, dx.batch * outer * dx.height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / (outer * dx.height), c = i / dx.height % outer, h = i % dx.height;
      const auto at = [&](int64_t y, int64_t w) { return d.at<const T>(n, c, y * d.width + w); };
      const auto edge = [&](int64_t w) {
        T* to = dx.at<T>(n, c, h * dx.width + w);
        // A corner of x is part of one average, any other pixel of the border of two.
        const T* readers[2] = {};
        int count = 0;
        for (int64_t y = std::max<int64_t>(0, h - 1); y <= std::min(h, d.height - 1); ++y) {
          for (int64_t v = std::max<int64_t>(0, w - 1); v <= std::min(w, d.width - 1); ++v) readers[count++] = at(y, v);
        }
        const T *a = readers[0], *b = readers[1];
        over_run<A>(inner, [=](auto lanes, int64_t k) {
          Vector<A> sum = load(a + k, lanes) * A(0.25);
          if (count > 1) sum += load(b + k, lanes) * A(0.25);
          store(to + k, sum, lanes);
        });
      };
      if (h == 0 || h == dx.height - 1) {
        for (int64_t w = 0; w < dx.width; ++w) edge(w);
        continue;
      }
      const auto middle = [&](int64_t w, int64_t count) {
        const T *a = at(h - 1, w - 1), *b = at(h, w - 1);
        const int64_t next = d.pixel;
        T* to = dx.at<T>(n, c, h * dx.width + w);
        over_run<A>(count, [=](auto lanes, int64_t k) {
          store(to + k,
                load(a + k, lanes) * A(0.25) + load(a + k + next, lanes) * A(0.25) + load(b + k, lanes) * A(0.25) +
                    load(b + k + next, lanes) * A(0.25),
                lanes);
        });
      };
      edge(0);
      if (dx.channels_last()) {
        for (int64_t w = 1; w < dx.width - 1; ++w) middle(w, inner);
      } else {
        middle(1, dx.width - 2);
      }
      edge(dx.width - 1);
    }
  });
}

// The windows of a block of channels, row by row. Only the averages that a row of windows reads are kept: at most four
// rows of them.
template <class T>
class Windows {
 public:
  using A = Compute<T>;
  using Values = typename Block<A>::Values;
  using Positions = typename Block<A>::Positions;
  using Position = typename Block<A>::Position;

  explicit Windows(const FeatureMap& x)
      : x_(x), rows_(x.height - 1), width_(x.width - 1), upper_(x.width * kBlock), lower_(x.width * kBlock) {
    for (auto& row : averages_) row.resize(width_ * kBlock);
    for (auto& row : gradients_) row.resize(width_ * kBlock);
  }

  void start(int64_t n, int64_t c) {
    n_ = n;
    c_ = c;
    ready_ = 0;
    load_rows<T>(x_, n_, c_, 0, x_.width, lower_.data());
  }

  // Averages (and zeroed gradients) up to row `last`, rounded to T as if they had been stored.
  void advance(int64_t last) {
    for (; ready_ <= std::min(last, rows_ - 1); ++ready_) {
      upper_.swap(lower_);
      load_rows<T>(x_, n_, c_, (ready_ + 1) * x_.width, x_.width, lower_.data());
      A* to = averages_[ready_ % 4].data();
      const A *upper = upper_.data(), *lower = lower_.data();
      for (int64_t i = 0; i < width_ * kBlock; i += kLanes<A>) {
        const auto at = [i](const A* row) { return load(row + i, AllLanes{}); };
        const Vector<A> sum = at(upper) + at(upper + kBlock) + at(lower) + at(lower + kBlock);
        store(to + i, rounded_to<T>(sum * A(0.25)), AllLanes{});
      }
      std::fill(gradients_[ready_ % 4].begin(), gradients_[ready_ % 4].end(), A(0));
    }
  }

  // The maximum over window (o, w) and, if asked for, its position 3·(row − first row) + column − first column. As in
  // torch's max_pool2d, the first maximum of a window wins, and a NaN wins over everything before it.
  template <bool WithPositions>
  Values maximum(int64_t o, int64_t w, Positions* pick) const {
    const int64_t top = first(o), left = first(w);
    Values best = load_block<Values>(averages_[top % 4].data() + left * kBlock);
    Positions where{};
    for (int64_t r = top; r <= last(o, rows_); ++r)
      for (int64_t v = left; v <= last(w, width_); ++v) {
        const Values value = load_block<Values>(averages_[r % 4].data() + v * kBlock);
        const Positions better = (value > best) | (value != value);
        best = better ? value : best;
        if constexpr (WithPositions)
          where = better ? Positions{} + static_cast<Position>(3 * (r - top) + v - left) : where;
      }
    if constexpr (WithPositions) *pick = where;
    return best;
  }

  void scatter(int64_t o, int64_t w, const A* gradient, Positions pick) {
    const int64_t top = first(o), left = first(w);
    const Values given = load_block<Values>(gradient);
    for (int64_t r = top; r <= last(o, rows_); ++r)
      for (int64_t v = left; v <= last(w, width_); ++v) {
        A* to = gradients_[r % 4].data() + v * kBlock;
        const Positions chosen = pick == Positions{} + static_cast<Position>(3 * (r - top) + v - left);
        store_block(to, load_block<Values>(to) + (chosen ? given : Values{}));
      }
  }

  // Row h of dx, from the complete gradients of the averages of rows h - 1 and h.
  void write(const FeatureMap& dx, int64_t h, A* row) const {
    std::fill(row, row + x_.width * kBlock, A(0));
    for (int64_t y = std::max<int64_t>(0, h - 1); y <= std::min(h, rows_ - 1); ++y) {
      const A* from = gradients_[y % 4].data();
      // Pixel w gets the gradients of columns w - 1 and w; the first and the last pixel get one.
      for (int64_t i = 0; i < kBlock; ++i) row[i] += from[i] * A(0.25);
      for (int64_t i = kBlock; i < width_ * kBlock; ++i)
        row[i] = (row[i] + from[i - kBlock] * A(0.25)) + from[i] * A(0.25);
      for (int64_t i = width_ * kBlock; i < x_.width * kBlock; ++i) row[i] += from[i - kBlock] * A(0.25);
    }
    store_rows<T>(dx, n_, c_, h * x_.width, x_.width, row);
  }

  static int64_t first(int64_t o) { return std::max<int64_t>(0, 2 * o - 1); }
  static int64_t last(int64_t o, int64_t size) { return std::min(2 * o + 1, size - 1); }

 private:
  const FeatureMap& x_;
  int64_t rows_, width_, n_ = 0, c_ = 0, ready_ = 0;
  std::vector<A> upper_, lower_, averages_[4], gradients_[4];
};

template <class T>
void pooled_average(const FeatureMap& x, const FeatureMap& out) {
  using A = Compute<T>;
  if (out.empty()) return;
  over_blocks(x, [&](const Share& share) {
    Windows<T> windows(x);
    std::vector<A> row(out.width * kBlock);
    for (int64_t block = share.begin; block < share.end; ++block) {
      const int64_t n = share.image(block), c = share.channel(block);
      windows.start(n, c);
      for (int64_t o = 0; o < out.height; ++o) {
        windows.advance(2 * o + 1);
        for (int64_t w = 0; w < out.width; ++w)
          store_block(row.data() + w * kBlock, windows.template maximum<false>(o, w, nullptr));
        store_rows<T>(out, n, c, o * out.width, out.width, row.data());
      }
    }
  });
}

template <class T>
void pooled_average_backward(const FeatureMap& d, const FeatureMap& x, const FeatureMap& dx) {
  using A = Compute<T>;
  over_blocks(x, [&](const Share& share) {
    Windows<T> windows(x);
    std::vector<A> gradient(d.width * kBlock), row(x.width * kBlock);
    for (int64_t block = share.begin; block < share.end; ++block) {
      const int64_t n = share.image(block), c = share.channel(block);
      windows.start(n, c);
      int64_t done = 0;
      for (int64_t o = 0; o < d.height; ++o) {
        windows.advance(2 * o + 1);
        load_rows<T>(d, n, c, o * d.width, d.width, gradient.data());
        for (int64_t w = 0; w < d.width; ++w) {
          typename Windows<T>::Positions pick;
          windows.template maximum<true>(o, w, &pick);
          windows.scatter(o, w, gradient.data() + w * kBlock, pick);
        }
        // The next row of windows also adds to row 2o + 1 of the averages.
        for (; done <= 2 * o && done < x.height; ++done) windows.write(dx, done, row.data());
      }
      for (; done < x.height; ++done) windows.write(dx, done, row.data());
    }
  });
}

template <class T>
void zero(const FeatureMap& map) {
  for (int64_t n = 0; n < map.batch; ++n)
    for (int64_t c = 0; c < map.channels; ++c)
      for (int64_t p = 0; p < map.pixels(); ++p) *map.at<T>(n, c, p) = T(0);
}

void check_size(const FeatureMap& x, bool split) {
  STD_TORCH_CHECK(x.height > 1 && x.width > 1, kOp, ": x: expected height and width of at least 2, got ", x.height,
                  " and ", x.width);
  STD_TORCH_CHECK(!split || x.channels % 2 == 0, kOp, ": x: expected an even number of channels, got ", x.channels);
}

std::tuple<Tensor, Tensor> adown_pool_forward(const Tensor& x, bool split) {
  const FeatureMap map = feature_map(x, kOp, "x");
  check_size(map, split);
  const int64_t first = split ? map.channels / 2 : map.channels, second = map.channels - first;
  Tensor averaged = empty_map(x, first, map.height - 1, map.width - 1);
  Tensor pooled = split ? empty_map(x, second, map.height / 2, map.width / 2) : torch::stable::new_empty(x, {0});
  if (map.empty()) return {averaged, pooled};
  dispatch(x.scalar_type(), kOp, "x", [&](auto zero) {
    using T = decltype(zero);
    average<T>(slice<T>(map, 0, first), feature_map(averaged, kOp, "average", map.layout));
    if (split) pooled_average<T>(slice<T>(map, first, second), feature_map(pooled, kOp, "pooled", map.layout));
  });
  return {averaged, pooled};
}

Tensor adown_pool_backward(const std::optional<Tensor>& d_first, const std::optional<Tensor>& d_second, const Tensor& x,
                           bool split) {
  const FeatureMap map = feature_map(x, kOp, "x");
  check_size(map, split);
  const int64_t first = split ? map.channels / 2 : map.channels, second = map.channels - first;
  const auto gradient = [&](const Tensor& d, const char* name, int64_t channels, int64_t height, int64_t width) {
    const FeatureMap g = feature_map(d, kOp, name, map.layout);
    STD_TORCH_CHECK(g.batch == map.batch && g.channels == channels && g.height == height && g.width == width &&
                        d.scalar_type() == x.scalar_type(),
                    kOp, ": ", name, ": expected the shape and dtype of the result");
    return g;
  };
  Tensor result = empty_map(x);
  if (map.empty()) return result;
  const FeatureMap dx = feature_map(result, kOp, "dx", map.layout);
  dispatch(x.scalar_type(), kOp, "x", [&](auto zero_value) {
    using T = decltype(zero_value);
    const FeatureMap dx_first = slice<T>(dx, 0, first), dx_second = slice<T>(dx, first, second);
    if (d_first.has_value()) {
      average_backward<T>(gradient(*d_first, "d_first", first, map.height - 1, map.width - 1), dx_first);
    } else {
      zero<T>(dx_first);
    }
    if (split && d_second.has_value()) {
      pooled_average_backward<T>(gradient(*d_second, "d_second", second, map.height / 2, map.width / 2),
                                 slice<T>(map, first, second), dx_second);
    } else if (split) {
      zero<T>(dx_second);
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("adown_pool_forward", TORCH_BOX(&adown_pool_forward));
  library.impl("adown_pool_backward", TORCH_BOX(&adown_pool_backward));
}
