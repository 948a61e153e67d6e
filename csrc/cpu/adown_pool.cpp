// adown_pool on the CPU: average pool 2×2 stride 1, and for the second half of the channels max pool 3×3 stride 2 padding 1
// of it, without the average in memory. Forward reads x once and writes the two results; backward reads x's second half
// and the two gradients and writes dx.
#include "cpu/map_view.h"

#include <tuple>

namespace {

using namespace yolov9_fast::maps;

// The slice of channels from `first` on.
template <class T>
FeatureMap slice(const FeatureMap& map, int64_t first, int64_t count) {
  FeatureMap part = map;
  part.channels = count;
  part.data = map.at<T>(0, first, 0);
  return part;
}

template <class T>
void average(const FeatureMap& x, const FeatureMap& out) {
  using A = typename Accumulate<T>::type;
  if (out.empty()) return;
  const int64_t right = x.pixel, below = x.pixel * x.width;
  const auto line = [&](const T* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const A sum = static_cast<A>(from[i]) + static_cast<A>(from[i + right]) + static_cast<A>(from[i + below]) +
                    static_cast<A>(from[i + below + right]);
      to[i] = static_cast<T>(sum * A(0.25));
    }
  };
  const int64_t outer = x.channels_last ? 1 : x.channels;
  torch::stable::parallel_for(0, x.batch * outer * out.height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / (outer * out.height), c = i / out.height % outer, h = i % out.height;
      if (!x.channels_last) {
        line(x.at<const T>(n, c, h * x.width), out.at<T>(n, c, h * out.width), out.width);
        continue;
      }
      for (int64_t w = 0; w < out.width; ++w)
        line(x.at<const T>(n, 0, h * x.width + w), out.at<T>(n, 0, h * out.width + w), x.channels);
    }
  });
}

template <class T>
void average_backward(const FeatureMap& d, const FeatureMap& dx) {
  using A = typename Accumulate<T>::type;
  const int64_t outer = dx.channels_last ? 1 : dx.channels, inner = dx.channels_last ? dx.channels : 1;
  torch::stable::parallel_for(0, dx.batch * outer * dx.height, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / (outer * dx.height), c = i / dx.height % outer, h = i % dx.height;
      const auto at = [&](int64_t y, int64_t w) { return d.at<const T>(n, c, y * d.width + w); };
      const auto edge = [&](int64_t w) {
        T* to = dx.at<T>(n, c, h * dx.width + w);
        // One average reads a corner, two read the pixels between corners.
        const T* readers[2] = {};
        int count = 0;
        for (int64_t y = std::max<int64_t>(0, h - 1); y <= std::min(h, d.height - 1); ++y)
          for (int64_t v = std::max<int64_t>(0, w - 1); v <= std::min(w, d.width - 1); ++v) readers[count++] = at(y, v);
        const T *a = readers[0], *b = readers[1];
        if (count == 1) {
          for (int64_t k = 0; k < inner; ++k) to[k] = static_cast<T>(static_cast<A>(a[k]) * A(0.25));
        } else {
          for (int64_t k = 0; k < inner; ++k)
            to[k] = static_cast<T>(static_cast<A>(a[k]) * A(0.25) + static_cast<A>(b[k]) * A(0.25));
        }
      };
      if (h == 0 || h == dx.height - 1) {
        for (int64_t w = 0; w < dx.width; ++w) edge(w);
        continue;
      }
      const auto middle = [&](int64_t w, int64_t count) {
        const T *a = at(h - 1, w - 1), *b = at(h, w - 1);
        const int64_t next = d.pixel;
        T* to = dx.at<T>(n, c, h * dx.width + w);
        for (int64_t k = 0; k < count; ++k)
          to[k] = static_cast<T>(static_cast<A>(a[k]) * A(0.25) + static_cast<A>(a[k + next]) * A(0.25) +
                                 static_cast<A>(b[k]) * A(0.25) + static_cast<A>(b[k + next]) * A(0.25));
      };
      edge(0);
      if (dx.channels_last) {
        for (int64_t w = 1; w < dx.width - 1; ++w) middle(w, inner);
      } else {
        middle(1, dx.width - 2);
      }
      edge(dx.width - 1);
    }
  });
}

// Blocks of channels go down the image row by row; the averages that a row of windows needs are kept, four rows at most.
template <class T, int Block>
class Windows {
 public:
  using A = typename Accumulate<T>::type;
  using Values = typename Lane<A, Block>::Values;
  using Places = typename Lane<A, Block>::Places;
  using Place = typename Lane<A, Block>::Integer;

  explicit Windows(const FeatureMap& x)
      : x_(x), rows_(x.height - 1), width_(x.width - 1), upper_(x.width * Block), lower_(x.width * Block) {
    for (auto& row : averages_) row.resize(width_ * Block);
    for (auto& row : gradients_) row.resize(width_ * Block);
  }

  void start(int64_t n, int64_t c) {
    n_ = n;
    c_ = c;
    ready_ = 0;
    load_rows<Block, T>(x_, n_, c_, 0, x_.width, lower_.data());
  }

  // Averages (and zeroed gradients) up to row `last`, rounded to T as if they had been stored.
  void advance(int64_t last) {
    for (; ready_ <= std::min(last, rows_ - 1); ++ready_) {
      upper_.swap(lower_);
      load_rows<Block, T>(x_, n_, c_, (ready_ + 1) * x_.width, x_.width, lower_.data());
      A* to = averages_[ready_ % 4].data();
      const A *upper = upper_.data(), *lower = lower_.data();
      for (int64_t i = 0; i < width_ * Block; ++i)
        to[i] = static_cast<A>(static_cast<T>((upper[i] + upper[i + Block] + lower[i] + lower[i + Block]) * A(0.25)));
      std::fill(gradients_[ready_ % 4].begin(), gradients_[ready_ % 4].end(), A(0));
    }
  }

  // The maximum over window (o, w) and, where asked for, its place: 3·(row − first row) + column − first column. As
  // torch's max_pool2d goes through a window: the first maximum wins, and every NaN wins over what came before.
  template <bool WithPlaces>
  Values maximum(int64_t o, int64_t w, Places* pick) const {
    const int64_t top = first(o), left = first(w);
    Values best = load_lanes<Values>(averages_[top % 4].data() + left * Block);
    Places where{};
    for (int64_t r = top; r <= last(o, rows_); ++r)
      for (int64_t v = left; v <= last(w, width_); ++v) {
        const Values value = load_lanes<Values>(averages_[r % 4].data() + v * Block);
        const Places better = (value > best) | (value != value);
        best = better ? value : best;
        if constexpr (WithPlaces) where = better ? Places{} + static_cast<Place>(3 * (r - top) + v - left) : where;
      }
    if constexpr (WithPlaces) *pick = where;
    return best;
  }

  void scatter(int64_t o, int64_t w, const A* gradient, Places pick) {
    const int64_t top = first(o), left = first(w);
    const Values given = load_lanes<Values>(gradient);
    for (int64_t r = top; r <= last(o, rows_); ++r)
      for (int64_t v = left; v <= last(w, width_); ++v) {
        A* to = gradients_[r % 4].data() + v * Block;
        const Places chosen = pick == Places{} + static_cast<Place>(3 * (r - top) + v - left);
        store_lanes(to, load_lanes<Values>(to) + (chosen ? given : Values{}));
      }
  }

  // Row h of dx, from the gradients of the averages of rows h - 1 and h; those must be complete.
  void emit(const FeatureMap& dx, int64_t h, A* row) const {
    std::fill(row, row + x_.width * Block, A(0));
    for (int64_t y = std::max<int64_t>(0, h - 1); y <= std::min(h, rows_ - 1); ++y) {
      const A* from = gradients_[y % 4].data();
      // Pixel w gets the gradients of columns w - 1 and w; the outermost ones have one.
      for (int64_t i = 0; i < Block; ++i) row[i] += from[i] * A(0.25);
      for (int64_t i = Block; i < width_ * Block; ++i) row[i] = (row[i] + from[i - Block] * A(0.25)) + from[i] * A(0.25);
      for (int64_t i = width_ * Block; i < x_.width * Block; ++i) row[i] += from[i - Block] * A(0.25);
    }
    store_rows<Block, T>(dx, n_, c_, h * x_.width, x_.width, row);
  }

  static int64_t first(int64_t o) { return std::max<int64_t>(0, 2 * o - 1); }
  static int64_t last(int64_t o, int64_t size) { return std::min(2 * o + 1, size - 1); }

 private:
  const FeatureMap& x_;
  int64_t rows_, width_, n_ = 0, c_ = 0, ready_ = 0;
  std::vector<A> upper_, lower_, averages_[4], gradients_[4];
};

constexpr int kBlock = 16;

template <class Body>
void over_blocks(const FeatureMap& x, Body&& body) {
  const int64_t blocks = (x.channels + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, x.batch * blocks, 1, [&](int64_t begin, int64_t end) { body(begin, end, blocks); });
}

template <class T>
void pooled_average(const FeatureMap& x, const FeatureMap& out) {
  using A = typename Accumulate<T>::type;
  if (out.empty()) return;
  over_blocks(x, [&](int64_t begin, int64_t end, int64_t blocks) {
    Windows<T, kBlock> windows(x);
    std::vector<A> row(out.width * kBlock);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, c = i % blocks * kBlock;
      windows.start(n, c);
      for (int64_t o = 0; o < out.height; ++o) {
        windows.advance(2 * o + 1);
        for (int64_t w = 0; w < out.width; ++w) store_lanes(row.data() + w * kBlock, windows.template maximum<false>(o, w, nullptr));
        store_rows<kBlock, T>(out, n, c, o * out.width, out.width, row.data());
      }
    }
  });
}

template <class T>
void pooled_average_backward(const FeatureMap& d, const FeatureMap& x, const FeatureMap& dx) {
  using A = typename Accumulate<T>::type;
  over_blocks(x, [&](int64_t begin, int64_t end, int64_t blocks) {
    Windows<T, kBlock> windows(x);
    std::vector<A> gradient(d.width * kBlock), row(x.width * kBlock);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, c = i % blocks * kBlock;
      windows.start(n, c);
      int64_t done = 0;
      for (int64_t o = 0; o < d.height; ++o) {
        windows.advance(2 * o + 1);
        load_rows<kBlock, T>(d, n, c, o * d.width, d.width, gradient.data());
        for (int64_t w = 0; w < d.width; ++w) {
          typename Windows<T, kBlock>::Places pick;
          windows.template maximum<true>(o, w, &pick);
          windows.scatter(o, w, gradient.data() + w * kBlock, pick);
        }
        // The next windows still add to row 2o + 1 of the averages.
        for (; done <= 2 * o && done < x.height; ++done) windows.emit(dx, done, row.data());
      }
      for (; done < x.height; ++done) windows.emit(dx, done, row.data());
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
  STD_TORCH_CHECK(x.height > 1 && x.width > 1, "adown_pool: height and width must be at least 2");
  STD_TORCH_CHECK(!split || x.channels % 2 == 0, "adown_pool: channels must be even");
}

std::tuple<Tensor, Tensor> adown_pool_forward(const Tensor& x, bool split) {
  const FeatureMap map = feature_map(x, "adown_pool", "x");
  check_size(map, split);
  const int64_t first = split ? map.channels / 2 : map.channels, second = map.channels - first;
  Tensor averaged = new_map(x, map.batch, first, map.height - 1, map.width - 1, map.channels_last);
  Tensor pooled = split ? new_map(x, map.batch, second, map.height / 2, map.width / 2, map.channels_last)
                        : torch::stable::new_empty(x, {0});
  if (map.empty()) return {averaged, pooled};
  dispatch(x.scalar_type(), "adown_pool", [&](auto zero) {
    using T = decltype(zero);
    average<T>(slice<T>(map, 0, first), feature_map(averaged, "adown_pool", "average", map.channels_last));
    if (split)
      pooled_average<T>(slice<T>(map, first, second), feature_map(pooled, "adown_pool", "pooled", map.channels_last));
  });
  return {averaged, pooled};
}

Tensor adown_pool_backward(const std::optional<Tensor>& d_first, const std::optional<Tensor>& d_second, const Tensor& x,
                           bool split) {
  const FeatureMap map = feature_map(x, "adown_pool", "x");
  check_size(map, split);
  const int64_t first = split ? map.channels / 2 : map.channels, second = map.channels - first;
  const auto gradient = [&](const Tensor& d, const char* name, int64_t channels, int64_t height, int64_t width) {
    const FeatureMap g = feature_map(d, "adown_pool", name, map.channels_last);
    STD_TORCH_CHECK(g.batch == map.batch && g.channels == channels && g.height == height && g.width == width &&
                        d.scalar_type() == x.scalar_type(),
                    "adown_pool: ", name, " must have the shape and dtype of the result");
    return g;
  };
  Tensor result = new_map(x, map.batch, map.channels, map.height, map.width, map.channels_last);
  if (map.empty()) return result;
  const FeatureMap dx = feature_map(result, "adown_pool", "dx", map.channels_last);
  dispatch(x.scalar_type(), "adown_pool", [&](auto zero_value) {
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
