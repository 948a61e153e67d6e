// spp on the CPU: three stacked max pools 5×5, stride 1, and their gradient, in one pass over blocks of channels whose
// planes stay in the cache. Forward reads x and writes three maps; backward reads seven maps and writes one; no indices
// are kept: the gradient finds the maxima again.
#include "cpu/map_view.h"

namespace {

using namespace yolov9_fast::maps;

constexpr int64_t kReach = 2;  // 5×5 with padding 2

// Planes of `Block` channels: [H·W][Block].
template <class A, int Block>
struct Pool {
  using Values = typename Lane<A, Block>::Values;
  using Places = typename Lane<A, Block>::Places;
  using Place = typename Lane<A, Block>::Integer;

  int64_t height, width;
  std::vector<A> rows;                        // maximum of each row of a window
  std::vector<Place> row_pick, column_pick;  // where in the window: its row, and in each row its column
  std::vector<A> carried;

  Pool(int64_t h, int64_t w, bool with_gradient) : height(h), width(w), rows(h * w * Block) {
    if (with_gradient) {
      row_pick.resize(h * w * Block);
      column_pick.resize(h * w * Block);
      carried.resize(h * w * Block);
    }
  }

  // One direction: positions at distance `step`, `length` of them in a line. As torch's max_pool2d goes through a
  // window: the first maximum wins, and every NaN wins over what came before.
  template <bool WithPlaces>
  static void line(const A* from, A* best, Place* pick, int64_t length, int64_t step) {
    for (int64_t i = 0; i < length; ++i) {
      const int64_t first = std::max<int64_t>(0, i - kReach), last = std::min(length - 1, i + kReach);
      Values value = load_lanes<Values>(from + first * step);
      Places where = Places{} + static_cast<Place>(first - i);
      for (int64_t j = first + 1; j <= last; ++j) {
        const Values next = load_lanes<Values>(from + j * step);
        const Places better = (next > value) | (next != next);
        value = better ? next : value;
        if constexpr (WithPlaces) where = better ? Places{} + static_cast<Place>(j - i) : where;
      }
      store_lanes(best + i * step, value);
      if constexpr (WithPlaces) store_lanes(pick + i * step, where);
    }
  }

  void forward(const A* x, A* y) {
    for (int64_t h = 0; h < height; ++h) line<false>(x + h * width * Block, rows.data() + h * width * Block, nullptr, width, Block);
    for (int64_t w = 0; w < width; ++w) line<false>(rows.data() + w * Block, y + w * Block, nullptr, height, width * Block);
  }

  // to[j] += Σ from[i] over those i that picked j.
  static void collect(const A* from, const Place* pick, A* to, int64_t length, int64_t step) {
    for (int64_t j = 0; j < length; ++j) {
      Values sum = load_lanes<Values>(to + j * step);
      for (int64_t i = std::max<int64_t>(0, j - kReach); i <= std::min(length - 1, j + kReach); ++i) {
        const Places chosen = load_lanes<Places>(pick + i * step) == Places{} + static_cast<Place>(j - i);
        sum += chosen ? load_lanes<Values>(from + i * step) : Values{};
      }
      store_lanes(to + j * step, sum);
    }
  }

  // dx += gradient of the pool of x at dy. A window's maximum is the maximum of its rows' maxima, in the same order.
  void backward(const A* x, const A* dy, A* dx) {
    const int64_t row = width * Block;
    for (int64_t h = 0; h < height; ++h) line<true>(x + h * row, rows.data() + h * row, column_pick.data() + h * row, width, Block);
    // The values of the maxima are not needed; `carried` is free until the gradients are collected.
    for (int64_t w = 0; w < width; ++w)
      line<true>(rows.data() + w * Block, carried.data() + w * Block, row_pick.data() + w * Block, height, row);
    std::fill(carried.begin(), carried.end(), A(0));
    for (int64_t w = 0; w < width; ++w)
      collect(dy + w * Block, row_pick.data() + w * Block, carried.data() + w * Block, height, row);
    for (int64_t h = 0; h < height; ++h) collect(carried.data() + h * row, column_pick.data() + h * row, dx + h * row, width, Block);
  }
};

void check_like(const FeatureMap& map, const FeatureMap& x, const Tensor& tensor, const Tensor& like) {
  STD_TORCH_CHECK(map.batch == x.batch && map.channels == x.channels && map.height == x.height &&
                      map.width == x.width && tensor.scalar_type() == like.scalar_type(),
                  "spp: all maps must have the shape and dtype of x");
}

template <class Body>
void over_blocks(const FeatureMap& x, int block, Body&& body) {
  const int64_t blocks = (x.channels + block - 1) / block;
  torch::stable::parallel_for(0, x.batch * blocks, 1, [&](int64_t begin, int64_t end) { body(begin, end, blocks); });
}

constexpr int kBlock = 16;

template <class T>
void pool_three(const FeatureMap& x, const FeatureMap (&y)[3]) {
  using A = typename Accumulate<T>::type;
  over_blocks(x, kBlock, [&](int64_t begin, int64_t end, int64_t blocks) {
    Pool<A, kBlock> pool(x.height, x.width, false);
    std::vector<A> from(x.pixels() * kBlock), to(x.pixels() * kBlock);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, c = i % blocks * kBlock;
      load_rows<kBlock, T>(x, n, c, 0, x.pixels(), from.data());
      for (const FeatureMap& map : y) {
        pool.forward(from.data(), to.data());
        store_rows<kBlock, T>(map, n, c, 0, x.pixels(), to.data());
        from.swap(to);
      }
    }
  });
}

void spp_forward(const Tensor& x, Tensor y1, Tensor y2, Tensor y3) {
  const FeatureMap map = feature_map(x, "spp", "x");
  const FeatureMap out[3] = {feature_map(y1, "spp", "y1", map.channels_last),
                             feature_map(y2, "spp", "y2", map.channels_last),
                             feature_map(y3, "spp", "y3", map.channels_last)};
  check_like(out[0], map, y1, x);
  check_like(out[1], map, y2, x);
  check_like(out[2], map, y3, x);
  if (map.empty()) return;
  dispatch(x.scalar_type(), "spp", [&](auto zero) { pool_three<decltype(zero)>(map, out); });
}

// maps: x, y1, y2 (what was pooled); gradients: d0 of x, d1, d2, d3 of the pooled.
template <class T>
void pool_three_backward(const FeatureMap (&maps)[3], const FeatureMap (&gradients)[4], const FeatureMap& dx) {
  using A = typename Accumulate<T>::type;
  over_blocks(dx, kBlock, [&](int64_t begin, int64_t end, int64_t blocks) {
    const int64_t pixels = dx.pixels();
    Pool<A, kBlock> pool(dx.height, dx.width, true);
    std::vector<A> values(pixels * kBlock), upper(pixels * kBlock), lower(pixels * kBlock);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / blocks, c = i % blocks * kBlock;
      load_rows<kBlock, T>(gradients[3], n, c, 0, pixels, upper.data());
      for (int level = 2; level >= 0; --level) {
        load_rows<kBlock, T>(maps[level], n, c, 0, pixels, values.data());
        load_rows<kBlock, T>(gradients[level], n, c, 0, pixels, lower.data());
        pool.backward(values.data(), upper.data(), lower.data());
        upper.swap(lower);
      }
      store_rows<kBlock, T>(dx, n, c, 0, pixels, upper.data());
    }
  });
}

Tensor spp_backward(const Tensor& x, const Tensor& y1, const Tensor& y2, const Tensor& d0, const Tensor& d1,
                    const Tensor& d2, const Tensor& d3) {
  const bool channels_last = prefers_channels_last(x);
  const auto map = [&](const Tensor& tensor, const char* name) { return feature_map(tensor, "spp", name, channels_last); };
  const FeatureMap maps[3] = {map(x, "x"), map(y1, "y1"), map(y2, "y2")};
  const FeatureMap gradients[4] = {map(d0, "d0"), map(d1, "d1"), map(d2, "d2"), map(d3, "d3")};
  check_like(maps[1], maps[0], y1, x);
  check_like(maps[2], maps[0], y2, x);
  check_like(gradients[0], maps[0], d0, x);
  check_like(gradients[1], maps[0], d1, x);
  check_like(gradients[2], maps[0], d2, x);
  check_like(gradients[3], maps[0], d3, x);
  Tensor result = new_map(x, maps[0].batch, maps[0].channels, maps[0].height, maps[0].width, channels_last);
  if (maps[0].empty()) return result;
  const FeatureMap dx = map(result, "dx");
  dispatch(x.scalar_type(), "spp", [&](auto zero) { pool_three_backward<decltype(zero)>(maps, gradients, dx); });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(yolov9_fast, CPU, library) {
  library.impl("spp_forward", TORCH_BOX(&spp_forward));
  library.impl("spp_backward", TORCH_BOX(&spp_backward));
}
